//! The profile of a step: counts against numbers found by hand, their scaling, the bound of the traffic, and what
//! `ddpm-cuda profile` and `info --tape` say.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use ddpm_cuda::config::{Config, Preset};
use ddpm_cuda::device::cuda::{Counted, Counters, devices};
use ddpm_cuda::device::{Device, Precision};
use ddpm_cuda::kernels;
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};
use ddpm_cuda::params::{Init, Layout, Params, Specs};
use ddpm_cuda::profile::bound::{self, Least, Roofline};
use ddpm_cuda::profile::card::{CARDS, Multiprocessor};
use ddpm_cuda::profile::model::Work;
use ddpm_cuda::profile::{Launch, Measured, Of, Profile, What, count, measure};
use ddpm_cuda::tape::{Kept, Recompute, Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::UNet;
use serde_json::Value;

use support::{gpu, places};

/// The emulator, without the checks that take most of its time.
fn emulator(precision: impl Into<Precision>) -> Option<ddpm_cuda::device::cuda::Gpu> {
    let gpu = gpu::emulated("counters").then(|| gpu::gpu(precision)).flatten();
    gpu::configure("checks", "fast");
    gpu
}

/// A 3x3 convolution of 64 channels on one image of 16x16: 4 tiles of 64 pixels by 64 channels, each with 9 slabs of
/// 64 steps of k, nothing of them in vain.
#[test]
fn a_convolution_is_counted_as_by_hand() {
    for (precision, name) in [
        (Precision::F32, "conv2d_fwd_64x64_f32"),
        (Precision::Tf32, "conv2d_fwd_64x64_tf32"),
        (Precision::Bf16, "conv2d_fwd_mma_64x64"),
    ] {
        let dtype = precision.activations();
        let Some(gpu) = emulator(precision) else { return };
        let device = Device::Cuda(gpu.clone());
        let mut specs = Specs::default();
        let w = specs.add("w".into(), Shape::new(64, 3, 3, 64), Layout::Conv, Init::FanAvg { scale: 1.0 });
        let b = specs.add("b".into(), Shape::vector(64), Layout::Vector, Init::Zeros);
        let params = Params::init(&device, specs, 1).unwrap();
        let shape = Shape::new(1, 16, 16, 64);
        let x = Var::constant(Tensor::from_slice_as(&device, dtype, shape, &vec![0.5; shape.len()]).unwrap());
        gpu.count_launches().unwrap();
        let mut tape = Tape::inference(&device, &params);
        conv2d(&mut tape, &x, w, b, Geometry::SAME_3X3, Plus::default()).unwrap();
        let [counted] = &gpu.counted_launches()[..] else { panic!("one launch") };
        assert!(counted.kernel.starts_with(name), "{}", counted.kernel);
        let launch = Launch::new(counted).unwrap();
        let flops = 2.0 * 256.0 * 64.0 * 576.0;
        let Work { fma, tensor_flops, tf32_flops, .. } = launch.work;
        match precision {
            Precision::F32 => assert_eq!([fma * 64.0, tf32_flops, tensor_flops], [flops, 0.0, 0.0]),
            Precision::Tf32 => assert_eq!([fma, tf32_flops, tensor_flops], [0.0, flops, 0.0]),
            Precision::Bf16 => assert_eq!([tf32_flops, tensor_flops], [0.0, flops]),
        }
        let size = dtype.size() as f64;
        // Image and weights in, bias in f32, image out.
        let bytes = 2.0 * 256.0 * 64.0 * size + 64.0 * 576.0 * size + 4.0 * 64.0;
        assert_eq!(launch.work.touched, bytes, "{precision}");
        assert!(launch.asked >= launch.work.touched && launch.work.moved >= launch.work.touched, "{launch:?}");
        assert_eq!((launch.work.blocks, launch.ran), (4.0, 4));
        assert!(launch.work.shared_cycles >= launch.shared_ideal && launch.shared_ideal > 0.0);
        assert!(launch.fits.iter().all(|fit| fit.is_some_and(|fit| fit.resident > 0 && fit.occupancy <= 1.0)));
    }
}

/// What is counted of a step is what the step launches: each convolution forward and each weight's gradient once for
/// each micro-batch, and one update, which reads and writes over four numbers for each parameter.
#[test]
fn a_step_is_counted_as_by_hand() {
    let Some(gpu) = emulator(DType::F32) else { return };
    let config = support::tiny(6, 10, 3);
    let (_, specs) = UNet::new(&config.model).unwrap();
    let counted = count(&gpu, &config, What::Train).unwrap();
    let of = |start: &str| counted.iter().filter(|launch| launch.kernel.starts_with(start)).count();
    let convolutions = specs.iter().filter(|(_, spec)| spec.layout == Layout::Conv).count();
    assert_eq!(of("conv2d_fwd_"), 2 * convolutions);
    assert_eq!(of("conv2d_wgrad_"), 2 * convolutions);
    assert_eq!((of("q_sample_"), of("adam_update")), (2, 1));
    let update = counted.iter().find(|launch| launch.kernel == "adam_update").unwrap();
    let update = Launch::new(update).unwrap().work;
    // Reads and writes weight, moving average and two moments, reads the gradient; and a few words of clock and meter.
    let bytes = 4.0 * 9.0 * specs.flat_len() as f64;
    assert!((bytes..bytes + 1024.0).contains(&update.touched), "{} bytes, expected {bytes}", update.touched);

    // The same launches again: nothing depends on what the images show or on the step.
    let again = count(&gpu, &config, What::Train).unwrap();
    let names = |all: &[Counted]| all.iter().map(|l| (l.kernel.clone(), l.blocks)).collect::<Vec<_>>();
    assert_eq!(names(&again), names(&counted));

    let least = |what| Profile::new(of_tiny(&config, what), &counted).unwrap();
    let profile = least(What::Train);
    assert_eq!(profile.launches, counted.len() as u64);
    assert_eq!(profile.blocks, profile.blocks_counted);
    assert_eq!(profile.kernels.iter().map(|kernel| kernel.launches).sum::<u64>(), profile.launches);
    assert_eq!(profile.tensor_core_share, 0.0, "f32 is not on tensor cores");
    assert!(profile.bytes_moved >= profile.bytes_least, "{} of {}", profile.bytes_moved, profile.bytes_least);
    assert!(least(What::Sample).bytes_least < profile.bytes_least / 2);
    for kernel in &profile.kernels {
        assert!(kernel.modelled_ms.0.iter().all(|ms| *ms > 0.0) && kernel.occupancy > 0.0, "{kernel:?}");
    }
}

fn of_tiny(config: &Config, what: What) -> Of<'_> {
    Of { network: "tiny".into(), config, what, graphs: 0, measured: None, devices: None }
}

