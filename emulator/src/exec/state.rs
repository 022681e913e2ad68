//! The state of a running launch: environment, worker, block, warp.

use super::lanes::{Addresses, LINE, Lines, Reach, Site, Use, lanes};
use super::races::{GlobalRaces, SharedRaces};
use super::shapes::Shapes;
use super::{Checks, Counters, Fault, FaultKind, Launch, LoadedModule, Settings, Span};
use crate::memory::{Allocation, Memory};
use crate::ptx::program::{Constant, FUNCTION_STRIDE, Program};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Basic blocks that a warp may run before another gets its turn.
pub const TURN: u32 = 4096;
/// Polls after which other lanes, warps and blocks get a turn. A lock then changes hands after a hundred basic blocks
/// or so; with whole turns, many waiters would each wait for milliseconds.
pub const POLLS_OF_TURN: u32 = 64;

/// A bijective mix of 64 bits: one step of SplitMix64.
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A 64-byte line, aligned.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub struct Line(pub [u8; 64]);

/// A byte buffer aligned to 64.
#[derive(Default)]
pub struct Aligned(Vec<Line>);

impl Aligned {
    /// `bytes` bytes, rounded up to whole lines, all equal to `value`.
    pub fn new(bytes: usize, value: u8) -> Self {
        Aligned(vec![Line([value; 64]); bytes.div_ceil(64)])
    }

    /// The first byte.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        size_of_val(&self.0[..])
    }

    /// Sets all bytes.
    pub fn fill(&mut self, value: u8) {
        self.0.fill(Line([value; 64]));
    }
}

/// What a group of lanes waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Nothing.
    Nothing,
    /// Other lanes of the warp, at this step.
    Lanes,
    /// A barrier to leave this generation.
    Barrier(u8, u32),
}

/// Lanes of a warp that are at the same step.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// The step.
    pub pc: u32,
    /// The lanes.
    pub mask: u32,
    /// Whether they can go on.
    pub wait: Wait,
}

/// Records of copies that a warp keeps for reuse, at most.
pub const SPARE: usize = 64;

/// The copies of one `cp.async` that have not arrived.
#[derive(Clone, Copy)]
pub struct Pending {
    /// The instruction, with the lanes whose copies these are.
    pub site: Site,
    /// Commit group of these lanes.
    pub group: u32,
    /// Offsets in shared memory.
    pub to: Addresses,
    /// What arrives.
    pub data: [[u8; 16]; 32],
}

impl Default for Pending {
    fn default() -> Self {
        let site = Site { pc: 0, mask: 0, bytes: 0, usage: Use::Store, element: 0, strong: false, rows: false };
        Pending { site, group: 0, to: Addresses([0; 32]), data: [[0; 16]; 32] }
    }
}

/// A warp.
#[derive(Default)]
pub struct Warp {
    /// Number in the block.
    pub index: u32,
    /// Thread of each lane in x, y, z (and a fourth axis that is 0).
    pub threads: [[u32; 32]; 4],
    /// Registers.
    pub file: Aligned,
    /// Local memory, lane after lane.
    pub local: Aligned,
    /// Groups; one unless lanes have diverged.
    pub groups: Vec<Group>,
    /// Lanes that have not exited.
    pub alive: u32,
    /// A lane, as a bit, whose group goes first for fairness; 0 for none.
    pub favour: u32,
    /// Basic blocks run since its lanes last waited or rotated.
    pub unbroken: u32,
    /// Polls since then, of shared memory too: what code that waits for other threads does over and over.
    pub polls_of_turn: u32,
    /// Values read from shared memory that nothing has written.
    pub unwritten: Unwritten,
    /// Instructions so far.
    pub instructions: u64,
    /// Loads of global memory so far that may have waited for another block.
    pub polls: u64,
    /// Copies under way, in the order of issue. In boxes, because they are large and change their place.
    #[allow(clippy::vec_box)]
    pub pending: Vec<Box<Pending>>,
    /// Records of copies that have arrived, for reuse.
    #[allow(clippy::vec_box)]
    pub spare: Vec<Box<Pending>>,
    /// Commit groups of each lane.
    pub committed: [u32; 32],
}

