//! One module per operation, under the operation's stem: `cargo bench --bench ops -- group_norm`.
//!
//! Memory-bound operations report bytes per second, counting the least traffic that their header in `src/ops` states.
//! Others report FLOP per second, or elements per second where drawing noise dominates. Forward and backward run
//! through the public function and the tape, on a warm pool.
//!
//! `DDPM_BENCH_DEVICE=cuda` measures a GPU by events, `DDPM_BENCH_PRECISION=bf16` in bf16: the layers of `cifar10` at
//! batch 128, their inputs in memory and not in the L2 cache. On the emulator the same cases are counted:
//!
//! ```sh
//! CUDA_EMU_BLOCKS=16 CUDA_EMU_CHECKS=fast CUDA_EMU_MEMORY=1T DDPM_CUDA_DRIVER=target/release/libcuda_emu.so \
//!     DDPM_BENCH_DEVICE=cuda DDPM_BENCH_PRECISION=bf16 cargo bench --bench ops -- conv2d
//! ```

mod adam;
mod add;
mod attention;
mod avg_pool;
mod concat;
mod conv2d;
mod cross_entropy;
mod dropout;
mod embedding;
mod grad_norm;
#[path = "../support/group.rs"]
mod group;
mod group_norm;
mod linear;
mod loss;
mod pool;
mod q_sample;
mod sample_step;
mod silu;
#[path = "../support/mod.rs"]
mod support;
mod time_embedding;
mod tree_sum;
mod upsample;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ddpm_cuda::device::Device;
use ddpm_cuda::error::Result;
use ddpm_cuda::params::{Init, Layout, Param, ParamGrads, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{Shape, Tensor};
use group::{Group, Work, batched, device};
use support::finish;

/// An operation with the shapes of its inputs and parameters.
struct Case<'a, F> {
    /// The operation's stem.
    stem: &'a str,
    /// The case's name in the report.
    case: String,
    inputs: &'a [Shape],
    params: &'a [Shape],
    /// The forward and the backward pass.
    work: [Pass; 2],
    op: F,
}

impl<F: Fn(&mut Tape<'_>, &[Var], &[Param]) -> Result<Var>> Case<'_, F> {
    /// Measures the forward pass, without recording, and the backward pass, on a device of its own.
    fn run(&self, c: &mut Criterion) {
        self.run_on(&device(), c);
    }

    fn run_on(&self, device: &Device, c: &mut Criterion) {
        let mut specs = Specs::default();
        let handles: Vec<Param> =
            self.params.iter().map(|&shape| specs.add(String::new(), shape, Layout::Vector, Init::Ones)).collect();
        let flat: Vec<f32> = ramp().take(specs.flat_len()).collect();
        let params = Params::from_host(device, specs, &flat).unwrap();
        let mut grads = ParamGrads::new(device, params.specs()).unwrap();
        let inputs: Vec<Tensor> = self.inputs.iter().map(|&shape| numbers(device, shape)).collect();

        let mut group = Group::new(c, device, self.stem);
        group.case(&format!("forward/{}", self.case), self.work[0].on(device), || {
            let mut tape = Tape::inference(device, &params);
            let x: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
            let y = (self.op)(&mut tape, &x, &handles).expect("a valid case");
            finish(device);
            y
        });
        let record = || {
            let mut tape = Tape::recording(device, &params);
            let x: Vec<Var> = inputs.iter().map(|x| tape.leaf(x.clone())).collect();
            let y = (self.op)(&mut tape, &x, &handles).expect("a valid case");
            let dy = numbers(device, y.shape());
            finish(device);
            (tape, y, dy)
        };
        group.case_after(&format!("backward/{}", self.case), self.work[1].on(device), record, |(tape, y, dy)| {
            tape.backward(&y, dy, &mut grads).map(drop).expect("a valid case");
            finish(device);
        });
    }
}

/// What a pass does.
#[derive(Clone, Copy)]
enum Pass {
    /// Activations and gradients of activations that are moved.
    Moved(usize),
    /// FLOP.
    Flops(usize),
}

impl Pass {
    fn on(self, device: &Device) -> Work {
        match self {
            Pass::Moved(numbers) => Work::Bytes(numbers * device.activations().size()),
            Pass::Flops(count) => Work::Flops(count),
        }
    }
}

/// A tensor of activations on [-1, 1).
fn numbers(device: &Device, shape: Shape) -> Tensor {
    let numbers: Vec<f32> = ramp().take(shape.len()).collect();
    Tensor::from_slice_as(device, device.activations(), shape, &numbers).unwrap()
}

fn ramp() -> impl Iterator<Item = f32> {
    (0u32..).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0)
}

/// `(rows, depth) x (depth, columns)` by the `gemm` crate on all cores: the machine's matrix-product rate, beside a
/// case of an operation. Left out where a GPU is measured.
fn matrix_product(c: &mut Criterion, stem: &str, case: &str, [rows, depth, columns]: [usize; 3]) {
    if device().is_gpu() {
        return;
    }
    let fill = |len: usize| ramp().take(len).collect::<Vec<f32>>();
    let (x, w, mut y) = (fill(rows * depth), fill(depth * columns), vec![0.0f32; rows * columns]);
    let mut product = || {
        let (d, c) = (depth as isize, columns as isize);
        // SAFETY: row-major matrices, each as long as its rows times columns.
        unsafe {
            let (y, x, w) = (y.as_mut_ptr(), x.as_ptr(), w.as_ptr());
            let cores = gemm::Parallelism::Rayon(0);
            gemm::gemm(rows, columns, depth, y, 1, c, false, x, 1, d, w, 1, c, 0.0, 1.0, false, false, false, cores);
        }
    };
    let mut group = c.benchmark_group(stem);
    group.throughput(Throughput::Elements((2 * rows * depth * columns) as u64));
    group.bench_function(BenchmarkId::new("matrix product", case), |b| b.iter(&mut product));
    group.finish();
}

criterion_group! {
    name = ops;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = adam::bench, add::bench, attention::bench, avg_pool::bench, concat::bench, conv2d::bench,
        cross_entropy::bench, dropout::bench, embedding::bench, grad_norm::bench, group_norm::bench, linear::bench,
        loss::bench, pool::bench, q_sample::bench, sample_step::bench, silu::bench, time_embedding::bench,
        tree_sum::bench, upsample::bench
}
criterion_main!(ops);
