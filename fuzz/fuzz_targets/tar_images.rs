//! A shard of WebDataset.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, file, offer, png, read_data, tar, tars};
use image::DynamicImage;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    read_data(&file("shard.tar", bytes));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { tars(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let image = png(DynamicImage::new_rgb8(4, 3));
    let long = "long/".repeat(30) + "x.txt";
    let inputs = vec![
        tar(&[("1.png", &image), ("1.cls", b"3"), ("2.png", &image), ("2.cls", b"0\n")]),
        tar(&[("1.png", &image), ("1.json", br#"{"label": 3}"#)]),
        tar(&[("a/1.png", &image), ("b/2.png", &image), ("dataset.json", br#"{"labels": null}"#)]),
        tar(&[(&*long, b"x"), ("1.png", &image)]),
    ];
    let words: [&[u8]; 5] = [b"ustar", b".png", b".cls", b".json", b"label"];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}