/// A sampling step: one pass of the network and one step of the process, the step in the middle.
#[test]
fn a_sampling_step_is_counted() {
    let Some(gpu) = emulator(DType::F32) else { return };
    let config = support::tiny(6, 10, 3);
    let counted = count(&gpu, &config, What::Sample).unwrap();
    let of = |start: &str| counted.iter().filter(|launch| launch.kernel.starts_with(start)).count();
    let (_, specs) = UNet::new(&config.model).unwrap();
    let convolutions = specs.iter().filter(|(_, spec)| spec.layout == Layout::Conv).count();
    assert_eq!((of("conv2d_fwd_"), of("time_embedding_"), of("sample_step_")), (convolutions, 1, 1));
    assert_eq!((of("conv2d_wgrad_"), of("adam"), of("q_sample")), (0, 0, 0));
}

/// The mechanism of the times; what they are on the emulator means nothing.
#[test]
fn each_kernel_is_measured() {
    let Some(gpu) = emulator(DType::F32) else { return };
    let config = support::tiny(6, 10, 3);
    let counted = count(&gpu, &config, What::Train).unwrap();
    let description = devices().unwrap().swap_remove(0);
    let measured = measure(description, &config, What::Train).unwrap();
    assert!(measured.step > 0.0);
    for launch in &counted {
        assert!(measured.kernels.get(&launch.kernel).is_some_and(|ms| *ms > 0.0), "{} has no time", launch.kernel);
    }
    let measured = Some(Measured { gpu: "A GPU".into(), capability: (8, 9), ..measured });
    let profile = Profile::new(Of { measured, ..of_tiny(&config, What::Train) }, &counted).unwrap();
    assert_eq!((profile.gpu.as_deref(), profile.reference), (Some("A GPU"), "rtx4090"));
    assert!(profile.measured_ms.is_some() && profile.kernels.iter().all(|kernel| kernel.measured_ms.is_some()));
}

