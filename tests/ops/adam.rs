use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::ops::adam::{State, Update, adam, ema_decay, reference, round};
use ddpm_cuda::ops::grad_norm::{self, grad_norm};
use ddpm_cuda::ops::loss::loss;
use ddpm_cuda::params::{Init, Layout, Params, Specs};
use ddpm_cuda::tensor::{DType, Shape, Tensor};

use crate::support::{close, gpu, numbers, per_image, plant, same_bits, same_bits_at_any_number_of_threads, to_f32};

/// 16,384 is one task of the CPU path, 1,024 a block of the kernel.
const LENGTHS: [usize; 7] = [1, 17, 31, 1009, 1025, 16_385, 50_021];

fn update(step: u64) -> Update {
    Update {
        step,
        learning_rate: 2e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.01,
        ema_decay: ema_decay(0.9999, step),
    }
}

/// A run's state on a device: one parameter of `len` numbers, followed by padding.
struct Run {
    device: Device,
    len: usize,
    w: Params,
    ema: Tensor,
    m: Tensor,
    v: Tensor,
    meter: Meter,
}

impl Run {
    fn new(device: &Device, w: &[f32], ema: &[f32]) -> Self {
        let mut specs = Specs::default();
        specs.add("w".into(), Shape::vector(w.len()), Layout::Vector, Init::Zeros);
        let flat = Shape::vector(specs.flat_len());
        Run {
            device: device.clone(),
            len: w.len(),
            w: Params::from_host(device, specs, &padded(w, flat.c)).unwrap(),
            ema: Tensor::from_slice(device, flat, &padded(ema, flat.c)).unwrap(),
            m: Tensor::zeros(device, flat).unwrap(),
            v: Tensor::zeros(device, flat).unwrap(),
            meter: Meter::of_micro_batches(device, 2).unwrap(),
        }
    }

    /// One update with gradient `g` clipped to the norm `max_norm`; returns the factor.
    fn update(&mut self, g: &[f32], max_norm: f64, update: &Update) -> f64 {
        self.meter.begin();
        self.in_row(g, max_norm, update);
        self.meter.read().unwrap()[0].clip
    }

    /// The same in the meter's current row, without reading it.
    fn in_row(&mut self, g: &[f32], max_norm: f64, update: &Update) {
        let flat = self.m.shape();
        let g = Tensor::from_slice(&self.device, flat, &padded(g, flat.c)).unwrap();
        grad_norm(&self.device, &g, max_norm, &mut self.meter).unwrap();
        self.apply(&g, update);
    }

    /// One update with gradient `g` clipped by the factor in the meter's current row.
    fn apply(&mut self, g: &Tensor, update: &Update) {
        let shard = 0..g.shape().len();
        let state = State { w: &mut self.w, shard, ema: &mut self.ema, m: &mut self.m, v: &mut self.v, g };
        adam(&self.device, state, update, &mut self.meter).unwrap();
    }

    /// `[w, ema, m, v]`; checks that the padding of each is zero.
    fn numbers(&self) -> [Vec<f32>; 4] {
        let host = [self.w.host(), self.ema.host(), self.m.host(), self.v.host()];
        host.map(|x| {
            let mut x = x.unwrap().into_owned();
            let gap = x.split_off(self.len);
            assert!(gap.iter().all(|x| x.to_bits() == 0), "the gap between parameters is {gap:?}");
            x
        })
    }

    /// Checks that the bf16 copy of w is w rounded.
    fn check_copy(&self) {
        assert_eq!(self.w.rounded().is_some(), self.device.activations() == DType::Bf16, "a copy of w");
        if let Some(copy) = self.w.rounded() {
            let want = gpu::rounded_f32(DType::Bf16, &self.w.host().unwrap());
            same_bits("the rounded copy of w", &copy.to_vec().unwrap(), &want);
        }
    }
}

fn padded(x: &[f32], len: usize) -> Vec<f32> {
    let mut x = x.to_vec();
    x.resize(len, 0.0);
    x
}

fn gradient(k: u64, len: usize) -> Vec<f64> {
    // From 1e-8, where eps matters, to 1.
    let scale = |i: usize| [1.0f32, 1e-3, 1e-8][i % 3];
    numbers(100 + k, len).into_iter().enumerate().map(|(i, g)| f64::from(g as f32 * scale(i))).collect()
}

