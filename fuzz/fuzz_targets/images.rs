//! A folder of WebP, TIFF, BMP and GIF files.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, bundle, encoded, files, offer, read_data, scratch};
use image::{DynamicImage, ImageFormat};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    files(bytes, &["images/1.webp", "images/2.tif", "images/3.bmp", "images/4.gif"]);
    read_data(&scratch().join("images"));
});

fn seeds() -> Seeds {
    let colour = |format| encoded(DynamicImage::new_rgb8(4, 3), format);
    let [webp, tiff, bmp, gif] = [ImageFormat::WebP, ImageFormat::Tiff, ImageFormat::Bmp, ImageFormat::Gif].map(colour);
    let inputs = vec![
        bundle(&[&webp, &tiff, &bmp, &gif]),
        webp,
        bundle(&[b"", &tiff]),
        bundle(&[b"", &encoded(DynamicImage::new_luma16(4, 3), ImageFormat::Tiff)]),
        bundle(&[b"", b"", &bmp]),
        bundle(&[b"", b"", b"", &gif]),
    ];
    let words: [&[u8]; 6] = [b"VP8L", b"VP8X", b"ANMF", b"NETSCAPE2.0", b"II*\0", &bundle(&[b"", b""])];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}