/// 4 of 100 blocks: everything that blocks do is 25 times as much, but what they read in common is read once.
#[test]
fn counts_are_scaled_to_the_grid() {
    if kernels::COMPILER.is_none() {
        return;
    }
    let counters = Counters {
        blocks: 4,
        fma: 8,
        arithmetic: 4,
        global_load_bytes: 4096,
        global_store_bytes: 512,
        global_sectors: 160,
        // 1,024 bytes that each block reads, 256 of its own that it writes over, and 256 that it only writes.
        distinct_read_bytes: 1024 + 4 * 256,
        distinct_written_bytes: 4 * 512,
        distinct_bytes: 1024 + 4 * 512,
        shared_wavefronts: 12,
        shared_ideal: 10,
        flops_f32: 512,
        ..Counters::default()
    };
    let counted = Counted {
        kernel: "adam_update".into(),
        blocks: 100,
        threads: 256,
        shared: 0,
        arrays: [1024, 100 * 512],
        counters,
    };
    let launch = Launch::new(&counted).unwrap();
    let work = launch.work;
    assert_eq!((work.blocks, work.fma, work.instructions), (100.0, 200.0, 300.0));
    assert_eq!((launch.asked, work.moved), (25.0 * 4608.0, 25.0 * 160.0 * 32.0));
    assert_eq!((work.shared_cycles, launch.shared_ideal), (300.0, 250.0));
    assert_eq!(work.touched, 1024.0 + 100.0 * 256.0 + 100.0 * 512.0);
    // Without an array that it can only read, what it reads is what it writes over.
    let own = Launch::new(&Counted { arrays: [0, 100 * 512], ..counted.clone() }).unwrap();
    assert_eq!(own.work.touched, 100.0 * 256.0 + 100.0 * 512.0);
    for (wrong, says) in [
        (Counted { kernel: "no_such".into(), ..counted.clone() }, "no_such is no kernel of this build"),
        (Counted { counters: Counters::default(), ..counted }, "no block of adam_update ran"),
    ] {
        assert_eq!(Launch::new(&wrong).unwrap_err().to_string(), says);
    }
}

/// By the occupancy tables of NVIDIA's calculator.
#[test]
fn a_multiprocessor_holds_what_the_calculator_says() {
    let of = |capability| Multiprocessor::of(capability).unwrap();
    let [a100, ada, h100] = [(8, 0), (8, 9), (9, 0)].map(of);
    // 32 registers and 256 threads: by warps. 255 registers and 128 threads: two warps a scheduler. 64 KiB: two.
    assert_eq!((a100.resident(256, 32, 0), ada.resident(256, 32, 0), h100.resident(256, 32, 0)), (8, 6, 8));
    assert_eq!((a100.resident(128, 255, 0), ada.resident(128, 255, 0)), (2, 2));
    assert_eq!((a100.resident(128, 64, 64 << 10), ada.resident(128, 64, 64 << 10)), (2, 1));
    assert_eq!(h100.resident(128, 64, 64 << 10), 3);
    assert_eq!((a100.resident(32, 16, 0), ada.resident(32, 16, 0)), (32, 24), "by blocks");
    assert_eq!(a100.resident(128, 64, 200 << 10), 0, "a block that does not fit");
    assert!(Multiprocessor::of((7, 5)).is_none());
    for card in &CARDS {
        assert!(Multiprocessor::of(card.capability).is_some(), "{}", card.name);
        assert!(card.tensor_peak() > card.lanes_peak() && card.l2 * card.clock > card.memory, "{}", card.name);
    }
}

