//! Training as a whole: a network overfits a batch, a resumed run continues with the same bits, the number of threads
//! changes nothing, memory is reused and its use is predicted.

mod support;

use std::sync::atomic::AtomicBool;

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Preset};
use ddpm_cuda::data::{Data, Dataset, Extent, Order};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Batch, Curve};
use ddpm_cuda::images::Source;
use ddpm_cuda::memory::memory_needed;
use ddpm_cuda::meter::Meter;
use ddpm_cuda::meter::Quarters;
use ddpm_cuda::ops::loss::loss;
use ddpm_cuda::ops::q_sample::{Coefficients, Noised, q_sample};
use ddpm_cuda::params::Params;
use ddpm_cuda::tape::{Recompute, Tape, Var};
use ddpm_cuda::tensor::Shape;
use ddpm_cuda::train::{StepReport, Trainer};
use ddpm_cuda::unet::{DropoutSeed, UNet};

use support::{numbers, same_bits};

/// [`support::tiny`] with a batch that can be split into two or three micro-batches.
fn tiny() -> Config {
    let mut c = support::tiny(8, 12, 2);
    c.batch = 6;
    c
}

/// Images of two bright bars that move from image to image.
fn bars(c: &Config, count: usize) -> Data {
    let (h, w) = (c.model.image_size.h, c.model.image_size.w);
    let pixel = |i: usize, y: usize, x: usize| {
        let bar = |at: usize, here: usize| if here == at { 255 } else { 20 };
        [bar(i % h, y), bar(i * 5 % w, x)]
    };
    let images = (0..count).flat_map(|i| (0..h * w).flat_map(move |p| pixel(i, p / w, p % w))).collect();
    let extent = Extent { size: c.model.image_size, channels: 2 };
    let dataset = Dataset::new(extent, images, None);
    Data {
        train: dataset,
        held_out: Dataset::new(extent, Vec::new(), None),
        classes: Vec::new(),
        notes: Vec::new(),
        skipped: Vec::new(),
    }
}

fn trainer(c: &Config) -> Trainer {
    Trainer::new(c, bars(c, 20), &Device::cpu()).unwrap()
}

/// One step and what it reports.
fn step(trainer: &mut Trainer) -> StepReport {
    trainer.step().unwrap();
    let mut reports = trainer.reports().unwrap();
    assert_eq!(reports.len(), 1, "reports after one step");
    reports.remove(0)
}

/// The loss L_i of each image of `batch` under a network with these weights.
fn losses(
    device: &Device,
    trainer: &Trainer,
    params: &Params,
    images: &Dataset,
    batch: &Batch,
    masks: Option<DropoutSeed>,
) -> Vec<f64> {
    let coefficients = Coefficients::new(device, &trainer.schedule()).unwrap();
    let noised = q_sample(device, Source::Host(images.images()), batch, &coefficients).unwrap();
    let Noised { x_t, t, conditioning } = noised;
    let mut tape = match masks {
        Some(_) => Tape::recording(device, params),
        None => Tape::inference(device, params),
    };
    let y = trainer.unet().forward(&mut tape, &Var::constant(x_t), &t, &conditioning, masks).unwrap();
    let mut meter = Meter::new(device).unwrap();
    meter.begin();
    loss(device, y.value(), batch, &t, None, &mut meter).unwrap().per_image.expect("the CPU knows each image's loss")
}

#[test]
fn overfits_a_single_batch() {
    let mut c = tiny();
    c.model.dropout = 0.0;
    c.flip = false;
    c.accumulate = 1;
    c.learning_rate = 2e-3;
    let mut trainer = Trainer::new(&c, bars(&c, c.batch), &Device::cpu()).unwrap();
    let mut mean = |steps: u32| (0..steps).map(|_| step(&mut trainer).loss).sum::<f64>() / f64::from(steps);
    let start = mean(5);
    mean(590);
    let end = mean(100);
    // A network that predicts zero has a loss of 1, the variance of the noise.
    assert!((0.9..1.2).contains(&start), "the first losses are {start}, not about 1");
    assert!(end < 0.2, "after 600 steps on the same six images the loss is {end}, from {start}");
}

