//! Throughput of the interpreter on one core: a register-tiled f32 SGEMM, a bf16 product by ldmatrix and mma.sync, a
//! bf16 convolution that is fed by cp.async, an element-wise kernel; with bounds checks only, and with every check and
//! counter.
//!
//! Time is the process's CPU time, so other load on the machine counts little. Criterion's "elements" are
//! floating-point operations for the products and array elements for the element-wise kernel. Each variant's result is
//! compared once with a product computed here, so that no figure belongs to a wrong result.

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cuda_emu::exec::{self, Checks, Isa, Launch, LoadedModule, Settings};
use cuda_emu::memory::Memory;
use cuda_emu::ptx;
use std::sync::Arc;
use std::time::Duration;

/// Processor time of the process, user and system.
struct CpuTime;

impl Measurement for CpuTime {
    type Intermediate = Duration;
    type Value = Duration;

    fn start(&self) -> Duration {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `now` is valid for the call to write.
        let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut now) };
        assert_eq!(status, 0, "the system has a clock of processor time");
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    }

    fn end(&self, start: Duration) -> Duration {
        self.start() - start
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        *a + *b
    }

    fn zero(&self) -> Duration {
        Duration::ZERO
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}

/// A kernel with its device memory and arguments.
struct Run {
    memory: Memory,
    loaded: LoadedModule,
    grid: [u32; 3],
    block: u32,
    dynamic_shared: u32,
    params: Vec<u8>,
}

impl Run {
    fn new(text: &str, grid: [u32; 3], block: u32) -> Run {
        let module = ptx::parse(text).expect("nvcc's PTX parses");
        let memory = Memory::new(1 << 28);
        let loaded = LoadedModule::load(&memory, Arc::new(module)).expect("memory for the module");
        Run { memory, loaded, grid, block, dynamic_shared: 0, params: Vec::new() }
    }

    /// A buffer that holds `bytes`, as the next argument.
    fn buffer(&mut self, bytes: &[u8]) -> u64 {
        let at = self.memory.alloc(bytes.len() as u64).expect("memory for a buffer");
        self.memory.copy_in(at, bytes).expect("a buffer just allocated");
        self.params.extend(at.to_le_bytes());
        at
    }

    fn word(&mut self, bits: u32) {
        self.params.extend(bits.to_le_bytes());
    }

    fn launch(&self, checks: Checks, isa: Option<Isa>) {
        let kernel = self.loaded.module.kernels[0].clone();
        assert_eq!(kernel.param_bytes as usize, self.params.len(), "parameters laid out as the kernel has them");
        let launch = Launch {
            kernel: &kernel,
            module: &self.loaded,
            grid: self.grid,
            block: [self.block, 1, 1],
            dynamic_shared: self.dynamic_shared,
            params: &self.params,
            multiprocessors: 1,
            cooperative: false,
        };
        let settings = Settings { checks, isa, threads: 1, counters: checks == Checks::ALL, ..Settings::default() };
        exec::launch(&self.memory, &launch, &settings).unwrap_or_else(|fault| panic!("{fault}"));
    }

    /// Launches in every way that is measured, and has the output of each, which starts as NaN, checked.
    fn launch_all_ways(&self, output: u64, count: usize, check: impl Fn(&[f32])) {
        for (checks, isa) in [
            (Checks::ALL, None),
            (Checks::FAST, None),
            (Checks::FAST, Some(Isa::Avx2)),
            (Checks::FAST, Some(Isa::Portable)),
        ] {
            let nothing = bytes_f32(&vec![f32::NAN; count]);
            self.memory.copy_in(output, &nothing).expect("the output's buffer");
            self.launch(checks, isa);
            check(&self.read(output, count));
        }
    }

    fn read(&self, at: u64, count: usize) -> Vec<f32> {
        let mut bytes = vec![0; 4 * count];
        self.memory.copy_out(at, &mut bytes).expect("a buffer of this size");
        bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    }
}

/// Small integers over 8: exact in bf16, and products and sums of thousands of them in f32.
fn values(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32)
        .map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 16) % 17) as f32 / 8.0 - 1.0)
        .collect()
}

fn bytes_f32(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn bytes_bf16(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect()
}

fn measure(criterion: &mut Criterion<CpuTime>, name: &str, work: u64, run: &Run) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(work)).sample_size(20);
    group.bench_function("bounds", |bencher| bencher.iter(|| run.launch(Checks::FAST, None)));
    group.bench_function("all_checks", |bencher| bencher.iter(|| run.launch(Checks::ALL, None)));
    group.bench_function("bounds_avx2", |bencher| bencher.iter(|| run.launch(Checks::FAST, Some(Isa::Avx2))));
    group.bench_function("bounds_portable", |bencher| bencher.iter(|| run.launch(Checks::FAST, Some(Isa::Portable))));
    group.finish();
}

fn sgemm(criterion: &mut Criterion<CpuTime>) {
    // Long in k: the loop counts, not its begin and end.
    const N: usize = 128;
    const K: usize = 1024;
    let (a, b) = (values(N * K, 1), values(N * K, 2));
    let mut run = Run::new(include_str!("kernels/sgemm.ptx"), [N as u32 / 128, N as u32 / 128, 1], 256);
    run.buffer(&bytes_f32(&a));
    run.buffer(&bytes_f32(&b));
    let c = run.buffer(&bytes_f32(&[f32::NAN; N * N]));
    [N, N, K].iter().for_each(|size| run.word(*size as u32));
    run.launch_all_ways(c, N * N, |c| {
        for (row, column) in [(0, 0), (17, 100), (127, 127), (64, 63)] {
            let exact: f32 = (0..K).map(|k| a[row * K + k] * b[k * N + column]).sum();
            assert_eq!(c[row * N + column], exact, "c[{row}][{column}]");
        }
    });
    measure(criterion, "sgemm", 2 * (N * N * K) as u64, &run);
}

