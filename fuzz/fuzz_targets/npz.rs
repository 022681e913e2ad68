//! `data = FILE.npz`.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, file, npy, npz, offer, read_data, zips};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use zip::CompressionMethod::{Deflated, Stored};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| read_data(&file("images.npz", bytes)));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { zips(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let images = || npy("|u1", &[3, 4, 5], 1);
    let labels = || npy("<i8", &[3], 8);
    let inputs = vec![
        npz(&[("arr_0.npy", images())], Stored),
        npz(&[("images.npy", images()), ("labels.npy", labels())], Deflated),
        npz(&[("x_train.npy", images()), ("y_train.npy", labels()), ("x_test.npy", images())], Stored),
        npz(&[("data.npy", npy("|u1", &[2, 3, 2, 2], 1)), ("labels.npy", npy("|u1", &[2, 1], 1))], Deflated),
        npz(&[("readme.txt", b"no array".to_vec()), ("mean.npy", npy("<f4", &[3], 4))], Stored),
        npz(&[("a.png", b"\x89PNG".to_vec()), ("b/c.jpg", b"\xff\xd8".to_vec())], Stored),
        npz(&[], Stored),
    ];
    let words = ["arr_0.npy", "arr_1.npy", "images.npy", "labels.npy", "test_images.npy", "y_test.npy", "PK\u{5}\u{6}"];
    Seeds { inputs, words: words.iter().map(|word| word.as_bytes().to_vec()).collect() }
}
