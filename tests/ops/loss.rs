use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::meter::Quarters;
use ddpm_cuda::ops::loss::{Loss, loss, reference};
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use crate::support::{
    F32_ROUNDING, close, close_as, finite_differences, gpu, halves, numbers, per_image, plant, same_bits,
    same_bits_at_any_number_of_threads, to_f32,
};

/// The CPU path draws 256 elements at a time; 4,096 are one task.
const SHAPES: [Shape; 6] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(3, 5, 3, 2),
    Shape::new(2, 1, 1, 257),
    Shape::new(4, 28, 28, 1),
    Shape::new(2, 1, 1, 4097),
    Shape::new(2, 37, 41, 3),
];

fn batch(n: usize) -> Batch {
    Batch::train(31, 8, 5, vec![0; n], false, 1000)
}

/// The loss of `y`, and the quarters in the meter's row.
fn measure(device: &Device, y: &Tensor, batch: &Batch, step_images: Option<usize>) -> (Loss, Quarters) {
    let mut meter = Meter::new(device).unwrap();
    meter.begin();
    let loss = add_to(&mut meter, device, y, batch, step_images);
    (loss, meter.read().unwrap()[0].quarters)
}

fn add_to(meter: &mut Meter, device: &Device, y: &Tensor, batch: &Batch, step_images: Option<usize>) -> Loss {
    let t = per_image(device, batch.t().into_iter().map(|t| t as f32));
    loss(device, y, batch, &t, step_images, meter).unwrap()
}

fn on_cpu(y: &Tensor, batch: &Batch, step_images: Option<usize>) -> (Vec<f64>, Loss) {
    let (mut loss, _) = measure(&Device::cpu_guarded(), y, batch, step_images);
    (loss.per_image.take().expect("the CPU knows the loss of each image"), loss)
}

#[test]
fn the_gradient_is_the_derivative() {
    let batch = batch(2);
    let y = numbers(1, 2 * 7);
    // The step's loss is the mean over 5 images, of which these are two.
    let step_loss = |x: &[Vec<f64>]| reference::forward(&x[0], &batch).iter().sum::<f64>() / 5.0;
    let dy = reference::backward(&y, &batch, 5);
    finite_differences("loss", step_loss, &[y], &[dy]);
}

/// Allowed error of an f64 loss of f32 differences. The drawn eps errs by at most 1e-6, the difference by a rounding.
/// With e the largest error of a difference, the mean square L errs by at most 2 sqrt(L) e + e^2 (Cauchy-Schwarz).
fn allowance(loss: f64) -> f64 {
    // |y| <= 1 and |eps| <= 6.77.
    let e = 1e-6 + 8.0 * F32_ROUNDING;
    2.0 * loss.sqrt() * e + e * e
}

#[test]
fn cpu_follows_the_reference() {
    let device = Device::cpu_guarded();
    for shape in SHAPES {
        let batch = batch(shape.n);
        let y = numbers(2, shape.len());
        let prediction = Tensor::from_slice(&device, shape, &to_f32(&y)).unwrap();
        let (got, quarters) = measure(&device, &prediction, &batch, Some(shape.n + 3));
        let per_image = got.per_image.as_ref().expect("the CPU knows the loss of each image");
        let want = reference::forward(&y, &batch);
        assert_eq!(per_image.len(), shape.n);
        for (got, want) in per_image.iter().zip(&want) {
            let budget = allowance(*want);
            assert!((got - want).abs() <= budget, "{shape}: loss {got}, expected {want} +- {budget:e}");
        }
        let mean = got.mean().expect("the same");
        assert!((mean - per_image.iter().sum::<f64>() / shape.n as f64).abs() <= f64::EPSILON * mean);
        let mut by_hand = Quarters::default();
        by_hand.add(&batch.t(), batch.timesteps, per_image);
        assert_eq!(quarters, by_hand, "what the meter got");
        let oracle = reference::backward(&y, &batch, shape.n + 3);
        let yardstick = reference::backward(&to_f32(&y), &batch, shape.n + 3);
        let dy = got.gradient.expect("a gradient was asked for");
        assert_eq!(dy.shape(), shape);
        println!("{shape}: {:.2} of the budget", close("dy", dy.data(), &oracle, &yardstick));

        let (validation, _) = measure(&device, &prediction, &batch, None);
        assert!(validation.gradient.is_none());
        assert_eq!(validation.per_image, got.per_image, "with and without a gradient");
    }
}

