//! The U-Nets of OpenAI's improved- and guided-diffusion: what an independent implementation computes with a `.pt` file
//! (`fixtures/openai/make.py`), this program computes with it; what a file does not tell is asked for; files written
//! are read again.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use ddpm_cuda::checkpoint::{self, For, Loaded, Stepping};
use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::config::{MiddleAttention, Model, Resampling, Size};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::{Kind, Prediction, Variance};
use ddpm_cuda::error::Error;
use ddpm_cuda::layout;
use ddpm_cuda::params::Params;
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::UNet;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use support::places::fixture;
use support::{close_to_largest, network, per_image};

const NETWORKS: [&str; 3] = ["openai/guided", "openai/guided_legacy", "openai/improved"];

fn weights(name: &str) -> PathBuf {
    fixture(name).join("model.pt")
}

/// The network's output for the inputs of a fixture, and what it should be, in channels-first order.
fn outputs(name: &str, device: &Device, model: &Loaded) -> (Vec<f32>, Vec<f32>, f64) {
    let bytes = fs::read(fixture(name).join("io.safetensors")).unwrap();
    let io = SafeTensors::deserialize(&bytes).unwrap();
    let f32s = |key: &str| -> Vec<f32> { bytemuck::pod_collect_to_vec(io.tensor(key).unwrap().data()) };
    let i32s = |key: &str| -> Vec<i32> { bytemuck::pod_collect_to_vec(io.tensor(key).unwrap().data()) };
    let [n, c, h, w] = io.tensor("x").unwrap().shape().try_into().unwrap();
    let x = layout::to_channels_last(&f32s("x"), c, h * w);
    let x = Tensor::from_slice_as(device, device.activations(), Shape::new(n, h, w, c), &x).unwrap();
    let t = per_image(device, i32s("t").into_iter().map(|t| t as f32));
    let conditioning = match io.tensor("labels") {
        Ok(_) => Conditioning::on_labels(per_image(device, i32s("labels").into_iter().map(|l| l as f32))),
        Err(_) => Conditioning::NONE,
    };
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let mut tape = Tape::recording(device, &model.params);
    let x = tape.leaf(x);
    let y = unet.forward(&mut tape, &x, &t, &conditioning, None).unwrap();
    let tolerance = network::tolerance(device.activations(), tape.saved().len());
    let shape = y.shape();
    let got = layout::to_channels_first(&y.value().host().unwrap(), shape.c, shape.pixels());
    (got, f32s("out"), tolerance)
}

fn agrees(name: &str, device: &Device) {
    let model = checkpoint::load(device, &weights(name)).unwrap();
    let (got, want, tolerance) = outputs(name, device, &model);
    close_to_largest(name, &got, &want, tolerance);
}

#[test]
fn networks_agree_with_another_implementation() {
    NETWORKS.iter().for_each(|name| agrees(name, &Device::cpu_guarded()));
}

#[test]
fn the_kernels_agree_with_another_implementation() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = support::gpu::gpu(dtype) else { return };
        let device = Device::Cuda(gpu);
        NETWORKS.iter().for_each(|name| agrees(name, &device));
    }
}

/// The comparison above sees each of the flags that the shapes do not tell.
#[test]
fn another_order_of_q_k_and_v_or_number_of_heads_is_another_network() {
    let device = Device::cpu();
    for (name, set) in [
        ("openai/guided", "use_new_attention_order=false"),
        ("openai/guided_legacy", "use_new_attention_order=true"),
        ("openai/guided", "num_head_channels=8"),
        ("openai/improved", "num_heads=2"),
        ("openai/improved", "rescale_timesteps=false"),
    ] {
        let model = checkpoint::load_with(&device, &weights(name), &[set.to_string()]).unwrap();
        let (got, want, tolerance) = outputs(name, &device, &model);
        let largest = want.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
        let off = got.iter().zip(&want).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()));
        assert!(f64::from(off) > 100.0 * tolerance * f64::from(largest), "{name} with {set} is off by {off:e} alone");
    }
}