fn mma(criterion: &mut Criterion<CpuTime>) {
    // Long in k: the loop counts, not its begin and end.
    const N: usize = 128;
    const K: usize = 1024;
    let (a, b) = (values(N * K, 3), values(N * K, 4));
    let mut run = Run::new(include_str!("kernels/mma.ptx"), [N as u32 / 64, N as u32 / 64, 1], 128);
    run.buffer(&bytes_bf16(&a));
    run.buffer(&bytes_bf16(&b));
    let c = run.buffer(&bytes_f32(&[f32::NAN; N * N]));
    [N, N, K].iter().for_each(|size| run.word(*size as u32));
    run.launch_all_ways(c, N * N, |c| {
        for (row, column) in [(0, 0), (17, 100), (127, 127), (64, 63)] {
            let exact: f32 = (0..K).map(|k| a[row * K + k] * b[column * K + k]).sum();
            assert_eq!(c[row * N + column], exact, "c[{row}][{column}]");
        }
    });
    measure(criterion, "mma", 2 * (N * N * K) as u64, &run);
}

/// A layer of `cifar10`: 3x3, 128 to 128 channels, 32x32 pixels; four images.
fn conv2d(criterion: &mut Criterion<CpuTime>) {
    const SIDE: usize = 32;
    const C: usize = 128;
    const IMAGES: usize = 4;
    const PIXELS: usize = IMAGES * SIDE * SIDE;
    let (x, weight, bias) = (values(PIXELS * C, 6), values(C * 9 * C, 7), values(C, 8));
    let mut run = Run::new(include_str!("kernels/conv2d.ptx"), [(PIXELS * C / (128 * 128)) as u32, 1, 1], 128);
    // Three slots of 64 steps of k of both operands, and the plan of nine taps.
    run.dynamic_shared = 3 * 64 * 2 * (128 + 128) + 4 * (128 + 128) + 160 + 9 * 16;
    let nothing = |run: &mut Run| run.params.extend(0u64.to_le_bytes());
    let y = run.buffer(&bytes_bf16(&[f32::NAN; PIXELS * C]));
    run.buffer(&bytes_bf16(&x));
    nothing(&mut run);
    run.buffer(&bytes_bf16(&weight));
    run.buffer(&bytes_f32(&bias));
    // No shift, no residual (halved or not, and eight bytes aligned), no shortcut.
    (0..7).for_each(|_| nothing(&mut run));
    // n, h, w, c_in; oh, ow, c_out; kernel; stride, padding; one tensor, not repeated, no shortcut.
    let (side, c) = (SIDE as u32, C as u32);
    [IMAGES as u32, side, side, c, side, side, c, 3, 3, 1, 1, 1, c, 0, 0, 0].iter().for_each(|size| run.word(*size));
    run.launch_all_ways(y, PIXELS * C / 2, |pairs| {
        for (n, i, j, o) in [(0, 0, 0, 0), (1, 0, 31, 127), (2, 17, 5, 64), (3, 31, 31, 99)] {
            let mut exact = bias[o];
            for (u, v) in (0..9).map(|tap| (tap / 3, tap % 3)) {
                if (1..=SIDE).contains(&(i + u)) && (1..=SIDE).contains(&(j + v)) {
                    let pixel = &x[((n * SIDE + i + u - 1) * SIDE + j + v - 1) * C..][..C];
                    let row = &weight[((o * 3 + u) * 3 + v) * C..][..C];
                    exact += pixel.iter().zip(row).map(|(x, w)| x * w).sum::<f32>();
                }
            }
            let at = ((n * SIDE + i) * SIDE + j) * C + o;
            let got = f32::from_bits(if at.is_multiple_of(2) {
                pairs[at / 2].to_bits() << 16
            } else {
                pairs[at / 2].to_bits() & 0xffff_0000
            });
            // The sum is exact; the result is rounded to 8 bits.
            assert!((got - exact).abs() <= exact.abs() / 256.0, "y[{n}][{i}][{j}][{o}] = {got}, not {exact}");
        }
    });
    measure(criterion, "conv2d", 2 * (PIXELS * C * 9 * C) as u64, &run);
}

fn elementwise(criterion: &mut Criterion<CpuTime>) {
    const N: usize = 1 << 18;
    let x = values(N, 5);
    let mut run = Run::new(include_str!("kernels/elementwise.ptx"), [N as u32 / 1024, 1, 1], 256);
    run.buffer(&bytes_f32(&x));
    let y = run.buffer(&bytes_f32(&vec![0.0; N]));
    run.word(0.5f32.to_bits());
    run.word(N as u32);
    run.launch(Checks::ALL, None);
    let y = run.read(y, N);
    for i in [0, 1, 1023, N - 1] {
        let exact = x[i] as f64 / (1.0 + (-x[i] as f64).exp());
        // Two rounded operations and an exponential within 2^-22, of which half the effect remains.
        assert!((y[i] as f64 - exact).abs() <= exact.abs() * 2f64.powi(-21), "y[{i}] = {}, not {exact}", y[i]);
    }
    measure(criterion, "elementwise", N as u64, &run);
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = sgemm, mma, conv2d, elementwise
}
criterion_main!(benches);
