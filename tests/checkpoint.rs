//! Checkpoints: we read what diffusers writes and write what it would write; every kind of damage has its message; and
//! the last good checkpoint survives the process being killed at any moment.

#[path = "support/places.rs"]
mod places;
#[path = "support/torch.rs"]
mod torch;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ddpm_cuda::checkpoint::{self, For, State, StateMut, Stepping, Threshold};
use ddpm_cuda::config::{ClassEmbedding, Config, Diffusion, MiddleAttention, Model, Preset, Resampling, Size};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Curve, Kind, Schedule, Spacing, Variance};
use ddpm_cuda::params::{Init, Layout, Params, Specs};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::unet::UNet;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use places::fixture;

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
    ema: Tensor,
    m: Tensor,
    v: Tensor,
}

impl Small {
    fn empty() -> Self {
        let params = Params::zeros(&Device::cpu(), small_specs()).unwrap();
        let flat = || Tensor::zeros(&Device::cpu(), Shape::vector(small_specs().flat_len())).unwrap();
        Small { step: 0, params, ema: flat(), m: flat(), v: flat() }
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
        params.write(&numbers(0)).unwrap();
        [ema, m, v].into_iter().zip(1..).for_each(|(flat, k)| flat.write(&numbers(k)).unwrap());
        state
    }

    fn save(&self, run: &Path, keep: usize) -> PathBuf {
        let mut config = Config::preset(Preset::Mnist);
        config.keep_checkpoints = keep;
        let Small { step, params, ema, m, v } = self;
        let state = State { step: *step, params, ema, m, v, data: None, importance: None, curve: None };
        checkpoint::save(run, &config, state).unwrap()
    }

    fn restore(path: &Path) -> ddpm_cuda::error::Result<Self> {
        let mut state = Small::empty();
        let Small { step, params, ema, m, v } = &mut state;
        let shard = 0..small_specs().flat_len();
        checkpoint::restore(path, StateMut { step, params, shard, ema, m, v, importance: None, curve: None })?;
        Ok(state)
    }

