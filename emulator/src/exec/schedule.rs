//! Blocks over worker threads, and warps inside a block.
//!
//! A worker takes one block after the other and runs each until it ends. A block that uses up its turns, or one turn by
//! polling, may be waiting for another block: it is put aside for a new one and resumed later, so that blocks that wait
//! for each other all get to run. As many are begun as the device's multiprocessors hold, in a cooperative launch all.
//! Polls are the loads by which a program can wait for other blocks: on global memory, a volatile or other strong load,
//! an atomic with a result, or a single thread's load past the L1 cache.
//!
//! **Sample.** [`Settings::blocks`] may limit a launch to some blocks of its grid, spread over it by a stride that is
//! the golden section of their number, so that they meet no period of the grid. If the blocks are of several kinds
//! ([`Settings::kinds`]), each has a sample of its own, since a few of all would hardly have each kind's share.
//!
//! **Order.** Without a seed, blocks and warps run in order and a warp keeps its turn until it waits. With a seed,
//! blocks are issued in a random order, the next warp is drawn at random, and turns are short and random.
//!
//! **Faults.** A launch reports the fault of the first block in issue order that has one, whatever the number of
//! workers: later blocks are abandoned at the end of a turn, earlier ones run on, since their fault would take
//! precedence. Not for ever, though: an earlier block may be waiting for the one that faulted. So it is abandoned too
//! once one of its warps has polled more than [`POLLS`] times. The reported fault therefore depends on timing only if a
//! block polls more than that and then faults itself. Blocks that never poll always run to their end.

use super::interp::{self, Runner, Turn};
use super::races::{GlobalRaces, GridBarrier};
use super::state::{Block, Env, Machine, Noted, TURN, Touched, Wait, Warp, mix, resolve};
use super::{Checks, Counters, Fault, FaultKind, Isa, Launch, Settings, Span};
use crate::memory::Memory;
use crate::num::FlopType;
use crate::ptx::program::Op;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Turns per warp before a block is put aside for another; each time it is resumed it gets as many again.
const TURNS_OF_WARP: u32 = 32;
/// Blocks that a worker keeps begun, not counting those that wait for others.
const MAX_BEGUN: usize = 128;
/// Threads and blocks that one multiprocessor of the largest device holds. Grids that just fill the device are written
/// to wait for all of their blocks, whether or not the launch is cooperative.
const RESIDENT: (u32, u32) = (2048, 32);

/// Polls of a warp after which its block counts as waiting for another. Loops that poll a few times per iteration
/// without waiting stay below.
const POLLS: u64 = 1 << 12;

/// The golden section, whose multiples are spread most evenly over a circle, however many there are.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// Bytes of the workspace of a cooperative grid.
const GRID_WORKSPACE: u64 = 64;

/// The best instruction set that this processor supports.
pub fn best_isa() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2")
            && has!("fma")
            && has!("f16c")
            && has!("bmi1")
            && has!("bmi2")
            && has!("lzcnt")
            && has!("popcnt");
        if avx2 && has!("avx512f") && has!("avx512vl") && has!("avx512bw") && has!("avx512dq") {
            return Isa::Avx512;
        }
        if avx2 {
            return Isa::Avx2;
        }
    }
    Isa::Portable
}

fn runner(wanted: Option<Isa>) -> Runner {
    let best = best_isa();
    // An instruction set that the processor lacks is not used, even if asked for.
    let isa = wanted.filter(|&isa| isa as u32 <= best as u32).unwrap_or(best);
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => interp::run_avx512,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => interp::run_avx2,
        _ => interp::run_portable,
    }
}

/// The order of issue: a permutation of the `count` blocks from `first` on that needs no table, of which the first
/// `run` are run.
struct Order {
    first: u64,
    count: u64,
    run: u64,
    factor: u64,
    offset: u64,
}

impl Order {
    /// `most`: how many blocks are run at most; 0 is all.
    fn new(first: u64, count: u64, seed: Option<u64>, most: u64) -> Self {
        let run = if most == 0 { count } else { most.min(count) };
        let (factor, offset) = match seed {
            _ if run < count => ((count as f64 * GOLDEN) as u64, 0),
            Some(seed) => (mix(seed) % count, mix(mix(seed)) % count),
            None => return Order { first, count, run, factor: 1, offset: 0 },
        };
        let gcd = |mut a: u64, mut b: u64| {
            while b != 0 {
                (a, b) = (b, a % b);
            }
            a
        };
        let mut factor = factor;
        while gcd(factor, count) != 1 {
            factor = (factor + 1) % count;
            if count == 1 {
                break;
            }
        }
        Order { first, count, run, factor, offset }
    }

