//! PyTorch's weight files: a whole file, and a pickle within a sound archive.

#![no_main]

use ddpm_cuda::checkpoint;
use ddpm_cuda::device::Device;
use ddpm_cuda::params::Params;
use ddpm_cuda_fuzz::{Seeds, assert_sentence, file, network, npz, offer};
use libfuzzer_sys::fuzz_target;
use zip::CompressionMethod;

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    let (_, _, specs) = network();
    let mut params = Params::zeros(&Device::cpu(), specs.clone()).expect("host memory");
    let entries = [("a/data.pkl", bytes.to_vec()), ("a/data/0", vec![0; 64])];
    let in_archive = npz(&entries, CompressionMethod::Stored);
    for bytes in [bytes, &in_archive[..]] {
        // As weights of a model of diffusers, and as a network of OpenAI's.
        if let Err(error) = checkpoint::read_weights(&file("torch/weights.bin", bytes), &mut params) {
            assert_sentence(&error);
        }
        match checkpoint::describe(&file("torch/model.pt", bytes)) {
            Ok(described) => described.config.model.validate().expect("a network that was built"),
            Err(error) => assert_sentence(&error),
        }
    }
});

/// A pickle of a dictionary with a tensor of 2x3.
fn tensor(name: &str) -> Vec<u8> {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let parts = [
        text(name),
        b"ctorch._utils\n_rebuild_tensor_v2\nq\x01((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\nq\x02".to_vec(),
        text("0"),
        text("cpu"),
        b"K\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR".to_vec(),
    ];
    parts.concat()
}

fn seeds() -> Seeds {
    let dict = [b"\x80\x02}q\x00(", &tensor("conv_in.weight")[..], b"u."].concat();
    let wrapped = [b"\x80\x02}X\x05\x00\x00\x00model}", &tensor("time_embed.0.weight")[..], b"ss."].concat();
    let magic = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}.";
    let keys = b"\x80\x02]X\x01\x00\x00\x000a.";
    let legacy = [&magic[..], &dict, keys, &6u64.to_le_bytes(), &[0; 24]].concat();
    let words: [&[u8]; 12] = [
        b"\x93",
        b"\x95\x08\x00\x00\x00\x00\x00\x00\x00",
        b"\x8c\x05model",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nHalfStorage\n",
        b"ctorch\nBFloat16Storage\n",
        b"time_embed.0.weight",
        b"input_blocks.0.0.weight",
        b"output_blocks.0.0.in_layers.0.weight",
        b"out.2.weight",
        b"J\xff\xff\xff\x7f",
        b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",
    ];
    Seeds { inputs: vec![dict, wrapped, legacy], words: words.map(<[u8]>::to_vec).into() }
}
