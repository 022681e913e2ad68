//! A folder of PNG files, one folder a class.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, bundle, files, offer, png, pngs, read_data, scratch};
use image::DynamicImage;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    files(bytes, &["png/a/1.png", "png/a/2.png", "png/b/1.png"]);
    read_data(&scratch().join("png"));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { pngs(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let (grey, colour) = (png(DynamicImage::new_luma8(4, 3)), png(DynamicImage::new_rgb8(4, 3)));
    let inputs = vec![
        grey.clone(),
        colour.clone(),
        png(DynamicImage::new_luma_a8(4, 3)),
        png(DynamicImage::new_rgba8(4, 3)),
        png(DynamicImage::new_luma16(4, 3)),
        png(DynamicImage::new_rgba16(4, 3)),
        bundle(&[&grey, &colour, &grey]),
        bundle(&[&palette(), &colour, b""]),
        palette(),
    ];
    let words: [&[u8]; 9] =
        [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf", b"acTL", b"sBIT", &bundle(&[b"", b""])];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}

/// 2x2 pixels of a palette of four colours, the first of them transparent, two bits each.
fn palette() -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    // zlib, stored: two rows of a filter byte and a byte of pixels.
    let rows = b"\x78\x01\x01\x04\x00\xfb\xff\x00\x10\x00\xb0\x01\x81\x00\xc1";
    let chunks: [(&[u8], &[u8]); 5] = [
        (b"IHDR", &[0, 0, 0, 2, 0, 0, 0, 2, 2, 3, 0, 0, 0]),
        (b"PLTE", &[0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]),
        (b"tRNS", &[0, 128]),
        (b"IDAT", rows),
        (b"IEND", &[]),
    ];
    for (kind, contents) in chunks {
        bytes.extend((contents.len() as u32).to_be_bytes());
        bytes.extend(kind);
        bytes.extend(contents);
        bytes.extend(crc32fast::hash(&[kind, contents].concat()).to_be_bytes());
    }
    bytes
}
