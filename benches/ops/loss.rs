use criterion::Criterion;
use ddpm_cuda::config::Size;
use ddpm_cuda::data::{Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::objective::{self, Objective};
use ddpm_cuda::diffusion::{Batch, Kind, Prediction, Schedule, Variance};
use ddpm_cuda::meter::Meter;
use ddpm_cuda::ops::loss::{Table, any, loss};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::train::{Feed, Resident};

use crate::{Group, Work, device, finish};

/// Bound by drawing the noise again, so measured in elements per second; the hybrid loss with a learned variance by its
/// exponentials, and by reading twice as many channels.
pub fn bench(c: &mut Criterion) {
    let schedule = Schedule::new(Kind::Linear, 1000).expect("the paper's schedule");
    let device = device();
    let mut group = Group::new(c, &device, "loss");
    for shape in [Shape::new(128, 28, 28, 1), Shape::new(128, 32, 32, 3), Shape::new(4, 256, 256, 3)] {
        let prediction = Tensor::zeros_as(&device, device.activations(), shape).unwrap();
        let batch = Batch::train(1, 1, 0, vec![0; shape.n], false, 1000);
        let t = Tensor::full(&device, Shape::new(shape.n, 1, 1, 1), 500.0).unwrap();
        let mut meter = Meter::new(&device).unwrap();
        meter.begin();
        group.case(&shape.to_string(), Work::Elements(shape.len()), || {
            let loss = loss(&device, &prediction, &batch, &t, Some(shape.n), &mut meter).unwrap();
            finish(&device);
            loss
        });
        let hybrid = Objective::new(objective::Loss::Hybrid, Prediction::Eps, Variance::LearnedRange, &schedule);
        let table = Table::new(&device, hybrid).unwrap();
        let doubled = Shape { c: 2 * shape.c, ..shape };
        let output = Tensor::zeros_as(&device, device.activations(), doubled).unwrap();
        let extent = Extent { size: Size { h: shape.h, w: shape.w }, channels: shape.c };
        let data = Dataset::new(extent, vec![100; shape.len()], None);
        let indices: Vec<usize> = (0..shape.n).collect();
        let resident = match &device {
            Device::Cuda(gpu) => Some(Resident::new(gpu, data.images()).unwrap()),
            _ => None,
        };
        let mut feed = Feed::new(&device, resident.as_ref());
        group.case(&format!("{shape}/hybrid"), Work::Elements(shape.len()), || {
            let source = feed.source(&data, 0..shape.n as u64, |_| data.rows(&indices, false)).unwrap();
            let loss = any(&device, &output, source, &batch, &t, &table, Some(shape.n), &mut meter).unwrap();
            finish(&device);
            loss
        });
    }
}
