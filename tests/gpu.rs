//! The whole program on a GPU (emulated unless DDPM_TEST_DEVICE says otherwise): it computes what the CPU computes, is
//! reproducible to the bit, replays its steps as CUDA graphs, allocates nothing once warm, stops at a non-finite loss,
//! and its checkpoints work on either device.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use ddpm_cuda::checkpoint;
use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::config::{Config, Size};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::cuda::{self, Gpu, Repeated};
use ddpm_cuda::device::{Device, Precision};
use ddpm_cuda::diffusion::sampler::Guidance;
use ddpm_cuda::diffusion::{Method, Sampler, Spacing, Variance};
use ddpm_cuda::output::to_bytes;
use ddpm_cuda::params::Params;
use ddpm_cuda::sample::{Drawing, Request};
use ddpm_cuda::tape::{Recompute, Tape};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::train::{StepReport, Trainer};
use npyz::WriterBuilder;

use support::gpu::{self, configure};
use support::{F32_ROUNDING, PLAIN, TINY, numbers, places, same_bits};

/// [`support::tiny`] with several heads and classes, and images that are not square.
fn tiny() -> Config {
    let mut c = support::tiny(6, 10, 3);
    c.model.head_dim = 8;
    c.model.classes = 3;
    c
}

/// A pattern of many grey levels, and a class for each image.
fn data(c: &Config, count: usize, held_out: usize) -> Data {
    let Size { h, w } = c.model.image_size;
    let set = |count: usize, factor: usize| {
        let images = (0..count * h * w * 3).map(|i| (i * factor % 251) as u8).collect();
        let labels = (0..count).map(|i| (i % 3) as u32).collect();
        Dataset::new(Extent { size: c.model.image_size, channels: 3 }, images, Some(labels))
    };
    Data {
        train: set(count, 97),
        held_out: set(held_out, 89),
        classes: Vec::new(),
        notes: Vec::new(),
        skipped: Vec::new(),
    }
}

/// A trainer on a GPU with an unguarded pool, which keeps its buffers; `None` if kernels cannot be tested.
fn on_gpu(c: &Config, precision: impl Into<Precision>) -> Option<Trainer> {
    let device = gpu::available().then(|| Device::Cuda(Gpu::open(0, precision, false).unwrap()))?;
    Some(Trainer::new(c, data(c, 20, 5), &device).unwrap())
}

fn on_cpu(c: &Config) -> Trainer {
    Trainer::new(c, data(c, 20, 5), &Device::cpu()).unwrap()
}

fn steps(trainer: &mut Trainer, count: u32) -> Vec<StepReport> {
    for _ in 0..count {
        trainer.step().unwrap();
    }
    trainer.reports().unwrap()
}

fn weights(trainer: &Trainer) -> Vec<f32> {
    trainer.params().host().unwrap().into_owned()
}

/// Allowed relative difference of a step's loss from the CPU's. Both draw the same images, timesteps, noise and masks
/// but round differently. A step's loss differs by a few roundings of its own and by the difference of the weights, to
/// which every step adds a rounding of the update: about k roundings after k steps. Twice that is allowed.
fn curve_budget(step: u32) -> f64 {
    2.0 * f64::from(step) * F32_ROUNDING
}

/// The flat parameters, with every weight perturbed at random by as much as its sums err in f32: a running sum of n
/// products errs as if every term were off by sqrt(n / 2) roundings (`support/winograd.rs`). The change of a result
/// under this is what it may differ by between two devices, whatever lies between the weights and the result.
fn perturbed(params: &Params, seed: u64) -> Vec<f32> {
    let mut flat = params.host().unwrap().into_owned();
    for (k, (p, spec)) in params.specs().iter().enumerate() {
        let terms = (spec.shape.len() / spec.shape.n) as f64;
        let off = numbers(1000 * seed + k as u64, spec.shape.len());
        for (w, off) in flat[params.specs().range(p)].iter_mut().zip(off) {
            *w = (f64::from(*w) * (1.0 + off * (terms / 2.0).sqrt().max(1.0) * F32_ROUNDING)) as f32;
        }
    }
    flat
}

#[test]
fn the_loss_curve_follows_the_cpus() {
    let c = tiny();
    let Some(mut gpu) = on_gpu(&c, DType::F32) else { return };
    let mut cpu = on_cpu(&c);
    let (got, want) = (steps(&mut gpu, 50), steps(&mut cpu, 50));
    let mut worst = [0.0f64; 2];
    for (got, want) in got.iter().zip(&want) {
        assert_eq!((got.step, got.learning_rate), (want.step, want.learning_rate));
        let allowed = curve_budget(want.step);
        let errors =
            [(got.loss - want.loss).abs() / want.loss, (got.grad_norm - want.grad_norm).abs() / want.grad_norm];
        for (worst, error) in worst.iter_mut().zip(errors) {
            *worst = worst.max(error / allowed);
        }
        assert!(errors[0] <= allowed && errors[1] <= allowed, "{got:?}, the CPU has {want:?}");
    }
    println!("of its budget the loss used {:.3} and the norm {:.3}", worst[0], worst[1]);
    let means = [&want[..10], &want[40..]].map(|w| w.iter().map(|r| r.loss).sum::<f64>() / 10.0);
    assert!(means[1] < 0.9 * means[0], "nothing is learnt: {means:?}");
}

/// The held-out loss of the same network on both devices. It is trained until its output depends on the images: a fresh
/// network predicts nothing. Held-out images share the training buffer or have their own. The losses may differ by five
/// standard deviations of the change that perturbed weights cause on the CPU.
#[test]
fn the_validation_loss_is_the_cpus() {
    let mut c = tiny();
    c.learning_rate = 1e-2;
    for shared in [false, true] {
        let data = || {
            let data = data(&c, 20, 5);
            if shared { Data { held_out: data.train.clone(), ..data } } else { data }
        };
        let Some(gpu) = gpu::available().then(|| Device::Cuda(Gpu::open(0, DType::F32, false).unwrap())) else {
            return;
        };
        let mut gpu = Trainer::new(&c, data(), &gpu).unwrap();
        let mut cpu = Trainer::new(&c, data(), &Device::cpu()).unwrap();
        steps(&mut gpu, 40);
        cpu.state_mut().ema.write(&gpu.ema().unwrap().host().unwrap()).unwrap();
        let stop = AtomicBool::new(false);
        let [got, want] = [&gpu, &cpu].map(|trainer| trainer.validate(&stop).unwrap().quarters);
        let mut changes = [0.0; 4];
        const DRAWS: u64 = 8;
        let perturbed: Vec<Vec<f32>> = (0..DRAWS).map(|seed| perturbed(&cpu.ema().unwrap(), seed)).collect();
        for weights in &perturbed {
            cpu.state_mut().ema.write(weights).unwrap();
            let changed = cpu.validate(&stop).unwrap().quarters;
            for (change, (changed, want)) in changes.iter_mut().zip(changed.means().iter().zip(want.means())) {
                *change += changed.zip(want).map_or(0.0, |(changed, want)| (changed - want).powi(2)) / DRAWS as f64;
            }
        }
        let mut compared = 0;
        for ((got, want), change) in got.means().iter().zip(want.means()).zip(changes) {
            assert_eq!(got.is_some(), want.is_some());
            if let (Some(got), Some(want)) = (got, want) {
                let (error, allowed) = ((got - want).abs(), 5.0 * change.sqrt());
                println!(
                    "{got}: error {error:.1e}, allowed {allowed:.1e}, {:.1} roundings",
                    allowed / want / F32_ROUNDING
                );
                assert!(error <= allowed, "shared {shared}: {got}, the CPU has {want} +- {allowed:e}");
                compared += 1;
            }
        }
        assert!(compared >= 2, "only {compared} quarters of the timesteps have a loss");
        let mean = want.mean().unwrap();
        assert!((mean - 1.0).abs() > 0.05, "the network predicts nothing: {mean}");
    }
}

