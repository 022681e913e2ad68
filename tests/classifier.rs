//! Classifiers of noised images: the gradient that guides, training and resuming, their folders.

mod support;

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use ddpm_cuda::checkpoint;
use ddpm_cuda::classifier::Classifier;
use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::config::{Config, Given};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::ops::cross_entropy::reference;
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::train::{Run, Start, Trainer};
use ddpm_cuda::unet::UNet;

use support::{close_to_largest, gpu, network, numbers, per_image, same_bits, to_f32};

const CLASSES: usize = 3;

fn tiny() -> Config {
    let mut c = support::tiny(8, 12, 2).into_classifier();
    c.model.classes = CLASSES;
    // Not almost zero as at the start of a training, so that every layer counts.
    c.learning_rate = 1e-2;
    c
}

/// Images of one of three bars, each with its class.
fn bars(c: &Config, count: usize) -> Dataset {
    let (h, w) = (c.model.image_size.h, c.model.image_size.w);
    let pixel = |i: usize, x: usize| if x / 4 == i % CLASSES { [250, 10] } else { [20 + (i % 7) as u8, 200] };
    let images = (0..count).flat_map(|i| (0..h * w).flat_map(move |p| pixel(i, p % w))).collect();
    let labels = (0..count).map(|i| (i % CLASSES) as u32).collect();
    Dataset::new(Extent { size: c.model.image_size, channels: 2 }, images, Some(labels))
}

fn data(c: &Config) -> Data {
    let classes = (0..CLASSES).map(|k| k.to_string()).collect();
    Data { train: bars(c, 30), held_out: bars(c, 9), classes, notes: Vec::new(), skipped: Vec::new() }
}

fn trained(c: &Config, steps: u32, device: &Device) -> Trainer {
    let mut trainer = Trainer::new(c, data(c), device).unwrap();
    for _ in 0..steps {
        trainer.step().unwrap();
        if trainer.reports_are_due() {
            trainer.reports().unwrap();
        }
    }
    trainer
}

/// A classifier after some steps, saved and loaded on a device.
fn saved(folder: &Path, c: &Config) {
    let trainer = trained(c, 8, &Device::cpu());
    checkpoint::save(folder, c, trainer.state()).unwrap();
    fs::write(folder.join("config.toml"), c.to_toml()).unwrap();
}

fn images(device: &Device, n: usize) -> Tensor {
    let shape = Shape::new(n, 8, 12, 2);
    Tensor::from_slice(device, shape, &to_f32(&numbers(5, shape.len()))).unwrap()
}

/// sum_i log p(y_i given x_i), in f64 from the f32 logits.
fn log_probability(classifier: &Classifier, x: &Tensor, t: u32, labels: &[u32]) -> f64 {
    let (_, logits) = classifier.features(&Device::cpu(), x, t).unwrap();
    let z: Vec<f64> = logits.data().iter().map(|&z| f64::from(z)).collect();
    -reference::forward(&z, labels, CLASSES).iter().sum::<f64>()
}

/// Along random directions v: (f(x + h v) - f(x - h v)) / 2h = g v + h^2/6 f''' + rounding / h. The quotients at h and
/// h/2 give the second term: their difference is 3/4 of that at h. f sums three images' logarithms, whose logits err by
/// the tolerance of whole networks, relative to the largest of them.
#[test]
fn the_gradient_is_the_derivative() {
    let folder = tempfile::tempdir().unwrap();
    saved(folder.path(), &tiny());
    let device = Device::cpu();
    let classifier = Classifier::load(&device, folder.path()).unwrap();
    let (x, labels, t) = (images(&device, 3), [2, 0, 1], 40);
    let gradient = classifier.gradient(&device, &x, t as f32, &labels).unwrap();
    assert_eq!((gradient.shape(), gradient.dtype()), (x.shape(), DType::F32));
    let (_, logits) = classifier.features(&device, &x, t).unwrap();
    let largest = logits.data().iter().fold(0.0, |m: f64, z| m.max(f64::from(z.abs())));
    let mut norm: f64 = 0.0;
    for seed in 0..6 {
        let v = numbers(100 + seed, x.shape().len());
        let along = |h: f64| {
            let moved: Vec<f32> = x.data().iter().zip(&v).map(|(&x, v)| (f64::from(x) + h * v) as f32).collect();
            log_probability(&classifier, &Tensor::from_slice(&device, x.shape(), &moved).unwrap(), t, &labels)
        };
        let quotient = |h: f64| (along(h) - along(-h)) / (2.0 * h);
        let h = 0.02;
        let (coarse, fine) = (quotient(h), quotient(h / 2.0));
        let got: f64 = gradient.data().iter().zip(&v).map(|(&g, v)| f64::from(g) * v).sum();
        let budget = (coarse - fine).abs() + 3.0 * 2.0 * network::F32 * largest.max(1.0) / h;
        assert!((got - fine).abs() <= budget, "along {seed}: {got}, the difference is {fine} +- {budget:e}");
        norm = norm.max(got.abs() / budget);
    }
    assert!(norm > 10.0, "the budget is as large as the derivatives: {norm}");
}

