//! The configurations of a model folder of diffusers: network, scheduler, pipeline, index of the weights' shards.

#![no_main]

use ddpm_cuda::checkpoint;
use ddpm_cuda::device::Device;
use ddpm_cuda_fuzz::{Seeds, assert_sentence, bundle, file, files, offer, read, scratch};
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    static SAVED: OnceLock<Vec<u8>> = OnceLock::new();
    let weights = SAVED.get_or_init(|| read(&ddpm_cuda_fuzz::checkpoint().join("unet").join(WEIGHTS)));
    let index = format!("model/unet/{WEIGHTS}.index.json");
    let scheduler = "model/scheduler/scheduler_config.json";
    files(bytes, &["model/unet/config.json", scheduler, "model/model_index.json", &index]);
    // With an index the weights lie in the shard that the seed's index names.
    let whole = scratch().join("model/unet").join(WEIGHTS);
    if scratch().join(&index).exists() {
        let _ = std::fs::remove_file(whole);
        file("model/unet/diffusion_pytorch_model-00001-of-00001.safetensors", weights);
    } else {
        file(&format!("model/unet/{WEIGHTS}"), weights);
    }
    match checkpoint::load(&Device::cpu(), &scratch().join("model")) {
        Err(error) => assert_sentence(&error),
        Ok(loaded) => {
            loaded.config.model.validate().expect("a network that was built");
            loaded.config.diffusion.validate().expect("a process that can be sampled");
            let count = loaded.params.specs().count();
            assert!(4 * count <= weights.len(), "{count} weights of a file of {} bytes", weights.len());
        }
    }
});

fn seeds() -> Seeds {
    let saved = ddpm_cuda_fuzz::checkpoint();
    let files =
        ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"].map(|f| read(&saved.join(f)));
    let [unet, scheduler, pipeline] = files.each_ref().map(Vec::as_slice);
    let index = br#"{"metadata":{"total_size":4},"weight_map":{"conv_in.weight":"diffusion_pytorch_model-00001-of-00001.safetensors"}}"#;
    let other = br#"{"_class_name":"DDIMScheduler","beta_start":0.001,"beta_end":0.01,"trained_betas":[0.1,0.2]}"#;
    let inputs = vec![
        unet.to_vec(),
        bundle(&[unet, scheduler, pipeline]),
        bundle(&[unet, scheduler, pipeline, index]),
        bundle(&[unet, other]),
        b"{}".to_vec(),
    ];
    // Every key of the files, and values to give them.
    let text = files.concat();
    let text = String::from_utf8_lossy(&text);
    let keys = text.split('"').skip(1).step_by(2).map(|key| format!("\"{key}\""));
    let values =
        ["null", "true", "[]", "{}", "1e308", "-1", "0.5", "1000000000", "4294967295", "4294967296", "\"\\n\""];
    let mut words: Vec<Vec<u8>> = keys.chain(values.map(String::from)).map(String::into_bytes).collect();
    words.push(bundle(&[b"", b""]));
    words.sort();
    words.dedup();
    Seeds { inputs, words }
}