/// An operation in bf16 rounds each number by up to 2^-9 of itself, with a mean square of a third of 2^-18. After a
/// number of operations the prediction is off by 2^-9 sqrt(operations / 3) of its root mean square. The weights, whose
/// gradients come through twice as many operations, add sqrt 2 times that. A prediction of noise of variance 1 with
/// loss L has a root mean square of at most 1 + sqrt L, and if it is off by e, its loss is off by at most 2 sqrt(L) e +
/// e^2 (Cauchy-Schwarz).
///
/// Errors reach that bound only if they point along the residual in every image. Those of different images are
/// practically independent and cancel in the mean over all images compared; five standard deviations of that mean are 7
/// % of the loss here. They also cancel within an image: 0.1 % is observed. So at most 2 % is allowed.
///
/// An operation in tf32 rounds both operands of its products by up to 2^-11: as if its results were rounded by sqrt 2
/// times that, and a third of the share is allowed.
#[test]
fn bf16_and_tf32_follow_f32() {
    let [of_bf16, of_tf32] = [2f64.powi(-9), 2f64.sqrt() * 2f64.powi(-11)];
    follows_f32(Precision::Bf16, of_bf16, 0.02);
    follows_f32(Precision::Tf32, of_tf32, 0.02 / 2.8);
}

/// For operations that round by up to `rounding`, with at most the share `most` of the loss.
fn follows_f32(precision: Precision, rounding: f64, most: f64) {
    const STEPS: u32 = 50;
    const COMPARED: usize = 20;
    let mut c = tiny();
    // High enough that the network learns to predict something.
    c.learning_rate = 1e-2;
    let (Some(mut f32), Some(mut other)) = (on_gpu(&c, DType::F32), on_gpu(&c, precision)) else { return };
    let [f32_loss, other_loss] = [&mut f32, &mut other].map(|trainer| {
        let reports = steps(trainer, STEPS);
        assert_eq!(reports.len(), STEPS as usize);
        reports[reports.len() - COMPARED..].iter().map(|r| r.loss).sum::<f64>() / COMPARED as f64
    });
    assert!(f32_loss < 0.8, "the network predicts little: its loss is {f32_loss}");
    let mut tape = Tape::recording(f32.device(), f32.params());
    let Size { h, w } = c.model.image_size;
    let x = tape.leaf(Tensor::zeros(f32.device(), Shape::new(1, h, w, 3)).unwrap());
    let [t, labels] = [5.0, 1.0].map(|number| support::per_image(f32.device(), [number]));
    f32.unet().forward(&mut tape, &x, &t, &Conditioning::on_labels(labels), None).unwrap();
    let operations = tape.saved().len() as f64;
    let e = (1.0 + 2f64.sqrt()) * rounding * (operations / 3.0).sqrt() * (1.0 + f32_loss.sqrt());
    let images = (c.batch * COMPARED) as f64;
    let allowed = (5.0 * (2.0 * f32_loss.sqrt() * e + e * e) / images.sqrt()).min(most * f32_loss);
    let error = (other_loss - f32_loss).abs();
    println!("{precision}: loss {f32_loss:.3}, {operations} operations: error {error:.2e}, allowed {allowed:.2e}");
    let said = format!("mean loss of {COMPARED} steps: {other_loss} in {precision}, {f32_loss} in f32 +- {allowed:e}");
    assert!(error <= allowed && error > 0.0, "{said}");
}

#[test]
fn repeats_itself_to_the_bit_in_every_schedule() {
    let c = tiny();
    for precision in Precision::ALL {
        let mut first: Option<Vec<f32>> = None;
        for schedule in gpu::SCHEDULES {
            configure("seed", schedule);
            let Some(mut trainer) = on_gpu(&c, precision) else { return };
            steps(&mut trainer, 2);
            let got = weights(&trainer);
            match &first {
                None => first = Some(got),
                Some(first) => same_bits(&format!("weights, {precision}, schedule {schedule}"), &got, first),
            }
        }
        configure("seed", "none");
    }
}

#[test]
fn a_warm_step_allocates_nothing() {
    let c = tiny();
    let Some(mut trainer) = on_gpu(&c, DType::F32) else { return };
    steps(&mut trainer, 2);
    let before = trainer.device().pool_stats();
    steps(&mut trainer, 2);
    let after = trainer.device().pool_stats();
    assert_eq!(after.misses, before.misses, "allocations in a warm step");
    assert_eq!(after.in_use, before.in_use, "bytes that a step keeps");
    assert!(after.hits == before.hits && after.peak == before.peak, "a replay takes nothing from the pool");
    let mut eager = on_eager_gpu(&c, DType::F32).unwrap();
    steps(&mut eager, 2);
    let before = eager.device().pool_stats();
    steps(&mut eager, 2);
    let after = eager.device().pool_stats();
    assert_eq!((after.misses, after.in_use), (before.misses, before.in_use), "of a step launched kernel by kernel");
    assert!(after.hits > before.hits && after.peak == before.peak);
}

/// [`on_gpu`], launching kernel by kernel.
fn on_eager_gpu(c: &Config, precision: impl Into<Precision>) -> Option<Trainer> {
    let trainer = on_gpu(c, precision)?;
    let Device::Cuda(gpu) = trainer.device() else { unreachable!("on a GPU") };
    gpu.launch_eagerly();
    Some(trainer)
}

/// Weights, moving average and moments have the same bits.
#[track_caller]
fn same_state(name: &str, got: &Trainer, want: &Trainer) {
    let of = |trainer: &Trainer| {
        let state = trainer.state();
        let flat = [state.params.host().unwrap().into_owned(), state.ema.host().unwrap().into_owned()];
        [flat, [state.m.to_vec().unwrap(), state.v.to_vec().unwrap()]].concat()
    };
    for (what, (got, want)) in
        ["weights", "moving average", "first moments", "second moments"].iter().zip(of(got).iter().zip(&of(want)))
    {
        same_bits(&format!("{what}, {name}"), got, want);
    }
}

/// What the reports say, to the bit.
fn measured(reports: &[StepReport]) -> Vec<(u32, u64, u64, u64)> {
    let bits = |r: &StepReport| (r.step, r.loss.to_bits(), r.grad_norm.to_bits(), r.learning_rate.to_bits());
    reports.iter().map(bits).collect()
}

