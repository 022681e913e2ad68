//! An IDX file, and a folder of IDX files: training images, their labels, test images, theirs.

#![no_main]

use std::io::Write;

use ddpm_cuda_fuzz::{Seeds, bundle, files, idx, offer, read_data, scratch};
use flate2::Compression;
use flate2::write::GzEncoder;
use libfuzzer_sys::fuzz_target;

const NAMES: [&str; 4] = [
    "idx/train-images-idx3-ubyte",
    "idx/train-labels-idx1-ubyte",
    "idx/t10k-images-idx3-ubyte",
    "idx/t10k-labels-idx1-ubyte",
];

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    files(bytes, &NAMES);
    read_data(&scratch().join("idx"));
    read_data(&scratch().join(NAMES[0]));
});

fn seeds() -> Seeds {
    let (images, labels, coloured) = (idx(&[3, 4, 5]), idx(&[3]), idx(&[2, 4, 5, 3]));
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&images).expect("in memory");
    let packed = packed.finish().expect("in memory");
    let inputs = vec![
        images.clone(),
        packed,
        idx(&[2, 3, 4, 5]),
        labels.clone(),
        bundle(&[&images, &labels]),
        bundle(&[&images, &labels, &images, &labels]),
        bundle(&[&coloured, b"", &coloured]),
    ];
    let words = [bundle(&[b"", b""]), vec![0, 0, 8, 3], vec![0, 0, 8, 1], vec![0, 0, 13, 3], vec![255; 4]];
    Seeds { inputs, words: words.to_vec() }
}
