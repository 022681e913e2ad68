//! The weights of a model and the state of a training run.

#![no_main]

use ddpm_cuda::checkpoint::{self, StateMut};
use ddpm_cuda::device::Device;
use ddpm_cuda::params::Params;
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda_fuzz::{Seeds, assert_sentence, file, network, offer, read, safetensors};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

const WEIGHTS: &str = "unet/diffusion_pytorch_model.safetensors";
const STATE: &str = "training_state.safetensors";

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    let (_, _, specs) = network();
    let device = Device::cpu();
    let params = || Params::zeros(&device, specs.clone()).expect("host memory");
    let moments = || Tensor::zeros(&device, Shape::vector(specs.flat_len())).expect("host memory");

    let weights = file(&format!("restored/{WEIGHTS}"), bytes);
    match checkpoint::read_weights(&weights, &mut params()) {
        // Half-precision weights are the smallest that are read.
        Ok(()) => assert!(bytes.len() > 2 * specs.count(), "{} weights of {} bytes", specs.count(), bytes.len()),
        Err(error) => assert_sentence(&error),
    }
    file(&format!("restored/{STATE}"), bytes);
    let (mut step, mut params, mut ema, mut m, mut v) = (0, params(), moments(), moments(), moments());
    let (step, params, ema, m, v) = (&mut step, &mut params, &mut ema, &mut m, &mut v);
    let state = StateMut { step, params, shard: 0..specs.flat_len(), ema, m, v, importance: None, curve: None };
    let folder = ddpm_cuda_fuzz::scratch().join("restored");
    match checkpoint::restore(&folder, state) {
        Ok(()) => panic!("one file is both weights and state"),
        Err(error) => assert_sentence(&error),
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { safetensors(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let saved = ddpm_cuda_fuzz::checkpoint();
    let one =
        |header: &str, tensors: &[u8]| [&(header.len() as u64).to_le_bytes(), header.as_bytes(), tensors].concat();
    let inputs = vec![
        read(&saved.join(WEIGHTS)),
        read(&saved.join(STATE)),
        one("{}", b""),
        one(r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"__metadata__":{"step":"7"}}"#, b"1234"),
    ];
    let words = [
        "__metadata__",
        "dtype",
        "shape",
        "data_offsets",
        "F32",
        "F16",
        "BF16",
        "F8_E4M3",
        "I64",
        "step",
        "weights.",
        "adam_m.",
        "_orig_mod.",
        "18446744073709551615",
        "[4,1,3,3]",
        "conv_in.weight",
        "\\u001b[2J",
    ];
    Seeds { inputs, words: words.iter().map(|word| word.as_bytes().to_vec()).collect() }
}
