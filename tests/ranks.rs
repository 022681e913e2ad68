//! A run has the same bits for every number of ranks that its micro-batches allow: ranks as threads, each with a device
//! of its own, write the checkpoint of one rank, whatever is trained, and go on from each other's.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use ddpm_cuda::checkpoint;
use ddpm_cuda::config::{Config, Given};
use ddpm_cuda::data::{Data, Dataset, Extent};
use ddpm_cuda::device::Device;
use ddpm_cuda::device::cuda::Gpu;
use ddpm_cuda::exchange::Exchange;
use ddpm_cuda::ops::grad_norm::CHUNK;
use ddpm_cuda::recipe;
use ddpm_cuda::tensor::DType;
use ddpm_cuda::train::{Changes, Run, Start, StepReport, Trainer, Validation, Watch};
use npyz::WriterBuilder;
use walkdir::WalkDir;

use support::{each_rank, each_rank_of_machines, gpu};

const CLASSES: usize = 3;

/// A network of which each of four ranks has a shard of its own, and one with part of a chunk; with all that draws.
fn network() -> Config {
    let mut c = support::tiny(8, 8, 2);
    c.model.widths = vec![32, 64];
    c.model.classes = CLASSES;
    (c.batch, c.accumulate) = (8, 4);
    // The norm of the whole clips, and the average differs from the weights.
    (c.grad_clip, c.learning_rate) = (0.1, 1e-2);
    c
}

/// The same of one chunk: most ranks have no weight to update.
fn small() -> Config {
    Config { model: support::tiny(8, 8, 2).model, ..network() }.with("classes", "3")
}

/// Settings by name.
trait With {
    fn with(self, key: &str, value: &str) -> Self;
}

impl With for Config {
    fn with(mut self, key: &str, value: &str) -> Self {
        self.set(key, value).unwrap();
        self
    }
}

/// Bars that move from image to image, their number of classes; 11 of them held out.
fn data(c: &Config) -> Data {
    let set = |count: usize, shift: usize| {
        let bar = move |i: usize, p: usize| p % 8 == (i + shift) % 8;
        let pixel = move |i: usize, p: usize| if bar(i, p) { [250, 10] } else { [20 + (i % 7) as u8, 90] };
        let images = (0..count).flat_map(|i| (0..64).flat_map(move |p| pixel(i, p))).collect();
        let labels = (0..count).map(|i| (i % CLASSES) as u32).collect();
        Dataset::new(Extent { size: c.model.image_size, channels: 2 }, images, Some(labels))
    };
    let classes = (0..CLASSES).map(|k| k.to_string()).collect();
    Data { train: set(30, 0), held_out: set(11, 3), classes, notes: Vec::new(), skipped: Vec::new() }
}

/// The files of a folder by their paths within it.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = WalkDir::new(folder).into_iter().map(|entry| entry.unwrap()).filter(|e| e.file_type().is_file());
    let named = |path: &Path| (path.strip_prefix(folder).unwrap().display().to_string(), fs::read(path).unwrap());
    entries.map(|entry| named(entry.path())).collect()
}

/// What a run leaves: the checkpoint, the measurements of its steps and of the held-out images, to the bit.
#[derive(PartialEq)]
struct Left {
    files: BTreeMap<String, Vec<u8>>,
    reports: Vec<[u64; 3]>,
    validated: [u64; 2],
}

impl Left {
    #[track_caller]
    fn is_that_of(&self, other: &Left, name: &str) {
        for (file, bytes) in &other.files {
            assert!(self.files.get(file) == Some(bytes), "{name}: {file} has other bytes");
        }
        assert_eq!(self.files.len(), other.files.len(), "{name}: files");
        // Of a resumed run those from there on.
        let reports = &other.reports[other.reports.len() - self.reports.len()..];
        assert_eq!((&self.reports[..], self.validated), (reports, other.validated), "{name}: what was measured");
    }
}

/// A trainer in each of `ranks` ranks, begun anew or from the checkpoint `from`, up to step `steps`.
fn run(c: &Config, ranks: usize, from: Option<&Path>, steps: u32, open: &(dyn Fn() -> Device + Sync)) -> Left {
    run_on_machines(c, 1, ranks, from, steps, open)
}

