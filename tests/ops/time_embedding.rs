use bytemuck::Zeroable;
use ddpm_cuda::device::Device;
use ddpm_cuda::device::cuda::DeviceTurn;
use ddpm_cuda::kernels::sample_step::Turn;
use ddpm_cuda::ops::time_embedding::{Sinusoid, Times, reference, time_embedding};
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use crate::support::{F32_ROUNDING, gpu, per_image, plant, same_bits, worst};

/// Both ends of a thousand timesteps, and a time between two of them.
const T: [f32; 5] = [0.0, 1.0, 3.5, 500.0, 999.0];

fn embed(device: &Device, t: &[f32], dim: usize, form: Sinusoid) -> Tensor {
    time_embedding(device, &per_image(device, t.iter().copied()), dim, form).unwrap()
}

/// Widths of an embedding: the smallest, odd ones, several blocks, more frequencies than a block has threads.
const DIMS: [usize; 8] = [2, 3, 4, 7, 32, 52, 128, 301];

const OPENAI: Sinusoid = Sinusoid { freq_shift: 0, flip_sin_to_cos: true, scale: 1.0 };

/// OpenAI's with 4000 timesteps of which the network sees a quarter.
const RESCALED: Sinusoid = Sinusoid { scale: 0.25, ..OPENAI };

#[test]
fn is_the_reference_in_f64_rounded_once() {
    for (dim, form) in DIMS.into_iter().flat_map(|d| [(d, Sinusoid::default()), (d, OPENAI), (d, RESCALED)]) {
        let y = embed(&Device::cpu_guarded(), &T, dim, form);
        assert_eq!(y.shape(), Shape::new(T.len(), 1, 1, dim));
        let oracle = reference::forward(&T.map(f64::from), dim, form);
        worst("y", y.data(), &oracle, |y| F32_ROUNDING * y.abs());
    }
}

/// By the formula, `dim` 4 has the frequencies 1 and 1e-4, first the sines, then the cosines.
#[test]
fn first_all_sines_then_all_cosines() {
    let y = embed(&Device::cpu_guarded(), &[999.0], 4, Sinusoid::default());
    let expected = [999f64.sin(), 0.0999f64.sin(), 999f64.cos(), 0.0999f64.cos()];
    // The f64 rounding of the frequency moves the angle by less than 1e-12.
    worst("y", y.data(), &expected, |y| F32_ROUNDING * y.abs() + 1e-12);
}

/// OpenAI's form has the frequencies 1 and 1e-2, first the cosines.
#[test]
fn openai_has_the_cosines_first() {
    let y = embed(&Device::cpu_guarded(), &[999.0], 4, OPENAI);
    let expected = [999f64.cos(), 9.99f64.cos(), 999f64.sin(), 9.99f64.sin()];
    worst("y", y.data(), &expected, |y| F32_ROUNDING * y.abs() + 1e-12);
}

#[test]
fn a_scale_multiplies_the_timestep() {
    let device = Device::cpu_guarded();
    same_bits("y", embed(&device, &[996.0], 6, RESCALED).data(), embed(&device, &[249.0], 6, OPENAI).data());
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    let device = Device::cpu_guarded();
    let together = embed(&device, &T, 6, Sinusoid::default());
    for (i, &t) in T.iter().enumerate() {
        same_bits("row", embed(&device, &[t], 6, Sinusoid::default()).data(), &together.data()[i * 6..][..6]);
    }
}

/// In f64 the angle errs by less than 1e-12 on either side: for t f <= 999, by three roundings of `ln(1e4) k / (m - s)`
/// (where it is 1, f = 1/e: 1.2e-13) and two of the product with 1/pi (2.2e-13). Then one rounding to f32, and one more
/// for bf16.
#[test]
fn gpu_agrees_with_the_reference() {
    for (dim, form) in DIMS.into_iter().flat_map(|d| [(d, Sinusoid::default()), (d, OPENAI), (d, RESCALED)]) {
        gpu::each(&format!("time_embedding of {dim}, {form:?}"), |device| {
            let y = embed(device, &T, dim, form);
            assert_eq!((y.shape(), y.dtype()), (Shape::new(T.len(), 1, 1, dim), device.activations()));
            let y = y.to_vec().unwrap();
            let last = if device.activations() == DType::F32 { 0.0 } else { gpu::BF16_ROUNDING };
            worst("y", &y, &reference::forward(&T.map(f64::from), dim, form), |y| {
                (F32_ROUNDING + last) * y.abs() + 1e-12
            });
            y
        });
    }
}

/// Of a turn every image has the same timestep, that of its turn: two blocks of images, at the first turn and after the
/// next has been set.
#[test]
fn gpu_reads_the_timestep_of_a_turn() {
    gpu::each("the timestep of a turn", |device| {
        let Device::Cuda(gpu) = device else { unreachable!("on a GPU") };
        let mut turn = DeviceTurn::new(gpu).unwrap();
        let mut all = Vec::new();
        for time in [999.0, 3.5] {
            let bound = turn.set(Turn { time, ..Turn::zeroed() }).map(Device::Cuda).unwrap();
            let y = time_embedding(&bound, Times::OfTurn(300), 8, Sinusoid::default()).unwrap().to_vec().unwrap();
            let want = embed(device, &[time; 300], 8, Sinusoid::default()).to_vec().unwrap();
            same_bits(&format!("the embedding of {time}"), &y, &want);
            all.extend(y);
        }
        all
    });
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "time_embedding::gpu_agrees_with_the_reference";
    // 1/pi from its eighth digit on; cosines where sines belong.
    plant::notices(test, "time_embedding_fwd_f32", "0d3FD45F306DC9C883", "0d3FD45F316DC9C883");
    plant::notices_wrong_parameter(test, "time_embedding_fwd_f32", 8, 7);
    plant::notices_wrong_parameter(test, "time_embedding_fwd_bf16", 8, 7);
    plant::notices_lost_block(test, "time_embedding_fwd_f32");
    // Every image's own timestep where there is but one.
    plant::notices_wrong_parameter("time_embedding::gpu_reads_the_timestep_of_a_turn", "time_embedding_fwd_f32", 10, 3);
}
