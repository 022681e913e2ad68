//! Sampling: an image is a function of its seed, index and class.

mod support;

use std::cell::Cell;

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::npy;
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::sampler::{Before, Corrector, Guidance, Limit, Samples, inversion};
use ddpm_cuda::diffusion::{Kind, Method, Prediction, Sampler, Schedule, Spacing, Variance};
use ddpm_cuda::memory::available_on;
use ddpm_cuda::ops::sample_step::{Noise, reference, start_from};
use ddpm_cuda::params::Params;
use ddpm_cuda::rng::reference::normals;
use ddpm_cuda::sample::encode::encode;
use ddpm_cuda::sample::inpaint::{Move, Painting, moves};
use ddpm_cuda::sample::interpolate::{lambdas, mixtures};
use ddpm_cuda::sample::{Call, Conditional, Drawing, Request, Reverse, Shared, class_called, memory_of_forward};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::UNet;

use num_traits::{Float, FloatConst};
use safetensors::SafeTensors;
use support::{close_but_for, gpu, network, numbers, places, same_bits, to_f32};

/// More images than one batch holds, with a class-conditional network of random weights.
#[test]
fn an_image_depends_on_its_seed_index_and_class_alone() {
    let device = Device::cpu();
    let model = checkpoint::load(&device, &places::fixture("unet_rgb16"));
    let model = model.unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let schedule = Schedule::new(model.config.diffusion.schedule, 1000).unwrap();
    let sampler = Sampler::new(&schedule, Method::Ddim { eta: 1.0 }, Spacing::Even, 2).unwrap();
    let draw = |seed: u64, labels: &[u32]| {
        let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed };
        assert_eq!(drawing.batch(), 64, "the number drawn together that this test is made for");
        let bytes = drawing.images(0..labels.len(), Some(labels), |_| Ok(())).unwrap();
        bytes.chunks_exact(16 * 16 * 3).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let in_turn: Vec<u32> = (0..66).map(|i| i % 10).collect();
    let images = draw(1, &in_turn);
    for i in 0..66 {
        assert!(images[..i].iter().all(|other| *other != images[i]), "image {i} is one of those before it");
    }
    let fives = draw(1, &[5; 66]);
    for i in 0..66 {
        assert!(fives[..i].iter().all(|other| *other != fives[i]), "image {i} of class 5 is one of those before it");
        assert_eq!(fives[i] == images[i], in_turn[i] == 5, "image {i}, of class 5 and of class {}", in_turn[i]);
    }
    assert_eq!(draw(1, &in_turn[..3]), images[..3], "the number of images changes them");
    let other = draw(2, &in_turn);
    assert!((0..66).all(|i| other[i] != images[i]), "another seed, the same image");
}

/// Alone, with one other and with two others.
#[test]
fn on_a_gpu_an_image_does_not_depend_on_those_drawn_with_it() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let device = Device::Cuda(gpu);
        let path = places::fixture("unet_rgb16");
        let model = checkpoint::load(&device, &path).unwrap();
        let (unet, _) = UNet::new(&model.config.model).unwrap();
        let schedule = Schedule::new(model.config.diffusion.schedule, 1000).unwrap();
        let sampler = Sampler::new(&schedule, Method::Ddim { eta: 1.0 }, Spacing::Even, 2).unwrap();
        let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed: 1 };
        let draw = |count: usize| drawing.images(0..count, Some(&[3, 1, 4][..count]), |_| Ok(())).unwrap();
        let (one, two, three) = (draw(1), draw(2), draw(3));
        assert_eq!((one.len(), &three[..one.len()]), (16 * 16 * 3, &one[..]), "{dtype:?}: one of three and alone");
        assert_eq!(three[..two.len()], two, "{dtype:?}: two of three");
        assert_ne!(three[..one.len()], three[one.len()..two.len()], "{dtype:?}: two images are the same");
    }
}

