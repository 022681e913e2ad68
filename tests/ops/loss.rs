use ddpm_cuda::config::Size;
use ddpm_cuda::data::{Dataset, Extent, Rows};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::learned::{self, SUMS};
use ddpm_cuda::diffusion::objective::{self, Objective};
use ddpm_cuda::diffusion::{Batch, Curve, Kind, Prediction, Schedule, Variance};
use ddpm_cuda::images::{Images, Source};
use ddpm_cuda::meter::{Measured, Meter, Quarters};
use ddpm_cuda::ops::loss::{Bounds, Loss, OfSchedule, Table, Terms, any, loss, of_schedule, reference, terms};
use ddpm_cuda::ops::q_sample;
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::train::{Feed, Resident};

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

/// Six timesteps in quarters of 2, 1, 2 and 1, drawn exactly as often as their probabilities say.
#[test]
fn quarters_of_weighted_losses_have_their_means() {
    let times: [u32; 6] = [1, 9, 2, 2, 4, 6];
    let images: u32 = times.iter().sum();
    let mut quarters = Quarters::default();
    for (t, times) in (0..).zip(times) {
        let weight = f64::from(images) / (6.0 * f64::from(times));
        (0..times).for_each(|_| quarters.add(&[t], 6, &[weight * f64::from(1 << t)]));
    }
    for (got, want) in quarters.means_of_weighted(6).into_iter().zip([1.5, 4.0, 12.0, 32.0]) {
        assert!((got.unwrap() - want).abs() < 1e-12, "{got:?}, expected {want}");
    }
    assert_eq!(Quarters::default().means_of_weighted(6), [None; 4]);
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

/// Every loss with every prediction and variance that it can train.
fn objectives(schedule: &Schedule) -> Vec<Objective> {
    let all = objective::Loss::ALL.into_iter().flat_map(|loss| {
        let with = move |prediction| Variance::ALL.map(|variance| (loss, prediction, variance));
        Prediction::ALL.into_iter().flat_map(with)
    });
    let objectives = all.map(|(loss, prediction, variance)| Objective::new(loss, prediction, variance, schedule));
    objectives.filter(|objective| objective.check().is_ok()).collect()
}

fn name(objective: &Objective) -> String {
    format!("{} of {}, {}", objective.loss(), objective.prediction(), objective.variance())
}

/// Images whose bytes include both ends of the scale.
fn pixels(len: usize) -> Vec<u8> {
    numbers(17, len).into_iter().map(|v| (v * 180.0 + 127.5).clamp(0.0, 255.0).round() as u8).collect()
}

/// A network's output for the images of a batch, off its target by up to four deviations of the posterior, so that no
/// byte of the decoder is so unlikely that its probability is cut off.
fn output(objective: &Objective, images: Images<'_>, batch: &Batch, dtype: DType) -> Vec<f64> {
    output_off_by(4.0, objective, images, batch, dtype)
}

/// The same off by as many deviations. v of a learned variance is up to 1, around the log variance where it is that
/// itself.
fn output_off_by(deviations: f64, objective: &Objective, images: Images<'_>, batch: &Batch, dtype: DType) -> Vec<f64> {
    let (c, image) = (images.shape.c, images.shape.len() / images.shape.n);
    let mut output = Vec::new();
    for (i, t) in batch.t().into_iter().enumerate() {
        let row = objective.row(t).expect("a timestep that is kept");
        let x_0: Vec<f64> = q_sample::reference::x_0(images, batch, i);
        let eps: Vec<f64> = ddpm_cuda::rng::reference::normals(&batch.noise.image(i), 0, image);
        let off = numbers(100 + u64::from(t), image);
        let v = numbers(200 + u64::from(t), image);
        for pixel in 0..image / c {
            let k = pixel * c..(pixel + 1) * c;
            output.extend(
                k.clone().map(|k| row.target.0 * x_0[k] + row.target.1 * eps[k] + deviations * off[k] / row.mean_error),
            );
            match objective.variance() {
                Variance::Learned => output.extend(k.map(|k| row.log_q + 0.3 * v[k])),
                Variance::LearnedRange => output.extend(k.map(|k| v[k])),
                _ => {}
            }
        }
    }
    gpu::rounded(dtype, &to_f32(&output).into_iter().map(f64::from).collect::<Vec<f64>>())
}

/// The loss of each image and each number of the gradient.
type LossAndGradient = (Vec<f64>, Vec<f64>);

/// How far f32 may be from the reference in f64, for the loss of each image and for each number of the gradient.
///
/// The distance d errs by the drawn eps (1e-6, times a factor below 1) and by roundings of the target, whose terms are
/// below 8; v enters with a rounding of the shift and of its product. What these errors do is asked of the reference,
/// at outputs moved by them, d twice as far for the curvature. Terms and derivatives are then computed with some twenty
/// roundings each, of numbers no larger than those counted here.
fn budgets(objective: &Objective, images: Images<'_>, batch: &Batch, output: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let (c, image) = (images.shape.c, images.shape.len() / images.shape.n);
    let doubled = objective.variance().is_learned();
    let moved = |of_d: f64, of_v: f64| -> Vec<f64> {
        let move_one = |(k, y): (usize, &f64)| {
            if !doubled || k % (2 * c) < c {
                return y + of_d * 2.0 * (1e-6 + 16.0 * F32_ROUNDING);
            }
            let t = batch.t()[k / (2 * image)];
            let row = objective.row(t).expect("kept");
            y + of_v * F32_ROUNDING * 2.0 * (row.shift.abs() + 2.0 * (row.scale * y).abs()) / row.scale
        };
        output.iter().enumerate().map(move_one).collect()
    };
    let at = |output: &[f64]| {
        let losses: Vec<f64> = reference::any(objective, images, batch, output);
        (losses, reference::any_backward::<f64>(objective, images, batch, output, n))
    };
    let here = at(output);
    let there = [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)].map(|(d, v)| at(&moved(d, v)));
    let largest = |of: &dyn Fn(&LossAndGradient) -> f64, here: f64| {
        there.iter().map(|there| (of(there) - here).abs()).fold(0.0, f64::max)
    };
    let t = batch.t();
    let roundings = 32.0 * F32_ROUNDING;
    let loss = |i: usize| {
        let row = objective.row(t[i]).expect("kept");
        // Beside the loss itself, the parts of a term: 1 and delta, which is below 1 here; 8 for the decoder's.
        largest(&|there| there.0[i], here.0[i]) * 2.0 + roundings * (here.0[i] + 8.0 * row.bound)
    };
    let len = output.len() / batch.len();
    let gradient = |k: usize| {
        let row = objective.row(t[k / len]).expect("kept");
        let weight = batch.weights.as_ref().map_or(1.0, |w| f64::from(w[k / len]));
        let factor = weight * row.bound / (n * image) as f64;
        // z is up to 4 deviations, half of the slope of the decoder's distribution at most 1 + z^2.
        let parts = factor * 32.0 * if doubled && k % (2 * c) >= c { row.scale } else { row.mean_error.abs() };
        let sum = |there: &LossAndGradient| there.1[k];
        largest(&sum, here.1[k]) + roundings * (here.1[k].abs() + parts)
    };
    ((0..batch.len()).map(loss).collect(), (0..output.len()).map(gradient).collect())
}