    fn block(&self, issue: u64) -> u64 {
        let place = u128::from(issue) * u128::from(self.factor) + u128::from(self.offset);
        self.first + (place % u128::from(self.count)) as u64
    }
}

/// How many blocks of each kind are run if `most` are in all: as many of each, as far as there are so many, and at
/// least one.
fn samples(kinds: &[u64], most: u64) -> Vec<u64> {
    let mut by_size: Vec<usize> = (0..kinds.len()).collect();
    by_size.sort_by_key(|&kind| kinds[kind]);
    let (mut run, mut left) = (vec![0; kinds.len()], most);
    for (done, kind) in by_size.into_iter().enumerate() {
        run[kind] = (left / (kinds.len() - done) as u64).clamp(1, kinds[kind]);
        left = left.saturating_sub(run[kind]);
    }
    run
}

/// State shared by the workers of a launch.
struct Shared<'a> {
    env: &'a Env<'a>,
    order: Order,
    next: AtomicU64,
    /// Place in the order of issue of the first block with a fault.
    first_fault: AtomicU64,
    fault: Mutex<Option<(u64, Box<Fault>)>>,
    output: Mutex<Vec<(u64, Vec<u8>)>>,
    counters: Mutex<Counters>,
    run: Runner,
}

/// Runs a kernel to completion.
///
/// # Errors
/// The fault of the first block, in the order of issue, that has one.
///
/// # Panics
/// If the launch is not one that a driver would accept: a kernel that was not parsed, parameters shorter than the
/// kernel's, an empty grid, or a block that is empty or has more than 1024 threads.
pub fn launch(memory: &Memory, launch: &Launch, settings: &Settings) -> Result<Counters, Fault> {
    launch_and_note(memory, launch, settings, None)
}

/// The same, which also lists what the launch read and wrote of global memory, as far as it is counted
/// ([`Settings::counters`]).
///
/// # Errors
/// As [`launch`].
///
/// # Panics
/// As [`launch`].
pub fn launch_noting(
    memory: &Memory,
    launch: &Launch,
    settings: &Settings,
    spans: &mut Vec<Span>,
) -> Result<Counters, Fault> {
    launch_and_note(memory, launch, settings, Some(spans))
}

fn launch_and_note(
    memory: &Memory,
    launch: &Launch,
    settings: &Settings,
    mut spans: Option<&mut Vec<Span>>,
) -> Result<Counters, Fault> {
    let kernel = launch.kernel;
    let program = &kernel.program;
    assert!(!program.steps.is_empty(), "kernel {} was not made by `ptx::parse`: it has no code", kernel.name);
    assert!(
        launch.params.len() >= kernel.param_bytes as usize,
        "{} parameter bytes for {}",
        launch.params.len(),
        kernel.param_bytes
    );
    let threads = launch.block.iter().product::<u32>();
    assert!((1..=1024).contains(&threads), "a block of {threads} threads");
    let count = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
    assert!(count > 0, "an empty grid");
    let most = if launch.cooperative { 0 } else { settings.blocks };
    let kinds: Vec<u64> = settings.kinds.iter().copied().filter(|&blocks| blocks > 0).collect();
    if most == 0 || most >= count || kinds.iter().sum::<u64>() != count {
        return run(memory, launch, settings, Order::new(0, count, settings.schedule_seed, most), spans);
    }
    let samples = samples(&kinds, most);
    let (all_run, mut first, mut sum) = (samples.iter().sum::<u64>(), 0, Counters::default());
    for (blocks, most) in kinds.into_iter().zip(samples) {
        let order = Order::new(first, blocks, settings.schedule_seed, most);
        let mut of_kind = run(memory, launch, settings, order, spans.as_deref_mut())?;
        of_kind.scale(blocks * all_run, most * count);
        sum.add(&of_kind);
        first += blocks;
    }
    sum.blocks = all_run;
    Ok(sum)
}