/// A norm that clips the gradient by about 0.37.
fn max_norm(g: &[f64]) -> f64 {
    0.37 * grad_norm::reference::forward(g)
}

/// `[w, ema, m, v]` after `steps` updates from `w`, and the clipping factors.
fn on(device: &Device, w: &[f32], steps: u64) -> ([Vec<f32>; 4], Vec<f64>) {
    let mut run = Run::new(device, w, w);
    let one = |k| {
        let g = gradient(k, w.len());
        run.update(&to_f32(&g), max_norm(&g), &update(k))
    };
    let clips = (1..=steps).map(one).collect();
    run.check_copy();
    (run.numbers(), clips)
}

fn by_reference<T: num_traits::Float>(w: &[f64], clips: &[f64]) -> [Vec<T>; 4] {
    let cast = |x: &[f64]| x.iter().map(|&x| T::from(x).unwrap()).collect::<Vec<T>>();
    let zeros = vec![T::zero(); w.len()];
    let [mut w, mut ema, mut m, mut v] = [cast(w), cast(w), zeros.clone(), zeros];
    for (&clip, k) in clips.iter().zip(1..) {
        let g = cast(&gradient(k, w.len()));
        reference::update([&mut w, &mut ema, &mut m, &mut v], &g, &update(k), clip);
    }
    [w, ema, m, v]
}

#[test]
fn cpu_follows_the_reference() {
    for len in LENGTHS {
        for steps in [1, 7] {
            let w = numbers(1, len);
            let (got, clips) = on(&Device::cpu_guarded(), &to_f32(&w), steps);
            assert!(clips.iter().all(|clip| (clip - 0.37).abs() < 1e-3), "{clips:?}");
            let (oracle, yardstick) = (by_reference::<f64>(&w, &clips), by_reference::<f32>(&w, &clips));
            for (k, name) in ["w", "ema", "m", "v"].into_iter().enumerate() {
                let share = close(name, &got[k], &oracle[k], &yardstick[k]);
                println!("{name}, {len} numbers, {steps} steps: {share:.2} of the budget");
            }
        }
    }
}

/// Three steps of PyTorch's Adam and AdamW in f64 by their documented formulas, which correct the moments first and add
/// eps to the corrected root: an independent form of the same update.
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
            let update = Update { step: k as u64, learning_rate: lr, beta1, beta2, eps, weight_decay, ema_decay: 0.0 };
            reference::update([w_, ema, m_, v_], &[g], &update, 1.0);
            assert!((state[0][0] - w).abs() <= 8.0 * f64::EPSILON, "step {k}: w is {}, expected {w}", state[0][0]);
            assert_eq!(state[1], state[0], "with decay 0 the average is the weight");
        }
    }
}

/// The first step of Adam moves every weight by the learning rate against the sign of its gradient, whatever the size
/// of the gradient.
#[test]
fn the_first_step_is_the_learning_rate() {
    let mut run = Run::new(&Device::cpu_guarded(), &[1.0, 1.0], &[0.0, 0.0]);
    let first = Update { weight_decay: 0.0, learning_rate: 0.25, ema_decay: 0.75, ..update(1) };
    run.update(&[3.0, -0.01], 0.0, &first);
    let [w, ema, ..] = run.numbers();
    // eps / |g| is 1e-6 for the second; a few roundings for the first.
    assert!((w[0] - 0.75).abs() <= 1e-7 && (w[1] - 1.25).abs() <= 1e-6, "{w:?}");
    // A quarter of the way from 0.
    assert!((ema[0] - w[0] / 4.0).abs() <= 1e-7 && (ema[1] - w[1] / 4.0).abs() <= 1e-7, "{ema:?}");
}

#[test]
fn zeros_stay_zero() {
    let mut run = Run::new(&Device::cpu_guarded(), &[0.0; 40], &[0.0; 40]);
    (1..=3).for_each(|k| _ = run.update(&[0.0; 40], 1.0, &update(k)));
    let zero = run.numbers();
    assert!(zero.iter().flatten().all(|x| x.to_bits() == 0), "{zero:?}");
}