/// Asserts that every number is within its own budget.
#[track_caller]
fn within(name: &str, got: &[f64], want: &[f64], budgets: &[f64]) {
    assert_eq!((got.len(), got.len()), (want.len(), budgets.len()), "{name}");
    for (i, ((got, want), budget)) in got.iter().zip(want).zip(budgets).enumerate() {
        let error = (got - want).abs();
        assert!(budget.is_finite() && error <= *budget, "{name}: {i} is {got:e}, expected {want:e} +- {budget:e}");
    }
}

/// A batch of images at the ends and in the middle of a chain of 1000, some mirrored, with weights.
fn spread(set: Shape) -> Batch {
    let t = vec![0, 1, 37, 500, 999, 0, 2];
    let indices = (0..t.len()).map(|i| (3 * i + 1) % set.n).collect();
    let batch = Batch::train(99, 5, 2, indices, true, 1000);
    assert!(batch.flip().contains(&true) && batch.flip().contains(&false));
    batch.at(t).weighted(vec![1.0, 0.5, 2.0, 1.0, 3.0, 0.25, 1.5])
}

/// As wide as the batch has images: factors of an image that were spread over its columns would not be noticed
/// otherwise to have the wrong shape.
const SETS: [Shape; 3] = [Shape::new(3, 5, 7, 2), Shape::new(2, 1, 7, 1), Shape::new(2, 41, 37, 3)];

/// The loss of a network's output by [`any`] on a device, and the meter's row.
fn measure_any(
    device: &Device,
    objective: &Objective,
    images: Images<'_>,
    batch: &Batch,
    y: &[f64],
    step_images: Option<usize>,
) -> (Loss, Measured) {
    let mut meter = Meter::new(device).unwrap();
    meter.begin();
    let loss = on_device(device, objective, images, batch, y, |y, source, t, table| {
        any(device, y, source, batch, t, table, step_images, &mut meter).unwrap()
    });
    (loss, meter.read().unwrap()[0])
}