/// The same of ranks that exchange as those of so many machines.
fn run_on_machines(
    c: &Config,
    machines: usize,
    ranks: usize,
    from: Option<&Path>,
    steps: u32,
    open: &(dyn Fn() -> Device + Sync),
) -> Left {
    let folder = tempfile::tempdir().unwrap();
    let measured = each_rank_of_machines(machines, ranks, |exchange| {
        let exchange = if ranks == 1 { Exchange::alone() } else { exchange };
        let mut trainer = Trainer::of_rank(c, data(c), &open(), exchange).unwrap();
        if let Some(from) = from {
            checkpoint::restore(from, trainer.state_mut()).unwrap();
        }
        let mut reports = Vec::new();
        while trainer.steps_done() < steps {
            trainer.step().unwrap();
            // All at once at the end on a GPU, which holds 256.
            if trainer.reports_are_due() || trainer.steps_done() == steps {
                reports.extend(trainer.reports().unwrap());
            }
        }
        let bits = |r: &StepReport| [r.loss, r.vlb.unwrap_or(0.0), r.grad_norm].map(f64::to_bits);
        let Validation { quarters, vlb, .. } = trainer.validate(&AtomicBool::new(false)).unwrap();
        let validated = [quarters.mean().unwrap(), vlb.unwrap_or(0.0)].map(f64::to_bits);
        trainer.save(folder.path()).unwrap();
        (reports.iter().map(bits).collect::<Vec<_>>(), validated)
    });
    assert!(measured.iter().all(|of_rank| *of_rank == measured[0]), "ranks have measured different things");
    let (reports, validated) = measured.into_iter().next().unwrap();
    let path = checkpoint::newest(folder.path()).unwrap().expect("a checkpoint");
    assert_eq!(path, folder.path().join(format!("checkpoints/{steps}")));
    Left { files: files(&path), reports, validated }
}