    #[track_caller]
    fn assert_same(&self, other: &Small) {
        let bits = |flat: &[f32]| flat.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert_eq!(self.step, other.step);
        assert_eq!(bits(&self.params.host().unwrap()), bits(&other.params.host().unwrap()), "weights");
        assert_eq!(bits(self.ema.data()), bits(other.ema.data()), "moving average");
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
        middle_attention: MiddleAttention::Norm,
        head_dim: 0,
        num_heads: 0,
        groups: 8,
        middle_groups: 0,
        norm_eps: 1e-6,
        scale_shift_norm: false,
        downsample_type: Resampling::Conv,
        upsample_type: Resampling::Conv,
        dropout: 0.0,
        classes: 0,
        class_embedding: ClassEmbedding::Table,
        null_class: false,
        learned_variance: false,
        classifier: false,
        downsample_padding: 0,
        freq_shift: 1,
        flip_sin_to_cos: false,
        time_channels: 0,
        timestep_scale: 1.0,
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
        let (params, ema) = (&model.params, model.params.flat());
        let state = State { step: 7, params, ema, m: &zeros, v: &zeros, data: None, importance: None, curve: None };
        let path = checkpoint::save(folder.path(), &config, state).unwrap();
        assert_eq!(path, folder.path().join("checkpoints/7"));
        assert_eq!(json_file(&path.join("unet/config.json")), json_file(&fixture(name).join("config.json")));
        let layout = fixture("pipeline_layout");
        assert_eq!(json_file(&path.join("model_index.json")), json_file(&layout.join("model_index.json")));
        // The default of diffusers but for the timesteps, which `sample` takes from both ends.
        let mut scheduler = json_file(&layout.join("scheduler/scheduler_config.json"));
        scheduler["timestep_spacing"] = json!("linspace");
        // And but for the variance, which is the small one in fewer steps.
        scheduler["variance_type"] = json!("fixed_small");
        scheduler["_variance"] = json!("fixed_large");
        assert_eq!(json_file(&path.join("scheduler/scheduler_config.json")), scheduler);
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
        let curve = (schedule == Kind::Learned).then(|| Curve::new(config.diffusion.timesteps));
        let state = State {
            step: step as u32,
            params: &params,
            ema: params.flat(),
            m: &flat,
            v: &flat,
            data: None,
            importance: None,
            curve: curve.as_ref(),
        };
        let path = checkpoint::save(folder.path(), &config, state).unwrap();
        let again = checkpoint::load(&Device::cpu(), &path).unwrap().config;
        let mut want = config.diffusion.clone();
        if let Some(curve) = &curve {
            // What reads the checkpoint sees a table.
            want = Diffusion { schedule: Kind::Linear, trained_betas: curve.average().betas().to_vec(), ..want };
        }
        assert_eq!((again.model, again.diffusion), (config.model.clone(), want));
    }
    // The run's folder supplies the other settings.
    config.batch = 77;
    fs::write(folder.path().join("config.toml"), config.to_toml()).unwrap();
    let places = [(folder.path().to_path_buf(), Kind::Linear), (folder.path().join("checkpoints/4"), Kind::Sigmoid)];
    for (place, kind) in places {
        let loaded = checkpoint::load(&Device::cpu(), &place).unwrap();
        assert_eq!((loaded.config.batch, loaded.config.diffusion.schedule), (77, kind), "{}", place.display());
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
        (
            "resnet_time_scale_shift",
            json!("ada_group"),
            "has resnet_time_scale_shift = \"ada_group\"; only \"default\" or \"scale_shift\" is supported",
        ),
        ("center_input_sample", json!(true), "center_input_sample"),
        ("time_embedding_type", json!("fourier"), "time_embedding_type"),
        ("time_embedding_dim", json!(128), "time_embedding_dim = 128; only null or 64 is supported"),
        ("mid_block_type", Value::Null, "mid_block_type"),
        ("mid_block_scale_factor", json!(1.5), "mid_block_scale_factor"),
        ("downsample_type", json!("fir"), "has downsample_type = \"fir\"; one of conv, resnet is supported"),
        ("upsample_type", json!("fir"), "has upsample_type = \"fir\"; one of conv, resnet is supported"),
        ("downsample_padding", json!(2), "downsample_padding = 2"),
        ("freq_shift", json!(2), "freq_shift = 2"),
        ("flip_sin_to_cos", json!("yes"), "has flip_sin_to_cos = \"yes\"; true or false is expected"),
        ("add_attention", json!("no"), "add_attention"),
        ("attn_norm_num_groups", json!(0), "has attn_norm_num_groups = 0; at least 1 group is expected"),
        ("attn_norm_num_groups", json!(5), "middle_groups = 5 does not divide the width 32 of the middle; 4 would"),
        (
            "class_embed_type",
            json!("timestep"),
            "has class_embed_type = \"timestep\" without num_class_embeds; add it there, the number of classes",
        ),
        ("class_embed_type", json!("identity"), "\"identity\", whose classes are vectors; only null or \"timestep\""),
        ("class_embed_type", json!("projection"), "has class_embed_type = \"projection\"; only null or \"timestep\""),
        (
            "_timestep_scale",
            json!(0.25),
            "has _timestep_scale = 0.25 with time_embedding_type = \"positional\"; \"ddpm_cuda\" is expected",
        ),
        ("out_channels", json!(3), "has out_channels = 3; only 1 or 2 is supported"),
        ("sample_size", Value::Null, "has sample_size = null; the side of the images or [rows, columns] is expected"),
        ("sample_size", json!(15), "image_size = 15x15 cannot be halved"),
        (
            "down_block_types",
            json!(["DownBlock2D", "SkipDownBlock2D"]),
            "a block of type \"SkipDownBlock2D\"; only DownBlock2D, AttnDownBlock2D and ResnetDownsampleBlock2D are supported",
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
            json!("score"),
            "has prediction_type = \"score\"; one of epsilon, sample, v_prediction is supported",
        ),
        ("clip_sample_range", json!(-2.0), "has clip_sample_range = -2; a number above 0 is expected"),
        ("thresholding", json!("much"), "has thresholding = \"much\"; true or false is expected"),
        ("rescale_betas_zero_snr", json!(true), "prediction = eps: with zero terminal SNR"),
        (
            "variance_type",
            json!("learned_range"),
            "has variance_type = learned_range, but the network has 1 out_channels for 1 in_channels",
        ),
        (
            "variance_type",
            json!("learned"),
            "has variance_type = learned, but the network has 1 out_channels for 1 in_channels",
        ),
        ("variance_type", json!("odd"), "one of fixed_small, fixed_large, learned, learned_range is supported"),
        (
            "beta_schedule",
            json!("stepped"),
            "has beta_schedule = \"stepped\"; one of linear, squaredcos_cap_v2, scaled_linear, sigmoid, laplace, exp",
        ),
        ("beta_start", json!(0), "has beta_start = 0; a number between 0 and 1 is expected"),
        ("beta_end", json!(1.5), "has beta_end = 1.5; a number between 0 and 1"),
        ("beta_end", json!(0.9), "describes a process that cannot be: the product of all 1 - beta underflows"),
        ("beta_start", json!(1e-30), "beta at timestep 0 is 1e-30: so small that nothing is noised there"),
        ("trained_betas", json!([0.1, 0.2]), "has 2 trained_betas for num_train_timesteps = 1000"),
        ("trained_betas", json!([]), "has 0 trained_betas for num_train_timesteps = 1000"),
        ("trained_betas", json!(vec![0.0; 1000]), "has 0 in trained_betas at timestep 0; numbers between 0 and 1"),
        ("num_train_timesteps", json!("many"), "has num_train_timesteps = \"many\"; a whole number"),
        ("num_train_timesteps", json!(1), "has num_train_timesteps = 1; from 2 to 1000000 are supported"),
        ("timestep_spacing", json!("odd"), "has timestep_spacing = \"odd\"; one of leading, linspace, trailing is"),
        ("steps_offset", json!(-1), "has steps_offset = -1; a whole number"),
        ("use_flow_sigmas", json!(true), "has use_flow_sigmas = true; only false is supported"),
        ("prediction_type", json!("flow_prediction"), "has prediction_type = \"flow_prediction\""),
        ("predict_epsilon", json!(false), "has predict_epsilon = false; only true is supported"),
        ("timestep_type", json!("continuous"), "has timestep_type = \"continuous\"; only \"discrete\""),
        ("novelty", json!(3), "has novelty = 3, which is not known here; take it out if it changes only how steps"),
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

/// `learned` of diffusers is the variance itself, and that of a network trained here its logarithm, which keeps a key
/// of its own and is not written for diffusers.
#[test]
fn either_learned_variance_keeps_its_meaning() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut config = Config::preset(Preset::Mnist);
    for (key, value) in [("widths", "8,16"), ("groups", "4"), ("attention_resolutions", "14"), ("loss", "vlb")] {
        config.set(key, value).unwrap();
    }
    config.set("variance", "learned_range").unwrap();
    let (_, specs) = UNet::new(&config.model).unwrap();
    let params = Params::init(&Device::cpu(), specs, 1).unwrap();
    let write = |name: &str, config: &Config, whose: For| {
        checkpoint::write_folder(&at(name), config, &params, &Stepping::OURS, whose).map(|()| at(name))
    };
    let scheduler = |folder: &Path| folder.join("scheduler/scheduler_config.json");
    let foreign = write("foreign", &config, For::Diffusers).unwrap();
    let mut json = json_file(&scheduler(&foreign));
    json["variance_type"] = json!("learned");
    fs::write(scheduler(&foreign), json.to_string()).unwrap();
    let read = |folder: &Path| checkpoint::load(&Device::cpu(), folder).unwrap().config;
    let raw = read(&foreign);
    assert_eq!(raw.diffusion.variance, Variance::LearnedRaw);
    assert!(raw.model.learned_variance);
    let again = write("again", &raw, For::Diffusers).unwrap();
    let json = json_file(&scheduler(&again));
    assert_eq!((json["variance_type"].as_str(), json.get("_variance")), (Some("learned"), None));
    assert_eq!(read(&again).diffusion, raw.diffusion);
    let refused = raw.validate().unwrap_err().to_string();
    assert!(refused.starts_with("variance = learned_raw is that of models of diffusers"), "{refused}");

    config.set("variance", "learned").unwrap();
    let refused = write("none", &config, For::Diffusers).unwrap_err().to_string();
    assert!(
        refused.contains("diffusers has no words for variance = learned, whose output is the logarithm"),
        "{refused}"
    );
    let ours = write("ours", &config, For::Ours).unwrap();
    let json = json_file(&scheduler(&ours));
    assert_eq!((json["variance_type"].as_str(), json["_variance"].as_str()), (Some("learned_log"), Some("learned")));
    assert_eq!(read(&ours).diffusion.variance, Variance::Learned);
}

/// In fewer steps our own models take fixed_small in place of fixed_large, so that is what others read, and a word of
/// our own says what all steps take. What another program's scheduler says holds for any number of steps.
#[test]
fn a_large_variance_is_written_as_it_is_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let config = Config::preset(Preset::Mnist);
    assert_eq!(config.diffusion.variance, Variance::FixedLarge);
    let (_, specs) = UNet::new(&config.model).unwrap();
    let params = Params::zeros(&Device::cpu(), specs).unwrap();
    for (stepping, words) in
        [(Stepping::OURS, ("fixed_small", Some("fixed_large"))), (Stepping::FOREIGN, ("fixed_large", None))]
    {
        let folder = at(words.0);
        checkpoint::write_folder(&folder, &config, &params, &stepping, For::Diffusers).unwrap();
        let json = json_file(&folder.join("scheduler/scheduler_config.json"));
        assert_eq!((json["variance_type"].as_str().unwrap(), json["_variance"].as_str()), words);
        let read = checkpoint::load(&Device::cpu(), &folder).unwrap();
        assert_eq!((read.config.diffusion.variance, read.stepping), (Variance::FixedLarge, stepping));
    }
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
    // Weights that are missing, or no weights.
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::copy(fixture("unet_gray16/config.json"), model.join("config.json")).unwrap();
    assert!(refusal(&model).ends_with("holds no diffusion_pytorch_model.safetensors"));
    fs::write(model.join("diffusion_pytorch_model.bin"), "").unwrap();
    assert!(refusal(&model).contains("diffusion_pytorch_model.bin: is not a whole file of PyTorch ("));
    fs::rename(model.join("diffusion_pytorch_model.bin"), model.join("diffusion_pytorch_model-00001-of-00002.bin"))
        .unwrap();
    let shard =
        "holds the shard diffusion_pytorch_model-00001-of-00002.bin and no diffusion_pytorch_model.bin.index.json";
    assert!(refusal(&model).contains(shard), "{}", refusal(&model));
    // A name of the hub, also as its address; not where the first part is a folder.
    for name in ["google/ddpm-cifar10-32", "https://huggingface.co/google/ddpm-cifar10-32"] {
        let said = refusal(Path::new(name));
        let wanted =
            "`hf download google/ddpm-cifar10-32 --local-dir ddpm-cifar10-32` and give --model ddpm-cifar10-32";
        assert!(said.contains(wanted), "{said}");
    }
    assert!(refusal(Path::new("tests/nothing")).ends_with(wanted), "{}", refusal(Path::new("tests/nothing")));
    // The output folder of a training script of diffusers.
    let output = folder.path().join("output");
    for step in ["checkpoint-500", "checkpoint-1000"] {
        copy(&fixture("unet_gray16"), &output.join(step).join("unet"));
    }
    assert!(refusal(&output).ends_with("checkpoint-1000"), "{}", refusal(&output));
}

