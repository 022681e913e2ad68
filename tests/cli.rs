//! The program as a process: its output, its files and its exit codes.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::sampler::{Guidance, inversion};
use ddpm_cuda::diffusion::{Kind, Method, Prediction, Sampler, Schedule, Spacing, Timesteps, Variance};
use ddpm_cuda::params::Params;
use ddpm_cuda::sample::{Call, Conditional, Drawing};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::unet::UNet;
use ddpm_cuda::{checkpoint, data, likelihood};
use npyz::WriterBuilder;

use support::network;
use support::places::{self, fixture};
use support::{PLAIN, TINY};

fn ddpm() -> Command {
    let mut command = Command::new(places::program());
    command.stdin(Stdio::null());
    #[cfg(unix)]
    support::hear_signals(&mut command);
    command
}

#[track_caller]
fn ok(command: &mut Command) -> String {
    let out = command.output().unwrap();
    let (stdout, stderr) = (text(&out.stdout), text(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}\n{stdout}{stderr}", out.status);
    stdout
}

/// Runs a command that must fail with `code`, and returns its stderr.
#[track_caller]
fn fails(command: &mut Command, code: i32) -> String {
    let out: Output = command.output().unwrap();
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{command:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{command:?} panicked: {stderr}");
    stderr
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn train(run: &Path, steps: u32) -> Command {
    let mut command = ddpm();
    command
        .args(["train", "--set", "batch=4", "--set", "keep_checkpoints=0", "--seed", "5"])
        .args(["--steps", &steps.to_string(), "--out"])
        .arg(run)
        .args(TINY)
        .args(PLAIN);
    command
}

#[test]
fn trains_and_draws() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let said = ok(train(&run, 6).args([
        "--set",
        "log_every=2",
        "--set",
        "validate_every=3",
        "--set",
        "checkpoint_every=4",
        "--set",
        "sample_every=5",
    ]));
    for part in ["parameters", "GFLOP", "GiB", "validation loss"] {
        assert!(said.contains(part), "train does not say {part:?}:\n{said}");
    }
    let steps: Vec<u64> = fs::read_to_string(run.join("metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            for key in ["loss", "grad_norm", "lr", "images_per_s", "elapsed_s"] {
                assert!(line[key].as_f64().is_some_and(f64::is_finite), "{key} in {line}");
            }
            line["step"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(steps, [2, 3, 4, 6]);
    for file in [
        "config.toml",
        "samples/5.png",
        "samples/6.png",
        "checkpoints/4/training_state.safetensors",
        "checkpoints/6/unet/config.json",
    ] {
        assert!(run.join(file).is_file(), "{file} is missing");
    }

    let draw = |count: &str, out: &str| {
        let out = folder.path().join(out);
        ok(ddpm().args(["sample", "--steps", "3", "--count", count, "--model"]).arg(&run).arg("--out").arg(&out));
        out
    };
    let grid = image::open(draw("5", "grid.png")).unwrap();
    assert!(grid.width() > 28 && grid.height() > 28);
    assert_eq!(&fs::read(draw("2", "process.gif")).unwrap()[..6], b"GIF89a");
    // An image does not depend on the number of images drawn.
    let (three, five) = (draw("3", "three/"), draw("5", "five/"));
    let images = |folder: &Path| {
        let mut files: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files.iter().map(|f| image::open(f).unwrap().into_luma8().into_raw()).collect::<Vec<_>>()
    };
    assert_eq!(images(&three), images(&five)[..3]);
    let npz = draw("3", "three.npz");
    let array = ddpm_cuda::data::npy::parse_npz(&fs::read(npz).unwrap()).unwrap();
    assert_eq!((array[0].0.as_str(), &array[0].1.shape[..]), ("arr_0", &[3, 28, 28, 1][..]));
}

#[test]
fn predicts_what_pytorch_predicts() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let bytes = fs::read(fixture("unet_rgb16/io.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let f32s = |key: &str| bytemuck::pod_collect_to_vec::<u8, f32>(golden.tensor(key).unwrap().data());
    let shape = golden.tensor("x").unwrap().shape().to_vec();
    ddpm_cuda::output::write_npy(&at("x.npy"), &shape, &f32s("x")).unwrap();
    for key in ["t", "labels"] {
        let file = fs::File::create(at(&format!("{key}.npy"))).unwrap();
        let options = npyz::WriteOptions::new().default_dtype().shape(&[shape[0] as u64]).writer(file);
        let mut writer = options.begin_nd().unwrap();
        writer.extend(bytemuck::pod_collect_to_vec::<u8, i32>(golden.tensor(key).unwrap().data())).unwrap();
        writer.finish().unwrap();
    }
    let mut predict = ddpm();
    predict
        .arg("predict")
        .arg("--model")
        .arg(fixture("unet_rgb16"))
        .arg("--x")
        .arg(at("x.npy"))
        .arg("--t")
        .arg(at("t.npy"));
    predict.arg("--out").arg(at("out.npy"));
    assert!(fails(&mut predict, 2).contains("10 classes"));
    ok(predict.arg("--labels").arg(at("labels.npy")));
    let out = ddpm_cuda::data::npy::read(&at("out.npy")).unwrap();
    assert_eq!(out.shape, shape);
    ddpm_cuda::output::write_npy(&at("t.npy"), &shape[..1], &vec![f32::NAN; shape[0]]).unwrap();
    assert!(fails(&mut predict, 1).contains("t.npy: holds NaN"));
    support::close_to_largest("out", &out.to_f32().unwrap(), &f32s("out"), support::network::F32);
}

#[test]
fn info_knows_the_papers_networks() {
    assert!(ok(ddpm().args(["info", "--preset", "cifar10"])).contains("35,746,307 parameters"));
    assert!(ok(ddpm().args(["info", "--preset", "celebahq256"])).contains("113,673,219 parameters"));
    let model = checkpoint::load(&Device::cpu(), &fixture("unet_gray16")).unwrap();
    let digits = model.params.specs().count().to_string();
    // Fewer than a million.
    let (thousands, rest) = digits.split_at(digits.len() - 3);
    let said = ok(ddpm().arg("info").arg("--model").arg(fixture("unet_gray16")));
    assert!(said.contains(&format!("{thousands},{rest} parameters")), "{digits} parameters: {said}");
}

#[test]
fn wrong_usage_is_one_sentence_and_exit_2() {
    // What other tools have as a flag, and what is a setting here.
    for (flag, says) in [
        ("--lr=1e-4", "there is no flag --lr; here it is 'learning_rate', see 'ddpm-cuda train --help'"),
        ("--batch-size=8", "there is no flag --batch-size; here it is 'batch'"),
        ("--num_train_steps=8", "there is no flag --num_train_steps; here it is 'steps'"),
        (
            "--learnin-rate=1",
            "there is no flag --learnin-rate; the nearest setting is 'learning_rate': --set learning_rate=VALUE",
        ),
        ("--image-size=32", "there is no flag --image-size; it is a setting: --set image_size=VALUE"),
        ("--widths=32,64", "there is no flag --widths; it is a setting: --set widths=VALUE"),
        ("--epochs=3", "here it is 'steps' (steps = epochs * images / batch)"),
    ] {
        assert!(fails(ddpm().args(["train", flag]), 2).contains(says), "{flag}");
    }

    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    for (arguments, says) in [
        (vec!["--set", "wdths=8"], "widths"),
        (vec!["--set", "widths=8,x"], "32,64,64"),
        (vec!["--set", "groups=5"], "groups"),
        (vec!["--set", "image_size=30"], "image_size"),
        (vec!["--set", "learning_rate=-1"], "learning_rate"),
        (vec!["--set", "accumulate=3"], "accumulate"),
        (vec!["--preset", "minst"], "mnist"),
        (vec!["--device", "gpu"], "cuda:N"),
        (vec!["--batch", "0"], "batch"),
        (vec!["--set", "blocks_per_level=4000000000"], "128"),
        (vec!["--set", "widths=4000000000"], "65536"),
        (vec!["--stpes", "3"], "--steps"),
    ] {
        let said = fails(train(&run, 1).args(&arguments), 2);
        assert!(said.contains(says), "{arguments:?}: {said:?} does not say {says:?}");
        assert!(!run.exists(), "{arguments:?} left a run folder");
    }
    let model = fixture("unet_gray16");
    for (arguments, says) in [
        (vec!["--out", "x.bmp"], ".png"),
        (vec!["--out", "x.png", "--class", "3"], "unconditional"),
        (vec!["--out", "x.png", "--steps", "1001"], "1000"),
        (vec!["--out", "x.png", "--sampler", "ddim", "--eta", "2"], "eta"),
        (vec!["--out", "x.png", "--eta", "0.5"], "--sampler ddim"),
        (vec!["--out", "x.png", "--sampler", "ddim", "--variance", "fixed_small"], "--eta"),
        (vec!["--out", "x.png", "--count", "0"], "at least 1"),
        (vec!["--out", "x.png", "--sampler", "dpm++", "--variance", "fixed_small"], "dpm++ adds no noise"),
        (vec!["--out", "x.png", "--variance", "learned_range"], "was trained with"),
        (vec!["--out", "x.png", "--spacing", "odd"], "karras or a list"),
        (vec!["--out", "x.png", "--spacing", "10,20", "--steps", "30"], "leave --steps out"),
        (vec!["--out", "x.png", "--spacing", "900,900"], "cannot keep 900"),
        (vec!["--out", "x.png", "--sampler", "heun", "--steps", "1000"], "from 1 to 999"),
        (vec!["--out", "x.png", "--threshold", "1.5"], "above 0 and at most 1"),
        (vec!["--out", "x.png", "--threshold", "0.9", "--clip-x0", "false"], "leave one out"),
        (vec!["--out", "x.png", "--clip-x0", "maybe"], "true"),
        (vec!["--out", "x.png", "--guidance", "2"], "unconditional"),
        (vec!["--out", "x.png", "--guidance-rescale", "0.7"], "add --guidance"),
        (vec!["--out", "x.png", "--guidance-interval", "1,2"], "add --guidance"),
        (vec!["--out", "x.png", "--corrector", "2", "--sampler", "heun"], "solve an ODE"),
        (vec!["--out", "x.png", "--corrector", "2", "--snr", "0"], "above 0"),
        (vec!["--out", "x.png", "--snr", "0.1"], "add --corrector"),
        (vec!["--out", "x.png", "--shared-noise", "1000"], "0 to 999"),
        (vec!["--out", "x.png", "--progressive", "y.npz"], "FILE.png"),
    ] {
        let said = fails(ddpm().arg("sample").arg("--model").arg(&model).args(&arguments).current_dir(&folder), 2);
        assert!(said.contains(says), "{arguments:?}: {said:?} does not say {says:?}");
    }
}

/// What launchers set and what `--device` names must fit each other.
#[test]
fn ranks_that_cannot_be_are_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let two = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500";
    let slurm = "SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0";
    for (variables, arguments, says) in [
        (
            &format!("{two} LOCAL_WORLD_SIZE=2")[..],
            vec!["--device", "cuda:0-2"],
            "--device names 3 GPUs for 2 ranks of this machine",
        ),
        (&two[..20], vec![], "LOCAL_RANK is not set, though RANK, WORLD_SIZE are"),
        (&two[7..], vec![], "RANK is not set, though WORLD_SIZE, LOCAL_RANK are"),
        ("", vec!["--device", "cuda:7-0"], "'7-0' in 'cuda:7-0' counts down: write 0-7"),
        ("", vec!["--device", "cuda:0,0"], "names GPU 0 twice"),
        (slurm, vec!["--launch", "slurm"], "SLURM_STEP_NODELIST is not set, so this is no task of a job step"),
        ("", vec!["--launch", "mpi"], "OMPI_COMM_WORLD_RANK is not set"),
        ("", vec!["--launch", "torchrun"], "slurm, mpi"),
    ] {
        let variables = variables.split_whitespace().map(|pair| pair.split_once('=').unwrap());
        let said = fails(train(&run, 1).args(&arguments).envs(variables), 2);
        assert!(said.contains(says), "{arguments:?}: {said:?} does not say {says:?}");
        // The parser of arguments adds where to find help.
        assert!(said.trim().lines().count() == 1 || said.contains("--help"), "{said}");
        assert!(!run.exists(), "{arguments:?} left a run folder");
    }
    // What uses one GPU says who takes several.
    for command in [
        "encode --images x --out y.npy",
        "inpaint --images x --mask m.png --out y.png",
        "interpolate --images x y --t 1 --out z.png",
        "likelihood",
        "predict --x x.npy --t t.npy --out y.npy",
    ] {
        let mut command_of = ddpm();
        command_of.args(command.split(' ')).args(["--model", "nowhere", "--device", "cuda:0-3"]);
        let said = fails(&mut command_of, 2);
        let says = "'cuda:0-3' names several GPUs, which only train, train-classifier, sample, quality and eval take: give one";
        assert!(said.contains(says), "{command}: {said}");
    }
    // The variables of a batch job start nothing, and one rank is a process alone.
    let variables = slurm.split_whitespace().map(|pair| pair.split_once('=').unwrap());
    ok(train(&run, 1).envs(variables).envs([("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")]));
}

#[test]
fn what_is_wrong_with_a_file_is_said_with_its_name_and_exit_1() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("empty.npy"), b"").unwrap();
    fs::write(at("text.npz"), b"these are no images").unwrap();
    fs::create_dir(at("nothing")).unwrap();
    fs::create_dir(at("broken")).unwrap();
    fs::write(at("broken/a.png"), b"\x89PNG\r\n\x1a\n and then nothing").unwrap();
    for name in ["empty.npy", "text.npz", "nothing", "broken", "missing"] {
        let said = fails(train(&at("run"), 1).arg("--data").arg(at(name)), 1);
        assert!(said.contains(name) && said.trim().lines().count() == 1, "{name}: {said}");
        assert!(!at("run").exists(), "{name} left a run folder");
    }
    for command in ["sample", "info"] {
        let mut command_line = ddpm();
        command_line.arg(command).arg("--model").arg(at("nothing"));
        if command == "sample" {
            command_line.arg("--out").arg(at("x.png"));
        }
        assert!(fails(&mut command_line, 1).contains("nothing"));
    }
    assert!(fails(ddpm().args(["train", "--resume"]).arg(at("nothing")), 1).contains("config.toml"));
}

/// A run that starts from a model has its weights and its moving average at step 0, its network and its process, and
/// goes on without it.
#[test]
fn a_run_starts_from_a_models_weights() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    noise_images(&at("gray.npy"), 1);
    // The network of the fixture with betas of its own.
    let copy = |name: &str| {
        let model = at(name);
        fs::create_dir_all(&model).unwrap();
        for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
            fs::copy(fixture("unet_gray16").join(file), model.join(file)).unwrap();
        }
        model
    };
    let model = copy("model");
    let betas: Vec<f64> = (0..100).map(|i| 1e-3 + 1e-4 * f64::from(i)).collect();
    let scheduler =
        serde_json::json!({"_class_name": "DDPMScheduler", "num_train_timesteps": 100, "trained_betas": betas});
    fs::write(model.join("scheduler_config.json"), scheduler.to_string()).unwrap();
    let start = |run: &str, arguments: &[&str]| {
        let mut command = ddpm();
        command.args(["train", "--batch", "4", "--steps", "2", "--set", "sample_every=0", "--set", "validate_every=0"]);
        command.args(["--set", "checkpoint_every=1", "--set", "keep_checkpoints=0", "--device", "cpu"]);
        command.arg("--init").arg(&model).arg("--data").arg(at("gray.npy")).arg("--out").arg(at(run)).args(arguments);
        command
    };
    let said = ok(&mut start("run", &[]));
    assert!(said.contains(&format!("starts from the weights of {}", model.display())), "{said}");
    assert!(said.contains("learning_rate = 0.0001, since the weights are trained already"), "{said}");
    let settings = ddpm_cuda::config::Config::read(&at("run/config.toml")).unwrap();
    assert_eq!((settings.init.as_str(), settings.learning_rate), (model.to_str().unwrap(), 1e-4));
    assert_eq!(settings.diffusion.trained_betas, betas);
    let weights = |path: &Path| {
        let bytes = fs::read(path.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<(String, Vec<u8>)> = file.tensors().into_iter().map(|(n, v)| (n, v.data().to_vec())).collect();
        all.sort();
        all
    };
    let given = copy("given/unet");
    let given = weights(given.parent().unwrap());
    assert!(weights(&at("run/checkpoints/0")) == given, "the moving average begins as the model");
    let state = fs::read(at("run/checkpoints/0/training_state.safetensors")).unwrap();
    let state = safetensors::SafeTensors::deserialize(&state).unwrap();
    for (name, data) in &given {
        assert!(state.tensor(&format!("weights.{name}")).unwrap().data() == data, "weights.{name}");
        assert!(state.tensor(&format!("adam_m.{name}")).unwrap().data().iter().all(|b| *b == 0), "adam_m.{name}");
    }
    assert!(weights(&at("run/checkpoints/2")) != given);
    let info = ok(ddpm().arg("info").arg("--model").arg(at("run")));
    assert!(info.contains("process: 100 timesteps, betas one by one from 1.000e-3 to 1.090e-2, fixed_small"), "{info}");

    // From its first checkpoint on it does not need the model. Killed before that it begins from it again.
    let end = |run: &str| fs::read(at(run).join("checkpoints/2/training_state.safetensors")).unwrap();
    let whole = end("run");
    let resume = || {
        let mut command = ddpm();
        command.args(["train", "--device", "cpu", "--resume"]).arg(at("run"));
        command
    };
    let forget = |step: &str| fs::remove_dir_all(at("run/checkpoints").join(step)).unwrap();
    fs::rename(&model, at("moved")).unwrap();
    ["1", "2"].into_iter().for_each(forget);
    ok(&mut resume());
    assert!(end("run") == whole, "resumed from step 0 it has other weights");
    ["0", "1", "2"].into_iter().for_each(forget);
    assert!(fails(&mut resume(), 1).contains(&format!("{}: does not exist", model.display())));
    fs::rename(at("moved"), &model).unwrap();
    ok(&mut resume());
    assert!(end("run") == whole, "begun again from the model it has other weights");

    // Settings that contradict the model are refused by name, wherever they come from.
    fs::write(at("other.toml"), "widths = [8, 16]\n").unwrap();
    let other = at("other.toml");
    for (arguments, says) in [
        (vec!["--set", "widths=8,16"], "widths = [8, 16] is given, but the model of --init has [16, 32]"),
        (vec!["--set", "channels=3"], "channels = 3 is given, but the model of --init has 1"),
        (vec!["--set", "timesteps=1000"], "timesteps = 1000 is given, but the model of --init has 100"),
        (vec!["--set", "schedule=cosine"], "schedule is given, but the model of --init has other betas, one by one"),
        (vec!["--set", "attention_resolutions=16"], "attention_resolutions = [16] is given"),
        (vec!["--config", other.to_str().unwrap()], "widths = [8, 16] is given, but the model"),
    ] {
        let said = fails(&mut start("refused", &arguments), 2);
        assert!(said.contains(says) && said.trim().lines().count() == 1, "{arguments:?}: {said}");
        assert!(!at("refused").exists());
    }
    let mut without = ddpm();
    let said = fails(without.args(["train", "--out"]).arg(at("refused")).arg("--init").arg(&model), 2);
    assert!(said.contains("say with --data which images to train it on"), "{said}");
    let said = fails(ddpm().args(["train", "--resume"]).arg(&model), 1);
    assert!(said.contains("is not a run folder") && said.contains("--init"), "{said}");

    // What may differ: the size of the images, and classes where the model has none.
    let data = at("labelled.npz");
    let pixels: Vec<u8> = (0..12 * 256).map(|i| (i * 97 % 251) as u8).collect();
    let labels: Vec<u32> = (0..12).map(|i| i % 3).collect();
    ddpm_cuda::output::write_npz(&data, Shape::new(12, 16, 16, 1), &pixels, Some(&labels)).unwrap();
    let mut larger = ddpm();
    larger.args(["train", "--batch", "4", "--steps", "1", "--set", "sample_every=0", "--device", "cpu", "--init"]);
    larger.arg(&model).arg("--data").arg(&data).arg("--out").arg(at("larger"));
    let said = ok(larger.args(["--set", "image_size=32", "--set", "classes=3"]));
    assert!(said.contains("images of 32x32 where the model has 16x16"), "{said}");
    assert!(said.contains("the embedding of 3 classes is new and begins at zero"), "{said}");
    let settings = ddpm_cuda::config::Config::read(&at("larger/config.toml")).unwrap();
    assert_eq!((settings.model.attention_resolutions, settings.model.classes), (vec![16], 3));
    let table = weights(&at("larger/checkpoints/0")).into_iter().find(|(name, _)| name == "class_embedding.weight");
    assert!(table.unwrap().1.iter().all(|b| *b == 0));
    let said = ok(&mut start("open", &["--set", "image_size=0"]));
    assert!(!said.contains("where the model has"), "the data have the model's size: {said}");
    // The recorded settings start the same run again.
    let config = at("run/config.toml");
    let mut repeat = ddpm();
    ok(repeat.args(["train", "--device", "cpu", "--config"]).arg(&config).arg("--out").arg(at("repeated")));
    assert!(end("repeated") == whole, "the same settings, other weights");
}

/// Whatever is given of the network and the process must be the model's, and what is not given is taken from it, also
/// where the recipe for the data has another value.
#[test]
fn a_run_from_a_model_has_its_network_and_process() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    noise_images(&at("gray.npy"), 1);
    let settings = |run: &str| ddpm_cuda::config::Config::read(&at(run).join("config.toml")).unwrap();
    let model =
        ["prediction=v", "zero_snr=true", "time_channels=8", "scale_shift_norm=true", "attention_resolutions=8"];
    ok(train(&at("model"), 1).args(model.iter().flat_map(|set| ["--set", set])).arg("--data").arg(at("gray.npy")));
    let start = |run: &str, arguments: &[&str]| {
        let mut command = ddpm();
        command.args(["train", "--batch", "4", "--steps", "1", "--set", "sample_every=0", "--set", "validate_every=0"]);
        command.args(["--device", "cpu", "--init"]).arg(at("model")).arg("--out").arg(at(run)).args(arguments);
        command
    };
    let data = at("gray.npy");
    let data = ["--data", data.to_str().unwrap()];
    ok(start("tuned", &[]).args(data));
    let tuned = settings("tuned");
    assert_eq!((tuned.preset.to_string(), tuned.diffusion.clone()), ("auto".into(), settings("model").diffusion));
    assert!(tuned.model.scale_shift_norm && tuned.model.time_channels() == 8);
    // What is spelled otherwise and means the same is no contradiction.
    let config = at("model/config.toml");
    ok(&mut start("equal", &["--config", config.to_str().unwrap()]));
    for (assignment, says) in [
        ("prediction=eps", "prediction = \"eps\" is given, but the model of --init has \"v\""),
        ("zero_snr=false", "zero_snr = false is given, but the model of --init has true"),
        ("num_heads=2", "num_heads = 2 is given, but the model of --init has 0"),
        ("scale_shift_norm=false", "scale_shift_norm = false is given, but the model of --init has true"),
        ("middle_attention=none", "middle_attention = \"none\" is given, but the model of --init has \"norm\""),
        ("middle_groups=2", "middle_groups = 2 is given, but the model of --init has 0"),
        ("downsample_type=resnet", "downsample_type = \"resnet\" is given, but the model of --init has \"conv\""),
        ("upsample_type=resnet", "upsample_type = \"resnet\" is given, but the model of --init has \"conv\""),
        ("class_embedding=timestep", "class_embedding = \"timestep\" is given, but the model of --init has \"table\""),
        ("time_channels=16", "time_channels = 16 is given, but the model of --init has"),
        ("timestep_scale=0.5", "timestep_scale = 0.5 is given, but the model of --init has 1.0"),
    ] {
        let said = fails(start("refused", &["--set", assignment]).args(data), 2);
        assert!(said.contains(says) && said.trim().lines().count() == 1, "{assignment}: {said}");
        assert!(!at("refused").exists());
    }
}