#[test]
fn the_true_noise_has_no_loss() {
    let shape = Shape::new(3, 9, 9, 1);
    let batch = batch(3);
    let mut y = Tensor::zeros(&Device::cpu(), shape).unwrap();
    y.data_mut().chunks_mut(81).enumerate().for_each(|(i, y)| batch.noise.image(i).normals(y));
    let (per_image, got) = on_cpu(&y, &batch, Some(3));
    assert_eq!(per_image, [0.0; 3]);
    assert!(got.gradient.unwrap().data().iter().all(|dy| *dy == 0.0));
    // Predicting zero costs the variance of the noise: 1 +- 5 sqrt(2/n).
    let zeros = Tensor::zeros(&Device::cpu(), Shape::new(3, 100, 100, 1)).unwrap();
    let nothing = on_cpu(&zeros, &batch, None).0.iter().sum::<f64>() / 3.0;
    assert!((nothing - 1.0).abs() < 5.0 * (2.0f64 / 3e4).sqrt(), "{nothing}");
}

#[test]
fn one_bad_number_shows_in_the_loss() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut y = Tensor::zeros(&Device::cpu(), Shape::new(2, 1, 1, 5000)).unwrap();
        y.data_mut()[9_999] = bad;
        let (loss, quarters) = measure(&Device::cpu(), &y, &batch(2), Some(2));
        assert!(!loss.mean().expect("on the CPU it is known").is_finite() && !quarters.mean().unwrap().is_finite());
        let per_image = loss.per_image.unwrap();
        assert!(per_image[0].is_finite() && !per_image[1].is_finite(), "{per_image:?}");
    }
}

#[test]
fn micro_batches_have_the_gradient_of_the_whole_batch() {
    let (shape, y) = (Shape::new(5, 4, 4, 3), to_f32(&numbers(3, 5 * 48)));
    let whole = Tensor::from_slice(&Device::cpu(), shape, &y).unwrap();
    let (losses, whole) = on_cpu(&whole, &Batch::train(1, 2, 0, vec![0; 5], true, 10), Some(5));
    let (mut dy, mut per_image) = (Vec::new(), Vec::new());
    for (first, n) in [(0, 2), (2, 3)] {
        let piece = Tensor::from_slice(&Device::cpu(), Shape { n, ..shape }, &y[first * 48..(first + n) * 48]).unwrap();
        let (losses, piece) = on_cpu(&piece, &Batch::train(1, 2, first as u32, vec![0; n], true, 10), Some(5));
        dy.extend_from_slice(piece.gradient.unwrap().data());
        per_image.extend(losses);
    }
    same_bits("dy", &dy, whole.gradient.unwrap().data());
    assert_eq!(per_image, losses);
}

#[test]
fn quarters_sort_losses_by_timestep() {
    let mut quarters = Quarters::default();
    assert_eq!((quarters.means(), quarters.mean()), ([None; 4], None));
    quarters.add(&[0, 249, 250, 999], 1000, &[1.0, 2.0, 4.0, 8.0]);
    assert_eq!(quarters.means(), [Some(1.5), Some(4.0), None, Some(8.0)]);
    assert_eq!(quarters.mean(), Some(3.75));
    // A chain whose length is no multiple of four: quarters 0..=1, 2, 3..=4, 5.
    let mut odd = Quarters::default();
    odd.add(&[1, 2, 3, 5], 6, &[1.0, 2.0, 4.0, 8.0]);
    assert_eq!(odd.means(), [Some(1.0), Some(2.0), Some(4.0), Some(8.0)]);
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let shape = Shape::new(3, 37, 41, 3);
    let y = Tensor::from_slice(&Device::cpu(), shape, &to_f32(&numbers(4, shape.len()))).unwrap();
    same_bits_at_any_number_of_threads("loss", || {
        let (per_image, got) = on_cpu(&y, &batch(3), Some(3));
        per_image.into_iter().flat_map(halves).chain(got.gradient.unwrap().data().iter().copied()).collect()
    });
}