/// Replayed steps and steps launched kernel by kernel, from the warm-up of the learning rate on, with dropout, flips,
/// classes and a moving average, in one, two and four micro-batches, and resumed.
#[test]
fn a_graph_of_a_step_has_the_bits_of_its_launches() {
    let [f32, tf32, bf16] = Precision::ALL;
    for (precision, accumulate) in [(f32, 1), (f32, 2), (f32, 4), (tf32, 2), (bf16, 2)] {
        let name = format!("{precision}, {accumulate} micro-batches");
        let c = Config { accumulate, ..tiny() };
        let (Some(mut eager), Some(mut replayed)) = (on_eager_gpu(&c, precision), on_gpu(&c, precision)) else {
            return;
        };
        let (want, got) = (steps(&mut eager, 6), steps(&mut replayed, 6));
        assert_eq!(eager.launches_captured(), None, "{name}");
        println!("{name}: {} launches in the graph", replayed.launches_captured().expect("a graph"));
        assert_eq!(measured(&got), measured(&want), "{name}");
        same_state(&name, &replayed, &eager);
        assert_ne!(want[4].loss, want[5].loss, "{name}: steps that do not differ show nothing");

        // Resumed from steps that were launched, and held-out images measured in between.
        let folder = tempfile::tempdir().unwrap();
        let mut first = on_eager_gpu(&c, precision).unwrap();
        steps(&mut first, 2);
        checkpoint::save(folder.path(), &c, first.state()).unwrap();
        let mut second = on_gpu(&c, precision).unwrap();
        checkpoint::restore(&checkpoint::newest(folder.path()).unwrap().unwrap(), second.state_mut()).unwrap();
        let mut again = steps(&mut second, 3);
        let stop = AtomicBool::new(false);
        second.validate(&stop).unwrap();
        again.extend(steps(&mut second, 1));
        assert_eq!(measured(&again), measured(&want[2..]), "{name}, resumed");
        same_state(&format!("{name}, resumed"), &second, &eager);
        assert!(second.launches_captured().is_some() && second.device().take_notes().is_empty(), "{name}");
    }
}

/// On a GPU, in graphs, as on the CPU (tests/train.rs).
#[test]
fn what_is_computed_again_changes_no_bit() {
    let c = tiny();
    for dtype in [DType::F32, DType::Bf16] {
        let Some(mut of_none) = on_gpu(&c, dtype) else { return };
        let want = steps(&mut of_none, 4);
        for recompute in [Recompute::Cheap, Recompute::Blocks] {
            let mut trainer = on_gpu(&Config { recompute, ..c.clone() }, dtype).unwrap();
            let got = steps(&mut trainer, 4);
            assert_eq!(measured(&got), measured(&want), "{dtype:?}, {recompute}");
            same_state(&format!("{dtype:?}, {recompute}"), &trainer, &of_none);
            assert!(trainer.launches_captured() > of_none.launches_captured(), "{dtype:?}, {recompute}");
        }
    }
}

/// A graph's memory lies idle in the pool between two steps. What somebody takes of it there stays theirs.
#[test]
fn a_graph_writes_into_no_memory_of_others() {
    let c = tiny();
    let (Some(mut eager), Some(mut replayed)) = (on_eager_gpu(&c, DType::F32), on_gpu(&c, DType::F32)) else { return };
    steps(&mut eager, 7);
    steps(&mut replayed, 3);
    let device = replayed.device().clone();
    // Everything idle, class by class of sizes: (8..16) 2^k units of 256 bytes.
    let units = (1..8).chain((0..14).flat_map(|k| (8..16).map(move |m| m << k)));
    let mut taken = Vec::new();
    for units in units {
        loop {
            let misses = device.pool_stats().misses;
            let tensor = Tensor::full(&device, Shape::vector(64 * units), 7.0).unwrap();
            if device.pool_stats().misses > misses {
                break;
            }
            taken.push(tensor);
        }
    }
    assert!(taken.len() > 20, "{} idle buffers", taken.len());
    steps(&mut replayed, 2);
    for tensor in &taken {
        assert!(tensor.host().unwrap().iter().all(|&v| v == 7.0), "a step has written into {tensor:?}");
    }
    assert!(replayed.launches_captured().is_some());
    drop(taken);
    steps(&mut replayed, 2);
    same_state("beside others", &replayed, &eager);
}

/// Whoever puts another buffer in place of one of the trainer's gets steps on that buffer.
#[test]
fn a_graph_does_not_outlive_what_it_was_captured_with() {
    let c = tiny();
    let (Some(mut eager), Some(mut replayed)) = (on_eager_gpu(&c, DType::F32), on_gpu(&c, DType::F32)) else { return };
    for trainer in [&mut eager, &mut replayed] {
        steps(trainer, 3);
        let device = trainer.device().clone();
        let shape = trainer.state().m.shape();
        let old = std::mem::replace(trainer.state_mut().m, Tensor::zeros(&device, shape).unwrap());
        steps(trainer, 2);
        assert!(old.to_vec().unwrap().iter().any(|&m| m != 0.0));
    }
    same_state("moments begun anew", &replayed, &eager);
}

/// What goes through the host happens each time, kernel by kernel, and is said once. The stream is as it was.
#[test]
fn what_cannot_be_captured_is_launched_and_said() {
    let Some(gpu) = gpu::available().then(|| Gpu::open(0, DType::F32, false).unwrap()) else { return };
    let (device, shape) = (Device::Cuda(gpu.clone()), Shape::vector(64));
    let mut x = Tensor::full(&device, shape, 1.0).unwrap();
    let mut uploads = Repeated::new("a test");
    for number in 1..=4 {
        uploads.run(&gpu, || x.write(&[number as f32; 64])).unwrap();
        assert_eq!(x.to_vec().unwrap(), [number as f32; 64]);
    }
    assert_eq!(uploads.launches(), None);
    let why = "a test is launched kernel by kernel, not replayed as a CUDA graph: it is a copy from the host's memory";
    let notes = gpu.take_notes();
    assert!(notes.len() == 1 && notes[0].starts_with(why), "{notes:?}");

    // A buffer that outlives its work would be another one each time, also where the pool has some.
    drop([(); 8].map(|()| Tensor::full(&device, shape, 0.0).unwrap()));
    let mut kept = Vec::new();
    let mut keeps = Repeated::new("a test");
    for _ in 0..3 {
        keeps.run(&gpu, || Tensor::full(&device, shape, 3.0).map(|tensor| kept.push(tensor))).unwrap();
    }
    assert!(kept.iter().rev().take(2).all(|tensor| tensor.to_vec().unwrap() == [3.0; 64]));
    let notes = gpu.take_notes();
    assert!(notes.len() == 1 && notes[0].ends_with("a buffer that it makes outlives it"), "{notes:?}");
    assert_eq!(keeps.launches(), None);

    // More memory than the pool has is taken by launching once more, and then captured.
    let mut grows = Repeated::new("a test");
    for words in [64, 1 << 22, 1 << 22, 1 << 22] {
        grows.run(&gpu, || Tensor::full(&device, Shape::vector(words), 4.0).map(|_| ())).unwrap();
        assert!(words > 64 || grows.launches().is_none());
    }
    assert_eq!((grows.launches(), gpu.take_notes().len()), (Some(0), 0), "fills are no kernels");
}