#[test]
fn images_of_a_batch_do_not_interact() {
    let folder = tempfile::tempdir().unwrap();
    saved(folder.path(), &tiny());
    let device = Device::cpu();
    let classifier = Classifier::load(&device, folder.path()).unwrap();
    let (x, labels) = (images(&device, 3), [1, 1, 2]);
    let all = classifier.gradient(&device, &x, 7.0, &labels).unwrap();
    let each = x.shape().len() / 3;
    for i in 0..3 {
        let one = Tensor::from_slice(&device, Shape { n: 1, ..x.shape() }, &x.data()[i * each..][..each]).unwrap();
        let alone = classifier.gradient(&device, &one, 7.0, &labels[i..=i]).unwrap();
        same_bits("alone", alone.data(), &all.data()[i * each..][..each]);
    }
    let other = classifier.gradient(&device, &x, 7.0, &[0, 1, 2]).unwrap();
    assert_ne!(other.data()[..each], all.data()[..each], "the class does not matter");
    same_bits("another image's class", &other.data()[each..], &all.data()[each..]);
}

/// The gradient and the logits on a GPU, in f32 and bf16, against the CPU's.
#[test]
fn the_gpu_has_the_gradient_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    saved(folder.path(), &tiny());
    let cpu = Device::cpu();
    let of_cpu = Classifier::load(&cpu, folder.path()).unwrap();
    let (x, labels) = (images(&cpu, 2), [2, 1]);
    let want = of_cpu.gradient(&cpu, &x, 30.0, &labels).unwrap();
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        let device = Device::Cuda(gpu);
        let classifier = Classifier::load(&device, folder.path()).unwrap();
        let (unet, specs) = UNet::new(&classifier.config().model).unwrap();
        let operations = specs.iter().count();
        let x = Tensor::from_slice(&device, x.shape(), x.data()).unwrap();
        let got = classifier.gradient(&device, &x, 30.0, &labels).unwrap();
        assert_eq!(got.dtype(), DType::F32);
        // Twice: both devices err.
        let tolerance = 2.0 * network::tolerance(dtype, operations);
        let share = close_to_largest("gradient", &got.to_vec().unwrap(), want.data(), tolerance);
        println!("{dtype:?}: {share:.3} of {tolerance:.1e}");
        drop(unet);
    }
}

#[test]
fn features_are_what_the_last_layer_sees() {
    let c = tiny();
    let trainer = trained(&c, 3, &Device::cpu());
    let device = Device::cpu();
    let x = Var::constant(images(&device, 2));
    let t = per_image(&device, [3.0, 3.0]);
    let mut tape = Tape::inference(&device, trainer.params());
    let (features, logits) = trainer.unet().features(&mut tape, &x, &t).unwrap();
    assert_eq!((features.shape(), logits.shape()), (Shape::new(2, 1, 1, 16), Shape::new(2, 1, 1, CLASSES)));
    let again = trainer.unet().forward(&mut tape, &x, &t, &Conditioning::NONE, None).unwrap();
    same_bits("logits", again.data(), logits.data());
    let specs = trainer.params().specs();
    let param = |name: &str| specs.iter().find(|(_, spec)| spec.name == name).unwrap().0;
    let [w, b] = ["pool.to_classes.weight", "pool.to_classes.bias"].map(|name| trainer.params().get(param(name)));
    for (i, z) in logits.data().iter().enumerate() {
        let row = &features.data()[i / CLASSES * 16..][..16];
        let want: f32 = row.iter().zip(&w[i % CLASSES * 16..][..16]).map(|(x, w)| x * w).sum::<f32>() + b[i % CLASSES];
        assert!((z - want).abs() <= 1e-5 * (1.0 + want.abs()), "{z}, expected {want}");
    }
}

