//! The whole program on a GPU (emulated unless DDPM_TEST_DEVICE says otherwise): it computes what the CPU computes, repeats itself to the bit,
//! allocates nothing once warm, stops where a loss is not finite, and hands its checkpoints over.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Size};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::device::cuda::Gpu;
use ddpm_cuda::diffusion::{Method, Sampler, Spacing, Variance};
use ddpm_cuda::sample::Drawing;
use ddpm_cuda::tensor::DType;
use ddpm_cuda::train::{StepReport, Trainer};

use support::gpu::{self, configure};
use support::{F32_ROUNDING, TINY, same_bits};

/// [`support::tiny`] with two heads and classes, of sides that differ.
fn tiny() -> Config {
    let mut c = support::tiny(6, 10, 3);
    c.model.head_dim = 8;
    c.model.classes = 3;
    c
}

/// Noise of a few shades, and a class for each image.
fn data(c: &Config, count: usize, held_out: usize) -> Data {
    let Size { h, w } = c.model.image_size;
    let set = |count: usize, factor: usize| {
        let images = (0..count * h * w * 3).map(|i| (i * factor % 251) as u8).collect();
        let labels = (0..count).map(|i| (i % 3) as u32).collect();
        Dataset::new(Extent { size: c.model.image_size, channels: 3 }, images, Some(labels))
    };
    Data { train: set(count, 97), held_out: set(held_out, 89), notes: Vec::new() }
}