#[test]
fn shapes_and_flags_tell_network_and_process() {
    let [guided, legacy, improved] = NETWORKS.map(|name| checkpoint::describe(&weights(name)).unwrap());
    let m = Model {
        image_size: Size::square(8),
        channels: 3,
        widths: vec![32, 32],
        blocks_per_level: 1,
        attention_resolutions: vec![4],
        middle_attention: MiddleAttention::Norm,
        head_dim: 16,
        num_heads: 0,
        groups: 32,
        norm_eps: 1e-5,
        scale_shift_norm: true,
        downsample_type: Resampling::Resnet,
        upsample_type: Resampling::Resnet,
        classes: 5,
        learned_variance: true,
        downsample_padding: 1,
        freq_shift: 0,
        flip_sin_to_cos: true,
        dropout: 0.0,
        ..guided.config.model.clone()
    };
    assert_eq!(guided.config.model, m);
    let want =
        Model { attention_resolutions: vec![8], classes: 0, learned_variance: false, time_channels: 64, ..m.clone() };
    assert_eq!(legacy.config.model, want);
    let want = Model {
        channels: 1,
        widths: vec![32, 64],
        attention_resolutions: vec![8, 4],
        head_dim: 0,
        num_heads: 4,
        scale_shift_norm: false,
        downsample_type: Resampling::Conv,
        upsample_type: Resampling::Conv,
        classes: 0,
        learned_variance: false,
        timestep_scale: 0.25,
        ..m
    };
    assert_eq!(improved.config.model, want);
    let process = |described: &checkpoint::Description| {
        let d = &described.config.diffusion;
        (d.schedule, d.timesteps, d.prediction, d.variance)
    };
    assert_eq!(process(&guided), (Kind::Linear, 1000, Prediction::Eps, Variance::LearnedRange));
    assert_eq!(process(&legacy), (Kind::Cosine, 1000, Prediction::X0, Variance::FixedSmall));
    assert_eq!(process(&improved), (Kind::Cosine, 4000, Prediction::Eps, Variance::FixedLarge));
    let notes = guided.notes.join("\n");
    for want in [
        "its shapes tell widths 32,32 with 1 blocks a level, attention at level 1, scale-shift norm, residual up and down blocks, 5 classes, a learned variance",
        "the flags are taken from ",
        "predict_xstart is not said: the network is taken to predict the noise",
    ] {
        assert!(notes.contains(want), "{notes}\nshould say: {want}");
    }
    assert!(improved.notes.join("\n").contains("sigma_small is not said: the variance is taken to be fixed_large"));
}

/// A copy of a fixture's weights under another name, with these flags beside it.
fn copy(name: &str, file: &str, flags: Option<Value>) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(file);
    fs::copy(weights(name), &path).unwrap();
    if let Some(flags) = flags {
        fs::write(folder.path().join("model_and_diffusion.json"), flags.to_string()).unwrap();
    }
    (folder, path)
}

#[test]
fn what_shapes_do_not_tell_is_asked_for() {
    let (_folder, path) = copy("openai/guided", "model.pt", None);
    let mut sets: Vec<String> = Vec::new();
    for (missing, set) in [
        ("image_size", "image_size=8"),
        ("num_heads=4 or num_head_channels", "num_head_channels=16"),
        ("use_new_attention_order", "use_new_attention_order=true"),
        ("diffusion_steps", "diffusion_steps=1000"),
        ("noise_schedule", "noise_schedule=linear"),
    ] {
        let said = checkpoint::describe_with(&path, &sets).err().expect("something is missing").to_string();
        let want = format!(
            "model.pt: does not tell {missing}: give OpenAI's flags in model_and_diffusion.json beside it or by --set, as in --set {missing}="
        );
        assert!(said.contains(&want), "{said}\nshould say: {want}");
        sets.push(set.into());
    }
    let described = checkpoint::describe_with(&path, &sets).unwrap();
    assert_eq!(described.config.model, checkpoint::describe(&weights("openai/guided")).unwrap().config.model);
    sets.extend(["diffusion_steps=4000".into(), "image_size=8".into()]);
    let said = checkpoint::describe_with(&path, &sets).err().expect("rescaling matters").to_string();
    assert!(said.contains("does not tell rescale_timesteps"), "{said}");
}