/// Calls `f` with an output, the images, the timesteps and the table on a device.
fn on_device<R>(
    device: &Device,
    objective: &Objective,
    images: Images<'_>,
    batch: &Batch,
    y: &[f64],
    f: impl FnOnce(&Tensor, Source<'_>, &Tensor, &Table) -> R,
) -> R {
    let Shape { h, w, c, .. } = images.shape;
    let channels = if objective.variance().is_learned() { 2 * c } else { c };
    let y = prediction(device, Shape::new(batch.len(), h, w, channels), y);
    let table = Table::new(device, objective.clone()).unwrap();
    let t = per_image(device, batch.t().into_iter().map(|t| t as f32));
    let resident = match device {
        Device::Cuda(gpu) => Some(Resident::new(gpu, images).unwrap()),
        _ => None,
    };
    let mut feed = Feed::new(device, resident.as_ref());
    let data = Dataset::new(Extent { size: Size { h, w }, channels: c }, images.pixels.to_vec(), None);
    let rows = Rows { rows: batch.indices.iter().map(|&i| i as u32).collect(), classes: None };
    let source = feed.source(&data, 0..batch.len() as u64, |_| rows.clone()).unwrap();
    f(&y, source, &t, &table)
}

#[test]
fn the_gradient_of_every_loss_is_its_derivative() {
    // Betas so large that h = 1e-4 is small for the decoder, too.
    let schedule = Schedule::with_betas(Kind::Linear, 4, 0.2, 0.5).unwrap();
    let shape = Shape::new(2, 2, 3, 2);
    let pixels = pixels(shape.len());
    let images = Images { pixels: &pixels, shape };
    let losses = objectives(&schedule);
    assert_eq!(losses.len(), 4 * (3 * 2 + 4 + 2), "4 predictions; 3 losses of fixed variances, vlb of all, hybrid");
    for objective in losses.iter().filter(|objective| !objective.stops_mean()) {
        for t in [[0, 1], [3, 0]] {
            let batch = Batch::train(7, 1, 0, vec![1, 0], true, 4).at(t.to_vec());
            // Farther off, the difference of two values of the distribution would lose the digits that h divides.
            let y = output_off_by(1.0, objective, images, &batch, DType::F32);
            let step_loss = |x: &[Vec<f64>]| reference::any(objective, images, &batch, &x[0]).iter().sum::<f64>() / 5.0;
            let dy = reference::any_backward(objective, images, &batch, &y, 5);
            assert!(dy.iter().filter(|dy| **dy != 0.0).count() > dy.len() / 2, "{}: no gradient", name(objective));
            finite_differences(&name(objective), step_loss, &[y], &[dy]);
        }
    }
}

/// The gradient of the hybrid loss is that of L_simple for the prediction, and vlb_weight times the bound's for v.
#[test]
fn the_hybrid_loss_stops_the_mean() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let set = SETS[0];
    let pixels = pixels(set.len());
    let (images, batch) = (Images { pixels: &pixels, shape: set }, spread(set));
    for variance in [Variance::Learned, Variance::LearnedRange] {
        let of = |loss| Objective::new(loss, Prediction::V, variance, &schedule).with_weights(0.25, 5.0);
        let y = output(&of(objective::Loss::Hybrid), images, &batch, DType::F32);
        let [hybrid, simple, vlb] = [objective::Loss::Hybrid, objective::Loss::Simple, objective::Loss::Vlb]
            .map(|loss| reference::any_backward::<f64>(&of(loss), images, &batch, &y, 7));
        for k in 0..y.len() {
            let want = if k % (2 * set.c) < set.c { simple[k] } else { 0.25 * vlb[k] };
            assert!((hybrid[k] - want).abs() <= 1e-14 * want.abs(), "{variance} at {k}: {}", hybrid[k]);
        }
        let [hybrid, simple, vlb] = [objective::Loss::Hybrid, objective::Loss::Simple, objective::Loss::Vlb]
            .map(|loss| reference::any::<f64>(&of(loss), images, &batch, &y));
        for i in 0..batch.len() {
            let want = simple[i] + 0.25 * vlb[i];
            assert!((hybrid[i] - want).abs() <= 1e-14 * want, "{variance}, image {i}: {}", hybrid[i]);
        }
    }
}

#[test]
fn cpu_follows_the_reference_for_every_loss() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for set in SETS {
        let pixels = pixels(set.len());
        let (images, batch) = (Images { pixels: &pixels, shape: set }, spread(set));
        for objective in objectives(&schedule) {
            follows(&Device::cpu_guarded(), &objective, images, &batch, DType::F32);
        }
    }
}

