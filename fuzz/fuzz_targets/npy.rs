//! `data = FILE.npy`.

#![no_main]

use ddpm_cuda::data::npy::Array;
use ddpm_cuda_fuzz::{Seeds, assert_sentence, file, npy, offer, read_data};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    read_data(&file("images.npy", bytes));
    match Array::parse("the file", bytes.to_vec()) {
        Err(message) => assert_sentence(&message),
        Ok(array) => {
            let count: usize = array.shape.iter().product();
            for converted in [array.to_i64().map(|v| v.len()), array.to_f32().map(|v| v.len())] {
                match converted {
                    Ok(elements) => assert_eq!(elements, count, "elements of shape {:?}", array.shape),
                    Err(message) => assert_sentence(&message),
                }
            }
        }
    }
});

fn seeds() -> Seeds {
    let inputs = vec![
        npy("|u1", &[3, 4, 5], 1),
        npy("|u1", &[3, 4, 5, 3], 1),
        npy("|u1", &[3, 1, 4, 5], 1),
        npy("<i8", &[4], 8),
        npy(">f4", &[2, 2, 2], 4),
        npy("|u1", &[0, 4, 4], 1),
        b"\x93NUMPY\x02\x00\x40\x00\x00\x00{'descr': [('a', '<f4'), ('b', '|u1')], 'fortran_order': True, 'shape': ()}"
            .into(),
    ];
    let words = [
        "'descr': ",
        "'fortran_order': ",
        "'shape': ",
        "True",
        "False",
        "(",
        ")",
        "()",
        "'|u1'",
        "'<f4'",
        "'>f8'",
        "'<i8'",
        "'|O'",
        "'<U7'",
        "'<M8[ns]'",
        "'|b1'",
        "'<c16'",
        "18446744073709551615",
        "4294967296",
        "-1",
        "[('a', '<f4')]",
        "\u{93}NUMPY",
    ];
    Seeds { inputs, words: words.iter().map(|word| word.as_bytes().to_vec()).collect() }
}