/// Classes by name; the process and the classes in `info`; what was assumed, said by each command.
#[test]
fn what_a_model_says_of_itself_is_used_and_told() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut model = checkpoint::load(&Device::cpu(), &fixture("unet_rgb16")).unwrap();
    model.config.class_names = (0..10).map(|k| format!("kind {k}")).collect();
    model.config.class_names[4] = "7".into();
    let zeros = Tensor::zeros(&Device::cpu(), Shape::vector(model.params.specs().flat_len())).unwrap();
    let state = checkpoint::State {
        step: 1,
        params: &model.params,
        ema: model.params.flat(),
        m: &zeros,
        v: &zeros,
        data: None,
        importance: None,
        curve: None,
    };
    let saved = checkpoint::save(folder.path(), &model.config, state).unwrap();
    let draw = |class: &str| {
        let mut command = ddpm();
        command.args(["sample", "--count", "1", "--steps", "2", "--class", class, "--device", "cpu", "--model"]);
        command.arg(&saved).arg("--out").arg(at("out.npz"));
        command
    };
    let label = |class: &str| {
        ok(&mut draw(class));
        let arrays = ddpm_cuda::data::npy::parse_npz(&fs::read(at("out.npz")).unwrap()).unwrap();
        arrays[1].1.to_i64().unwrap()[0]
    };
    assert_eq!(["kind 3", "3", "7", "kind 7"].map(label), [3, 3, 4, 7]);
    let said = fails(&mut draw("kind 33"), 2);
    assert!(said.contains("--class kind 33: this model has the classes 0 to 9: 3 kind 3, "), "{said}");
    let info = ok(ddpm().arg("info").arg("--model").arg(&saved));
    assert!(info.contains("10 classes: kind 0, kind 1, kind 2, kind 3, 7, kind 5"), "{info}");
    let process = "process: 1000 timesteps, betas linear from 1.000e-4 to 2.000e-2, fixed_small; spacing even";
    assert!(info.contains(process), "{info}");
    // No scheduler: which process is assumed.
    let assumed = "the process is assumed to be that of DDPMScheduler's defaults";
    let gray = fixture("unet_gray16");
    assert!(ok(ddpm().arg("info").arg("--model").arg(&gray)).contains(assumed));
    let mut sample = ddpm();
    sample.args(["sample", "--count", "1", "--steps", "2", "--model"]).arg(&gray).arg("--out").arg(at("gray.png"));
    assert!(ok(&mut sample).contains(assumed));
}

/// The model's spacing, offset and clipping are what `sample` does unless it is told otherwise.
#[test]
fn the_models_stepping_is_the_default_of_sample() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        fs::copy(fixture("unet_gray16").join(file), folder.path().join(file)).unwrap();
    }
    let draw = |scheduler: serde_json::Value, arguments: &[&str]| {
        fs::write(folder.path().join("scheduler_config.json"), scheduler.to_string()).unwrap();
        let out = folder.path().join("out.npz");
        let mut command = ddpm();
        command.args(["sample", "--count", "2", "--steps", "4", "--device", "cpu", "--model"]).arg(folder.path());
        ok(command.arg("--out").arg(&out).args(arguments));
        fs::read(&out).unwrap()
    };
    let saying = |spacing: &str, offset: u32, clip: bool| {
        serde_json::json!({"_class_name": "DDPMScheduler", "timestep_spacing": spacing, "steps_offset": offset,
            "clip_sample": clip})
    };
    let given =
        ["leading", "even", "trailing"].map(|spacing| draw(saying("linspace", 0, true), &["--spacing", spacing]));
    let own = ["leading", "linspace", "trailing"].map(|spacing| draw(saying(spacing, 0, true), &[]));
    assert!(given == own, "another spacing than the model's");
    assert!(own[0] != own[1] && own[1] != own[2], "the spacing makes no difference to this test");
    assert!(draw(saying("leading", 1, true), &[]) != own[0], "the offset is not obeyed");
    assert!(draw(saying("linspace", 1, true), &[]) == own[1], "an offset where there is none");
    assert!(draw(saying("linspace", 0, false), &[]) != own[1], "clip_sample is not obeyed");
    // One step more than the offset leaves room for.
    fs::write(folder.path().join("scheduler_config.json"), saying("leading", 1, true).to_string()).unwrap();
    let mut command = ddpm();
    command.args(["sample", "--count", "1", "--steps", "1000", "--out", "x.png", "--model"]).arg(folder.path());
    assert!(fails(&mut command, 2).contains("take fewer steps or --spacing even"));
}

#[test]
fn a_run_is_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    ok(&mut train(&run, 1));
    assert!(fails(&mut train(&run, 1), 1).contains("--resume"));
}

#[test]
fn help_lists_every_setting_and_a_closed_pipe_stops_nothing() {
    let said = ok(ddpm().args(["train", "--help"]));
    for setting in ddpm_cuda::config::SETTINGS {
        assert!(said.contains(&format!("  {} = ", setting.key)), "train --help does not list {}", setting.key);
    }
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut child = train(&run, 2).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    assert!(run.join("checkpoints/2").is_dir());
}

/// Writes 20 images of 16x16 with `channels` channels as .npy.
fn noise_images(path: &Path, channels: u64) {
    let options = npyz::WriteOptions::new().default_dtype().shape(&[20, 16, 16, channels]);
    let mut writer = options.writer(fs::File::create(path).unwrap()).begin_nd().unwrap();
    writer.extend((0..20 * 16 * 16 * channels).map(|i| (i * 97 % 251) as u8)).unwrap();
    writer.finish().unwrap();
}

#[test]
fn images_that_png_cannot_hold_become_npz() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (folder.path().join("two.npy"), folder.path().join("run"));
    noise_images(&data, 2);
    let sizes = ["--set", "image_size=0", "--set", "channels=0", "--set", "attention_resolutions=8"];
    ok(train(&run, 1).arg("--data").arg(&data).args(sizes));
    assert!(run.join("samples/1.npz").is_file() && run.join("checkpoints/1").is_dir());
    let mut sample = ddpm();
    sample.arg("sample").arg("--model").arg(&run).arg("--out").arg(folder.path().join("x.png"));
    assert!(fails(&mut sample, 1).contains(".npz"));
}

/// The file system takes two kilobytes of a file. What is given up says nothing of its own.
#[test]
#[cfg(target_os = "linux")]
fn an_archive_that_cannot_be_written_is_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    for (name, count) in [("a.npz", "8"), ("a.png", "64")] {
        let out = folder.path().join(name);
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; ulimit -f 4; exec \"$0\" \"$@\""]).arg(places::program());
        shell.arg("sample").arg("--model").arg(places::fixture("unet_gray16")).args(["--steps", "1", "--count", count]);
        let sentence = fails(shell.arg("--out").arg(&out).stdin(Stdio::null()), 1);
        let want = format!("{}: cannot be written: File too large (os error 27)", out.display());
        assert_eq!(sentence, format!("ddpm-cuda: {want}\n"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "unfinished files stay");
    }
}

#[test]
fn more_images_than_memory_holds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut sample = ddpm();
    sample.arg("sample").arg("--model").arg(fixture("unet_gray16")).args(["--count", "4000000000", "--out"]);
    assert!(fails(sample.arg(folder.path().join("x.png")), 1).contains("GiB"));
}

#[test]
fn two_processes_do_not_train_in_one_folder() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut first = train(&run, 1_000_000).args(["--set", "checkpoint_every=2"]).spawn().unwrap();
    wait_for_checkpoint(&run, 2);
    assert!(fails(ddpm().args(["train", "--resume"]).arg(&run), 1).contains("in use"));
    assert!(fails(&mut train(&run, 1), 1).contains("in use"));
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(fails(&mut train(&run, 1), 1).contains("--resume"), "the lock ends with its process");
}

#[test]
fn a_resumed_run_is_neither_shortened_nor_silently_restarted() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    ok(train(&run, 4).args(["--set", "checkpoint_every=2"]));
    let resume = |steps: &str| {
        let mut command = ddpm();
        command.args(["train", "--resume"]).arg(&run).args(["--steps", steps]);
        command
    };
    let settings = fs::read(run.join("config.toml")).unwrap();
    assert!(fails(&mut resume("3"), 2).contains("has done 4"));
    assert_eq!(fs::read(run.join("config.toml")).unwrap(), settings, "a refused resume changes the settings");
    assert!(ok(&mut resume("4")).contains("--steps"));
    let cut =
        |step: u32| fs::write(run.join(format!("checkpoints/{step}/training_state.safetensors")), b"cut").unwrap();
    cut(4);
    assert!(ok(&mut resume("5")).contains("checkpoints/4 is damaged"));
    // On the way to step 5 the checkpoint of step 4 was written again.
    for step in [2, 4, 5] {
        cut(step);
    }
    assert!(fails(&mut resume("6"), 1).contains("damaged"));
    assert!(run.join("checkpoints/5").is_dir(), "nothing is deleted");
}

#[test]
fn weights_that_are_not_finite_are_not_saved() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let said = fails(train(&run, 3).args(["--set", "learning_rate=1e300", "--set", "checkpoint_every=1"]), 1);
    assert!(said.contains("learning_rate") && said.contains("no checkpoint yet"), "{said}");
    assert_eq!(fs::read_dir(run.join("checkpoints")).unwrap().count(), 0);
}