/// Runs the blocks of the grid that `order` has, and adds what they access to `spans`.
fn run(
    memory: &Memory,
    launch: &Launch,
    settings: &Settings,
    order: Order,
    spans: Option<&mut Vec<Span>>,
) -> Result<Counters, Fault> {
    let kernel = launch.kernel;
    let program = &kernel.program;
    let count = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
    let threads = launch.block.iter().product::<u32>();
    if !settings.checks.uninitialised {
        memory.stop_tracking();
    }
    let range = memory.range();
    let checks = Checks {
        uninitialised: settings.checks.uninitialised && memory.tracking(),
        shared_races: settings.checks.shared_races && threads > 1,
        global_races: settings.checks.global_races && count > 1 && count < u64::from(u32::MAX),
        ..settings.checks
    };
    let workspace = match launch.cooperative {
        true => memory.alloc_host(GRID_WORKSPACE),
        false => None,
    };
    let barrier =
        workspace.map(|address| GridBarrier { addresses: address..address + GRID_WORKSPACE, blocks: count as usize });
    let allocations = memory.snapshot();
    let end = allocations.last().map_or(range.0, |last| last.address + last.bytes);
    let reach = if checks.bounds { end - range.0 } else { range.1 };
    let env = Env {
        launch,
        program,
        settings,
        memory,
        allocations: allocations.clone(),
        range,
        checks,
        shared_bytes: match program.reserved_shared {
            0 => kernel.static_shared + launch.dynamic_shared,
            reserved => (kernel.static_shared + launch.dynamic_shared).next_multiple_of(16) + reserved,
        },
        // Without the bounds check accesses need not be aligned, so a granule is one byte.
        granule: if checks.bounds { program.smallest_shared.trailing_zeros() } else { 0 },
        threads,
        local_stride: kernel.local_bytes.next_multiple_of(16),
        constants: resolve(program, launch.module),
        first_constant: program.constants.first().map_or(program.file_bytes, |&(offset, _)| offset),
        global_races: match checks.global_races {
            true => memory.shadow().map(|shadow| GlobalRaces::new(shadow, barrier)),
            false => None,
        },
        touched: settings.counters.then(|| [(); 2].map(|()| Touched::new(range.0, reach))),
        noted: spans.is_some().then(|| Noted::new(range.0, reach)),
        grid_workspace: workspace.unwrap_or(0),
    };
    let shared = Shared {
        env: &env,
        order,
        next: AtomicU64::new(0),
        first_fault: AtomicU64::new(u64::MAX),
        fault: Mutex::new(None),
        output: Mutex::new(vec![]),
        counters: Mutex::new(Counters::default()),
        run: runner(settings.isa),
    };
    let cores = if settings.threads == 0 { rayon::current_num_threads() } else { settings.threads };
    let workers = (cores as u64).min(shared.order.run);
    if workers == 1 {
        shared.work();
    } else if settings.threads == 0 {
        rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| shared.work())));
    } else {
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| shared.work());
            }
        });
    }
    if let Some(address) = workspace {
        // Cannot fail: the allocation was made above, and only here is it known.
        let _ = memory.free(address);
    }
    let mut output = shared.output.into_inner().unwrap_or_else(PoisonError::into_inner);
    output.sort_by_key(|&(block, _)| block);
    for (_, text) in output {
        match &settings.output {
            Some(output) => output(&text),
            None => print(&text),
        }
    }
    if let Some((_, fault)) = shared.fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(*fault);
    }
    let mut counters = shared.counters.into_inner().unwrap_or_else(PoisonError::into_inner);
    if settings.counters {
        if let Some(touched @ [read, written]) = &env.touched {
            if let (Some(noted), Some(spans)) = (&env.noted, spans) {
                noted.list(touched, spans);
                // The barrier of a cooperative grid is not the program's.
                spans.retain(|span| span.first.wrapping_sub(env.grid_workspace) >= GRID_WORKSPACE);
            }
            counters.distinct_read_bytes = read.sectors() * 32;
            counters.distinct_written_bytes = written.sectors() * 32;
            let both = read.sectors_in_both(written) * 32;
            counters.distinct_bytes = counters.distinct_read_bytes + counters.distinct_written_bytes - both;
        }
        counters.blocks = shared.order.run;
    }
    Ok(counters)
}

/// Prints to standard output, after what the program has printed so far. Both C's and Rust's buffers are flushed:
/// Rust's would not be flushed when the program ends.
fn print(text: &[u8]) {
    // SAFETY: null means all output streams.
    unsafe { libc::fflush(std::ptr::null_mut()) };
    let mut output = std::io::stdout().lock();
    // A closed standard output is no fault of the kernel.
    drop(output.write_all(text).and_then(|()| output.flush()));
}

