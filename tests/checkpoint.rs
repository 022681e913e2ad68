//! Checkpoints: we read what diffusers writes and write what it would write; every kind of damage has its message; and
//! the last good checkpoint survives the process being killed at any moment.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ddpm_cuda::checkpoint::{self, State, StateMut};
use ddpm_cuda::config::{Config, Model, Preset, Size};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Kind, Variance};
use ddpm_cuda::params::{Init, Layout, Params, Specs};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::unet::UNet;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { fs::write(target, fs::read(path).unwrap()).unwrap() }
    }
}

fn json_file(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A list of parameters with one of each layout, extents all different.
fn small_specs() -> Specs {
    let mut specs = Specs::default();
    specs.add("conv_in.weight".into(), Shape::new(5, 3, 2, 4), Layout::Conv, Init::Zeros);
    specs.add("conv_in.bias".into(), Shape::vector(5), Layout::Vector, Init::Zeros);
    specs.add("mid_block.attentions.0.to_q.weight".into(), Shape::new(3, 1, 1, 7), Layout::Matrix, Init::Zeros);
    specs.add("mid_block.attentions.0.to_out.0.bias".into(), Shape::vector(3), Layout::Vector, Init::Zeros);
    specs
}

/// A training state in which all numbers differ, a function of the step.
struct Small {
    step: u32,
    params: Params,
    ema: Params,
    m: Tensor,
    v: Tensor,
}

impl Small {
    fn empty() -> Self {
        let params = || Params::zeros(&Device::cpu(), small_specs()).unwrap();
        let moments = || Tensor::zeros(&Device::cpu(), Shape::vector(small_specs().flat_len())).unwrap();
        Small { step: 0, params: params(), ema: params(), m: moments(), v: moments() }
    }

    fn at(step: u32) -> Self {
        let mut state = Small::empty();
        state.step = step;
        let specs = small_specs();
        let numbers = |k: usize| {
            let mut flat = vec![0.0; specs.flat_len()];
            for i in specs.iter().flat_map(|(p, _)| specs.range(p)) {
                flat[i] = ((1 + step as usize) * 1000 + k * 250 + i) as f32 / 3.0;
            }
            flat
        };
        let Small { params, ema, m, v, .. } = &mut state;
        [params, ema].into_iter().zip(0..).for_each(|(params, k)| params.write(&numbers(k)).unwrap());
        [m, v].into_iter().zip(2..).for_each(|(moments, k)| moments.write(&numbers(k)).unwrap());
        state
    }

    fn save(&self, run: &Path, keep: usize) -> PathBuf {
        let mut config = Config::preset(Preset::Mnist);
        config.keep_checkpoints = keep;
        let Small { step, params, ema, m, v } = self;
        checkpoint::save(run, &config, State { step: *step, params, ema, m, v, data: None }).unwrap()
    }

    fn restore(path: &Path) -> ddpm_cuda::error::Result<Self> {
        let mut state = Small::empty();
        let Small { step, params, ema, m, v } = &mut state;
        checkpoint::restore(path, StateMut { step, params, ema, m, v })?;
        Ok(state)
    }

    #[track_caller]
    fn assert_same(&self, other: &Small) {
        let bits = |flat: &[f32]| flat.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert_eq!(self.step, other.step);
        assert_eq!(bits(&self.params.host().unwrap()), bits(&other.params.host().unwrap()), "weights");
        assert_eq!(bits(&self.ema.host().unwrap()), bits(&other.ema.host().unwrap()), "moving average");
        assert_eq!(bits(self.m.data()), bits(other.m.data()), "first moments");
        assert_eq!(bits(self.v.data()), bits(other.v.data()), "second moments");
    }
}

fn checkpoints(run: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_models_of_diffusers_are_understood() {
    let gray = checkpoint::load(&Device::cpu(), &fixture("unet_gray16")).unwrap();
    let want = Model {
        image_size: Size::square(16),
        channels: 1,
        widths: vec![16, 32],
        blocks_per_level: 1,
        attention_resolutions: vec![8],
        head_dim: 0,
        groups: 8,
        norm_eps: 1e-6,
        dropout: 0.0,
        classes: 0,
        downsample_padding: 0,
        freq_shift: 1,
        flip_sin_to_cos: false,
    };
    assert_eq!(gray.config.model, want);
    let diffusion = gray.config.diffusion;
    assert_eq!(
        (diffusion.schedule, diffusion.timesteps, diffusion.variance),
        (Kind::Linear, 1000, Variance::FixedSmall)
    );
    let rgb = checkpoint::load(&Device::cpu(), &fixture("unet_rgb16")).unwrap();
    let want = Model {
        channels: 3,
        widths: vec![16, 32, 32],
        blocks_per_level: 2,
        head_dim: 8,
        groups: 16,
        classes: 10,
        ..want
    };
    assert_eq!(rgb.config.model, want);
    // OIHW in the file, channels last in memory: compare one number.
    let bytes = fs::read(fixture("unet_rgb16/diffusion_pytorch_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("down_blocks.1.resnets.0.conv1.weight").unwrap();
    assert_eq!(tensor.shape(), [32, 16, 3, 3]);
    let (o, i, y, x) = (21, 5, 2, 1);
    let at = 4 * (((o * 16 + i) * 3 + y) * 3 + x);
    let specs = rgb.params.specs();
    let (p, _) = specs.iter().find(|(_, s)| s.name == "down_blocks.1.resnets.0.conv1.weight").unwrap();
    let got = rgb.params.get(p)[((o * 3 + y) * 3 + x) * 16 + i];
    assert_eq!(got.to_le_bytes(), tensor.data()[at..at + 4]);
}

#[test]
fn what_is_written_is_what_diffusers_writes() {
    for name in ["unet_gray16", "unet_rgb16"] {
        let folder = tempfile::tempdir().unwrap();
        let model = checkpoint::load(&Device::cpu(), &fixture(name)).unwrap();
        let mut config = model.config.clone();
        config.diffusion.variance = Variance::FixedLarge;
        let zeros = Tensor::zeros(&Device::cpu(), Shape::vector(model.params.specs().flat_len())).unwrap();
        let state = State { step: 7, params: &model.params, ema: &model.params, m: &zeros, v: &zeros, data: None };
        let path = checkpoint::save(folder.path(), &config, state).unwrap();
        assert_eq!(path, folder.path().join("checkpoints/7"));
        assert_eq!(json_file(&path.join("unet/config.json")), json_file(&fixture(name).join("config.json")));
        let layout = fixture("pipeline_layout");
        for file in ["model_index.json", "scheduler/scheduler_config.json"] {
            assert_eq!(json_file(&path.join(file)), json_file(&layout.join(file)), "{file}");
        }
        // The same tensors under the same names, bit for bit.
        let (ours, theirs) = (
            fs::read(path.join("unet/diffusion_pytorch_model.safetensors")).unwrap(),
            fs::read(fixture(name).join("diffusion_pytorch_model.safetensors")).unwrap(),
        );
        let (ours, theirs) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (name, want) in theirs.tensors() {
            assert_eq!(ours.tensor(&name).unwrap(), want, "{name}");
        }
        // It opens again, both as a checkpoint and by its unet/ folder.
        for place in [path.clone(), path.join("unet")] {
            let again = checkpoint::load(&Device::cpu(), &place).unwrap();
            assert_eq!((again.config.model, again.config.diffusion), (config.model.clone(), config.diffusion.clone()));
            assert!(again.params.host().unwrap() == model.params.host().unwrap());
        }
    }
    let written = json_file(&fixture("pipeline_layout/unet/config.json"));
    assert_eq!(written, json_file(&fixture("unet_gray16/config.json")), "the fixture itself");
}

#[test]
fn every_network_and_process_survives_its_json() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::preset(Preset::Mnist);
    let model = &mut config.model;
    (model.image_size, model.widths, model.attention_resolutions) = (Size { h: 8, w: 12 }, vec![8, 16], vec![12, 6]);
    (model.groups, model.head_dim, model.classes, model.dropout) = (4, 4, 3, 0.25);
    (model.norm_eps, model.downsample_padding, model.freq_shift, model.flip_sin_to_cos) = (1e-5, 1, 0, true);
    let (_, specs) = UNet::new(&config.model).unwrap();
    let params = Params::init(&Device::cpu(), specs, 1).unwrap();
    let flat = Shape::vector(params.specs().flat_len());
    let flat = Tensor::from_slice(&Device::cpu(), flat, &params.host().unwrap()).unwrap();
    for (step, schedule) in Kind::ALL.into_iter().enumerate() {
        config.diffusion.schedule = schedule;
        config.diffusion.timesteps = [1000, 250, 4000][step % 3];
        config.diffusion.variance = [Variance::FixedSmall, Variance::FixedLarge][step % 2];
        let state = State { step: step as u32, params: &params, ema: &params, m: &flat, v: &flat, data: None };
        let path = checkpoint::save(folder.path(), &config, state).unwrap();
        let again = checkpoint::load(&Device::cpu(), &path).unwrap().config;
        assert_eq!((again.model, again.diffusion), (config.model.clone(), config.diffusion.clone()));
    }
    // The run's folder supplies the other settings.
    config.batch = 77;
    fs::write(folder.path().join("config.toml"), config.to_toml()).unwrap();
    for place in [folder.path().to_path_buf(), folder.path().join("checkpoints/4")] {
        let loaded = checkpoint::load(&Device::cpu(), &place).unwrap();
        assert_eq!((loaded.config.batch, loaded.config.diffusion.schedule), (77, Kind::Sigmoid), "{}", place.display());
    }
}

#[test]
fn a_training_state_comes_back_to_the_bit() {
    let run = tempfile::tempdir().unwrap();
    let state = Small::at(41);
    let path = state.save(run.path(), 0);
    Small::restore(&path).unwrap().assert_same(&state);
    assert_eq!(checkpoint::newest(run.path()).unwrap(), Some(path.clone()));
    // Tensors have the documented names. A bias has the same layout in the file.
    let bytes = fs::read(path.join("training_state.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let specs = small_specs();
    let (bias, _) = specs.iter().find(|(_, spec)| spec.name == "conv_in.bias").unwrap();
    let flat = [("weights", state.params.host()), ("adam_m", state.m.host()), ("adam_v", state.v.host())];
    for (prefix, flat) in flat {
        let flat = flat.unwrap();
        let want: Vec<u8> = flat[specs.range(bias)].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(file.tensor(&format!("{prefix}.conv_in.bias")).unwrap().data(), want, "{prefix}");
    }
    let bytes = fs::read(path.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let want: Vec<u8> = state.ema.host().unwrap()[specs.range(bias)].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(SafeTensors::deserialize(&bytes).unwrap().tensor("conv_in.bias").unwrap().data(), want, "the model");
    // The same state gives the same bytes.
    let other = tempfile::tempdir().unwrap();
    let twin = state.save(other.path(), 0);
    for file in ["training_state.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/config.json"] {
        assert!(fs::read(path.join(file)).unwrap() == fs::read(twin.join(file)).unwrap(), "{file}");
    }
}

#[test]
fn old_checkpoints_are_deleted_and_only_those() {
    let run = tempfile::tempdir().unwrap();
    assert_eq!(checkpoint::newest(run.path()).unwrap(), None, "no folder yet");
    for step in [5, 10, 100] {
        Small::at(step).save(run.path(), 2);
    }
    assert_eq!(checkpoints(run.path()), ["10", "100"], "by number, not by name");
    fs::create_dir(run.path().join("checkpoints/best")).unwrap();
    Small::at(200).save(run.path(), 0);
    assert_eq!(checkpoints(run.path()), ["10", "100", "200", "best"], "0 keeps all");
    Small::at(300).save(run.path(), 1);
    assert_eq!(checkpoints(run.path()), ["300", "best"]);
}

#[test]
fn what_a_killed_run_leaves_is_skipped_and_cleaned() {
    let run = tempfile::tempdir().unwrap();
    let good = Small::at(10).save(run.path(), 0);
    let whole = Small::at(20).save(run.path(), 0);
    let elsewhere = tempfile::tempdir().unwrap();
    let spare = elsewhere.path().join("20");
    copy(&whole, &spare);
    let files = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
        "training_state.safetensors",
    ];
    for file in files {
        let content = fs::read(spare.join(file)).unwrap();
        for left in [None, Some(0), Some(5), Some(content.len() / 2), Some(content.len() - 2)] {
            match left {
                None => fs::remove_file(whole.join(file)).unwrap(),
                Some(left) => fs::write(whole.join(file), &content[..left]).unwrap(),
            }
            assert_eq!(checkpoint::newest(run.path()).unwrap().as_ref(), Some(&good), "{file} cut to {left:?}");
            fs::write(whole.join(file), &content).unwrap();
            assert_eq!(checkpoint::newest(run.path()).unwrap().as_ref(), Some(&whole));
        }
    }
    // A damaged checkpoint of the same step is replaced, unfinished ones are removed.
    fs::write(whole.join("training_state.safetensors"), "x").unwrap();
    copy(&spare, &run.path().join("checkpoints/.Ab12.unfinished"));
    copy(&spare, &run.path().join("checkpoints/.20.unfinished"));
    assert_eq!(checkpoint::newest(run.path()).unwrap(), Some(good));
    Small::at(20).save(run.path(), 0);
    assert_eq!(checkpoints(run.path()), ["10", "20"]);
    Small::restore(&whole).unwrap().assert_same(&Small::at(20));
    // A complete checkpoint of the same step is left alone.
    let before = fs::metadata(whole.join("model_index.json")).unwrap().modified().unwrap();
    Small::at(20).save(run.path(), 0);
    assert_eq!(fs::metadata(whole.join("model_index.json")).unwrap().modified().unwrap(), before);
}

const CHILD_RUN: &str = "DDPM_CUDA_TEST_RUN";

/// Continues from the newest checkpoint and saves step after step until it is killed.
#[test]
#[ignore = "the process that killed_at_any_moment_the_last_good_checkpoint_is_there kills"]
fn child_that_saves_until_killed() {
    let Some(run) = std::env::var_os(CHILD_RUN) else { return };
    let run = Path::new(&run);
    let mut step = match checkpoint::newest(run).unwrap() {
        None => 0,
        Some(path) => Small::restore(&path).unwrap().step,
    };
    loop {
        step += 1;
        Small::at(step).save(run, 2);
    }
}

#[test]
fn killed_at_any_moment_the_last_good_checkpoint_is_there() {
    let run = tempfile::tempdir().unwrap();
    let mut last = 0;
    let mut died_while_saving = 0;
    for kill in 0..12u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "child_that_saves_until_killed"])
            .env(CHILD_RUN, run.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Kill it after at least one checkpoint, at a different moment every time.
        let before = last;
        while checkpoint::newest(run.path()).unwrap().is_none_or(|p| step_of(&p) <= before) {
            assert!(child.try_wait().unwrap().is_none(), "the child ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(kill * 1_700));
        child.kill().unwrap();
        child.wait().unwrap();
        let newest = checkpoint::newest(run.path()).unwrap().expect("a complete checkpoint");
        let state = Small::restore(&newest).unwrap();
        state.assert_same(&Small::at(step_of(&newest)));
        assert!(state.step > before, "progress is kept: step {} after {before}", state.step);
        last = state.step;
        died_while_saving += usize::from(checkpoints(run.path()).iter().any(|n| n.ends_with(".unfinished")));
    }
    assert!(died_while_saving > 0, "some kill must have come in the middle of a checkpoint");
    Small::at(last + 1).save(run.path(), 2);
    assert!(checkpoints(run.path()).iter().all(|n| n.parse::<u32>().is_ok()), "cleaned: {:?}", checkpoints(run.path()));
}

fn step_of(path: &Path) -> u32 {
    path.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// Writes a weights file with these tensors and reads it for [`small_specs`].
fn read_tensors(tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) -> Result<Params, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.safetensors");
    let views = tensors.iter().map(|(n, d, s, b)| (n.to_string(), TensorView::new(*d, s.to_vec(), b).unwrap()));
    fs::write(&path, safetensors::serialize(views, None::<HashMap<String, String>>).unwrap()).unwrap();
    let mut params = Params::zeros(&Device::cpu(), small_specs()).unwrap();
    match checkpoint::read_weights(&path, &mut params) {
        Ok(()) => Ok(params),
        Err(error) => {
            assert_eq!(error.exit_code(), 1);
            let sentence = error.to_string();
            Err(sentence.strip_prefix(&format!("{}: ", path.display())).expect("names the file").to_string())
        }
    }
}

fn f32s(len: usize) -> Vec<u8> {
    (0..len).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

#[test]
fn old_names_shapes_and_short_floats_are_read() {
    let half: Vec<u8> = (0..21).flat_map(|i| half::f16::from_f32(i as f32 / 4.0).to_le_bytes()).collect();
    let brain: Vec<u8> = (0..5).flat_map(|i| half::bf16::from_f32(i as f32 * 256.0).to_le_bytes()).collect();
    let params = read_tensors(&[
        ("conv_in.weight", Dtype::F32, &[5, 4, 3, 2], f32s(120)),
        ("conv_in.bias", Dtype::BF16, &[5], brain),
        ("mid_block.attentions.0.query.weight", Dtype::F16, &[3, 7, 1, 1], half),
        ("mid_block.attentions.0.proj_attn.bias", Dtype::F32, &[3], f32s(3)),
    ])
    .unwrap();
    let handles: Vec<_> = params.specs().iter().map(|(p, _)| p).collect();
    assert_eq!(params.get(handles[1]), [0.0, 256.0, 512.0, 768.0, 1024.0]);
    assert_eq!(params.get(handles[2])[20], 5.0);
    assert_eq!(params.get(handles[3]), [0.0, 1.0, 2.0]);
    // (o, i, y, x) = (3, 2, 1, 0) of (5, 4, 3, 2) is at (o, y, x, i) in memory.
    assert_eq!(params.get(handles[0])[((3 * 3 + 1) * 2) * 4 + 2], (((3 * 4 + 2) * 3 + 1) * 2) as f32);
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let good = |name: &'static str, shape: &'static [usize]| (name, Dtype::F32, shape, f32s(shape.iter().product()));
    let (weight, bias) = (good("conv_in.weight", &[5, 4, 3, 2]), good("conv_in.bias", &[5]));
    let (to_q, to_out) =
        (good("mid_block.attentions.0.to_q.weight", &[3, 7]), good("mid_block.attentions.0.to_out.0.bias", &[3]));
    read_tensors(&[weight.clone(), bias.clone(), to_q.clone(), to_out.clone()]).unwrap();
    let refusal = |tensors: &[_]| read_tensors(tensors).err().expect("refused");
    assert_eq!(refusal(&[weight.clone(), to_out.clone()]), "lacks conv_in.bias, mid_block.attentions.0.to_q.weight");
    assert_eq!(
        refusal(&[weight.clone(), to_q.clone(), to_out.clone(), good("extra.b", &[1]), good("extra.a", &[1])]),
        "lacks conv_in.bias and holds extra.a, extra.b, which this network does not have"
    );
    assert_eq!(
        refusal(&[good("conv_in.weight", &[5, 3, 2, 4]), good("conv_in.bias", &[5, 1]), to_q.clone(), to_out.clone()]),
        "does not fit this network: conv_in.weight has shape [5, 3, 2, 4] instead of [5, 4, 3, 2], conv_in.bias has shape [5, 1] instead of [5]"
    );
    let integers = ("conv_in.bias", Dtype::I32, &[5][..], f32s(5));
    assert_eq!(refusal(&[weight, integers, to_q, to_out]), "holds conv_in.bias as I32; F32, F16 and BF16 are read");
    let many: Vec<String> = (0..30).map(|i| format!("x{i:02}")).collect();
    let many: Vec<_> = many.iter().map(|n| (n.as_str(), Dtype::F32, &[1][..], f32s(1))).collect();
    assert!(refusal(&many).contains("x02, x03 and 26 more, which this network does not have"));
}

#[test]
fn damaged_files_are_refused_by_name() {
    let run = tempfile::tempdir().unwrap();
    let path = Small::at(3).save(run.path(), 0);
    let refusal = |file: &str| {
        let error = Small::restore(&path).err().expect("refused");
        let sentence = error.to_string();
        assert!(sentence.starts_with(&format!("{}: ", path.join(file).display())), "{sentence}");
        sentence
    };
    for file in ["training_state.safetensors", "unet/diffusion_pytorch_model.safetensors"] {
        let content = fs::read(path.join(file)).unwrap();
        for cut in [0, 4, 8, 100, content.len() - 1] {
            fs::write(path.join(file), &content[..cut]).unwrap();
            assert!(refusal(file).contains("is not a whole safetensors file"));
        }
        fs::remove_file(path.join(file)).unwrap();
        assert!(refusal(file).contains("cannot be read"));
        fs::write(path.join(file), content).unwrap();
    }
    Small::restore(&path).unwrap();
}

/// Loads a copy of a fixture with one key of its configuration changed; returns the error.
#[track_caller]
fn refused_with(key: &str, value: Value) -> String {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixture("unet_gray16"), folder.path());
    let path = folder.path().join("config.json");
    let mut config = json_file(&path);
    config[key] = value;
    fs::write(&path, config.to_string()).unwrap();
    let Err(error) = checkpoint::load(&Device::cpu(), folder.path()) else { panic!("{key} is refused") };
    let sentence = error.to_string();
    assert!(sentence.starts_with(&format!("{}: ", path.display())) && !sentence.contains('\n'), "{sentence}");
    sentence
}

#[test]
fn unsupported_networks_are_refused_by_the_key() {
    let cases = [
        (
            "_class_name",
            json!("UNet2DConditionModel"),
            "has _class_name = \"UNet2DConditionModel\"; only \"UNet2DModel\" is supported",
        ),
        ("act_fn", json!("gelu"), "has act_fn = \"gelu\"; only \"silu\" or \"swish\" is supported"),
        ("resnet_time_scale_shift", json!("scale_shift"), "resnet_time_scale_shift"),
        ("center_input_sample", json!(true), "center_input_sample"),
        ("time_embedding_type", json!("fourier"), "time_embedding_type"),
        ("time_embedding_dim", json!(128), "time_embedding_dim = 128; only null or 64 is supported"),
        ("mid_block_type", Value::Null, "mid_block_type"),
        ("mid_block_scale_factor", json!(1.5), "mid_block_scale_factor"),
        ("downsample_type", json!("resnet"), "downsample_type"),
        ("upsample_type", json!("resnet"), "upsample_type"),
        ("downsample_padding", json!(2), "downsample_padding = 2"),
        ("freq_shift", json!(2), "freq_shift = 2"),
        ("flip_sin_to_cos", json!("yes"), "has flip_sin_to_cos = \"yes\"; true or false is expected"),
        ("add_attention", json!(false), "add_attention"),
        ("attn_norm_num_groups", json!(4), "attn_norm_num_groups"),
        ("class_embed_type", json!("timestep"), "class_embed_type"),
        ("out_channels", json!(2), "has out_channels = 2; only 1 is supported"),
        ("sample_size", Value::Null, "has sample_size = null; the side of the images or [rows, columns] is expected"),
        ("sample_size", json!(15), "image_size = 15x15 cannot be halved"),
        (
            "down_block_types",
            json!(["DownBlock2D", "SkipDownBlock2D"]),
            "a block of type \"SkipDownBlock2D\"; only DownBlock2D and AttnDownBlock2D",
        ),
        ("down_block_types", json!(["DownBlock2D"]), "has 1 down_block_types for 2 block_out_channels"),
        ("up_block_types", json!(["UpBlock2D", "UpBlock2D"]), "attention at other levels on the way up"),
        ("block_out_channels", json!("16"), "block_out_channels"),
        ("block_out_channels", json!([]), "has 2 down_block_types for 0 block_out_channels"),
        ("norm_num_groups", Value::Null, "norm_num_groups"),
        ("norm_num_groups", json!(5), "groups = 5 does not divide"),
        ("attention_head_dim", json!(7), "head_dim = 7 does not divide"),
        ("layers_per_block", json!(1.5), "layers_per_block"),
        ("novelty", json!(3), "has novelty = 3, which is not known here"),
    ];
    for (key, value, want) in cases {
        let sentence = refused_with(key, value);
        assert!(sentence.contains(want), "{sentence}\nshould say: {want}");
    }
}

#[test]
fn absent_keys_have_the_defaults_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixture("unet_gray16"), folder.path());
    let path = folder.path().join("config.json");
    let mut config = json_file(&path);
    for key in [
        "attention_head_dim",
        "norm_eps",
        "downsample_padding",
        "freq_shift",
        "flip_sin_to_cos",
        "dropout",
        "upsample_type",
    ] {
        config.as_object_mut().unwrap().remove(key);
    }
    fs::write(&path, config.to_string()).unwrap();
    let model = checkpoint::load(&Device::cpu(), folder.path()).unwrap().config.model;
    assert_eq!((model.head_dim, model.norm_eps, model.downsample_padding), (8, 1e-5, 1));
    assert_eq!((model.freq_shift, model.flip_sin_to_cos, model.dropout), (0, true, 0.0));
}

#[test]
fn unsupported_processes_are_refused_by_the_key() {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixture("pipeline_layout"), folder.path());
    copy(&fixture("unet_gray16"), &folder.path().join("unet"));
    let path = folder.path().join("scheduler/scheduler_config.json");
    let original = json_file(&path);
    let load = || checkpoint::load(&Device::cpu(), folder.path());
    assert_eq!(load().unwrap().config.diffusion.variance, Variance::FixedLarge);
    let cases = [
        (
            "prediction_type",
            json!("v_prediction"),
            "has prediction_type = \"v_prediction\"; only \"epsilon\" is supported",
        ),
        ("clip_sample", json!(false), "clip_sample"),
        ("clip_sample_range", json!(2.0), "clip_sample_range"),
        ("thresholding", json!(true), "thresholding"),
        ("rescale_betas_zero_snr", json!(true), "rescale_betas_zero_snr"),
        ("variance_type", json!("learned_range"), "has variance_type = \"learned_range\""),
        (
            "beta_schedule",
            json!("laplace"),
            "has beta_schedule = \"laplace\"; one of linear, squaredcos_cap_v2, scaled_linear, sigmoid",
        ),
        ("beta_start", json!(0.00085), "has beta_start = 0.00085; for 1000 timesteps only 0.0001 is supported"),
        ("beta_end", json!(0.012), "has beta_end = 0.012"),
        ("trained_betas", json!([0.1, 0.2]), "has trained_betas; only 1000 times 0.02"),
        ("num_train_timesteps", json!("many"), "num_train_timesteps"),
    ];
    for (key, value, want) in cases {
        let mut changed = original.clone();
        changed[key] = value;
        fs::write(&path, changed.to_string()).unwrap();
        let sentence = load().err().expect("refused").to_string();
        assert!(sentence.starts_with(&format!("{}: ", path.display())) && sentence.contains(want), "{sentence}");
    }
    fs::write(&path, "{").unwrap();
    assert!(load().err().expect("refused").to_string().contains("is not JSON"));
}

#[test]
fn folders_that_hold_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let refusal = |path: &Path| {
        let error = checkpoint::load(&Device::cpu(), path).err().expect("refused");
        assert_eq!(error.exit_code(), 1);
        error.to_string()
    };
    let wanted = "a run folder, a checkpoint or a model folder of diffusers is expected";
    assert!(refusal(&folder.path().join("none")).ends_with(&format!("none: does not exist; {wanted}")));
    fs::write(folder.path().join("file"), "").unwrap();
    assert!(refusal(&folder.path().join("file")).ends_with(&format!("file: is a file; {wanted}")));
    assert!(refusal(folder.path()).contains("is no run folder, checkpoint or model folder of diffusers"));
    // A run that has no checkpoint yet, or only an incomplete one.
    fs::create_dir(folder.path().join("checkpoints")).unwrap();
    fs::write(folder.path().join("config.toml"), Config::preset(Preset::Mnist).to_toml()).unwrap();
    assert!(refusal(folder.path()).ends_with("has no complete checkpoint yet"));
    fs::create_dir(folder.path().join("checkpoints/5")).unwrap();
    assert!(refusal(folder.path()).ends_with("has no complete checkpoint yet"));
    // Weights that are missing, or pickled.
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::copy(fixture("unet_gray16/config.json"), model.join("config.json")).unwrap();
    assert!(refusal(&model).ends_with("holds no diffusion_pytorch_model.safetensors"));
    fs::write(model.join("diffusion_pytorch_model.bin"), "").unwrap();
    assert!(refusal(&model).contains("a pickle, which is not read; save it in diffusers with safe_serialization=True"));
}