/// Two kept tensors and 10 + 3 parameters, by hand.
#[test]
fn the_bound_is_that_of_its_definition() {
    let mut config = support::tiny(4, 4, 3);
    (config.batch, config.accumulate) = (2, 1);
    let mut specs = Specs::default();
    specs.add("w".into(), Shape::new(10, 1, 1, 1), Layout::Matrix, Init::Zeros);
    specs.add("b".into(), Shape::vector(3), Layout::Vector, Init::Zeros);
    let kept = |bytes: usize, gradient: bool| Kept {
        place: "here".into(),
        op: "op",
        shape: Shape::vector(bytes / 2),
        dtype: DType::Bf16,
        bytes,
        gradient,
    };
    let plan = [kept(1000, true), kept(100, false)];
    // 2 images of 4x4x3: 96 elements, a byte each; the network's output and its gradient written and read in bf16.
    let images = 96 + 4 * 2 * 96;
    let want = Least {
        activations: 3 * 1000 + 2 * 100,
        gradients: 2 * 1000,
        weights: 2 * (2 * 10 + 4 * 3),
        update: 4 * 13 * 11 + 2 * 10,
        images,
    };
    let got = bound::of_training(&config, &specs, &plan, DType::Bf16);
    assert_eq!(got, want);
    assert_eq!(got.total(), want.activations + want.gradients + want.weights + want.update + want.images);
    config.accumulate = 2;
    let twice = bound::of_training(&config, &specs, &plan, DType::Bf16);
    assert_eq!((twice.activations, twice.weights), (2 * want.activations, 2 * want.weights));
    assert_eq!((twice.update, twice.images), (want.update, want.images));
    // x in f32 and bf16 and the output in bf16, each written and read.
    let want =
        Least { activations: 2 * 1000, weights: 2 * 10 + 4 * 3, images: 96 * 2 * (4 + 2 + 2), ..Least::default() };
    assert_eq!(bound::of_sampling(&config, &specs, &plan, DType::Bf16), want);
}

/// Of 128 images the products' FLOP take longest, of one image the traffic, most of which is the update's.
#[test]
fn the_roofline_is_the_longer_of_two_times() {
    let mut config = Config::preset(Preset::Cifar10);
    config.precision = Precision::Bf16;
    let (card, (unet, specs)) = (&CARDS[0], UNet::new(&config.model).unwrap());
    let roofline = Roofline::of_training(&config, card).unwrap();
    let close = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-9, "{got} s, expected {want} s");
    let flops: u64 = unet.costs(&specs, 32, 32).iter().map(|cost| cost.flops).sum();
    close(roofline.seconds(128.0, 1, 1), 3.0 * 128.0 * flops as f64 / card.tensor_peak());
    (config.batch, config.accumulate) = (1, 1);
    let device = Device::meta_gpu_for(DType::Bf16);
    let plan = unet.tape_plan(&device, config.recompute, &specs, Shape::new(1, 32, 32, 3)).unwrap();
    let least = bound::of_training(&config, &specs, &plan, DType::Bf16);
    close(roofline.seconds(1.0, 1, 1), least.total() as f64 / card.memory);
    // A second pass reads the weights again; of four GPUs each has a quarter of ten numbers for each parameter.
    let of_four = (least.total() + least.weights - 30 * specs.count() as u64) as f64 / card.memory;
    close(roofline.seconds(1.0, 2, 4), of_four);
}

