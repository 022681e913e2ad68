//! A folder of CIFAR-10's binary version: two training batches, the test batch, the names of the classes.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, bundle, files, offer, read_data, scratch};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    let names = ["data_batch_1.bin", "data_batch_2.bin", "test_batch.bin", "batches.meta.txt"];
    files(bytes, &names.map(|name| format!("cifar/{name}")).each_ref().map(String::as_str));
    read_data(&scratch().join("cifar"));
});

fn seeds() -> Seeds {
    let record = |label: u8| [vec![label], vec![90; 3072]].concat();
    let names = b"airplane\nautomobile\nbird\ncat\ndeer\ndog\nfrog\nhorse\nship\ntruck\n";
    let inputs = vec![
        record(3),
        bundle(&[&record(9), b"", &record(0)]),
        bundle(&[&record(9), &record(1), &record(0), names]),
        bundle(&[&record(11)]),
        bundle(&[b"\x1f\x8b", &record(1)]),
    ];
    Seeds { inputs, words: vec![bundle(&[b"", b""]), vec![10], vec![0x1f, 0x8b, 8], b"\n\n".to_vec()] }
}