/// All these numbers of ranks leave the same; so do two of them from a checkpoint of the last, half-way.
fn same_for(name: &str, c: &Config, ranks: &[usize], steps: u32, open: &(dyn Fn() -> Device + Sync)) {
    c.validate().unwrap();
    let [first, others @ ..] = ranks else { panic!("numbers of ranks") };
    let want = run(c, *first, None, steps, open);
    assert!(want.reports.windows(2).all(|two| two[0] != two[1]), "{name}: steps that do not differ show nothing");
    for &ranks in others {
        run(c, ranks, None, steps, open).is_that_of(&want, &format!("{name}, {ranks} ranks"));
    }
    let half = tempfile::tempdir().unwrap();
    let last = ranks[ranks.len() - 1];
    for (file, bytes) in run(c, last, None, steps / 2, open).files {
        let path = half.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    for &ranks in &ranks[..2] {
        let left = run(c, ranks, Some(half.path()), steps, open);
        left.is_that_of(&want, &format!("{name}, {ranks} ranks from a checkpoint of {last}"));
    }
}

#[test]
fn any_number_of_ranks_writes_the_same_checkpoint() {
    let c = network();
    let count = Trainer::new(&c, data(&c), &Device::cpu()).unwrap().params().specs().count();
    let shard = count.div_ceil(4).next_multiple_of(CHUNK);
    assert!(3 * shard < count && !count.is_multiple_of(CHUNK), "{count} parameters in shards of {shard}");
    same_for("f32", &c, &[1, 2, 4], 6, &Device::cpu);
    // Beside one another too, in guarded memory.
    same_for("guarded", &c, &[4, 1], 2, &Device::cpu_guarded);
}

#[test]
fn whatever_is_trained_has_the_same_bits() {
    let few = small().with("timesteps", "3");
    let cases = [
        ("the bound, by importance", few.clone().with("loss", "vlb").with("timestep_sampling", "importance"), 14),
        ("a learned variance", small().with("variance", "learned_range").with("loss", "hybrid"), 4),
        ("stratified", small().with("timestep_sampling", "stratified").with("label_dropout", "0.3"), 4),
        ("neither clipped nor averaged", small().with("grad_clip", "0").with("ema_decay", "0"), 4),
        ("weight decay", small().with("weight_decay", "0.1"), 4),
        ("recomputed", small().with("recompute", "blocks"), 4),
        ("a learned schedule", small().with("timesteps", "12").with("schedule", "learned").with("loss", "vlb"), 6),
        ("a classifier", small().into_classifier(), 4),
    ];
    for (name, c, steps) in cases {
        same_for(name, &c, &[1, 2, 4], steps, &Device::cpu);
    }
}

/// Three, five, six and twelve micro-batches: one rank, and those that have a power of two of them each.
#[test]
fn any_number_of_micro_batches_is_shared() {
    for (micro_batches, ranks) in [(3, &[1, 3][..]), (5, &[1, 5]), (6, &[1, 3, 6]), (12, &[1, 3, 6, 12])] {
        let c = Config { batch: micro_batches, accumulate: micro_batches, ..small() };
        same_for(&format!("{micro_batches} micro-batches"), &c, ranks, 4, &Device::cpu);
    }
}

/// Two machines of two ranks, four of two, and three of two, whose sums are a tree that is not full.
#[test]
fn ranks_of_several_machines_write_the_checkpoint_of_one() {
    for (machines, ranks) in [(2, 4), (4, 8), (3, 6)] {
        let micro_batches = 2 * ranks;
        let c = Config { batch: micro_batches, accumulate: micro_batches, ..network() };
        let want = run(&c, 1, None, 4, &Device::cpu);
        let left = run_on_machines(&c, machines, ranks, None, 4, &Device::cpu);
        left.is_that_of(&want, &format!("{ranks} ranks of {machines} machines"));
    }
}

#[test]
fn ranks_that_cannot_share_the_micro_batches_are_refused() {
    let c = Config { batch: 12, accumulate: 12, ..small() };
    for ranks in [2, 4, 5, 24] {
        let refused = each_rank(ranks, |exchange| {
            Trainer::of_rank(&c, data(&c), &Device::cpu(), exchange).map(|_| ()).unwrap_err().to_string()
        });
        let want = format!(
            "accumulate = 12: a step of so many micro-batches is computed on 1 or 3 or 6 or 12 devices, not on {ranks}; \
             take one of these numbers, or for a new run a multiple of {ranks} by a power of two for accumulate"
        );
        assert!(refused.iter().all(|refused| *refused == want), "{refused:?}");
    }
}

/// How a run ends in which image 17, the only one of the last class, makes a loss that is not a number, since the
/// embedding of its class is none: after which step, with which words, and the bits of its weights, of every rank
/// alike.
fn ended(c: &Config, ranks: usize, open: &(dyn Fn() -> Device + Sync)) -> (u32, String, Vec<u32>) {
    let labelled = || {
        let mut data = data(c);
        let images = (0..30).flat_map(|i| data.train.image(i).to_vec()).collect();
        let labels = (0..30).map(|i| if i == 17 { 2 } else { i % 2 }).collect();
        data.train = Dataset::new(data.train.extent(), images, Some(labels));
        data
    };
    let mut all = each_rank(ranks, |exchange| {
        let exchange = if ranks == 1 { Exchange::alone() } else { exchange };
        let mut trainer = Trainer::of_rank(c, labelled(), &open(), exchange).unwrap();
        let mut weights = trainer.params().host().unwrap().into_owned();
        let specs = trainer.params().specs();
        let (embedding, spec) = specs.iter().find(|(_, spec)| spec.name == "class_embedding.weight").unwrap();
        let row = spec.shape.len() / spec.shape.n;
        weights[specs.range(embedding)][2 * row..].fill(f32::NAN);
        trainer.state_mut().params.write(&weights).unwrap();
        let error = loop {
            assert!(trainer.steps_done() < 8, "no step has the image whose class has no embedding");
            // A GPU has launched steps beyond the bad one by then.
            match trainer.step() {
                Ok(()) if !trainer.reports_are_due() && trainer.steps_done() < 8 => {}
                done => match done.and_then(|()| trainer.reports()) {
                    Ok(_) => {}
                    Err(error) => break error.to_string(),
                },
            }
        };
        let after = trainer.params().host().unwrap().iter().map(|w| w.to_bits()).collect::<Vec<u32>>();
        (trainer.steps_done(), error, after)
    });
    let words: Vec<&String> = all.iter().map(|(_, error, _)| error).collect();
    assert!(all.iter().all(|rank| *rank == all[0]), "ranks end differently: {words:?}");
    all.remove(0)
}

/// One rank has the image, and all end at its step.
fn all_end_as_one_rank(c: &Config, ranks: &[usize], open: &(dyn Fn() -> Device + Sync)) {
    let (step, error, weights) = ended(c, 1, open);
    assert!(step > 0, "the first step already has it");
    for part in [&format!("step {}: the loss is NaN", step + 1), "not finite is the output of"] {
        assert!(error.contains(part), "{error} does not say {part:?}");
    }
    for &ranks in ranks {
        let (their_step, their_error, their_weights) = ended(c, ranks, open);
        assert_eq!((their_step, &their_error), (step, &error), "{ranks} ranks");
        assert!(their_weights[..weights.len()] == weights, "{ranks} ranks: other weights");
    }
}

#[test]
fn what_is_not_finite_on_one_rank_stops_all() {
    all_end_as_one_rank(&network(), &[2, 4], &Device::cpu);
}

#[test]
fn what_is_not_finite_on_one_gpu_stops_all() {
    if gpu::available() {
        let open = || Device::Cuda(Gpu::open(0, DType::F32, false).expect("the GPU opens"));
        all_end_as_one_rank(&Config { batch: 4, ..small() }, &[2, 4], &open);
    }
}

/// Settings of a run on 30 images in a file, a third of them held out.
fn on_file(folder: &Path) -> Config {
    let path = folder.join("images.npy");
    let file = fs::File::create(&path).unwrap();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&[30, 8, 8, 3]).writer(file).begin_nd().unwrap();
    writer.extend((0..30 * 8 * 8 * 3).map(|i| (i * 97 % 251) as u8)).unwrap();
    writer.finish().unwrap();
    let mut c = small().with("classes", "0").with("channels", "3").with("held_out", "0.3");
    c.data = path.display().to_string();
    (c.steps, c.log_every, c.validate_every, c.checkpoint_every, c.sample_every) = (6, 2, 3, 3, 3);
    c
}

