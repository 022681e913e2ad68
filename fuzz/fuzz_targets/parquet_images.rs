//! A table of Hugging Face.

#![no_main]

use ddpm_cuda::data::panics_are_caught;
use ddpm_cuda_fuzz::{Seeds, Table, file, offer, png, read_data, table, tables};
use image::DynamicImage;
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use parquet::basic::Compression;

fuzz_target!(init: {
    offer(seeds);
    // Panics of the library are caught and refused in a sentence; the fuzzer's hook would end the process before.
    let fail = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !panics_are_caught() {
            fail(panic);
        }
    }));
}, |bytes: &[u8]| {
    read_data(&file("train-0.parquet", bytes));
});

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| { tables(data, size, max_size, seed) });

fn seeds() -> Seeds {
    let image = png(DynamicImage::new_rgb8(4, 3));
    let whole = || Table { images: vec![Some(image.clone()); 3], labels: Some(vec![2, 0, 1]), ..Table::default() };
    let inputs = vec![
        table(&whole()),
        table(&Table { compression: Compression::SNAPPY, ..whole() }),
        table(&Table { compression: Compression::GZIP(Default::default()), ..whole() }),
        table(&Table { dictionary: true, ..whole() }),
        table(&Table { second_version: true, ..whole() }),
        table(&Table { second_version: true, dictionary: true, compression: Compression::SNAPPY, ..whole() }),
        table(&Table { images: vec![Some(image.clone()), None, Some(image)], labels: None, ..Table::default() }),
    ];
    let words: [&[u8]; 8] =
        [b"PAR1", b"image", b"bytes", b"label", b"huggingface", b"\x15\x00\x15", b"{\"info\":", b"schema"];
    Seeds { inputs, words: words.map(<[u8]>::to_vec).to_vec() }
}
