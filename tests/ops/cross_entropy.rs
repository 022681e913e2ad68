use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::meter::{Measured, Meter, Quarters};
use ddpm_cuda::ops::cross_entropy::{cross_entropy, log_probability_gradient, reference};
use ddpm_cuda::ops::loss::Loss;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{
    F32_ROUNDING, close, close_as_but_for, finite_differences, gpu, halves, numbers, per_image, plant, same_bits,
    same_bits_at_any_number_of_threads, to_f32,
};

/// Images and classes. One of each; classes for less than a warp, for exactly one and for more; images for more than a
/// block of eight and for more than the 256 threads of the last one.
const CASES: [(usize, usize); 6] = [(1, 1), (3, 2), (9, 10), (8, 32), (5, 1000), (300, 7)];

fn batch(n: usize) -> Batch {
    Batch::train(31, 8, 5, vec![0; n], false, 1000)
}

/// Logits from -12 to 12, and labels; every third image's label has the largest logit.
fn data((n, classes): (usize, usize)) -> (Vec<f64>, Vec<u32>) {
    let z: Vec<f64> = numbers(1, n * classes).iter().map(|z| f64::from((12.0 * z) as f32)).collect();
    let label = |(i, z): (usize, &[f64])| match i % 3 {
        0 => (0..classes).max_by(|&a, &b| z[a].total_cmp(&z[b])).unwrap() as u32,
        _ => (i * 7 % classes) as u32,
    };
    let labels = z.chunks_exact(classes).enumerate().map(label).collect();
    (z, labels)
}

fn logits(device: &Device, classes: usize, z: &[f64]) -> Tensor {
    let shape = Shape::new(z.len() / classes, 1, 1, classes);
    Tensor::from_slice_as(device, device.activations(), shape, &to_f32(z)).unwrap()
}

fn labels_on(device: &Device, labels: &[u32]) -> Tensor {
    per_image(device, labels.iter().map(|&label| label as f32))
}

fn add_to(meter: &mut Meter, device: &Device, z: &Tensor, labels: &[u32], batch: &Batch, of: Option<usize>) -> Loss {
    let t = per_image(device, batch.t().into_iter().map(|t| t as f32));
    cross_entropy(device, z, &labels_on(device, labels), batch, &t, of, meter).unwrap()
}

fn measure(device: &Device, z: &Tensor, labels: &[u32], batch: &Batch, of: Option<usize>) -> (Loss, Measured) {
    let mut meter = Meter::new(device).unwrap();
    meter.begin();
    let loss = add_to(&mut meter, device, z, labels, batch, of);
    (loss, meter.read().unwrap()[0])
}

#[test]
fn the_gradient_is_the_derivative() {
    let (z, labels) = data((4, 5));
    let z: Vec<f64> = z.iter().map(|z| z / 4.0).collect();
    let step_loss = |x: &[Vec<f64>]| reference::forward(&x[0], &labels, 5).iter().sum::<f64>() / 7.0;
    let dz = reference::backward(&z, &labels, 5, 1.0 / 7.0);
    finite_differences("cross_entropy", step_loss, &[z], &[dz]);
}

/// By hand: p = (1/4, 3/4) for z = (0, ln 3).
#[test]
fn the_reference_of_two_classes() {
    let z = [0.0, 3f64.ln(), 0.0, 3f64.ln()];
    let losses = reference::forward(&z, &[0, 1], 2);
    assert!((losses[0] - 4f64.ln()).abs() < 1e-15 && (losses[1] - (4f64 / 3.0).ln()).abs() < 1e-15, "{losses:?}");
    let dz = reference::backward(&z, &[0, 1], 2, 1.0);
    for (got, want) in dz.iter().zip([-0.75, 0.75, 0.25, -0.25]) {
        assert!((got - want).abs() < 1e-15, "{dz:?}");
    }
}

#[test]
fn cpu_follows_the_reference() {
    let device = Device::cpu_guarded();
    for case in CASES {
        let (n, classes) = case;
        let ((z, labels), batch) = (data(case), batch(n));
        let tensor = logits(&device, classes, &z);
        let (got, measured) = measure(&device, &tensor, &labels, &batch, Some(n + 3));
        let losses = got.per_image.expect("the CPU knows the loss of each image");
        // The reference takes the logarithm of p, which is rounded: as much error as log of a number near 1 has.
        for (got, want) in losses.iter().zip(reference::forward(&z, &labels, classes)) {
            assert!((got - want).abs() <= classes as f64 * 1e-15 * (1.0 + want), "{case:?}: {got}, expected {want}");
        }
        let factor = 1.0 / (n + 3) as f64;
        let oracle = reference::backward(&z, &labels, classes, factor);
        let yardstick = reference::backward(&to_f32(&z), &labels, classes, factor);
        close("dz", got.gradient.expect("it was asked for").data(), &oracle, &yardstick);

        let right: Vec<f64> = z.chunks(classes).zip(&labels).map(|(z, &label)| is_right(z, label)).collect();
        let [mut of_losses, mut of_right] = [Quarters::default(); 2];
        of_losses.add(&batch.t(), 1000, &losses);
        of_right.add(&batch.t(), 1000, &right);
        assert_eq!((measured.quarters, measured.right), (of_losses, of_right), "what the meter got");

        let (validation, measured) = measure(&device, &tensor, &labels, &batch, None);
        assert!(validation.gradient.is_none());
        assert_eq!((measured.quarters, measured.right), (of_losses, of_right), "without a gradient");

        let dz = log_probability_gradient(&device, &tensor, &labels_on(&device, &labels)).unwrap();
        let oracle = reference::backward(&z, &labels, classes, -1.0);
        close("for guidance", dz.data(), &oracle, &reference::backward(&to_f32(&z), &labels, classes, -1.0));
    }
}