#[test]
fn a_network_that_cannot_fit_is_refused_with_the_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let said = fails(train(&run, 1).args(["--set", "classes=4000000000"]), 1);
    assert!(said.contains("GiB") && said.contains("classes"), "{said}");
    let said = fails(train(&run, 1).args(["--set", "batch=10000000"]), 1);
    assert!(said.contains("GiB") && said.contains("batch") && said.contains("accumulate"), "{said}");
    let said = fails(train(&run, 1).args(["--set", "widths=8192,65536"]), 1);
    assert!(said.contains("GiB") && said.contains("widths"), "{said}");
    assert!(!run.exists());
}

/// Steps of the runs interrupted below.
const STEPS: u32 = 60;

/// Every file of the last checkpoint, by its path in it.
fn last_checkpoint(run: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let checkpoint = run.join(format!("checkpoints/{STEPS}"));
    let files = walkdir::WalkDir::new(&checkpoint).into_iter().map(|e| e.unwrap().into_path()).filter(|p| p.is_file());
    let read = |file: PathBuf| (file.strip_prefix(&checkpoint).unwrap().to_path_buf(), fs::read(&file).unwrap());
    let files: BTreeMap<PathBuf, Vec<u8>> = files.map(read).collect();
    assert_eq!(files.len(), 6, "files of {}: {:?}", checkpoint.display(), files.keys());
    files
}

#[track_caller]
fn same_checkpoint(run: &Path, whole: &Path) {
    let (run, whole) = (last_checkpoint(run), last_checkpoint(whole));
    let differ: Vec<&PathBuf> =
        run.iter().filter(|(name, bytes)| whole[*name] != **bytes).map(|(name, _)| name).collect();
    assert!(differ.is_empty(), "files that differ from those of an uninterrupted run: {differ:?}");
}

/// Settings of the runs interrupted below.
const OFTEN: [&str; 6] = ["--set", "checkpoint_every=5", "--set", "sample_every=0", "--set", "log_every=1"];

fn resume(run: &Path) -> Command {
    let mut command = ddpm();
    command.args(["train", "--resume"]).arg(run);
    command
}

fn signal(child: &Child, name: &str) {
    ok(Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]));
}

/// Waits until the run has written the checkpoint of `step`.
fn wait_for_checkpoint(run: &Path, step: u32) {
    let started = Instant::now();
    while !run.join(format!("checkpoints/{step}")).is_dir() {
        assert!(started.elapsed() < Duration::from_secs(120), "no checkpoint {step} in {}", run.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(unix)]
#[test]
fn signals_save_and_stop_with_their_number() {
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whole");
    ok(train(&whole, STEPS).args(OFTEN));
    for (name, code) in [("INT", 130), ("TERM", 143), ("HUP", 129), ("USR1", 138), ("USR2", 140), ("XCPU", 152)] {
        let run = folder.path().join(name);
        let child = train(&run, STEPS).args(OFTEN).stdout(Stdio::piped()).spawn().unwrap();
        wait_for_checkpoint(&run, 5);
        // Two signals in quick succession count as one: `timeout` signals the process and its group.
        for _ in 0..2 {
            signal(&child, name);
        }
        let out = child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(code), "{name}");
        let said = text(&out.stdout);
        assert!(said.contains("stopped after step ") && said.contains("to go on: ddpm-cuda train --resume "), "{said}");
        ok(&mut resume(&run));
        same_checkpoint(&run, &whole);
        assert_eq!(lines(&run), lines(&whole), "{name}: the interrupted run has other lines in its log");
    }
}

/// As under `nohup`, and as in the background of a shell script.
#[cfg(unix)]
#[test]
fn ignored_signals_stay_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let plain = train(&run, STEPS);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP INT TERM USR1; exec \"$0\" \"$@\""]).arg(plain.get_program());
    let mut child = command.args(plain.get_args()).args(OFTEN).stdout(Stdio::null()).spawn().unwrap();
    wait_for_checkpoint(&run, 5);
    for name in ["HUP", "INT", "TERM", "USR1"] {
        signal(&child, name);
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(run.join(format!("checkpoints/{STEPS}")).is_dir());
}

/// While a step takes long: the first Ctrl-C waits for it, SIGTERM does too, the second Ctrl-C does not.
#[cfg(unix)]
#[test]
fn a_second_ctrl_c_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let mut command = ddpm();
    command.args(["train", "--device", "cpu", "--preset", "cifar10", "--data", "mnist", "--batch", "512", "--out"]);
    let mut child = command.arg(&run).args(["--set", "accumulate=128"]).stdout(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !run.join("config.toml").exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "the run does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(500));
    for name in ["INT", "TERM"] {
        signal(&child, name);
        std::thread::sleep(Duration::from_millis(1200));
        assert!(child.try_wait().unwrap().is_none(), "{name} does not wait for the step");
    }
    let signalled = Instant::now();
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(signalled.elapsed() < Duration::from_secs(5), "it took {:?}", signalled.elapsed());
}

/// Settings that never come, from a pipe that nobody writes to.
#[cfg(unix)]
#[test]
fn a_signal_before_the_first_step_ends_at_once() {
    use std::os::unix::process::ExitStatusExt;
    let folder = tempfile::tempdir().unwrap();
    let (pipe, run) = (folder.path().join("pipe"), folder.path().join("run"));
    ok(Command::new("mkfifo").arg(&pipe));
    let mut child = train(&run, 1).arg("--config").arg(&pipe).stdout(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let signalled = Instant::now();
    signal(&child, "TERM");
    while child.try_wait().unwrap().is_none() {
        if signalled.elapsed() > Duration::from_secs(5) {
            child.kill().unwrap();
            panic!("a signal does not end what comes before the training");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let status = child.wait().unwrap();
    // On a machine that is busy the signal may come before it can be caught.
    assert!(status.code() == Some(143) || status.signal() == Some(15), "{status}");
    assert!(!run.exists());
}

#[test]
fn killed_and_resumed_it_ends_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
    ok(train(&whole, STEPS).args(OFTEN));
    for (attempt, step) in [10, 20, 35, 50].into_iter().enumerate() {
        let mut command = match attempt {
            0 => train(&run, STEPS),
            _ => resume(&run),
        };
        if attempt == 0 {
            command.args(OFTEN);
        }
        let mut child = command.stdout(Stdio::null()).spawn().unwrap();
        wait_for_checkpoint(&run, step);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    ok(&mut resume(&run));
    same_checkpoint(&run, &whole);
}

/// A training whose files are changed while it stands still.
#[cfg(unix)]
struct Watched {
    child: Child,
    said: std::io::Lines<std::io::BufReader<std::process::ChildStdout>>,
    all: String,
}

/// A test that fails leaves no training behind.
#[cfg(unix)]
impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

#[cfg(unix)]
impl Watched {
    fn start(command: &mut Command) -> Self {
        use std::io::BufRead;
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let said = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        Watched { child, said, all: String::new() }
    }

    fn change(&self, change: impl FnOnce()) {
        signal(&self.child, "STOP");
        // Until the system has stopped every thread.
        std::thread::sleep(Duration::from_millis(200));
        change();
        signal(&self.child, "CONT");
    }

    /// Waits until a line with `part` is said.
    fn until(&mut self, part: &str) {
        for line in self.said.by_ref() {
            let line = line.unwrap();
            self.all += &format!("{line}\n");
            if line.contains(part) {
                return;
            }
        }
        panic!("it never said {part:?}:\n{}", self.all);
    }

    fn end(mut self) -> (Option<i32>, String) {
        for line in self.said.by_ref() {
            self.all += &format!("{}\n", line.unwrap());
        }
        (self.child.wait().unwrap().code(), std::mem::take(&mut self.all))
    }
}

/// The log cannot be written for two causes, one after the other, and then can again: no line is lost, nothing is said
/// twice, and a reader sees whole lines at every moment.
#[cfg(target_os = "linux")]
#[test]
fn a_log_that_cannot_be_written_costs_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let (log, aside) = (run.join("metrics.jsonl"), run.join("aside"));
    let mut command = train(&run, 1_000_000);
    command.args(["--set", "log_every=1", "--set", "sample_every=0", "--set", "validate_every=0"]);
    let mut watched = Watched::start(&mut command);
    let started = Instant::now();
    let mut seen = 0;
    while seen < 200_000 {
        assert!(started.elapsed() < Duration::from_secs(120), "the log does not grow");
        let found = fs::read(&log).unwrap_or_default();
        // The system copies a write page by page, and a reader may come between two pages.
        let whole = found.is_empty() || found.ends_with(b"}\n") || found.len().is_multiple_of(4096);
        assert!(whole, "a reader sees a part of a line");
        seen = found.len();
    }
    watched.change(|| {
        fs::rename(&log, &aside).unwrap();
        fs::create_dir(&log).unwrap();
    });
    watched.until("metrics.jsonl: cannot be written: Is a directory");
    watched.change(|| {
        fs::remove_dir(&log).unwrap();
        std::os::unix::fs::symlink("/dev/full", &log).unwrap();
    });
    watched.until("metrics.jsonl: cannot be written: No space left");
    watched.change(|| fs::rename(&aside, &log).unwrap());
    watched.until("metrics.jsonl is written again");
    signal(&watched.child, "TERM");
    let (code, said) = watched.end();
    assert_eq!((code, said.matches("cannot be written").count()), (Some(143), 2), "{said}");
    let logged = lines(&run);
    assert_eq!(logged, (1..=logged.len() as u64).collect::<Vec<_>>(), "lines of the log");
    assert!(said.contains(&format!("stopped after step {} ", logged.len())), "{said}");
}

#[cfg(unix)]
#[test]
fn samples_that_cannot_be_written_cost_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let samples = run.join("samples");
    let mut command = train(&run, 1_000_000);
    command.args(["--set", "sample_every=1", "--set", "validate_every=0", "--set", "log_every=1000000"]);
    let mut watched = Watched::start(&mut command);
    let first = |step: u32| {
        let started = Instant::now();
        while !samples.join(format!("{step}.png")).exists() {
            assert!(started.elapsed() < Duration::from_secs(120), "no samples");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    first(2);
    watched.change(|| {
        fs::remove_dir_all(&samples).unwrap();
        fs::write(&samples, "a file").unwrap();
    });
    watched.until("training goes on without these samples");
    watched.change(|| fs::remove_file(&samples).unwrap());
    watched.until("is written again");
    signal(&watched.child, "TERM");
    let (code, said) = watched.end();
    assert_eq!((code, said.matches("goes on without").count()), (Some(143), 1), "{said}");
    assert!(checkpoint::newest(&run).unwrap().is_some());
}

/// Both at once, from the start of a resumed run to its end: the weights are those of an undisturbed run.
#[test]
fn a_run_without_samples_and_log_has_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
    let settings = ["--set", "sample_every=20", "--set", "checkpoint_every=20", "--set", "log_every=10"];
    ok(train(&whole, STEPS).args(settings));
    ok(train(&run, STEPS).args(settings));
    for step in [40, STEPS] {
        fs::remove_dir_all(run.join(format!("checkpoints/{step}"))).unwrap();
    }
    for name in ["samples", "metrics.jsonl"] {
        let path = run.join(name);
        if path.is_dir() { fs::remove_dir_all(&path).unwrap() } else { fs::remove_file(&path).unwrap() }
    }
    fs::write(run.join("samples"), "a file").unwrap();
    fs::create_dir(run.join("metrics.jsonl")).unwrap();
    let said = ok(&mut resume(&run));
    for part in ["keeps the lines until", "without these samples", "4 lines could not be written and are lost"] {
        assert_eq!(said.matches(part).count(), 1, "{part:?} in {said}");
    }
    same_checkpoint(&run, &whole);
}

/// Files may have at most 50 KiB, as if the disk were full.
#[cfg(unix)]
#[test]
fn a_checkpoint_that_cannot_be_written_ends_the_run_and_harms_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
    let settings = ["--set", "checkpoint_every=20", "--set", "sample_every=0", "--set", "keep_checkpoints=1"];
    ok(train(&whole, STEPS).args(settings));
    ok(train(&run, 20).args(settings));
    let plain = resume(&run);
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$0\" \"$@\" --steps 60"]).arg(plain.get_program());
    let said = fails(command.args(plain.get_args()), 1);
    assert!(
        said.contains("too large") && said.contains("the last good checkpoint is") && said.contains("checkpoints/20"),
        "{said}"
    );
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(fs::read_dir(run.join("checkpoints")).unwrap().count(), 1, "nothing is left of the attempt");
    ok(resume(&run).args(["--steps", "60"]));
    same_checkpoint(&run, &whole);
}

