use ddpm_cuda::device::Device;
use ddpm_cuda::ops::adam::{Buffers, Update, adam, ema_decay, reference};

use crate::support::{close, numbers, same_bits, same_bits_at_any_number_of_threads, to_f32};

/// 16,384 is one task of the parallel pass.
const LENGTHS: [usize; 6] = [1, 17, 31, 1009, 16_385, 50_021];

fn update(step: u64) -> Update {
    Update {
        step,
        learning_rate: 2e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        clip: 0.37,
        ema_decay: ema_decay(0.9999, step),
    }
}

/// `[w, ema, m, v]` after `steps` updates from `w`, by `one(state, g, k)`.
fn run<T: Clone>(w: &[T], zero: T, steps: u64, mut one: impl FnMut(&mut [Vec<T>; 4], u64)) -> [Vec<T>; 4] {
    let mut state = [w.to_vec(), w.to_vec(), vec![zero.clone(); w.len()], vec![zero; w.len()]];
    (1..=steps).for_each(|k| one(&mut state, k));
    state
}

fn gradient(k: u64, len: usize) -> Vec<f64> {
    // From 1e-8, where eps matters, to 1.
    let scale = |i: usize| [1.0f32, 1e-3, 1e-8][i % 3];
    numbers(100 + k, len).into_iter().enumerate().map(|(i, g)| f64::from(g as f32 * scale(i))).collect()
}

fn on_cpu(w: &[f32], steps: u64) -> [Vec<f32>; 4] {
    run(w, 0.0f32, steps, |[w, ema, m, v], k| {
        let g = to_f32(&gradient(k, w.len()));
        adam(&Device::cpu(), Buffers { w, ema, m, v, g: &g }, &update(k));
    })
}

fn by_reference<T: num_traits::Float>(w: &[f64], steps: u64) -> [Vec<T>; 4] {
    let cast = |x: &[f64]| x.iter().map(|&x| T::from(x).unwrap()).collect::<Vec<T>>();
    run(&cast(w), T::zero(), steps, |[w, ema, m, v], k| {
        let g = cast(&gradient(k, w.len()));
        reference::update([w, ema, m, v], &g, &update(k));
    })
}

#[test]
fn cpu_follows_the_reference() {
    for len in LENGTHS {
        for steps in [1, 7] {
            let w = numbers(1, len);
            let got = on_cpu(&to_f32(&w), steps);
            let (oracle, yardstick) = (by_reference::<f64>(&w, steps), by_reference::<f32>(&w, steps));
            for (k, name) in ["w", "ema", "m", "v"].into_iter().enumerate() {
                let share = close(name, &got[k], &oracle[k], &yardstick[k]);
                println!("{name}, {len} numbers, {steps} steps: {share:.2} of the budget");
            }
        }
    }
}

/// Three steps of PyTorch's Adam and AdamW in f64 worked by their documented formulas: bias-corrected moments first,
/// eps added to the corrected root. An independent form of the same numbers.
#[test]
fn the_reference_is_adam_as_pytorch_documents_it() {
    for weight_decay in [0.0, 0.1] {
        let (lr, beta1, beta2, eps) = (1e-3, 0.9f64, 0.99f64, 1e-8);
        let (mut w, mut m, mut v) = (0.5f64, 0.0, 0.0);
        let mut state = [[0.5f64], [0.5], [0.0], [0.0]];
        for (k, g) in [0.3, -2e-8, 1.5].into_iter().enumerate() {
            let k = k as i32 + 1;
            w *= 1.0 - lr * weight_decay;
            m = beta1 * m + (1.0 - beta1) * g;
            v = beta2 * v + (1.0 - beta2) * g * g;
            let (m_hat, v_hat) = (m / (1.0 - beta1.powi(k)), v / (1.0 - beta2.powi(k)));
            w -= lr * m_hat / (v_hat.sqrt() + eps);
            let [w_, ema, m_, v_] = &mut state;
            let update = Update {
                step: k as u64,
                learning_rate: lr,
                beta1,
                beta2,
                eps,
                weight_decay,
                clip: 1.0,
                ema_decay: 0.0,
            };
            reference::update([w_, ema, m_, v_], &[g], &update);
            assert!((state[0][0] - w).abs() <= 8.0 * f64::EPSILON, "step {k}: w is {}, expected {w}", state[0][0]);
            assert_eq!(state[1], state[0], "with decay 0 the average is the weight");
        }
    }
}

/// The first step of Adam moves every weight by the learning rate against the sign of its gradient, whatever its size.
#[test]
fn the_first_step_is_the_learning_rate() {
    let (mut w, mut ema, mut m, mut v) = ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]);
    let first = Update { weight_decay: 0.0, learning_rate: 0.25, clip: 1.0, ema_decay: 0.75, ..update(1) };
    let buffers = Buffers { w: &mut w, ema: &mut ema, m: &mut m, v: &mut v, g: &[3.0, -0.01] };
    adam(&Device::cpu(), buffers, &first);
    // eps / |g| is 1e-6 for the second; a few roundings for the first.
    assert!((w[0] - 0.75).abs() <= 1e-7 && (w[1] - 1.25).abs() <= 1e-6, "{w:?}");
    // A quarter of the way from 0.
    assert!((ema[0] - w[0] / 4.0).abs() <= 1e-7 && (ema[1] - w[1] / 4.0).abs() <= 1e-7, "{ema:?}");
}

#[test]
fn gaps_stay_zero() {
    let zero = on_cpu_with_zero_gradient(&[0.0; 40]);
    assert!(zero.iter().flatten().all(|x| x.to_bits() == 0), "{zero:?}");
}

fn on_cpu_with_zero_gradient(w: &[f32]) -> [Vec<f32>; 4] {
    run(w, 0.0f32, 3, |[w, ema, m, v], k| {
        let g = vec![0.0; w.len()];
        adam(&Device::cpu(), Buffers { w, ema, m, v, g: &g }, &update(k));
    })
}

#[test]
fn the_moving_average_warms_up() {
    assert_eq!(ema_decay(0.9999, 1), 2.0 / 11.0);
    assert_eq!(ema_decay(0.9999, 990), 991.0 / 1000.0);
    assert!(ema_decay(0.9999, 89_900) < 0.9999);
    assert_eq!(ema_decay(0.9999, 90_000), 0.9999);
    assert_eq!(ema_decay(0.0, 5), 0.0);
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let w = to_f32(&numbers(1, 50_021));
    same_bits_at_any_number_of_threads("adam", || on_cpu(&w, 2).concat());
}

/// Past the point where beta^k underflows nothing special happens.
#[test]
fn late_steps_need_no_correction() {
    let w = numbers(1, 10);
    let late = |step| {
        run(&to_f32(&w), 0.0f32, 1, |[w, ema, m, v], _| {
            let g = to_f32(&gradient(1, w.len()));
            adam(&Device::cpu(), Buffers { w, ema, m, v, g: &g }, &Update { ema_decay: 0.5, ..update(step) });
        })
    };
    for (one, other) in late(10_000_000).iter().zip(late(u64::MAX)) {
        same_bits("late", one, &other);
    }
}