/// The CPU sums the same f64 squares, exact since the f32 differences are equal, in another order. Sums of `terms`
/// positive numbers differ by at most twice that many roundings; a few more for division and mean.
fn same_quarters(name: &str, got: &Quarters, want: &Quarters, terms: usize) -> Vec<f32> {
    let numbers = |q: &Quarters| q.means().into_iter().chain([q.mean()]).collect::<Vec<Option<f64>>>();
    for (k, (got, want)) in numbers(got).into_iter().zip(numbers(want)).enumerate() {
        assert_eq!(got.is_some(), want.is_some(), "{name}: quarter {k} has {got:?}, expected {want:?}");
        let (Some(got), Some(want)) = (got, want) else { continue };
        let budget = (terms + 8) as f64 * f64::EPSILON * want;
        assert!((got - want).abs() <= budget, "{name}: quarter {k} has {got}, expected {want} +- {budget:e}");
    }
    numbers(got).into_iter().flatten().flat_map(halves).collect()
}

/// A prediction of the activation type of the device.
fn prediction(device: &Device, shape: Shape, y: &[f64]) -> Tensor {
    Tensor::from_slice_as(device, device.activations(), shape, &to_f32(y)).unwrap()
}

#[test]
fn gpu_has_the_gradient_and_the_sums_of_the_cpu() {
    for shape in SHAPES {
        let batch = batch(shape.n);
        gpu::each(&format!("loss of {shape}"), |device| {
            let dtype = device.activations();
            let y = gpu::rounded(dtype, &numbers(2, shape.len()));
            let on_gpu = prediction(device, shape, &y);
            let (got, quarters) = measure(device, &on_gpu, &batch, Some(shape.n + 3));
            assert!(got.per_image.is_none() && got.mean().is_none(), "what waits for the GPU");
            let dy = got.gradient.expect("a gradient was asked for");
            assert_eq!((dy.shape(), dy.dtype()), (shape, dtype));
            let dy = dy.to_vec().unwrap();
            let oracle = reference::backward(&y, &batch, shape.n + 3);
            close_as(dtype, "dy", &dy, &oracle, &reference::backward(&to_f32(&y), &batch, shape.n + 3));

            let cpu = Device::cpu();
            let on_cpu = Tensor::from_slice(&cpu, shape, &to_f32(&y)).unwrap();
            let (want, of_cpu) = measure(&cpu, &on_cpu, &batch, Some(shape.n + 3));
            same_bits("dy", &dy, &gpu::rounded_f32(dtype, want.gradient.unwrap().data()));
            let name = format!("loss of {shape}");
            let sums = same_quarters(&name, &quarters, &of_cpu, shape.len());

            let (validation, quarters) = measure(device, &on_gpu, &batch, None);
            assert!(validation.gradient.is_none());
            same_bits("without a gradient", &same_quarters(&name, &quarters, &of_cpu, shape.len()), &sums);
            [dy, sums].concat()
        });
    }
}