/// The tape plan grows with the batch, is what `costs_on` counts, and knows which tensors have gradients.
#[test]
fn the_tape_plan_is_what_a_step_keeps() {
    for dtype in [DType::F32, DType::Bf16] {
        let (config, device) = (support::tiny(6, 10, 3), Device::meta_gpu_for(dtype));
        let (unet, specs) = UNet::new(&config.model).unwrap();
        let plan = |n: usize| unet.tape_plan(&device, Recompute::None, &specs, Shape::new(n, 6, 10, 3)).unwrap();
        let sum = |plan: &[Kept]| plan.iter().map(|kept| kept.bytes as u64).sum::<u64>();
        let costs: u64 = unet.costs_on(&device, Recompute::None, &specs, 6, 10).iter().map(|cost| cost.saved).sum();
        assert_eq!((sum(&plan(1)), sum(&plan(5))), (costs, 5 * costs));
        let plan = plan(2);
        let find = |place: &str, op: &str| -> Vec<&Kept> {
            plan.iter().filter(|kept| kept.place == place && kept.op == op).collect()
        };
        // The noised images, of which no gradient is wanted.
        let [x_t] = find("conv_in", "conv2d")[..] else { panic!("{plan:?}") };
        assert_eq!((x_t.shape, x_t.dtype, x_t.bytes), (Shape::new(2, 6, 10, 3), dtype, 360 * dtype.size()));
        assert!(!x_t.gradient);
        // Group norm keeps its input, of which there is a gradient, and statistics, of which there is none.
        let norm = find("down_blocks.0.resnets.0", "group_norm");
        assert!(norm.iter().any(|kept| kept.gradient && kept.shape == Shape::new(2, 6, 10, 8)), "{norm:?}");
        assert!(norm.iter().any(|kept| !kept.gradient && kept.dtype == DType::F32), "{norm:?}");
    }
}

/// The program on the emulator.
fn profile(arguments: &[&str]) -> Command {
    let mut command = Command::new(places::program());
    command.stdin(Stdio::null()).env("DDPM_CUDA_DRIVER", places::emulator()).arg("profile").args(arguments);
    command
}

fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{command:?}: {}{said}", String::from_utf8_lossy(&out.stderr));
    said
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Keys of the JSON, on which others count; plots; the table.
#[test]
fn the_program_profiles_the_digits_network() {
    if !gpu::emulated("counters") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (file, plots) = (folder.path().join("step.json"), folder.path().join("plots"));
    let out = ["--json", file.to_str().unwrap(), "--plots", plots.to_str().unwrap()];
    let said = ok(profile(&["--preset", "mnist", "--batch", "32", "--precision", "bf16"]).args(out));
    let step = json(&file);
    for key in [
        "gpu",
        "batch",
        "precision",
        "launches",
        "graphs",
        "flops",
        "tensor_core_share",
        "bytes_moved",
        "bytes_least",
        "measured_ms",
    ] {
        assert!(step.get(key).is_some(), "{key} is missing: {step:#}");
    }
    assert_eq!((&step["batch"], &step["precision"]), (&32.into(), &"bf16".into()));
    assert_eq!(step["graphs"], 1, "a step is one graph");
    assert!(step["gpu"].is_null() && step["measured_ms"].is_null());
    for key in ["h100", "a100", "rtx4090"] {
        assert!(step["modelled_ms"][key].as_f64().is_some_and(|ms| ms > 0.0), "{key}");
    }
    let kernels = step["kernels"].as_array().unwrap();
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    for kernel in kernels {
        for key in ["launches", "bytes_asked", "bytes_moved", "registers", "occupancy"] {
            assert!(number(&kernel[key]) > 0.0, "{key} of {kernel:#}");
        }
        assert!(number(&kernel["shared_cycles"]) >= number(&kernel["shared_ideal"]), "{kernel:#}");
        assert!(number(&kernel["flops"]) >= 0.0 && kernel["measured_ms"].is_null(), "{kernel:#}");
        assert!(number(&kernel["modelled_ms"]["h100"]) > 0.0, "{kernel:#}");
        assert!(said.contains(kernel["name"].as_str().unwrap()), "the table lacks {}", kernel["name"]);
    }
    let sum = |key: &str| kernels.iter().map(|kernel| number(&kernel[key])).sum::<f64>();
    for (all, of_kernels) in [("launches", "launches"), ("flops", "flops"), ("bytes_moved", "bytes_touched")] {
        let (all, of_kernels) = (number(&step[all]), sum(of_kernels));
        assert!((all - of_kernels).abs() <= kernels.len() as f64, "{all} is not the sum {of_kernels}");
    }
    // Three passes over the network's products, and little else.
    let config = Config::preset(Preset::Mnist);
    let (unet, specs) = UNet::new(&config.model).unwrap();
    let needed = 3 * 32 * unet.costs(&specs, 28, 28).iter().map(|cost| cost.flops).sum::<u64>();
    let flops = number(&step["flops"]) / needed as f64;
    assert!((1.0..3.0).contains(&flops), "{flops} times the products' FLOP");
    assert!(number(&step["bytes_moved"]) >= number(&step["bytes_least"]));
    assert!(said.contains("blocks ran on the emulator, at most 16 of each launch"), "{said}");
    for stem in ["roofline", "step"] {
        let svg = fs::read_to_string(plots.join(format!("{stem}.svg"))).unwrap();
        assert!(svg.contains(kernels[0]["name"].as_str().unwrap()), "{stem}.svg");
        assert!(plots.join(format!("{stem}.png")).is_file());
    }
}