/// Two waves of tiles at the coarsest level, unless less memory is free than they take.
#[test]
fn on_a_gpu_images_are_drawn_together_until_they_fill_it_or_its_memory() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu);
    let sampler =
        Sampler::new(&Schedule::new(Kind::Linear, 1000).unwrap(), Method::Ddim { eta: 0.0 }, Spacing::Even, 1).unwrap();
    let batch = |preset: Preset, side: usize, channels: usize| {
        let mut model = Config::preset(preset).model;
        (model.image_size, model.channels) = (Size::square(side), channels);
        let (unet, specs) = UNet::new(&model).unwrap();
        // Only shapes matter.
        let params = Params::zeros(&device.meta(), specs).unwrap();
        let drawing = Drawing { device: &device, unet: &unet, params: &params, sampler: &sampler, seed: 0 };
        let needed = |n: usize| memory_of_forward(&device, &unet, &params, drawing.shape(n)).unwrap();
        (drawing.batch(), needed(drawing.batch()), needed(2 * drawing.batch()))
    };
    let available = available_on(&device).unwrap();
    // 7x7 pixels of 64 channels: one tile for 64 pixels, of which an H100 computes 132 x 8 at a time.
    let (images, needed, _) = batch(Preset::Mnist, 28, 1);
    assert_eq!(images, (2 * 132 * 8 * 64usize).div_ceil(49));
    assert!(needed <= available, "{needed} of {available} bytes");
    let (images, needed, twice) = batch(Preset::CelebaHq256, 256, 3);
    assert!(images < (2 * 132 * 8usize).div_ceil(8), "{images} images");
    assert!(
        needed <= available && available < twice,
        "{images} images: {needed} of {available} bytes, {twice} for two"
    );
}

#[test]
fn a_class_is_called_by_its_name_or_its_number() {
    let names: Vec<String> = ["cat", "3", "dog", "owl", "owl"].map(String::from).into();
    let called = |text: &str| class_called(text, &names, 6).map_err(|e| e.to_string());
    assert_eq!(called("cat"), Ok(0));
    assert_eq!(called("3"), Ok(1), "the name comes before the number");
    assert_eq!((called("2"), called("5")), (Ok(2), Ok(5)), "a class without a name has its number");
    assert_eq!(called("owl").unwrap_err(), "--class owl: the classes 3 and 4 are both called so; give the number");
    let all = "this model has the classes 0 to 5:";
    assert_eq!(called("6").unwrap_err(), format!("--class 6: {all} 1 3, 0 cat, 2 dog, 3 owl, 4 owl"));
    assert_eq!(called("Dgo").unwrap_err(), format!("--class Dgo: {all} 2 dog, 0 cat, 1 3, 3 owl, 4 owl"));
    called("-1").unwrap_err();
    let many: Vec<String> = (0..1000).map(|k| format!("class {k}")).collect();
    let said = class_called("clas 999", &many, 1000).unwrap_err().to_string();
    assert!(said.contains(": 999 class 999, ") && said.ends_with(" and 990 more"), "{said}");
    let bare = |text: &str, classes| class_called(text, &[], classes).unwrap_err().to_string();
    assert_eq!(bare("cat", 10), "--class cat: this model has the classes 0 to 9, without names");
    assert_eq!(bare("cat", 0), "--class cat: this model is unconditional, leave --class out");
    assert_eq!(class_called("9", &[], 10).unwrap(), 9);
}

/// The estimate grows with the images and is of the order of what the pool holds after drawing.
#[test]
fn the_memory_of_a_forward_pass_is_foreseen() {
    let device = Device::cpu();
    let model = checkpoint::load(&device, &places::fixture("unet_gray16"));
    let model = model.unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let foreseen = |n, side| memory_of_forward(&device, &unet, &model.params, Shape::new(n, side, side, 1)).unwrap();
    let before = device.pool_stats().held;
    let schedule = model.config.diffusion.noise_schedule().unwrap();
    let sampler = Sampler::new(&schedule, Method::Ddim { eta: 0.0 }, Spacing::Even, 1).unwrap();
    let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed: 0 };
    drawing.images(0..64, None, |_| Ok(())).unwrap();
    let held = device.pool_stats().held - before;
    let share = foreseen(64, 16) as f64 / held as f64;
    assert!((0.2..=1.5).contains(&share), "foreseen {} bytes, held {held}", foreseen(64, 16));
    assert!(foreseen(1, 65_536) > 1 << 40, "{}", foreseen(1, 65_536));
}

/// A network in closed form: `0.6 tanh x + 0.1 sin 3x`, less 0.2 for images without a class; of a doubled output
/// `cos 2x / 2` in the second half of channels.
fn closed<T: Float>(x: T, with: bool) -> [T; 2] {
    let number = |v: f64| T::from(v).unwrap();
    let y = number(0.6) * x.tanh() + number(0.1) * (number(3.0) * x).sin();
    [if with { y } else { y - number(0.2) }, number(0.5) * (number(2.0) * x).cos()]
}

/// The same on a device, of as many images as there are, in halves.
fn on_device(device: &Device, call: &Call<'_>, doubled: bool) -> Tensor {
    let shape = call.x.shape();
    let half = shape.len() / call.halves;
    let x = call.x.to_vec().unwrap();
    let mut y = Vec::new();
    for (k, pixel) in x.chunks_exact(shape.c).enumerate() {
        let both: Vec<[f32; 2]> = pixel.iter().map(|&x| closed(x, k * shape.c < half)).collect();
        y.extend(both.iter().map(|b| b[0]));
        if doubled {
            y.extend(both.iter().map(|b| b[1]));
        }
    }
    let shape = Shape { c: if doubled { 2 * shape.c } else { shape.c }, ..shape };
    Tensor::from_slice_as(device, device.activations(), shape, &y).unwrap()
}