#[cfg(unix)]
#[test]
fn a_run_folder_that_is_moved_away_gets_another() {
    let folder = tempfile::tempdir().unwrap();
    let (run, moved) = (folder.path().join("run"), folder.path().join("moved"));
    let watched = Watched::start(train(&run, 1_000_000).args(OFTEN));
    wait_for_checkpoint(&run, 5);
    watched.change(|| fs::rename(&run, &moved).unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    while !run.join("config.toml").exists() {
        assert!(Instant::now() < deadline, "the run folder is not made again");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&watched.child, "TERM");
    let (code, said) = watched.end();
    assert_eq!(code, Some(143), "{said}");
    for run in [run, moved] {
        let newest = checkpoint::newest(&run).unwrap().expect("a checkpoint");
        let step: u32 = newest.file_name().unwrap().to_str().unwrap().parse().unwrap();
        ok(resume(&run).args(["--steps", &(step + 1).to_string()]));
    }
}

/// A finished run of four steps on images of one's own, 16x16 and grey.
fn small_run(folder: &Path) -> (PathBuf, PathBuf) {
    let (data, run) = (folder.join("images.npy"), folder.join("run"));
    noise_images(&data, 1);
    let sizes = ["--set", "image_size=16", "--set", "attention_resolutions=8", "--set", "held_out=0.2"];
    ok(train(&run, 4).arg("--data").arg(&data).args(sizes).args([
        "--set",
        "validate_every=0",
        "--set",
        "sample_every=0",
    ]));
    (data, run)
}

#[test]
fn a_run_is_resumed_with_its_own_settings_only() {
    let folder = tempfile::tempdir().unwrap();
    let (_, run) = small_run(folder.path());
    let file = run.join("config.toml");
    let own = fs::read_to_string(&file).unwrap();
    for (key, value, says) in [
        ("schedule", "\"linear\"", "schedule = \"linear\" where the checkpoint has \"cosine\""),
        ("learning_rate", "0.5", "learning_rate = 0.5 where the checkpoint has 0.001"),
        ("flip", "false", "flip = false where the checkpoint has true"),
        ("widths", "[8, 8]", "widths = [8, 8] where the checkpoint has [8, 16]"),
        ("held_out", "0.1", "held_out = 0.1 where the checkpoint has 0.2"),
        ("seed", "6", "seed = 6 where the checkpoint has 5"),
    ] {
        let edited: String = own
            .lines()
            .map(|line| match line.split_once(" = ") {
                Some((k, _)) if k == key => format!("{key} = {value}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert_ne!(edited, own);
        fs::write(&file, &edited).unwrap();
        let said = fails(resume(&run).args(["--steps", "6"]), 1);
        assert!(said.contains(says) && said.contains("config.toml") && said.lines().count() == 1, "{key}: {said}");
        assert_eq!(fs::read_to_string(&file).unwrap(), edited, "a refused resume changes the settings");
    }
    fs::write(&file, &own).unwrap();
    assert!(fails(resume(&run).args(["--precision", "bf16"]), 2).contains("is a run in f32"));
    let said = fails(resume(&run).args(["--set", "schedule=linear"]), 2);
    for key in ddpm_cuda::config::MAY_CHANGE {
        assert!(said.contains(key), "{said} does not list {key}");
    }
    assert!(said.contains("--init"), "{said}");
    assert!(fails(resume(&run).args(["--set", "stepps=9"]), 2).contains("steps"));

    // What may change does, and stands in config.toml then.
    let sets =
        ["--set", "steps=5", "--set", "keep_checkpoints=1", "--set", "log_every=2", "--set", "checkpoint_every=1"];
    ok(resume(&run).args(sets));
    let now = ddpm_cuda::config::Config::read(&file).unwrap();
    assert_eq!((now.steps, now.keep_checkpoints, now.log_every, now.checkpoint_every), (5, 1, 2, 1));
    assert_eq!(fs::read_dir(run.join("checkpoints")).unwrap().count(), 1);

    // A checkpoint of an earlier version does not know what it was made from.
    fs::remove_file(run.join("checkpoints/5/run.json")).unwrap();
    let said = ok(resume(&run).args(["--steps", "6", "--precision", "f32"]));
    assert!(said.contains("has no run.json") && said.contains("continues after step 5"), "{said}");
    // One that is damaged is no whole checkpoint.
    fs::write(run.join("checkpoints/6/run.json"), "{").unwrap();
    assert!(fails(resume(&run).args(["--steps", "7"]), 1).contains("checkpoints/6: is damaged"));
}

#[test]
fn a_run_is_resumed_with_its_own_data_only() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = small_run(folder.path());
    let (own, moved) = (fs::read(&data).unwrap(), folder.path().join("elsewhere.npy"));
    let refused = |bytes: &[u8]| {
        fs::write(&data, bytes).unwrap();
        let said = fails(resume(&run).args(["--steps", "6"]), 1);
        assert!(said.contains("images.npy: is not the data that") && said.lines().count() == 1, "{said}");
        said
    };
    let mut edited = own.clone();
    *edited.last_mut().unwrap() ^= 1;
    assert!(refused(&edited).contains("16 training and 4 held-out images of 16x16x1 as before, but with other pixels"));
    let mut fewer = own[..own.len() - 10 * 256].to_vec();
    let count = fewer.windows(4).position(|bytes| bytes == b"(20,").expect("the number of images in the header");
    fewer[count + 1] = b'1';
    let said = refused(&fewer);
    assert!(said.contains("8 training and 2 held-out images of 16x16x1, where there were 16 training and 4"), "{said}");
    fs::remove_file(&data).unwrap();
    assert!(fails(&mut resume(&run), 1).contains("--data PATH"));
    fs::write(&moved, &own).unwrap();
    ok(resume(&run).args(["--steps", "6", "--data", "elsewhere.npy"]).current_dir(folder.path()));
    // The new place is remembered.
    ok(resume(&run).args(["--steps", "7"]));
}

/// Off a terminal: a line at each tenth of the steps, with what is left.
#[test]
fn progress_is_lines_off_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let said = ok(train(&run, 40).args(["--set", "validate_every=0", "--set", "sample_every=0"]));
    let steps: Vec<u32> = said
        .lines()
        .filter_map(|line| {
            let (done, rest) = line.strip_prefix("step ")?.split_once(" of 40: loss ")?;
            assert!(
                rest.contains(" images/s, ") && rest.ends_with(if done == "40" { "done" } else { "left" }),
                "{line}"
            );
            Some(done.parse().unwrap())
        })
        .collect();
    assert_eq!(steps, [4, 8, 12, 16, 20, 24, 28, 32, 36, 40], "{said}");
    let said = ok(resume(&run).args(["--steps", "43"]));
    assert_eq!(said.matches(" of 43: loss ").count(), 3, "{said}");
}

/// Whatever the path of a run, what the program says can be pasted into a shell.
#[cfg(unix)]
#[test]
fn hints_can_be_pasted() {
    let folder = tempfile::tempdir().unwrap();
    let program = places::program();
    let program = program.display();
    let paste = |command: &str| ok(Command::new("sh").args(["-c", command]).current_dir(folder.path()));
    for name in ["a run", "it's \"$HOME\" & `x` 图", "-dash"] {
        let mut first = ddpm();
        first.args(["train", "--steps", "1", "--set", "sample_every=0"]).arg(format!("--out={name}")).args(TINY);
        let said = ok(first.current_dir(folder.path()));
        let hint = said.lines().find_map(|line| line.strip_prefix("to draw images: ddpm-cuda ")).unwrap();
        paste(&format!("'{program}' {hint} --count 1 --steps 2"));
        let said = fails(&mut first, 1);
        let (_, hint) = said.split_once("continue it with ").unwrap();
        let (hint, _) = hint.rsplit_once(", or choose another").unwrap();
        paste(&format!("'{program}' train {hint} --steps 2"));
        assert!(folder.path().join(name).join("checkpoints/2").is_dir(), "{name}");
    }
}

/// A resumed log continues from the checkpoint: later lines are dropped, no step is repeated, times keep growing, and
/// `--steps` moves the end.
#[test]
fn a_resumed_run_continues_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, run) = (folder.path().join("whole"), folder.path().join("run"));
    let every = |n: &str| ["--set".into(), "checkpoint_every=2".into(), "--set".into(), format!("log_every={n}")];
    let quiet = ["--set", "sample_every=0", "--set", "validate_every=0"];
    ok(train(&whole, 6).args(every("3")).args(quiet));
    ok(train(&run, 4).args(every("1")).args(quiet));
    fs::remove_dir_all(run.join("checkpoints/4")).unwrap();
    let told = ok(ddpm().args(["train", "--steps", "6", "--resume"]).arg(&run));
    assert!(told.contains("continues after step 2"), "{told}");
    assert_eq!(lines(&run), [1, 2, 3, 4, 5, 6]);
    let state = |run: &Path| fs::read(run.join("checkpoints/6/training_state.safetensors")).unwrap();
    assert!(state(&run) == state(&whole), "the resumed run has other weights");
    let of = |run: &Path, key: &str| -> Vec<f64> {
        let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let value = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()[key].as_f64().unwrap();
        log.lines().map(value).collect()
    };
    let elapsed = of(&run, "elapsed_s");
    assert!(elapsed.is_sorted_by(|a, b| a < b), "the run's time does not go on: {elapsed:?}");
    // A line is the mean over the steps since the last one.
    for (mean, losses) in of(&whole, "loss").iter().zip(of(&run, "loss").chunks(3)) {
        let want = losses.iter().sum::<f64>() / 3.0;
        assert!((mean - want).abs() <= 4.0 * f64::EPSILON * want, "a line says {mean}, its steps {losses:?}");
    }
}

/// The samples drawn during training are those that `sample` draws from the same checkpoint, with the moving average.
#[test]
fn training_draws_what_its_checkpoint_draws() {
    let folder = tempfile::tempdir().unwrap();
    let (run, out) = (folder.path().join("run"), folder.path().join("out.png"));
    ok(train(&run, 12).args(["--set", "learning_rate=0.02", "--set", "warmup_steps=0", "--set", "validate_every=0"]));
    ok(ddpm().args(["sample", "--seed", "5", "--model"]).arg(&run).arg("--out").arg(&out));
    let pixels = |path: &Path| image::open(path).unwrap().into_luma8().into_raw();
    assert!(pixels(&out) == pixels(&run.join("samples/12.png")), "training and its checkpoint draw other images");
}

/// Each argument reaches the sampler: the program's images equal those drawn through the library.
#[test]
fn the_arguments_of_sample_reach_the_sampler() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu();
    // The fixture's network with a diffusion process that is no default.
    let mut model = checkpoint::load(&device, &fixture("unet_rgb16")).unwrap();
    let process = &mut model.config.diffusion;
    (process.schedule, process.timesteps, process.variance) = (Kind::Cosine, 80, Variance::FixedSmall);
    let saved = support::saved(folder.path(), &model.config, &model.params);
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let schedule = Schedule::new(Kind::Cosine, 80).unwrap();
    let ddim = Method::Ddim { eta: 0.5 };
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for (arguments, method, spacing, seed, labels) in [
        ("--steps 5", Method::Ancestral(Variance::FixedSmall), Spacing::Even, 0, [0, 1]),
        ("--steps 5 --seed 9", Method::Ancestral(Variance::FixedSmall), Spacing::Even, 9, [0, 1]),
        ("--steps 5 --variance fixed_large", Method::Ancestral(Variance::FixedLarge), Spacing::Even, 0, [0, 1]),
        ("--steps 5 --sampler ddim --eta 0.5", ddim, Spacing::Even, 0, [0, 1]),
        ("--steps 5 --sampler ddim", Method::Ddim { eta: 0.0 }, Spacing::Even, 0, [0, 1]),
        ("--steps 5 --sampler ddim --eta 0.5 --spacing leading", ddim, Spacing::Leading, 0, [0, 1]),
        ("--steps 5 --class 7", Method::Ancestral(Variance::FixedSmall), Spacing::Even, 0, [7, 7]),
    ] {
        let out = folder.path().join("out.npz");
        let mut command = ddpm();
        command.args(["sample", "--count", "2"]).args(arguments.split(' ')).arg("--model").arg(&saved);
        ok(command.arg("--out").arg(&out));
        let mut arrays = ddpm_cuda::data::npy::parse_npz(&fs::read(&out).unwrap()).unwrap();
        assert_eq!(arrays.pop().unwrap().1.to_i64().unwrap(), labels.map(i64::from), "{arguments}: labels");
        let got = arrays.pop().unwrap().1.into_u8().unwrap().to_vec();
        let sampler = Sampler::new(&schedule, method, spacing, 5).unwrap();
        let drawing = Drawing { device: &device, unet: &unet, params: &model.params, sampler: &sampler, seed };
        assert!(got == drawing.images(0..2, Some(&labels), |_| Ok(())).unwrap(), "{arguments}: other images");
        assert!(!seen.contains(&got), "{arguments}: makes no difference to this test");
        seen.push(got);
    }
    // 61 steps are too many for one frame each: every second, and the last.
    let out = folder.path().join("out.gif");
    ok(ddpm().args(["sample", "--count", "1", "--steps", "61", "--model"]).arg(&saved).arg("--out").arg(&out));
    let decoder = image::codecs::gif::GifDecoder::new(std::io::Cursor::new(fs::read(&out).unwrap())).unwrap();
    assert_eq!(image::AnimationDecoder::into_frames(decoder).count(), 31);
}

