//! A zip archive of images with a dataset.json, as EDM's tools write it.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, file, npz, offer, png, read_data, zips};
use image::DynamicImage;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use zip::CompressionMethod::{Deflated, Stored};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    read_data(&file("images.zip", bytes));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { zips(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let image = || png(DynamicImage::new_rgb8(4, 3));
    let list = br#"{"labels": [["0/1.png", 1], ["1/2.png", 0]]}"#.to_vec();
    let inputs = vec![
        npz(&[("0/1.png", image()), ("1/2.png", image())], Stored),
        npz(&[("0/1.png", image()), ("1/2.png", image()), ("dataset.json", list)], Deflated),
        npz(&[("train/1.png", image()), ("val/2.png", image()), ("__MACOSX/._1.png", vec![1])], Stored),
        npz(&[("dataset.json", b"{\"labels\": null}".to_vec()), ("1.png", image())], Stored),
    ];
    let words: [&[u8]; 4] = [b"dataset.json", b"null", b"train/", b"../"];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}