/// The whole reverse process of one image by the references.
fn by_reference<T: Float + FloatConst>(
    sampler: &Sampler,
    samples: Samples,
    shared: Option<Shared>,
    len: usize,
) -> Vec<T> {
    let noise = |streams, common: bool| {
        let row = shared.filter(|_| common).map_or(1, |shared| shared.row);
        normals::<T>(&Noise { streams, row }.image(0), 0, len)
    };
    let output = |x: &[T], guidance: Option<Guidance>| {
        let [with, without] = [true, false].map(|with| x.iter().map(|&x| closed(x, with)[0]).collect::<Vec<T>>());
        guidance.map_or(with.clone(), |guidance| reference::guided(&with, &without, guidance))
    };
    let (mut x, mut past) = (noise(samples.start(), true), (Vec::new(), Vec::new()));
    for (i, step) in sampler.steps().iter().enumerate() {
        let y = output(&x, sampler.guidance(step.level));
        let v: Vec<T> = x.iter().map(|&x| closed(x, true)[1]).collect();
        let z = noise(samples.noise(step.t), shared.is_some_and(|shared| step.t > shared.until));
        let before = match step.before {
            Before::Nothing => Vec::new(),
            Before::X0 => past.1.clone(),
            Before::State => past.0.clone(),
        };
        let image = reference::Image { x: &x, output: &y, v: &v, before: &before, gradient: &[], z: &z };
        let (next, x_0) = reference::step_of(image, step);
        past = (x, x_0);
        x = next;
        let Some((corrector, correction)) = sampler.correction(i) else { continue };
        for round in 0..corrector.steps {
            let y = output(&x, sampler.guidance(correction.level));
            let streams = samples.correction(correction.t, round, corrector.steps);
            let z = noise(streams, shared.is_some_and(|shared| correction.t >= shared.until));
            let image = reference::Image { x: &x, output: &y, v: &[], before: &[], gradient: &[], z: &z };
            x = reference::correct(image, correction, corrector);
        }
    }
    x
}