/// Sixteen blocks of each launch stand for all: the sums of a step differ little from those of a step that ran whole,
/// launch by launch the same kernels on the same grids.
#[test]
fn a_sample_of_blocks_stands_for_all() {
    if !gpu::emulated("counters") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let count = |blocks: &str| -> Vec<Counted> {
        let file = folder.path().join(blocks);
        let mut command = profile(&["--preset", "mnist", "--batch", "8", "--precision", "bf16", "--counts"]);
        ok(command.arg(&file).env("CUDA_EMU_BLOCKS", blocks).env("CUDA_EMU_CHECKS", "fast"));
        serde_json::from_value(json(&file)["launches"].take()).unwrap()
    };
    let (some, all) = (count("16"), count("all"));
    let grids = |counted: &[Counted]| counted.iter().map(|l| (l.kernel.clone(), l.blocks)).collect::<Vec<_>>();
    assert_eq!(grids(&some), grids(&all));
    assert!(some.iter().all(|launch| launch.counters.blocks == launch.blocks.min(16)));
    assert!(all.iter().all(|launch| launch.counters.blocks == launch.blocks));
    let sums = |counted: &[Counted]| {
        let mut sums = BTreeMap::<&str, f64>::new();
        for launch in counted.iter().map(|counted| Launch::new(counted).unwrap()) {
            for (what, of) in [
                ("tensor FLOP", launch.work.tensor_flops),
                ("instructions", launch.work.instructions),
                ("bytes asked for", launch.asked),
                ("bytes moved", launch.work.moved),
                ("bytes touched", launch.work.touched),
                ("cycles of shared memory", launch.work.shared_cycles),
            ] {
                *sums.entry(what).or_default() += of;
            }
        }
        sums
    };
    let (some, all) = (sums(&some), sums(&all));
    for (what, of_all) in &all {
        let error = some[what] / of_all - 1.0;
        println!("{what}: {of_all} in all, {error:+.4} by a sample");
        // What blocks of two kinds both touch, such as dy, counts for each until it is as much as the arrays hold.
        let most = if *what == "bytes touched" { 0.05 } else { 0.03 };
        assert!(error.abs() < most, "{what}: {} by a sample, {of_all} in all", some[what]);
    }
}

/// A launch costs a microsecond or two even in a graph. One block of each is run, which says nothing of what they do.
#[test]
fn a_step_of_the_cifar10_network_has_few_launches() {
    if !gpu::emulated("counters") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (what, most) in [("train", 350), ("sample", 120)] {
        let file = folder.path().join(what);
        let of = ["--preset", "cifar10", "--batch", "128", "--precision", "bf16", "--what", what, "--counts"];
        let settings = [("CUDA_EMU_BLOCKS", "1"), ("CUDA_EMU_CHECKS", "none"), ("CUDA_EMU_MEMORY", "1T")];
        ok(profile(&of).arg(&file).envs(settings));
        let counted: Vec<Counted> = serde_json::from_value(json(&file)["launches"].take()).unwrap();
        let mut by_kernel = BTreeMap::<&str, usize>::new();
        counted.iter().for_each(|launch| *by_kernel.entry(&launch.kernel).or_default() += 1);
        println!("{what}: {} launches, {by_kernel:?}", counted.len());
        assert!(counted.len() <= most, "{what}: {} launches, {by_kernel:?}", counted.len());
    }
}

