use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::ops::loss::{Quarters, loss, reference};
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{
    F32_ROUNDING, close, finite_differences, numbers, same_bits, same_bits_at_any_number_of_threads, to_f32,
};

/// 256 numbers are drawn at a time, 4,096 are one task.
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

#[test]
fn the_gradient_is_the_derivative() {
    let batch = batch(2);
    let y = numbers(1, 2 * 7);
    // The step's loss is the mean over 5 images, of which these are two.
    let step_loss = |x: &[Vec<f64>]| reference::forward(&x[0], &batch).iter().sum::<f64>() / 5.0;
    let dy = reference::backward(&y, &batch, 5);
    finite_differences("loss", step_loss, &[y], &[dy]);
}

/// The allowance for losses in f64 out of differences in f32: the drawn eps errs by at most 1e-6, the difference by a
/// rounding; a mean of squares d^2 then errs by at most 2 sqrt(L) e + e^2 (Cauchy and Schwarz) with e the largest error
/// of a difference.
#[test]
fn cpu_follows_the_reference() {
    let device = Device::cpu_guarded();
    for shape in SHAPES {
        let batch = batch(shape.n);
        let y = numbers(2, shape.len());
        let prediction = Tensor::from_slice(&device, shape, &to_f32(&y)).unwrap();
        let got = loss(&device, &prediction, &batch, Some(shape.n + 3));
        let want = reference::forward(&y, &batch);
        assert_eq!(got.per_image.len(), shape.n);
        for (got, want) in got.per_image.iter().zip(&want) {
            // |y| <= 1 and |eps| <= 6.77.
            let e = 1e-6 + 8.0 * F32_ROUNDING;
            let budget = 2.0 * want.sqrt() * e + e * e;
            assert!((got - want).abs() <= budget, "{shape}: loss {got}, expected {want} +- {budget:e}");
        }
        assert!((got.mean() - got.per_image.iter().sum::<f64>() / shape.n as f64).abs() <= f64::EPSILON * got.mean());
        let oracle = reference::backward(&y, &batch, shape.n + 3);
        let yardstick = reference::backward(&to_f32(&y), &batch, shape.n + 3);
        let dy = got.gradient.expect("a gradient was asked for");
        assert_eq!(dy.shape(), shape);
        println!("{shape}: {:.2} of the budget", close("dy", dy.data(), &oracle, &yardstick));

        let validation = loss(&device, &prediction, &batch, None);
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
    let got = loss(&Device::cpu(), &y, &batch, Some(3));
    assert_eq!(got.per_image, [0.0; 3]);
    assert!(got.gradient.unwrap().data().iter().all(|dy| *dy == 0.0));
    // Predicting nothing costs the noise's variance: 1 +- 5 sqrt(2/n).
    let nothing = loss(&Device::cpu(), &Tensor::zeros(&Device::cpu(), Shape::new(3, 100, 100, 1)).unwrap(), &batch, None);
    assert!((nothing.mean() - 1.0).abs() < 5.0 * (2.0f64 / 3e4).sqrt(), "{}", nothing.mean());
}

#[test]
fn one_bad_number_shows_in_the_loss() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut y = Tensor::zeros(&Device::cpu(), Shape::new(2, 1, 1, 5000)).unwrap();
        y.data_mut()[9_999] = bad;
        let got = loss(&Device::cpu(), &y, &batch(2), Some(2));
        assert!(!got.mean().is_finite() && got.per_image[0].is_finite() && !got.per_image[1].is_finite());
    }
}

#[test]
fn a_step_in_pieces_has_the_same_gradient() {
    let (shape, y) = (Shape::new(5, 4, 4, 3), to_f32(&numbers(3, 5 * 48)));
    let whole = Tensor::from_slice(&Device::cpu(), shape, &y).unwrap();
    let whole = loss(&Device::cpu(), &whole, &Batch::train(1, 2, 0, vec![0; 5], true, 10), Some(5));
    let (mut dy, mut per_image) = (Vec::new(), Vec::new());
    for (first, n) in [(0, 2), (2, 3)] {
        let piece = Tensor::from_slice(&Device::cpu(), Shape { n, ..shape }, &y[first * 48..(first + n) * 48]).unwrap();
        let piece = loss(&Device::cpu(), &piece, &Batch::train(1, 2, first as u32, vec![0; n], true, 10), Some(5));
        dy.extend_from_slice(piece.gradient.unwrap().data());
        per_image.extend(piece.per_image);
    }
    same_bits("dy", &dy, whole.gradient.unwrap().data());
    assert_eq!(per_image, whole.per_image);
}

#[test]
fn quarters_sort_losses_by_timestep() {
    let mut quarters = Quarters::default();
    assert_eq!((quarters.means(), quarters.mean()), ([None; 4], None));
    let mut batch = batch(4);
    batch.t = vec![0, 249, 250, 999];
    quarters.add(&batch, &[1.0, 2.0, 4.0, 8.0], 1000);
    assert_eq!(quarters.means(), [Some(1.5), Some(4.0), None, Some(8.0)]);
    assert_eq!(quarters.mean(), Some(3.75));
    // A chain whose length four does not divide: quarters of 0..=1, 2, 3..=4, 5.
    let mut odd = Quarters::default();
    batch.t = vec![1, 2, 3, 5];
    odd.add(&batch, &[1.0, 2.0, 4.0, 8.0], 6);
    assert_eq!(odd.means(), [Some(1.0), Some(2.0), Some(4.0), Some(8.0)]);
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let shape = Shape::new(3, 37, 41, 3);
    let y = Tensor::from_slice(&Device::cpu(), shape, &to_f32(&numbers(4, shape.len()))).unwrap();
    same_bits_at_any_number_of_threads("loss", || {
        let got = loss(&Device::cpu(), &y, &batch(3), Some(3));
        let halves = got.per_image.iter().flat_map(|l| [l.to_bits() as u32, (l.to_bits() >> 32) as u32]);
        halves.map(f32::from_bits).chain(got.gradient.unwrap().data().iter().copied()).collect()
    });
}