#[test]
fn the_moving_average_warms_up() {
    assert_eq!(ema_decay(0.9999, 1), 2.0 / 11.0);
    assert_eq!(ema_decay(0.9999, 990), 991.0 / 1000.0);
    assert!(ema_decay(0.9999, 89_900) < 0.9999);
    assert_eq!(ema_decay(0.9999, 90_000), 0.9999);
    assert_eq!(ema_decay(0.0, 5), 0.0);
}

/// `[w, ema, m, v]` after an update of one shard after the other, which ends between blocks and tasks.
fn by_shards(device: &Device, w: &[f32]) -> Vec<f32> {
    let mut run = Run::new(device, w, w);
    let g = to_f32(&gradient(1, w.len()));
    let whole: Vec<Vec<f32>> = [&run.ema, &run.m, &run.v].map(|x| x.to_vec().unwrap()).into();
    let g = padded(&g, run.m.shape().c);
    run.meter.begin();
    grad_norm(device, &Tensor::from_slice(device, run.m.shape(), &g).unwrap(), 0.5, &mut run.meter).unwrap();
    let mut after = vec![Vec::new(); 3];
    for shard in [0..20, 20..16_400, 16_400..g.len()] {
        let part = |x: &[f32]| Tensor::from_slice(device, Shape::vector(shard.len()), &x[shard.clone()]).unwrap();
        let ([mut ema, mut m, mut v], g) = ([0, 1, 2].map(|k| part(&whole[k])), part(&g));
        let state = State { w: &mut run.w, shard: shard.clone(), ema: &mut ema, m: &mut m, v: &mut v, g: &g };
        adam(device, state, &update(1), &mut run.meter).unwrap();
        after.iter_mut().zip([ema, m, v]).for_each(|(after, x)| after.extend(x.to_vec().unwrap()));
    }
    round(device, &mut run.w).unwrap();
    run.check_copy();
    [run.w.host().unwrap().into_owned(), after.concat()].concat()
}

/// The same of all at once.
fn at_once(device: &Device, w: &[f32]) -> Vec<f32> {
    let mut run = Run::new(device, w, w);
    run.update(&to_f32(&gradient(1, w.len())), 0.5, &update(1));
    run.check_copy();
    [run.w.host(), run.ema.host(), run.m.host(), run.v.host()].map(|x| x.unwrap().into_owned()).concat()
}

#[test]
fn shards_have_the_bits_of_the_whole() {
    let w = to_f32(&numbers(1, 50_021));
    same_bits("shards", &by_shards(&Device::cpu_guarded(), &w), &at_once(&Device::cpu_guarded(), &w));
}

#[test]
fn gpu_shards_have_the_bits_of_the_whole() {
    let w = to_f32(&numbers(1, 50_021));
    gpu::each("shards", |device| {
        let got = by_shards(device, &w);
        same_bits("shards", &got, &at_once(device, &w));
        got
    });
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let w = to_f32(&numbers(1, 50_021));
    same_bits_at_any_number_of_threads("adam", || on(&Device::cpu_guarded(), &w, 2).0.concat());
}

/// Nothing special happens once beta^k underflows.
#[test]
fn late_steps_need_no_correction() {
    let w = to_f32(&numbers(1, 10));
    let late = |step| {
        let mut run = Run::new(&Device::cpu_guarded(), &w, &w);
        run.update(&to_f32(&gradient(1, w.len())), 0.0, &Update { ema_decay: 0.5, ..update(step) });
        run.numbers()
    };
    for (one, other) in late(10_000_000).iter().zip(late(u64::MAX)) {
        same_bits("late", one, &other);
    }
}

