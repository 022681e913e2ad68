//! Whole training steps (forward, backward, clipping, Adam, moving average) and forward passes of sampling, in images
//! per second, and for comparison the rate of a large matrix product on the same machine.
//!
//! `small` has 1.62 M parameters at 32x32x1, batch 16: widths 32,64,64, two blocks per level, attention at 16.
//! `cifar10` is the preset at batch 4. For GFLOP/s, multiply images per second (elem/s) by the GFLOP per image, printed
//! first. `DDPM_BENCH_DEVICE=cuda` measures a GPU, `cifar10` at batch 128, `DDPM_BENCH_PRECISION=bf16` in bf16. A
//! sample of training is many steps, each a graph, which the GPU may fall behind, and the wait for the last of them:
//! the time between two events there would be the same but for that of the first launch.

mod support;

use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::{Choice, Device};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::train::Trainer;

fn networks() -> [(&'static str, Config); 2] {
    let mut small = Config::preset(Preset::Mnist);
    small.model.image_size = Size::square(32);
    small.model.widths = vec![32, 64, 64];
    small.model.blocks_per_level = 2;
    small.model.attention_resolutions = vec![16];
    small.model.groups = 32;
    small.batch = 16;
    let mut cifar10 = Config::preset(Preset::Cifar10);
    cifar10.batch = if support::choice().0 == Choice::Cpu { 4 } else { support::BATCH };
    [("small", small), ("cifar10", cifar10)]
}

/// Arbitrary bytes; the speed does not depend on them.
fn data(config: &Config) -> Data {
    let extent = Extent { size: config.model.image_size, channels: config.model.channels };
    let images = (0..64 * extent.len()).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
    let none = Dataset::new(extent, Vec::new(), None);
    Data {
        train: Dataset::new(extent, images, None),
        held_out: none,
        classes: Vec::new(),
        notes: Vec::new(),
        skipped: Vec::new(),
    }
}

fn steps(criterion: &mut Criterion) {
    for (name, config) in networks() {
        let (choice, precision) = support::choice();
        let (device, _) = Device::open(choice, precision).unwrap_or_else(|e| panic!("DDPM_BENCH_DEVICE: {e}"));
        let mut trainer = Trainer::new(&config, data(&config), &device).expect("the settings are valid");
        let m = &config.model;
        let costs = trainer.unet().costs(trainer.params().specs(), m.image_size.h, m.image_size.w);
        let gflop = costs.iter().map(|cost| cost.flops).sum::<u64>() as f64 / 1e9;
        println!("{name}: an image is {:.3} GFLOP in training and {gflop:.3} in sampling, times elem/s", 3.0 * gflop);
        let mut group = criterion.benchmark_group(support::named(name, &device));
        group.sample_size(10).warm_up_time(Duration::from_secs(2)).measurement_time(Duration::from_secs(10));
        group.throughput(Throughput::Elements(config.batch as u64));
        group.bench_function("train", |b| {
            b.iter_custom(|steps| {
                let started = Instant::now();
                for _ in 0..steps {
                    trainer.step().expect("the loss is finite");
                    if trainer.reports_are_due() {
                        trainer.reports().expect("so is the norm");
                    }
                }
                support::finish(&device);
                started.elapsed()
            })
        });

        let shape = Shape::new(config.batch, m.image_size.h, m.image_size.w, m.channels);
        let x = Var::constant(Tensor::zeros_as(&device, device.activations(), shape).unwrap());
        let t = Tensor::full(&device, Shape::new(config.batch, 1, 1, 1), 500.0).unwrap();
        let average = trainer.ema().expect("room for its rounded copy");
        group.bench_function("sample", |b| {
            b.iter(|| {
                let mut tape = Tape::inference(&device, &average);
                let eps =
                    trainer.unet().forward(&mut tape, &x, &t, &Conditioning::NONE, None).expect("nothing is checked");
                support::finish(&device);
                eps
            })
        });
        group.finish();
    }
}

/// A 1024 x 1024 x 1024 matrix product by the `gemm` crate on all cores, as a yardstick.
fn matrix_product(criterion: &mut Criterion) {
    const N: usize = 1024;
    let (a, b, mut c) = (vec![0.5f32; N * N], vec![0.25f32; N * N], vec![0.0f32; N * N]);
    let mut group = criterion.benchmark_group("yardstick");
    group.sample_size(10).throughput(Throughput::Elements(2 * (N * N * N) as u64));
    group.bench_function("gemm_1024", |bench| {
        bench.iter(|| {
            let n = N as isize;
            let threads = gemm::Parallelism::Rayon(0);
            // SAFETY: three row-major N x N matrices of N * N elements each.
            unsafe {
                gemm::gemm(
                    N,
                    N,
                    N,
                    c.as_mut_ptr(),
                    1,
                    n,
                    false,
                    a.as_ptr(),
                    1,
                    n,
                    b.as_ptr(),
                    1,
                    n,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    threads,
                );
            }
        })
    });
    group.finish();
}

criterion_group!(benches, matrix_product, steps);
criterion_main!(benches);
