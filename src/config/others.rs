//! What other tools call our settings: openai/guided-diffusion, diffusers, lucidrains' denoising-diffusion-pytorch,
//! EDM, and the habits of training scripts at large.

use super::SETTINGS;

/// What a name of another tool leads to here.
enum Here {
    /// A setting of the same meaning.
    Setting(&'static str),
    /// A setting that is counted or written in another way; the sentence says how.
    Like(&'static str, &'static str),
    /// Something that is no setting; the clause says what there is instead.
    Instead(&'static str),
}
use Here::{Instead, Like, Setting};

/// Names in lower case with underscores.
const OTHERS: &[(&[&str], Here)] = &[
    (&["lr", "train_lr", "base_lr", "max_lr", "adam_lr", "optimizer_lr", "step_size"], Setting("learning_rate")),
    (
        &[
            "batch_size",
            "train_batch_size",
            "global_batch_size",
            "total_batch_size",
            "bs",
            "per_device_train_batch_size",
        ],
        Setting("batch"),
    ),
    (
        &[
            "epochs",
            "epoch",
            "num_epochs",
            "n_epochs",
            "max_epochs",
            "num_train_epochs",
            "train_epochs",
            "kimg",
            "duration",
        ],
        Like("steps", "steps = epochs * images / batch"),
    ),
    (
        &["num_steps", "n_steps", "max_steps", "total_steps", "train_steps", "training_steps", "train_num_steps"],
        Setting("steps"),
    ),
    (
        &[
            "num_train_steps",
            "num_training_steps",
            "n_train_steps",
            "training_iterations",
            "train_iters",
            "num_updates",
        ],
        Setting("steps"),
    ),
    (
        &["max_train_steps", "iterations", "iters", "n_iter", "n_iters", "num_iterations", "max_iter", "total_iters"],
        Setting("steps"),
    ),
    (
        &["resolution", "image_resolution", "img_size", "image_sz", "imgsize", "img_resolution", "input_size", "res"],
        Setting("image_size"),
    ),
    (&["sample_size", "size", "crop_size", "resize"], Setting("image_size")),
    (
        &["in_channels", "image_channels", "img_channels", "num_image_channels", "in_ch", "out_channels"],
        Setting("channels"),
    ),
    (
        &["block_out_channels", "model_channels", "num_channels", "base_channels", "dim", "dim_mults", "ch", "ch_mult"],
        Like("widths", "the channels of each level, as in 64,128,256"),
    ),
    (
        &["channel_mult", "channel_mults", "channel_multiplier", "hidden_dims", "base_width", "n_feat", "unet_dim"],
        Like("widths", "the channels of each level, as in 64,128,256"),
    ),
    (
        &["num_res_blocks", "layers_per_block", "n_res_blocks", "resnet_blocks", "res_blocks"],
        Setting("blocks_per_level"),
    ),
    (
        &["attn_resolutions", "attention_resolution", "attn", "attention", "attention_levels", "attn_res"],
        Setting("attention_resolutions"),
    ),
    (&["num_head_channels", "attention_head_dim", "attn_dim_head", "dim_head", "head_channels"], Setting("head_dim")),
    (&["n_heads", "heads", "attn_heads", "num_attention_heads"], Setting("num_heads")),
    (&["attn_norm_num_groups"], Setting("middle_groups")),
    (&["add_attention", "mid_attn", "middle_attn", "mid_block_type"], Like("middle_attention", "norm, bare or none")),
    (
        &["use_scale_shift_norm", "resnet_time_scale_shift", "use_scale_shift", "adagn"],
        Like("scale_shift_norm", "true or false"),
    ),
    (&["resblock_updown", "resblock_down"], Like("downsample_type", "resnet, and so upsample_type")),
    (&["resblock_up"], Like("upsample_type", "resnet")),
    (&["class_embed_type"], Like("class_embedding", "table or timestep")),
    (&["rescale_timesteps"], Like("timestep_scale", "1000 divided by timesteps")),
    (&["norm_num_groups", "num_groups", "resnet_block_groups", "gn_groups", "norm_groups"], Setting("groups")),
    (&["drop", "dropout_rate", "dropout_prob", "p_dropout"], Setting("dropout")),
    (
        &[
            "num_classes",
            "n_classes",
            "nb_classes",
            "class_cond",
            "cond",
            "num_class_embeds",
            "label_dim",
            "conditional",
        ],
        Setting("classes"),
    ),
    (&["noise_schedule", "beta_schedule", "ddpm_beta_schedule", "schedule_name"], Setting("schedule")),
    (
        &["diffusion_steps", "num_timesteps", "n_timesteps", "num_train_timesteps", "ddpm_num_steps", "t", "n_t"],
        Setting("timesteps"),
    ),
    (&["num_diffusion_timesteps", "diffusion_timesteps", "noise_steps"], Setting("timesteps")),
    (
        &["variance_type", "model_var_type", "sigma_small", "var_type", "sigma_type", "posterior_variance"],
        Setting("variance"),
    ),
    (&["random_seed", "manual_seed", "rng_seed", "global_seed"], Setting("seed")),
    (
        &[
            "gradient_accumulation_steps",
            "gradient_accumulation",
            "grad_accum",
            "gradient_accumulate_every",
            "accumulation_steps",
            "accum_steps",
            "accumulate_grad_batches",
            "grad_accum_steps",
        ],
        Setting("accumulate"),
    ),
    (
        &["gradient_checkpointing", "activation_checkpointing", "use_checkpoint", "grad_checkpoint"],
        Like("recompute", "none, cheap or blocks"),
    ),
    (
        &["microbatch", "microbatch_size", "micro_batch_size", "batch_gpu", "micro_batch"],
        Like("accumulate", "the number of micro-batches in a batch, not their size"),
    ),
    (
        &["warmup", "lr_warmup_steps", "lr_warmup", "warmup_iters", "num_warmup_steps", "n_warmup"],
        Setting("warmup_steps"),
    ),
    (&["wd", "adam_weight_decay", "l2"], Setting("weight_decay")),
    (
        &["max_grad_norm", "grad_norm", "gradient_clip", "gradient_clip_val", "clip_grad", "clip", "grad_norm_clip"],
        Setting("grad_clip"),
    ),
    (&["clip_grad_norm", "gradient_clipping", "grad_clip_norm"], Setting("grad_clip")),
    (
        &["ema", "ema_rate", "ema_max_decay", "ema_beta", "model_ema_decay", "ema_power", "use_ema", "ema_halflife"],
        Like("ema_decay", "a number below 1, as in 0.999; 0 is none"),
    ),
    (
        &[
            "random_flip",
            "horizontal_flip",
            "hflip",
            "mirror",
            "xflip",
            "augment_horizontal_flip",
            "random_horizontal_flip",
            "augment",
        ],
        Setting("flip"),
    ),
    (&["log_interval", "logging_steps", "log_freq", "print_every", "log_step", "tick"], Setting("log_every")),
    (
        &["eval_every", "val_every", "eval_interval", "validation_steps", "eval_steps", "val_interval"],
        Setting("validate_every"),
    ),
    (
        &["sample_interval", "save_images_epochs", "sample_freq", "save_image_every", "snap", "sample_step"],
        Setting("sample_every"),
    ),
    (
        &[
            "save_interval",
            "save_every",
            "save_steps",
            "checkpointing_steps",
            "save_freq",
            "checkpoint_interval",
            "dump",
        ],
        Setting("checkpoint_every"),
    ),
    (&["save_and_sample_every", "save_step", "save_model_epochs", "ckpt_every"], Setting("checkpoint_every")),
    (&["checkpoints_total_limit", "save_total_limit", "keep_last", "max_checkpoints"], Setting("keep_checkpoints")),
    (&["val_split", "validation_split", "test_split", "val_fraction", "val_size", "holdout"], Setting("held_out")),
    (
        &[
            "data_dir",
            "data_path",
            "dataset",
            "train_data_dir",
            "dataset_name",
            "folder",
            "image_dir",
            "dataroot",
            "path",
        ],
        Setting("data"),
    ),
    (
        &["mixed_precision", "fp16", "bf16", "use_fp16", "use_bf16", "amp", "dtype", "half"],
        Like("precision", "f32, tf32 or bf16"),
    ),
    (
        &[
            "out",
            "output_dir",
            "outdir",
            "out_dir",
            "logdir",
            "log_dir",
            "save_dir",
            "results_folder",
            "workdir",
            "name",
        ],
        Instead("there is --out RUN"),
    ),
    (
        &["resume", "resume_checkpoint", "resume_from_checkpoint", "ckpt", "checkpoint", "load"],
        Instead("there is --resume RUN, or --init MODEL to start from given weights"),
    ),
    (&["pretrained", "finetune", "pretrained_model_name_or_path", "transfer"], Instead("there is --init MODEL")),
    (
        &["device", "gpu", "gpus", "gpu_id", "cuda", "num_gpus", "n_gpu", "accelerator"],
        Instead("there is --device cuda"),
    ),
    (&["config", "cfg", "config_file", "yaml"], Instead("there is --config FILE")),
    (&["class_names"], Instead("the classes are named by the data")),
    (
        &["trained_betas"],
        Instead("betas one by one come from a file, with betas=FILE.npy, or from a model, with --init"),
    ),
    (
        &["betas"],
        Instead("there is --set betas=FILE.npy, a beta for each timestep; Adam's are the paper's: 0.9, 0.999"),
    ),
    (
        &["loss_type", "use_kl", "rescale_learned_sigmas", "objective", "loss_weighting", "weighting_scheme"],
        Like("loss", "simple, vlb, hybrid, min_snr or weighted"),
    ),
    (&["min_snr_loss_weight"], Like("loss", "loss = min_snr")),
    (&["snr_gamma", "gamma", "min_snr_k"], Setting("min_snr_gamma")),
    (&["vb_weight", "lambda_vlb", "vlb_loss_weight", "vb_loss_weight"], Setting("vlb_weight")),
    (
        &["schedule_sampler", "timestep_sampler", "t_sampler", "time_sampling", "timestep_bias_strategy"],
        Like("timestep_sampling", "uniform, stratified or importance"),
    ),
    (
        &["cond_drop_prob", "class_dropout_prob", "drop_prob", "p_uncond", "uncond_prob", "cfg_dropout", "drop_rate"],
        Setting("label_dropout"),
    ),
    (&["preset"], Instead("there is --preset NAME")),
    (
        &["sampler", "eta", "num_inference_steps", "sampling_timesteps", "timestep_respacing", "use_ddim"],
        Instead("it belongs to sampling: see ddpm-cuda sample --help"),
    ),
    (
        &[
            "lr_schedule",
            "lr_scheduler",
            "scheduler_type",
            "lr_decay",
            "lr_anneal_steps",
            "cosine_decay",
            "lr_decay_steps",
        ],
        Instead(
            "learning_rate rises over warmup_steps, stays, and falls over the last steps if cooldown, their share, is set",
        ),
    ),
    (&["optimizer", "optim", "opt"], Instead("it is Adam, with learning_rate and weight_decay")),
    (
        &["adam_beta1", "adam_beta2", "beta1", "beta2", "adam_epsilon", "adam_eps", "momentum"],
        Instead("Adam's are the paper's: 0.9, 0.999, 1e-8"),
    ),
    (
        &["num_workers", "workers", "dataloader_num_workers", "n_workers", "threads", "num_threads", "n_cpu"],
        Instead("all cores are used; the environment variable RAYON_NUM_THREADS limits them"),
    ),
];

/// The sentence for a key that is no setting: what another tool's name leads to, or the nearest of ours, but no guess
/// when none is near.
pub(super) fn no_setting(key: &str) -> String {
    let name = plain(key);
    let lead = known(&name).or_else(|| nearest(&name).map(|own| format!("the nearest is '{own}'")));
    let lead = lead.unwrap_or("'ddpm-cuda train --help' lists them all".into());
    format!("there is no setting '{key}'; {lead}")
}

/// The sentence for a flag of `train` that does not exist but names a setting, in our words or another tool's, or with
/// a slip unless the flag is `like_another`; `None` for any other.
pub fn no_flag(flag: &str, like_another: bool) -> Option<String> {
    let name = plain(flag);
    if SETTINGS.iter().any(|s| s.key == name) {
        return Some(format!("there is no flag {flag}; it is a setting: --set {name}=VALUE"));
    }
    if let Some(lead) = known(&name) {
        return Some(format!("there is no flag {flag}; {lead}, see 'ddpm-cuda train --help'"));
    }
    let near = nearest(&name).filter(|_| !like_another);
    near.map(|near| format!("there is no flag {flag}; the nearest setting is '{near}': --set {near}=VALUE"))
}

/// A name as [`OTHERS`] has it.
fn plain(name: &str) -> String {
    name.trim_start_matches('-').replace('-', "_").to_lowercase()
}

/// Where the name of a setting in another spelling, or a name of another tool leads: the end of a sentence.
fn known(name: &str) -> Option<String> {
    if let Some(own) = SETTINGS.iter().find(|s| s.key == name) {
        return Some(format!("it is spelled '{}'", own.key));
    }
    let (_, here) = OTHERS.iter().find(|(names, _)| names.contains(&name))?;
    Some(match here {
        Setting(own) => format!("here it is '{own}'"),
        Like(own, how) => format!("here it is '{own}' ({how})"),
        Instead(what) => what.to_string(),
    })
}

/// The setting that is one or two slips away; more in a short name make another word of it.
fn nearest(name: &str) -> Option<&'static str> {
    let (slips, own) = SETTINGS.iter().map(|s| (strsim::damerau_levenshtein(s.key, name), s.key)).min()?;
    (slips <= (name.len() / 3).min(2)).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_leads_to_a_setting_and_is_none() {
        let mut seen = std::collections::BTreeSet::new();
        for (names, here) in OTHERS {
            for name in *names {
                assert!(seen.insert(name), "{name} stands twice");
                assert_eq!(name.to_lowercase().replace('-', "_"), **name);
                assert!(SETTINGS.iter().all(|s| s.key != *name), "{name} is a setting");
            }
            if let Setting(own) | Like(own, _) = here {
                assert!(SETTINGS.iter().any(|s| s.key == *own), "{own} is a setting");
            }
        }
    }

    #[test]
    fn nothing_near_is_not_guessed() {
        for (name, want) in [
            ("lr", Some("learning_rate")),
            ("LR", Some("learning_rate")),
            ("batch-size", Some("batch")),
            ("image-size", Some("image_size")),
            ("lerning_rate", Some("learning_rate")),
            ("widhts", Some("widths")),
            ("flips", Some("flip")),
        ] {
            let sentence = no_setting(name);
            assert!(sentence.contains(&format!("'{}'", want.unwrap_or_default())), "{sentence}");
        }
        for name in ["x", "foo", "temperature", "style", "guidance_scale", "lr_schedule", "prompt", "steep_and_wide"] {
            let sentence = no_setting(name);
            assert!(SETTINGS.iter().all(|s| !sentence.contains(&format!("'{}'", s.key))), "{sentence}");
        }
    }
}