/// The values of a warp that come from unwritten shared memory; see [`super::unwritten`].
#[derive(Default)]
pub struct Unwritten {
    /// By register (its offset in the file): lanes whose value depends on an unwritten one.
    registers: HashMap<u32, u32>,
    /// The fault of the first such load.
    pub(super) read: Option<Box<Fault>>,
}

impl Unwritten {
    /// Whether nothing is marked.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        self.registers.is_empty()
    }

    /// A shuffle: each lane of `active` gets the value of lane `from[lane]`.
    pub fn pass(&mut self, to: u32, value: u32, from: &[u32; 32], active: u32) {
        let of = self.of(value);
        let passed = lanes(active).filter(|&l| of >> from[l as usize] & 1 != 0).fold(0, |all, l| all | 1 << l);
        self.set(to, active, passed);
    }

    /// Forgets everything, for the next block.
    pub fn clear(&mut self) {
        self.registers.clear();
        self.read = None;
    }

    pub(super) fn of(&self, register: u32) -> u32 {
        self.registers.get(&register).copied().unwrap_or(0)
    }

    /// The lanes of `active` get new values in a register, of which those of `lanes` are marked.
    pub(super) fn set(&mut self, register: u32, active: u32, lanes: u32) {
        let all = self.of(register) & !active | lanes & active;
        match all {
            0 => self.registers.remove(&register),
            _ => self.registers.insert(register, all),
        };
    }
}

/// One of a block's sixteen barriers.
#[derive(Clone, Default)]
pub struct BarrierState {
    /// How often it has been completed.
    pub generation: u32,
    /// Threads that have arrived.
    pub arrived: u32,
    /// Threads expected; 0 is all.
    pub expected: u32,
    /// Step of the first arrival and thread.
    pub first: Option<(u32, u32)>,
    /// Threads with a true predicate.
    pub votes: u32,
    /// Threads that voted.
    pub voters: u32,
    /// `votes` and `voters` of the last completed generation.
    pub result: (u32, u32),
    /// Join of the clocks of those that arrived.
    pub clock: Vec<u32>,
    /// `clock` of the last completed generation.
    pub completed_clock: Vec<u32>,
    /// Some threads did not wait, or arrived without the rest of their warp.
    pub loose: bool,
    /// The time at which all warps resume after the last completed generation; 0 if each has its own.
    pub resume: u32,
}

/// A block.
#[derive(Default)]
pub struct Block {
    /// Number in the grid.
    pub linear: u64,
    /// Place in the order of issue.
    pub issue: u64,
    /// Index in x, y, z.
    pub id: [u32; 3],
    /// Warps.
    pub warps: Vec<Warp>,
    /// Shared memory.
    pub shared: Aligned,
    /// Which granules of it have been written; empty without that check.
    pub shared_written: Vec<u8>,
    /// Lines of which every granule has been written; may lack some. Empty without that check.
    pub shared_full: Vec<u8>,
    /// How many pending `cp.async` will write each granule; empty without race checks.
    pub shared_pending: Vec<u8>,
    /// How many lanes' pending copies go to each line; empty without race checks.
    pub pending_lines: Vec<u32>,
    /// Race detector.
    pub races: Option<SharedRaces>,
    /// Barriers.
    pub barriers: Vec<BarrierState>,
    /// Threads that have not exited.
    pub alive: u32,
    /// printf output.
    pub output: Vec<u8>,
    /// State of the random schedule.
    pub random: u64,
    /// Steps executed: the clock.
    pub ticks: u64,
    /// Fences so far, for races between blocks; fences with nothing to order do not count.
    pub epoch: u32,
    /// It has used global memory since its last fence.
    pub unfenced: bool,
    /// Warp whose turn it is.
    pub turn: usize,
}

impl Block {
    /// The granules of a range have been written, or count as unwritten again.
    pub fn mark_written(&mut self, granules: Range<usize>, granule: u32, written: bool) {
        if !written {
            let shift = LINE - granule;
            self.shared_full[granules.start >> shift..=(granules.end - 1) >> shift].fill(0);
        }
        self.shared_written[granules].fill(written.into());
    }