#[test]
fn a_released_name_brings_its_flags() {
    // Its shapes are another network's, which the preset does not hide: 256x256 with heads of 64 channels.
    let (_folder, path) = copy("openai/guided", "256x256_diffusion.pt", None);
    let said = checkpoint::describe(&path).err().expect("64 channels are no head of 32").to_string();
    assert!(said.contains("head_dim = 64 does not divide the width 32"), "{said}");
    let described = checkpoint::describe_with(&path, &["num_head_channels=16".into()]).unwrap();
    assert_eq!(described.config.model.image_size, Size::square(256));
    assert!(described.notes.iter().any(|n| n.contains("the flags are those of OpenAI's 256x256_diffusion")));
}

#[test]
fn flags_that_cannot_be_are_refused_by_name() {
    let flags = json!({"image_size": 8, "num_head_channels": 16, "use_new_attention_order": true,
        "diffusion_steps": 1000, "noise_schedule": "linear"});
    let cases = [
        (
            "num_channels",
            json!(64),
            "has num_channels = 32 by its shapes, where the flag says 64; one of the two is of",
        ),
        ("num_res_blocks", json!("2"), "has num_res_blocks = 1 by its shapes, where the flag says 2"),
        ("class_cond", json!(false), "has class_cond = true by its shapes, where the flag says false"),
        ("use_scale_shift_norm", json!("False"), "has use_scale_shift_norm = true by its shapes"),
        ("learn_sigma", json!(false), "has learn_sigma = true by its shapes"),
        ("resblock_updown", json!(false), "has resblock_updown = true by its shapes"),
        ("attention_resolutions", json!("8,4"), "where attention_resolutions says 8,4"),
        ("channel_mult", json!("1,2"), "has the widths [32, 32], where channel_mult says 1,2"),
        ("num_heads_upsample", json!(2), "has num_heads_upsample = 2; as many heads on the way up as down"),
        ("timestep_respacing", json!("250"), "has timestep_respacing = 250, which says how to sample; leave it out"),
        ("noise_schedule", json!("sqrt"), "has noise_schedule = sqrt; linear or cosine is expected"),
        ("image_size", json!("small"), "has image_size = small; a whole number is expected"),
        ("image_size", json!(9), "describes a network that cannot be built: image_size = 9x9"),
        ("diffusion_steps", json!("all"), "has diffusion_steps = all; a whole number is expected"),
        ("predict_xstart", json!(2), "has predict_xstart = 2; true or false is expected"),
        ("conv_resample", json!(false), "has conv_resample = false; resampling without weights is not supported"),
        ("num_head_channels", json!(7), "head_dim = 7 does not divide"),
        ("novelty", json!(1), "has novelty, which is no flag of OpenAI's; one of image_size, num_channels"),
        ("small_size", json!(64), "has small_size, a flag of upsamplers"),
        ("dropout", json!([1]), "has a list as dropout; a number or a text is expected"),
    ];
    for (flag, value, want) in cases {
        let mut flags = flags.clone();
        flags[flag] = value;
        let (_folder, path) = copy("openai/guided", "model.pt", Some(flags));
        let error = checkpoint::describe(&path).err().unwrap_or_else(|| panic!("{flag} is refused"));
        let said = error.to_string();
        assert!(matches!(error, Error::File { .. }) && said.contains(want), "{said}\nshould say: {want}");
        assert!(!said.ends_with('.') && !said.contains(char::is_control), "{said:?}");
    }
    let (_folder, path) = copy("openai/guided", "model.pt", Some(flags));
    for (set, want) in [
        ("num_heads", "--set num_heads: there is no '='; write --set FLAG=VALUE, as in --set num_heads=4"),
        ("widths=32", "--set widths=32: widths, which is no flag of OpenAI's; one of image_size"),
    ] {
        let error = checkpoint::describe_with(&path, &[set.into()]).err().expect("refused");
        assert!(matches!(error, Error::Usage(_)) && error.to_string().contains(want), "{error}");
    }
    let error = checkpoint::describe_with(&fixture("unet_gray16"), &["num_heads=4".into()]).err().expect("refused");
    assert!(error.to_string().contains("says itself what it is; flags are for OpenAI's .pt files"), "{error}");
}