/// Bound and likelihood of a small run: figures that belong together, and what is refused.
#[test]
fn a_model_is_judged_by_images() {
    let folder = tempfile::tempdir().unwrap();
    let (run, json, plots) = (folder.path().join("run"), folder.path().join("f.json"), folder.path().join("plots"));
    ok(&mut train(&run, 3));
    let read = || serde_json::from_str::<serde_json::Value>(&fs::read_to_string(&json).unwrap()).unwrap();
    let command = |name: &str, arguments: &str| {
        let mut command = ddpm();
        command.args([name, "--model"]).arg(&run).args(arguments.split(' ').filter(|word| !word.is_empty()));
        command
    };

    let said = ok(command("eval", "--count 5 --draws 2").arg("--json").arg(&json).arg("--plots").arg(&plots));
    assert!(said.contains("bits per dimension: L_T ") && said.contains("5 images, 2 draws a timestep"), "{said}");
    let figures = read();
    let numbers = |key: &str| -> Vec<f64> {
        figures[key].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let number = |key: &str| figures[key].as_f64().unwrap();
    let (terms, mse_x0, mse_eps) = (numbers("terms"), numbers("mse_x0"), numbers("mse_eps"));
    assert_eq!([terms.len(), mse_x0.len(), mse_eps.len()], [50; 3]);
    assert_eq!((figures["images"].as_u64(), figures["draws"].as_u64()), (Some(5), Some(2)));
    let total = number("prior") + terms.iter().sum::<f64>();
    assert!((number("bits_per_dim") - total).abs() < 1e-9 * total, "{total} {}", figures["bits_per_dim"]);
    assert_eq!(number("reconstruction"), terms[0]);
    let cuts = figures["rate_distortion"].as_array().unwrap();
    assert_eq!(cuts.len(), 50);
    let (first, last) = (&cuts[0], &cuts[49]);
    for (cut, mse) in cuts.iter().zip(&mse_x0) {
        assert_eq!(cut["rmse"].as_f64().unwrap(), 127.5 * mse.sqrt(), "{cut}");
    }
    assert!((first["rate"].as_f64().unwrap() + terms[0] - total).abs() < 1e-9 * total, "{first}");
    assert_eq!(last["rate"].as_f64().unwrap(), number("prior"));
    for name in ["bound.svg", "bound.png", "rate_distortion.svg", "rate_distortion.png"] {
        assert!(plots.join(name).is_file(), "{name}");
    }
    // A chain of fewer timesteps has a bound of its own; every seed has noise of its own.
    ok(command("eval", "--count 5 --steps 10").arg("--json").arg(&json));
    let shorter = read();
    assert_eq!(shorter["terms"].as_array().unwrap().len(), 10);
    ok(command("eval", "--count 5 --steps 10 --seed 1").arg("--json").arg(&json));
    assert_ne!(read()["bits_per_dim"], shorter["bits_per_dim"]);

    let said = ok(command("likelihood", "--count 2 --tolerance 1e-2").arg("--json").arg(&json));
    assert!(
        said.contains("bits per dimension of uniformly dequantised pixels, by the ODE from the image on"),
        "{said}"
    );
    assert_eq!((read()["images"].as_u64(), read()["from"].as_str()), (Some(2), Some("image")));
    // The figures of three images, each the mean of two probes, and the standard error of their mean.
    ok(command("likelihood", "--device cpu --count 3 --tolerance 1e-2 --probes 2").arg("--json").arg(&json));
    let (device, figures) = (Device::cpu(), read());
    let loaded = checkpoint::load(&device, &run).unwrap();
    let (mut config, params) = (loaded.config, &loaded.params);
    let (unet, schedule) = (UNet::new(&config.model).unwrap().0, config.diffusion.noise_schedule().unwrap());
    let prediction = config.diffusion.prediction;
    let model = likelihood::Model { device: &device, unet: &unet, params, schedule: &schedule, prediction };
    let held_out = data::load(&mut config).unwrap().held_out;
    let images: Vec<&[u8]> = data::choose(held_out.len(), 3).into_iter().map(|i| held_out.image(i)).collect();
    let options = likelihood::Options { tolerance: 1e-2, probes: 2, seed: 0, from: likelihood::From::Image };
    let found = model.likelihoods(&images, None, 0, options).unwrap();
    let bits = |one: &likelihood::Likelihood| likelihood::bits_per_dim(one.log_p, images[0].len());
    let [a, b, c] = [0, 2, 4].map(|k| (bits(&found[k]) + bits(&found[k + 1])) / 2.0);
    let mean = (a + b + c) / 3.0;
    let error = (((a - mean).powi(2) + (b - mean).powi(2) + (c - mean).powi(2)) / 2.0 / 3.0).sqrt();
    for (key, want) in [("bits_per_dim", mean), ("standard_error", error)] {
        let got = figures[key].as_f64().unwrap();
        assert!((got - want).abs() < 1e-12 * want, "{key}: {got}, expected {want}");
    }
    ok(command("likelihood", "--count 2 --tolerance 1e-2 --cut --probes 2").arg("--json").arg(&json));
    assert_eq!((read()["probes"].as_u64(), read()["from"].as_str()), (Some(2), Some("first_timestep")));

    for (name, arguments, want) in [
        ("eval", "--draws 0", "--draws 0: must be at least 1"),
        ("eval", "--count 0", "--count 0: mnist has 1 to 500 images of --split held_out"),
        ("eval", "--split train --count 9501", "--count 9501: mnist has 1 to 9500 images of --split train"),
        ("eval", "--steps 51", "the number of sampling steps is 51: must be from 1 to the model's 50 timesteps"),
        ("eval", "--variance learned", "--variance learned: this model was trained with fixed_large"),
        ("likelihood", "--tolerance 2", "--tolerance 2: must be from 1e-12 to below 1"),
        ("likelihood", "--probes 0", "--probes 0: must be from 1 to 10000"),
    ] {
        let said = fails(&mut command(name, arguments), 2);
        assert!(said.contains(want), "{name} {arguments}: {said}");
    }
    let said = fails(&mut command("eval", "--data nowhere"), 1);
    assert!(said.starts_with("ddpm-cuda: nowhere: "), "{said}");
    // Where the figures go is looked at before the data, and so before anything is measured.
    for name in ["eval", "likelihood"] {
        let to = |json: &Path, code: i32| fails(command(name, "--data nowhere").arg("--json").arg(json), code);
        let said = to(&folder.path().join("no/where.json"), 1);
        assert!(said.contains("where.json: cannot be written: there is no folder"), "{name}: {said}");
        let said = to(folder.path(), 2);
        assert!(said.contains(": is a folder; a file is expected"), "{name}: {said}");
    }
}

/// The bound is of the chain that `sample` draws from: its timesteps, its variance, its limits of x_0.
#[test]
fn the_bound_is_of_the_chain_that_sample_draws_from() {
    let folder = tempfile::tempdir().unwrap();
    let (run, json) = (folder.path().join("run"), folder.path().join("f.json"));
    ok(&mut train(&run, 2));
    let eval = |model: &Path, arguments: &str| {
        let mut command = ddpm();
        command.args(["eval", "--count", "2", "--device", "cpu", "--model"]).arg(model).arg("--json").arg(&json);
        command.args(arguments.split_whitespace());
        command
    };
    let figures = |model: &Path, arguments: &str| {
        let said = ok(&mut eval(model, arguments));
        let figures: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
        (said, figures)
    };
    let timesteps = |figures: &serde_json::Value| -> Vec<u64> {
        figures["timesteps"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect()
    };

    // fixed_large over all timesteps, as it was trained, and fixed_small over fewer.
    let (said, all) = figures(&run, "");
    assert!(said.contains("; variance = fixed_large, 2 images, 1 draw a timestep"), "{said}");
    assert_eq!((all["variance"].as_str(), timesteps(&all).len()), (Some("fixed_large"), 50));
    let (said, fewer) = figures(&run, "--steps 10");
    assert!(said.contains("; variance = fixed_small, "), "{said}");
    assert_eq!(fewer, figures(&run, "--steps 10 --variance fixed_small").1);
    let large = figures(&run, "--steps 10 --variance fixed_large").1;
    assert_ne!(large["bits_per_dim"], fewer["bits_per_dim"]);
    assert_eq!((large["variance"].as_str(), &large["mse_x0"]), (Some("fixed_large"), &fewer["mse_x0"]));

    // Every spacing of `sample`.
    let schedule = Schedule::new(Kind::Cosine, 50).unwrap();
    for (arguments, spacing, steps) in [
        ("--steps 10", "even", 10),
        ("--steps 10 --spacing trailing", "trailing", 10),
        ("--spacing 2,3,5", "2,3,5", 10),
        ("--steps 10 --spacing karras", "karras", 10),
    ] {
        let kept = spacing.parse::<Timesteps>().unwrap().kept(&schedule, false, 0, steps).unwrap();
        let wanted: Vec<u64> = kept.into_iter().map(u64::from).collect();
        let (_, figures) = figures(&run, arguments);
        assert_eq!(timesteps(&figures), wanted, "{arguments}");
        assert_eq!(figures["terms"].as_array().unwrap().len(), wanted.len(), "{arguments}");
    }
    for (arguments, says) in [
        (
            "--spacing 2,3,5 --steps 10",
            "--steps 10 beside --spacing 2,3,5: the list says how many, so leave --steps out",
        ),
        ("--spacing 2,90", "a section of 25 of the 50 timesteps cannot keep 90: give from 1 to 25"),
    ] {
        let said = fails(&mut eval(&run, arguments), 2);
        assert!(said.contains(says), "{arguments}: {said}");
    }

    // A single timestep has no terms between.
    let (said, one) = figures(&run, "--steps 1");
    let line = said.lines().last().unwrap();
    assert!(line.contains(", L_0 ") && !line.contains("L_1") && !line.contains("-0.0"), "{line}");
    assert_eq!(timesteps(&one), [49]);
    let (said, _) = figures(&run, "--steps 2");
    assert!(said.contains(", L_1 ") && !said.contains("L_1 to"), "{said}");

    // A learned variance is that of single timesteps.
    let learned = folder.path().join("learned");
    ok(train(&learned, 2).args(["--set", "variance=learned", "--set", "loss=hybrid"]));
    assert_eq!(figures(&learned, "").1["variance"], "learned");
    assert_eq!(figures(&learned, "--steps 5").1["variance"], "fixed_small");
    assert_eq!(figures(&learned, "--variance fixed_large").1["variance"], "fixed_large");
    let mut sample = ddpm();
    sample.args(["sample", "--steps", "5", "--variance", "learned", "--out", "x.png", "--model"]).arg(&learned);
    let refused = fails(&mut sample, 2);
    assert!(refused.contains("the learned variance is that of a step of one timestep"), "{refused}");
    assert_eq!(fails(&mut eval(&learned, "--steps 5 --variance learned"), 2), refused);
}

/// What a scheduler says of x_0 holds for the bound, too.
#[test]
fn the_models_limits_of_x_0_are_those_of_the_bound() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        fs::copy(fixture("unet_gray16").join(file), folder.path().join(file)).unwrap();
    }
    let json = folder.path().join("f.json");
    let mse = |scheduler: serde_json::Value| {
        fs::write(folder.path().join("scheduler_config.json"), scheduler.to_string()).unwrap();
        let mut command = ddpm();
        command.args(["eval", "--data", "mnist", "--count", "2", "--steps", "4", "--device", "cpu", "--model"]);
        ok(command.arg(folder.path()).arg("--json").arg(&json));
        let figures: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
        figures["mse_x0"].as_array().unwrap().iter().map(|mse| mse.as_f64().unwrap()).collect::<Vec<f64>>()
    };
    let clipped = |range: f64| serde_json::json!({"_class_name": "DDPMScheduler", "clip_sample": true, "clip_sample_range": range});
    let [narrow, one, wide] = [0.1, 1.0, 3.0].map(|range| mse(clipped(range)));
    assert!(narrow != one && one != wide, "{narrow:?} {one:?} {wide:?}");
    let dynamic = serde_json::json!({"_class_name": "DDPMScheduler", "thresholding": true,
        "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0});
    let dynamic = mse(dynamic);
    assert!(dynamic != one && dynamic.iter().all(|mse| mse.is_finite()), "{dynamic:?}");
}

/// Of a schedule that ends in pure noise x_T tells nothing of the image, and the flow ends a timestep earlier.
#[test]
fn a_model_of_zero_terminal_snr_is_judged_by_images() {
    let folder = tempfile::tempdir().unwrap();
    let (run, json) = (folder.path().join("run"), folder.path().join("f.json"));
    ok(train(&run, 2).args(["--set", "zero_snr=true", "--set", "prediction=x0"]));
    let command = |arguments: &str| {
        let mut command = ddpm();
        command.args(arguments.split(' ')).args(["--count", "2", "--device", "cpu", "--model"]).arg(&run);
        command.arg("--json").arg(&json);
        command
    };
    let read = || serde_json::from_str::<serde_json::Value>(&fs::read_to_string(&json).unwrap()).unwrap();
    for (arguments, count) in [("eval", 50), ("eval --steps 7", 7), ("eval --spacing 3,2,5", 10)] {
        ok(&mut command(arguments));
        let figures = read();
        assert_eq!(figures["prior"], 0.0, "{arguments}");
        let terms: Vec<f64> = figures["terms"].as_array().unwrap().iter().map(|term| term.as_f64().unwrap()).collect();
        assert_eq!(terms.len(), count);
        let (total, sum) = (figures["bits_per_dim"].as_f64().unwrap(), terms.iter().sum::<f64>());
        assert!(terms.iter().all(|term| term.is_finite()) && (total - sum).abs() < 1e-9 * sum, "{figures}");
    }
    let said = fails(&mut command("eval --spacing karras"), 2);
    assert!(said.contains("the schedule ends in pure noise (zero terminal SNR)"), "{said}");
    // A network that predicts x_0 has no flow below the first timestep, with --cut and without.
    let mut bits = Vec::new();
    for arguments in ["likelihood --tolerance 1e-2", "likelihood --tolerance 1e-2 --cut"] {
        ok(&mut command(arguments));
        assert_eq!(read()["from"], "first_timestep", "{arguments}");
        bits.push(read()["bits_per_dim"].as_f64().unwrap());
    }
    assert!(bits[0].is_finite() && bits[0] == bits[1], "{bits:?}");
}

/// Labels of data whose classes have names are those of the model's classes of the same name.
#[test]
fn classes_go_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Each folder of images of one lightness: training data, and others whose classes have other numbers.
    let classes = |data: &str, classes: &[(&str, u8)]| {
        for (class, light) in classes {
            fs::create_dir_all(at(data).join(class)).unwrap();
            for k in 0..6 {
                let picture = image::GrayImage::from_fn(28, 28, |x, y| image::Luma([light ^ ((x * y + k) % 16) as u8]));
                picture.save(at(data).join(class).join(format!("{k}.png"))).unwrap();
            }
        }
    };
    classes("two", &[("cat", 200), ("owl", 30)]);
    classes("one", &[("owl", 30)]);
    classes("more", &[("cat", 200), ("dog", 90), ("owl", 30)]);
    let train = |run: &str, command: &str, data: &str, sets: &[&str]| {
        let mut process = ddpm();
        process.args([command, "--steps", "2", "--batch", "4", "--device", "cpu", "--data"]).arg(at(data));
        process.args(["--preset", "mnist"]).args(TINY).args(["--set", "validate_every=0", "--set", "held_out=0"]);
        ok(process.args(sets).arg("--out").arg(at(run)));
    };
    // A rate at which two steps are enough for the classes to make a difference.
    let sets = ["--set", "classes=2", "--set", "learning_rate=0.05", "--set", "warmup_steps=0", "--set", "ema_decay=0"];
    train("run", "train", "two", &sets);
    let judge = |command: &str, data: &str| {
        let mut process = ddpm();
        process.args(command.split(' ')).args(["--split", "train", "--device", "cpu", "--model"]).arg(at("run"));
        process.arg("--data").arg(at(data)).arg("--json").arg(at("f.json"));
        process
    };
    // The same six images, once as class 0 of their folder and once as class 1 of an array.
    let pixel = |k: usize| 30 ^ (((k % 28) * (k / 28 % 28) + k / 784) % 16) as u8;
    let bytes: Vec<u8> = (0..6 * 784).map(pixel).collect();
    for label in [0, 1] {
        let labels = [label; 6];
        let name = at(&format!("{label}.npz"));
        ddpm_cuda::output::write_npz(&name, Shape::new(6, 28, 28, 1), &bytes, Some(&labels)).unwrap();
    }
    for command in ["eval --steps 3", "likelihood --tolerance 0.3"] {
        let bits = |data: &str| {
            ok(&mut judge(command, data));
            serde_json::from_str::<serde_json::Value>(&fs::read_to_string(at("f.json")).unwrap()).unwrap()
                ["bits_per_dim"]
                .as_f64()
                .unwrap()
        };
        assert_eq!(bits("one"), bits("1.npz"), "{command}: the class is not found by its name");
        assert_ne!(bits("0.npz"), bits("1.npz"), "{command}: the class makes no difference to this test");
        let said = fails(&mut judge(command, "more"), 1);
        let says = "more: has images of class dog, but this model has the classes 0 to 1: ";
        assert!(said.contains(says) && said.contains("0 cat") && said.contains("1 owl"), "{command}: {said}");
    }
    let encoded = |data: &str| {
        let mut process = ddpm();
        process.args(["encode", "--steps", "3", "--device", "cpu", "--model"]).arg(at("run"));
        ok(process.arg("--images").arg(at(data)).arg("--out").arg(at("x.npy")));
        fs::read(at("x.npy")).unwrap()
    };
    assert!(encoded("one") == encoded("1.npz") && encoded("0.npz") != encoded("1.npz"), "encode: other classes");
    let mut process = ddpm();
    process.args(["encode", "--steps", "3", "--model"]).arg(at("run")).arg("--images").arg(at("more"));
    assert!(fails(process.arg("--out").arg(at("x.npy")), 1).contains("more: has images of class dog, but this model"));
    classes("others", &[("ape", 200), ("owl", 30)]);
    // A run that starts from the model takes its rows by number, and says where the names differ.
    for (data, says) in [("two", None), ("0.npz", None), ("others", Some("class 0 is ape here and cat in the model"))] {
        let mut process = ddpm();
        process.args(["train", "--steps", "1", "--batch", "4", "--device", "cpu", "--set", "sample_every=0", "--init"]);
        process.arg(at("run")).arg("--data").arg(at(data)).arg("--out").arg(at(&format!("from-{data}")));
        let said = ok(process.args(["--set", "validate_every=0", "--set", "held_out=0"]));
        assert_eq!(said.contains("in the model: classes keep"), says.is_some(), "{data}: {said}");
        assert!(says.is_none_or(|says| said.contains(says)), "{data}: {said}");
    }
    // A classifier with other names does not guide.
    for (judge, data) in [("same", "two"), ("other", "others")] {
        train(judge, "train-classifier", data, &[]);
    }
    let draw = |judge: &str| {
        let mut process = ddpm();
        process.args(["sample", "--count", "1", "--steps", "2", "--device", "cpu", "--model"]).arg(at("run"));
        process.arg("--classifier").arg(at(judge)).arg("--out").arg(at("x.png"));
        process
    };
    ok(&mut draw("same"));
    let said = fails(&mut draw("other"), 2);
    assert!(said.contains("the classifier has class 0 = ape and the model cat; train a classifier"), "{said}");
}

/// A setting that the loss does not have was meant for another loss.
#[test]
fn settings_of_another_loss_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (sets, says) in [
        (
            &["vlb_weight=0.01"][..],
            "vlb_weight = 0.01: only loss = hybrid has it and here loss = simple, so leave it out",
        ),
        (&["loss=vlb", "vlb_weight=1"], "vlb_weight = 1: only loss = hybrid has it and here loss = vlb"),
        (&["min_snr_gamma=3"], "min_snr_gamma = 3: only loss = min_snr has it and here loss = simple"),
    ] {
        let mut command = train(&at("refused"), 1);
        sets.iter().for_each(|set| {
            command.args(["--set", set]);
        });
        let said = fails(&mut command, 2);
        assert!(said.contains(says), "{said}");
    }
    fs::write(at("few.toml"), "min_snr_gamma = 3\n").unwrap();
    let said = fails(train(&at("refused"), 1).arg("--config").arg(at("few.toml")), 2);
    assert!(said.contains("min_snr_gamma = 3: only loss = min_snr has it"), "{said}");
    // The file of a run holds all of them, whatever its loss.
    ok(train(&at("run"), 1).args(["--set", "loss=min_snr", "--set", "min_snr_gamma=3"]));
    let of_run = at("run").join("config.toml");
    ok(train(&at("again"), 1).arg("--config").arg(of_run).args(["--set", "loss=simple"]));
}

/// Of fewer than 20 images training holds out none, so none of them is new to a model without a run.
#[test]
fn a_model_without_a_run_was_trained_on_all_of_few_images() {
    let folder = tempfile::tempdir().unwrap();
    let said = |n: usize| {
        let data = folder.path().join(format!("{n}.npz"));
        let bytes: Vec<u8> = (0..n * 256).map(|k| (k * k / 7 % 256) as u8).collect();
        ddpm_cuda::output::write_npz(&data, Shape::new(n, 16, 16, 1), &bytes, None).unwrap();
        let mut command = ddpm();
        command.args(["eval", "--count", "2", "--model"]).arg(fixture("unet_gray16")).arg("--data").arg(data);
        fails(&mut command, 2)
    };
    let none = said(19);
    assert!(none.contains("--split held_out: no image of ") && none.contains("; --split train takes"), "{none}");
    let one = said(20);
    assert!(one.contains("has 1 to 1 images of --split held_out"), "{one}");
}