/// Samplers with and without noise, with a memory of x_0 and of x, with guidance; some states are kept while the
/// process goes on.
#[test]
fn a_graph_of_a_reverse_step_has_the_bits_of_its_launches() {
    let mut c = tiny();
    c.set("label_dropout", "0.2").unwrap();
    c.model.null_class = true;
    for precision in Precision::ALL {
        let (Some(mut eager), Some(replayed)) = (on_eager_gpu(&c, precision), on_gpu(&c, precision)) else { return };
        steps(&mut eager, 2);
        let weights = eager.ema().unwrap().host().unwrap().into_owned();
        let sampler = |method| Sampler::new(&eager.schedule(), method, Spacing::Even, 7).unwrap();
        let samplers = [
            sampler(Method::Ancestral(Variance::FixedSmall)),
            sampler(Method::Ddim { eta: 0.0 }),
            sampler(Method::DpmPp),
            sampler(Method::Heun),
            sampler(Method::Ddim { eta: 1.0 }).guided(Guidance::new(2.0).unwrap().rescaled(0.5).unwrap()),
        ];
        for (number, sampler) in samplers.iter().enumerate() {
            let draw = |trainer: &Trainer| {
                let device = trainer.device();
                let params = Params::from_host(device, trainer.params().specs().clone(), &weights).unwrap();
                let drawing = Drawing { device, unet: trainer.unet(), params: &params, sampler, seed: 3 };
                let request = Request { count: 2, labels: Some(&[0, 2]), x_0: true, ..Request::default() };
                let mut kept = Vec::new();
                let drawn = drawing.draw(&request, None, |p| {
                    if p.done % 3 == 0 {
                        kept.push((p.x.clone(), p.x_0.expect("it was asked for").clone()));
                    }
                    Ok(())
                });
                let kept = kept.iter().flat_map(|(x, x_0)| [x.to_vec().unwrap(), x_0.to_vec().unwrap()]);
                [drawn.unwrap()].into_iter().chain(kept).collect::<Vec<_>>()
            };
            let (got, want) = (draw(&replayed), draw(&eager));
            assert!(want.len() > 4 && want[1] != want[3], "{number}: states were kept");
            for (got, want) in got.iter().zip(&want) {
                same_bits(&format!("sampler {number}, {precision}"), got, want);
            }
        }
        assert!(replayed.device().take_notes().is_empty());
    }
}

#[test]
fn a_checkpoint_continues_on_the_other_device() {
    let mut c = tiny();
    // High enough that the loss depends on the contents of the checkpoint.
    c.learning_rate = 1e-2;
    let Some(mut gpu) = on_gpu(&c, DType::F32) else { return };
    let mut whole = on_cpu(&c);
    let want = steps(&mut whole, 6);
    let folder = tempfile::tempdir().unwrap();
    steps(&mut gpu, 3);
    checkpoint::save(folder.path(), &c, gpu.state()).unwrap();
    let newest = checkpoint::newest(folder.path()).unwrap().unwrap();
    let mut cpu = on_cpu(&c);
    let mut again = on_gpu(&c, DType::F32).unwrap();
    for trainer in [&mut cpu, &mut again] {
        checkpoint::restore(&newest, trainer.state_mut()).unwrap();
        for (got, want) in steps(trainer, 3).iter().zip(&want[3..]) {
            assert_eq!(got.step, want.step);
            let allowed = curve_budget(want.step) * want.loss;
            println!("step {}: {:.3} of the budget", got.step, (got.loss - want.loss).abs() / allowed);
            assert!((got.loss - want.loss).abs() <= allowed, "{got:?}, never interrupted {want:?} +- {allowed:e}");
        }
    }
    steps(&mut gpu, 3);
    same_bits("weights after a resume", &weights(&again), &weights(&gpu));
}

/// Losses with the bound, learned variances, timesteps and weights from the host, and dropped labels: the first step is
/// the CPU's, and a run resumed while its timesteps are drawn by their losses has the bits of a whole one.
#[test]
fn every_objective_trains_and_resumes() {
    let sets: [&[&str]; 4] = [
        &["schedule=learned", "loss=vlb", "variance=learned_range", "timestep_sampling=stratified"],
        &["loss=hybrid", "variance=learned_range", "prediction=v", "timestep_sampling=importance"],
        &["loss=vlb", "variance=fixed_small", "timestep_sampling=importance", "label_dropout=0.3"],
        &["loss=min_snr", "prediction=x0", "timestep_sampling=stratified", "label_dropout=0.3"],
    ];
    for settings in sets {
        let mut c = tiny();
        // Three timesteps have their ten losses after some eight steps of four images.
        c.diffusion.timesteps = 3;
        for setting in settings {
            let (key, value) = setting.split_once('=').unwrap();
            c.set(key, value).unwrap();
        }
        let (Some(mut whole), Some(mut first), Some(mut second)) =
            (on_gpu(&c, DType::F32), on_gpu(&c, DType::F32), on_gpu(&c, DType::F32))
        else {
            return;
        };
        let reports = steps(&mut whole, 16);
        let want = &steps(&mut on_cpu(&c), 1)[0];
        let near = |got: f64, want: f64| (got - want).abs() <= 1e-4 * want.abs();
        assert!(near(reports[0].loss, want.loss), "{settings:?}: {:?}, the CPU has {want:?}", reports[0]);
        assert_eq!(reports[0].vlb.is_some(), want.vlb.is_some(), "{settings:?}");
        assert!(near(reports[0].vlb.unwrap_or(1.0), want.vlb.unwrap_or(1.0)), "{settings:?}: {:?}", reports[0]);

        let folder = tempfile::tempdir().unwrap();
        steps(&mut first, 13);
        checkpoint::save(folder.path(), &c, first.state()).unwrap();
        checkpoint::restore(&checkpoint::newest(folder.path()).unwrap().unwrap(), second.state_mut()).unwrap();
        let again = steps(&mut second, 3);
        same_bits(&format!("{settings:?}"), &weights(&second), &weights(&whole));
        assert_eq!(again[2].loss, reports[15].loss);
        assert_eq!(second.curve(), whole.curve(), "{settings:?}");
    }
}

