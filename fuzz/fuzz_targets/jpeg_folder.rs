//! A folder of JPEG files without classes.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, bundle, files, jpeg, jpegs, offer, read_data, scratch};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    files(bytes, &["jpeg/1.jpg", "jpeg/2.jpeg"]);
    read_data(&scratch().join("jpeg"));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { jpegs(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let (grey, colour) = (jpeg(8, 8, true), jpeg(9, 7, false));
    let mut rotated = colour.clone();
    // An Exif segment that asks for a rotation.
    let exif = b"\xff\xe1\x00\x22Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
    rotated.splice(2..2, exif.iter().copied());
    let inputs = vec![grey.clone(), colour.clone(), rotated, bundle(&[&grey, &colour])];
    let words: [&[u8]; 12] = [
        b"\xff\xd8",
        b"\xff\xd9",
        b"\xff\xda",
        b"\xff\xc0",
        b"\xff\xc2",
        b"\xff\xc4",
        b"\xff\xdb",
        b"\xff\xdd",
        b"\xff\xe0",
        b"\xff\xe1",
        b"Exif\0\0",
        &bundle(&[b"", b""]),
    ];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}