/// Compares loss, gradient and the meter's row of a device with the reference. Returns gradient and sums.
fn follows(device: &Device, objective: &Objective, images: Images<'_>, batch: &Batch, dtype: DType) -> Vec<f32> {
    let (name, n) = (format!("{} of {}", name(objective), images.shape), batch.len());
    let y = output(objective, images, batch, dtype);
    let (got, row) = measure_any(device, objective, images, batch, &y, Some(n + 3));
    let want: Vec<f64> = reference::any(objective, images, batch, &y);
    let (of_losses, of_gradient) = budgets(objective, images, batch, &y, n + 3);
    if let Some(per_image) = &got.per_image {
        within(&name, per_image, &want, &of_losses);
    }
    let weight = |i: usize| batch.weights.as_ref().map_or(1.0, |w| f64::from(w[i]));
    let weighted = |of: &[f64]| of.iter().enumerate().map(|(i, l)| weight(i) * l).collect::<Vec<f64>>();
    let (mut quarters, mut budget) = (Quarters::default(), Quarters::default());
    quarters.add(&batch.t(), 1000, &weighted(&want));
    budget.add(&batch.t(), 1000, &weighted(&of_losses));
    let flat = |q: &Quarters| q.means().map(|mean| mean.unwrap_or_default());
    within(&format!("{name}, quarters"), &flat(&row.quarters), &flat(&quarters), &flat(&budget));
    if objective.loss() == objective::Loss::Vlb {
        // The loss is the bound. Sums of seven numbers, and division by how many they are.
        let sum = row.quarters.mean().unwrap() * n as f64;
        assert!((row.vlb_sum - sum).abs() <= 1e-6 * sum, "{name}: {} bits beside a loss of {sum}", row.vlb_sum);
    } else {
        assert_eq!(row.vlb_sum != 0.0, objective.loss().has_bound(), "{name}: {}", row.vlb_sum);
    }
    let dy = got.gradient.expect("a gradient was asked for").to_vec().unwrap();
    let oracle: Vec<f64> = reference::any_backward(objective, images, batch, &y, n + 3);
    let rounding = gpu::rounding(dtype);
    let rounded: Vec<f64> = of_gradient.iter().zip(&oracle).map(|(b, dy)| b + rounding * (dy.abs() + b)).collect();
    within(&format!("{name}, dy"), &dy.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>(), &oracle, &rounded);
    let (validation, again) = measure_any(device, objective, images, batch, &y, None);
    assert!(validation.gradient.is_none());
    assert_eq!(again, row, "{name}, without a gradient");
    let sums = flat(&row.quarters).into_iter().chain([row.vlb_sum]).flat_map(halves);
    dy.iter().copied().chain(sums).collect()
}

#[test]
fn gpu_follows_the_reference_for_every_loss() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let set = SETS[0];
    let pixels = pixels(set.len());
    let (images, batch) = (Images { pixels: &pixels, shape: set }, spread(set));
    gpu::each("every loss", |device| {
        let dtype = device.activations();
        // In bf16 a mean is rounded to 2^-9 of itself, which is much more than four deviations.
        let all = objectives(&schedule).into_iter().filter(|o| dtype == DType::F32 || o.prediction() != Prediction::Mu);
        all.flat_map(|objective| follows(device, &objective, images, &batch, dtype)).collect()
    });
}

/// Images of more than one block, and of pixels that a block does not hold whole.
#[test]
fn gpu_sums_large_images_for_every_loss() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let set = SETS[2];
    let pixels = pixels(set.len());
    let (images, batch) = (Images { pixels: &pixels, shape: set }, spread(set));
    gpu::each("large images", |device| {
        let of = |loss, prediction, variance| Objective::new(loss, prediction, variance, &schedule);
        [
            of(objective::Loss::Vlb, Prediction::Eps, Variance::FixedSmall),
            of(objective::Loss::Hybrid, Prediction::V, Variance::LearnedRange),
        ]
        .iter()
        .flat_map(|objective| follows(device, objective, images, &batch, device.activations()))
        .collect()
    });
}

/// L_simple of eps with weights of 1 is L_simple of eps.
#[test]
fn the_fast_path_is_the_same_loss() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let set = SETS[0];
    let pixels = pixels(set.len());
    let images = Images { pixels: &pixels, shape: set };
    let plain = Objective::new(objective::Loss::Simple, Prediction::Eps, Variance::FixedSmall, &schedule);
    assert!(plain.is_plain());
    let batch = Batch::train(99, 5, 2, vec![1, 0, 2], true, 1000);
    let y = output(&plain, images, &batch, DType::Bf16);
    for device in [Device::cpu()].into_iter().chain(gpu::gpu(DType::F32).map(Device::Cuda)) {
        let (fast, row) = measure_any(&device, &plain, images, &batch, &y, Some(3));
        let weighted = batch.clone().weighted(vec![1.0; 3]);
        let (slow, also) = measure_any(&device, &plain, images, &weighted, &y, Some(3));
        let [fast, slow] = [fast, slow].map(|loss| loss.gradient.unwrap().to_vec().unwrap());
        same_bits("dy", &slow, &fast);
        let (a, b) = (row.quarters.mean().unwrap(), also.quarters.mean().unwrap());
        assert!((a - b).abs() <= 1e-14 * a, "{a} and {b}");
    }
}

/// What the predicted x_0 is confined to in a test.
#[derive(Clone, Copy, Debug)]
enum Confined {
    Free,
    /// To +-r.
    Clipped(f64),
    /// To +-s and divided by s, which is 1.25 for the first image and 0.25 more for each other.
    Divided,
}

impl Confined {
    const ALL: [Confined; 4] = [Confined::Free, Confined::Clipped(1.0), Confined::Clipped(0.75), Confined::Divided];