/// The first step's gradient by the schedule, as Adam's first moments have it, on each device. A fresh network puts out
/// next to nothing, so the bound is that of the noise itself, in f32, and x_t has little influence: what bf16 rounds in
/// the output and its derivative is below 2^-6 of the whole.
#[test]
fn a_learned_schedule_has_the_gradient_of_the_cpu() {
    let mut c = tiny();
    c.diffusion.timesteps = 12;
    for (key, value) in [("schedule", "learned"), ("loss", "vlb"), ("timestep_sampling", "stratified")] {
        c.set(key, value).unwrap();
    }
    let mut cpu = on_cpu(&c);
    steps(&mut cpu, 1);
    let moments = |trainer: &Trainer| trainer.curve().expect("a schedule in training").state()[2].to_vec();
    for (dtype, relative) in [(DType::F32, 1e-4), (DType::Bf16, 2f64.powi(-6))] {
        let Some(mut gpu) = on_gpu(&c, dtype) else { return };
        steps(&mut gpu, 1);
        support::close_to_largest(&format!("moments in {dtype:?}"), &moments(&gpu), &moments(&cpu), relative);
        assert_ne!(gpu.curve().unwrap().theta(), ddpm_cuda::diffusion::Curve::new(12).theta(), "nothing is learned");
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_and_keeps_the_last_good_weights() {
    let mut c = tiny();
    let Some(mut gpu) = on_gpu(&c, DType::F32) else { return };
    steps(&mut gpu, 2);
    let good = weights(&gpu);
    c.learning_rate = 1e30;
    c.warmup_steps = 1;
    let mut wild = on_gpu(&c, DType::F32).unwrap();
    // The first update is finite and leaves weights of 1e30; the next loss is not finite.
    for _ in 0..4 {
        wild.step().unwrap();
    }
    let error = wild.reports().unwrap_err().to_string();
    assert!(error.starts_with("step 2: the loss is") && error.contains("learning_rate"), "{error}");
    assert!(error.contains("is the output of"), "no tensor is named: {error}");
    assert_eq!(wild.steps_done(), 1);
    assert!(weights(&wild).iter().all(|w| w.is_finite()));
    same_bits("weights of another run", &weights(&gpu), &good);
}

/// Twenty steps amplify the rounding errors of the first. Perturbed weights on the CPU show by how much; twice the
/// largest change is allowed. The bytes are rounded from the GPU's own numbers, so they differ from the CPU's by at
/// most one grey level.
#[test]
fn a_sample_is_the_cpus_but_for_a_grey_level() {
    const GREY_LEVEL: f64 = 1.0 / 127.5;
    let c = tiny();
    let Some(mut trainer) = on_gpu(&c, DType::F32) else { return };
    steps(&mut trainer, 10);
    let cpu = Device::cpu();
    let params = |flat: &[f32]| Params::from_host(&cpu, trainer.params().specs().clone(), flat).unwrap();
    let average = trainer.ema().unwrap();
    let on_cpu = params(&average.host().unwrap());
    for method in [Method::Ancestral(Variance::FixedSmall), Method::Ddim { eta: 0.0 }] {
        let sampler = Sampler::new(&trainer.schedule(), method, Spacing::Even, 20).unwrap();
        let draw = |device: &Device, params: &Params| {
            let drawing = Drawing { device, unet: trainer.unet(), params, sampler: &sampler, seed: 3 };
            let mut x_0 = Vec::new();
            let images = drawing.images(0..3, Some(&[0, 1, 2]), |p| {
                if p.done == p.total {
                    x_0.extend(p.x.to_vec()?);
                }
                Ok(())
            });
            let images = images.unwrap();
            assert_eq!(images, to_bytes(&x_0), "{method:?}: the images are not the last state");
            (x_0, images)
        };
        let (got, want) = (draw(trainer.device(), &average), draw(&cpu, &on_cpu));
        let change = |seed| {
            let (changed, _) = draw(&cpu, &params(&perturbed(&on_cpu, seed)));
            changed.iter().zip(&want.0).map(|(a, b)| f64::from(a - b).abs()).fold(0.0, f64::max)
        };
        let allowed = 2.0 * (0..4).map(change).fold(0.0, f64::max);
        assert!(allowed < 0.1 * GREY_LEVEL, "{method:?}: rounding alone may change a number by {allowed:e}");
        let exact: Vec<f64> = want.0.iter().map(|&x| f64::from(x)).collect();
        let share = support::worst(&format!("x_0, {method:?}"), &got.0, &exact, |_| allowed);
        println!("{method:?}: {share:.2} of {allowed:.1e}");
        let worst = got.1.iter().zip(&want.1).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= 1, "{method:?}: {worst} grey levels from the CPU's");
        assert!(want.1.iter().any(|&v| v != want.1[0]), "the images are of one grey");
    }
}

/// The program on the GPU under test; `None` if kernels cannot be tested.
fn program(folder: &Path) -> Option<Command> {
    if !gpu::available() {
        return None;
    }
    let mut command = Command::new(places::program());
    command.stdin(Stdio::null()).current_dir(folder);
    if !gpu::is_real() {
        command.env("DDPM_CUDA_DRIVER", places::emulator());
    }
    Some(command)
}

/// A run in tf32 says what that is, has the same bits in graphs and launched kernel by kernel and goes on in tf32; its
/// predictions are not those of f32. The CPU refuses it.
#[test]
fn the_command_line_trains_and_samples_in_tf32() {
    const SAYS: &str = "tf32: activations, gradients and weights are f32 in memory, but";
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str], code: i32| {
        let out = program(folder.path())?.args(arguments).output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert_eq!(out.status.code(), Some(code), "{arguments:?}: {said}");
        Some(said)
    };
    let few = ["--batch", "2", "--steps", "3", "--set", "sample_every=0", "--set", "validate_every=0"];
    let train = |out: &str, more: &[&str]| {
        let start = ["train", "--device", "cuda", "--precision", "tf32", "--out", out];
        run(&[&start[..], &TINY, &PLAIN, &few, more].concat(), 0)
    };
    let Some(said) = train("replayed", &[]) else { return };
    assert_eq!(said.matches(SAYS).count(), 1, "{said}");
    train("eager", &["--eager"]);
    let at = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    let state = |out: &str| at(&format!("{out}/checkpoints/3/training_state.safetensors"));
    assert!(state("replayed") == state("eager"), "the checkpoints differ");
    assert!(String::from_utf8(at("eager/config.toml")).unwrap().contains("precision = \"tf32\""));

    let resume = |more: &[&str], code| {
        let start = ["train", "--resume", "eager", "--set", "steps=4"];
        run(&[&start[..], more].concat(), code).expect("there are kernels")
    };
    let said = resume(&["--device", "cpu"], 1);
    assert!(said.contains("is a run in tf32, in which the CPU does not compute"), "{said}");
    let said = resume(&["--device", "cuda", "--precision", "f32"], 2);
    assert!(said.contains("is a run in tf32 and goes on in it"), "{said}");
    assert!(resume(&["--device", "cuda"], 0).contains(SAYS));
    let refused = [&["train", "--device", "cpu", "--precision", "tf32", "--out", "none"][..], &TINY, &PLAIN].concat();
    let said = run(&refused, 1).expect("there are kernels");
    assert!(said.contains("tf32 was asked for, but the CPU computes in f32 only: use --precision f32"), "{said}");

    let drawn = ["sample", "--model", "eager", "--device", "cuda", "--count", "1", "--steps", "2", "--out", "x.png"];
    run(&[&drawn[..], &["--precision", "tf32"]].concat(), 0);
    let x: Vec<f32> = (0..784).map(|i| (i % 13) as f32 / 6.5 - 1.0).collect();
    ddpm_cuda::output::write_npy(&folder.path().join("x.npy"), &[1, 1, 28, 28], &x).unwrap();
    ddpm_cuda::output::write_npy(&folder.path().join("t.npy"), &[1], &[40.0]).unwrap();
    let predict = |precision: &str| {
        let start = ["predict", "--model", "eager", "--device", "cuda", "--x", "x.npy", "--t", "t.npy"];
        let said = run(&[&start[..], &["--out", "y.npy", "--precision", precision]].concat(), 0);
        assert_eq!(said.expect("there are kernels").contains(SAYS), precision == "tf32");
        ddpm_cuda::data::npy::read(&folder.path().join("y.npy")).unwrap().to_f32().unwrap()
    };
    assert_ne!(predict("tf32"), predict("f32"), "the products were computed in f32");
}

