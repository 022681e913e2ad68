use ddpm_cuda::device::Device;
use ddpm_cuda::ops::time_embedding::{Sinusoid, reference, time_embedding};
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{F32_ROUNDING, same_bits, worst};

/// Both ends of a thousand steps, and a time between two steps.
const T: [f32; 5] = [0.0, 1.0, 3.5, 500.0, 999.0];

fn embed(device: &Device, t: &[f32], dim: usize, form: Sinusoid) -> Tensor {
    let t = Tensor::from_slice(device, Shape::new(t.len(), 1, 1, 1), t).unwrap();
    time_embedding(device, &t, dim, form).unwrap()
}

#[test]
fn is_the_reference_in_f64_rounded_once() {
    let openai = Sinusoid { freq_shift: 0, flip_sin_to_cos: true };
    for (dim, form) in [2, 3, 4, 7, 32, 128].into_iter().flat_map(|d| [(d, Sinusoid::default()), (d, openai)]) {
        let y = embed(&Device::cpu_guarded(), &T, dim, form);
        assert_eq!(y.shape(), Shape::new(T.len(), 1, 1, dim));
        let oracle = reference::forward(&T.map(f64::from), dim, form);
        worst("y", y.data(), &oracle, |y| F32_ROUNDING * y.abs());
    }
}

/// Written out from the formula: `dim` 4 has the frequencies 1 and 1e-4, first the sines, then the cosines.
#[test]
fn first_all_sines_then_all_cosines() {
    let y = embed(&Device::cpu_guarded(), &[999.0], 4, Sinusoid::default());
    let expected = [999f64.sin(), 0.0999f64.sin(), 999f64.cos(), 0.0999f64.cos()];
    // The frequency's own rounding in f64 turns 999 by less than 1e-12.
    worst("y", y.data(), &expected, |y| F32_ROUNDING * y.abs() + 1e-12);
}

/// OpenAI's form of the same: the frequencies 1 and 1e-2, first the cosines.
#[test]
fn openai_has_the_cosines_first() {
    let form = Sinusoid { freq_shift: 0, flip_sin_to_cos: true };
    let y = embed(&Device::cpu_guarded(), &[999.0], 4, form);
    let expected = [999f64.cos(), 9.99f64.cos(), 999f64.sin(), 9.99f64.sin()];
    worst("y", y.data(), &expected, |y| F32_ROUNDING * y.abs() + 1e-12);
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let device = Device::cpu_guarded();
    let together = embed(&device, &T, 6, Sinusoid::default());
    for (i, &t) in T.iter().enumerate() {
        same_bits("row", embed(&device, &[t], 6, Sinusoid::default()).data(), &together.data()[i * 6..][..6]);
    }
}