/// A learned schedule is plotted, kept as a table in the checkpoint, and what other commands use; a resumed run goes on
/// with it, and a classifier takes its betas.
#[test]
fn a_learned_schedule_is_plotted_and_used() {
    let folder = tempfile::tempdir().unwrap();
    let (run, json) = (folder.path().join("run"), folder.path().join("f.json"));
    let said = ok(train(&run, 3).args(["--set", "schedule=learned", "--set", "loss=vlb", "--set", "validate_every=3"]));
    assert!(said.contains(&format!("learned schedule: {}", run.join("schedule.svg").display())), "{said}");
    let svg = fs::read_to_string(run.join("schedule.svg")).unwrap();
    assert!(svg.contains("log-SNR") && svg.contains("at the start") && svg.contains("after 3 steps"), "{svg}");
    assert!(image::open(run.join("schedule.png")).is_ok());
    let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    let [first, last] = [0, 1].map(|k| line["log_snr"][k].as_f64().unwrap());
    assert!((first - 13.3).abs() < 0.1 && (last + 5.0).abs() < 0.1 && line["vlb"].is_f64(), "{line}");
    let table = || -> Vec<f64> {
        let newest = ddpm_cuda::checkpoint::newest(&run).unwrap().unwrap();
        let text = fs::read_to_string(newest.join("scheduler/scheduler_config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        json["trained_betas"].as_array().unwrap().iter().map(|beta| beta.as_f64().unwrap()).collect()
    };
    let first = table();
    assert_eq!(first.len(), 50);
    assert_eq!(fs::read_to_string(run.join("config.toml")).unwrap().matches("trained_betas").count(), 0);
    ok(ddpm().args(["train", "--resume"]).arg(&run).args(["--steps", "5"]));
    assert_ne!(table(), first, "the schedule stands still");
    ok(ddpm().args(["eval", "--count", "2", "--model"]).arg(&run).arg("--json").arg(&json));
    ok(ddpm()
        .args(["sample", "--count", "1", "--steps", "5", "--model"])
        .arg(&run)
        .arg("--out")
        .arg(run.join("x.png")));
    let judge = || {
        let mut command = ddpm();
        command.args(["train-classifier", "--data", "mnist", "--batch", "4", "--steps", "1", "--device", "cpu"]);
        command.args(TINY).arg("--out").arg(folder.path().join("judge"));
        command
    };
    let said = fails(judge().args(["--set", "schedule=learned"]), 2);
    assert!(said.contains("schedule = learned: a classifier learns none"), "{said}");
    // The file says how many timesteps there are.
    let betas = format!("betas={}", run.join("betas.npy").display());
    let tiny: Vec<&str> = TINY[..6].to_vec();
    let mut command = ddpm();
    command.args(["train-classifier", "--data", "mnist", "--batch", "4", "--steps", "1", "--device", "cpu"]);
    ok(command
        .args(tiny)
        .args(["--set", "validate_every=0", "--set", &betas])
        .arg("--out")
        .arg(folder.path().join("j")));
    let mut command = ddpm();
    command.args(["train-classifier", "--steps", "1", "--device", "cpu", "--set", "validate_every=0", "--set", &betas]);
    ok(command.arg("--config").arg(run.join("config.toml")).arg("--out").arg(folder.path().join("of the run's file")));
    let mut command = ddpm();
    command.args(["sample", "--count", "1", "--steps", "3", "--model"]).arg(&run).arg("--classifier");
    ok(command.arg(folder.path().join("j")).arg("--out").arg(folder.path().join("guided.png")));
}

/// A classifier guides an unconditional model: of the classes asked for come other images, and more so with its scale.
#[test]
fn a_classifier_guides_a_drawing() {
    let folder = tempfile::tempdir().unwrap();
    let (run, judge) = (folder.path().join("run"), folder.path().join("judge"));
    ok(&mut train(&run, 2));
    let mut command = ddpm();
    command.args(["train-classifier", "--device", "cpu", "--data", "mnist", "--batch", "8", "--steps", "4", "--out"]);
    ok(command.arg(&judge).args(TINY).args(["--set", "validate_every=0"]));
    let draw = |flags: &str| {
        let mut command = ddpm();
        command.args(["sample", "--count", "2", "--steps", "4", "--device", "cpu", "--model"]).arg(&run);
        command.arg("--out").arg(folder.path().join("out.npz"));
        command.args(flags.split(' ').map(|a| a.replace("JUDGE", judge.to_str().unwrap())).filter(|a| !a.is_empty()));
        command
    };
    let pixels = |flags: &str| {
        ok(&mut draw(flags));
        pixels_of(&folder.path().join("out.npz"))
    };
    for sampler in ["ddpm", "ddim", "dpm++", "heun"] {
        let plain = pixels(&format!("--sampler {sampler}"));
        let of = |class: u32, scale: &str| {
            pixels(&format!("--sampler {sampler} --classifier JUDGE --classifier-scale {scale} --class {class}"))
        };
        assert!(of(3, "0") == plain, "{sampler}: a scale of 0 makes a difference");
        let (three, seven) = (of(3, "200"), of(7, "200"));
        assert!(three != plain && seven != plain && three != seven, "{sampler}: the classes make no difference");
    }
    let turns = pixels("--classifier JUDGE --classifier-scale 200");
    assert!(turns.len() == 2 * 784);
    assert!(fails(&mut draw("--classifier-scale 2"), 2).contains("there is no classifier to scale"));
    assert!(fails(&mut draw("--classifier nowhere"), 1).contains("nowhere"));
    assert!(fails(&mut draw("--classifier JUDGE --class 10"), 2).contains("0 to 9"));
    // What there is to say of the classifier's files is said.
    let scheduler = judge.join("checkpoints/4/scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler).unwrap();
    fs::write(&scheduler, text.replace("_class_name", "_class_name_of_whom")).unwrap();
    let said = ok(&mut draw("--classifier JUDGE"));
    assert!(said.contains("scheduler_config.json: names no class; DDPMScheduler is assumed"), "{said}");
}

/// What a classifier does not have is refused by name, and passed over in the settings of the model to be guided.
#[test]
fn a_classifier_has_no_settings_of_a_network() {
    let folder = tempfile::tempdir().unwrap();
    let train_classifier = || {
        let mut command = ddpm();
        command.args(["train-classifier", "--data", "mnist", "--batch", "4", "--steps", "1", "--device", "cpu"]);
        command.args(TINY).args(["--set", "validate_every=0"]);
        command
    };
    for (assignment, key) in [
        ("loss=vlb", "loss"),
        ("prediction=v", "prediction"),
        ("variance=learned_range", "variance"),
        ("min_snr_gamma=3", "min_snr_gamma"),
        ("vlb_weight=1", "vlb_weight"),
        ("label_dropout=0.1", "label_dropout"),
        ("class_embedding=timestep", "class_embedding"),
        ("upsample_type=resnet", "upsample_type"),
        ("init=runs/mnist", "init"),
    ] {
        let said = fails(train_classifier().args(["--set", assignment]), 2);
        let want = format!("ddpm-cuda: --set {assignment}: a classifier has no {key}, so leave it out\n");
        assert_eq!(said, want);
    }
    let help = ok(ddpm().args(["train-classifier", "--help"]));
    assert!(!help.contains("min_snr_gamma = ") && help.contains("timestep_sampling = "), "{help}");
    let model = folder.path().join("model.toml");
    let tuned = "init = \"runs/mnist\"\ntimesteps = 40\nloss = \"hybrid\"\nvariance = \"learned_range\"\n";
    fs::write(&model, format!("{tuned}label_dropout = 0.1\n")).unwrap();
    let run = folder.path().join("judge");
    let mut command = ddpm();
    command.args(["train-classifier", "--data", "mnist", "--batch", "4", "--steps", "1", "--device", "cpu"]);
    ok(command.args(&TINY[..6]).args(["--set", "validate_every=0", "--config"]).arg(&model).arg("--out").arg(&run));
    let settings = fs::read_to_string(run.join("config.toml")).unwrap();
    for line in
        ["timesteps = 40", "loss = \"simple\"", "variance = \"fixed_large\"", "label_dropout = 0.0", "init = \"\""]
    {
        assert!(settings.lines().any(|l| l.starts_with(line)), "{line} is not in {settings}");
    }
}

/// The settings of a checkpoint's run say what is held out, also where its path begins inside the run.
#[test]
fn a_checkpoint_is_of_its_run_from_wherever_it_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    noise_images(&at("gray.npy"), 1);
    ok(train(&at("run"), 1)
        .args(["--set", "held_out=0.5", "--set", "attention_resolutions=8", "--data"])
        .arg(at("gray.npy")));
    for (inside, model) in [("run", "checkpoints/1"), ("run/checkpoints", "1"), ("run/checkpoints/1", ".")] {
        let mut command = ddpm();
        command.args(["eval", "--steps", "2", "--device", "cpu", "--model", model]).current_dir(at(inside));
        let said = ok(&mut command);
        assert!(said.contains("10 images"), "{model} from {inside}: {said}");
    }
}

/// Eps cannot be told from the last x_t where that is the noise itself; a classifier predicts none.
#[test]
fn a_classifier_guides_a_model_with_zero_terminal_snr() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // The preset auto predicts eps.
    let cpu = ["--device", "cpu", "--preset", "auto", "--set", "accumulate=1", "--set", "flip=false"];
    ok(train(&at("model"), 1).args(cpu).args(["--set", "prediction=v", "--set", "zero_snr=true", "--data", "mnist"]));
    let mut command = ddpm();
    command.args(["train-classifier", "--device", "cpu", "--steps", "1", "--set", "validate_every=0", "--config"]);
    ok(command.arg(at("model/config.toml")).arg("--out").arg(at("judge")));
    let settings = ddpm_cuda::config::Config::read(&at("judge/config.toml")).unwrap();
    assert!(settings.diffusion.zero_snr && settings.diffusion.prediction.to_string() == "eps");
    let mut command = ddpm();
    command.args(["sample", "--count", "1", "--steps", "3", "--device", "cpu", "--model"]).arg(at("model"));
    ok(command.arg("--classifier").arg(at("judge")).arg("--out").arg(at("guided.png")));
    assert!(
        fails(ddpm().args(["train", "--set", "prediction=eps", "--set", "zero_snr=true"]), 2)
            .contains("eps: with zero")
    );
}

/// What is not trained any more is still drawn from.
#[test]
fn a_model_trained_without_its_last_timestep_is_drawn_from() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    ok(train(&run, 1).args(["--set", "prediction=v", "--set", "zero_snr=true"]));
    let said = |from: &str, to: &str, file: &Path| {
        let text = fs::read_to_string(file).unwrap();
        assert!(text.contains(from), "{from} is not in {text}");
        fs::write(file, text.replace(from, to)).unwrap();
    };
    said("loss = \"simple\"", "loss = \"vlb\"", &run.join("config.toml"));
    let scheduler = run.join("checkpoints/1/scheduler/scheduler_config.json");
    for prediction in ["v_prediction", "mu"] {
        let mut command = ddpm();
        command.args(["sample", "--count", "1", "--steps", "3", "--device", "cpu", "--model"]).arg(&run);
        ok(command.arg("--out").arg(folder.path().join(format!("{prediction}.png"))));
        if prediction == "v_prediction" {
            said("\"v_prediction\"", "\"mu\"", &scheduler);
        }
    }
}

/// Timesteps that are drawn more often than others do not count for more in the losses of a log.
#[test]
fn losses_by_quarter_of_importance_sampling_add_up_to_the_loss() {
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    // Every timestep has its ten losses long before the end.
    let sets = ["timestep_sampling=importance", "timesteps=6", "log_every=1", "validate_every=0", "sample_every=0"];
    ok(train(&run, 60).args(sets.iter().flat_map(|set| ["--set", set])));
    let lines = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 60);
    for line in lines {
        let quarters = line["loss_by_quarter"].as_array().unwrap();
        let mean: f64 =
            quarters.iter().zip([2.0, 1.0, 2.0, 1.0]).map(|(q, of)| of / 6.0 * q.as_f64().unwrap_or(0.0)).sum();
        let loss = line["loss"].as_f64().unwrap();
        assert!((mean - loss).abs() <= 1e-12 * loss, "{mean} of {line}");
    }
}

/// The settings of the model to be guided give its network and its process; how it was trained is its own matter.
#[test]
fn a_classifier_is_trained_from_the_settings_of_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let trained = ["sample_every=1", "learning_rate=3e-4", "warmup_steps=7", "cooldown=0.25", "ema_decay=0.5"];
    let sets = trained.iter().flat_map(|set| ["--set", set]);
    ok(train(&at("uniform"), 1).args(sets.clone()));
    ok(train(&at("importance"), 1).args(sets).args(["--set", "timestep_sampling=importance"]));
    let judge = |config: &Path, out: &str, arguments: &[&str]| {
        let mut command = ddpm();
        command.args(["train-classifier", "--device", "cpu", "--set", "validate_every=0", "--config"]).arg(config);
        command.arg("--out").arg(at(out)).args(arguments);
        command
    };
    let settings = |run: &str| ddpm_cuda::config::Config::read(&at(run).join("config.toml")).unwrap();
    for model in ["uniform", "importance"] {
        let out = format!("judge of {model}");
        let said = ok(&mut judge(&at(model).join("config.toml"), &out, &["--steps", "1"]));
        assert!(said.contains("config.toml is of a model, whose timestep_sampling, steps, learning_rate,"), "{said}");
        let c = settings(&out);
        assert_eq!((c.model.classes, c.model.widths, c.diffusion.timesteps, c.batch), (10, vec![8, 16], 50, 4));
        assert_eq!((c.learning_rate, c.warmup_steps, c.cooldown), (1e-3, 100, 0.0));
        assert_eq!((c.weight_decay, c.ema_decay, c.sample_every), (0.05, 0.999, 0));
        assert_eq!(c.timestep_sampling.to_string(), "uniform");
    }
    // What --set says is taken, or refused by name.
    let model = at("uniform/config.toml");
    ok(&mut judge(&model, "heavy", &["--set", "weight_decay=0.2", "--set", "steps=2"]));
    assert_eq!((settings("heavy").weight_decay, settings("heavy").steps), (0.2, 2));
    for (assignment, says) in [
        ("sample_every=5", "sample_every = 5: a classifier draws no samples"),
        ("timestep_sampling=importance", "timestep_sampling = importance: a classifier's loss has no weights"),
    ] {
        let said = fails(&mut judge(&model, "refused", &["--set", assignment]), 2);
        assert!(said.contains(says) && !at("refused").exists(), "{said}");
    }
    // The file of a classifier, and one of a few settings, are taken as they are.
    let said = ok(&mut judge(&at("heavy/config.toml"), "again", &[]));
    assert!(!said.contains("not taken"), "{said}");
    assert_eq!((settings("again").weight_decay, settings("again").steps), (0.2, 2));
    fs::write(at("few.toml"), "data = \"mnist\"\nbatch = 4\nsteps = 3\nweight_decay = 0.3\n").unwrap();
    ok(judge(&at("few.toml"), "few", &[]).args(TINY));
    assert_eq!((settings("few").weight_decay, settings("few").steps), (0.3, 3));
}

/// `.pt` files of OpenAI's are judged as any model, whose data must be given, with the flags that they lack.
#[test]
fn models_of_openai_are_judged_by_images() {
    let folder = tempfile::tempdir().unwrap();
    let colour = folder.path().join("colour.npz");
    let (shape, labels) = (Shape::new(20, 8, 8, 3), (0..20).map(|i| i % 5).collect::<Vec<u32>>());
    let bytes: Vec<u8> = (0..shape.len()).map(|i| (i * 97 % 251) as u8).collect();
    ddpm_cuda::output::write_npz(&colour, shape, &bytes, Some(&labels)).unwrap();
    let colour = colour.to_str().unwrap();
    for (name, data) in [("guided", colour), ("guided_legacy", colour), ("improved", "mnist")] {
        let model = fixture(&format!("openai/{name}")).join("model.pt");
        let command = |arguments: &str| {
            let mut command = ddpm();
            command.args(arguments.split(' ')).args(["--device", "cpu", "--model"]).arg(&model);
            command
        };
        let said = ok(command("eval --count 2 --steps 4 --split train").args(["--data", data]));
        assert!(said.contains(" bits per dimension: L_T ") && said.contains("2 images"), "{name}: {said}");
        let said = ok(command("likelihood --count 1 --tolerance 0.3 --split train").args(["--data", data]));
        assert!(said.contains("bits per dimension of uniformly dequantised pixels"), "{name}: {said}");
        let said = fails(&mut command("eval --count 2"), 2);
        assert!(said.contains("this model does not say what it was trained on: give images with --data"), "{said}");
    }
}

/// The step of each line of the log.
fn lines(run: &Path) -> Vec<u64> {
    let log = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["step"].as_u64().unwrap()).collect()
}

/// A `.pt` file of OpenAI's goes wherever a model goes; what it does not tell is asked for and said.
#[test]
fn converts_models_of_openai_and_predicts_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let model = fixture("openai/guided").join("model.pt");
    let info = ok(ddpm().args(["info", "--model"]).arg(&model));
    assert!(info.contains("355,462 parameters; images 8x8x3") && info.contains("learned_range"), "{info}");
    assert!(info.contains("its shapes tell widths 32,32 with 1 blocks a level"), "{info}");
    // Its output, and that of what it is converted to, all channels of it.
    let bytes = fs::read(fixture("openai/guided/io.safetensors")).unwrap();
    let golden = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let f32s = |key: &str| bytemuck::pod_collect_to_vec::<u8, f32>(golden.tensor(key).unwrap().data());
    let shape = |key: &str| golden.tensor(key).unwrap().shape().to_vec();
    ddpm_cuda::output::write_npy(&at("x.npy"), &shape("x"), &f32s("x")).unwrap();
    let numbers = |key: &str| bytemuck::pod_collect_to_vec::<u8, i32>(golden.tensor(key).unwrap().data());
    let t: Vec<f32> = numbers("t").into_iter().map(|t| t as f32).collect();
    ddpm_cuda::output::write_npy(&at("t.npy"), &[t.len()], &t).unwrap();
    let file = fs::File::create(at("labels.npy")).unwrap();
    let mut writer = npyz::WriteOptions::new().default_dtype().shape(&[2]).writer(file).begin_nd().unwrap();
    writer.extend(numbers("labels")).unwrap();
    writer.finish().unwrap();
    let predict = |model: &Path| {
        let mut command = ddpm();
        command.args(["predict", "--output", "raw", "--device", "cpu", "--model"]).arg(model);
        command
            .arg("--x")
            .arg(at("x.npy"))
            .arg("--t")
            .arg(at("t.npy"))
            .arg("--labels")
            .arg(at("labels.npy"))
            .arg("--out")
            .arg(at("out.npy"));
        command
    };
    let convert = |model: &Path, out: &Path| {
        let mut command = ddpm();
        command.args(["convert", "--model"]).arg(model).arg("--out").arg(out);
        command
    };
    let said = ok(&mut convert(&model, &at("diffusers")));
    assert!(said.contains(&format!("355462 parameters: {}", at("diffusers").display())), "{said}");
    fs::create_dir(at("back")).unwrap();
    let back = at("back/again.pt");
    assert!(ok(&mut convert(&at("diffusers"), &back)).contains("the flags are in "));
    for model in [&model, &at("diffusers"), &back] {
        ok(&mut predict(model));
        let out = ddpm_cuda::data::npy::read(&at("out.npy")).unwrap();
        assert_eq!(out.shape, shape("out"));
        support::close_to_largest("out", &out.to_f32().unwrap(), &f32s("out"), support::network::F32);
    }
    for (model, out, arguments, code, want) in [
        (&model, at("diffusers"), &[][..], 1, "is not an empty folder; give a new or an empty one"),
        (&model, back.clone(), &[][..], 1, "again.pt: exists already; give a new name"),
        (&model, at("a.pt"), &["--to", "ours"][..], 2, "a.pt: with --to ours a folder is expected"),
        (&model, at("a"), &["--to", "openai"][..], 2, "a file that ends in .pt is expected"),
        (&model, at("a"), &["--set", "num_heads"][..], 2, "--set num_heads: there is no '='"),
        (&model, at("none/a"), &[][..], 1, "cannot be written"),
        (&fixture("unet_gray16"), at("a"), &["--set", "num_heads=4"][..], 2, "flags are for OpenAI's .pt files"),
        (&fixture("unet_gray16"), at("a.pt"), &[][..], 1, "OpenAI's files cannot say groups = 8; only 32 is possible"),
        (
            &fixture("openai/improved").join("model.pt"),
            at("a"),
            &[][..],
            1,
            "diffusers has no words for num_heads = 4 in attentions of different widths; --to ours writes a folder",
        ),
    ] {
        let said = fails(convert(model, &out).args(arguments), code);
        assert!(said.contains(want) && said.trim_end().lines().count() == 1, "{said}\nshould say: {want}");
        assert!(!at("a").exists() && !at("a.pt").exists());
    }
    ok(convert(&fixture("openai/improved").join("model.pt"), &at("ours")).args(["--to", "ours"]));
    assert!(ok(ddpm().args(["info", "--model"]).arg(at("ours"))).contains("714,209 parameters"));
}