/// The way down and the middle have the names of the network that predicts noise; the rest is the pooling.
#[test]
fn the_way_down_is_the_u_nets() {
    let mut c = tiny();
    let (unet, specs) = UNet::new(&c.model).unwrap();
    let names: Vec<String> = specs.iter().map(|(_, spec)| spec.name.clone()).collect();
    c.model.classifier = false;
    c.model.classes = 0;
    let (_, whole) = UNet::new(&c.model).unwrap();
    let whole: Vec<String> = whole.iter().map(|(_, spec)| spec.name.clone()).collect();
    let own = |name: &&String| name.starts_with("pool.");
    let down = |name: &&String| !name.starts_with("up_blocks.") && !name.starts_with("conv_out.");
    let shared: Vec<&String> = names.iter().filter(|name| !own(name)).collect();
    assert_eq!(shared, whole.iter().filter(down).collect::<Vec<_>>());
    assert_eq!(
        names.iter().filter(own).collect::<Vec<_>>().len(),
        9,
        "positions, and weights and biases of q, k, v and the classes"
    );
    let costs = unet.costs(&specs, 8, 12);
    assert_eq!(costs.last().unwrap().place, "pool");
    assert_eq!(costs.iter().map(|cost| cost.params).sum::<usize>(), specs.count());
}