#[test]
fn the_command_line_trains_samples_and_predicts_on_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut train) = program(folder.path()) else { return };
    let out = train.args(["train", "--device", "cuda", "--precision", "bf16", "--out", "run"]).args(TINY).args(PLAIN);
    let out = out.args(["--batch", "2", "--steps", "2", "--set", "sample_every=0", "--set", "validate_every=0"]);
    let out = out.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && said.contains("cuda:0"), "{said}");
    let mut sample = program(folder.path()).unwrap();
    let out =
        sample.args(["sample", "--model", "run", "--device", "cuda", "--count", "2", "--steps", "2", "--out", "x.png"]);
    let out = out.output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let at = |name: &str| folder.path().join(name);
    let x: Vec<f32> = (0..2 * 784).map(|i| (i % 13) as f32 / 6.5 - 1.0).collect();
    ddpm_cuda::output::write_npy(&at("x.npy"), &[2, 1, 28, 28], &x).unwrap();
    ddpm_cuda::output::write_npy(&at("t.npy"), &[2], &[3.0, 40.0]).unwrap();
    let predict = |device: &str, out: &str| {
        let mut predict = program(folder.path()).unwrap();
        predict.args(["predict", "--model", "run", "--x", "x.npy", "--t", "t.npy", "--device", device, "--out", out]);
        let said = predict.output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        ddpm_cuda::data::npy::read(&at(out)).unwrap().to_f32().unwrap()
    };
    let (got, want) = (predict("cuda", "gpu.npy"), predict("cpu", "cpu.npy"));
    support::close_to_largest("eps", &got, &want, support::network::F32);
    let mut info = program(folder.path()).unwrap();
    let said = String::from_utf8(info.arg("info").output().unwrap().stdout).unwrap();
    assert!(said.contains("cuda:0") && said.contains("compiled by CUDA"), "{said}");
}

/// A command on one of three GPUs or several, and what it says; it must end with `code`.
fn on_several(folder: &Path, devices: &str, arguments: &str, code: i32) -> String {
    let mut command = program(folder).expect("kernels can be tested");
    if !gpu::is_real() {
        command.envs([("CUDA_EMU_DEVICES", "3"), ("CUDA_EMU_CHECKS", "none"), ("CUDA_EMU_LOG", "none")]);
    }
    let out = command.args(arguments.split(' ')).args(["--device", devices]).output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.status.code(), Some(code), "{arguments} on {devices}: {said}");
    said
}

