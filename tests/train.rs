//! Training as a whole: a network learns a batch by heart, a resumed run continues with the same bits, the number of
//! threads changes nothing, memory is recycled and foretold.

mod support;

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::train::{Trainer, memory_needed};
use ddpm_cuda::unet::UNet;

use support::same_bits;

/// Two levels, attention, dropout, flips, two micro-batches: everything that draws random numbers, as small as it gets.
fn tiny() -> Config {
    let mut c = Config::preset(Preset::Mnist);
    c.model.image_size = Size { h: 8, w: 12 };
    c.model.channels = 2;
    c.model.widths = vec![8, 16];
    c.model.attention_resolutions = vec![6];
    c.model.groups = 4;
    c.model.dropout = 0.1;
    c.diffusion.timesteps = 100;
    c.batch = 6;
    c.accumulate = 2;
    c.flip = true;
    c.warmup_steps = 3;
    c.seed = 11;
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
    Data { train: dataset, held_out: Dataset::new(extent, Vec::new(), None), notes: Vec::new() }
}

fn trainer(c: &Config) -> Trainer {
    Trainer::new(c, bars(c, 20), &Device::cpu()).unwrap()
}

#[test]
fn learns_a_batch_by_heart() {
    let mut c = tiny();
    c.model.dropout = 0.0;
    c.flip = false;
    c.accumulate = 1;
    c.learning_rate = 2e-3;
    let mut trainer = Trainer::new(&c, bars(&c, c.batch), &Device::cpu()).unwrap();
    let mut mean = |steps: u32| (0..steps).map(|_| trainer.step().unwrap().loss).sum::<f64>() / f64::from(steps);
    let start = mean(5);
    mean(590);
    let end = mean(100);
    // A network that predicts nothing has a loss of 1, the variance of the noise.
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
    same_bits("weights", b.params.flat(), a.params.flat());
    same_bits("moving average", b.ema.flat(), a.ema.flat());
    same_bits("first moments", b.m, a.m);
    same_bits("second moments", b.v, a.v);
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut trainer = trainer(&tiny());
            let losses: Vec<f64> = (0..3).map(|_| trainer.step().unwrap().loss).collect();
            (losses, trainer.params().flat().to_vec())
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
fn the_memory_foretold_is_the_memory_taken() {
    let mut mnist = Config::preset(Preset::Mnist);
    mnist.batch = 8;
    let mut cifar10 = Config::preset(Preset::Cifar10);
    cifar10.batch = 2;
    for c in [mnist, cifar10, Config { accumulate: 1, ..tiny() }] {
        let (unet, specs) = UNet::new(&c.model).unwrap();
        let foretold = memory_needed(&c, &unet, &specs) as f64;
        let device = Device::cpu();
        let extent = Extent { size: c.model.image_size, channels: c.model.channels };
        let images = Dataset::new(extent, vec![100; 10 * extent.len()], None);
        let data = Data { train: images.clone(), held_out: images, notes: Vec::new() };
        Trainer::new(&c, data, &device).unwrap().step().unwrap();
        let taken = device.pool_stats().held as f64;
        // Too little foretold is a run killed by the system; too much, a run refused that would have worked. The scratch space of
        // 24 MiB is an upper bound that small networks do not reach.
        let bound = taken < 1.05 * foretold && foretold < 1.33 * taken + f64::from(24 << 20);
        assert!(bound, "{foretold:e} bytes foretold, {taken:e} taken");
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
