//! The rungs of the ladder, `kernels/steps`, on a GPU: `cargo bench --features steps --bench steps`.
//!
//! Three layers of `cifar10` at batch 128 (many pixels, many channels, few pixels), and attention of one head over
//! 8,192 tokens; every launch between two events, with its inputs in memory and not in the L2 cache. FLOP are those of
//! the definition. Without a GPU there is nothing to time: what the emulator counts of each rung is in
//! `kernels/steps/README.md`, and a test compares it. On the emulator each rung is launched once, to see that it is.

use std::cell::OnceCell;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use cudarc::driver::sys::{CUevent_flags, CUfunction, CUmodule};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr, result};
use ddpm_cuda::device::Choice;
use ddpm_cuda::device::cuda::Gpu;
use ddpm_cuda::tensor::DType;
use half::bf16;

#[path = "support/cache.rs"]
mod cache;
#[path = "../tests/support/rungs.rs"]
mod rungs;

use cache::EVICTS;
use rungs::{ATTENTION, D, RUNGS, Tensors};

/// Images of a step.
const BATCH: usize = 128;

/// Rows and columns of an image, and channels in and out.
const LAYERS: [[usize; 3]; 3] = [[32, 128, 128], [16, 256, 256], [4, 256, 256]];

/// Tokens of attention.
const TOKENS: usize = 8192;

/// Slabs of a segment from rung 8 on.
const SEGMENT: usize = 9;

/// An argument of a kernel.
#[derive(Clone, Copy)]
enum Arg {
    U32(u32),
    Address(u64),
}

/// A grid, and what is launched over it.
struct Launch {
    function: CUfunction,
    grid: [u32; 3],
    threads: u32,
    args: Vec<Arg>,
}

/// The GPU, what is to be evicted, and all memory, which lives as long.
struct Machine {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    scratch: OnceCell<CudaSlice<u8>>,
    held: Vec<CudaSlice<u8>>,
    modules: Vec<CUmodule>,
    emulated: bool,
}

impl Machine {
    /// The GPU that `DDPM_BENCH_DEVICE` names as `--device` does; `None` for the CPU.
    fn open() -> Option<Self> {
        let asked = std::env::var("DDPM_BENCH_DEVICE").unwrap_or_else(|_| "cpu".into());
        let number = match asked.parse().unwrap_or_else(|e| panic!("DDPM_BENCH_DEVICE: {e}")) {
            Choice::Cpu => return None,
            Choice::Auto => 0,
            Choice::Cuda(number) => number,
        };
        let gpu = Gpu::open(number, DType::Bf16, false).unwrap_or_else(|e| panic!("DDPM_BENCH_DEVICE: {e}"));
        let context = CudaContext::new(number).expect("it has just been opened");
        let stream = context.new_stream().expect("a stream");
        Some(Machine {
            context,
            stream,
            scratch: OnceCell::new(),
            held: Vec::new(),
            modules: Vec::new(),
            emulated: gpu.is_emulated(),
        })
    }

    /// The address of numbers of some pattern, in (-1, 1).
    fn numbers(&mut self, count: usize, f32s: bool) -> Arg {
        let number = |i: usize| (i as u32).wrapping_mul(2_654_435_761) as i32 as f32 / (1u32 << 31) as f32;
        let bytes: Vec<u8> = if f32s {
            (0..count).flat_map(|i| number(i).to_le_bytes()).collect()
        } else {
            (0..count).flat_map(|i| bf16::from_f32(number(i)).to_le_bytes()).collect()
        };
        self.held.push(self.stream.clone_htod(&bytes).expect("room for the tensors"));
        self.address()
    }

    /// The address of `bytes` bytes.
    fn room(&mut self, bytes: usize) -> Arg {
        self.held.push(self.stream.alloc_zeros(bytes).expect("room for the results"));
        self.address()
    }

    fn address(&self) -> Arg {
        Arg::Address(self.held.last().expect("just made").device_ptr(&self.stream).0)
    }

    /// An entry of a file of the ladder.
    fn function(&mut self, file: &str, entry: &str) -> CUfunction {
        let path = format!("{}/{file}.ptx", env!("DDPM_CUDA_STEPS"));
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let (text, name) = (CString::new(text).expect("a text"), CString::new(entry).expect("a name"));
        self.context.bind_to_thread().expect("a context");
        // SAFETY: PTX that ends with a zero, which the driver copies.
        let module =
            unsafe { result::module::load_data(text.as_ptr().cast()) }.unwrap_or_else(|e| panic!("{path}: {e}"));
        self.modules.push(module);
        // SAFETY: the module is unloaded with the machine, which every launch needs.
        unsafe { result::module::get_function(module, name) }.unwrap_or_else(|e| panic!("{entry}: {e}"))
    }