/// The numbers of a model, wherever they come to lie.
fn same(a: &Loaded, b: &Loaded) {
    assert_eq!(a.config.model, b.config.model);
    assert_eq!(a.config.diffusion, b.config.diffusion);
    assert!(a.params.host().unwrap() == b.params.host().unwrap(), "other weights");
}

#[test]
fn what_is_written_is_read_again_from_every_kind_of_file() {
    let device = Device::cpu();
    for name in NETWORKS {
        let folder = tempfile::tempdir().unwrap();
        let model = checkpoint::load(&device, &weights(name)).unwrap();
        let Loaded { config, params, stepping, .. } = &model;
        let ours = folder.path().join("ours");
        checkpoint::write_folder(&ours, config, params, stepping, For::Ours).unwrap();
        let from_ours = checkpoint::load(&device, &ours).unwrap();
        same(&from_ours, &model);
        assert_eq!(from_ours.stepping, Stepping::FOREIGN);
        let pt = folder.path().join("again.pt");
        let written = checkpoint::write_openai(&pt, &from_ours.config, &from_ours.params, stepping);
        if name == "openai/guided_legacy" {
            // Its widths are halves of its num_channels.
            let said = written.expect_err("channel_mult is of whole numbers").to_string();
            let want = "cannot say widths = 32,32; only a whole multiple of time_channels = 64 each is possible there";
            assert!(said.contains(want) && !pt.exists(), "{said}");
            continue;
        }
        written.unwrap();
        same(&checkpoint::load(&device, &pt).unwrap(), &model);
        assert!(folder.path().join("model_and_diffusion.json").is_file());
    }
}