#[test]
fn a_resumed_run_continues_with_the_same_bits() {
    let c = tiny();
    let folder = tempfile::tempdir().unwrap();
    let mut whole = trainer(&c);
    for _ in 0..7 {
        whole.step().unwrap();
    }
    let mut first = trainer(&c);
    for _ in 0..4 {
        first.step().unwrap();
    }
    checkpoint::save(folder.path(), &c, first.state()).unwrap();
    drop(first);
    let mut second = trainer(&c);
    checkpoint::restore(&checkpoint::newest(folder.path()).unwrap().unwrap(), second.state_mut()).unwrap();
    assert_eq!(second.steps_done(), 4);
    for _ in 0..3 {
        second.step().unwrap();
    }
    let (a, b) = (whole.state(), second.state());
    same_bits("weights", &b.params.host().unwrap(), &a.params.host().unwrap());
    same_bits("moving average", &b.ema.host().unwrap(), &a.ema.host().unwrap());
    same_bits("first moments", b.m.data(), a.m.data());
    same_bits("second moments", b.v.data(), a.v.data());
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = trainer(&tiny());
            let losses: Vec<f64> = (0..3).map(|_| step(&mut trainer).loss).collect();
            (losses, trainer.params().host().unwrap().into_owned())
        })
    };
    let (losses, weights) = run(1);
    for threads in [2, 3, 5, 8] {
        let (l, w) = run(threads);
        assert_eq!(l, losses, "losses at {threads} threads");
        same_bits(&format!("weights at {threads} threads"), &w, &weights);
    }
}

#[test]
fn from_the_second_step_on_nothing_is_allocated() {
    let c = tiny();
    let device = Device::cpu();
    let mut trainer = Trainer::new(&c, bars(&c, 20), &device).unwrap();
    let idle = device.pool_stats().in_use;
    trainer.step().unwrap();
    assert_eq!(device.pool_stats().in_use, idle, "a step keeps buffers");
    let misses = device.pool_stats().misses;
    for _ in 0..3 {
        trainer.step().unwrap();
        assert_eq!(device.pool_stats().misses, misses, "a warm step asked the system for memory");
        assert_eq!(device.pool_stats().in_use, idle, "a step keeps buffers");
    }
}

#[test]
fn the_predicted_memory_is_the_memory_taken() {
    let mut mnist = Config::preset(Preset::Mnist);
    mnist.batch = 8;
    let mut cifar10 = Config::preset(Preset::Cifar10);
    cifar10.batch = 2;
    let again = [Recompute::Cheap, Recompute::Blocks].map(|recompute| Config { recompute, ..cifar10.clone() });
    // Three gradients are held while four micro-batches are added.
    let split = Config { accumulate: 4, ..mnist.clone() };
    for c in [mnist, split, cifar10, Config { accumulate: 1, ..tiny() }].into_iter().chain(again) {
        let (unet, specs) = UNet::new(&c.model).unwrap();
        let device = Device::cpu();
        let foretold = memory_needed(&c, &unet, &specs, &device, 1) as f64;
        let extent = Extent { size: c.model.image_size, channels: c.model.channels };
        let images = Dataset::new(extent, vec![100; 10 * extent.len()], None);
        let data = Data {
            train: images.clone(),
            held_out: images,
            classes: Vec::new(),
            notes: Vec::new(),
            skipped: Vec::new(),
        };
        Trainer::new(&c, data, &device).unwrap().step().unwrap();
        let taken = device.pool_stats().held as f64;
        // If the prediction is too low, the system kills the run; if too high, a run that would have worked is refused.
        // The scratch space of 24 MiB is an upper bound that small networks do not reach.
        let bound = taken < 1.05 * foretold && foretold < 1.33 * taken + f64::from(24 << 20);
        assert!(bound, "{foretold:e} bytes foretold, {taken:e} taken");
    }
}