/// A run with its folder: the first rank writes all that one rank writes, and the others go on where it stopped.
#[test]
fn a_run_of_ranks_leaves_the_folder_of_one() {
    let folder = tempfile::tempdir().unwrap();
    let c = on_file(folder.path());
    let begin = |ranks: usize, out: &Path, steps: u32| {
        let config = Config { steps, ..c.clone() };
        each_rank(ranks, |exchange| {
            let exchange = if ranks == 1 { Exchange::alone() } else { exchange };
            let start = Start::New { config: &config, given: &Given::all(), out: Some(out) };
            let mut run = Run::open_rank(start, &Device::cpu(), exchange, &mut ()).unwrap();
            run.train(&AtomicBool::new(false), &mut ()).unwrap()
        })
    };
    let resume = |ranks: usize, run: &Path, steps: u32| {
        each_rank(ranks, |exchange| {
            let exchange = if ranks == 1 { Exchange::alone() } else { exchange };
            let start = Start::Resume { run, changes: Changes { steps: Some(steps), ..Changes::default() } };
            let mut run = Run::open_rank(start, &Device::cpu(), exchange, &mut ()).unwrap();
            run.train(&AtomicBool::new(false), &mut ()).unwrap();
        });
    };
    // Without what tells of machine and time.
    let left = |run: &Path| {
        let mut files = files(run);
        files.retain(|name, _| name.starts_with("checkpoints") || name.starts_with("samples") || name == "config.toml");
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines = metrics.lines().map(|line| {
            let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
            ["elapsed_s", "images_per_s"].iter().for_each(|key| line[*key] = serde_json::Value::Null);
            line.to_string()
        });
        (files, lines.collect::<Vec<_>>(), run.join("report.html").is_file())
    };
    let one = folder.path().join("one");
    begin(1, &one, 6);
    let want = left(&one);
    assert!(want.0.len() > 10 && want.1.len() >= 4 && want.2, "files {:?}", want.0.keys());
    for ranks in [2, 4] {
        let run = folder.path().join(format!("{ranks} ranks"));
        let checkpoints = begin(ranks, &run, 6);
        assert!(checkpoints.iter().all(|path| *path == run.join("checkpoints/6")), "{checkpoints:?}");
        assert!(left(&run) == want, "{ranks} ranks leave other files");
    }
    let stopped = folder.path().join("stopped");
    begin(4, &stopped, 3);
    resume(2, &stopped, 5);
    resume(1, &stopped, 6);
    let (got, _, _) = left(&stopped);
    let of_last = |files: &BTreeMap<String, Vec<u8>>| {
        files.iter().filter(|(name, _)| name.starts_with("checkpoints/6")).map(|(_, b)| b.clone()).collect::<Vec<_>>()
    };
    assert!(of_last(&got) == of_last(&want.0) && !of_last(&got).is_empty(), "resumed by two ranks and by one");
}