#[test]
fn what_cannot_be_profiled_is_refused_in_a_sentence() {
    let fails = |command: &mut Command, code: i32| {
        let out = command.output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{command:?}: {said}");
        said
    };
    for (arguments, says) in [
        (&["--batch", "0"][..], "--batch 0: a step is profiled for a number of images from 1 to 1024"),
        (&["--batch", "1025"], "--batch 1025: a step is profiled for a number of images from 1 to 1024"),
        (&["--devices", "0"], "--devices 0: an exchange is between a number of GPUs from 2 to 1024"),
        (&["--devices", "2000"], "--devices 2000: an exchange is between a number of GPUs from 2 to 1024"),
        (&["--devices", "2", "--what", "sample"], "--devices with --what sample: a step of sampling exchanges nothing"),
        (&["--preset", "auto"], "--preset auto: its network is made for the data"),
        (&["--what", "dream"], "invalid value 'dream' for '--what <WHAT>'"),
        (&["--precision", "fp8"], "invalid value 'fp8' for '--precision <PRECISION>'"),
        (&["--preset", "mnist", "--model", "x"], "cannot be used with"),
    ] {
        let said = fails(&mut profile(arguments), 2);
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    // Before anything is counted, also by a program that has nothing to count.
    for flag in ["--json", "--counts"] {
        let said = fails(&mut profile(&[flag, "nowhere/step.json"]), 1);
        assert!(said.contains("nowhere/step.json: cannot be written: there is no folder nowhere"), "{said}");
    }
    if kernels::COMPILER.is_none() {
        let said = fails(&mut profile(&[]), 1);
        return assert!(said.contains("there is no kernel to profile: this program was built without"), "{said}");
    }
    // A program without the emulator beside it.
    let folder = tempfile::tempdir().unwrap();
    let alone = folder.path().join("ddpm-cuda");
    fs::copy(places::program(), &alone).unwrap();
    let said = fails(Command::new(&alone).arg("profile").env_remove("DDPM_CUDA_DRIVER"), 1);
    let says = format!("there is no libcuda_emu.so in {}: the kernels are counted on it", folder.path().display());
    assert!(said.contains(&says) && said.lines().count() == 1, "{said}");
    // What the counting process says is said.
    let says = "counting on the emulator";
    let said = fails(profile(&[]).env("CUDA_EMU_ISA", "sse"), 1);
    assert!(said.contains(says) && said.lines().count() == 1, "{said}");
}

/// Every line is a tensor; their sum is what `info` says of the same step.
#[test]
fn info_lists_the_tape() {
    let info = |arguments: &[&str]| ok(Command::new(places::program()).arg("info").args(arguments));
    for of in [
        &["--preset", "cifar10", "--precision", "bf16"][..],
        &["--preset", "mnist", "--batch", "7"],
        &["--preset", "celebahq256", "--batch", "2"],
    ] {
        let listed = info(&[of, &["--tape"]].concat());
        let bytes = |line: &str| -> u64 { line.rsplit(' ').next().unwrap().replace(',', "").parse().unwrap() };
        let lines: Vec<&str> = listed.lines().skip(1).take_while(|line| !line.starts_with("in all")).collect();
        let sum: u64 = lines.iter().map(|line| bytes(line)).sum();
        let all = listed.lines().find(|line| line.starts_with("in all")).unwrap();
        assert_eq!(bytes(all), sum);
        for line in &lines {
            let [_, _, shape, dtype, bytes] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
            let elements: u64 = shape.split('x').map(|n| n.parse::<u64>().unwrap()).product();
            let size = if dtype == "bf16" { 2 } else { 4 };
            assert_eq!(bytes.replace(',', "").parse::<u64>().unwrap(), elements * size, "{line}");
        }
        let gib = format!("{:.2} GiB", sum as f64 / f64::from(1u32 << 30));
        assert!(listed.contains(&format!("{} tensors, {gib}, are kept", lines.len())), "{listed}");
        assert!(info(of).contains(&format!("of which {gib} are kept from the forward pass")), "{gib}");
    }
    let refused = Command::new(places::program()).args(["info", "--batch", "0"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && said.contains("--batch 0: a step takes a number of images"), "{said}");
}

/// One line for each link, whose exchange of the gradient and the weights is not hidden; what cannot be is refused.
#[test]
fn info_says_what_an_exchange_costs() {
    let info = |arguments: &[&str]| {
        let mut command = Command::new(places::program());
        command.args(["info", "--preset", "cifar10", "--precision", "bf16"]).args(arguments).output().unwrap()
    };
    let out = info(&["--devices", "8"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{said}");
    // 35.75 million f32 in shards of whole chunks; 7/8 of them twice.
    let says = "on 8 GPUs: accumulate = 8, 16 images on each";
    assert!(said.contains(says) && said.contains("sends 253.2 MB a step to the others: of 144.7 MB"), "{said}");
    let line = said.lines().find(|line| line.starts_with("NVLink, H100")).unwrap_or_else(|| panic!("{said}"));
    let columns: Vec<&str> = line.split_whitespace().collect();
    // 253.2 MB at 370 GB/s, 97 us of latencies, and a sum of nine eighths of the gradient at 3 TB/s.
    assert_eq!(columns[2..4], ["370", "0.84"], "{line}");
    for link in ["NVLink, A100", "PCIe 5.0 x16", "PCIe 4.0 x16", "100 Gb/s network", "2 machines of 4, in two levels"] {
        assert!(said.contains(link), "{link} is missing: {said}");
    }
    for (arguments, says) in [
        (&["--devices", "0"][..], "--devices 0: an exchange is between a number of GPUs from 2 to 1024"),
        (&["--devices", "1"], "--devices 1: an exchange is between a number of GPUs from 2 to 1024"),
        (&["--devices", "3"], "--devices 3: 128 images are not 3 equal micro-batches, 129 would be: --batch"),
        (&["--devices", "-1"], "unexpected argument '-1'"),
        (&["--devices", "2", "--tape"], "cannot be used with"),
    ] {
        let out = info(arguments);
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.code() == Some(2) && said.contains(says) && out.stdout.is_empty(), "{arguments:?}: {said}");
    }
}

/// The JSON has its numbers by the cards' keys.
#[test]
fn a_profile_of_nothing_is_written_too() {
    let config = support::tiny(6, 10, 3);
    let measured = Measured { gpu: "A GPU".into(), capability: (9, 0), step: 1.5, kernels: BTreeMap::new() };
    let measured = Some(measured);
    let profile = Profile::new(Of { measured, ..of_tiny(&config, What::Train) }, &[]).unwrap();
    let written = serde_json::to_value(&profile).unwrap();
    assert_eq!(written["modelled_ms"], serde_json::json!({"h100": 0.0, "a100": 0.0, "rtx4090": 0.0}));
    assert_eq!((&written["measured_ms"], &written["reference"]), (&1.5.into(), &"h100".into()));
    assert_eq!((&written["launches"], &written["tensor_core_share"]), (&0.into(), &0.0.into()));
    assert!(written["exchange"].is_null());
    let measured = Measured { gpu: "A GPU".into(), capability: (9, 0), step: 1.5, kernels: BTreeMap::new() };
    let of = Of { measured: Some(measured), devices: Some(2), ..of_tiny(&config, What::Train) };
    let exchange = serde_json::to_value(Profile::new(of, &[]).unwrap()).unwrap()["exchange"].take();
    assert_eq!((&exchange["devices"], &exchange["step_ms"]), (&2.into(), &1.5.into()));
    let links = exchange["links"].as_array().unwrap();
    let keys: Vec<&str> = links.iter().map(|row| row["link"].as_str().unwrap()).collect();
    assert_eq!(keys, ["nvlink_h100", "nvlink_a100", "pcie5", "pcie4", "network_100"]);
    // Two shards of 65,536 elements; a link of 11.5 GB/s takes 46 us for one, 67 for three calls, and the sum two.
    let ms = links[4]["exchange_ms"].as_f64().unwrap();
    assert!((0.114..0.116).contains(&ms), "{ms} ms");
}