fn is_right(z: &[f64], label: u32) -> f64 {
    let argmax = (0..z.len()).rev().max_by(|&a, &b| z[a].total_cmp(&z[b])).unwrap();
    if argmax == label as usize { 1.0 } else { 0.0 }
}

/// -log p_y of an image that is nearly certain is about exp(-30), of which 1 + exp(-30) in f32 would leave nothing;
/// logits of 1e4 do not overflow.
#[test]
fn small_losses_and_large_logits_are_seen() {
    gpu::each("extremes", extremes);
    extremes(&Device::cpu_guarded());
}

fn extremes(device: &Device) -> Vec<f32> {
    let z = [30.0, 0.0, 9_984.0, 9_920.0, -9_984.0, -9_984.0]; // all are bf16
    let batch = |n| Batch::train(1, 0, 0, vec![0; n], false, 1);
    let (_, measured) = measure(device, &logits(device, 2, &z), &[0, 0, 1], &batch(3), None);
    let want = (-30f64).exp() + (-64f64).exp() + 2f64.ln();
    let mean = measured.quarters.mean().unwrap();
    assert!((3.0 * mean - want).abs() < 1e-12, "{mean}");
    let (_, certain) = measure(device, &logits(device, 2, &z[..2]), &[0], &batch(1), None);
    let certain = certain.quarters.mean().unwrap();
    // The rounding of 1 + exp(-30).
    assert!((certain - (-30f64).exp()).abs() <= f64::EPSILON, "{certain:e}");
    // Of equal logits the first counts.
    assert_eq!(measured.right.mean(), Some(2.0 / 3.0));
    halves(mean).into_iter().chain(halves(certain)).collect()
}

#[test]
fn one_bad_number_shows_in_the_loss() {
    for bad in [f64::NAN, f64::INFINITY] {
        let z = [1.0, 2.0, 3.0, bad, 1.0, 1.0];
        let see = |device: &Device| {
            let (_, measured) = measure(device, &logits(device, 3, &z), &[0, 1], &batch(2), Some(2));
            assert!(!measured.quarters.mean().unwrap().is_finite(), "a bad number went unseen on {device}");
            vec![0.0]
        };
        see(&Device::cpu());
        gpu::each("a bad number", see);
    }
}

#[test]
#[should_panic(expected = "label 3 with 3 classes")]
fn a_label_beyond_the_classes_is_refused() {
    let device = Device::cpu();
    measure(&device, &logits(&device, 3, &[0.0; 6]), &[0, 3], &batch(2), Some(2));
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let (z, labels) = data(CASES[2]);
    let device = Device::cpu();
    same_bits_at_any_number_of_threads("cross_entropy", || {
        let (loss, _) = measure(&device, &logits(&device, 10, &z), &labels, &batch(9), Some(9));
        loss.per_image.unwrap().into_iter().flat_map(halves).chain(loss.gradient.unwrap().to_vec().unwrap()).collect()
    });
}

/// What a GPU's exponentials add to the error of p, which is at most 1: two of 2 ulp, of the term and in the sum.
const EXPONENTIALS: f64 = 8.0 * F32_ROUNDING;

#[test]
fn gpu_follows_the_reference() {
    for case in CASES {
        let (n, classes) = case;
        let ((z, labels), batch) = (data(case), batch(n));
        gpu::each(&format!("cross_entropy of {case:?}"), |device| {
            let dtype = device.activations();
            let z = gpu::rounded(dtype, &z);
            let tensor = logits(device, classes, &z);
            let (got, measured) = measure(device, &tensor, &labels, &batch, Some(n + 3));
            assert!(got.per_image.is_none(), "what waits for the GPU");
            let factor = 1.0 / (n + 3) as f64;
            let dz = got.gradient.expect("it was asked for").to_vec().unwrap();
            let reference = |factor| reference::backward(&z, &labels, classes, factor);
            let yardstick = |factor| reference::backward(&to_f32(&z), &labels, classes, factor);
            close_as_but_for(dtype, "dz", &dz, &reference(factor), &yardstick(factor), EXPONENTIALS * factor);

            let cpu = Device::cpu();
            let (_, want) = measure(&cpu, &logits(&cpu, classes, &z), &labels, &batch, None);
            assert_eq!(measured.right, want.right, "{case:?}");
            same_losses(&format!("{case:?}"), &measured.quarters, &want.quarters);
            let (validation, again) = measure(device, &tensor, &labels, &batch, None);
            assert!(validation.gradient.is_none());
            assert_eq!((again.quarters, again.right), (measured.quarters, measured.right), "without a gradient");

            let guides = log_probability_gradient(device, &tensor, &labels_on(device, &labels)).unwrap();
            let guides = guides.to_vec().unwrap();
            close_as_but_for(dtype, "for guidance", &guides, &reference(-1.0), &yardstick(-1.0), EXPONENTIALS);
            [dz, guides, bits(&measured.quarters)].concat()
        });
    }
}