    /// Looks which of the lines that have just been written to are full now.
    #[inline(always)]
    pub fn find_full(&mut self, reach: Reach<'_>, granule: u32) {
        let bytes = 1 << (LINE - granule);
        for &Lines { at, bits } in reach.lines {
            for i in lanes(bits.into()) {
                let line = (reach.line + i64::from(at)) as usize + i as usize;
                let missing =
                    self.shared_written[line * bytes..][..bytes].iter().fold(0, |any, &mark| any | (mark ^ 1));
                self.shared_full[line] = u8::from(missing == 0);
            }
        }
    }

    /// Counts a lane's copy to its lines, or with `up` false that it has arrived.
    pub fn count_pending(&mut self, at: u64, bytes: u32, up: bool) {
        for line in &mut self.pending_lines[(at >> LINE) as usize..=((at + u64::from(bytes) - 1) >> LINE) as usize] {
            *line = if up { *line + 1 } else { line.saturating_sub(1) };
        }
    }
}

/// What the workers of a launch share.
pub struct Env<'a> {
    /// The launch.
    pub launch: &'a Launch<'a>,
    /// Its program.
    pub program: &'a Program,
    /// Settings.
    pub settings: &'a Settings,
    /// Device memory.
    pub memory: &'a Memory,
    /// Allocations at the beginning of the launch.
    pub allocations: Arc<Vec<Allocation>>,
    /// First address and size of the device's range.
    pub range: (u64, u64),
    /// Checks that apply to this launch.
    pub checks: Checks,
    /// Bytes of shared memory per block.
    pub shared_bytes: u32,
    /// log2 of the bytes per granule, the unit in which the state of shared memory is tracked: every access is one or
    /// more whole granules.
    pub granule: u32,
    /// Threads per block.
    pub threads: u32,
    /// Bytes of local memory per lane, padded.
    pub local_stride: u32,
    /// The constants at the end of every register file.
    pub constants: Vec<u8>,
    /// Offset of the first constant in a register file.
    pub first_constant: u32,
    /// Races between blocks.
    pub global_races: Option<GlobalRaces>,
    /// Sectors read and written, in this order.
    pub touched: Option<[Touched; 2]>,
    /// More about them, where [`Span`]s are asked for.
    pub noted: Option<Noted>,
    /// Zeroed memory for the barrier of a cooperative grid; 0 for other launches.
    pub grid_workspace: u64,
}

/// One bit per 32-byte sector of the device's range, allocated by page.
pub struct Touched {
    base: u64,
    pages: Vec<std::sync::OnceLock<Box<[AtomicU64; PAGE_WORDS]>>>,
}

/// Words of one page: 64 Ki sectors, 2 MiB of memory.
const PAGE_WORDS: usize = 1024;

impl Touched {
    /// Nothing touched.
    pub fn new(base: u64, bytes: u64) -> Self {
        let pages = bytes.div_ceil(32 * 64 * PAGE_WORDS as u64) as usize;
        let pages = std::iter::repeat_with(std::sync::OnceLock::new).take(pages).collect();
        Touched { base, pages }
    }

    /// Notes sectors `first..=last` (addresses over 32).
    #[inline(always)]
    pub fn touch(&self, first: u64, last: u64) {
        let (from, upto) = (first - self.base / 32, last - self.base / 32);
        // Nearly always they are noted already, in one word.
        if from / 64 == upto / 64
            && let Some(page) = self.pages[from as usize / (64 * PAGE_WORDS)].get()
        {
            let bits = (!0 >> (63 - (upto - from))) << (from % 64);
            if page[from as usize / 64 % PAGE_WORDS].load(Ordering::Relaxed) & bits == bits {
                return;
            }
        }
        self.note(first, last);
    }

    #[inline(never)]
    fn note(&self, first: u64, last: u64) {
        let (mut index, end) = (first - self.base / 32, last - self.base / 32 + 1);
        while index < end {
            let word = index / 64;
            let stop = end.min((word + 1) * 64);
            let bits = (!0 >> (64 - (stop - index))) << (index % 64);
            let page = self.pages[word as usize / PAGE_WORDS]
                .get_or_init(|| Box::new([const { AtomicU64::new(0) }; PAGE_WORDS]));
            let cell = &page[word as usize % PAGE_WORDS];
            if cell.load(Ordering::Relaxed) & bits != bits {
                cell.fetch_or(bits, Ordering::Relaxed);
            }
            index = stop;
        }
    }

