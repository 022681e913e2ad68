use criterion::Criterion;
use ddpm_cuda::device::Precision;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::ops::adam::{State, Update, adam};
use ddpm_cuda::ops::grad_norm::grad_norm;
use ddpm_cuda::params::{Init, Layout, Params, Specs};
use ddpm_cuda::tensor::{Shape, Tensor};
use rayon::prelude::*;

use crate::{Group, Work, device, finish};

/// Parameter counts of the `small` network of benches/step.rs and of `cifar10`. For comparison, `memory` is `x += a y`
/// over as many bytes: the bandwidth of the machine, where the CPU is measured. In bf16 an update also writes the
/// rounded weights, 2 bytes more.
pub fn bench(c: &mut Criterion) {
    let update = Update {
        step: 10,
        learning_rate: 2e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.0,
        ema_decay: 0.999,
    };
    for len in [1_620_000, 35_746_307] {
        let device = device();
        let mut group = Group::new(c, &device, "adam");
        let rounded = if device.precision() == Precision::Bf16 { 2 } else { 0 };
        let work = Work::Bytes((36 + rounded) * len);
        let mut specs = Specs::default();
        specs.add("w".into(), Shape::vector(len), Layout::Vector, Init::Zeros);
        let flat = Shape::vector(specs.flat_len());
        let start = vec![0.1; flat.len()];
        let mut w = Params::from_host(&device, specs, &start).unwrap();
        let [mut ema, mut m, mut v, g] = [0.1, 0.01, 0.001, 0.01].map(|x| Tensor::full(&device, flat, x).unwrap());
        let mut meter = Meter::new(&device).unwrap();
        meter.begin();
        grad_norm(&device, &g, 1.0, &mut meter).unwrap();
        group.case(&format!("{len}/update"), work, || {
            let shard = 0..flat.len();
            let state = State { w: &mut w, shard, ema: &mut ema, m: &mut m, v: &mut v, g: &g };
            adam(&device, state, &update, &mut meter).unwrap();
            finish(&device);
        });
        if !device.is_gpu() {
            // 12 bytes an element, so three passes move as much as one update.
            let [mut x, mut y] = [start.clone(), start.clone()];
            group.case(&format!("{len}/memory"), work, || {
                [&mut x[..], &mut y, m.data_mut()].into_iter().for_each(|x| axpy(x, g.data()));
            });
        }
    }
}

fn axpy(x: &mut [f32], y: &[f32]) {
    let chunks = x.par_chunks_mut(1 << 14).zip(y.par_chunks(1 << 14));
    chunks.for_each(|(x, y)| x.iter_mut().zip(y).for_each(|(x, y)| *x += 1e-9 * y));
}