impl Shared<'_> {
    /// One worker: runs until no block is left.
    fn work(&self) {
        let mut machine = Machine::new(self.env);
        // Blocks put aside, each with whether it waits; `busy` counts those that do not.
        let mut aside: VecDeque<(Block, bool)> = VecDeque::new();
        let mut busy = 0;
        let mut spare: Vec<Block> = vec![];
        let launch = self.env.launch;
        let resident = launch.multiprocessors as usize * (RESIDENT.0 / self.env.threads).min(RESIDENT.1) as usize;
        loop {
            let full = (busy >= MAX_BEGUN || aside.len() >= resident.max(MAX_BEGUN)) && !launch.cooperative;
            let issue = if full { u64::MAX } else { self.next.fetch_add(1, Ordering::Relaxed) };
            let fresh = issue < self.order.run && issue <= self.first_fault.load(Ordering::Relaxed);
            if fresh {
                machine.block = spare.pop().unwrap_or_default();
                machine.start(issue, self.order.block(issue));
            } else {
                let Some((block, waits)) = aside.pop_front() else {
                    break;
                };
                busy -= usize::from(!waits);
                machine.block = block;
            }
            if machine.block.issue > self.first_fault.load(Ordering::Relaxed) {
                continue;
            }
            match machine.run_block(self.run, &self.first_fault) {
                Ok(Stop::Ended) => {}
                Ok(Stop::TurnsUsed { waits }) => {
                    busy += usize::from(!waits);
                    aside.push_back((std::mem::take(&mut machine.block), waits));
                    continue;
                }
                Ok(Stop::Left) => continue,
                Err(fault) => {
                    let issue = machine.block.issue;
                    self.first_fault.fetch_min(issue, Ordering::Relaxed);
                    let mut first = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
                    if first.as_ref().is_none_or(|&(other, _)| issue < other) {
                        *first = Some((issue, fault));
                    }
                }
            }
            let mut block = std::mem::take(&mut machine.block);
            if !block.output.is_empty() {
                let text = std::mem::take(&mut block.output);
                self.output.lock().unwrap_or_else(PoisonError::into_inner).push((block.linear, text));
            }
            spare.push(block);
        }
        if self.env.settings.counters {
            machine.sum_runs();
            self.counters.lock().unwrap_or_else(PoisonError::into_inner).add(&machine.counters);
        }
    }
}

/// Why a block stopped running.
enum Stop {
    /// All its threads have exited.
    Ended,
    /// It has used up its turns, or one turn with so many polls that it is taken to wait for another block.
    TurnsUsed { waits: bool },
    /// Another block's fault has ended the launch.
    Left,
}