    /// Seconds of all launches together, by events.
    fn seconds(&self, launches: &[Launch]) -> f64 {
        if !self.emulated {
            let scratch =
                self.scratch.get_or_init(|| self.stream.alloc_zeros(EVICTS).expect("room for what evicts the cache"));
            let to = scratch.device_ptr(&self.stream).0;
            // SAFETY: `scratch` has that many bytes and is used for nothing else.
            unsafe { result::memset_d8_async(to, 0, EVICTS, self.stream.cu_stream()) }.expect("a valid range");
        }
        let event = || {
            let event = self.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).expect("an event");
            event.record(&self.stream).expect("a stream of its context");
            event
        };
        let start = event();
        for Launch { function, grid: [gx, gy, gz], threads, args } in launches {
            let mut values = args.clone();
            let mut pointers: Vec<*mut c_void> = values
                .iter_mut()
                .map(|arg| match arg {
                    Arg::U32(value) => std::ptr::from_mut(value).cast(),
                    Arg::Address(value) => std::ptr::from_mut(value).cast(),
                })
                .collect();
            // SAFETY: the arguments are those that the rung's header lists, in its order; their memory is as large as
            // its extents say, and lives until the stream has been waited for, below.
            unsafe {
                result::launch_kernel(
                    *function,
                    (*gx, *gy, *gz),
                    (*threads, 1, 1),
                    0,
                    self.stream.cu_stream(),
                    &mut pointers,
                )
            }
            .expect("a valid launch");
        }
        let end = event();
        f64::from(start.elapsed_ms(&end).expect("the kernels do what they should")) / 1e3
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for module in self.modules.drain(..) {
            // SAFETY: its entries are launched by this machine alone, which waits for each launch.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}

/// The launches of a rung for a layer: of itself, and of what adds up its segments.
fn convolution(machine: &mut Machine, rung: usize, [side, c_in, c_out]: [usize; 3]) -> Vec<Launch> {
    let (name, threads, ..) = RUNGS[rung];
    let pixels = BATCH * side * side;
    let c_first = if rung == 9 { c_in / 2 } else { c_in };
    let slabs = rungs::slabs(c_first, c_in);
    // As the program: only images of few pixels are cut into segments that have blocks of their own.
    let segments = if rung >= 8 && side * side <= 64 { slabs.div_ceil(SEGMENT) } else { 1 };
    let number = |extent: usize| Arg::U32(extent as u32);
    let tensors = Tensors {
        y: machine.room(2 * pixels * c_out),
        x: machine.numbers(pixels * c_first, false),
        weight: machine.numbers(c_out * 9 * c_in, false),
        added: [
            machine.numbers(c_out, true),
            machine.numbers(BATCH * c_out, true),
            machine.numbers(pixels * c_out, false),
        ],
        parts: machine.room(4 * segments * pixels * c_out),
        segment: number(if segments > 1 { SEGMENT } else { slabs }),
        second: machine.numbers((pixels * (c_in - c_first)).max(1), false),
        c_first: number(c_first),
    };
    let mut launches = vec![Launch {
        function: machine.function(name, name),
        grid: rungs::grid(rung, pixels, c_out, segments),
        threads,
        args: tensors.args(rung, [BATCH, side, side, c_in, c_out].map(number)),
    }];
    if segments > 1 {
        launches.push(Launch {
            function: machine.function(name, &rungs::join_name(rung)),
            grid: rungs::join_grid(pixels, c_out),
            threads: rungs::JOIN_THREADS,
            args: tensors.join_args([segments, BATCH, side, side, c_out].map(number)),
        });
    }
    launches
}

fn attention(machine: &mut Machine, rung: usize) -> Vec<Launch> {
    let (name, threads, _) = ATTENTION[rung];
    let o = machine.room(2 * TOKENS * D);
    let inputs = [(); 3].map(|()| machine.numbers(TOKENS * D, false));
    let scores = (rung == 0).then(|| machine.room(4 * TOKENS * TOKENS));
    let args = rungs::attention_args(o, inputs, scores, Arg::U32(TOKENS as u32));
    vec![Launch { function: machine.function(name, name), grid: rungs::attention_grid(rung, TOKENS), threads, args }]
}

/// Measures the launches of one rung.
fn rung(c: &mut Criterion, name: &str, case: &str, flop: usize, of: impl Fn(&mut Machine) -> Vec<Launch>) {
    let Some(mut machine) = Machine::open() else { return };
    let launches = of(&mut machine);
    if machine.emulated {
        machine.seconds(&launches);
        println!("{name}/{case}: launched; the emulator's times mean nothing");
        return;
    }
    let mut group = c.benchmark_group(name);
    group.throughput(Throughput::Elements(flop as u64));
    group.bench_function(BenchmarkId::from_parameter(case), |b| {
        b.iter_custom(|rounds| Duration::from_secs_f64((0..rounds).map(|_| machine.seconds(&launches)).sum()));
    });
    group.finish();
}

fn ladder(c: &mut Criterion) {
    if Machine::open().is_none() {
        println!(
            "nothing to time without a GPU: kernels/steps/README.md has the emulator's counts; a GPU is measured with \
             DDPM_BENCH_DEVICE=cuda"
        );
    }
    for layer @ [side, c_in, c_out] in LAYERS {
        for (k, (name, ..)) in RUNGS.iter().enumerate() {
            let flop = 2 * BATCH * side * side * 9 * c_in * c_out;
            rung(c, name, &format!("{BATCH}x{side}x{side}x{c_in}-{c_out}"), flop, |m| convolution(m, k, layer));
        }
    }
    for (k, (name, ..)) in ATTENTION.iter().enumerate() {
        rung(c, name, &format!("{TOKENS}x{D}"), 4 * TOKENS * TOKENS * D, |m| attention(m, k));
    }
}

criterion_group! {
    name = steps;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = ladder
}
criterion_main!(steps);