/// A pipeline of diffusers' draws the same from the same noise with checkpoints that `ddpm-cuda train` wrote
/// (`fixtures/drawn/make_io.py`): x after every step. So does the program, in bytes, without being told more than steps
/// and seed: its defaults are what the schedulers say. The files are those that today's program writes.
///
/// A learned range is that of the steps that are taken in both, and neither adds noise at the last step, where
/// diffusers takes the variance 0 for 1e-20. In one thing diffusers differs, which is why DDIM is drawn with trailing
/// timesteps: its DDIM takes T/N off a timestep for the next, whatever the spacing, so that with the "linspace" of our
/// schedulers its steps end at other levels than the next ones start from.
///
/// What is allowed: the network errs by [`network::F32`] of its largest output, noise by 1e-6, and x by ten roundings
/// of at most 6.77. An error of the output reaches x by the step's factors, one of the variance by that of its
/// logarithm, of noise below 6.77; a step passes on at most the error that it starts with, and adds one of its own,
/// independent of it.
#[test]
fn diffusers_draws_the_same_with_our_checkpoints() {
    let device = Device::cpu_guarded();
    let (small, large) = (Method::Ancestral(Variance::FixedSmall), Method::Ancestral(Variance::FixedLarge));
    let ddim = Method::Ddim { eta: 0.0 };
    for (name, key, flags, method, spacing, other) in [
        (
            "learned_range",
            "ancestral",
            "",
            Method::Ancestral(Variance::LearnedRange),
            Spacing::Even,
            (small, Spacing::Even),
        ),
        ("v", "ancestral", "", small, Spacing::Even, (large, Spacing::Even)),
        ("v", "ddim", "--sampler ddim --spacing trailing", ddim, Spacing::Trailing, (ddim, Spacing::Even)),
    ] {
        let folder = places::fixture("drawn").join(name);
        let bytes = std::fs::read(folder.join("io.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let golden = |key: &str| bytemuck::pod_collect_to_vec::<u8, f32>(golden.tensor(key).unwrap().data());
        let model = checkpoint::load(&device, &folder).unwrap();
        support::assert_written_alike(&model, &folder);
        let (unet, _) = UNet::new(&model.config.model).unwrap();
        let schedule = model.config.diffusion.noise_schedule().unwrap();
        let sampler = |(method, spacing): (Method, Spacing)| {
            let kept = spacing.timesteps(schedule.len(), 10).unwrap();
            Sampler::over(&schedule, model.config.diffusion.prediction, method, &kept).unwrap()
        };
        // One channel: the order of numbers is the same with channels first and last.
        let shape = Shape::new(3, 12, 8, 1);
        let samples = Samples { seed: 5, first: 0 };
        let x_t = start_from(&device, shape, Noise::own(samples.start()), 1).unwrap().x;
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
        support::worst("x_T", x_t.data(), &wide(&golden("x_t")), |_| 1e-6);

        let network = Conditional::new(&device, &unet, &model.params, None, false).unwrap();
        let draw = |sampler: &Sampler| {
            let largest = Cell::new(0.0);
            let mut after = Vec::new();
            let mut allowed = 1e-6;
            let reverse = Reverse {
                device: &device,
                sampler,
                shape,
                samples,
                start: None,
                shared: None,
                x_0: false,
                replays: false,
            };
            let asked = |call: Call<'_>| {
                let y = network.call(call)?;
                largest.set(y.data().iter().fold(0.0, |m: f64, y| m.max(f64::from(y.abs()))));
                Ok(y)
            };
            reverse
                .run(asked, None, |p| {
                    let step = &sampler.steps()[p.done - 1];
                    let of_output = network::F32 * largest.get();
                    let of_noise = step.learned.map_or(0.0, |learned| 0.5 * learned.factor * of_output);
                    let of_noise = if step.sigma > 0.0 { 6.77 * of_noise + 1e-6 } else { 0.0 };
                    let roundings = 10.0 * 6.77 * support::F32_ROUNDING;
                    allowed =
                        f64::hypot(allowed, (step.c_x0 * step.x0_output).abs() * of_output + of_noise + roundings);
                    after.push((step.t, p.x.to_vec()?, allowed));
                    Ok(())
                })
                .unwrap();
            after
        };
        let want = golden(key);
        let drawn = draw(&sampler((method, spacing)));
        assert_eq!(want.len(), drawn.len() * shape.len());
        for ((t, x, allowed), want) in drawn.iter().zip(want.chunks_exact(shape.len())) {
            let share = support::worst(&format!("{name}, {key}: after {t}"), x, &wide(want), |_| *allowed);
            println!("{name}, {key}: after {t} {share:.3} of {allowed:.1e}");
        }
        let (last, allowed) = (&want[want.len() - shape.len()..], drawn.last().unwrap().2);
        let off =
            draw(&sampler(other)).pop().unwrap().1.iter().zip(last).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(f64::from(off) > 100.0 * allowed, "{name}, {key}: {other:?} is off by {off:e} alone");

        let out = tempfile::tempdir().unwrap();
        let npz = out.path().join("x.npz");
        let mut program = std::process::Command::new(places::program());
        program.args("sample --steps 10 --seed 5 --count 3 --device cpu".split(' ')).args(flags.split_whitespace());
        let said = program.arg("--model").arg(&folder).arg("--out").arg(&npz).output().unwrap();
        assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        let pixels = npy::parse_npz(&std::fs::read(&npz).unwrap()).unwrap().swap_remove(0).1.into_u8().unwrap();
        let pixels: Vec<f32> = pixels.iter().map(|&byte| f32::from(byte)).collect();
        let levels: Vec<f64> = last.iter().map(|&x| (f64::from(x) + 1.0) * 127.5).collect();
        support::worst(&format!("{name}, {key}: bytes"), &pixels, &levels, |_| 0.5 + 127.5 * allowed);
    }
}

fn samplers() -> Vec<(&'static str, Sampler, Option<Shared>)> {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let over = |prediction, method, kept: &[u32]| Sampler::over(&s, prediction, method, kept).unwrap();
    let kept = Spacing::Even.timesteps(1000, 8).unwrap();
    let small = Method::Ancestral(Variance::FixedSmall);
    let guidance = Guidance::new(2.0).unwrap().rescaled(0.7).unwrap().within(0.3, 20.0).unwrap();
    let corrector = Corrector { steps: 2, snr: 0.1 };
    vec![
        ("dpm++", Sampler::new(&s, Method::DpmPp, Spacing::Even, 8).unwrap(), None),
        ("heun", Sampler::heun_over_levels(&s, Prediction::V, 6).unwrap(), None),
        ("guided", over(Prediction::V, Method::Ddim { eta: 0.3 }, &kept).guided(guidance), None),
        ("corrected", over(Prediction::X0, small, &kept).guided(guidance).corrected(corrector).unwrap(), None),
        (
            "shared",
            over(Prediction::X0, small, &kept).corrected(corrector).unwrap(),
            Some(Shared { row: 3, until: 428 }),
        ),
        ("learned range", over(Prediction::V, Method::Ancestral(Variance::LearnedRange), &kept), None),
        ("thresholded", over(Prediction::V, small, &kept).limited(Limit::quantile(0.95).unwrap()), None),
    ]
}

/// Every sampler on every device follows the references in f64, and an image does not depend on its batch.
///
/// A step's own error is measured by the reference in f32. The exponentials of a learned variance err by 2 ulp, four
/// roundings, of noise below 1 in each of 8 steps, of which each passes on at most its whole error.
#[test]
fn every_sampler_follows_the_reference_on_every_device() {
    let shape = Shape::new(3, 5, 7, 3);
    let image = shape.len() / 3;
    for (name, sampler, shared) in samplers() {
        let doubled = sampler.steps()[0].learned.is_some();
        let run = |device: &Device, shape: Shape, first: u32| {
            let samples = Samples { seed: 5, first };
            let reverse =
                Reverse { device, sampler: &sampler, shape, samples, start: None, shared, x_0: true, replays: false };
            let (mut told, mut images) = (0, 0);
            let x = reverse.run(
                |call| Ok(on_device(device, &call, doubled)),
                None,
                |p| {
                    told += 1;
                    images += usize::from(p.x_0.is_some());
                    assert_eq!((p.done, p.total), (told, sampler.calls()));
                    Ok(())
                },
            );
            assert_eq!(told, sampler.calls(), "{name}: network passes");
            assert_eq!(images, sampler.steps().len(), "{name}: predictions of x_0");
            x.unwrap().to_vec().unwrap()
        };
        let each = |device: &Device| {
            let x = run(device, shape, 7);
            for i in 0..3 {
                let alone = run(device, Shape { n: 1, ..shape }, 7 + i as u32);
                same_bits(&format!("{name}: image {i} alone"), &alone, &x[i * image..(i + 1) * image]);
            }
            if device.activations() == DType::F32 {
                let samples = |i: u32| Samples { seed: 5, first: 7 + i };
                let oracle: Vec<f64> = (0..3).flat_map(|i| by_reference(&sampler, samples(i), shared, image)).collect();
                let yardstick: Vec<f32> =
                    (0..3).flat_map(|i| by_reference(&sampler, samples(i), shared, image)).collect();
                let allowance = if doubled { 8.0 * 4.0 * 6.77 * support::F32_ROUNDING } else { 0.0 };
                let share = close_but_for(name, &x, &oracle, &yardstick, allowance);
                println!("{name} on {device}: {share:.2} of the budget");
            }
            x
        };
        each(&Device::cpu_guarded());
        gpu::each(name, each);
    }
}

/// Images 6, 7 and 8 are a row: with all noise in common they are equal, and with x_T alone they are not.
#[test]
fn a_row_shares_its_noise() {
    let device = Device::cpu();
    let (_, sampler, _) = samplers().swap_remove(4);
    let draw = |until: u32| {
        let samples = Samples { seed: 1, first: 5 };
        let shared = Some(Shared { row: 3, until });
        let shape = Shape::new(5, 4, 4, 1);
        let reverse = Reverse {
            device: &device,
            sampler: &sampler,
            shape,
            samples,
            start: None,
            shared,
            x_0: false,
            replays: false,
        };
        let x = reverse.run(|call| Ok(on_device(&device, &call, false)), None, |_| Ok(())).unwrap();
        x.data().chunks_exact(16).map(<[f32]>::to_vec).collect::<Vec<_>>()
    };
    let all = draw(0);
    assert!(all[1] == all[2] && all[2] == all[3] && all[0] != all[1] && all[3] != all[4]);
    let start = draw(999);
    assert!((0..4).all(|i| start[i] != start[i + 1]));
}

/// A classifier in closed form whose log probability is -|x - 2|^2 / 2 draws the samples towards 2, and more with its
/// scale, also from the noise of a cosine schedule, in which a shift of eps is one of x_0 by thousands.
#[test]
fn a_gradient_moves_the_samples() {
    let device = Device::cpu();
    let kept = Spacing::Even.timesteps(1000, 20).unwrap();
    let ddim = Method::Ddim { eta: 0.0 };
    for (kind, method) in [
        (Kind::Linear, Method::Ancestral(Variance::FixedLarge)),
        (Kind::Linear, ddim),
        (Kind::Cosine, ddim),
        (Kind::Cosine, Method::DpmPp),
    ] {
        let s = Schedule::new(kind, 1000).unwrap();
        let sampler = Sampler::over(&s, Prediction::X0, method, &kept).unwrap();
        let mean = |scale: f64| {
            let shape = Shape::new(4, 3, 3, 1);
            let samples = Samples { seed: 1, first: 0 };
            let reverse = Reverse {
                device: &device,
                sampler: &sampler,
                shape,
                samples,
                start: None,
                shared: None,
                x_0: true,
                replays: false,
            };
            let mut gradient = |x: &Tensor, _: f32| {
                let slope: Vec<f32> = x.data().iter().map(|x| 2.0 - x).collect();
                Tensor::from_slice(&device, x.shape(), &slope)
            };
            let network = |call: Call<'_>| Ok(on_device(&device, &call, false));
            let x = reverse.run(network, Some((&mut gradient, scale)), |progress| {
                let x_0 = progress.x_0.expect("it is asked for").data();
                let clipped = x_0.iter().all(|x_0| x_0.abs() <= 1.0);
                // Where x_t is noise alone the shift is without measure, and elsewhere it is taken as it is.
                assert!(clipped || sampler.steps()[progress.done - 1].level < 164.0, "{kind:?}, {method:?}: {x_0:?}");
                Ok(())
            });
            x.unwrap().data().iter().sum::<f32>() / 36.0
        };
        let means = [0.0, 0.05, 0.2].map(mean);
        assert!(means[0] + 0.01 < means[1] && means[1] + 0.01 < means[2], "{kind:?}, {method:?}: {means:?}");
    }
}

/// What encodes and then decodes comes back, on every device.
#[test]
fn encoded_images_come_back() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept = Spacing::Even.timesteps(1000, 50).unwrap();
    // eps of a network that knows every pixel to be N(0.1, 0.25).
    let network = |device: &Device, x: &Tensor, t: f32| {
        let (signal, noise) = s.q_sample_coefficients(t as usize);
        let eps = |&x: &f32| {
            let variance = signal * signal * 0.25 + noise * noise;
            (noise * (f64::from(x) - signal * 0.1) / variance) as f32
        };
        let eps: Vec<f32> = x.to_vec()?.iter().map(eps).collect();
        Tensor::from_slice_as(device, device.activations(), x.shape(), &eps)
    };
    let sampler = Sampler::over(&s, Prediction::Eps, Method::Ddim { eta: 0.0 }, &kept).unwrap().unclipped();
    let shape = Shape::new(2, 3, 5, 1);
    let steps = inversion(&s, Prediction::Eps, &kept, 15).unwrap();
    let pixels = to_f32(&numbers(1, shape.len()));
    let back = |device: &Device, rounds: u32| {
        let x_0 = Tensor::from_slice(device, shape, &pixels).unwrap();
        let mut calls = 0;
        let x_t = encode(
            device,
            &steps,
            rounds,
            &x_0,
            |x, t| network(device, x, t),
            || {
                calls += 1;
                Ok(())
            },
        );
        assert_eq!(calls, 50 * (rounds + 1));
        let start = Tensor::from_slice(device, shape, &x_t.unwrap().x_t).unwrap();
        let samples = Samples { seed: 0, first: 0 };
        let reverse = Reverse {
            device,
            sampler: &sampler,
            shape,
            samples,
            start: Some(&start),
            shared: None,
            x_0: false,
            replays: false,
        };
        let x = reverse.run(|call| network(device, call.x, call.t), None, |_| Ok(())).unwrap().to_vec().unwrap();
        let off = x.iter().zip(&pixels).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
        (x, off)
    };
    let (_, naive) = back(&Device::cpu(), 0);
    let (_, off) = back(&Device::cpu(), 10);
    assert!(naive > 1e-3 && off < 1e-4, "off by {naive} without iteration and by {off} with it");
    let want = back(&Device::cpu(), 3).0;
    gpu::each("encode", |device| {
        let (x, off) = back(device, 3);
        assert!(off < if device.activations() == DType::F32 { 1e-3 } else { 0.1 }, "off by {off}");
        if gpu::cpu_fuses() && device.activations() == DType::F32 {
            same_bits("encoded and decoded", &x, &want);
        }
        x
    });
}