/// `[w, ema, m, v]` on the CPU after updates with these clipping factors.
fn on_cpu_clipped(w: &[f32], clips: &[f64]) -> [Vec<f32>; 4] {
    let device = Device::cpu();
    let mut run = Run::new(&device, w, w);
    for (&clip, k) in clips.iter().zip(1..) {
        let flat = run.m.shape();
        let g = Tensor::from_slice(&device, flat, &padded(&to_f32(&gradient(k, w.len())), flat.c)).unwrap();
        run.meter.begin();
        run.meter.host_row().clip = clip;
        run.apply(&g, &update(k));
    }
    run.numbers()
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for len in LENGTHS {
        for steps in [1, 7] {
            let w = numbers(1, len);
            gpu::each(&format!("{len} numbers, {steps} steps"), |device| {
                let (got, clips) = on(device, &to_f32(&w), steps);
                assert!(clips.iter().all(|clip| (clip - 0.37).abs() < 1e-3), "{clips:?}");
                let (oracle, yardstick) = (by_reference::<f64>(&w, &clips), by_reference::<f32>(&w, &clips));
                let want = on_cpu_clipped(&to_f32(&w), &clips);
                for (k, name) in ["w", "ema", "m", "v"].into_iter().enumerate() {
                    close(name, &got[k], &oracle[k], &yardstick[k]);
                    if gpu::cpu_fuses() {
                        same_bits(name, &got[k], &want[k]);
                    }
                }
                got.concat()
            });
        }
    }
}

/// A gradient or loss that is not finite stops the update of its step and of all steps launched after it, until the
/// host reads the meter. The weights are then those of the last good step.
#[test]
fn gpu_halts_at_what_is_not_finite_until_it_is_read() {
    let len = 1500;
    let w = to_f32(&numbers(1, len));
    let good = |k| to_f32(&gradient(k, len));
    for (cause, bad) in ["gradient", "loss"].into_iter().flat_map(|c| [(c, f32::NAN), (c, f32::NEG_INFINITY)]) {
        gpu::each(&format!("a {cause} of {bad}"), |device| {
            let mut run = Run::new(device, &w, &w);
            run.meter.begin();
            run.in_row(&good(1), 1.0, &update(1));
            let before = run.numbers();
            assert_ne!(before[0], w, "the first update is applied");

            run.meter.begin();
            let mut g = good(2);
            let shape = Shape::new(1, 1, 1, 5);
            let prediction = match cause {
                "loss" => [0.0, bad, 0.0, 0.0, 0.0],
                _ => {
                    g[len - 1] = bad;
                    [0.0; 5]
                }
            };
            let prediction = Tensor::from_slice_as(device, device.activations(), shape, &prediction).unwrap();
            let batch = Batch::train(0, 0, 0, vec![0], false, 10);
            let t = per_image(device, [batch.t()[0] as f32]);
            run.meter.micro_batch(1);
            loss(device, &prediction, &batch, &t, Some(1), &mut run.meter).unwrap();
            run.in_row(&g, 1.0, &update(2));
            for k in [3, 4] {
                run.meter.begin();
                run.in_row(&good(k), 1.0, &update(k));
            }
            run.check_copy();
            let halted = run.numbers();
            before.iter().zip(&halted).for_each(|(before, now)| same_bits("halted", now, before));

            let rows = run.meter.read().unwrap();
            let loss = rows[1].quarters.mean().unwrap();
            assert_eq!(
                (rows.len(), loss.is_finite(), rows[1].grad_norm.is_finite()),
                (4, cause != "loss", cause != "gradient")
            );
            assert!([0, 2, 3].iter().all(|&k: &usize| rows[k].grad_norm.is_finite()), "{rows:?}");

            // From here on, as if nothing had happened.
            let clips = [rows[0].clip, run.update(&good(2), 1.0, &update(2))];
            run.check_copy();
            let after = run.numbers();
            if gpu::cpu_fuses() {
                after.iter().zip(on_cpu_clipped(&w, &clips)).for_each(|(now, want)| same_bits("resumed", now, &want));
            }
            assert_ne!(after[0], before[0], "the update after the halt is applied");
            after.concat()
        });
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "adam::gpu_has_the_bits_of_the_cpu";
    plant::notices(test, "adam_update", "fma.rn.f32", "fma.rz.f32");
    plant::notices(test, "adam_update", "sqrt.rn.f32", "sqrt.rz.f32");
    // The second moments are the first ones.
    plant::notices_wrong_parameter(test, "adam_update", 3, 2);
    plant::notices_lost_block(test, "adam_update");
    plant::notices_lost_block("adam::gpu_shards_have_the_bits_of_the_whole", "adam_round");
    let test = "adam::gpu_halts_at_what_is_not_finite_until_it_is_read";
    plant::notices_wrong_parameter(test, "grad_norm_fwd", 1, 3);
}