#[test]
fn it_learns_its_classes() {
    let mut c = tiny();
    (c.model.dropout, c.flip, c.accumulate) = (0.0, false, 1);
    let mut trainer = Trainer::new(&c, data(&c), &Device::cpu()).unwrap();
    let mut right = Vec::new();
    for _ in 0..150 {
        trainer.step().unwrap();
        let report = trainer.reports().unwrap().pop().unwrap();
        assert!(report.loss.is_finite());
        right.push(report.right.mean().unwrap());
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let (first, last) = (mean(&right[..20]), mean(&right[110..]));
    // Three classes at chance; the last timesteps of a hundred are hardly more than noise.
    assert!(first < 0.6 && last > 0.75, "right: {first}, then {last}");
    assert!(trainer.validate(&AtomicBool::new(false)).unwrap().quarters.mean().unwrap() < 1.0);
}

#[test]
fn a_resumed_classifier_continues_with_the_same_bits() {
    let c = tiny();
    let folder = tempfile::tempdir().unwrap();
    let whole = trained(&c, 6, &Device::cpu());
    let first = trained(&c, 4, &Device::cpu());
    let path = checkpoint::save(folder.path(), &c, first.state()).unwrap();
    let mut second = Trainer::new(&c, data(&c), &Device::cpu()).unwrap();
    assert_eq!(checkpoint::newest(folder.path()).unwrap(), Some(path.clone()));
    checkpoint::restore(&path, second.state_mut()).unwrap();
    for _ in 0..2 {
        second.step().unwrap();
    }
    let (a, b) = (whole.state(), second.state());
    same_bits("weights", &b.params.host().unwrap(), &a.params.host().unwrap());
    same_bits("moving average", &b.ema.host().unwrap(), &a.ema.host().unwrap());
    same_bits("first moments", b.m.data(), a.m.data());
    same_bits("second moments", b.v.data(), a.v.data());
}

#[test]
fn a_classifier_is_no_model_and_a_model_no_classifier() {
    let folder = tempfile::tempdir().unwrap();
    let (classifier, model) = (folder.path().join("classifier-run"), folder.path().join("model"));
    [&classifier, &model].iter().for_each(|path| fs::create_dir(path).unwrap());
    saved(&classifier, &tiny());
    let mut c = support::tiny(8, 12, 2);
    c.data = "mnist".into();
    let trainer = Trainer::new(&c, data(&c), &Device::cpu()).unwrap();
    checkpoint::save(&model, &c, trainer.state()).unwrap();
    fs::write(model.join("config.toml"), c.to_toml()).unwrap();
    let device = Device::cpu();
    let network = classifier.join("checkpoints/8/classifier");
    for path in [&classifier, &classifier.join("checkpoints/8"), &network] {
        let refused = checkpoint::describe(path).map(|_| ()).unwrap_err().to_string();
        assert!(refused.ends_with("is a classifier, which draws no images; a model is expected"), "{refused}");
    }
    for path in [&model, &model.join("checkpoints/0")] {
        let refused = Classifier::load(&device, path).map(|_| ()).unwrap_err().to_string();
        assert!(refused.ends_with("holds no classifier; a run of ddpm-cuda train-classifier is expected"), "{refused}");
    }
    let refused = Classifier::load(&device, &folder.path().join("nothing")).map(|_| ()).unwrap_err().to_string();
    assert!(refused.ends_with("does not exist; a run of ddpm-cuda train-classifier is expected"), "{refused}");
    let loaded = Classifier::load(&device, &classifier).unwrap();
    assert!(loaded.config().model.classifier && loaded.notes().is_empty(), "{:?}", loaded.notes());
    assert_eq!(loaded.config().model, tiny().model);
}

#[test]
fn only_models_of_the_same_images_and_process_are_guided() {
    let folder = tempfile::tempdir().unwrap();
    saved(folder.path(), &tiny());
    let classifier = Classifier::load(&Device::cpu(), folder.path()).unwrap();
    let model = support::tiny(8, 12, 2);
    classifier.check_guides(&model).unwrap();
    let refused = |change: &dyn Fn(&mut Config)| {
        let mut model = model.clone();
        change(&mut model);
        classifier.check_guides(&model).unwrap_err().to_string()
    };
    let advice = "; train a classifier on the model's data with the model's process";
    assert_eq!(
        refused(&|c| c.model.channels = 3),
        format!("the classifier has images of 8x12x2 and the model 8x12x3{advice}")
    );
    assert_eq!(refused(&|c| c.model.classes = 7), format!("the classifier has classes = 3 and the model 7{advice}"));
    assert_eq!(
        refused(&|c| c.diffusion.timesteps = 50),
        format!("the classifier has timesteps = 100 and the model 50{advice}")
    );
    // Classes without names, or named by their numbers, are told by number.
    let named = |names: [&str; CLASSES]| -> Vec<String> { names.map(String::from).into() };
    let classes = |own: [&str; CLASSES], theirs: [&str; CLASSES]| {
        let mut c = tiny();
        c.class_names = named(own);
        fs::write(folder.path().join("config.toml"), c.to_toml()).unwrap();
        let classifier = Classifier::load(&Device::cpu(), folder.path()).unwrap();
        let mut model = model.clone();
        (model.model.classes, model.class_names) = (CLASSES, named(theirs));
        classifier.check_guides(&model).map_err(|e| e.to_string())
    };
    assert_eq!(classes(["ape", "cat", "owl"], ["ape", "cat", "owl"]), Ok(()));
    assert_eq!(classes(["ape", "cat", "owl"], ["0", "1", "2"]), Ok(()));
    assert_eq!(
        classes(["ape", "cat", "owl"], ["ape", "owl", "cat"]),
        Err(format!("the classifier has class 1 = cat and the model owl{advice}"))
    );
    let other = refused(&|c| c.diffusion.schedule = ddpm_cuda::diffusion::Kind::Linear);
    assert!(other.starts_with("the classifier has alpha_bar at t = "), "{other}");
}

#[test]
fn a_run_logs_how_often_it_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let mut c = tiny();
    c.model.classes = 0;
    (c.steps, c.log_every, c.validate_every, c.checkpoint_every) = (4, 2, 4, 0);
    let labels: Vec<u32> = bars(&c, 40).labels().unwrap().to_vec();
    let set = bars(&c, 40);
    let bytes: Vec<u8> = (0..40).flat_map(|i| set.image(i).to_vec()).collect();
    let npz = folder.path().join("bars.npz");
    ddpm_cuda::output::write_npz(&npz, Shape::new(40, 8, 12, 2), &bytes, Some(&labels)).unwrap();
    c.data = npz.to_string_lossy().into_owned();
    let mut given = Given::default();
    for (key, _) in c.values().filter(|(key, _)| *key != "classes") {
        given.add(key);
    }
    let run = folder.path().join("run");
    let start = Start::New { config: &c, given: &given, out: Some(&run) };
    Run::open(start, &Device::cpu(), &mut ()).unwrap().train(&AtomicBool::new(false), &mut ()).unwrap();
    let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for line in &lines {
        assert!(line["accuracy"].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share)), "{line}");
        assert_eq!(line["accuracy_by_quarter"].as_array().unwrap().len(), 4);
    }
    assert!(lines[1]["validation_accuracy"].is_f64() && lines[1]["validation_loss"].is_f64(), "{}", lines[1]);
    assert!(!run.join("samples").exists() && run.join("checkpoints/4/classifier/config.json").is_file());
    assert_eq!(Run::settings(&run).unwrap().model.classes, 3);
}