/// The last step of a cosine schedule leads from sigma 32 to 20,291. What leads there comes back all the same.
#[test]
fn images_encoded_up_to_noise_alone_come_back() {
    let device = Device::cpu();
    let s = Schedule::new(Kind::Cosine, 1000).unwrap();
    let kept = Spacing::Even.timesteps(1000, 50).unwrap();
    // x_0 of a network that knows every pixel to be N(0.1, 0.25).
    let network = |x: &Tensor, t: f32| {
        let (signal, noise) = s.q_sample_coefficients(t as usize);
        let gain = signal * 0.25 / (signal * signal * 0.25 + noise * noise);
        let x_0: Vec<f32> = x.data().iter().map(|&x| (0.1 + gain * (f64::from(x) - signal * 0.1)) as f32).collect();
        Tensor::from_slice(&device, x.shape(), &x_0)
    };
    let shape = Shape::new(1, 28, 28, 1);
    let pixels = to_f32(&numbers(1, shape.len()));
    let steps = inversion(&s, Prediction::X0, &kept, shape.len()).unwrap();
    let sampler = Sampler::over(&s, Prediction::X0, Method::Ddim { eta: 0.0 }, &kept).unwrap().unclipped();
    let x_0 = Tensor::from_slice(&device, shape, &pixels).unwrap();
    let encoded = encode(&device, &steps, 3, &x_0, &network, || Ok(())).unwrap();
    assert!(encoded.moved < 0.05, "at {} x moved by {}", encoded.at, encoded.moved);
    let once = encode(&device, &steps, 0, &x_0, &network, || Ok(())).unwrap();
    assert!(once.moved > 5.0 * encoded.moved, "{} at the first guess, {} in the end", once.moved, encoded.moved);
    let start = Tensor::from_slice(&device, shape, &encoded.x_t).unwrap();
    let reverse = Reverse {
        device: &device,
        sampler: &sampler,
        shape,
        samples: Samples { seed: 0, first: 0 },
        start: Some(&start),
        shared: None,
        x_0: false,
        replays: false,
    };
    let x = reverse.run(|call| network(call.x, call.t), None, |_| Ok(())).unwrap();
    let off = x.data().iter().zip(&pixels).map(|(a, b)| (a - b).abs()).fold(0.0f32, f32::max);
    // Without the last step, three rounds of the others leave 0.003 of 2.
    assert!(off < 0.01, "off by {off}");
}