/// A pipeline of diffusers with the small grey network, in a folder that is deleted with it.
struct Pipeline {
    folder: tempfile::TempDir,
}

impl Pipeline {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy(&fixture("pipeline_layout"), folder.path());
        copy(&fixture("unet_gray16"), &folder.path().join("unet"));
        fs::remove_file(folder.path().join("unet/io.safetensors")).unwrap();
        Pipeline { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Replaces the scheduler's configuration.
    fn scheduler(&self, config: &Value) {
        fs::write(self.path().join("scheduler/scheduler_config.json"), config.to_string()).unwrap();
    }

    /// Changes keys of a file; null takes a key out.
    fn change(&self, file: &str, keys: Value) {
        let path = self.path().join(file);
        let mut config = json_file(&path);
        for (key, value) in keys.as_object().unwrap() {
            match value {
                Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
                value => config[key] = value.clone(),
            }
        }
        fs::write(path, config.to_string()).unwrap();
    }

    fn load(&self) -> ddpm_cuda::error::Result<checkpoint::Loaded> {
        checkpoint::load(&Device::cpu(), self.path())
    }

    #[track_caller]
    fn refusal(&self) -> String {
        let error = self.load().err().expect("refused");
        let said = error.to_string();
        assert!(error.exit_code() == 1 && !said.contains('\n') && said.len() < 600, "{said}");
        said
    }
}

fn same_weights(loaded: &checkpoint::Loaded) -> bool {
    let whole = checkpoint::load(&Device::cpu(), &fixture("unet_gray16")).unwrap();
    loaded.params.host().unwrap() == whole.params.host().unwrap()
}

#[test]
fn schedulers_of_a_ddpms_process_are_read_and_others_refused_by_class() {
    let pipeline = Pipeline::new();
    // The class, and betas and spacing where its file says nothing.
    for (class, betas, spacing) in [
        ("DDPMScheduler", (1e-4, 0.02), Spacing::Leading),
        ("DDPMParallelScheduler", (1e-4, 0.02), Spacing::Leading),
        ("DDIMScheduler", (1e-4, 0.02), Spacing::Leading),
        ("DDIMParallelScheduler", (1e-4, 0.02), Spacing::Leading),
        ("DDIMInverseScheduler", (1e-4, 0.02), Spacing::Leading),
        ("PNDMScheduler", (1e-4, 0.02), Spacing::Leading),
        ("RePaintScheduler", (1e-4, 0.02), Spacing::Leading),
        ("LMSDiscreteScheduler", (1e-4, 0.02), Spacing::Even),
        ("EulerDiscreteScheduler", (1e-4, 0.02), Spacing::Even),
        ("EulerAncestralDiscreteScheduler", (1e-4, 0.02), Spacing::Even),
        ("DPMSolverMultistepScheduler", (1e-4, 0.02), Spacing::Even),
        ("DPMSolverMultistepInverseScheduler", (1e-4, 0.02), Spacing::Even),
        ("DPMSolverSinglestepScheduler", (1e-4, 0.02), Spacing::Even),
        ("DEISMultistepScheduler", (1e-4, 0.02), Spacing::Even),
        ("UniPCMultistepScheduler", (1e-4, 0.02), Spacing::Even),
        ("SASolverScheduler", (1e-4, 0.02), Spacing::Even),
        ("HeunDiscreteScheduler", (0.00085, 0.012), Spacing::Even),
        ("KDPM2DiscreteScheduler", (0.00085, 0.012), Spacing::Even),
        ("KDPM2AncestralDiscreteScheduler", (0.00085, 0.012), Spacing::Even),
        ("DPMSolverSDEScheduler", (0.00085, 0.012), Spacing::Even),
    ] {
        pipeline.scheduler(&json!({"_class_name": class}));
        let loaded = pipeline.load().unwrap();
        assert_eq!(loaded.config.diffusion.end_betas(), betas, "{class}");
        assert_eq!(loaded.stepping.spacing, spacing, "{class}");
        let clips = ["DDPM", "DDIM", "RePaint"].iter().any(|name| class.starts_with(name));
        assert_eq!((loaded.stepping.clip, loaded.stepping.small_if_fewer), (clips, false), "{class}");
        assert!(loaded.notes.is_empty(), "{class}: {:?}", loaded.notes);
    }
    // Keys of other samplers that change only their steps.
    pipeline.scheduler(&json!({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": true, "sigma_min": null,
        "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}));
    let said = pipeline.load().unwrap().notes.join("\n");
    assert!(said.contains("scheduler_config.json: use_karras_sigmas = true is not taken over"), "{said}");
    assert!(said.ends_with("; --spacing karras takes its noise levels"), "{said}");
    pipeline.scheduler(&json!({"_class_name": "DDIMScheduler", "set_alpha_to_one": false, "clip_sample": false,
        "use_clipped_model_output": false, "eta": 0.5}));
    let said = pipeline.load().unwrap().notes.join("\n");
    assert!(said.contains("eta = 0.5, set_alpha_to_one = false is not taken over"), "{said}");
    // eps of the unclipped x_0 is another step than ours; where nothing is clipped they are one.
    pipeline.scheduler(&json!({"_class_name": "DDIMScheduler", "use_clipped_model_output": false}));
    assert!(pipeline.refusal().contains("has use_clipped_model_output = false; only true is supported"));
    pipeline.scheduler(&json!({"_class_name": "DDIMScheduler", "use_clipped_model_output": true}));
    pipeline.load().unwrap();
    for (class, why) in [
        ("FlowMatchEulerDiscreteScheduler", "flow matching"),
        ("FlowMatchHeunDiscreteScheduler", "flow matching"),
        ("EDMEulerScheduler", "EDM"),
        ("EDMDPMSolverMultistepScheduler", "EDM"),
        ("KarrasVeScheduler", "EDM"),
        ("ScoreSdeVeScheduler", "continuous time"),
        ("ScoreSdeVpScheduler", "continuous time"),
        ("LCMScheduler", "distilled"),
        ("TCDScheduler", "distilled"),
        ("CMStochasticIterativeScheduler", "distilled"),
        ("ConsistencyDecoderScheduler", "distilled"),
        ("VQDiffusionScheduler", "tokens"),
        ("IPNDMScheduler", "not known here"),
        ("MyScheduler", "not known here"),
    ] {
        pipeline.scheduler(&json!({"_class_name": class, "num_train_timesteps": 1000}));
        let said = pipeline.refusal();
        assert!(said.contains(&format!("has _class_name = \"{class}\"")) && said.contains(why), "{said}");
        assert!(said.contains("scheduler_config.json") && said.contains("such as DDPMScheduler"), "{said}");
    }
    // Also where only the pipeline's index names it.
    fs::remove_dir_all(pipeline.path().join("scheduler")).unwrap();
    pipeline.change("model_index.json", json!({"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}));
    assert!(pipeline.refusal().contains("FlowMatchEulerDiscreteScheduler"));
}

/// Betas as diffusers computes them; they are written back as they were read, and stay in config.toml.
#[test]
fn any_betas_are_read_and_written_back() {
    let pipeline = Pipeline::new();
    let ramp: Vec<f64> = (0..1000).map(|i| 1e-4 + 1.1e-5 * f64::from(i)).collect();
    for (keys, at) in [
        (json!({"num_train_timesteps": 500}), [(0, 1e-4), (499, 0.02)]),
        (json!({"beta_start": 0.00085, "beta_end": 0.012}), [(0, 0.00085), (999, 0.012)]),
        (
            json!({"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}),
            [(0, 0.0015), (999, 0.0195)],
        ),
        (json!({"beta_end": 0.05, "beta_schedule": "sigmoid"}), [(0, 2.233839e-4), (999, 0.04987662)]),
        (json!({"beta_schedule": "laplace"}), LAPLACE),
        (json!({"beta_schedule": "exp"}), [(0, 0.0119282872), (999, 0.0119282872)]),
        (json!({"trained_betas": ramp}), [(0, ramp[0]), (999, ramp[999])]),
        (json!({"trained_betas": vec![0.01; 1000]}), [(0, 0.01), (999, 0.01)]),
    ] {
        let pipeline = Pipeline::new();
        pipeline.change("scheduler/scheduler_config.json", keys.clone());
        let loaded = pipeline.load().unwrap();
        let betas = loaded.config.diffusion.noise_schedule().unwrap();
        for (t, beta) in at {
            assert!((betas.betas()[t] - beta).abs() <= 1e-5 * beta, "{keys}: beta {t} is {}", betas.betas()[t]);
        }
        let run = tempfile::tempdir().unwrap();
        let flat = Tensor::zeros(&Device::cpu(), Shape::vector(loaded.params.specs().flat_len())).unwrap();
        let state = State {
            step: 1,
            params: &loaded.params,
            ema: loaded.params.flat(),
            m: &flat,
            v: &flat,
            data: None,
            importance: None,
            curve: None,
        };
        let path = checkpoint::save(run.path(), &loaded.config, state).unwrap();
        let again = checkpoint::describe(&path).unwrap().config.diffusion.noise_schedule().unwrap();
        let furthest = again.betas().iter().zip(betas.betas()).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
        assert!(
            again.len() == betas.len() && furthest <= 4.0 * f64::EPSILON,
            "{keys}: written otherwise by {furthest}"
        );
        fs::write(run.path().join("config.toml"), loaded.config.to_toml()).unwrap();
        let kept = Config::read(&run.path().join("config.toml")).unwrap();
        assert_eq!(kept.diffusion, loaded.config.diffusion, "{keys}");
        kept.validate().unwrap();
    }
    // What the defaults make has the defaults' bits.
    pipeline.change("scheduler/scheduler_config.json", json!({"beta_start": 0.00010000000001}));
    assert_eq!(
        pipeline.load().unwrap().config.diffusion.noise_schedule().unwrap(),
        Schedule::new(Kind::Linear, 1000).unwrap()
    );
}

/// First and last beta by the formula in diffusers' source, evaluated in f64 elsewhere.
const LAPLACE: [(usize, f64); 2] = [(0, 0.021153757200412016), (999, 0.8472526270584196)];

#[test]
fn the_schedulers_spacing_is_the_models_default() {
    let pipeline = Pipeline::new();
    for (spacing, want) in [("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Even)]
    {
        let keys = json!({"timestep_spacing": spacing, "steps_offset": 1, "clip_sample": spacing != "linspace"});
        pipeline.change("scheduler/scheduler_config.json", keys);
        let stepping = Stepping { spacing: want, steps_offset: 1, clip: spacing != "linspace", ..Stepping::FOREIGN };
        assert_eq!(pipeline.load().unwrap().stepping, stepping);
    }
    // What limits x_0.
    let limits = |keys: Value| {
        let pipeline = Pipeline::new();
        pipeline.change("scheduler/scheduler_config.json", keys);
        pipeline.load().map(|loaded| loaded.stepping)
    };
    let stepping = limits(json!({"clip_sample_range": 1.5})).unwrap();
    assert_eq!((stepping.clip, stepping.clip_range, stepping.threshold), (true, 1.5, None));
    let keys = json!({"thresholding": true, "dynamic_thresholding_ratio": 0.99, "sample_max_value": 1.5});
    let threshold = Some(Threshold { ratio: 0.99, largest: 1.5 });
    assert_eq!(limits(keys).unwrap().threshold, threshold);
    // As diffusers computes it, a largest value of 1, the default, leaves nothing but clipping.
    let stepping = limits(json!({"thresholding": true, "clip_sample": false, "clip_sample_range": 2.0})).unwrap();
    assert_eq!((stepping.clip, stepping.clip_range, stepping.threshold), (true, 1.0, None));
    for (keys, want) in [
        (json!({"sample_max_value": 0.5}), "has sample_max_value = 0.5; a number from 1 on is expected"),
        (
            json!({"dynamic_thresholding_ratio": 1.5}),
            "has dynamic_thresholding_ratio = 1.5; a number above 0 and up to 1",
        ),
    ] {
        let mut keys = keys;
        keys["thresholding"] = json!(true);
        let said = limits(keys).expect_err("refused").to_string();
        assert!(said.contains(want), "{said}");
    }
    // Without a scheduler nothing is said of it.
    assert_eq!(checkpoint::describe(&fixture("unet_gray16")).unwrap().stepping, Stepping::FOREIGN);
    // This program's checkpoints once said `leading` and were drawn from evenly; a file beside them tells them apart.
    fs::write(pipeline.path().join("training_state.safetensors"), "").unwrap();
    pipeline.change("scheduler/scheduler_config.json", json!({"timestep_spacing": "leading", "steps_offset": 0}));
    pipeline.change("scheduler/scheduler_config.json", json!({"clip_sample": true}));
    for place in [pipeline.path().to_path_buf(), pipeline.path().join("unet")] {
        assert_eq!(checkpoint::describe(&place).unwrap().stepping, Stepping::OURS, "{}", place.display());
    }
    pipeline.change("scheduler/scheduler_config.json", json!({"timestep_spacing": "trailing"}));
    assert_eq!(pipeline.load().unwrap().stepping.spacing, Spacing::Trailing);
}

#[test]
fn a_network_alone_takes_the_scheduler_above_it_or_says_what_is_assumed() {
    let pipeline = Pipeline::new();
    pipeline.change("scheduler/scheduler_config.json", json!({"beta_schedule": "squaredcos_cap_v2"}));
    let step = pipeline.path().join("checkpoint-500");
    copy(&pipeline.path().join("unet"), &step.join("unet"));
    let kind = |path: &Path| {
        let loaded = checkpoint::load(&Device::cpu(), path).unwrap();
        assert!(same_weights(&loaded), "{}", path.display());
        (loaded.config.diffusion.schedule, loaded.notes)
    };
    for path in [step.clone(), step.join("unet"), pipeline.path().join("unet")] {
        let (schedule, notes) = kind(&path);
        assert_eq!(schedule, Kind::Cosine, "{}", path.display());
        assert!(notes.len() == 1 && notes[0].ends_with("scheduler/scheduler_config.json"), "{notes:?}");
    }
    assert_eq!(kind(pipeline.path()), (Kind::Cosine, vec![]));
    // As EMAModel saves the moving average: more keys, beside the weights themselves and alone.
    let keys = json!({"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 500, "power": 0.75,
        "update_after_step": 0, "use_ema_warmup": true});
    copy(&step.join("unet"), &step.join("unet_ema"));
    pipeline.change("checkpoint-500/unet_ema/config.json", keys);
    let (_, notes) = kind(&step);
    assert!(
        notes.iter().any(|note| note.contains("the moving average of its weights is") && note.ends_with("unet_ema")),
        "{notes:?}"
    );
    assert_eq!(kind(&step.join("unet_ema")).0, Kind::Cosine);
    fs::remove_dir_all(step.join("unet")).unwrap();
    assert_eq!(kind(&step).0, Kind::Cosine);
    // None anywhere.
    let (schedule, notes) = kind(&fixture("unet_gray16"));
    assert_eq!((schedule, notes.len()), (Kind::Linear, 1));
    let assumed =
        "the process is assumed to be that of DDPMScheduler's defaults, linear betas from 0.0001 to 0.02 over 1000";
    assert!(notes[0].contains(assumed), "{notes:?}");
    // A scheduler without a class.
    let pipeline = Pipeline::new();
    pipeline.scheduler(&json!({"num_train_timesteps": 1000}));
    assert!(pipeline.load().unwrap().notes[0].ends_with("names no class; DDPMScheduler is assumed"));
}

#[test]
fn pipelines_whose_network_works_on_something_else_are_refused() {
    for (part, class, why) in [
        ("vae", "AutoencoderKL", "works on latents"),
        ("vqvae", "VQModel", "works on latents"),
        ("movq", "VQModel", "works on latents"),
        ("text_encoder", "CLIPTextModel", "conditioned on text"),
        ("bert", "LDMBertModel", "conditioned on text"),
        ("mel", "Mel", "not known here"),
    ] {
        let pipeline = Pipeline::new();
        pipeline.change("model_index.json", json!({"_class_name": "SomePipeline", part: ["diffusers", class]}));
        for path in [pipeline.path().to_path_buf(), pipeline.path().join("unet")] {
            let said = checkpoint::load(&Device::cpu(), &path).err().expect("refused").to_string();
            assert!(
                said.contains(&format!("is of \"SomePipeline\" with {part} ({class})")) && said.contains(why),
                "{said}"
            );
        }
        // A part that is switched off.
        pipeline.change("model_index.json", json!({part: [null, null]}));
        pipeline.load().unwrap();
    }
    // Without an index the folder itself tells.
    let pipeline = Pipeline::new();
    fs::remove_file(pipeline.path().join("model_index.json")).unwrap();
    fs::create_dir(pipeline.path().join("vqvae")).unwrap();
    fs::write(pipeline.path().join("vqvae/config.json"), "{}").unwrap();
    assert!(pipeline.refusal().ends_with("vqvae: lies beside the U-Net: its U-Net works on latents, not on images"));
}

/// The tensors of the small grey network as they stand in its file.
fn gray_tensors() -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(fixture("unet_gray16/diffusion_pytorch_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<_> =
        file.tensors().into_iter().map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec())).collect();
    all.sort();
    all
}

fn write_f32(path: &Path, tensors: &[(String, Vec<usize>, Vec<u8>)]) {
    let view = |shape: &[usize], data| TensorView::new(Dtype::F32, shape.to_vec(), data).unwrap();
    let views = tensors.iter().map(|(name, shape, data)| (name.clone(), view(shape, data)));
    fs::write(path, safetensors::serialize(views, None::<HashMap<String, String>>).unwrap()).unwrap();
}

#[test]
fn weights_in_shards_are_read_and_their_faults_named() {
    let all = gray_tensors();
    for (index, shards) in [
        ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model-0000K-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-0000K-of-00002.safetensors",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model-0000K-of-00002.fp16.safetensors",
        ),
    ] {
        let pipeline = Pipeline::new();
        let unet = pipeline.path().join("unet");
        let single = unet.join("diffusion_pytorch_model.safetensors");
        fs::remove_file(&single).unwrap();
        let name = |k: usize| shards.replace('K', &(k + 1).to_string());
        let parts: Vec<Vec<_>> = (0..2).map(|k| all.iter().skip(k).step_by(2).cloned().collect()).collect();
        let mut map = serde_json::Map::new();
        for (k, part) in parts.iter().enumerate() {
            write_f32(&unet.join(name(k)), part);
            map.extend(part.iter().map(|(tensor, ..)| (tensor.clone(), json!(name(k)))));
        }
        let write = |map: &serde_json::Map<String, Value>| {
            fs::write(unet.join(index), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
        };
        write(&map);
        assert!(same_weights(&pipeline.load().unwrap()), "{index}");

        let first = all[0].0.clone();
        let with = |file: Value| {
            let mut changed = map.clone();
            changed.insert(first.clone(), file);
            write(&changed);
            pipeline.refusal()
        };
        let unsafe_names = [
            "../x.safetensors",
            "/x.safetensors",
            "a/b.safetensors",
            "x.pt",
            "..",
            "",
            "a\\b.safetensors",
            "./x.safetensors",
        ];
        for name in unsafe_names {
            let said = with(json!(name));
            assert!(
                said.contains("in weight_map; the name of a .safetensors or .bin file beside it is expected"),
                "{said}"
            );
        }
        assert!(with(json!(3)).contains("has 3 in weight_map"));
        assert!(with(json!("gone.safetensors")).contains("names the shard gone.safetensors, which is not beside it"));
        let said = with(json!(name(1)));
        assert!(said.contains(&format!("places {first} in {}, but it is in {}", name(1), name(0))), "{said}");
        let mut more = map.clone();
        more.insert("novelty".into(), json!(name(0)));
        write(&more);
        assert!(pipeline.refusal().contains(&format!("places novelty in {}, but it is in no shard", name(0))));
        fs::write(unet.join(index), "{}").unwrap();
        assert!(pipeline.refusal().contains("has no weight_map"));
        write(&map);
        // A shard cut short, both shards with one tensor, a single file too.
        let content = fs::read(unet.join(name(1))).unwrap();
        fs::write(unet.join(name(1)), &content[..content.len() - 4]).unwrap();
        assert!(pipeline.refusal().contains("is not a whole safetensors file"));
        write_f32(&unet.join(name(1)), &all);
        assert!(pipeline.refusal().contains("which another shard holds too"));
        fs::write(unet.join(name(1)), content).unwrap();
        if !index.contains("fp16") {
            write_f32(&single, &all);
            assert!(pipeline.refusal().contains("holds its weights twice"));
            fs::remove_file(&single).unwrap();
        }
        fs::remove_file(unet.join(index)).unwrap();
        assert!(pipeline.refusal().contains("index.json; download that too"));
    }
}

#[test]
fn what_precedes_every_name_is_passed_over() {
    let pipeline = Pipeline::new();
    let path = pipeline.path().join("unet/diffusion_pytorch_model.safetensors");
    let renamed = |prefix: &str| -> Vec<_> {
        gray_tensors().into_iter().map(|(name, shape, data)| (format!("{prefix}{name}"), shape, data)).collect()
    };
    for prefix in ["_orig_mod.", "module.", "unet.", "model.", "module._orig_mod.", "ema_model.module."] {
        write_f32(&path, &renamed(prefix));
        assert!(same_weights(&pipeline.load().unwrap()), "{prefix}");
    }
    // Only what all share.
    let mut mixed = renamed("module.");
    mixed.push(("n_averaged".into(), vec![1], vec![0; 4]));
    write_f32(&path, &mixed);
    let said = pipeline.refusal();
    assert!(said.contains("lacks conv_in.bias") && said.contains("holds module.conv_in.bias"), "{said}");
    // A tensor under its old and its new name.
    let mut twice = gray_tensors();
    let (name, shape, data) = twice.iter().find(|(name, ..)| name.ends_with("to_q.weight")).unwrap().clone();
    twice.push((name.replace(".to_q.", ".query."), shape, data));
    write_f32(&path, &twice);
    assert!(pipeline.refusal().contains("to_q.weight twice, under its old name and today's"));
}

#[test]
fn variants_of_the_weights_are_chosen_by_name() {
    let pipeline = Pipeline::new();
    let at = |name: &str| pipeline.path().join("unet").join(format!("diffusion_pytorch_model{name}.safetensors"));
    fs::rename(at(""), at(".non_ema")).unwrap();
    let loaded = pipeline.load().unwrap();
    assert!(loaded.notes[0].ends_with("unet/diffusion_pytorch_model.non_ema.safetensors"), "{:?}", loaded.notes);
    fs::copy(at(".non_ema"), at(".bf16")).unwrap();
    assert!(pipeline.refusal().contains("several variants of its weights (.bf16, .non_ema)"));
    fs::copy(at(".non_ema"), at(".fp16")).unwrap();
    assert!(pipeline.load().unwrap().notes.is_empty());
    // The plain name wins: the others are now broken.
    fs::copy(at(".non_ema"), at("")).unwrap();
    [".non_ema", ".bf16", ".fp16"].iter().for_each(|variant| fs::write(at(variant), "x").unwrap());
    assert!(same_weights(&pipeline.load().unwrap()));
    fs::write(at(""), "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n").unwrap();
    assert!(pipeline.refusal().ends_with("is a pointer of Git LFS, not the weights; fetch them with git lfs pull"));
}

#[test]
fn the_hubs_cache_is_taken_if_it_holds_one_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("models--x--y");
    copy(&fixture("unet_gray16"), &model.join("snapshots/0123"));
    assert!(same_weights(&checkpoint::load(&Device::cpu(), &model).unwrap()));
    copy(&fixture("unet_gray16"), &model.join("snapshots/4567"));
    fs::create_dir(model.join("refs")).unwrap();
    fs::write(model.join("refs/main"), "4567").unwrap();
    let refusal = || checkpoint::load(&Device::cpu(), &model).err().expect("refused").to_string();
    assert!(refusal().contains("holds 2 snapshots") && refusal().ends_with("snapshots/4567"), "{}", refusal());
    fs::remove_dir_all(model.join("snapshots")).unwrap();
    fs::create_dir(model.join("snapshots")).unwrap();
    assert!(refusal().ends_with("without a snapshot; download the model again"));
}

#[test]
fn a_model_is_described_without_its_weights() {
    let pipeline = Pipeline::new();
    fs::remove_file(pipeline.path().join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    let described = checkpoint::describe(pipeline.path()).unwrap();
    assert_eq!(described.config.model.widths, [16, 32]);
    assert!(pipeline.refusal().ends_with("holds no diffusion_pytorch_model.safetensors"));
}

#[test]
fn names_of_classes_travel_with_the_checkpoint() {
    let run = tempfile::tempdir().unwrap();
    let model = checkpoint::load(&Device::cpu(), &fixture("unet_rgb16")).unwrap();
    let mut config = model.config.clone();
    config.class_names = ["cat", "7", "snow \"leopard\"", ""].map(String::from).into();
    let zeros = Tensor::zeros(&Device::cpu(), Shape::vector(model.params.specs().flat_len())).unwrap();
    let state = State {
        step: 7,
        params: &model.params,
        ema: model.params.flat(),
        m: &zeros,
        v: &zeros,
        data: None,
        importance: None,
        curve: None,
    };
    let path = checkpoint::save(run.path(), &config, state).unwrap();
    // Private to diffusers, which passes over it.
    assert_eq!(json_file(&path.join("unet/config.json"))["_class_names"], json!(config.class_names));
    assert_eq!(checkpoint::describe(&path).unwrap().config.class_names, config.class_names);
    fs::write(run.path().join("config.toml"), config.to_toml()).unwrap();
    assert_eq!(Config::read(&run.path().join("config.toml")).unwrap(), config);
    for (names, says) in [
        (json!(vec!["a"; 11]), "has 11 _class_names for num_class_embeds = 10"),
        (json!("cat"), "has _class_names = \"cat\"; a list is expected"),
        (json!([3]), "has _class_names = [3]; a string is expected"),
    ] {
        let mut unet = json_file(&path.join("unet/config.json"));
        unet["_class_names"] = names;
        fs::write(path.join("unet/config.json"), unet.to_string()).unwrap();
        let said = checkpoint::describe(&path).err().expect("refused").to_string();
        assert!(said.contains(says), "{said}");
    }
}

/// Sizes that no memory holds are compared with the file first: a sentence each, at once.
#[test]
fn declared_sizes_are_refused_before_anything_is_allocated() {
    const MANY: usize = 1_200_000;
    let began = std::time::Instant::now();
    for (file, keys, says) in [
        ("unet/config.json", json!({"num_class_embeds": 1_000_000_000}), "lacks class_embedding.weight"),
        ("unet/config.json", json!({"num_class_embeds": 1_000_000_000_000u64}), "a whole number from 0 to 4294967295"),
        ("unet/config.json", json!({"block_out_channels": [1u32 << 31, 1u32 << 31]}), "the largest possible is 65536"),
        ("unet/config.json", json!({"in_channels": u32::MAX, "out_channels": u32::MAX}), "channels holds 4294967295"),
        ("unet/config.json", json!({"block_out_channels": vec![16; 1001]}), "has a list of 1001 as block_out_channels"),
        ("unet/config.json", json!({"block_out_channels": vec![16; MANY]}), "no configuration has more than a million"),
        (
            "unet/config.json",
            json!({"block_out_channels": vec![16; 40], "down_block_types": vec!["DownBlock2D"; 40],
                "up_block_types": vec!["UpBlock2D"; 40]}),
            "no image can be halved more than 16 times",
        ),
        ("unet/config.json", json!({"norm_num_groups": u32::MAX}), "groups holds 4294967295"),
        ("unet/config.json", json!({"attention_head_dim": 4_000_000_007u32}), "head_dim holds 4000000007"),
        ("unet/config.json", json!({"act_fn": "x".repeat(1 << 20)}), "...; only \"silu\""),
        ("unet/config.json", json!({"sample_size": 1u64 << 60}), "has sample_size = 1152921504606846976"),
        ("scheduler/scheduler_config.json", json!({"num_train_timesteps": 1u64 << 40}), "a whole number from 0 to"),
        ("scheduler/scheduler_config.json", json!({"num_train_timesteps": u32::MAX}), "from 2 to 1000000"),
        ("scheduler/scheduler_config.json", json!({"trained_betas": vec![0; MANY]}), "more than a million"),
        (
            "scheduler/scheduler_config.json",
            json!({"x": "y".repeat(33 << 20)}),
            "no configuration has more than 33554432",
        ),
    ] {
        let pipeline = Pipeline::new();
        pipeline.change(file, keys);
        let said = pipeline.refusal();
        assert!(said.contains(says), "{said}\nshould say: {says}");
    }
    let nested = "[".repeat(1_000_000);
    for file in ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"] {
        let pipeline = Pipeline::new();
        fs::write(pipeline.path().join(file), &nested).unwrap();
        assert!(pipeline.refusal().contains("is not JSON: recursion limit"));
    }
    // Headers of weights, and a table that the file has room for and memory has not.
    let header = |json: Value| {
        let json = json.to_string();
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat()
    };
    let tensor =
        |shape: Value, end: u64| json!({"conv_in.bias": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}});
    for content in [
        [&(1u64 << 60).to_le_bytes()[..], &[b' '; 64]].concat(),
        [&u64::MAX.to_le_bytes()[..], &[b' '; 64]].concat(),
        header(tensor(json!([1u64 << 62, 1u64 << 62]), 0)),
        header(tensor(json!([1u64 << 40]), 1 << 42)),
        header(tensor(json!([1]), u64::MAX)),
        header(json!({"a": {"dtype": "Z".repeat(1 << 20), "shape": [1], "data_offsets": [0, 4]}})),
    ] {
        let pipeline = Pipeline::new();
        fs::write(pipeline.path().join("unet/diffusion_pytorch_model.safetensors"), content).unwrap();
        assert!(pipeline.refusal().contains("is not a whole safetensors file"));
    }
    let pipeline = Pipeline::new();
    pipeline.change("unet/config.json", json!({"num_class_embeds": 1_000_000_000}));
    let path = pipeline.path().join("unet/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&path).unwrap();
    let size = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut declared: Value = serde_json::from_slice(&whole[8..8 + size]).unwrap();
    let (start, table) = ((whole.len() - 8 - size) as u64, 1_000_000_000u64 * 64 * 4);
    declared["class_embedding.weight"] =
        json!({"dtype": "F32", "shape": [1_000_000_000, 64], "data_offsets": [start, start + table]});
    let mut content = header(declared);
    content.extend(&whole[8 + size..]);
    let len = content.len() as u64 + table;
    fs::write(&path, content).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_len(len).unwrap(); // sparse
    let said = pipeline.load().err().expect("refused").to_string();
    assert!(said.contains("reading this model takes 476.84 GiB of memory"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(25), "{:?} for all", began.elapsed());
}

/// Each part of the network that diffusers has a name for is written with it and read back; what it has none for stops
/// it.
#[test]
fn every_part_of_the_network_survives_the_configuration() {
    let plain = Config::preset(Preset::Mnist).model;
    let plain = Model { image_size: Size::square(8), widths: vec![16, 32], attention_resolutions: vec![8], ..plain };
    let cases: Vec<(Model, Value)> = vec![
        (
            Model { scale_shift_norm: true, ..plain.clone() },
            json!({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}),
        ),
        (
            Model { scale_shift_norm: true, middle_attention: MiddleAttention::Bare, ..plain.clone() },
            json!({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": null, "add_attention": true}),
        ),
        (Model { middle_groups: 4, ..plain.clone() }, json!({"attn_norm_num_groups": 4})),
        (Model { middle_attention: MiddleAttention::None, ..plain.clone() }, json!({"add_attention": false})),
        (
            Model { downsample_type: Resampling::Resnet, ..plain.clone() },
            json!({"down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"], "downsample_type": "resnet"}),
        ),
        (
            Model { upsample_type: Resampling::Resnet, ..plain.clone() },
            json!({"up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"], "upsample_type": "resnet"}),
        ),
        (
            Model { classes: 7, class_embedding: ClassEmbedding::Timestep, ..plain.clone() },
            json!({"class_embed_type": "timestep", "num_class_embeds": 7}),
        ),
        (Model { classes: 7, null_class: true, ..plain.clone() }, json!({"num_class_embeds": 8, "_null_class": true})),
        (
            Model { num_heads: 2, attention_resolutions: vec![4], ..plain.clone() },
            json!({"attention_head_dim": 16, "_num_heads": 2, "time_embedding_type": "positional"}),
        ),
        (Model { num_heads: 2, ..plain.clone() }, json!({"_num_heads": 2, "time_embedding_type": "ddpm_cuda"})),
        (Model { timestep_scale: 0.25, ..plain.clone() }, json!({"time_embedding_type": "ddpm_cuda"})),
        (Model { time_channels: 8, ..plain.clone() }, json!({"time_embedding_type": "ddpm_cuda"})),
        (
            Model { middle_attention: MiddleAttention::Bare, ..plain.clone() },
            json!({"time_embedding_type": "ddpm_cuda"}),
        ),
    ];
    for (model, keys) in cases {
        let (_, specs) = UNet::new(&model).unwrap();
        let params = Params::init(&Device::cpu(), specs, 3).unwrap();
        let zeros = Tensor::zeros(&Device::cpu(), Shape::vector(params.specs().flat_len())).unwrap();
        let run = tempfile::tempdir().unwrap();
        let config = Config { model: model.clone(), ..Config::preset(Preset::Mnist) };
        let state = State {
            step: 1,
            params: &params,
            ema: params.flat(),
            m: &zeros,
            v: &zeros,
            data: None,
            importance: None,
            curve: None,
        };
        let path = checkpoint::save(run.path(), &config, state).unwrap();
        let written = json_file(&path.join("unet/config.json"));
        for (key, value) in keys.as_object().unwrap() {
            assert_eq!(written[key], *value, "{key} of {model:?}");
        }
        let again = checkpoint::load(&Device::cpu(), &path).unwrap();
        assert_eq!(again.config.model, model);
        assert!(again.params.host().unwrap() == params.host().unwrap());
    }
}

/// Where diffusers changes the size by convolutions at some levels and in residual blocks at others.
#[test]
fn blocks_of_several_kinds_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    copy(&fixture("unet_rgb16"), folder.path());
    let path = folder.path().join("config.json");
    let mut config = json_file(&path);
    config["down_block_types"] = json!(["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"]);
    fs::write(&path, config.to_string()).unwrap();
    let said = checkpoint::load(&Device::cpu(), folder.path()).err().expect("refused").to_string();
    let want = "changes the size by convolutions at some levels and in residual blocks at others";
    assert!(said.contains(want) && said.contains("(down_block_types and downsample_type)"), "{said}");
}

/// diffusers' weights in PyTorch's own files: whole, in shards, in half precision, transposed, under old names.
#[test]
fn weights_in_files_of_pytorch_are_read() {
    let want = checkpoint::load(&Device::cpu(), &fixture("unet_gray16")).unwrap().params;
    let bytes = fs::read(fixture("unet_gray16/diffusion_pytorch_model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let old = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn.")];
    let old_name = |name: &str| old.iter().fold(name.to_string(), |name, (new, old)| name.replace(new, old));
    // Each matrix as the transpose of what is stored.
    let transposed = |data: &[u8], rows: usize, columns: usize| -> Vec<u8> {
        (0..columns)
            .flat_map(|c| (0..rows).map(move |r| r * columns + c))
            .flat_map(|i| data[4 * i..][..4].to_vec())
            .collect()
    };
    /// Name, shape, strides, bytes.
    type Stored = (String, Vec<usize>, Vec<usize>, Vec<u8>);
    let numbers: Vec<Stored> = file
        .tensors()
        .into_iter()
        .map(|(name, tensor)| {
            let shape = tensor.shape().to_vec();
            let dense: Vec<usize> = (0..shape.len()).map(|d| shape[d + 1..].iter().product()).collect();
            match shape[..] {
                [rows, columns] => (name, shape, vec![1, rows], transposed(tensor.data(), rows, columns)),
                _ => (name, shape, dense, tensor.data().to_vec()),
            }
        })
        .collect();
    let whole = |names: &dyn Fn(&str) -> bool| {
        let chosen: Vec<_> = numbers.iter().filter(|(name, ..)| names(name)).collect();
        let keys: Vec<String> = (0..chosen.len()).map(|i| i.to_string()).collect();
        let olds: Vec<String> = chosen.iter().map(|(name, ..)| old_name(name)).collect();
        let views: Vec<torch::View<'_>> = chosen
            .iter()
            .enumerate()
            .map(|(i, (_, shape, strides, data))| torch::View {
                name: &olds[i],
                class: "FloatStorage",
                key: &keys[i],
                len: data.len() / 4,
                offset: 0,
                shape,
                strides,
            })
            .collect();
        let pickle = torch::pickle(&views);
        let places: Vec<String> = keys.iter().map(|key| format!("data/{key}")).collect();
        let mut entries: Vec<(&str, &[u8])> = vec![("data.pkl", &pickle)];
        entries.extend(places.iter().zip(&chosen).map(|(place, (.., data))| (place.as_str(), data.as_slice())));
        torch::archive(&entries, zip::CompressionMethod::Stored)
    };
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("unet_gray16/config.json"), folder.path().join("config.json")).unwrap();
    let bin = folder.path().join("diffusion_pytorch_model.bin");
    fs::write(&bin, whole(&|_| true)).unwrap();
    let load = || checkpoint::load(&Device::cpu(), folder.path()).unwrap();
    assert!(load().params.host().unwrap() == want.host().unwrap());
    // The same in two shards.
    fs::remove_file(&bin).unwrap();
    let first = |name: &str| name.starts_with("down_blocks");
    let shards = ["diffusion_pytorch_model-00001-of-00002.bin", "diffusion_pytorch_model-00002-of-00002.bin"];
    fs::write(folder.path().join(shards[0]), whole(&first)).unwrap();
    fs::write(folder.path().join(shards[1]), whole(&|name| !first(name))).unwrap();
    let map: serde_json::Map<String, Value> =
        numbers.iter().map(|(name, ..)| (old_name(name), json!(shards[usize::from(!first(name))]))).collect();
    let index = folder.path().join("diffusion_pytorch_model.bin.index.json");
    fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    assert!(load().params.host().unwrap() == want.host().unwrap());
    // safetensors are preferred.
    fs::copy(
        fixture("unet_gray16/diffusion_pytorch_model.safetensors"),
        folder.path().join("diffusion_pytorch_model.safetensors"),
    )
    .unwrap();
    fs::write(&index, "{").unwrap();
    assert!(load().params.host().unwrap() == want.host().unwrap());
}
