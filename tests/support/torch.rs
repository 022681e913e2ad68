//! PyTorch's files made by hand, sound and unsound.

use std::io::{Cursor, Write};

use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

/// A tensor as a pickle describes it.
#[derive(Clone)]
pub struct View<'a> {
    pub name: &'a str,
    /// `FloatStorage` and so on.
    pub class: &'a str,
    pub key: &'a str,
    /// Numbers of the storage.
    pub len: usize,
    pub offset: usize,
    pub shape: &'a [usize],
    pub strides: &'a [usize],
}

fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

fn number(number: usize) -> Vec<u8> {
    [b"\x8a\x08", &(number as u64).to_le_bytes()[..]].concat()
}

fn numbers(numbers: &[usize]) -> Vec<u8> {
    let items: Vec<u8> = numbers.iter().flat_map(|&n| number(n)).collect();
    [b"(", &items[..], b"t"].concat()
}

impl View<'_> {
    fn pickled(&self) -> Vec<u8> {
        let storage = [
            b"((".to_vec(),
            text("storage"),
            format!("ctorch\n{}\n", self.class).into_bytes(),
            text(self.key),
            text("cpu"),
            number(self.len),
            b"tQ".to_vec(),
        ];
        let rest = [number(self.offset), numbers(self.shape), numbers(self.strides), b"\x89}tR".to_vec()];
        [text(self.name), b"ctorch._utils\n_rebuild_tensor_v2\n".to_vec(), storage.concat(), rest.concat()].concat()
    }
}

/// A pickle of a dictionary of these tensors.
pub fn pickle(views: &[View<'_>]) -> Vec<u8> {
    let items: Vec<u8> = views.iter().flat_map(|view| view.pickled()).collect();
    [b"\x80\x02}(", &items[..], b"u."].concat()
}

/// An archive with these entries of the folder `model`.
pub fn archive(entries: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        let options = SimpleFileOptions::default().compression_method(method).with_alignment(64);
        archive.start_file(format!("model/{name}"), options).unwrap();
        archive.write_all(bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}