/// RePaint's schedule: calls of the network and steps of noise.
#[test]
fn repaint_goes_back_as_often_as_its_paper() {
    let count = |levels, jump, times| {
        let moves = moves(levels, jump, times).unwrap();
        let up = moves.iter().filter(|step| matches!(step, Move::Up(_))).count();
        (moves.len() - up, up)
    };
    assert_eq!(count(250, 10, 10), (2410, 2160));
    assert_eq!(count(250, 10, 20), (4810, 4560));
    assert_eq!(count(100, 10, 10).0, 910);
    assert_eq!(count(20, 5, 2), (35, 15));
    assert_eq!(count(7, 10, 1), (7, 0));
    assert_eq!(count(7, 6, 2), (13, 6));
    // 19..10 up to 15, down to 10 and on to 5, and so on: never over a level.
    let levels = moves(20, 5, 2).unwrap().into_iter().try_fold(19usize, |at, step| match step {
        Move::Down(level) if level == at => Some(at.wrapping_sub(1)),
        Move::Up(level) if level == at + 1 => Some(level),
        _ => None,
    });
    assert_eq!(levels, Some(usize::MAX), "it ends at the image");
    assert!(moves(20, 5, 0).is_err() && moves(20, 0, 1).is_err());
    let refused = |levels| moves(levels, 10, 2).unwrap_err().to_string();
    let never = |steps| format!("--jump 10: with --steps {steps} no level is gone through again, so give");
    assert_eq!(refused(10), format!("{} a --jump below 10, or --resample 1", never(10)));
    assert_eq!(refused(1), format!("{} --resample 1", never(1)));
}