impl Machine<'_> {
    /// Runs the block for at most its turns. `first_fault` is the place in the order of issue of the first block with a
    /// fault.
    fn run_block(&mut self, run: Runner, first_fault: &AtomicU64) -> Result<Stop, Box<Fault>> {
        let seeded = self.env.settings.schedule_seed.is_some();
        let limit = self.env.settings.instruction_limit;
        // Blocks of a cooperative grid wait for each other, so each is put aside at its first long wait.
        let mut turns = match self.env.launch.cooperative {
            true => 1,
            false => TURNS_OF_WARP * self.block.warps.len() as u32,
        };
        loop {
            let warps = self.block.warps.len();
            let mut index = self.block.turn;
            let mut turn = TURN;
            if seeded {
                self.block.random = mix(self.block.random);
                index = self.block.random as usize % warps;
                turn = 1 + (self.block.random >> 32) as u32 % 32;
            }
            let ready =
                (0..warps).map(|i| (index + i) % warps).find(|&i| self.block.warps[i].ready(&self.block.barriers));
            let Some(index) = ready else {
                return if self.block.alive == 0 { Ok(Stop::Ended) } else { Err(self.deadlock()) };
            };
            let mut warp = std::mem::take(&mut self.block.warps[index]);
            let (before, polls) = (self.block.ticks, warp.polls);
            // SAFETY: `runner` has chosen an instruction set that this processor supports.
            let result = unsafe { run(self, &mut warp, turn) };
            warp.instructions += self.block.ticks - before;
            let too_long = limit > 0 && warp.instructions > limit;
            let overrun = too_long.then(|| {
                let group = warp.groups.iter().find(|group| group.wait == Wait::Nothing).or(warp.groups.first());
                let (pc, mask) = group.map_or((0, 1), |group| (group.pc, group.mask));
                let detail =
                    format!("a warp has executed {} instructions, more than the limit of {limit}", warp.instructions);
                self.fault(FaultKind::Timeout, &warp, pc, mask.trailing_zeros() & 31, detail)
            });
            let waits = warp.polls > POLLS;
            let asked = warp.polls > polls;
            self.block.warps[index] = warp;
            let ended = result?;
            let used = ended != Turn::Blocked;
            let waits_now = ended == Turn::Polled && asked;
            if let Some(fault) = overrun {
                return Err(fault);
            }
            let first_fault = first_fault.load(Ordering::Relaxed);
            if first_fault < self.block.issue || first_fault != u64::MAX && waits {
                return Ok(Stop::Left);
            }
            self.block.turn = (index + 1) % warps;
            if used && !seeded {
                // Other blocks may have to write first.
                turns = if waits_now { 0 } else { turns - 1 };
            }
            if used && (turns == 0 || seeded) {
                // Turns of a seeded schedule are short, so when to put a block aside is drawn.
                let odds = if ended == Turn::Polled { 0x3f } else { 0xfff };
                if !seeded || self.block.random >> 20 & odds == 0 {
                    return Ok(Stop::TurnsUsed { waits: waits_now });
                }
            }
        }
    }

    /// The fault of a block in which nobody can run: who waits for whom.
    fn deadlock(&self) -> Box<Fault> {
        let waiting = |warp: &Warp| warp.groups.iter().copied().filter(|group| group.mask != 0).collect::<Vec<_>>();
        let mut all = vec![];
        for warp in &self.block.warps {
            all.extend(waiting(warp).into_iter().map(|group| (warp, group)));
        }
        let program = self.env.program;
        let is_barrier = |pc: u32| matches!(program.steps[pc as usize].op, Op::Barrier { .. });
        let place = |pc: u32| {
            let source = program.sources[program.steps[pc as usize].source as usize];
            format!("PTX line {}", source.line)
        };
        // Lanes that wait for their own warp explain more than lanes that properly wait at a barrier.
        let (warp, group) = *all.iter().find(|(_, group)| group.wait == Wait::Lanes).unwrap_or(&all[0]);
        let lane = group.mask.trailing_zeros() & 31;
        let others: Vec<String> = all
            .iter()
            .filter(|(w, g)| w.index != warp.index || g.mask != group.mask)
            .take(4)
            .map(|(w, g)| {
                let thread = super::state::name_thread(self.env.thread(w.index, g.mask.trailing_zeros() & 31));
                format!(
                    "{} lanes of warp {} from thread {thread} on wait at {}",
                    g.mask.count_ones(),
                    w.index,
                    place(g.pc)
                )
            })
            .collect();
        let others = if others.is_empty() { "all others have exited".into() } else { others.join("; ") };
        let (kind, what) = if is_barrier(group.pc) {
            (FaultKind::Barrier, "barrier divergence: not all threads reach this barrier")
        } else {
            (FaultKind::InactiveShuffle, "lanes named in the member mask never reach this instruction")
        };
        self.fault(kind, warp, group.pc, lane, format!("{what}; {} lanes wait here, {others}", group.mask.count_ones()))
    }

    /// Turns the execution counts of basic blocks into counts of instructions and operations.
    fn sum_runs(&mut self) {
        let types = [FlopType::F16, FlopType::Bf16, FlopType::Tf32, FlopType::F32, FlopType::F64];
        for (cost, &(warps, lanes)) in self.env.program.costs.iter().zip(&self.runs) {
            let counters = &mut self.counters;
            let classes = [
                &mut counters.mma,
                &mut counters.fma,
                &mut counters.arithmetic,
                &mut counters.special,
                &mut counters.control,
            ];
            for (class, &count) in classes.into_iter().zip(&cost.class) {
                *class += u64::from(count) * warps;
            }
            for (i, &ty) in types.iter().enumerate() {
                counters.add_flops(ty, u64::from(cost.flops[i]) * lanes + u64::from(cost.warp_flops[i]) * warps);
            }
        }
    }
}