/// A scheduler's limits of x_0 are those of `sample`: other images than with the usual ones, and said by `info`.
#[test]
fn limits_of_a_scheduler_are_obeyed_by_sample() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "diffusion_pytorch_model.safetensors"] {
        fs::copy(fixture("unet_gray16").join(file), folder.path().join(file)).unwrap();
    }
    let draw = |scheduler: serde_json::Value, flags: &[&str]| {
        fs::write(folder.path().join("scheduler_config.json"), scheduler.to_string()).unwrap();
        let out = folder.path().join("out.npz");
        let mut command = ddpm();
        command.args(["sample", "--steps", "2", "--count", "1", "--sampler", "ddim", "--device", "cpu", "--model"]);
        ok(command.arg(folder.path()).args(flags).arg("--out").arg(&out));
        pixels_of(&out)
    };
    let class = "DDPMScheduler";
    let usual = draw(serde_json::json!({"_class_name": class}), &[]);
    let narrow = draw(serde_json::json!({"_class_name": class, "clip_sample_range": 0.25}), &[]);
    assert!(ok(ddpm().args(["info", "--model"]).arg(folder.path())).contains("x_0 clipped to 0.25"));
    assert!(narrow != usual && narrow.iter().all(|byte| (96..=159).contains(byte)), "{narrow:?}");
    let threshold = serde_json::json!({"_class_name": class, "thresholding": true, "sample_max_value": 100.0,
        "dynamic_thresholding_ratio": 0.9});
    let thresholded = draw(threshold, &[]);
    assert!(thresholded != usual);
    assert!(draw(serde_json::json!({"_class_name": class}), &["--threshold", "0.9"]) == thresholded);
}

/// The bytes of `arr_0`.
fn pixels_of(npz: &Path) -> Vec<u8> {
    let mut arrays = ddpm_cuda::data::npy::parse_npz(&fs::read(npz).unwrap()).unwrap();
    arrays.swap_remove(0).1.into_u8().unwrap().to_vec()
}

/// A drawing that is killed between two batches goes on with --resume, with the bits of one that was not; nothing has
/// its final name before.
#[test]
fn an_interrupted_drawing_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let draw = |out: &str, more: &[&str]| {
        let mut command = ddpm();
        command.args(["sample", "--count", "200", "--steps", "12", "--sampler", "ddim", "--device", "cpu", "--model"]);
        command.arg(fixture("unet_gray16")).arg("--out").arg(at(out)).args(more);
        command
    };
    ok(&mut draw("whole.npz", &[]));
    assert!(!at("whole.npz.part").exists(), "finished batches stay");
    let mut child = draw("killed.npz", &[]).stdout(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !at("killed.npz.part/0.u8").exists() {
        assert!(started.elapsed() < Duration::from_secs(120), "no batch is finished");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!at("killed.npz").exists() && at("killed.npz.part").exists(), "it was not killed in time");
    assert!(fails(&mut draw("killed.npz", &[]), 1).contains("add --resume to go on"));
    assert!(fails(&mut draw("killed.npz", &["--resume", "--seed", "1"]), 1).contains("another command"));
    // A setting that leaves the weights as they are makes another network of them.
    assert!(fails(&mut draw("killed.npz", &["--resume", "--clip-x0", "false"]), 1).contains("another command"));
    let first = fs::read(at("killed.npz.part/0.u8")).unwrap();
    // What is done is not done again: another byte stays.
    fs::write(at("killed.npz.part/0.u8"), vec![7; first.len()]).unwrap();
    let said = ok(&mut draw("killed.npz", &["--resume"]));
    assert!(said.contains("batches are done") && !said.contains("0 of"), "{said}");
    let (is, was) = (pixels_of(&at("killed.npz")), pixels_of(&at("whole.npz")));
    assert!(is[first.len()..] == was[first.len()..] && was[..first.len()] == first, "other bits");
    assert!(is[..first.len()].iter().all(|&byte| byte == 7), "a finished batch was drawn again");
    assert!(!at("killed.npz.part").exists());
    // Nothing is left to do, and a GIF cannot go on.
    let said = ok(&mut draw("killed.npz", &["--resume"]));
    assert!(said.contains("is there already, and nothing of it is left to do"), "{said}");
    assert!(fails(&mut draw("x.gif", &["--resume"]), 2).contains("frames of a GIF are not kept"));
    // Nor does a second network with the same weights.
    let improved = |more: &[&str]| {
        let mut command = ddpm();
        command.args(["sample", "--count", "150", "--steps", "6", "--device", "cpu", "--model"]);
        command.arg(fixture("openai/improved/model.pt")).arg("--out").arg(at("improved.npz")).args(more);
        command
    };
    let mut child = improved(&[]).stdout(Stdio::null()).spawn().unwrap();
    while !at("improved.npz.part/0.u8").exists() {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let said = fails(&mut improved(&["--resume", "--set", "rescale_timesteps=false"]), 1);
    assert!(said.contains("another command"), "{said}");
    // Predictions along the way are kept with the batches, and drawn again where they are missing.
    let along = at("along.png").to_str().unwrap().to_string();
    ok(&mut draw("once.npz", &["--progressive", &along]));
    let once = fs::read(at("along.png")).unwrap();
    let mut child = draw("twice.npz", &["--progressive", &along]).stdout(Stdio::null()).spawn().unwrap();
    fs::remove_file(at("along.png")).unwrap();
    while !at("twice.npz.part/64.u8").exists() {
        std::thread::sleep(Duration::from_millis(2));
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let said = ok(&mut draw("twice.npz", &["--progressive", &along, "--resume"]));
    assert!(!said.contains("0 of"), "{said}");
    assert!(fs::read(at("along.png")).unwrap() == once, "other predictions");
    // A folder of as many pictures.
    ok(&mut draw("pictures/", &[]));
    assert_eq!(fs::read_dir(at("pictures")).unwrap().count(), 200);
    let last = image::open(at("pictures/00199.png")).unwrap().into_luma8().into_raw();
    assert!(last == pixels_of(&at("whole.npz"))[199 * 256..]);
}

/// x_T written and read back gives the same images, and other noise others; encoded images come back.
#[test]
fn drawings_start_from_given_noise() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let run = |arguments: &str| {
        let mut command = ddpm();
        command.args(arguments.split(' ').map(|a| a.replace("DIR", folder.path().to_str().unwrap())));
        command.arg("--model").arg(fixture("unet_gray16")).args(["--device", "cpu"]);
        command
    };
    ok(&mut run("sample --count 3 --steps 4 --out DIR/a.npz --save-start DIR/x.npy"));
    ok(&mut run("sample --steps 4 --out DIR/b.npz --start DIR/x.npy"));
    assert!(pixels_of(Path::new(&at("a.npz"))) == pixels_of(Path::new(&at("b.npz"))), "other images");
    ok(&mut run("sample --steps 4 --out DIR/c.npz --count 3 --seed 1"));
    assert!(pixels_of(Path::new(&at("a.npz"))) != pixels_of(Path::new(&at("c.npz"))), "the seed makes no difference");
    assert!(fails(&mut run("sample --count 4 --out DIR/d.npz --start DIR/x.npy"), 2).contains("holds 3"));
    assert!(fails(&mut run("sample --out DIR/d.npz --start DIR/a.npz"), 1).contains("a.npz"));
    let both = "sample --out DIR/d.npz --start DIR/x.npy --save-start DIR/y.npy";
    assert!(fails(&mut run(both), 2).contains("leave one out"));
    ddpm_cuda::output::write_npy(Path::new(&at("wrong.npy")), &[1, 3, 16, 16], &[0.0; 768]).unwrap();
    assert!(fails(&mut run("sample --out DIR/d.npz --start DIR/wrong.npy"), 1).contains("images x 1x16x16"));

    assert!(fails(&mut run("encode --images DIR/nothing --out DIR/y.npy"), 1).contains("nothing"));
}

/// Images come back from the noise that they are encoded in, if the network knows something about them.
#[test]
fn encoded_images_come_back() {
    let folder = tempfile::tempdir().unwrap();
    let (run, at) = (folder.path().join("run"), |name: &str| folder.path().join(name));
    let quiet = ["--set", "validate_every=0", "--set", "sample_every=0"];
    ok(train(&run, 60).args(["--set", "learning_rate=0.01", "--set", "warmup_steps=0"]).args(quiet));
    let of = |arguments: &str| {
        let mut command = ddpm();
        command.args(arguments.split(' ')).args(["--device", "cpu", "--model"]).arg(&run).current_dir(&folder);
        ok(&mut command)
    };
    of("sample --count 4 --steps 50 --out a.npz");
    let encode = "encode --images a.npz --steps 10 --rounds 20 --out xt.npy";
    let said = of(&format!("{encode} --spacing leading"));
    assert!(!said.contains("has not settled"), "{said}");
    of("sample --start xt.npy --steps 10 --sampler ddim --spacing leading --clip-x0 false --out back.npz");
    let (was, is) = (pixels_of(&at("a.npz")), pixels_of(&at("back.npz")));
    let off = was.iter().zip(&is).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    assert!(off <= 1, "an image comes back off by {off} levels");
    // Up to noise alone, by a network that was hardly trained, they do not, and it is said.
    let said = of("encode --images a.npz --steps 10 --rounds 1 --out xt.npy");
    assert!(said.contains("x_t has not settled at timestep") && said.contains("more --rounds"), "{said}");
    let device = Device::cpu();
    let model = checkpoint::load(&device, &run).unwrap();
    let schedule = model.config.diffusion.noise_schedule().unwrap();
    let kept = Spacing::Even.timesteps(schedule.len(), 10).unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let steps = inversion(&schedule, model.config.diffusion.prediction, &kept, was.len() / 4).unwrap();
    let x_0: Vec<f32> = was.iter().map(|&byte| (2.0 * f32::from(byte) - 255.0) / 255.0).collect();
    let size = model.config.model.image_size;
    let x_0 = Tensor::from_slice(&device, Shape::new(4, size.h, size.w, 1), &x_0).unwrap();
    let network = Conditional::new(&device, &unet, &model.params, None, false).unwrap();
    let call = |x: &Tensor, t: f32| network.call(Call { x, t, halves: 1, turn: None });
    let encoded = ddpm_cuda::sample::encode::encode(&device, &steps, 1, &x_0, call, || Ok(())).unwrap();
    let (at_timestep, levels) = (encoded.at, 127.5 * encoded.moved);
    let want = format!("at timestep {at_timestep}, where the last round moved it by {levels:.1} grey levels");
    assert!(said.contains(&want), "{said} should say: {want}");

    // Of several files a broken one may be left out, here and where a part is painted anew.
    let folder = at("several");
    fs::create_dir(&folder).unwrap();
    for (name, light) in [("a.png", 90), ("b.png", 160), ("c.png", 30)] {
        image::GrayImage::from_pixel(28, 28, image::Luma([light])).save(folder.join(name)).unwrap();
    }
    image::GrayImage::from_pixel(28, 28, image::Luma([255])).save(at("mask.png")).unwrap();
    let whole = fs::read(folder.join("b.png")).unwrap();
    fs::write(folder.join("b.png"), &whole[..whole.len() / 2]).unwrap();
    let encode = "encode --images several --steps 5 --spacing leading --out several.npy";
    let inpaint = "inpaint --images several --mask mask.png --steps 2 --jump 1 --resample 1 --out painted.npz";
    for (command, said_at_the_end) in [(encode, "2 images in 5 steps"), (inpaint, "2 images, ")] {
        let mut without = ddpm();
        without.args(command.split(' ')).args(["--device", "cpu", "--model"]).arg(&run).current_dir(at(""));
        let refused = fails(&mut without, 1);
        assert!(refused.contains("b.png: is not a whole image"), "{refused}");
        let said = of(&format!("{command} --on-bad-image skip"));
        assert!(said.contains("1 image cannot be used and is left out: b.png ("), "{said}");
        assert!(said.contains(said_at_the_end), "{said}");
    }
    let array = ddpm_cuda::data::npy::read(&at("several.npy")).unwrap();
    assert_eq!(array.shape, [2, 1, 28, 28]);
}

/// Fig. 6 to 9 of the paper, and painting.
#[test]
fn pictures_along_the_way_between_images_and_within_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let run = |arguments: &str| {
        let mut command = ddpm();
        command.args(arguments.split_whitespace().map(|a| a.replace("DIR", folder.path().to_str().unwrap())));
        command.arg("--model").arg(fixture("unet_gray16")).args(["--device", "cpu"]);
        command
    };
    let size = |name: &str| image::image_dimensions(at(name)).unwrap();
    // Three rows of 18 + 2 pixels, and 13 columns: of 25 steps every second, the last among them.
    ok(&mut run("sample --count 3 --steps 25 --out DIR/a/ --progressive DIR/p.png"));
    assert_eq!(size("p.png"), (13 * 18 + 2, 3 * 18 + 2));
    let last = |path: &Path, left: u32, top: u32| {
        let picture = image::open(path).unwrap().into_luma8();
        (0..256).map(|k| picture.get_pixel(left + k % 16, top + k / 16).0[0]).collect::<Vec<u8>>()
    };
    let grey = |name: &str| image::open(at(name)).unwrap().into_luma8().into_raw();
    assert!(last(&at("p.png"), 2 + 12 * 18, 2 + 18) == grey("a/00001.png"), "the last prediction is the image");

    ok(&mut run("sample --count 4 --steps 4 --shared-noise 0 --out DIR/s/"));
    assert!(grey("s/00000.png") == grey("s/00001.png") && grey("s/00001.png") != grey("s/00002.png"));

    ok(&mut run("interpolate --images DIR/a/00000.png DIR/a/00000.png --t 500 --steps 5 --frames 3 --out DIR/i/"));
    assert!(grey("i/00000.png") == grey("i/00001.png") && grey("i/00001.png") == grey("i/00002.png"));
    ok(&mut run("interpolate --images DIR/a/00000.png DIR/a/00001.png --t 500 --steps 5 --frames 3 --out DIR/i.png"));
    assert_eq!(size("i.png"), (5 * 18 + 2, 18 + 2));
    assert!(last(&at("i.png"), 2, 2) == grey("a/00000.png"), "the source is at the end of the row");
    let far = "interpolate --images DIR/a/00000.png DIR/a/00001.png --t 1000 --out DIR/x.png";
    assert!(fails(&mut run(far), 2).contains("0 to 999"));
    let none = "interpolate --images DIR/a/00000.png DIR/none.png --t 5 --out DIR/x.png";
    assert!(fails(&mut run(none), 1).contains("none.png"));
    let few = "interpolate --images DIR/a/00000.png DIR/a/00001.png --t 5 --frames 0 --out DIR/x.png";
    assert!(fails(&mut run(few), 2).contains("at least 1"));

    let mask = image::GrayImage::from_fn(16, 16, |x, _| image::Luma([if x < 8 { 255 } else { 0 }]));
    mask.save(at("m.png")).unwrap();
    ok(&mut run("inpaint --images DIR/a --mask DIR/m.png --steps 6 --jump 2 --resample 2 --out DIR/new/"));
    // Where there are no ten levels to go back, it is all but one.
    let painted = |jump: &str| {
        ok(&mut run(&format!(
            "inpaint --images DIR/a --mask DIR/m.png --steps 4 --resample 2 {jump} --out DIR/jump.npz"
        )));
        pixels_of(&at("jump.npz"))
    };
    let (own, all_but_one) = (painted(""), painted("--jump 3"));
    assert!(own == all_but_one && own != painted("--jump 2"));
    let (was, is) = (grey("a/00002.png"), grey("new/00002.png"));
    assert!((0..256).filter(|k| k % 16 >= 8).all(|k| was[k] == is[k]), "what is kept has changed");
    assert!((0..256).filter(|k| k % 16 < 8).any(|k| was[k] != is[k]), "nothing is painted");
    image::GrayImage::new(15, 16).save(at("small.png")).unwrap();
    for (flags, words) in [
        ("--mask DIR/small.png", "16x15, but the model's images are 16x16"),
        ("--mask DIR/none.png", "none.png"),
        ("--mask DIR/m.png --resample 0", "1 or more"),
        ("--mask DIR/m.png --jump 0", "1 or more"),
        (
            "--mask DIR/m.png --steps 5 --jump 5",
            "with --steps 5 no level is gone through again, so give a --jump below 5",
        ),
        ("--mask DIR/m.png --count 9", "holds 3 images"),
    ] {
        let code = if flags.contains("small") || flags.contains("none") { 1 } else { 2 };
        let said = fails(&mut run(&format!("inpaint --images DIR/a {flags} --out DIR/y/")), code);
        assert!(said.contains(words), "{flags}: {said}");
    }
}