/// eps has the same bits on both devices, so predicting the CPU's noise has no loss on a GPU.
#[test]
fn gpu_draws_the_noise_of_the_cpu() {
    let shape = Shape::new(3, 41, 37, 3);
    let batch = batch(3);
    let mut y = vec![0.0; shape.len()];
    y.chunks_mut(shape.len() / 3).enumerate().for_each(|(i, y)| batch.noise.image(i).normals(y));
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu);
    let (got, quarters) = measure(&device, &Tensor::from_slice(&device, shape, &y).unwrap(), &batch, Some(3));
    assert_eq!(quarters.mean(), Some(0.0));
    assert!(got.gradient.unwrap().to_vec().unwrap().iter().all(|dy| *dy == 0.0));
}

/// Chains whose length is no multiple of four, some shorter than four.
#[test]
fn gpu_sorts_losses_by_timestep() {
    for timesteps in [1, 2, 3, 6, 250, 1001] {
        // Once more images than the last block has threads.
        let n = if timesteps == 250 { 300 } else { 40 };
        let shape = Shape::new(n, 1, 1, 3);
        let batch = Batch::train(31, 8, 5, vec![0; n], false, timesteps);
        gpu::each(&format!("{timesteps} timesteps"), |device| {
            let y = gpu::rounded(device.activations(), &numbers(2, shape.len()));
            let (_, got) = measure(device, &prediction(device, shape, &y), &batch, None);
            let cpu = Device::cpu();
            let (_, want) = measure(&cpu, &prediction(&cpu, shape, &y), &batch, None);
            same_quarters(&format!("{timesteps} timesteps"), &got, &want, shape.len())
        });
    }
}

/// A row sums the micro-batches of its step and keeps nothing of its previous contents, not even NaN.
#[test]
fn gpu_sums_the_micro_batches_of_a_step() {
    let (shape, y) = (Shape::new(5, 4, 5, 3), numbers(3, 5 * 60));
    let whole = Batch::train(1, 2, 0, vec![0; 5], true, 10);
    gpu::each("pieces", |device| {
        let y = gpu::rounded(device.activations(), &y);
        let mut meter = Meter::new(device).unwrap();
        meter.begin();
        let mut all = Vec::new();
        for bad in [f64::NAN, f64::INFINITY] {
            let bad = prediction(device, shape, &[&[bad], &y[1..]].concat());
            add_to(&mut meter, device, &bad, &whole, Some(5));
            assert!(!meter.read().unwrap()[0].quarters.mean().unwrap().is_finite(), "a bad number went unseen");

            meter.begin();
            let mut dy = Vec::new();
            for (first, n) in [(0, 2), (2, 3)] {
                let batch = Batch::train(1, 2, first as u32, vec![0; n], true, 10);
                let piece = prediction(device, Shape { n, ..shape }, &y[first * 60..(first + n) * 60]);
                dy.extend(add_to(&mut meter, device, &piece, &batch, Some(5)).gradient.unwrap().to_vec().unwrap());
            }
            let pieces = meter.read().unwrap()[0].quarters;
            let (of_whole, quarters) = measure(device, &prediction(device, shape, &y), &whole, Some(5));
            same_bits("dy", &dy, &of_whole.gradient.unwrap().to_vec().unwrap());
            all.extend(same_quarters("pieces", &pieces, &quarters, shape.len()));
            meter.begin();
        }
        all
    });
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "loss::gpu_has_the_gradient_and_the_sums_of_the_cpu";
    // The barriers before the sums of the warps are added, before the last block is known and before its warps' sums
    // are added; the noise of another stream; wrong quarters; losses added to stale ones.
    plant::notices_lost_barrier(test, "loss_fwd_f32", 0);
    plant::notices_lost_barrier(test, "loss_fwd_bf16", 2);
    plant::notices_lost_last_barrier(test, "loss_fwd_f32");
    plant::notices_wrong_parameter(test, "loss_fwd_f32", "9+16", "9+12");
    plant::notices_wrong_parameter(test, "loss_fwd_bf16", 7, 10);
    plant::notices_wrong_parameter("loss::gpu_sums_the_micro_batches_of_a_step", "loss_fwd_f32", 10, 7);
    plant::notices_lost_block(test, "loss_fwd_f32");
}