/// d log s = ds / s: as much as the exponentials err, and the f32 rounding of a difference x of logits, |x| exp(-|x|) <
/// 1/2 of it.
fn same_losses(name: &str, got: &Quarters, want: &Quarters) {
    for (quarter, (got, want)) in got.means().into_iter().zip(want.means()).enumerate() {
        assert_eq!(got.is_some(), want.is_some(), "{name}: quarter {quarter} has {got:?}, expected {want:?}");
        let (Some(got), Some(want)) = (got, want) else { continue };
        assert!((got - want).abs() <= EXPONENTIALS, "{name}: quarter {quarter} has {got}, expected {want}");
    }
}

fn bits(quarters: &Quarters) -> Vec<f32> {
    quarters.means().into_iter().flatten().flat_map(halves).collect()
}

/// A row sums the micro-batches of its step and keeps nothing of its previous contents.
#[test]
fn gpu_sums_the_micro_batches_of_a_step() {
    let (z, labels) = data((5, 10));
    let whole = Batch::train(1, 2, 0, vec![0; 5], true, 10);
    gpu::each("pieces", |device| {
        let z = gpu::rounded(device.activations(), &z);
        let mut meter = Meter::new(device).unwrap();
        meter.begin();
        let bad = [&[f64::NAN], &z[1..]].concat();
        add_to(&mut meter, device, &logits(device, 10, &bad), &labels, &whole, Some(5));
        assert!(!meter.read().unwrap()[0].quarters.mean().unwrap().is_finite());
        meter.begin();
        let mut dz = Vec::new();
        for (first, n) in [(0, 2), (2, 3)] {
            let batch = Batch::train(1, 2, first as u32, vec![0; n], true, 10);
            let piece = logits(device, 10, &z[10 * first..10 * (first + n)]);
            let loss = add_to(&mut meter, device, &piece, &labels[first..first + n], &batch, Some(5));
            dz.extend(loss.gradient.unwrap().to_vec().unwrap());
        }
        let pieces = meter.read().unwrap()[0];
        let (of_whole, measured) = measure(device, &logits(device, 10, &z), &labels, &whole, Some(5));
        same_bits("dz", &dz, &of_whole.gradient.unwrap().to_vec().unwrap());
        assert_eq!(pieces.right, measured.right);
        for (got, want) in pieces.quarters.means().into_iter().zip(measured.quarters.means()) {
            let (got, want) = (got.unwrap_or(0.0), want.unwrap_or(0.0));
            // Sums of five losses in another order.
            assert!((got - want).abs() <= 8.0 * f64::EPSILON * want, "{got}, expected {want}");
        }
        [dz, bits(&pieces.quarters)].concat()
    });
}

/// An image's gradient has the same bits alone and among others.
#[test]
fn gpu_images_do_not_interact() {
    let (z, labels) = data((9, 10));
    gpu::each("alone", |device| {
        let gradient = |z: &[f64], labels: &[u32]| {
            let z = logits(device, 10, z);
            log_probability_gradient(device, &z, &labels_on(device, labels)).unwrap().to_vec().unwrap()
        };
        let all = gradient(&z, &labels);
        for i in 0..9 {
            same_bits("alone", &gradient(&z[10 * i..10 * (i + 1)], &labels[i..=i]), &all[10 * i..10 * (i + 1)]);
        }
        all
    });
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "cross_entropy::gpu_follows_the_reference";
    // The barriers before a block counts, before the last block is known and before its warps' sums are added.
    plant::notices_lost_barrier(test, "cross_entropy_fwd_f32", 0);
    plant::notices_lost_barrier(test, "cross_entropy_fwd_bf16", 1);
    plant::notices_lost_last_barrier(test, "cross_entropy_fwd_f32");
    // Wrong quarters; losses added to stale ones; a gradient of another size.
    plant::notices_wrong_parameter(test, "cross_entropy_fwd_bf16", 9, 8);
    plant::notices_wrong_parameter(
        "cross_entropy::gpu_sums_the_micro_batches_of_a_step",
        "cross_entropy_fwd_f32",
        11,
        8,
    );
    plant::notices_wrong_parameter(test, "cross_entropy_fwd_f32", 10, 8);
    plant::notices_lost_block(test, "cross_entropy_fwd_f32");
}