    fn scale(i: usize) -> f64 {
        1.25 + 0.25 * i as f64
    }

    fn of(self, x_0: f64, i: usize) -> f64 {
        let s = Confined::scale(i);
        match self {
            Confined::Free => x_0,
            Confined::Clipped(r) => x_0.clamp(-r, r),
            Confined::Divided => x_0.clamp(-s, s) / s,
        }
    }
}

/// What evaluation measures, against the reference; also of every prediction that is confined.
fn terms_follow(
    device: &Device,
    objective: &Objective,
    images: Images<'_>,
    batch: &Batch,
    confined: Confined,
) -> Vec<f32> {
    let scales: Vec<f32> = (0..batch.len()).map(|i| Confined::scale(i) as f32).collect();
    let scales = Tensor::from_slice(device, Shape::new(batch.len(), 1, 1, 1), &scales).unwrap();
    let bounds = match confined {
        Confined::Free => Bounds::None,
        Confined::Clipped(r) => Bounds::Range(r),
        Confined::Divided => Bounds::PerImage(&scales),
    };
    let dtype = device.activations();
    let y = output(objective, images, batch, dtype);
    let got = on_device(device, objective, images, batch, &y, |y, source, t, table| {
        terms(device, y, source, batch, t, table, bounds).unwrap()
    });
    let (c, image) = (images.shape.c, images.shape.len() / images.shape.n);
    let len = y.len() / batch.len();
    let doubled = objective.variance().is_learned();
    for (i, t) in batch.t().into_iter().enumerate() {
        let row = objective.row(t).expect("kept");
        let x_0: Vec<f64> = q_sample::reference::x_0(images, batch, i);
        let eps: Vec<f64> = ddpm_cuda::rng::reference::normals(&batch.noise.image(i), 0, image);
        let at = |of_d: f64, of_v: f64| {
            let of_d = of_d * 2.0 * (1e-6 + 16.0 * F32_ROUNDING);
            let of_v = of_v * F32_ROUNDING * 2.0;
            let move_one = |(k, y): (usize, &f64)| match doubled && k % (2 * c) >= c {
                false => y + of_d,
                true => y + of_v * (row.shift.abs() + 2.0 * (row.scale * y).abs()) / row.scale,
            };
            let y: Vec<f64> = y[i * len..][..len].iter().enumerate().map(move_one).collect();
            let all = reference::elements(objective, t, [&x_0, &eps, &y], c, &|x_0| confined.of(x_0, i));
            let mean = |f: &dyn Fn(&reference::Element<f64>) -> f64| all.iter().map(f).sum::<f64>() / image as f64;
            [mean(&|e| e.nats) / std::f64::consts::LN_2, mean(&|e| e.x_0_square)]
        };
        let here = at(0.0, 0.0);
        let there = [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)].map(|(d, v)| at(d, v));
        for (k, (what, got)) in [("vlb", got.vlb[i]), ("mse of x_0", got.mse_x0[i])].into_iter().enumerate() {
            let moved = there.iter().map(|there| (there[k] - here[k]).abs()).fold(0.0, f64::max);
            // The rounding of x_0 itself where it is clipped, and what that is in deviations.
            let clips = !matches!(confined, Confined::Free);
            let clipped = if clips { [row.mean_of_x_0, 1.0][k] * 4.0 * F32_ROUNDING * 8.0 } else { 0.0 };
            let budget = 2.0 * moved + 32.0 * F32_ROUNDING * (here[k] + [12.0, 0.0][k]) + clipped;
            let name = format!("{} of {}, {confined:?}, at {t}", name(objective), images.shape);
            assert!((got - here[k]).abs() <= budget, "{name}: {what} is {got}, expected {} +- {budget:e}", here[k]);
        }
        let want = row.snr * got.mse_x0[i];
        assert!((got.mse_eps[i] - want).abs() <= 1e-12 * want, "{} and {want}", got.mse_eps[i]);
    }
    [got.vlb, got.mse_x0, got.mse_eps].into_iter().flatten().flat_map(halves).collect()
}

/// With a fixed and both learned variances.
fn evaluated(schedule: &Schedule) -> impl Iterator<Item = Objective> {
    let variances = [Variance::FixedLarge, Variance::LearnedRange, Variance::Learned];
    Prediction::ALL.into_iter().flat_map(move |prediction| {
        variances.map(|variance| Objective::new(objective::Loss::Simple, prediction, variance, schedule))
    })
}

#[test]
fn cpu_measures_the_terms_of_the_reference() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for set in SETS {
        let pixels = pixels(set.len());
        let images = Images { pixels: &pixels, shape: set };
        for objective in evaluated(&schedule) {
            for confined in Confined::ALL {
                terms_follow(&Device::cpu_guarded(), &objective, images, &spread(set), confined);
            }
        }
        // A chain of seven of the timesteps.
        let kept = [0, 1, 2, 37, 500, 700, 999];
        for objective in evaluated(&schedule) {
            terms_follow(&Device::cpu_guarded(), &objective.over(&kept), images, &spread(set), Confined::Clipped(1.0));
        }
    }
}