/// A trainer on a GPU whose pool keeps its buffers; `None` if kernels cannot be tested.
fn on_gpu(c: &Config, dtype: DType) -> Option<Trainer> {
    let device = gpu::available().then(|| Device::Cuda(Gpu::open(0, dtype, false).unwrap()))?;
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

/// Both draw the same images, timesteps, noise and masks and round differently. A step's loss differs by some roundings of its own, and by what the weights
/// differ by, to which every step adds a rounding of the update: after k steps some k roundings, twice that allowed.
#[test]
fn the_loss_curve_follows_the_cpus() {
    let c = tiny();
    let Some(mut gpu) = on_gpu(&c, DType::F32) else { return };
    let mut cpu = on_cpu(&c);
    let (got, want) = (steps(&mut gpu, 50), steps(&mut cpu, 50));
    let mut worst = [0.0f64; 2];
    for (got, want) in got.iter().zip(&want) {
        assert_eq!((got.step, got.learning_rate), (want.step, want.learning_rate));
        let allowed = 2.0 * f64::from(want.step) * F32_ROUNDING;
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

/// The held-out loss of one and the same network, which has learnt enough to depend on what it sees: a network at its start predicts nothing, whatever
/// the images. Held-out images of the same source and of one of their own. A loss is a mean over hundreds of numbers that differ by some roundings each.
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
        cpu.state_mut().ema.write(&gpu.ema().host().unwrap()).unwrap();
        let stop = AtomicBool::new(false);
        let [got, want] = [&gpu, &cpu].map(|trainer| trainer.validate(&stop).unwrap());
        let allowed = 64.0 * F32_ROUNDING;
        for (got, want) in got.means().iter().zip(want.means()) {
            assert_eq!(got.is_some(), want.is_some());
            if let (Some(got), Some(want)) = (got, want) {
                assert!((got - want).abs() <= allowed * want, "shared {shared}: {got}, the CPU has {want}");
            }
        }
        let mean = want.mean().unwrap();
        assert!((mean - 1.0).abs() > 0.05, "the network predicts nothing: {mean}");
    }
}

/// A GPU's 8 bits of mantissa blur every activation by 2^-9 of itself; the loss, an average over thousands of numbers, less.
#[test]
fn bf16_follows_f32() {
    let c = tiny();
    let (Some(mut f32), Some(mut bf16)) = (on_gpu(&c, DType::F32), on_gpu(&c, DType::Bf16)) else { return };
    let mean = |reports: Vec<StepReport>| reports.iter().map(|r| r.loss).sum::<f64>() / reports.len() as f64;
    let (f32, bf16) = (mean(steps(&mut f32, 20)), mean(steps(&mut bf16, 20)));
    assert!((bf16 - f32).abs() <= 0.02 * f32, "mean loss of 20 steps: {bf16} in bf16, {f32} in f32");
}

#[test]
fn repeats_itself_to_the_bit_in_every_schedule() {
    let c = tiny();
    for dtype in [DType::F32, DType::Bf16] {
        let mut first: Option<Vec<f32>> = None;
        for schedule in gpu::SCHEDULES {
            configure("seed", schedule);
            let Some(mut trainer) = on_gpu(&c, dtype) else { return };
            steps(&mut trainer, 2);
            let got = weights(&trainer);
            match &first {
                None => first = Some(got),
                Some(first) => same_bits(&format!("weights, {dtype:?}, schedule {schedule}"), &got, first),
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
    assert!(after.hits > before.hits && after.peak == before.peak);
}

#[test]
fn a_checkpoint_goes_on_on_the_other_device() {
    let c = tiny();
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
            assert!((got.loss - want.loss).abs() <= 1e-5 * want.loss, "{got:?}, never interrupted {want:?}");
        }
    }
    steps(&mut gpu, 3);
    same_bits("weights after a resume", &weights(&again), &weights(&gpu));
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
    // The first update is finite and leaves weights of 1e30; the loss behind it is not.
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

/// Twenty steps multiply a difference of roundings by less than a thousand; a grey level is 1/127.5.
#[test]
fn a_sample_is_the_cpus_but_for_a_grey_level() {
    let c = tiny();
    let Some(mut trainer) = on_gpu(&c, DType::F32) else { return };
    steps(&mut trainer, 10);
    let flat = trainer.ema().host().unwrap();
    let cpu = Device::cpu();
    let params = ddpm_cuda::params::Params::from_host(&cpu, trainer.ema().specs().clone(), &flat).unwrap();
    for method in [Method::Ancestral(Variance::FixedSmall), Method::Ddim { eta: 0.0 }] {
        let sampler = Sampler::new(trainer.schedule(), method, Spacing::Even, 20).unwrap();
        let draw = |device, params| {
            let drawing = Drawing { device, unet: trainer.unet(), params, sampler: &sampler, seed: 3 };
            drawing.images(3, Some(&[0, 1, 2]), |_| Ok(())).unwrap()
        };
        let (got, want) = (draw(trainer.device(), trainer.ema()), draw(&cpu, &params));
        let worst = got.iter().zip(&want).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(worst <= 1, "{method:?}: {worst} grey levels from the CPU's");
        assert!(want.iter().any(|&v| v != want[0]), "the images are of one grey");
    }
}

/// The program on the emulator; `None` if there are no kernels.
fn program(folder: &Path) -> Option<Command> {
    if !gpu::available() {
        return None;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_ddpm-cuda"));
    command.stdin(Stdio::null()).current_dir(folder);
    if std::env::var("DDPM_TEST_DEVICE").as_deref() != Ok("cuda") {
        command.env("DDPM_CUDA_DRIVER", gpu::emulator());
    }
    Some(command)
}

#[test]
fn the_command_line_trains_samples_and_predicts_on_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mut train) = program(folder.path()) else { return };
    let out = train.args(["train", "--device", "cuda", "--precision", "bf16", "--out", "run"]).args(TINY);
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
    // As tests/unet.rs has it for networks of other implementations.
    support::close_to_largest("eps", &got, &want, 2e-5);
    let mut info = program(folder.path()).unwrap();
    let said = String::from_utf8(info.arg("info").output().unwrap().stdout).unwrap();
    assert!(said.contains("cuda:0") && said.contains("compiled by CUDA"), "{said}");
}

#[test]
fn a_gpu_that_is_too_small_old_or_absent_is_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    if program(folder.path()).is_none() || std::env::var("DDPM_TEST_DEVICE").as_deref() == Ok("cuda") {
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
            .args(TINY);
        let out = out.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{name}={value}: {said}");
        assert!(said.contains(says) && said.trim_end().lines().count() == 1, "{name}={value}: {said}");
    }
}

/// On a GPU of 64 MiB, which is a process of its own: what the pool keeps goes back to the driver when memory runs out, and when that is
/// not enough the error says how much was needed and for what.
#[test]
fn idle_memory_is_given_back_and_what_is_missing_is_named() {
    const CHILD: &str = "DDPM_TEST_SMALL_GPU";
    if !gpu::available() || std::env::var("DDPM_TEST_DEVICE").as_deref() == Ok("cuda") {
        return;
    }
    if std::env::var_os(CHILD).is_none() {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "idle_memory_is_given_back_and_what_is_missing_is_named", "--nocapture"]);
        let out = command.env(CHILD, "1").env("CUDA_EMU_MEMORY", "64M").output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stdout));
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