/// Known pixels come out as they are and the others do not, on every device with the same bits, alone and together.
#[test]
fn painting_keeps_what_is_known() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let kept = Spacing::Even.timesteps(1000, 12).unwrap();
    let sampler = Sampler::over(&s, Prediction::Eps, Method::Ancestral(Variance::FixedSmall), &kept).unwrap();
    let moves = moves(12, 3, 2).unwrap();
    let shape = Shape::new(2, 4, 6, 3);
    let known = to_f32(&numbers(1, shape.len()));
    let mask: Vec<f32> = (0..shape.len()).map(|k| f32::from(u8::from(k % 72 < 36))).collect();
    let paint = |device: &Device, first: u32, images: std::ops::Range<usize>| {
        let shape = Shape { n: images.len(), ..shape };
        let part = |x: &[f32]| Tensor::from_slice(device, shape, &x[images.start * 72..images.end * 72]).unwrap();
        let (known, mask) = (part(&known), part(&mask));
        let chain = s.keep(&kept);
        let painting = Painting {
            device,
            chain: &chain,
            sampler: &sampler,
            moves: &moves,
            seed: 3,
            first,
            known: &known,
            mask: &mask,
        };
        let network = |x: &Tensor, t: f32| Ok(on_device(device, &Call { x, t, halves: 1, turn: None }, false));
        painting.paint(network, || Ok(())).unwrap()
    };
    let want = paint(&Device::cpu(), 0, 0..2);
    for k in 0..shape.len() {
        assert_eq!(want[k] == known[k], mask[k] == 0.0, "pixel {k}");
    }
    assert!(want[..36] != want[72..108], "two images are painted alike");
    same_bits("alone", &paint(&Device::cpu(), 1, 1..2), &want[72..]);
    gpu::each("painting", |device| {
        let x = paint(device, 0, 0..2);
        if gpu::cpu_fuses() && device.activations() == DType::F32 {
            same_bits("painted", &x, &want);
        }
        x
    });
}