#[test]
fn gpu_measures_the_terms_of_the_reference() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for set in [SETS[0], SETS[2]] {
        let pixels = pixels(set.len());
        let (images, batch) = (Images { pixels: &pixels, shape: set }, &spread(set));
        gpu::each("terms", |device| {
            let f32 = device.activations() == DType::F32;
            let all = evaluated(&schedule).filter(|o| f32 || o.prediction() != Prediction::Mu);
            let all: Vec<Objective> = if set == SETS[2] { all.step_by(4).collect() } else { all.collect() };
            let of = |confined| all.iter().flat_map(move |o| terms_follow(device, o, images, batch, confined));
            Confined::ALL.into_iter().flat_map(of).collect()
        });
    }
}

/// A timestep that the chain leaves out has no bound.
#[test]
fn a_timestep_that_is_left_out_is_not_a_number() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    let objective = Objective::new(objective::Loss::Simple, Prediction::Eps, Variance::FixedSmall, &schedule);
    let shape = Shape::new(1, 2, 2, 1);
    let images = Images { pixels: &[1, 2, 3, 4], shape };
    let batch = Batch::evaluation(1, 0, 0, vec![0], 5, 1000);
    let device = Device::cpu();
    let of = |objective: &Objective| {
        on_device(&device, objective, images, &batch, &[0.0; 4], |y, source, t, table| {
            terms(&device, y, source, &batch, t, table, Bounds::Range(1.0)).unwrap()
        })
    };
    let Terms { vlb, mse_x0, mse_eps } = of(&objective.clone().over(&[3, 7, 999]));
    assert!(vlb[0].is_nan() && mse_x0[0].is_nan() && mse_eps[0].is_nan(), "{vlb:?} {mse_x0:?} {mse_eps:?}");
    let kept = of(&objective.over(&[5, 999]));
    assert!(kept.vlb[0].is_finite() && kept.mse_x0[0].is_finite() && kept.mse_eps[0].is_finite());
}

/// A network whose outputs are smooth functions of x_t: for each element the output and its derivative by x_t, of a
/// learned variance for v as well.
fn smooth(x_t: f64, t: u32, variance: Variance) -> ([f64; 2], [f64; 2]) {
    let (at, tanh) = (0.1 * f64::from(t), (0.6 * x_t + 0.2).tanh());
    let y = (0.8 * tanh + at, 0.48 * (1.0 - tanh * tanh));
    let v = match variance {
        Variance::Learned => (-2.0 + 0.3 * x_t.sin(), 0.3 * x_t.cos()),
        _ => (0.4 * x_t.sin(), 0.4 * x_t.cos()),
    };
    ([y.0, v.0], [y.1, v.1])
}

/// The bound of images under [`smooth`] at given timesteps, L_T among it, and its derivative by the curve's parameters.
fn bound_by_schedule(
    objective: &Objective,
    images: Images<'_>,
    batch: &Batch,
    theta: &[f64],
    steps: usize,
) -> (f64, Vec<f64>) {
    let schedule = learned::schedule(theta, steps);
    let objective = objective.clone().on(&schedule);
    let (c, image) = (images.shape.c, images.shape.len() / images.shape.n);
    let doubled = objective.variance().is_learned();
    let n = batch.len() as f64;
    let (mut loss, mut by_gamma) = (0.0, vec![0.0; steps]);
    for (i, t) in batch.t().into_iter().enumerate() {
        let x_0: Vec<f64> = q_sample::reference::x_0(images, batch, i);
        let eps: Vec<f64> = ddpm_cuda::rng::reference::normals(&batch.noise.image(i), 0, image);
        let x_t = q_sample::reference::forward(&x_0, &eps, t as usize, &schedule);
        let made: Vec<_> = x_t.iter().map(|&x| smooth(x, t, objective.variance())).collect();
        let place = |k: usize| if doubled { k / c * 2 * c + k % c } else { k };
        let mut output = vec![0.0; if doubled { 2 * image } else { image }];
        for (k, (values, _)) in made.iter().enumerate() {
            output[place(k)] = values[0];
            if doubled {
                output[place(k) + c] = values[1];
            }
        }
        let weight = objective.row(t).expect("kept").bound / (n * image as f64);
        let all = reference::elements(&objective, t, [&x_0, &eps, &output], c, &|x_0| x_0);
        loss += weight * all.iter().map(|e| e.nats).sum::<f64>();
        let dx: Vec<f64> = all
            .iter()
            .zip(&made)
            .map(|(e, (_, slopes))| weight * (e.gradient[1] * slopes[0] + e.gradient[2] * slopes[1]))
            .collect();
        let sums = reference::of_schedule(&objective, t, [&x_0, &eps, &output, &dx], c);
        for (place, slope) in (i64::from(t) - 1..).zip(learned::slope(&objective, t, &sums, weight)) {
            match by_gamma.get_mut(place as usize) {
                Some(sum) => *sum += slope,
                None => assert_eq!(slope, 0.0, "there is no timestep {place}"),
            }
        }
    }
    let prior = images.pixels.chunks(image).map(|pixels| objective.prior(pixels)).sum::<f64>() / images.shape.n as f64;
    let square = |&byte: &u8| ((2.0 * f64::from(byte) - 255.0) / 255.0).powi(2);
    let mean_square = images.pixels.iter().map(square).sum::<f64>() / images.pixels.len() as f64;
    by_gamma[steps - 1] += learned::slope_of_prior(&schedule, mean_square);
    (loss + prior, learned::gradient(theta, &by_gamma))
}

