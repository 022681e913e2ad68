use criterion::{Criterion, Throughput};
use ddpm_cuda::device::Device;
use ddpm_cuda::ops::adam::{Buffers, Update, adam};
use rayon::prelude::*;

/// Parameters of `mnist`-sized and `cifar10`-sized networks. `x += a y` over as many bytes, in the same measurement, is
/// what the memory gives.
pub fn bench(c: &mut Criterion) {
    let update = Update {
        step: 10,
        learning_rate: 2e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        clip: 0.5,
        ema_decay: 0.999,
    };
    for len in [1_620_000, 35_746_307] {
        let mut group = c.benchmark_group(format!("adam/{len}"));
        group.throughput(Throughput::Bytes(36 * len as u64));
        let [mut w, mut ema, mut m, mut v] = [0.1, 0.1, 0.01, 0.001].map(|x: f32| vec![x; len]);
        let g = vec![0.01f32; len];
        let device = Device::cpu();
        group.bench_function("update", |b| {
            b.iter(|| {
                let buffers = Buffers { w: &mut w, ema: &mut ema, m: &mut m, v: &mut v, g: &g };
                adam(&device, buffers, &update);
            });
        });
        // 12 bytes an element, so three passes move as much as one update.
        group.bench_function("memory", |b| {
            b.iter(|| [&mut w, &mut ema, &mut m].into_iter().for_each(|x| axpy(x, &g)));
        });
        group.finish();
    }
}

fn axpy(x: &mut [f32], y: &[f32]) {
    let chunks = x.par_chunks_mut(1 << 14).zip(y.par_chunks(1 << 14));
    chunks.for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += 1e-9 * y));
}