/// A folder with square images in two classes, `data.npz`, and two trainings of them that have hardly begun: a network,
/// `run`, and a classifier, `judge`. `None` if there are no three GPUs.
fn for_three_gpus(side: usize) -> Option<tempfile::TempDir> {
    let there = gpu::available().then(|| if gpu::is_real() { cuda::devices().unwrap().len() } else { 3 })?;
    if there < 3 {
        gpu::skip(&format!("drawing on three GPUs, since there are only {there}"));
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape::new(40, side, side, 1);
    let bytes: Vec<u8> = (0..shape.len()).map(|i| (i * i / 7 % 251) as u8).collect();
    let labels: Vec<u32> = (0..40).map(|i| i % 2).collect();
    ddpm_cuda::output::write_npz(&folder.path().join("data.npz"), shape, &bytes, Some(&labels)).unwrap();
    let small = "--data data.npz --batch 4 --steps 2 --set widths=8,16 --set groups=4 --set timesteps=20 \
                 --set held_out=0.2 --set validate_every=0";
    let small = format!("{small} --set attention_resolutions={}", side / 2);
    on_several(folder.path(), "cpu", &format!("train --out run --set sample_every=0 {small}"), 0);
    on_several(folder.path(), "cpu", &format!("train-classifier --out judge {small}"), 0);
    Some(folder)
}

/// Seven images, which neither two nor three GPUs divide: frames of them and predictions along the way, with
/// corrections in between, guided by a classifier; and the figures of `eval`.
#[test]
fn several_gpus_draw_and_judge_to_the_bytes_of_one() {
    let Some(folder) = for_three_gpus(8) else { return };
    for (arguments, files) in [
        ("sample --count 7 --steps 3 --out x.npz", &["x.npz"][..]),
        ("sample --count 5 --steps 3 --corrector 1 --progressive p.png --out x.gif", &["p.png", "x.gif"]),
        ("sample --count 4 --steps 2 --classifier judge --classifier-scale 200 --out g.npz", &["g.npz"]),
        ("eval --split all --count 7 --steps 3 --draws 2 --json e.json", &["e.json"]),
    ] {
        let of = |devices: &str| -> Vec<Vec<u8>> {
            on_several(folder.path(), devices, &format!("{arguments} --model run"), 0);
            let taken = |file: &&str| {
                let path = folder.path().join(file);
                let bytes = std::fs::read(&path).unwrap();
                std::fs::remove_file(&path).unwrap();
                bytes
            };
            files.iter().map(taken).collect()
        };
        let one = of("cuda:0");
        for several in ["cuda:0-1", "cuda:2,0,1"] {
            assert!(of(several) == one, "{arguments}: other bytes on {several}");
        }
        assert!(!folder.path().join("x.npz.part").exists(), "finished batches stay");
    }
}

/// The figures of `quality` and its picture. The classifier of the features is trained on the CPU whatever the devices,
/// once for all that follow; of images larger than these it takes minutes.
#[test]
fn several_gpus_are_measured_to_the_figures_of_one() {
    let Some(folder) = for_three_gpus(4) else { return };
    let measured = |devices: &str| {
        let arguments = "quality --model run --data data.npz --count 7 --steps 2 --cache cache --json q.json";
        on_several(folder.path(), devices, arguments, 0);
        ["q.json", "q.png"].map(|file| {
            let path = folder.path().join(file);
            let bytes = std::fs::read(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            bytes
        })
    };
    let one = measured("cuda:0");
    for several in ["cuda:0,1", "cuda:2,0,1"] {
        assert!(measured(several) == one, "other figures on {several}");
    }
}

/// A drawing on two GPUs, of which the second batch cannot be kept, goes on on one GPU or on three.
#[test]
fn a_drawing_goes_on_with_another_number_of_gpus() {
    let Some(folder) = for_three_gpus(8) else { return };
    let draw = |devices: &str, out: &str, more: &str, code: i32| {
        let arguments = format!("sample --model run --count 7 --steps 2 --out {out}{more}");
        on_several(folder.path(), devices, &arguments, code)
    };
    let at = |name: &str| folder.path().join(name);
    draw("cuda:0", "whole.npz", "", 0);
    for (out, devices) in [("a.npz", "cuda:1"), ("b.npz", "cuda:0-2")] {
        let in_the_way = at(&format!("{out}.part/4.u8"));
        std::fs::create_dir_all(&in_the_way).unwrap();
        let said = draw("cuda:0-1", out, "", 1);
        let last = said.trim_end().lines().last().unwrap();
        assert!(last.starts_with(&format!("ddpm-cuda: {out}.part/4.u8: cannot be written: ")), "{said}");
        std::fs::remove_dir(&in_the_way).unwrap();
        assert!(!at(out).exists() && at(&format!("{out}.part/0.u8")).is_file(), "the first batch is not kept");
        assert!(draw(devices, out, "", 1).contains("add --resume to go on"));
        let said = draw(devices, out, " --resume", 0);
        assert!(said.contains("1 of 2 batches are done"), "{said}");
        assert!(std::fs::read(at(out)).unwrap() == std::fs::read(at("whole.npz")).unwrap(), "{devices}: other bytes");
        assert!(!at(&format!("{out}.part")).exists());
    }
}

#[test]
fn a_list_with_a_gpu_that_is_not_there_is_refused_in_one_sentence() {
    if !gpu::emulated("a list with a GPU that is not there") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for command in ["sample --model none --out x.png", "eval --model none", "quality --model none --data mnist"] {
        let said = on_several(folder.path(), "cuda:0-9", command, 1);
        let sentence = "ddpm-cuda: cuda:3 was asked for, but there are only cuda:0 to cuda:2";
        assert_eq!(said.trim_end(), sentence, "{command}");
    }
}

/// The names of the driver's calls that a successful command makes on the emulator, and what it prints.
fn calls(command: &mut Command) -> (Vec<String>, String) {
    let out = command.env("CUDA_EMU_LOG", "calls").output().unwrap();
    let log = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{log}");
    let calls = log.lines().filter_map(|line| Some(line.split_once("cuda_emu: ")?.1.to_string())).collect();
    (calls, String::from_utf8(out.stdout).unwrap())
}

fn count(calls: &[String], name: &str) -> usize {
    calls.iter().filter(|call| *call == name).count()
}

/// One launch of a graph a step, after one that is launched kernel by kernel, whether the data set is on the GPU or
/// not; with `--eager` and `DDPM_TRACE` none, and the same bits. Timesteps that the host draws are said to prevent it.
#[test]
fn the_program_launches_one_graph_a_step() {
    let folder = tempfile::tempdir().unwrap();
    if !gpu::emulated("the calls of the driver") {
        return;
    }
    let images = folder.path().join("images.npy");
    let options = npyz::WriteOptions::new().default_dtype().shape(&[26_000, 28, 28]);
    let mut writer = options.writer(std::fs::File::create(&images).unwrap()).begin_nd().unwrap();
    writer.extend((0..26_000 * 28 * 28).map(|i| (i % 251) as u8)).unwrap();
    writer.finish().unwrap();
    const STEPS: usize = 4;
    let train = |out: &str, memory: &str, more: &[&str]| {
        let mut train = program(folder.path()).unwrap();
        train.env("CUDA_EMU_MEMORY", memory).env("CUDA_EMU_CHECKS", "none");
        train.args(["train", "--device", "cuda", "--preset", "mnist", "--data", "images.npy", "--out", out]);
        train.args(TINY).args(PLAIN);
        train.args(["--steps", &STEPS.to_string(), "--batch", "2", "--set", "accumulate=2", "--set", "held_out=0"]);
        train.args(["--set", "validate_every=0", "--set", "sample_every=0"]).args(more);
        calls(&mut train)
    };
    let state = |out: &str| {
        let file = folder.path().join(out).join(format!("checkpoints/{STEPS}/training_state.safetensors"));
        std::fs::read(file).unwrap()
    };
    for (name, memory) in [("resident", "1G"), ("streamed", "42M")] {
        let (eager, replayed) = (format!("{name}-eager"), format!("{name}-replayed"));
        let (launched, _) = train(&eager, memory, &["--eager"]);
        let (calls, said) = train(&replayed, memory, &[]);
        assert_eq!(count(&calls, "cuMemHostAlloc") > 0, name == "streamed", "{name}: page-locked memory");
        let launches = count(&launched, "cuLaunchKernel");
        assert!(launches > 0 && launches.is_multiple_of(STEPS), "{name}: {launches} launches");
        // Once launched and once captured.
        assert_eq!(count(&calls, "cuLaunchKernel") * STEPS, launches * 2, "{name}");
        assert_eq!([&calls, &launched].map(|calls| count(calls, "cuGraphLaunch")), [STEPS - 1, 0], "{name}");
        assert_eq!(count(&calls, "cuGraphInstantiateWithFlags"), 1, "{name}");
        assert!(!said.contains("CUDA graph"), "{said}");
        assert!(state(&eager) == state(&replayed), "{name}: the checkpoints differ");
    }
    assert!(state("streamed-replayed") == state("resident-replayed"), "streamed or not, the images are the same");

    let (calls_of_importance, said) = train("importance", "1G", &["--set", "timestep_sampling=importance"]);
    let why =
        "a training step is launched kernel by kernel, not replayed as a CUDA graph: timestep_sampling = importance";
    assert!(count(&calls_of_importance, "cuGraphLaunch") == 0 && said.matches(why).count() == 1, "{said}");

    let sample = |out: &str, more: &[&str]| {
        let mut sample = program(folder.path()).unwrap();
        sample.env("CUDA_EMU_CHECKS", "none").args(["sample", "--model", "resident-eager", "--device", "cuda"]);
        calls(sample.args(["--count", "2", "--steps", "5", "--out", out]).args(more))
    };
    let (launched, _) = sample("eager.png", &["--eager"]);
    let (calls, said) = sample("replayed.png", &[]);
    assert_eq!([&calls, &launched].map(|calls| count(calls, "cuGraphLaunch")), [4, 0], "{said}");
    let image = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(image("eager.png") == image("replayed.png"), "the samples differ");
    // x_T is launched beside the steps.
    println!("{} launches in a reverse step", (count(&launched, "cuLaunchKernel") - 1) / 5);
    let mut traced = program(folder.path()).unwrap();
    traced.env("DDPM_TRACE", "1").env("CUDA_EMU_CHECKS", "none").args(["sample", "--model", "resident-eager"]);
    let out =
        traced.args(["--device", "cuda", "--count", "1", "--steps", "3", "--out", "traced.png"]).output().unwrap();
    let (said, traces) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && !said.contains("CUDA graph"), "{said}");
    assert_eq!(traces.matches("sample_step_step_f32 on ").count(), 3, "each launch of each step is traced");
}

#[test]
fn a_gpu_that_is_too_small_old_or_absent_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    if !gpu::emulated("that an unfit GPU is refused") {
        return;
    }
    for (name, value, device, says) in [
        ("CUDA_EMU_MEMORY", "20M", "cuda", "GiB"),
        ("CUDA_EMU_CC", "7.5", "cuda", "8.0"),
        ("CUDA_EMU_DEVICES", "0", "cuda", "--device cpu"),
        ("CUDA_EMU_DEVICES", "2", "cuda:2", "cuda:1"),
    ] {
        let mut train = program(folder.path()).unwrap();
        let out = train
            .env(name, value)
            .env("CUDA_EMU_LOG", "none")
            .args(["train", "--device", device, "--out", "run"])
            .args(TINY)
            .args(PLAIN);
        let out = out.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{name}={value}: {said}");
        assert!(said.contains(says) && said.trim_end().lines().count() == 1, "{name}={value}: {said}");
    }
}

/// Room for a step of one image, not for 64 samples at once: they are drawn in smaller batches.
#[test]
fn a_gpu_without_room_for_all_samples_draws_them_in_smaller_batches() {
    let folder = tempfile::tempdir().unwrap();
    if !gpu::emulated("a GPU without room for samples") {
        return;
    }
    let images = folder.path().join("images.npy");
    let options = npyz::WriteOptions::new().default_dtype().shape(&[8, 64, 64]);
    let mut writer = options.writer(std::fs::File::create(&images).unwrap()).begin_nd().unwrap();
    writer.extend((0..8 * 64 * 64).map(|i| (i % 251) as u8)).unwrap();
    writer.finish().unwrap();
    let mut train = program(folder.path()).unwrap();
    train.env("CUDA_EMU_MEMORY", "40M").env("CUDA_EMU_LOG", "none").env("CUDA_EMU_CHECKS", "none");
    train.args(["train", "--device", "cuda", "--out", "run", "--data", "images.npy", "--batch", "1", "--steps", "2"]);
    train.args(TINY).args(PLAIN).args([
        "--set",
        "image_size=64",
        "--set",
        "channels=1",
        "--set",
        "attention_resolutions=",
    ]);
    train.args(["--set", "timesteps=2", "--set", "held_out=0", "--set", "validate_every=0", "--set", "sample_every=2"]);
    let out = train.output().unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success() && folder.path().join("run/checkpoints/2").is_dir(), "{said}");
    assert!(folder.path().join("run/samples/2.png").is_file() && !said.contains("goes on without"), "{said}");
}