/// Every prediction and variance, at every timestep, of a curve with a piece for each step and of one whose pieces hold
/// several or a part of one.
#[test]
fn the_derivative_by_the_schedule_is_the_bounds() {
    let shape = Shape::new(2, 2, 3, 2);
    let pixels = pixels(shape.len());
    let images = Images { pixels: &pixels, shape };
    for steps in [6, 40] {
        let start = Curve::new(steps);
        let mut theta = start.theta();
        // Ends at which no byte is so unlikely that its probability is cut off, and no gamma is alike.
        (theta[0], theta[1]) = (-3.0, 2.0);
        theta[2..].iter_mut().zip(numbers(3, steps)).for_each(|(logit, v)| *logit = v);
        // Of the longer chain all kinds but the first: with its little noise the reference's decoder loses the digits
        // that h divides.
        let t: Vec<u32> = if steps == 6 { (0..6).collect() } else { vec![1, 2, 7, 20, 38, 39] };
        let batch = Batch::train(7, 1, 0, vec![1, 0, 1, 0, 1, 0], true, steps as u32).at(t);
        for (prediction, variance) in Prediction::ALL.into_iter().flat_map(|p| with_bound().map(move |v| (p, v))) {
            let objective = Objective::new(objective::Loss::Vlb, prediction, variance, &start.schedule());
            let (_, gradient) = bound_by_schedule(&objective, images, &batch, &theta, steps);
            assert!(gradient.iter().all(|slope| *slope != 0.0), "{prediction}, {variance}: {gradient:?}");
            let bound = |x: &[Vec<f64>]| bound_by_schedule(&objective, images, &batch, &x[0], steps).0;
            let name = format!("{prediction}, {variance}, {steps} timesteps");
            finite_differences(&name, bound, &[theta.clone()], &[gradient]);
        }
    }
}

/// Compares the sums that a device takes with the reference's.
///
/// The distance and v err as in [`budgets`]. What that makes of each element's parts of the sums is asked of the
/// reference; the sizes are added, with 32 roundings of a derivative, which is below 32 as there, times its factor, and
/// with the error of the drawn eps.
fn sums_follow(device: &Device, objective: &Objective, images: Images<'_>, batch: &Batch) -> Vec<f32> {
    let dtype = device.activations();
    let y = output(objective, images, batch, dtype);
    let (c, image, len) = (images.shape.c, images.shape.len() / images.shape.n, y.len() / batch.len());
    let by_x_t = gpu::rounded(dtype, &numbers(40, batch.len() * image));
    let got = on_device(device, objective, images, batch, &y, |y, source, t, table| {
        let dx = prediction(device, Shape { n: batch.len(), ..images.shape }, &by_x_t);
        match (of_schedule(device, (y, &dx), source, batch, t, table).unwrap(), device) {
            (OfSchedule::Host(sums), _) => sums,
            (OfSchedule::Cuda(buffer), Device::Cuda(gpu)) => {
                let mut parts = vec![0.0f64; buffer.bytes() / 8];
                gpu.download(&mut parts, &buffer).unwrap();
                OfSchedule::of_images(batch.len(), &parts)
            }
            _ => panic!("sums of another device"),
        }
    });
    let doubled = objective.variance().is_learned();
    for (i, t) in batch.t().into_iter().enumerate() {
        let row = objective.row(t).expect("kept");
        let x_0: Vec<f64> = q_sample::reference::x_0(images, batch, i);
        let eps: Vec<f64> = ddpm_cuda::rng::reference::normals(&batch.noise.image(i), 0, image);
        let (y, dx) = (&y[i * len..][..len], &by_x_t[i * image..][..image]);
        let want = reference::of_schedule(objective, t, [&x_0, &eps, y, dx], c);
        let mut budget = [0.0; SUMS];
        for (k, (&image_k, &noise_k)) in x_0.iter().zip(&eps).enumerate() {
            let at = if doubled { k / c * 2 * c + k % c } else { k };
            let v = if doubled { y[at + c] } else { 0.0 };
            let of_v = F32_ROUNDING * 2.0 * (row.shift.abs() + 2.0 * (row.scale * v).abs()) / row.scale;
            let alone = |of_d: f64, v: f64| {
                let y = [y[at] + of_d * 2.0 * (1e-6 + 16.0 * F32_ROUNDING), v];
                let one: [&[f64]; 4] = [&[image_k], &[noise_k], &y[..if doubled { 2 } else { 1 }], &dx[k..=k]];
                reference::of_schedule(objective, t, one, 1)
            };
            let here = alone(0.0, v);
            let there = [(1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0)];
            let there = there.map(|(of_d, sign)| alone(of_d, if doubled { v + sign * of_v } else { v }));
            let d = y[at] - (row.target.0 * image_k + row.target.1 * noise_k);
            let factors = [d, image_k, noise_k, 1.0, v, 0.0, 0.0];
            let drawn = [0.0, 0.0, here[2] / noise_k, 0.0, 0.0, 0.0, dx[k]];
            for (j, budget) in budget.iter_mut().enumerate() {
                let moved = there.iter().map(|there| (there[j] - here[j]).abs()).fold(0.0, f64::max);
                let rounded = 32.0 * F32_ROUNDING * (here[j].abs() + 32.0 * factors[j].abs());
                *budget += 2.0 * moved + rounded + 1e-6 * drawn[j].abs();
            }
        }
        within(&format!("{} of {}, sums at {t}", name(objective), images.shape), &got[i], &want, &budget);
    }
    got.into_iter().flatten().flat_map(halves).collect()
}