    /// The bits of 64 sectors, by their number.
    fn word(&self, at: usize) -> u64 {
        let page = self.pages[at / PAGE_WORDS].get();
        page.map_or(0, |page| page[at % PAGE_WORDS].load(Ordering::Relaxed))
    }

    /// How many sectors have been touched.
    pub fn sectors(&self) -> u64 {
        let words = self.pages.iter().filter_map(|page| page.get()).flat_map(|page| page.iter());
        words.map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// How many sectors have been touched both here and in `other`, which begins where this does.
    pub fn sectors_in_both(&self, other: &Touched) -> u64 {
        let pages = self.pages.iter().zip(&other.pages).filter_map(|(a, b)| a.get().zip(b.get()));
        let words = pages.flat_map(|(a, b)| a.iter().zip(b.iter()));
        words.map(|(a, b)| u64::from((a.load(Ordering::Relaxed) & b.load(Ordering::Relaxed)).count_ones())).sum()
    }
}

/// What [`Span`]s say of the sectors that a launch has touched.
pub struct Noted {
    /// Accessed so that threads may communicate.
    strong: Touched,
    /// Read and written whole by one instruction of a warp.
    whole: [Touched; 2],
}

impl Noted {
    /// Nothing noted.
    pub fn new(base: u64, bytes: u64) -> Self {
        Noted { strong: Touched::new(base, bytes), whole: [(); 2].map(|()| Touched::new(base, bytes)) }
    }

    /// Notes an access to the `length` bytes from `first` on, in an allocation that ends at `limit`: its last sector is
    /// whole without the bytes behind it.
    #[inline(always)]
    pub fn note(&self, site: Site, first: u64, length: u64, limit: u64) {
        let end = first + length;
        if site.strong || site.usage == Use::Atomic {
            self.strong.touch(first / 32, (end - 1) / 32);
            return;
        }
        let (from, upto) = (first.div_ceil(32), if end == limit { end.div_ceil(32) } else { end / 32 });
        if from < upto {
            self.whole[usize::from(site.usage == Use::Store)].touch(from, upto - 1);
        }
    }

    /// Lists what `touched` has, reads first, by ascending addresses.
    pub fn list(&self, touched: &[Touched; 2], spans: &mut Vec<Span>) {
        for (write, (some, whole)) in [false, true].into_iter().zip(touched.iter().zip(&self.whole)) {
            let base = some.base;
            for (number, page) in some.pages.iter().enumerate() {
                let Some(page) = page.get() else { continue };
                for (place, word) in page.iter().enumerate() {
                    let some = word.load(Ordering::Relaxed);
                    if some == 0 {
                        continue;
                    }
                    let at = number * PAGE_WORDS + place;
                    let words = [some, whole.word(at), self.strong.word(at)];
                    list_word(words, base + at as u64 * 64 * 32, write, spans);
                }
            }
        }
    }
}

/// Lists the 64 sectors from `first` on: those touched, and of these the whole and the strong.
fn list_word(words: [u64; 3], first: u64, write: bool, spans: &mut Vec<Span>) {
    let mut at = 0;
    while at < 64 {
        // As long as none of the three changes.
        let rest = words.map(|word| word >> at);
        let [some, whole, strong] = rest.map(|bits| bits & 1 != 0);
        let run = |bits: u64| if bits & 1 != 0 { bits.trailing_ones() } else { bits.trailing_zeros() };
        let length = rest.into_iter().map(run).fold(64 - at, u32::min);
        let span = |sector: u32| first + u64::from(sector) * 32;
        let new = Span { first: span(at), end: span(at + length), write, whole, strong };
        at += length;
        match spans.last_mut() {
            _ if !some => (),
            Some(last)
                if Span { first: last.first, ..new } == Span { end: new.end, ..*last } && last.end == new.first =>
            {
                last.end = new.end;
            }
            _ => spans.push(new),
        }
    }
}

/// One worker.
pub struct Machine<'a> {
    /// The launch.
    pub env: &'a Env<'a>,
    /// The block being run.
    pub block: Block,
    /// What the worker has counted.
    pub counters: Counters,
    /// Per basic block: executions by a warp, and active lanes summed over them.
    pub runs: Vec<(u64, u64)>,
    /// The allocation (start, end) that each recent instruction used last.
    pub cache: [(u64, u64); 64],
    /// Shapes of accesses to shared memory.
    pub shapes: Shapes,
    /// Lanes whose current load has read unwritten shared memory.
    pub unwritten: u32,
}