#[test]
fn what_the_other_side_has_no_words_for_is_refused_by_name() {
    let device = Device::cpu();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let load = |name: &str| checkpoint::load(&device, &weights(name)).unwrap();
    let diffusers = |model: &Loaded| {
        let Loaded { config, params, stepping, .. } = model;
        checkpoint::write_folder(&out, config, params, stepping, For::Diffusers)
    };
    let refusal = |said: ddpm_cuda::error::Result<()>, want: &str| {
        let error = said.expect_err("refused");
        let text = error.to_string();
        assert!(matches!(error, Error::Failed(_)) && text.contains(want), "{text}\nshould say: {want}");
        assert!(!out.exists(), "something was written");
    };
    let heads = "diffusers has no words for num_heads = 4 in attentions of different widths; --to ours writes a folder";
    refusal(diffusers(&load("openai/improved")), heads);
    let time = "diffusers has no words for time_channels = 64 beside widths that start with 32";
    refusal(diffusers(&load("openai/guided_legacy")), time);
    let mut model = load("openai/guided");
    model.config.diffusion.prediction = Prediction::Mu;
    refusal(diffusers(&model), "diffusers has no words for prediction = mu");
    model.config.diffusion.prediction = Prediction::Eps;
    model.config.diffusion.variance = Variance::Learned;
    refusal(diffusers(&model), "diffusers has no words for variance = learned, whose output is the logarithm");
    model.config.diffusion.variance = Variance::LearnedRange;
    diffusers(&model).unwrap();
    same(&checkpoint::load(&device, &out).unwrap(), &model);
    assert!(diffusers(&model).expect_err("it exists").to_string().contains("is not an empty folder"));

    let pt = folder.path().join("out.pt");
    let openai = |model: &Loaded| {
        let Loaded { config, params, stepping, .. } = model;
        checkpoint::write_openai(&pt, config, params, stepping).map(|_| ())
    };
    let fresh = || load("openai/guided");
    type Change = fn(&mut Loaded);
    let changes: [(Change, &str); 8] = [
        (|m| m.config.model.norm_eps = 1e-6, "OpenAI's files cannot say norm_eps = 0.000001; only 0.00001 is possible"),
        (|m| m.config.model.freq_shift = 1, "freq_shift = 1; only 0 is possible there"),
        (|m| m.config.model.upsample_type = Resampling::Conv, "upsample_type = conv; only resnet is possible there"),
        (|m| m.config.model.middle_attention = MiddleAttention::None, "middle_attention = none; only norm is possible"),
        (|m| m.config.diffusion.prediction = Prediction::V, "prediction = v; only eps or x0 is possible there"),
        (|m| m.config.diffusion.variance = Variance::Learned, "variance = learned; only learned_range is possible"),
        (|m| m.config.diffusion.schedule = Kind::Sigmoid, "schedule = sigmoid; only linear or cosine is possible"),
        (|m| m.config.model.timestep_scale = 0.5, "timestep_scale = 0.5; only 1 or 1000/T is possible there"),
    ];
    for (change, want) in changes {
        let mut model = fresh();
        change(&mut model);
        let error = openai(&model).expect_err("refused").to_string();
        assert!(error.contains(want) && !pt.exists(), "{error}\nshould say: {want}");
    }
    // Flags of another model beside it are not overwritten.
    openai(&fresh()).unwrap();
    let other = folder.path().join("other.pt");
    let Loaded { config, params, stepping, .. } = load("openai/improved");
    let error = checkpoint::write_openai(&other, &config, &params, &stepping).expect_err("refused").to_string();
    assert!(error.contains("holds the flags of another model") && !other.exists(), "{error}");
}

/// OpenAI's scripts read `channel_mult` and `attention_resolutions` as whole numbers with commas, and of the former
/// nothing as their own for the size, which begins with a half for 512x512 pixels.
#[test]
fn flags_are_what_openais_scripts_read() {
    let device = Device::cpu();
    let Loaded { config, stepping, .. } = checkpoint::load(&device, &weights("openai/guided")).unwrap();
    let doubled = [1, 2, 2, 4, 4, 8, 8].map(|width| 32 * width).to_vec();
    for (side, time_channels, widths, attention, mult, resolutions) in [
        (8, 0, vec![32, 96], vec![4], Some("1,3"), "4"),
        (8, 32, vec![64, 64], vec![], Some("2,2"), "16"),
        (512, 64, doubled.clone(), vec![], Some(""), "1024"),
        (256, 64, doubled, vec![], None, ""),
        (8, 64, vec![64, 96], vec![], None, ""),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let pt = folder.path().join("model.pt");
        let mut config = config.clone();
        config.model = Model {
            image_size: Size::square(side),
            time_channels,
            widths,
            attention_resolutions: attention,
            head_dim: 32,
            ..config.model
        };
        let (_, specs) = UNet::new(&config.model).unwrap();
        let params = Params::zeros(&device, specs).unwrap();
        let written = checkpoint::write_openai(&pt, &config, &params, &stepping);
        let Some(mult) = mult else {
            let said = written.expect_err("no whole number says it").to_string();
            assert!(said.contains("only a whole multiple of time_channels = 64 each"), "{said}");
            continue;
        };
        written.unwrap();
        let flags: Value =
            serde_json::from_slice(&fs::read(folder.path().join("model_and_diffusion.json")).unwrap()).unwrap();
        assert_eq!((&flags["channel_mult"], &flags["attention_resolutions"]), (&json!(mult), &json!(resolutions)));
        let read = checkpoint::describe(&pt).unwrap().config.model;
        assert_eq!(
            (read.widths, read.attention_resolutions),
            (config.model.widths, config.model.attention_resolutions)
        );
    }
}

