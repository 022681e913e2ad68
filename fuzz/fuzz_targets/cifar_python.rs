//! A folder of CIFAR-10's version for Python: a training batch, the test batch, the names of the classes.

#![no_main]

use ddpm_cuda_fuzz::{Seeds, bundle, files, offer, read_data, scratch};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: offer(seeds), |bytes: &[u8]| {
    files(bytes, &["python/data_batch_1", "python/test_batch", "python/batches.meta"]);
    read_data(&scratch().join("python"));
});

fn seeds() -> Seeds {
    let batch = |label: u8| {
        let begin = b"\x80\x02}q\x01(U\x06labels](K";
        let array = b"eU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01K\x01M\0\x0c\
                      \x86cnumpy\ndtype\nU\x02u1K\0K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T\0\
                      \x0c\0\0";
        [&begin[..], &[label], array, &[90; 3072], b"tbu."].concat()
    };
    let names: Vec<u8> = (0..10).flat_map(|k| [b"U\x01".to_vec(), vec![b'a' + k]].concat()).collect();
    let meta = [&b"\x80\x02}(U\x0blabel_names]("[..], &names, b"eu."].concat();
    let inputs = vec![batch(3), bundle(&[&batch(9), &batch(0)]), bundle(&[&batch(1)[..], b"", &meta]), batch(11)];
    Seeds {
        inputs,
        words: vec![bundle(&[b"", b""]), b"cposix\nsystem\n".to_vec(), b"\x85R".to_vec(), b"\x95".to_vec()],
    }
}