impl Env<'_> {
    /// The thread of a lane.
    pub fn thread(&self, warp: u32, lane: u32) -> [u32; 3] {
        let [x, y, _] = self.launch.block;
        let linear = warp * 32 + lane;
        [linear % x, linear / x % y, linear / x / y]
    }

    /// The granules of an access to shared memory.
    #[inline(always)]
    pub fn granules(&self, at: u64, bytes: u32) -> Range<usize> {
        (at >> self.granule) as usize..((at + u64::from(bytes) - 1) >> self.granule) as usize + 1
    }

    fn shared_granules(&self) -> usize {
        (self.shared_bytes as usize).div_ceil(1 << self.granule)
    }

    /// Lines of shared memory, the last perhaps a part of one.
    fn lines(&self) -> usize {
        (self.shared_bytes as usize).div_ceil(1 << LINE)
    }

    /// The allocation that holds a range.
    pub fn allocation(&self, address: u64, bytes: u64) -> Option<&Allocation> {
        let index = self.allocations.partition_point(|a| a.address <= address).checked_sub(1)?;
        let found = &self.allocations[index];
        let offset = address - found.address;
        (offset < found.bytes && bytes <= found.bytes - offset).then_some(found)
    }
}

/// A thread index as messages spell it.
pub fn name_thread([x, y, z]: [u32; 3]) -> String {
    format!("({x},{y},{z})")
}

impl<'a> Machine<'a> {
    /// A worker with no block yet.
    pub fn new(env: &'a Env<'a>) -> Self {
        Machine {
            env,
            block: Block::default(),
            counters: Counters::default(),
            runs: vec![(0, 0); env.program.costs.len()],
            cache: [(0, 0); 64],
            shapes: Shapes::new(env.program.steps.len()),
            unwritten: 0,
        }
    }

    /// A fault of a lane at a step.
    pub fn fault(&self, kind: FaultKind, warp: &Warp, pc: u32, lane: u32, detail: String) -> Box<Fault> {
        let program = self.env.program;
        let source = program.sources[program.steps[pc as usize].source as usize];
        let text = program.text.get(source.start as usize..(source.start + source.length) as usize).unwrap_or("");
        Box::new(Fault {
            kind,
            kernel: self.env.launch.kernel.name.clone(),
            block: self.block.id,
            thread: self.env.thread(warp.index, lane),
            instruction: text.split_whitespace().collect::<Vec<_>>().join(" "),
            line: source.line,
            detail,
        })
    }

