use ddpm_cuda::device::Device;
use ddpm_cuda::ops::dropout::{dropout, reference};
use ddpm_cuda::params::{Params, Specs};
use ddpm_cuda::rng::{Purpose, Streams};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use crate::support::{
    F32_ROUNDING, Pass, finite_differences, gpu, numbers, plant, same_as_the_cpu, same_bits,
    same_bits_at_any_number_of_threads, through_tape, through_tape_on, to_f32, worst,
};

const STREAMS: Streams = Streams { seed: 0x0123_4567_89AB_CDEF, purpose: Purpose::Dropout, step: 7, first: 3 };

/// One element; primes, so that the last Philox block of four is not full; one beyond a task of 2^12 elements; several
/// tasks; one beyond a block of 1,024.
const CASES: [Shape; 5] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(2, 3, 5, 7),
    Shape::new(1, 1, 1, 4097),
    Shape::new(3, 32, 32, 11),
    Shape::new(2, 1, 5, 205),
];

fn pass(shape: Shape, rate: f32) -> (Pass, Vec<f64>, Vec<f64>) {
    let (x, dy) = (numbers(1, shape.len()), numbers(2, shape.len()));
    let op = |tape: &mut Tape<'_>, x: &[_], _: &[_]| dropout(tape, &x[0], rate, STREAMS);
    (through_tape(&[(shape, to_f32(&x))], &[], &to_f32(&dy), 1, op), x, dy)
}

/// Three roundings: `1 - rate`, its reciprocal, the product.
#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for shape in CASES {
        for rate in [0.1, 0.5, 0.999] {
            let (got, x, dy) = pass(shape, rate);
            let budget = |y: f64| 3.001 * F32_ROUNDING * y.abs();
            worst("y", &got.y, &reference::forward(&x, shape.n, f64::from(rate), STREAMS), budget);
            worst("dx", &got.dx[0], &reference::backward(&dy, shape.n, f64::from(rate), STREAMS), budget);
        }
    }
}

#[test]
fn drops_the_share_it_is_asked_to() {
    for rate in [0.1f32, 0.5] {
        let n = 100_000;
        let (got, ..) = pass(Shape::vector(n), rate);
        let dropped = got.y.iter().filter(|&&y| y == 0.0).count() as f64 / n as f64;
        // Five standard deviations of a binomial proportion.
        let deviation = (f64::from(rate) * (1.0 - f64::from(rate)) / n as f64).sqrt();
        assert!((dropped - f64::from(rate)).abs() < 5.0 * deviation, "dropped {dropped} at rate {rate}");
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let dy = numbers(2, 26);
    let f = |x: &[Vec<f64>]| reference::forward(&x[0], 2, 0.5, STREAMS).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    finite_differences("dropout", f, &[numbers(1, 26)], &[reference::backward(&dy, 2, 0.5, STREAMS)]);
}

#[test]
fn does_nothing_at_rate_zero_or_without_recording() {
    let device = Device::cpu_guarded();
    let params = Params::zeros(&device, Specs::default()).unwrap();
    let x = Tensor::from_slice(&device, Shape::vector(9), &to_f32(&numbers(1, 9))).unwrap();
    for (mut tape, rate) in [(Tape::recording(&device, &params), 0.0), (Tape::inference(&device, &params), 0.5)] {
        let x = tape.leaf(x.clone());
        let y = dropout(&mut tape, &x, rate, STREAMS).unwrap();
        same_bits("y", y.data(), x.data());
        assert!(tape.saved().is_empty(), "an identity was recorded");
    }
}

#[test]
fn streams_differ() {
    let x = vec![1.0; 64];
    let other = Streams { first: 4, ..STREAMS };
    assert_ne!(reference::forward(&x, 1, 0.5f64, STREAMS), reference::forward(&x, 1, 0.5f64, other));
    let (one, two) = (reference::forward(&x, 1, 0.5f64, STREAMS), reference::forward(&x, 2, 0.5f64, STREAMS));
    assert_ne!(one[32..], two[32..], "the second image has the mask of the first one's rest");
}

/// Micro-batches get the masks of the whole batch.
#[test]
fn an_image_does_not_depend_on_its_batch() {
    let shape = CASES[3];
    let (together, x, dy) = pass(shape, 0.3);
    let image = shape.len() / shape.n;
    for i in 0..shape.n {
        let own = i * image..(i + 1) * image;
        let streams = Streams { first: STREAMS.first + i as u32, ..STREAMS };
        let inputs = [(Shape { n: 1, ..shape }, to_f32(&x[own.clone()]))];
        let alone =
            through_tape(&inputs, &[], &to_f32(&dy[own.clone()]), 1, |tape, x, _| dropout(tape, &x[0], 0.3, streams));
        same_bits("y", &alone.y, &together.y[own.clone()]);
        same_bits("dx", &alone.dx[0], &together.dx[0][own]);
    }
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("dropout", || pass(CASES[3], 0.1).0.flat());
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for shape in CASES {
        for rate in [0.1, 0.5, 0.999] {
            let [x, dy] = [1, 2].map(|seed| to_f32(&numbers(seed, shape.len())));
            let name = format!("dropout, {shape}, rate {rate}");
            same_as_the_cpu(&name, &[(shape, x)], &[], &dy, 1, |tape, x, _| dropout(tape, &x[0], rate, STREAMS));
        }
    }
}

/// More images than the 65,535 blocks that a grid can have along y.
#[test]
fn gpu_loops_over_images() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let shape = Shape::new(65_537, 1, 1, 5);
    let (x, op) = (vec![1.0; shape.len()], |tape: &mut Tape<'_>, x: &[_], _: &[_]| dropout(tape, &x[0], 0.5, STREAMS));
    let inputs = [(shape, x.clone())];
    let got = through_tape_on(&Device::Cuda(gpu), &inputs, &[], &x, 1, op);
    same_bits("y and dx", &got.flat(), &through_tape(&inputs, &[], &x, 1, op).flat());
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "dropout::gpu_has_the_bits_of_the_cpu";
    // A constant of Philox; the wrong words kept; the number of images in place of the size of one.
    plant::notices(test, "dropout_mask_f32", "-845247145", "-845247144");
    plant::notices(test, "dropout_mask_bf16", "setp.lt.u32", "setp.ge.u32");
    plant::notices_wrong_parameter(test, "dropout_mask_f32", 3, 2);
    plant::notices_lost_block(test, "dropout_mask_bf16");
}
