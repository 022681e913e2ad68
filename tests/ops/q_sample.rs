use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Batch, Kind, Schedule};
use ddpm_cuda::ops::q_sample::{Coefficients, Images, Noised, Source, q_sample, reference};
use ddpm_cuda::tensor::Shape;

use crate::support::{close, numbers, same_bits, same_bits_at_any_number_of_threads};

/// Sets of images: 4,096 numbers are one task of the parallel pass.
const SETS: [Shape; 6] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(5, 3, 7, 2),
    Shape::new(3, 28, 28, 1),
    Shape::new(4, 37, 41, 3),
    Shape::new(2, 64, 64, 1),
    Shape::new(2, 1, 4097, 1),
];

fn pixels(len: usize) -> Vec<u8> {
    numbers(11, len).into_iter().map(|v| (v * 127.5 + 127.5).round() as u8).collect()
}

fn batch(set: Shape, n: usize) -> Batch {
    let indices = (0..n).map(|i| (3 * i + 1) % set.n).collect();
    Batch::train(99, 5, 2, indices, true, 1000)
}

fn on_cpu(images: Images<'_>, batch: &Batch, schedule: &Schedule) -> Noised {
    let device = Device::cpu_guarded();
    let coefficients = Coefficients::new(&device, schedule).unwrap();
    q_sample(&device, Source::Host(images), batch, &coefficients).unwrap()
}

#[test]
fn cpu_follows_the_reference() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for shape in SETS {
        let pixels = pixels(shape.len());
        let images = Images { pixels: &pixels, shape };
        let batch = batch(shape, 7).with_labels(Some(vec![3, 0, 9, 1, 1, 16_777_216, 2]));
        assert!(batch.flip.contains(&true) && batch.flip.contains(&false), "both kinds: {:?}", batch.flip);
        let Noised { x_t, t, labels } = on_cpu(images, &batch, &schedule);
        assert_eq!(x_t.shape(), Shape { n: 7, ..shape });
        let labels = labels.expect("a conditional batch");
        for (name, got, want) in [("t", &t, &batch.t), ("labels", &labels, batch.labels.as_ref().unwrap())] {
            assert_eq!(got.shape(), Shape::new(7, 1, 1, 1), "{name}");
            assert!(
                got.data().iter().zip(want).all(|(got, want)| f64::from(*got) == f64::from(*want)),
                "{name}: {got:?}"
            );
        }
        let oracle = reference::batch::<f64>(images, &batch, &schedule);
        let yardstick = reference::batch::<f32>(images, &batch, &schedule);
        println!("{shape}: {:.2} of the budget", close("x_t", x_t.data(), &oracle, &yardstick));
    }
}

/// At t = 0 almost nothing but the image is there: 0.01 of noise, which never exceeds 6.77.
#[test]
fn the_least_noise_leaves_the_image_and_mirrors_it() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let shape = Shape::new(2, 3, 4, 2);
    let pixels: Vec<u8> = (0..shape.len()).map(|i| (5 * i) as u8).collect();
    let images = Images { pixels: &pixels, shape };
    let mut batch = batch(shape, 2);
    (batch.t, batch.flip, batch.indices) = (vec![0, 0], vec![false, true], vec![1, 0]);
    let Noised { x_t, labels, .. } = on_cpu(images, &batch, &schedule);
    assert!(labels.is_none(), "nobody gave any");
    let at = |n: usize, y: usize, x: usize, c: usize| ((n * 3 + y) * 4 + x) * 2 + c;
    for y in 0..3 {
        for x in 0..4 {
            for c in 0..2 {
                for (i, source) in [at(1, y, x, c), at(0, y, 3 - x, c)].into_iter().enumerate() {
                    let x_0 = f32::from(pixels[source]) / 127.5 - 1.0;
                    let got = x_t.data()[at(i, y, x, c)];
                    assert!((got - x_0).abs() < 0.068, "image {i} at {y}, {x}, {c}: {got}, expected about {x_0}");
                }
            }
        }
    }
}

#[test]
fn a_step_in_pieces_is_the_same_as_one_uncut() {
    let schedule = Schedule::new(Kind::Cosine, 100).unwrap();
    let shape = SETS[1];
    let pixels = pixels(shape.len());
    let images = Images { pixels: &pixels, shape };
    let indices: Vec<usize> = vec![4, 0, 3, 3, 1];
    let whole = Batch::train(7, 12, 0, indices.clone(), true, 100);
    let whole = on_cpu(images, &whole, &schedule);
    let mut pieces = Vec::new();
    for (first, indices) in [(0, &indices[..2]), (2, &indices[2..])] {
        let piece = Batch::train(7, 12, first, indices.to_vec(), true, 100);
        pieces.extend_from_slice(on_cpu(images, &piece, &schedule).x_t.data());
    }
    same_bits("x_t", &pieces, whole.x_t.data());
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for shape in [SETS[2], SETS[3], SETS[5]] {
        let pixels = pixels(shape.len());
        same_bits_at_any_number_of_threads("x_t", || {
            on_cpu(Images { pixels: &pixels, shape }, &batch(shape, 7), &schedule).x_t.data().to_vec()
        });
    }
}

#[test]
fn an_empty_batch_is_empty() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let images = Images { pixels: &[1, 2], shape: Shape::new(2, 1, 1, 1) };
    let none = Batch::train(0, 0, 0, Vec::new(), true, 1000);
    assert!(on_cpu(images, &none, &schedule).x_t.data().is_empty());
}