/// Three steps of networks with all that a residual block can have: dropout, a shortcut, two inputs, a shift or a
/// scale, a change of size.
#[test]
fn what_is_computed_again_changes_no_bit_and_less_is_kept() {
    let of_openai = [("scale_shift_norm", "true"), ("downsample_type", "resnet"), ("upsample_type", "resnet")];
    for settings in [&[][..], &of_openai, &[("dropout", "0")]] {
        let mut c = tiny();
        settings.iter().for_each(|(key, value)| _ = c.set(key, value).unwrap());
        let mut of_none = trainer(&c);
        let reports: Vec<StepReport> = (0..3).map(|_| step(&mut of_none)).collect();
        let (unet, specs) = UNet::new(&c.model).unwrap();
        let shape = Shape::new(2, c.model.image_size.h, c.model.image_size.w, c.model.channels);
        let kept = |recompute| -> usize {
            let plan = unet.tape_plan(&Device::cpu(), recompute, &specs, shape).unwrap();
            plan.iter().map(|kept| kept.bytes).sum()
        };
        let mut more = kept(Recompute::None);
        for recompute in [Recompute::Cheap, Recompute::Blocks] {
            let name = format!("{recompute}, {settings:?}");
            let mut trainer = trainer(&Config { recompute, ..c.clone() });
            for want in &reports {
                let got = step(&mut trainer);
                let of = |report: &StepReport| [report.loss, report.grad_norm].map(f64::to_bits);
                assert_eq!(of(&got), of(want), "{name}");
            }
            same_bits(&name, &trainer.params().host().unwrap(), &of_none.params().host().unwrap());
            let bytes = kept(recompute);
            assert!(bytes < more, "{name}: {bytes} bytes are kept, not fewer than {more}");
            more = bytes;
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_with_the_tensor_named() {
    let mut c = tiny();
    c.learning_rate = 1e30;
    c.grad_clip = 0.0;
    let mut trainer = trainer(&c);
    let error = (0..10).find_map(|_| trainer.step().err()).expect("a learning rate of 1e30 diverges").to_string();
    for part in ["step ", "not finite", "learning_rate"] {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

/// [`bars`] with classes, some of the images held out.
fn labelled(c: &Config) -> Data {
    let bars = |count| bars(c, count).train;
    let with_labels = |set: &Dataset| {
        let pixels = (0..set.len()).flat_map(|i| set.image(i).to_vec()).collect();
        Dataset::new(set.extent(), pixels, Some((0..set.len() as u32).map(|i| i * i % 3).collect()))
    };
    let (train, held_out) = (with_labels(&bars(20)), with_labels(&bars(7)));
    Data { train, held_out, classes: Vec::new(), notes: Vec::new(), skipped: Vec::new() }
}

/// Everything a step draws is a function of seed, step and index in the batch, so it can be computed again here, in
/// micro-batches of two.
#[test]
fn a_steps_loss_is_the_papers_over_all_micro_batches() {
    let mut c = tiny();
    c.model.classes = 3;
    c.model.dropout = 0.5;
    c.accumulate = 3;
    let device = Device::cpu();
    let mut trainer = Trainer::new(&c, labelled(&c), &device).unwrap();
    let data = labelled(&c).train;
    for k in 0..3u32 {
        let mut per_image = Vec::new();
        for (first, indices) in (0..).step_by(2).zip(Order::new(c.seed, 20).indices(k, 6).chunks(2)) {
            let labels = indices.iter().map(|&i| (i * i % 3) as u32).collect();
            let batch = Batch::train(c.seed, k, first, indices.to_vec(), true, 100).with_labels(Some(labels));
            let masks = DropoutSeed { seed: c.seed, step: k, first };
            per_image.extend(losses(&device, &trainer, trainer.params(), &data, &batch, Some(masks)));
        }
        let want = per_image.iter().sum::<f64>() / 6.0;
        let got = step(&mut trainer).loss;
        // Six numbers summed in another order.
        assert!((got - want).abs() <= 8.0 * f64::EPSILON * want, "step {k}: loss {got}, expected {want}");
    }
}

/// A whole batch and the same in three micro-batches have the same images, timesteps, noise and dropout masks, so the
/// same loss and gradient but for rounding. Every weight gets a sizeable value: in a fresh network, hardly any gradient
/// passes the last layer.
#[test]
fn micro_batches_have_the_loss_and_the_gradient_of_the_whole_batch() {
    let first_step = |accumulate: usize, dropout: f64| {
        let mut c = Config { accumulate, ..tiny() };
        c.model.dropout = dropout;
        let mut trainer = trainer(&c);
        let mut weights = trainer.params().host().unwrap().into_owned();
        for (k, (p, spec)) in trainer.params().specs().iter().enumerate() {
            let fan_in = (spec.shape.len() / spec.shape.n) as f64;
            let drawn = numbers(k as u64, spec.shape.len());
            weights[trainer.params().specs().range(p)]
                .iter_mut()
                .zip(drawn)
                .for_each(|(w, v)| *w += (v / fan_in.sqrt()) as f32);
        }
        trainer.state_mut().params.write(&weights).unwrap();
        let report = step(&mut trainer);
        (report.loss, report.grad_norm, trainer.state().m.to_vec().unwrap())
    };
    let (loss, norm, m) = first_step(1, 0.3);
    let (loss_3, norm_3, m_3) = first_step(3, 0.3);
    // Losses are f64 sums of what the network computes image by image.
    assert!((loss_3 - loss).abs() <= 8.0 * f64::EPSILON * loss, "loss {loss_3} in micro-batches, {loss} whole");
    // f32 sums over the batch in another order; everything else is computed alike.
    let allowed = support::network::F32;
    assert!((norm_3 - norm).abs() <= allowed * norm, "gradient norm {norm_3} in micro-batches, {norm} whole");
    support::close_to_largest("first moments", &m_3, &m, allowed);
    // The masks matter: without them loss and gradient differ.
    let (loss_0, norm_0, _) = first_step(1, 0.0);
    let felt = (loss_0 - loss).abs() > 1e-5 * loss && (norm_0 - norm).abs() > 1e-2 * norm;
    assert!(felt, "loss and gradient norm {loss} and {norm} with dropout, {loss_0} and {norm_0} without");
}

/// Checks clipping, weight decay, warm-up and averaging by their effect on moments, weights and moving average at the
/// first update.
#[test]
fn the_settings_of_the_optimiser_reach_it() {
    let mut c = tiny();
    c.grad_clip = 0.01;
    c.learning_rate = 1e-2;
    let first_step = |c: &Config| {
        let mut trainer = trainer(c);
        let before = trainer.params().host().unwrap().into_owned();
        let report = step(&mut trainer);
        let m = trainer.state().m.data().iter().map(|m| f64::from(*m).powi(2)).sum::<f64>().sqrt();
        (report, m, before, trainer)
    };
    // m = (1 - 0.9) clip g, and the clipped gradient has the norm grad_clip (f32 roundings of m: far below 1e-5).
    let (report, m, before, clipped) = first_step(&c);
    assert!(report.grad_norm > 0.1, "the gradient has a norm of {}, nothing is clipped", report.grad_norm);
    assert!((m - 0.1 * c.grad_clip).abs() <= 1e-5 * m, "the first moments have the norm {m}");
    let (report, m, ..) = first_step(&Config { grad_clip: 0.0, ..c.clone() });
    assert!((m - 0.1 * report.grad_norm).abs() <= 1e-5 * m, "without clipping: {m} for {}", report.grad_norm);

    // Decay subtracts lr decay w from each weight besides Adam's update. The rate is a third of learning_rate: step 1
    // of 3 of the warm-up.
    let (.., decayed) = first_step(&Config { weight_decay: 0.5, ..c.clone() });
    for ((w, plain), before) in
        decayed.params().host().unwrap().iter().zip(&*clipped.params().host().unwrap()).zip(&before)
    {
        let want = plain - before * (1e-2 / 3.0 * 0.5) as f32;
        assert!((w - want).abs() <= 4.0 * f32::EPSILON * before.abs().max(want.abs()), "{w}, expected {want}");
    }

    // The average starts at the initial weights. The first step moves it 1 - 2/11 of the way to the new ones, or all of
    // the way if the decay is 0.
    for (decay, share) in [(0.9999, 9.0 / 11.0), (0.0, 1.0)] {
        let (.., trainer) = first_step(&Config { ema_decay: decay, ..c.clone() });
        for ((ema, w), before) in
            trainer.ema().unwrap().host().unwrap().iter().zip(&*trainer.params().host().unwrap()).zip(&before)
        {
            let want = before + share * (w - before);
            assert!((ema - want).abs() <= 4.0 * f32::EPSILON * want.abs().max(w.abs()), "{ema}, expected {want}");
        }
    }
}

#[test]
fn the_learning_rate_warms_up_from_the_first_step_on() {
    let c = Config { warmup_steps: 3, learning_rate: 0.75, grad_clip: 1e-9, ..tiny() };
    let mut first = trainer(&c);
    assert_eq!([(); 4].map(|()| step(&mut first).learning_rate), [0.25, 0.5, 0.75, 0.75]);
    let mut cold = trainer(&Config { warmup_steps: 0, ..c });
    assert_eq!(step(&mut cold).learning_rate, 0.75);
}

/// The last three of five steps, and one that a library's user takes beyond them.
#[test]
fn the_learning_rate_cools_down_to_the_planned_end() {
    let c = Config { steps: 5, warmup_steps: 2, cooldown: 0.6, learning_rate: 0.75, grad_clip: 1e-9, ..tiny() };
    let mut cooled = trainer(&c);
    assert_eq!([(); 6].map(|()| step(&mut cooled).learning_rate), [0.375, 0.75, 0.75, 0.5, 0.25, 0.25]);
    let mut whole = trainer(&Config { steps: 4, warmup_steps: 0, cooldown: 1.0, ..c });
    assert_eq!([(); 4].map(|()| step(&mut whole).learning_rate), [0.75, 0.5625, 0.375, 0.1875]);
}

/// Seven held-out images, validated in micro-batches of three, computed again in one batch: with the moving average,
/// not the weights.
#[test]
fn the_validation_loss_is_the_moving_averages_on_held_out_images() {
    let mut c = tiny();
    c.model.classes = 3;
    c.learning_rate = 0.05;
    let device = Device::cpu();
    let mut trainer = Trainer::new(&c, labelled(&c), &device).unwrap();
    for _ in 0..5 {
        trainer.step().unwrap();
    }
    let held_out = labelled(&c).held_out;
    let labels = held_out.labels().map(<[u32]>::to_vec);
    let batch = Batch::validation(c.seed, 0, (0..7).collect(), 100).with_labels(labels);
    let losses = |params| losses(&device, &trainer, params, &held_out, &batch, None);
    let average = trainer.ema().unwrap();
    let mut want = Quarters::default();
    want.add(&batch.t(), batch.timesteps, &losses(&average));
    assert_eq!(trainer.validate(&AtomicBool::new(false)).unwrap().quarters, want);
    assert_ne!(losses(trainer.params()), losses(&average), "weights and average are too alike for this test");
}

/// A run of this objective on `device`: the weights after `steps` steps, resumed after `resumed` of them, and the last
/// report.
fn objective_run(c: &Config, device: &Device, steps: u32, resumed: Option<u32>) -> (Vec<f32>, StepReport) {
    let mut trainer = Trainer::new(c, labelled(c), device).unwrap();
    let mut last = None;
    for done in 0..steps {
        if resumed == Some(done) {
            let folder = tempfile::tempdir().unwrap();
            checkpoint::save(folder.path(), c, trainer.state()).unwrap();
            trainer = Trainer::new(c, labelled(c), device).unwrap();
            let saved = checkpoint::newest(folder.path()).unwrap().unwrap();
            checkpoint::restore(&saved, trainer.state_mut()).unwrap();
        }
        trainer.step().unwrap();
        last = trainer.reports().unwrap().pop();
    }
    (trainer.params().host().unwrap().into_owned(), last.unwrap())
}

/// A trainer of a learned schedule, every weight of a sizeable value, so that its output depends on x_t.
fn learner(c: &Config) -> Trainer {
    let mut trainer = Trainer::new(c, labelled(c), &Device::cpu()).unwrap();
    let mut weights = trainer.params().host().unwrap().into_owned();
    for (k, (p, spec)) in trainer.params().specs().iter().enumerate() {
        let fan_in = (spec.shape.len() / spec.shape.n) as f64;
        let drawn = numbers(k as u64, spec.shape.len());
        let range = trainer.params().specs().range(p);
        weights[range].iter_mut().zip(drawn).for_each(|(w, v)| *w += (v / fan_in.sqrt()) as f32);
    }
    trainer.state_mut().params.write(&weights).unwrap();
    trainer
}

fn learned(variance: &str) -> Config {
    let mut c = tiny();
    c.model.classes = 3;
    c.diffusion.timesteps = 12;
    let sets = [("schedule", "learned"), ("loss", "vlb"), ("variance", variance), ("timestep_sampling", "stratified")];
    for (key, value) in sets {
        c.set(key, value).unwrap();
    }
    c.validate().unwrap();
    c
}

/// What a step takes for the derivative by the schedule's parameters (Adam's first moments are a tenth of it) against
/// differences of the step's loss and L_T, through the network, whose x_t moves with the schedule.
///
/// The network errs by f32's roundings, some 1e-6 of the loss; over 2h = 0.04 that is 3e-5 of it. Beside that, 1 % of
/// the largest derivative is far more than h^2/6 of a third one.
#[test]
fn a_step_has_the_derivative_of_its_loss_by_the_schedule() {
    const H: f32 = 0.02;
    for variance in ["fixed_large", "learned_range"] {
        let c = learned(variance);
        let first_step = |moved: Option<(usize, f32)>| {
            let mut trainer = learner(&c);
            let curve = trainer.state_mut().curve.expect("a schedule in training");
            curve.change(|[theta, ..]| moved.into_iter().for_each(|(k, by)| theta[k] += by));
            let objective = c.objective().unwrap().on(&curve.schedule());
            let data = labelled(&c).train;
            let prior = (0..data.len()).map(|i| objective.prior(data.image(i))).sum::<f64>() / data.len() as f64;
            let loss = step(&mut trainer).loss + prior;
            (loss, trainer.curve().expect("the same").state()[2].to_vec())
        };
        let (loss, moments) = first_step(None);
        let derived: Vec<f64> = moments.iter().map(|m| 10.0 * f64::from(*m)).collect();
        let largest = derived.iter().fold(0.0f64, |largest, slope| largest.max(slope.abs()));
        assert!(largest > 1e-2 * loss, "{variance}: the loss of {loss} hardly depends on the schedule: {derived:?}");
        for k in [0, 1, 2, 6, 12] {
            let [above, below] = [H, -H].map(|h| first_step(Some((k, h))).0);
            // The parameter is an f32 and does not move by h exactly.
            let theta = Curve::new(12).theta()[k] as f32;
            let quotient = (above - below) / f64::from((theta + H) - (theta - H));
            let budget = 3e-5 * loss + 0.01 * largest;
            let error = (quotient - derived[k]).abs();
            assert!(error <= budget, "{variance}, {k}: {}, differences say {quotient} +- {budget}", derived[k]);
        }
    }
}

/// A resumed run of a learned schedule has the bits of a whole one, so has one with other threads, and micro-batches
/// have the gradient of the whole batch but for rounding. Validation is that of the moving average, which differs.
#[test]
fn a_learned_schedule_resumes_with_the_same_bits() {
    let c = learned("fixed_large");
    let run = |resumed: Option<u32>, threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = learner(&c);
            for done in 0..8 {
                if resumed == Some(done) {
                    let folder = tempfile::tempdir().unwrap();
                    let path = checkpoint::save(folder.path(), &c, trainer.state()).unwrap();
                    trainer = learner(&c);
                    checkpoint::restore(&path, trainer.state_mut()).unwrap();
                    let table = checkpoint::describe(&path).unwrap().config.diffusion.noise_schedule().unwrap();
                    assert_eq!(&table, &*trainer.schedule(), "the table of the checkpoint");
                }
                step(&mut trainer);
            }
            let validated = trainer.validate(&AtomicBool::new(false)).unwrap().vlb.expect("the loss is the bound");
            (trainer.params().host().unwrap().into_owned(), trainer.curve().unwrap().clone(), validated)
        })
    };
    let (weights, curve, validated) = run(None, 2);
    assert_ne!(curve.schedule(), curve.average(), "schedule and average are too alike for this test");
    assert_ne!(curve.average(), Curve::new(12).schedule());
    for (resumed, threads) in [(Some(1), 2), (Some(5), 2), (None, 1), (None, 3)] {
        let (again, same, also) = run(resumed, threads);
        same_bits(&format!("resumed after {resumed:?}, {threads} threads"), &again, &weights);
        assert_eq!((same, also), (curve.clone(), validated));
    }
    let moments = |accumulate: usize| {
        let mut trainer = learner(&Config { accumulate, ..c.clone() });
        step(&mut trainer);
        trainer.curve().unwrap().state()[2].to_vec()
    };
    support::close_to_largest("in micro-batches", &moments(3), &moments(1), support::network::F32);
}

/// Every way to train: resumed runs have the bits of whole ones, also while timesteps are drawn by their losses;
/// reports have the bound where the loss has one.
#[test]
fn every_objective_resumes_with_the_same_bits() {
    let mut base = tiny();
    base.model.classes = 3;
    // Three timesteps have their ten losses after six or seven steps of six images.
    base.diffusion.timesteps = 3;
    let sets: [&[(&str, &str)]; 4] = [
        &[("loss", "vlb"), ("timestep_sampling", "importance")],
        &[("loss", "hybrid"), ("variance", "learned_range"), ("prediction", "v"), ("timestep_sampling", "importance")],
        &[("loss", "min_snr"), ("prediction", "x0"), ("timestep_sampling", "stratified"), ("label_dropout", "0.3")],
        &[("timestep_sampling", "importance")],
    ];
    for settings in sets {
        let mut c = base.clone();
        for (key, value) in settings {
            c.set(key, value).unwrap();
        }
        c.validate().unwrap();
        let (want, report) = objective_run(&c, &Device::cpu(), 14, None);
        assert_eq!(report.vlb.is_some(), c.loss.has_bound(), "{settings:?}");
        assert!(want.iter().all(|w| w.is_finite()), "{settings:?}");
        for resumed in [1, 5, 12] {
            let (got, again) = objective_run(&c, &Device::cpu(), 14, Some(resumed));
            same_bits(&format!("{settings:?}, resumed after {resumed}"), &got, &want);
            assert_eq!((again.loss, again.vlb), (report.loss, report.vlb));
        }
        // Timesteps drawn by losses, spread evenly or dropped labels are not the weights of uniform ones.
        c.timestep_sampling = ddpm_cuda::diffusion::Sampling::Uniform;
        c.set("label_dropout", "0").unwrap();
        assert_ne!(objective_run(&c, &Device::cpu(), 14, None).0, want, "{settings:?}");
    }
}
