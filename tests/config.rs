//! Settings: presets, `--set`, `config.toml`, and the messages for settings that cannot work.

use std::path::PathBuf;

use ddpm_cuda::config::{Config, Preset, SETTINGS, Size};
use ddpm_cuda::diffusion::{Kind, Sampling, Schedule, Variance};

fn sets(assignments: &[&str]) -> Vec<String> {
    assignments.iter().map(|s| s.to_string()).collect()
}

fn built(assignments: &[&str]) -> Config {
    Config::build(None, None, &sets(assignments)).unwrap().0
}

/// The message with which `--set` or the validation after it refuses; checks that it exits with 2.
#[track_caller]
fn refusal(assignments: &[&str]) -> String {
    let error = Config::build(None, None, &sets(assignments)).and_then(|(c, _)| c.validate()).expect_err("refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    std::fs::write(&path, text).unwrap();
    (folder, path)
}

#[track_caller]
fn file_refusal(text: &str) -> String {
    let (_folder, path) = file(text);
    let error = Config::read(&path).expect_err("refused");
    assert_eq!(error.exit_code(), 1, "{error}");
    let sentence = error.to_string();
    assert!(sentence.starts_with(&path.display().to_string()), "{sentence}");
    assert!(!sentence.contains('\n'), "one sentence: {sentence}");
    sentence
}

#[test]
fn presets_are_valid_and_are_the_papers() {
    for preset in [Preset::Mnist, Preset::Cifar10, Preset::CelebaHq256] {
        Config::preset(preset).validate().unwrap();
        assert_eq!(preset.to_string().parse::<Preset>().unwrap(), preset);
    }
    let c = Config::preset(Preset::Cifar10);
    assert_eq!((c.model.widths, c.model.dropout, c.batch, c.flip), (vec![128, 256, 256, 256], 0.1, 128, true));
    assert_eq!((c.learning_rate, c.warmup_steps, c.diffusion.variance), (2e-4, 5000, Variance::FixedLarge));
    let c = Config::preset(Preset::CelebaHq256);
    assert_eq!((c.model.widths, c.model.dropout, c.batch), (vec![128, 128, 256, 256, 512, 512], 0.0, 64));
    assert_eq!(
        (c.learning_rate, c.diffusion.variance, c.model.image_size),
        (2e-5, Variance::FixedSmall, Size::square(256))
    );
}

#[test]
fn every_setting_survives_the_file() {
    for preset in [Preset::Mnist, Preset::Cifar10, Preset::CelebaHq256] {
        let config = Config::preset(preset);
        let (_folder, path) = file(&config.to_toml());
        assert_eq!(Config::read(&path).unwrap(), config);
    }
    let changed = built(&[
        "data=a folder/with \"quotes\" # and more",
        "init=/models/a model",
        "held_out=0.25",
        "background=#ff8000",
        "on_bad_image=skip",
        "image_size=28x20",
        "channels=2",
        "widths=16,32,48",
        "blocks_per_level=3",
        "attention_resolutions=14,7",
        "middle_attention=bare",
        "head_dim=8",
        "num_heads=2",
        "groups=16",
        "middle_groups=8",
        "norm_eps=1e-5",
        "scale_shift_norm=true",
        "downsample_type=resnet",
        "upsample_type=resnet",
        "dropout=0.3",
        "classes=10",
        "class_embedding=timestep",
        "downsample_padding=1",
        "freq_shift=0",
        "flip_sin_to_cos=true",
        "time_channels=64",
        "timestep_scale=0.25",
        "schedule=quadratic",
        "timesteps=4000",
        "beta_start=0.0002",
        "beta_end=0.03",
        "zero_snr=true",
        "prediction=v",
        "variance=learned_range",
        "loss=hybrid",
        "vlb_weight=0.01",
        "min_snr_gamma=3",
        "timestep_sampling=stratified",
        "label_dropout=0.2",
        "precision=bf16",
        "seed=18446744073709551615",
        "steps=1e5",
        "batch=12",
        "accumulate=3",
        "recompute=cheap",
        "learning_rate=0.00012345678901234567",
        "warmup_steps=7",
        "cooldown=0.75",
        "weight_decay=0.01",
        "grad_clip=0",
        "ema_decay=0.5",
        "flip=true",
        "log_every=1",
        "validate_every=2",
        "sample_every=3",
        "checkpoint_every=4",
        "keep_checkpoints=5",
    ]);
    // Each setting above differs from the preset, so that neither reader nor writer can omit one.
    let preset = Config::preset(Preset::Mnist);
    for ((key, new), (_, old)) in changed.entries().zip(preset.entries()) {
        assert_ne!(new, old, "{key} is changed by this test");
    }
    assert_eq!(changed.diffusion.schedule, Kind::Quadratic);
    assert_eq!((changed.seed, changed.steps), (u64::MAX, 100_000));
    let (_folder, path) = file(&changed.to_toml());
    assert_eq!(Config::read(&path).unwrap(), changed);
}

/// What is kept in the file without being a setting.
#[test]
fn names_and_betas_survive_the_file() {
    let mut config = Config::preset(Preset::Cifar10);
    config.model.classes = 3;
    config.class_names = ["cat", "a \"dog\"", "\u{732b} # \n"].map(String::from).into();
    config.diffusion.timesteps = 3;
    config.diffusion.trained_betas = vec![1e-5, 0.1, 1.0 / 3.0];
    config.validate().unwrap();
    let (_folder, path) = file(&config.to_toml());
    assert_eq!(Config::read(&path).unwrap(), config);
    // Betas one by one leave these settings without meaning.
    for (assignment, says) in [
        ("schedule=cosine", "schedule = \"cosine\", but betas from 1.000e-5 to 3.333e-1 are given one by one"),
        ("timesteps=4", "timesteps = 4, but 3 betas are given one by one, as trained_betas or by betas=FILE.npy"),
        ("beta_start=0.1", "beta_start = 0.1, but betas from"),
        ("beta_end=0.1", "beta_end = 0.1, but betas from"),
    ] {
        let error = Config::build(None, Some(&path), &sets(&[assignment])).expect_err("refused");
        assert!(error.to_string().contains(says), "{error}");
    }
    assert_eq!(Config::build(None, Some(&path), &sets(&["timesteps=3"])).unwrap().0, config);
    assert_eq!(Config::build(None, Some(&path), &sets(&["variance=fixed_small"])).unwrap().0.diffusion.timesteps, 3);
    assert!(file_refusal("class_names = 3").ends_with("class_names is no list of names"));
    assert!(file_refusal("class_names = [3]").ends_with("class_names is no list of names"));
    assert!(file_refusal("trained_betas = [\"a\"]").ends_with("trained_betas is no list of numbers"));
    let refused = |config: &Config| config.validate().expect_err("refused").to_string();
    config.class_names.push("one more".into());
    assert!(refused(&config).contains("class_names holds 4 names for classes = 3"));
    config.class_names.clear();
    config.diffusion.timesteps = 4;
    assert!(refused(&config).contains("trained_betas holds 3 numbers for 4 timesteps"));
}

/// Betas from a file take the place of the named schedule and stay in the file of the run.
#[test]
fn betas_are_read_from_an_array() {
    use npyz::WriterBuilder;
    fn write<T: npyz::AutoSerialize>(path: &std::path::Path, shape: &[u64], numbers: Vec<T>) {
        let to = std::fs::File::create(path).unwrap();
        let mut writer = npyz::WriteOptions::new().default_dtype().shape(shape).writer(to).begin_nd().unwrap();
        writer.extend(numbers).unwrap();
        writer.finish().unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("betas.npy");
    let assignment = format!("betas={}", path.display());
    let betas = vec![1e-4, 0.1, 1.0 / 3.0];
    write(&path, &[3], betas.clone());
    let config = built(&[&assignment]);
    assert_eq!((&config.diffusion.trained_betas, config.diffusion.timesteps), (&betas, 3));
    let (_folder, file_of_run) = file(&config.to_toml());
    assert_eq!(Config::read(&file_of_run).unwrap(), config);
    let (_folder, with_betas) = file(&format!("betas = \"{}\"\n", path.display()));
    assert_eq!(Config::read(&with_betas).unwrap().diffusion, config.diffusion);
    // What is given beside them says the same or is refused, before and after them.
    for (beside, says) in [
        ("timesteps=4", "timesteps = 4, but 3 betas are given one by one"),
        ("schedule=cosine", "schedule = \"cosine\", but betas from 1.000e-4 to 3.333e-1 are given one by one"),
        ("beta_start=0.3", "beta_start = 0.3, but betas from 1.000e-4 to 3.333e-1 are given one by one"),
    ] {
        for order in [[&assignment[..], beside], [beside, &assignment]] {
            let sentence = refusal(&order);
            assert!(sentence.contains(says), "{order:?}: {sentence}");
        }
        let in_file = beside.replace("cosine", "\"cosine\"");
        assert!(file_refusal(&format!("betas = \"{}\"\n{in_file}\n", path.display())).contains(says), "{beside}");
    }
    for order in [[&assignment[..], "timesteps=3"], ["timesteps=3", &assignment]] {
        assert_eq!(built(&order).diffusion, config.diffusion);
    }
    let cosine = Schedule::new(Kind::Cosine, 50).unwrap();
    write(&path, &[50], cosine.betas().iter().map(|&beta| beta as f32).collect());
    for order in [[&assignment[..], "schedule=cosine"], ["schedule=cosine", &assignment]] {
        assert_eq!(built(&order).diffusion.timesteps, 50);
    }
    // They take the place of the schedule of a file.
    let (_folder, learned) = file("schedule = \"learned\"\nloss = \"vlb\"\n");
    let replaced = Config::build(None, Some(&learned), &sets(&[&assignment])).unwrap().0;
    replaced.validate().unwrap();
    write(&path, &[2], vec![0.5f32, 0.25]);
    assert_eq!(built(&[&assignment]).diffusion.trained_betas, [0.5, 0.25]);
    let learned = refusal(&["schedule=learned", "loss=vlb", &assignment]);
    assert!(learned.contains("schedule = \"learned\", but betas from 5.000e-1 to 2.500e-1 are given"), "{learned}");
    write(&path, &[1, 2], vec![0.5, 0.25]);
    assert!(refusal(&[&assignment]).contains("has 2 dimensions; a list of betas has one"));
    write(&path, &[2], vec![1i64, 2]);
    assert!(refusal(&[&assignment]).contains("f32 or f64 is expected"));
    write(&path, &[2], vec![0.5, 1.5]);
    assert!(refusal(&[&assignment]).contains("beta at timestep 1 is 1.5: must lie between 0 and 1"));
    std::fs::write(&path, b"\x93NUMPY").unwrap();
    assert!(refusal(&[&assignment]).contains("is damaged"));
}

/// The table of classes has a row more for the null class: with label_dropout, and where a model has it.
#[test]
fn the_null_class_follows_from_label_dropout() {
    let config = built(&["classes=10", "label_dropout=0.1"]);
    assert_eq!((config.model.null_class, config.model.class_rows()), (true, 11));
    let (_folder, path) = file(&config.to_toml());
    assert_eq!(Config::read(&path).unwrap(), config);
    assert!(!built(&["classes=10", "label_dropout=0.1", "label_dropout=0"]).model.null_class);
    let mut of_a_model = built(&["classes=10"]);
    of_a_model.model.null_class = true;
    let (_folder, path) = file(&of_a_model.to_toml());
    assert_eq!(Config::read(&path).unwrap(), of_a_model);
    assert!(file_refusal("null_class = 3").ends_with("null_class is neither true nor false"));
}

#[test]
fn later_sources_win() {
    let (_folder, path) = file("preset = \"cifar10\"\nbatch = 16\nwidths = \"64,64\"\nattention_resolutions = [16]\n");
    let assignments = sets(&["batch=8", "image_size=0", "channels=0"]);
    let (config, given) = Config::build(None, Some(&path), &assignments).unwrap();
    assert_eq!((config.preset, config.batch, config.model.widths.clone()), (Preset::Cifar10, 8, vec![64, 64]));
    assert_eq!((config.model.image_size, config.model.channels), (Size::DATA, 0));
    config.validate().expect("an open size is judged when the data is known");
    let chosen: Vec<&str> = SETTINGS.iter().map(|s| s.key).filter(|key| given.has(key)).collect();
    assert_eq!(chosen, ["image_size", "channels", "widths", "attention_resolutions", "batch"]);
    let config = Config::build(Some(Preset::Mnist), Some(&path), &[]).unwrap().0;
    assert_eq!(
        (config.preset, config.batch, config.model.channels),
        (Preset::Mnist, 16, 1),
        "--preset beats the file's"
    );
    assert!(built(&["attention_resolutions="]).model.attention_resolutions.is_empty());
}

#[test]
fn unknown_keys_name_the_nearest() {
    assert_eq!(
        refusal(&["lerning_rate=1"]),
        "--set lerning_rate=1: there is no setting 'lerning_rate'; the nearest is 'learning_rate'"
    );
    assert!(refusal(&["width=1"]).ends_with("the nearest is 'widths'"));
    assert!(refusal(&["imagesize=1"]).ends_with("the nearest is 'image_size'"));
    assert!(refusal(&["preset=mnist"]).ends_with("there is no setting 'preset'; there is --preset NAME"));
    assert!(file_refusal("batchs = 3").ends_with("there is no setting 'batchs'; the nearest is 'batch'"));
}

/// What other tools call a setting leads to ours, and a name that resembles nothing is not guessed at.
#[test]
fn other_tools_names_lead_to_ours() {
    let cases = [
        ("lr=1e-4", "there is no setting 'lr'; here it is 'learning_rate'"),
        ("batch_size=8", "here it is 'batch'"),
        ("epochs=3", "here it is 'steps' (steps = epochs * images / batch)"),
        ("ema=0.99", "here it is 'ema_decay' (a number below 1, as in 0.999; 0 is none)"),
        ("image-size=32", "it is spelled 'image_size'"),
        ("Image_Size=32", "it is spelled 'image_size'"),
        ("num_classes=10", "here it is 'classes'"),
        ("resolution=64", "here it is 'image_size'"),
        ("gradient_accumulation_steps=2", "here it is 'accumulate'"),
        ("microbatch=2", "here it is 'accumulate' (the number of micro-batches in a batch, not their size)"),
        ("dim_mults=1,2,4", "here it is 'widths' (the channels of each level, as in 64,128,256)"),
        ("lr_schedule=cosine", "stays, and falls over the last steps if cooldown, their share, is set"),
        ("resblock_updown=true", "here it is 'downsample_type' (resnet, and so upsample_type)"),
        ("output_dir=x", "there is --out RUN"),
        ("prompt=a cat", "there is no setting 'prompt'; 'ddpm-cuda train --help' lists them all"),
    ];
    for (assignment, want) in cases {
        let sentence = refusal(&[assignment]);
        assert!(sentence.ends_with(want), "{assignment}: {sentence}");
    }
}

#[test]
fn the_preset_follows_from_the_data() {
    let preset = |assignments: &[&str]| built(assignments).preset;
    assert_eq!(
        [preset(&[]), preset(&["data=mnist"]), preset(&["data=photos"])],
        [Preset::Mnist, Preset::Mnist, Preset::Auto]
    );
    let (_folder, path) = file("data = \"photos\"\nbatch = 16\n");
    assert_eq!(Config::read(&path).unwrap().preset, Preset::Auto);
    let build = |preset, assignments: &[&str]| Config::build(preset, Some(&path), &sets(assignments)).unwrap().0;
    assert_eq!(build(None, &["data=mnist"]).preset, Preset::Mnist, "--set beats the file");
    assert_eq!(build(Some(Preset::Cifar10), &[]).preset, Preset::Cifar10);
    let names = ["data=a/photos", "data=a/photos.npz", "data=/"].map(|set| built(&[set]).run_name());
    assert_eq!(names, ["photos", "photos", "auto"]);
    assert_eq!(built(&[]).run_name(), "mnist");
}

/// An attention level that a preset filled in goes to the nearest level there is; one that somebody asked for does not.
#[test]
fn attention_of_a_preset_goes_to_the_nearest_level() {
    let cases: [(&str, &[usize], &[usize]); 7] = [
        ("28", &[7], &[7]),
        ("32", &[7], &[8]),
        ("64", &[16], &[16]),
        ("48", &[16], &[12]),
        ("20", &[7], &[5]),
        ("128", &[7], &[]),
        ("32", &[7, 9], &[8]),
    ];
    for (size, before, after) in cases {
        let mut model = built(&[&format!("image_size={size}")]).model;
        model.attention_resolutions = before.to_vec();
        assert_eq!(model.adapt_attention(), before != after, "{before:?} at {size}");
        assert_eq!(model.attention_resolutions, after, "{before:?} at {size}");
        model.validate().unwrap();
    }
    assert!(refusal(&["image_size=32", "attention_resolutions=7"]).contains("attention_resolutions holds 7"));
}

#[test]
fn values_that_cannot_be_read() {
    let cases = [
        ("batch=-1", "batch = -1: a whole number of 0 or more is expected"),
        ("batch=1.5", "a whole number of 0 or more is expected"),
        ("steps=5000000000", "the largest number possible is 4294967295"),
        ("widths=32,,64", "whole numbers with commas between are expected, as in 32,64,64"),
        ("widths=a", "as in 32,64,64"),
        ("image_size=28x", "28x20 (rows x columns)"),
        ("image_size=28x0", "a size between 1 and 65536"),
        ("learning_rate=nan", "a number is expected"),
        ("learning_rate=inf", "a number is expected"),
        ("flip=yes", "true or false is expected"),
        ("background=blue", "background = blue: white, black, grey or #rrggbb is expected, as in #ff8000"),
        ("background=#12345", "white, black, grey or #rrggbb is expected"),
        ("background=#+12345", "white, black, grey or #rrggbb is expected"),
        ("schedule=cosin", "one of linear, cosine, quadratic, constant, sigmoid, learned is expected"),
        ("batch", "there is no '='; write --set KEY=VALUE"),
    ];
    for (assignment, want) in cases {
        let sentence = refusal(&[assignment]);
        assert!(sentence.contains(want), "{assignment}: {sentence}");
    }
    assert!(file_refusal("batch = ").contains("line 1 is not TOML"));
    assert!(file_refusal("steps = 1\nbatch 3\n").contains("line 2 is not TOML"));
    assert!(file_refusal("[model]\nwidths = [1]").contains("[model] is a table; settings stand at the top level"));
    assert!(file_refusal("steps = 2026-01-01").contains("is a date"));
    assert!(file_refusal("preset = \"minst\"").contains("one of mnist, cifar10, celebahq256, auto is expected"));
    let missing = Config::read(std::path::Path::new("no/such/config.toml")).unwrap_err();
    assert!(missing.to_string().starts_with("no/such/config.toml: cannot be read"), "{missing}");
}

#[test]
fn networks_that_cannot_be_built() {
    let cases: [(&[&str], &str); 60] = [
        (
            &["image_size=30"],
            "image_size = 30x30 cannot be halved 2 times, which the 3 levels of widths = 32,32,64 ask for; 32x32 would do",
        ),
        (&["image_size=28x21"], "28x24 would do"),
        (&["groups=5"], "groups = 5 does not divide the width 32; groups = 4 divides all of 32,32,64"),
        (&["groups=0"], "groups = 0 must be at least 1"),
        (&["widths="], "widths is empty"),
        (&["widths=32,0,64"], "widths = 0 must be at least 1"),
        (&["widths=3,6,6", "groups=3"], "it must be even and at least 4"),
        (&["head_dim=24"], "head_dim = 24 does not divide the width 64 of the attention at 7x7; 16 would"),
        (
            &["attention_resolutions=16"],
            "attention_resolutions holds 16, but the longer sides of the levels of image_size = 28x28 are 28,14,7",
        ),
        (&["num_heads=3"], "num_heads = 3 does not divide the width 64 of the attention at 7x7; 2 would"),
        (&["num_heads=2", "head_dim=8"], "head_dim = 8 and num_heads = 2 exclude each other; leave one at 0"),
        (&["middle_groups=7"], "middle_groups = 7 does not divide the width 64 of the middle; 4 would"),
        (&["class_embedding=timestep"], "class_embedding = timestep: there are no classes; give their number"),
        (&["time_channels=3"], "time_channels = 3 must be even and at least 4, or 0"),
        (&["timestep_scale=0"], "timestep_scale = 0 must be above 0; 1 leaves timesteps as they are"),
        (&["num_heads=4000000000"], "num_heads holds 4000000000; the largest"),
        (&["blocks_per_level=0"], "blocks_per_level = 0"),
        (&["dropout=1"], "dropout = 1"),
        (&["norm_eps=0"], "norm_eps = 0"),
        (&["norm_eps=1e-60"], "norm_eps = 1e-60"),
        (&["norm_eps=1e39"], "norm_eps = 1e39"),
        (&["channels=65537"], "channels holds 65537; the largest possible is 65536"),
        (&["groups=4000000000"], "groups holds 4000000000; the largest"),
        (&["head_dim=4000000000"], "head_dim holds 4000000000; the largest"),
        (&["widths=4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,4", "groups=4"], "widths holds 18 levels; no image can be halved"),
        (&["beta_end=0.01"], "beta_end = 0.01: the cosine schedule does not have it, so leave it at 0"),
        (&["schedule=constant", "beta_start=0.01"], "beta_start = 0.01: the constant schedule does not have it"),
        (&["schedule=linear", "beta_end=1"], "beta_end is 1: must lie between 0 and 1"),
        (&["schedule=linear", "beta_start=-0.1"], "beta_start is -0.1: must lie between 0 and 1"),
        (&["schedule=linear", "timesteps=10"], "timesteps is 10: the linear schedule needs at least 21"),
        (&["timesteps=2000000"], "timesteps is 2000000: must be from 2 to 1000000"),
        (&["class_names=cat"], "the classes are named by the data"),
        (&["trained_betas=0.1"], "with betas=FILE.npy, or from a model, with --init"),
        (&["downsample_padding=2"], "downsample_padding = 2 must be 0 (right and bottom) or 1"),
        (&["freq_shift=2"], "freq_shift = 2 must be 0 or 1"),
        (&["timesteps=1"], "timesteps = 1 must be at least 2"),
        (
            &["batch=10", "accumulate=4"],
            "accumulate = 4 does not divide batch = 10; the micro-batches must be equal, as with accumulate = 2",
        ),
        (&["learning_rate=0"], "learning_rate = 0 must be above 0"),
        (&["variance=learned_range"], "loss = simple: it does not depend on the variance"),
        (&["variance=learned", "loss=min_snr"], "loss = min_snr: it does not depend on the variance"),
        (&["loss=hybrid"], "loss = hybrid: its bound trains the variance alone"),
        (&["loss=min_snr", "prediction=v", "zero_snr=true"], "where sampling starts, has weight 0 and stays untrained"),
        (
            &["loss=vlb", "prediction=x0", "zero_snr=true"],
            "where sampling starts, has next to no weight and stays untrained",
        ),
        (
            &["prediction=mu", "zero_snr=true"],
            "prediction = mu: with zero terminal SNR next to nothing of x_0 is in the mean",
        ),
        (&["loss=min_snr", "min_snr_gamma=0"], "min_snr_gamma = 0 must be above 0"),
        (&["vlb_weight=-1"], "vlb_weight = -1 must be above 0"),
        (&["label_dropout=0.1"], "label_dropout = 0.1: the network has no classes to leave out"),
        (&["label_dropout=1", "classes=10"], "label_dropout = 1 must be at least 0 and below 1"),
        (
            &["prediction=mu", "precision=bf16"],
            "prediction = mu with precision = bf16: a mean differs from x_t by less",
        ),
        (&["schedule=learned"], "schedule = learned with loss = simple: only the bound says which schedule is better"),
        (
            &["schedule=learned", "loss=vlb", "timestep_sampling=importance"],
            "timestep_sampling = importance: with schedule = learned the last losses are those of other schedules",
        ),
        (
            &["schedule=learned", "loss=vlb", "prediction=v", "zero_snr=true"],
            "zero_snr = true: with schedule = learned the bound finds where the schedule ends",
        ),
        (&["schedule=learned", "beta_end=0.01"], "beta_end = 0.01: the learned schedule does not have it"),
        (&["betas=0.9,0.999"], "a .npy file with a beta for each timestep is expected"),
        (&["betas=no/such.npy"], "betas = no/such.npy: no/such.npy cannot be read"),
        (&["loss_type=mse"], "here it is 'loss'"),
        (&["schedule_sampler=uniform"], "here it is 'timestep_sampling'"),
        (&["p_uncond=0.1"], "here it is 'label_dropout'"),
        (&["ema_decay=1"], "ema_decay = 1 must be at least 0 and below 1"),
        (&["held_out=0.6"], "held_out = 0.6"),
    ];
    for (assignments, want) in cases {
        let sentence = refusal(assignments);
        assert!(sentence.contains(want), "{assignments:?}: {sentence}");
    }
    // More levels than an integer has bits.
    let many = format!("widths={}", vec!["32"; 70].join(","));
    assert!(refusal(&[&many]).contains("widths holds 70 levels; no image can be halved more than 16 times"));
}

#[test]
fn keys_are_the_contract() {
    let contract = "image_size channels widths blocks_per_level attention_resolutions head_dim groups dropout classes schedule \
        timesteps learning_rate warmup_steps weight_decay grad_clip ema_decay accumulate flip log_every validate_every \
        sample_every checkpoint_every keep_checkpoints";
    for key in contract.split_whitespace() {
        assert!(SETTINGS.iter().any(|s| s.key == key), "{key} is a setting");
    }
}

#[test]
fn backgrounds_have_names_or_digits() {
    let spelled = |text: &str| {
        let mut config = Config::preset(Preset::Mnist);
        config.set("background", text).unwrap();
        config.background
    };
    for (text, rgb, written) in [
        ("white", [255; 3], "white"),
        ("Black", [0; 3], "black"),
        ("gray", [128; 3], "grey"),
        ("#FFFFFF", [255; 3], "white"),
        ("#ff8000", [255, 128, 0], "#ff8000"),
    ] {
        assert_eq!((spelled(text).0, &*spelled(text).to_string()), (rgb, written), "{text}");
    }
}

#[test]
fn a_classifier_draws_no_timesteps_by_importance() {
    let mut config = Config::preset(Preset::Mnist).into_classifier();
    (config.model.classes, config.timestep_sampling) = (10, Sampling::Importance);
    let sentence = config.validate().expect_err("refused").to_string();
    assert!(sentence.starts_with("timestep_sampling = importance: a classifier's loss has no weights"), "{sentence}");
    config.timestep_sampling = Sampling::Stratified;
    config.validate().expect("possible");
}

/// A schedule is learned with the bound; a classifier takes that of its model.
#[test]
fn a_learned_schedule_needs_the_bound() {
    let config = built(&["schedule=learned", "loss=vlb", "timestep_sampling=stratified", "timesteps=10"]);
    config.validate().expect("possible");
    assert_eq!(config.diffusion.noise_schedule().unwrap().len(), 10);
    let mut classifier = config.into_classifier();
    classifier.model.classes = 10;
    let sentence = classifier.validate().expect_err("refused").to_string();
    assert!(sentence.starts_with("schedule = learned: a classifier learns none; give that of the model"), "{sentence}");
}