    /// Starts the block with this index on this worker, reusing memory.
    pub fn start(&mut self, issue: u64, linear: u64) {
        let env = self.env;
        let [gx, gy, _] = env.launch.grid.map(u64::from);
        let block = &mut self.block;
        block.issue = issue;
        block.linear = linear;
        block.id = [(linear % gx) as u32, (linear / gx % gy) as u32, (linear / gx / gy) as u32];
        let warps = env.threads.div_ceil(32);
        if block.warps.is_empty() {
            block.warps = (0..warps).map(|index| env.new_warp(index)).collect();
            block.shared = Aligned::new(env.shared_bytes as usize + 64, 0xff);
            block.barriers = vec![BarrierState::default(); 16];
            if env.checks.shared_races && env.shared_bytes > 0 {
                let granules = env.shared_granules();
                block.races = Some(SharedRaces::new(warps as usize, granules, env.granule, env.program.atomics));
                block.shared_pending = vec![0; granules + 16];
                block.pending_lines = vec![0; env.lines() + 16];
            }
            if env.checks.uninitialised {
                block.shared_written = vec![0; (env.lines() << (LINE - env.granule)) + 16];
                block.shared_full = vec![0; env.lines() + 16];
            }
        } else {
            block.shared.fill(0xff);
            block.shared_written.fill(0);
            block.shared_full.fill(0);
            block.shared_pending.fill(0);
            block.pending_lines.fill(0);
            block.barriers.fill(BarrierState::default());
            if let Some(races) = &mut block.races {
                races.restart();
            }
        }
        for warp in &mut block.warps {
            let threads = (env.threads - warp.index * 32).min(32);
            warp.alive = (!0u64 << threads) as u32 ^ !0;
            warp.groups.clear();
            warp.groups.push(Group { pc: 0, mask: warp.alive, wait: Wait::Nothing });
            warp.favour = 0;
            warp.unbroken = 0;
            warp.polls_of_turn = 0;
            warp.unwritten.clear();
            warp.instructions = 0;
            warp.polls = 0;
            warp.pending.clear();
            warp.committed = [0; 32];
            if env.local_stride > 0 {
                warp.local.fill(0xff);
            }
        }
        block.alive = env.threads;
        block.output.clear();
        block.random = env.settings.schedule_seed.map_or(0, |seed| mix(seed ^ mix(linear)));
        block.ticks = 0;
        block.epoch = 1;
        block.unfenced = false;
        block.turn = 0;
    }
}

impl Env<'_> {
    fn new_warp(&self, index: u32) -> Warp {
        let mut file = Aligned::new(self.program.file_bytes as usize, 0);
        let start = self.program.file_bytes as usize - self.constants.len();
        // SAFETY: the file has `file_bytes` bytes, and the constants are its last ones (see `resolve`).
        unsafe {
            std::ptr::copy_nonoverlapping(self.constants.as_ptr(), file.as_mut_ptr().add(start), self.constants.len())
        };
        let mut threads = [[0; 32]; 4];
        for lane in 0..32u32 {
            let [x, y, z] = self.thread(index, lane);
            for (axis, at) in [x, y, z].into_iter().enumerate() {
                threads[axis][lane as usize] = at;
            }
        }
        Warp {
            index,
            threads,
            file,
            // 8 bytes more: the parameters of printf and assert are read as 8 bytes, whatever their size.
            local: Aligned::new(self.local_stride as usize * 32 + 8, 0xff),
            ..Default::default()
        }
    }
}

/// The constants of a register file, from the offset of the first one to the end.
pub fn resolve(program: &Program, module: &LoadedModule) -> Vec<u8> {
    let start = program.constants.first().map_or(program.file_bytes, |&(offset, _)| offset);
    let mut bytes = vec![0; (program.file_bytes - start) as usize];
    for &(offset, constant) in &program.constants {
        let to = &mut bytes[(offset - start) as usize..];
        let narrow = |to: &mut [u8], value: u32| to[..128].as_chunks_mut().0.fill(value.to_le_bytes());
        let wide = |to: &mut [u8], value: u64| to[..256].as_chunks_mut().0.fill(value.to_le_bytes());
        match constant {
            Constant::Pred(value) => to[..4].fill(if value { 0xff } else { 0 }),
            Constant::B32(value) => narrow(to, value),
            Constant::B64(value) => wide(to, value),
            Constant::Global(index, addend) => wide(to, module.addresses[index as usize].wrapping_add(addend as u64)),
            Constant::Function(index) => wide(to, module.functions + u64::from(index) * FUNCTION_STRIDE),
            Constant::Shared(index, addend, true) => {
                wide(to, u64::from(program.shared[index as usize]).wrapping_add(addend as u64))
            }
            Constant::Shared(index, addend, false) => {
                narrow(to, program.shared[index as usize].wrapping_add(addend as u32))
            }
            Constant::Local(at, true) | Constant::Param(at, true) => wide(to, at),
            Constant::Local(at, false) | Constant::Param(at, false) => narrow(to, at as u32),
        }
    }
    bytes
}