/// The variances whose bound is computed.
fn with_bound() -> impl Iterator<Item = Variance> {
    Variance::ALL.into_iter().filter(|variance| *variance != Variance::LearnedRaw)
}

/// The bound of every prediction and variance.
fn bounds(schedule: &Schedule) -> impl Iterator<Item = Objective> {
    let of = move |prediction, variance| Objective::new(objective::Loss::Vlb, prediction, variance, schedule);
    Prediction::ALL.into_iter().flat_map(move |p| with_bound().map(move |variance| of(p, variance)))
}

#[test]
fn cpu_sums_for_the_schedule_what_the_reference_does() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for set in SETS {
        let pixels = pixels(set.len());
        let images = Images { pixels: &pixels, shape: set };
        // Of the large images a few.
        for objective in bounds(&schedule).step_by(if set == SETS[2] { 5 } else { 1 }) {
            sums_follow(&Device::cpu_guarded(), &objective, images, &spread(set));
        }
    }
}

#[test]
fn gpu_sums_for_the_schedule_what_the_reference_does() {
    let schedule = Schedule::new(Kind::Linear, 1000).unwrap();
    for set in [SETS[0], SETS[2]] {
        let pixels = pixels(set.len());
        let (images, batch) = (Images { pixels: &pixels, shape: set }, &spread(set));
        gpu::each("sums for the schedule", |device| {
            let f32 = device.activations() == DType::F32;
            let all = bounds(&schedule).filter(|o| f32 || o.prediction() != Prediction::Mu);
            // Of the large images one, with v.
            let all: Vec<Objective> = if set == SETS[2] { all.skip(11).take(1).collect() } else { all.collect() };
            all.iter().flat_map(|objective| sums_follow(device, objective, images, batch)).collect()
        });
    }
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
    // The other losses: sums of an image; bytes of another image; no mirrored images; weights that are ignored; the
    // widths; a scale of v; and so for the terms, with the range and the bounds of the images.
    let test = "loss::gpu_follows_the_reference_for_every_loss";
    plant::notices_lost_barrier(test, "loss_any_f32", 0);
    plant::notices_lost_last_barrier(test, "loss_any_f32");
    plant::notices_wrong_parameter(test, "loss_any_f32", 19, 20);
    plant::notices_wrong_parameter(test, "loss_any_bf16", 13, 20);
    plant::notices_wrong_parameter(test, "loss_any_f32", 11, 12);
    let test = "loss::gpu_measures_the_terms_of_the_reference";
    plant::notices_lost_barrier(test, "loss_terms_f32", 0);
    plant::notices_wrong_parameter(test, "loss_terms_f32", 14, 13);
    plant::notices_wrong_parameter(test, "loss_terms_bf16", 13, 10);
    plant::notices_wrong_parameter(test, "loss_terms_f32", 15, 14);
    plant::notices_wrong_parameter(test, "loss_terms_bf16", 6, 2);
    plant::notices_lost_block(test, "loss_terms_f32");
    // And for the sums; also x_t's derivatives read from the output.
    let test = "loss::gpu_sums_for_the_schedule_what_the_reference_does";
    plant::notices_lost_barrier(test, "loss_schedule_f32", 0);
    plant::notices_wrong_parameter(test, "loss_schedule_f32", 2, 1);
    plant::notices_wrong_parameter(test, "loss_schedule_bf16", 13, 10);
    plant::notices_lost_block(test, "loss_schedule_f32");
}