/// `predict --output` converts what the network predicts by the schedule.
#[test]
fn predictions_are_converted_on_request() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let x: Vec<f32> = (0..512).map(|k| (k as f32 * 0.37).sin()).collect();
    ddpm_cuda::output::write_npy(&at("x.npy"), &[2, 1, 16, 16], &x).unwrap();
    ddpm_cuda::output::write_npy(&at("t.npy"), &[2], &[500.0, 3.0]).unwrap();
    ddpm_cuda::output::write_npy(&at("between.npy"), &[2], &[500.5, 3.0]).unwrap();
    let predict = |t: &str, flags: &[&str]| {
        let mut command = ddpm();
        command.arg("predict").arg("--model").arg(fixture("unet_gray16")).args(flags).args(["--device", "cpu"]);
        command.arg("--x").arg(at("x.npy")).arg("--t").arg(at(t)).arg("--out").arg(at("y.npy"));
        command
    };
    let of = |flags: &[&str]| {
        ok(&mut predict("t.npy", flags));
        ddpm_cuda::data::npy::read(&at("y.npy")).unwrap().to_f32().unwrap()
    };
    let (eps, raw) = (of(&[]), of(&["--output", "raw"]));
    assert!(eps == raw && eps == of(&["--output", "eps"]), "the network predicts eps");
    let s = Schedule::new(Kind::Linear, 1000).unwrap();
    let outputs = ["x0", "v", "mu", "score", "log_variance"].map(|output| of(&["--output", output]));
    for k in 0..512 {
        let t = if k < 256 { 500 } else { 3 };
        let (signal, noise) = s.q_sample_coefficients(t);
        let (x, eps) = (f64::from(x[k]), f64::from(eps[k]));
        let x_0 = (x - noise * eps) / signal;
        let (c_x0, c_xt) = s.posterior_mean_coefficients(t);
        // The fixture has no scheduler; diffusers' default is fixed_small.
        let log_variance = s.log_variance(Variance::FixedSmall, t);
        let want = [x_0, signal * eps - noise * x_0, c_x0 * x_0 + c_xt * x, -eps / noise, log_variance];
        for (got, want) in outputs.iter().zip(want) {
            assert!((f64::from(got[k]) - want).abs() <= 1e-6 * want.abs().max(1.0), "{k}: {} for {want}", got[k]);
        }
    }
    assert!(fails(&mut predict("between.npy", &["--output", "x0"]), 1).contains("whole ones from 0 to 999"));
    ok(&mut predict("between.npy", &[]));
    fails(&mut predict("t.npy", &["--output", "noise"]), 2);
}

/// Inputs of `predict` in a folder, and what it makes of them.
struct Predicting {
    folder: tempfile::TempDir,
    x: Vec<f32>,
    t: Vec<usize>,
    shape: [usize; 4],
}

impl Predicting {
    fn new(shape: [usize; 4], t: &[usize]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let x: Vec<f32> = (0..shape.iter().product()).map(|k: usize| 2.0 * (k as f32 * 0.37).sin()).collect();
        ddpm_cuda::output::write_npy(&folder.path().join("x.npy"), &shape, &x).unwrap();
        let times: Vec<f32> = t.iter().map(|&t| t as f32).collect();
        ddpm_cuda::output::write_npy(&folder.path().join("t.npy"), &[t.len()], &times).unwrap();
        Predicting { folder, x, t: t.to_vec(), shape }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, model: &Path, flags: &[&str]) -> Command {
        let mut command = ddpm();
        command.args(["predict", "--device", "cpu"]).args(flags).arg("--model").arg(model);
        command.args(["--x", "x.npy", "--t", "t.npy", "--out", "y.npy"]).current_dir(self.folder.path());
        command
    }

    /// The numbers, of so many channels.
    fn of(&self, model: &Path, channels: usize, flags: &[&str]) -> Vec<f32> {
        ok(&mut self.command(model, flags));
        let y = ddpm_cuda::data::npy::read(&self.at("y.npy")).unwrap();
        let [n, _, h, w] = self.shape;
        assert_eq!(y.shape, [n, channels, h, w], "{flags:?}");
        y.to_f32().unwrap()
    }

    /// Writes `l.npy`.
    fn label(&self, labels: &[i32]) {
        let file = fs::File::create(self.at("l.npy")).unwrap();
        let options = npyz::WriteOptions::new().default_dtype().shape(&[labels.len() as u64]).writer(file);
        let mut writer = options.begin_nd().unwrap();
        writer.extend(labels.iter().copied()).unwrap();
        writer.finish().unwrap();
    }
}

/// They are computed to f64, from the same numbers, and written to f32.
#[track_caller]
fn same_to_f32(what: &str, got: f32, want: f64) {
    assert!((f64::from(got) - want).abs() <= 1e-6 * want.abs().max(1.0), "{what}: {got} for {want}");
}

/// By the definitions, also where the last x_t is the noise itself: then it is eps.
#[test]
fn whatever_a_network_predicts_is_converted() {
    let inputs = Predicting::new([4, 1, 12, 8], &[999, 500, 3, 0]);
    let model = checkpoint::load(&Device::cpu(), &fixture("drawn/v")).unwrap();
    for (name, prediction) in [("v", Prediction::V), ("x0", Prediction::X0), ("mu", Prediction::Mu)] {
        for zero_snr in [false, true] {
            let mut config = model.config.clone();
            (config.diffusion.prediction, config.diffusion.zero_snr) = (prediction, zero_snr);
            let run = support::saved(&inputs.at(&format!("{name}{zero_snr}")), &config, &model.params);
            let s = config.diffusion.noise_schedule().unwrap();
            assert_eq!(s.alpha_bar(999) == 0.0, zero_snr);
            let of = |output: &str| inputs.of(&run, 1, &["--output", output]);
            let own = inputs.of(&run, 1, &[]);
            assert!(own == of("raw") && own == of(name), "{name}: its own prediction is changed");
            let outputs = ["eps", "x0", "v", "mu", "score", "log_variance"];
            let got = outputs.map(of);
            for (k, (&x, &y)) in inputs.x.iter().zip(&own).enumerate() {
                let (x, y, t) = (f64::from(x), f64::from(y), inputs.t[k / 96]);
                let (signal, noise) = s.q_sample_coefficients(t);
                let (c_x0, c_xt) = s.posterior_mean_coefficients(t);
                let x_0 = match prediction {
                    Prediction::V => signal * x - noise * y,
                    Prediction::Mu => (y - c_xt * x) / c_x0,
                    _ => y,
                };
                let eps = (x - signal * x_0) / noise;
                let log_variance = s.log_variance(Variance::FixedLarge, t);
                let mean = c_x0 * x_0 + c_xt * x;
                let want = [eps, x_0, signal * eps - noise * x_0, mean, -eps / noise, log_variance];
                for ((output, got), want) in outputs.iter().zip(&got).zip(want) {
                    same_to_f32(&format!("{output} of {name} at {t}, zero_snr {zero_snr}"), got[k], want);
                }
            }
        }
    }
}

/// Of twice the channels the first half is the prediction, and the second says the variance in three ways.
#[test]
fn a_learned_variance_is_told_from_the_prediction() {
    let inputs = Predicting::new([4, 1, 12, 8], &[999, 500, 3, 0]);
    let model = checkpoint::load(&Device::cpu(), &fixture("drawn/learned_range")).unwrap();
    let s = model.config.diffusion.noise_schedule().unwrap();
    let mut positive = 0;
    for variance in [Variance::LearnedRange, Variance::Learned, Variance::LearnedRaw] {
        let mut config = model.config.clone();
        config.diffusion.variance = variance;
        let run = support::saved(&inputs.at(&variance.to_string()), &config, &model.params);
        let raw = inputs.of(&run, 2, &["--output", "raw"]);
        let half = |which: usize| raw.chunks_exact(96).skip(which).step_by(2).flatten().copied().collect::<Vec<f32>>();
        let (eps, v) = (half(0), half(1));
        assert!(inputs.of(&run, 1, &[]) == eps && inputs.of(&run, 1, &["--output", "eps"]) == eps, "{variance}");
        let x_0 = inputs.of(&run, 1, &["--output", "x0"]);
        let log_variance = inputs.of(&run, 1, &["--output", "log_variance"]);
        for k in 0..4 * 96 {
            let (t, v) = (inputs.t[k / 96], f64::from(v[k]));
            let (signal, noise) = s.q_sample_coefficients(t);
            let want = (f64::from(inputs.x[k]) - noise * f64::from(eps[k])) / signal;
            same_to_f32(&format!("x_0 at {t}"), x_0[k], want);
            let share = 0.5 * (v + 1.0);
            let want = match variance {
                Variance::LearnedRange => {
                    share * s.betas()[t].ln() + (1.0 - share) * s.log_variance(Variance::FixedSmall, t)
                }
                Variance::LearnedRaw if v < 0.0 => {
                    assert!(log_variance[k].is_nan(), "the logarithm of {v}");
                    continue;
                }
                Variance::LearnedRaw => {
                    positive += 1;
                    v.ln()
                }
                _ => v,
            };
            same_to_f32(&format!("{variance} at {t}"), log_variance[k], want);
        }
    }
    assert!(positive > 0, "no variance of its own is above 0");
}

/// `predict --guidance` mixes what the network predicts with and without the class, and leaves the variance.
#[test]
fn predictions_are_guided() {
    let inputs = Predicting::new([2, 3, 16, 16], &[700, 40]);
    let device = Device::cpu();
    let (mut config, params) = network::with_null_class(&device);
    // The channels of the variance are the prediction's once more.
    (config.model.learned_variance, config.diffusion.variance) = (true, Variance::LearnedRange);
    let (_, specs) = UNet::new(&config.model).unwrap();
    let mut flat = vec![0.0; specs.flat_len()];
    for ((p, _), (own, _)) in specs.iter().zip(params.specs().iter()) {
        let weights = params.get(own);
        flat[specs.range(p)].iter_mut().zip(weights.iter().chain(weights)).for_each(|(to, &weight)| *to = weight);
    }
    let params = Params::from_host(&device, specs, &flat).unwrap();
    let guided = support::saved(&inputs.at("guided"), &config, &params);
    // All its rows as classes, so that the null class can be asked for alone.
    (config.model.classes, config.model.null_class) = (config.model.classes + 1, false);
    let plain = support::saved(&inputs.at("plain"), &config, &params);

    for output in ["raw", "x0", "eps"] {
        let channels = if output == "raw" { 6 } else { 3 };
        let of = |model: &Path, flags: &[&str]| {
            inputs.of(model, channels, &[&["--labels", "l.npy", "--output", output], flags].concat())
        };
        inputs.label(&[10, 10]);
        let without = of(&plain, &[]);
        inputs.label(&[7, 2]);
        let with = of(&plain, &[]);
        assert!(with == of(&guided, &[]) && with == of(&guided, &["--guidance", "1"]), "1 is no guidance");
        for weight in ["3", "0.5", "0", "-1"] {
            let got = of(&guided, &["--guidance", weight]);
            let weight: f64 = weight.parse().unwrap();
            for (k, (&with, &without)) in with.iter().zip(&without).enumerate() {
                let of_variance = k / 256 % channels >= 3;
                let (with, without) = (f64::from(with), f64::from(without));
                let want = if of_variance { with } else { without + weight * (with - without) };
                // Converted from what is rounded to f32 once more. x_0 of eps is the larger by 1/signal, of rounding
                // errors of eps, which is below 4.
                let (signal, _) =
                    Schedule::new(Kind::Linear, 1000).unwrap().q_sample_coefficients(inputs.t[k / (256 * channels)]);
                let allowed = 1e-6 * (1.0 + weight.abs()) * 4.0 / signal;
                assert!((f64::from(got[k]) - want).abs() <= allowed, "{output}, {weight}: {} for {want}", got[k]);
            }
        }
    }

    // What a model cannot be asked is refused in sample's words.
    inputs.label(&[7, 2]);
    for (model, labels, said) in [
        ("unet_gray16", &[][..], "--guidance 2: this model is unconditional, leave --guidance out"),
        (
            "unet_rgb16",
            &["--labels", "l.npy"][..],
            "--guidance 2: this model knows no images without a class; train one with label_dropout above 0",
        ),
    ] {
        let model = fixture(model);
        let grey = Predicting::new([2, 1, 16, 16], &[700, 40]);
        let inputs = if labels.is_empty() { &grey } else { &inputs };
        let refused = fails(&mut inputs.command(&model, &[labels, &["--guidance", "2"]].concat()), 2);
        let mut sample = ddpm();
        sample.args(["sample", "--guidance", "2", "--out", "none.png", "--model"]).arg(&model);
        assert!(refused.contains(said) && refused == fails(&mut sample, 2), "{refused}");
    }
    let one = ["--labels", "l.npy", "--guidance", "1"];
    assert!(inputs.of(&fixture("unet_rgb16"), 3, &one) == inputs.of(&fixture("unet_rgb16"), 3, &one[..2]));
}

/// The flags of guidance reach the sampler, and a model that knows no images without a class is not guided.
#[test]
fn guidance_needs_a_model_that_was_trained_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::cpu();
    let (config, params) = network::with_null_class(&device);
    let saved = support::saved(folder.path(), &config, &params);
    let out = folder.path().join("out.npz");
    let draw = |model: &Path, flags: &str| {
        let mut command = ddpm();
        command
            .args(["sample", "--count", "2", "--steps", "5", "--device", "cpu", "--class", "7", "--model"])
            .arg(model);
        command.args(flags.split(' ').filter(|flag| !flag.is_empty())).arg("--out").arg(&out);
        command
    };
    let (unet, _) = UNet::new(&config.model).unwrap();
    let schedule = config.diffusion.noise_schedule().unwrap();
    let method = Method::Ancestral(Variance::FixedSmall);
    let plain = Sampler::new(&schedule, method, Spacing::Even, 5).unwrap();
    let guidance = Guidance::new(3.0).unwrap();
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for (flags, guidance) in [
        ("", None),
        ("--guidance 3", Some(guidance)),
        ("--guidance 3 --guidance-rescale 0.7", Some(guidance.rescaled(0.7).unwrap())),
        ("--guidance 3 --guidance-interval 0.1,3", Some(guidance.within(0.1, 3.0).unwrap())),
    ] {
        ok(&mut draw(&saved, flags));
        let sampler = guidance.map_or(plain.clone(), |guidance| plain.clone().guided(guidance));
        let drawing = Drawing { device: &device, unet: &unet, params: &params, sampler: &sampler, seed: 0 };
        let got = pixels_of(&out);
        assert!(got == drawing.images(0..2, Some(&[7, 7]), |_| Ok(())).unwrap(), "{flags}: other images");
        assert!(!seen.contains(&got), "{flags}: makes no difference to this test");
        seen.push(got);
    }
    let model = fixture("unet_rgb16");
    assert!(fails(&mut draw(&model, "--guidance 3"), 2).contains("train one with label_dropout above 0"));
    ok(&mut draw(&model, "--guidance 1"));
    assert!(fails(&mut draw(&saved, "--guidance 3 --guidance-interval 3"), 2).contains("two noise levels"));
    assert!(fails(&mut draw(&saved, "--guidance 3 --guidance-interval 3,1"), 2).contains("from low to high"));
    assert!(fails(&mut draw(&saved, "--guidance 3 --guidance-rescale 7"), 2).contains("from 0 to 1"));
}