/// A mixture has the variance of its level whatever lambda is, and mixtures of an image with itself are one.
#[test]
fn mixtures_share_their_noise() {
    let device = Device::cpu();
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let lambdas = lambdas(5);
    assert_eq!(lambdas, [0.0, 0.25, 0.5, 0.75, 1.0]);
    let shape = Shape::new(5, 32, 32, 3);
    let image = 32 * 32 * 3;
    let (a, b) = (vec![0.5; image], vec![-0.5; image]);
    let x = mixtures(&device, &s, 400, 1, shape, [&a, &b], &lambdas).unwrap();
    let (signal, noise) = s.q_sample_coefficients(400);
    for (x, lambda) in x.data().chunks_exact(image).zip(&lambdas) {
        let mean = x.iter().map(|&x| f64::from(x)).sum::<f64>() / image as f64;
        let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / image as f64;
        // Five standard deviations of a mean and of a variance of so many normals.
        let spread = 5.0 / (image as f64).sqrt();
        assert!((mean - signal * (0.5 - lambda)).abs() < spread * noise, "lambda {lambda}: mean {mean}");
        assert!((variance / (noise * noise) - 1.0).abs() < 2f64.sqrt() * spread, "lambda {lambda}: {variance}");
    }
    let same = mixtures(&device, &s, 400, 1, shape, [&a, &a], &lambdas).unwrap();
    assert!(same.data().chunks_exact(image).all(|x| x == &same.data()[..image]));
    let other = mixtures(&device, &s, 400, 2, shape, [&a, &a], &lambdas).unwrap();
    assert!(other.data()[..image] != same.data()[..image], "another seed, the same noise");
}

/// In one unclipped step of DDIM the image is linear in the output: with W = 2 it is as far beyond that of the class as
/// the one without a class is before it. Every half asks the network with the right labels, on every device, whatever
/// the batch.
#[test]
fn guidance_leads_away_from_images_without_a_class() {
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let plain = Sampler::over(&s, Prediction::Eps, Method::Ddim { eta: 0.0 }, &[300]).unwrap().unclipped();
    let labels = [3, 1, 0];
    let each = |device: &Device| {
        let (config, params) = network::with_null_class(device);
        let (unet, _) = UNet::new(&config.model).unwrap();
        let draw = |weight: f64, labels: &[u32], first: u32| {
            let sampler = plain.clone().guided(Guidance::new(weight).unwrap());
            assert_eq!(sampler.is_guided(), weight != 1.0);
            let drawing = Drawing { device, unet: &unet, params: &params, sampler: &sampler, seed: 1 };
            let request = Request { first, count: labels.len(), labels: Some(labels), ..Request::default() };
            drawing.draw(&request, None, |_| Ok(())).unwrap()
        };
        let [without, with, beyond] = [0.0, 1.0, 2.0].map(|weight| draw(weight, &labels, 0));
        let image = with.len() / 3;
        // Class 10 is the null class.
        let null = draw(1.0, &[10; 3], 0);
        // The step amplifies the output, of the activations' type, by sqrt((1 - a)/a) = 1.2 at timestep 300, and the
        // halves are combined with factors 2 and 1.
        let largest = with.iter().chain(&without).fold(1.0f32, |m, v| m.max(v.abs()));
        let budget = 16.0 * support::F32_ROUNDING as f32 * largest;
        for k in 0..with.len() {
            assert!(
                (without[k] - null[k]).abs() <= budget,
                "{k}: {} without a class, {} with none",
                without[k],
                null[k]
            );
            let want = 2.0 * with[k] - without[k];
            assert!((beyond[k] - want).abs() <= budget, "{k}: {} for {want}", beyond[k]);
        }
        assert!(with.iter().zip(&without).any(|(a, b)| (a - b).abs() > 0.01), "the class makes no difference");
        for i in 0..3 {
            let alone = draw(2.0, &labels[i..=i], i as u32);
            same_bits(&format!("image {i} alone"), &alone, &beyond[i * image..][..image]);
        }
        beyond
    };
    each(&Device::cpu());
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    each(&Device::Cuda(gpu));
    each(&Device::Cuda(gpu::gpu(DType::Bf16).unwrap()));
}