/// The names in the file are those of OpenAI's modules, each once.
#[test]
fn our_pt_has_their_names_and_shapes() {
    let folder = tempfile::tempdir().unwrap();
    let pt = folder.path().join("model.pt");
    let model = checkpoint::load(&Device::cpu(), &weights("openai/improved")).unwrap();
    checkpoint::write_openai(&pt, &model.config, &model.params, &model.stepping).unwrap();
    let names = |path: &Path| {
        let mut archive = zip::ZipArchive::new(fs::File::open(path).unwrap()).unwrap();
        let name = archive.file_names().flatten().find(|name| name.ends_with("/data.pkl")).unwrap().to_string();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut archive.by_name(&name).unwrap(), &mut bytes).unwrap();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let of_weights = |word: &&str| word.ends_with(".weight") || word.ends_with(".bias");
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '.' && c != '_');
        let mut names: Vec<String> = words.filter(of_weights).map(|w| w.trim_start_matches('X').to_string()).collect();
        names.sort();
        names
    };
    assert_eq!(names(&pt), names(&weights("openai/improved")));
}

/// The networks that were released, by the flags that were released with them.
#[test]
fn the_released_networks_have_as_many_parameters() {
    let guided = Model {
        learned_variance: true,
        scale_shift_norm: true,
        downsample_type: Resampling::Resnet,
        upsample_type: Resampling::Resnet,
        attention_resolutions: vec![32, 16, 8],
        head_dim: 64,
        classes: 0,
        blocks_per_level: 2,
        ..checkpoint::describe(&weights("openai/guided")).unwrap().config.model
    };
    let of_256 =
        Model { image_size: Size::square(256), widths: vec![256, 256, 512, 512, 1024, 1024], ..guided.clone() };
    let improved = Model {
        downsample_type: Resampling::Conv,
        upsample_type: Resampling::Conv,
        attention_resolutions: vec![16, 8],
        head_dim: 0,
        num_heads: 4,
        blocks_per_level: 3,
        image_size: Size::square(64),
        widths: vec![128, 256, 384, 512],
        ..guided.clone()
    };
    for (name, model, want) in [
        (
            "64x64_diffusion",
            Model {
                image_size: Size::square(64),
                widths: vec![192, 384, 576, 768],
                blocks_per_level: 3,
                classes: 1000,
                ..guided.clone()
            },
            295_904_454,
        ),
        (
            "128x128_diffusion",
            Model {
                image_size: Size::square(128),
                widths: vec![256, 256, 512, 768, 1024],
                head_dim: 0,
                num_heads: 4,
                classes: 1000,
                ..guided.clone()
            },
            421_529_606,
        ),
        ("256x256_diffusion", Model { classes: 1000, ..of_256.clone() }, 553_838_086),
        ("256x256_diffusion_uncond", of_256, 552_814_086),
        (
            "512x512_diffusion",
            Model {
                image_size: Size::square(512),
                widths: vec![128, 256, 256, 512, 512, 1024, 1024],
                time_channels: 256,
                classes: 1000,
                ..guided
            },
            558_997_638,
        ),
        (
            "cifar10_uncond_50M_500K",
            Model { image_size: Size::square(32), widths: vec![128, 256, 256, 256], ..improved.clone() },
            52_546_438,
        ),
        ("imagenet64_uncond_100M_1500K", improved.clone(), 121_063_942),
        (
            "imagenet64_cond_270M_250K",
            Model { widths: vec![192, 384, 576, 768], classes: 1000, ..improved.clone() },
            273_049_350,
        ),
        (
            "lsun_uncond_100M_1200K_bs128",
            Model {
                image_size: Size::square(256),
                widths: vec![128, 128, 256, 256, 512, 512],
                blocks_per_level: 2,
                attention_resolutions: vec![16],
                scale_shift_norm: false,
                num_heads: 1,
                ..improved
            },
            113_676_678,
        ),
    ] {
        let (_, specs) = UNet::new(&model).unwrap();
        assert_eq!(specs.count(), want, "{name}");
    }
}