/// Stops a run after its second step.
struct AfterTwo<'a> {
    stop: &'a AtomicBool,
    done: u32,
}

impl Watch for AfterTwo<'_> {
    fn say(&mut self, _line: &str) {}

    fn step(&mut self) {
        self.done += 1;
        self.stop.store(self.done == 2, Ordering::Relaxed);
    }
}

/// One that is asked to stop stops all after the same step, with a checkpoint.
#[test]
fn a_rank_that_is_stopped_stops_all() {
    let folder = tempfile::tempdir().unwrap();
    let (c, out) = (on_file(folder.path()), folder.path().join("run"));
    let done = each_rank(4, |exchange| {
        let stop = AtomicBool::new(false);
        let mut watch = AfterTwo { stop: &stop, done: if exchange.rank() == 2 { 0 } else { 100 } };
        let start = Start::New { config: &c, given: &Given::all(), out: Some(&out) };
        let mut run = Run::open_rank(start, &Device::cpu(), exchange, &mut ()).unwrap();
        let checkpoint = run.train(&stop, &mut watch).unwrap();
        (run.trainer().steps_done(), checkpoint)
    });
    assert_eq!(done, [(); 4].map(|()| (2, out.join("checkpoints/2"))));
}

/// Settings that nobody has chosen are made to fit the ranks.
#[test]
fn micro_batches_are_chosen_for_the_ranks() {
    let chosen = |batch: usize, accumulate: usize, ranks: usize| {
        let mut c = Config { batch, accumulate, ..small() };
        recipe::suit_ranks(&mut c, &Given::default(), ranks).map(|note| (c.accumulate, note.is_some()))
    };
    assert_eq!(chosen(128, 1, 1).unwrap(), (1, false));
    assert_eq!(chosen(128, 1, 8).unwrap(), (8, true));
    assert_eq!(chosen(128, 16, 8).unwrap(), (16, false));
    assert_eq!(chosen(96, 8, 6).unwrap(), (12, true), "as many as before do not fit");
    assert_eq!(chosen(96, 32, 24).unwrap(), (48, true));
    let refused = chosen(100, 1, 8).unwrap_err().to_string();
    assert_eq!(refused, "batch = 100: on 8 devices a step takes a multiple of 8 images");
    let mut given = Config { batch: 128, accumulate: 3, ..small() };
    assert!(recipe::suit_ranks(&mut given, &Given::all(), 8).unwrap().is_none() && given.accumulate == 3);
}

/// Ranks that would not train alike are refused by what differs.
#[test]
fn ranks_with_other_settings_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (c, out) = (on_file(folder.path()), folder.path().join("run"));
    let refused = each_rank(2, |exchange| {
        let config = Config { seed: 5 + exchange.rank() as u64, ..c.clone() };
        let start = Start::New { config: &config, given: &Given::all(), out: Some(&out) };
        Run::open_rank(start, &Device::cpu(), exchange, &mut ()).map(|_| ()).unwrap_err().to_string()
    });
    let want = "the ranks of a run have the same settings, but rank 0 has seed = 5 and rank 1 has seed = 6";
    assert!(refused.iter().all(|refused| refused == want), "{refused:?}");
    assert!(!out.exists(), "a folder of a run that never was");
}

/// On GPUs, each rank with a context of its own: one rank, which replays its steps as graphs, and several, which launch
/// kernel by kernel since they exchange through the host.
#[test]
fn gpus_write_the_same_checkpoint() {
    if !gpu::available() {
        return;
    }
    for dtype in [DType::F32, DType::Bf16] {
        let open = move || Device::Cuda(Gpu::open(0, dtype, false).expect("the GPU opens"));
        same_for(&format!("{dtype:?}"), &Config { batch: 4, ..network() }, &[1, 2, 4], 4, &open);
    }
    let open = || Device::Cuda(Gpu::open(0, DType::F32, false).expect("the GPU opens"));
    let small = || Config { batch: 4, ..small() };
    let importance = small().with("timesteps", "3").with("loss", "vlb").with("timestep_sampling", "importance");
    same_for("importance", &importance, &[1, 2], 12, &open);
    let learned = small().with("timesteps", "12").with("schedule", "learned").with("loss", "vlb");
    same_for("a learned schedule", &learned, &[1, 4], 4, &open);
    same_for("a classifier", &small().into_classifier(), &[1, 2], 4, &open);
}
