//! Several files in one input: their bytes, one after the other, between separators. The names are the target's.

/// Between two files. In the dictionaries too, so that the fuzzer adds and removes files.
pub(crate) const SEPARATOR: &[u8] = b"\n~~~ next file ~~~\n";

/// The files as one input.
pub fn bundle(files: &[&[u8]]) -> Vec<u8> {
    files.join(SEPARATOR)
}

/// The files of an input.
pub fn parts(input: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(input);
    std::iter::from_fn(move || {
        let all = rest?;
        let end = all.windows(SEPARATOR.len()).position(|window| window == SEPARATOR);
        rest = end.map(|end| &all[end + SEPARATOR.len()..]);
        Some(&all[..end.unwrap_or(all.len())])
    })
}
