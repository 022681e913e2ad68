use criterion::{Criterion, Throughput};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Batch, Kind, Schedule};
use ddpm_cuda::images::{Images, Source};
use ddpm_cuda::ops::q_sample::{Coefficients, q_sample};
use ddpm_cuda::tensor::Shape;

/// Bound by drawing the noise, so measured in elements per second; with and without mirrored images.
pub fn bench(c: &mut Criterion) {
    let schedule = Schedule::new(Kind::Linear, 1000).expect("the paper's schedule");
    let mut group = c.benchmark_group("q_sample");
    for shape in [Shape::new(128, 28, 28, 1), Shape::new(128, 32, 32, 3), Shape::new(4, 256, 256, 3)] {
        let pixels: Vec<u8> = (0..shape.len()).map(|i| i as u8).collect();
        let (images, device) = (Images { pixels: &pixels, shape }, Device::cpu());
        let coefficients = Coefficients::new(&device, &schedule).unwrap();
        group.throughput(Throughput::Elements(shape.len() as u64));
        for (name, flip) in [("as stored", false), ("half mirrored", true)] {
            let batch = Batch::train(1, 1, 0, (0..shape.n).collect(), flip, 1000);
            group.bench_function(format!("{shape}/{name}"), |b| {
                b.iter(|| q_sample(&device, Source::Host(images), &batch, &coefficients));
            });
        }
    }
    group.finish();
}