/// On a GPU of 64 MiB, in a process of its own: when memory runs out, the pool returns idle buffers to the driver; if
/// that is not enough, the error says how much was needed and for what.
#[test]
fn idle_memory_is_given_back_and_what_is_missing_is_named() {
    const CHILD: &str = "DDPM_TEST_SMALL_GPU";
    if !gpu::emulated("a GPU with little memory") {
        return;
    }
    if std::env::var_os(CHILD).is_none() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "idle_memory_is_given_back_and_what_is_missing_is_named", "--nocapture"]);
        let out = command.env(CHILD, "1").env("CUDA_EMU_MEMORY", "64M").env("CUDA_EMU_LOG", "calls").output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && said.contains("1 passed"), "{said}");
        // A driver frees in stream order: between freeing and asking again the stream is waited for, and the driver's
        // own pool trimmed.
        let calls = String::from_utf8_lossy(&out.stderr);
        let calls: Vec<&str> = calls.lines().filter_map(|line| line.split("cuda_emu: ").nth(1)).collect();
        let at = |name: &str| calls.iter().position(|call| call.contains(name)).unwrap_or_else(|| panic!("{calls:?}"));
        let (freed, trimmed) = (at("cuMemFreeAsync"), at("cuMemPoolTrimTo"));
        assert!(calls[freed..trimmed].iter().any(|call| call.contains("cuStreamSynchronize")), "{calls:?}");
        assert!(calls[trimmed..].iter().any(|call| call.contains("cuMemAllocAsync")), "{calls:?}");
        return;
    }
    let gpu = Gpu::open(0, DType::F32, false).unwrap();
    let idle = gpu.alloc(40 << 20).unwrap();
    drop(idle);
    assert_eq!((gpu.pool_stats().in_use, gpu.pool_stats().held), (0, 40 << 20));
    let held = gpu.alloc(48 << 20).unwrap();
    assert_eq!((gpu.pool_stats().hits, gpu.pool_stats().misses, gpu.pool_stats().held), (0, 2, 48 << 20));
    gpu.memory_is_for(format_args!("a test"));
    let error = gpu.alloc(20 << 20).err().expect("there is no room").to_string();
    assert!(error.contains("a test needs 20.0 MiB beside 48.0 MiB in use"), "{error}");
    drop(held);
    gpu.alloc(20 << 20).unwrap();
}

/// A driver that is there and fails costs `auto` and `info` a sentence, and `--device cuda` the run.
#[test]
fn auto_and_info_go_on_with_the_cpu_where_a_driver_fails() {
    let folder = tempfile::tempdir().unwrap();
    if !gpu::emulated("that a driver which fails is passed over") {
        return;
    }
    let rustc = |library: &str, source: &Path| {
        let library = folder.path().join(library);
        let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()));
        command.args(["--edition", "2024", "--crate-type", "cdylib", "-C", "link-arg=-Wl,-soname,libcuda.so", "-o"]);
        let out = match command.arg(&library).arg(source).output() {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return None,
            out => out.unwrap(),
        };
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        Some(library)
    };
    let Some(failing) = rustc("failing.so", &places::fixture("failing_driver.rs")) else {
        return gpu::skip("that a driver which fails is passed over: there is no rustc to build one with");
    };
    let (text, empty) = (folder.path().join("driver.txt"), folder.path().join("empty.rs"));
    std::fs::write(&text, "no library").unwrap();
    std::fs::write(&empty, "").unwrap();
    let empty = rustc("empty.so", &empty).expect("it ran before");
    let (absent, emulator) = (folder.path().join("absent.so"), places::emulator());
    let cases = [
        (&absent, "", "", "absent.so: is no CUDA driver that can be opened"),
        (&text, "", "", "driver.txt: is no CUDA driver that can be opened"),
        (&empty, "", "", "empty.so: is a library but no CUDA driver: it has no cuInit"),
        (&emulator, "CUDA_EMU_DEVICES", "0", "there is an NVIDIA driver, but it knows of no GPU"),
        (&emulator, "CUDA_EMU_CC", "7.5", "has compute capability 7.5, but the kernels need 8.0 or newer"),
        (&emulator, "CUDA_EMU_CC", "new", "starting the NVIDIA driver failed with "),
        (&failing, "FAKE_FAILS", "init", "starting the NVIDIA driver failed with CUDA_ERROR_UNKNOWN: unknown error"),
        (&failing, "FAKE_FAILS", "count", "counting the GPUs failed with CUDA_ERROR_UNKNOWN: unknown error"),
        (&failing, "FAKE_FAILS", "open", "opening cuda:0 failed with CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
        (
            &failing,
            "FAKE_VERSION",
            "11080",
            "the NVIDIA driver is of CUDA 11.8, but 12.0 or newer is needed: update it",
        ),
    ];
    for (number, (driver, name, value, why)) in cases.into_iter().enumerate() {
        let run = |args: &[&str], tiny: &[&str]| {
            let mut command = program(folder.path()).unwrap();
            command.env("DDPM_CUDA_DRIVER", driver).env("CUDA_EMU_LOG", "none");
            if !name.is_empty() {
                command.env(name, value);
            }
            let out = command.args(args).args(tiny).output().unwrap();
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            (out.status.code(), text(&out.stdout), text(&out.stderr))
        };
        let what = format!("{} with {name}={value}", driver.display());
        let out = format!("run-{number}");
        let steps = ["--steps", "1", "--batch", "2", "--set", "sample_every=0", "--set", "validate_every=0"];
        let small: Vec<&str> = TINY.iter().chain(&PLAIN).copied().chain(steps).collect();
        let (code, said, error) = run(&["train", "--out", &out], &small);
        assert_eq!((code, &error[..]), (Some(0), ""), "{what}: {said}");
        let note = said.lines().find(|line| line.starts_with("computing on the CPU: "));
        assert!(note.is_some_and(|note| note.contains(why) && !note.contains("--device")), "{what}: {said}");
        assert!(said.contains("; CPU, "), "{what}: {said}");

        let (code, said, error) = run(&["train", "--out", "none", "--device", "cuda"], &small);
        assert_eq!((code, error.lines().count()), (Some(1), 1), "{what}: {said}{error}");
        assert!(value == "0" || error.contains(why), "{what}: {error}");

        let (code, said, error) = run(&["info"], &[]);
        assert_eq!((code, &error[..]), (Some(0), ""), "{what}: {said}");
        let opening = value == "open" || why.contains("compute capability");
        let listed = match (opening, value) {
            (true, _) => "cuda:0 ",
            (false, "0") => "no GPU: the NVIDIA driver knows of none",
            _ => why,
        };
        assert!(said.contains("devices: CPU, ") && said.contains("kernels: "), "{what}: {said}");
        assert!(said.contains(listed), "{what}: {said}");

        // What cannot fall back to the CPU says why it would have to.
        let (code, _, error) = run(&["train", "--out", "none", "--precision", "bf16"], &small);
        assert_eq!(code, Some(1), "{what}: {error}");
        assert!(error.contains("bf16") && error.contains(why), "{what}: {error}");
    }
}
