use criterion::Criterion;
use ddpm_cuda::config::Size;
use ddpm_cuda::data::{Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Batch, Kind, Schedule};
use ddpm_cuda::ops::q_sample::{Coefficients, q_sample};
use ddpm_cuda::tensor::Shape;
use ddpm_cuda::train::{Feed, Resident};

use crate::{Group, Work, device, finish};

/// Bound by drawing the noise, so measured in elements per second; with and without mirrored images. On a GPU the
/// images are there already.
pub fn bench(c: &mut Criterion) {
    let schedule = Schedule::new(Kind::Linear, 1000).expect("the paper's schedule");
    let device = device();
    let mut group = Group::new(c, &device, "q_sample");
    for shape in [Shape::new(128, 28, 28, 1), Shape::new(128, 32, 32, 3), Shape::new(4, 256, 256, 3)] {
        let extent = Extent { size: Size { h: shape.h, w: shape.w }, channels: shape.c };
        let data = Dataset::new(extent, (0..shape.len()).map(|i| i as u8).collect(), None);
        let indices: Vec<usize> = (0..shape.n).collect();
        let resident = match &device {
            Device::Cuda(gpu) => Some(Resident::new(gpu, data.images()).unwrap()),
            _ => None,
        };
        let mut feed = Feed::new(&device, resident.as_ref());
        let coefficients = Coefficients::new(&device, &schedule).unwrap();
        for (name, flip) in [("as stored", false), ("half mirrored", true)] {
            let batch = Batch::train(1, 1, 0, (0..shape.n).collect(), flip, 1000);
            group.case(&format!("{shape}/{name}"), Work::Elements(shape.len()), || {
                let source = feed.source(&data, 0..shape.n as u64, |_| data.rows(&indices, false)).unwrap();
                let noised = q_sample(&device, source, &batch, &coefficients).unwrap();
                finish(&device);
                noised
            });
        }
    }
}
