//! Mutators for formats with checksums and lengths, which random changes break at once: each changes what they protect
//! and writes them anew. One call in eight leaves the damage, so that the checks themselves are tried.

use std::io::{Cursor, Read, Write};

use flate2::Compression;
use flate2::read::ZlibDecoder;
use flate2::write::ZlibEncoder;
use libfuzzer_sys::fuzzer_mutate;
use twox_hash::XxHash3_128;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::{bundle, parts};

/// Bytes to which a mutator unpacks a compressed stream; larger ones are mutated as they are.
const UNPACKED: usize = 1 << 16;

/// Writes `new` over the input if it fits, or mutates the input as it is.
fn replace(data: &mut [u8], size: usize, most: usize, new: Option<Vec<u8>>) -> usize {
    match new {
        Some(new) if new.len() <= most => {
            data[..new.len()].copy_from_slice(&new);
            new.len()
        }
        _ => fuzzer_mutate(data, size, most),
    }
}

/// `bytes`, mutated; it may grow by a quarter and 64 bytes.
fn mutated(bytes: &[u8]) -> Vec<u8> {
    let mut buffer = bytes.to_vec();
    buffer.resize(bytes.len() + bytes.len() / 4 + 64, 0);
    let most = buffer.len();
    let size = fuzzer_mutate(&mut buffer, bytes.len(), most);
    buffer.truncate(size);
    buffer
}

/// Mutates one file of a bundle with `change`, which returns `None` for what is not of its format.
fn in_bundle(data: &mut [u8], size: usize, most: usize, seed: u32, change: impl Fn(&[u8]) -> Option<Vec<u8>>) -> usize {
    let files: Vec<&[u8]> = parts(&data[..size]).collect();
    let chosen = (seed >> 8) as usize % files.len();
    let new = change(files[chosen]).map(|changed| {
        let all = files.iter().enumerate().map(|(i, &file)| if i == chosen { &changed[..] } else { file });
        bundle(&all.collect::<Vec<_>>())
    });
    replace(data, size, most, new)
}

/// PNG files: the pixels below the compression, or the chunks, with the checksums of the chunks written anew.
pub fn pngs(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    match seed % 8 {
        0 => fuzzer_mutate(data, size, most),
        1..4 => in_bundle(data, size, most, seed, through_pixels),
        _ => in_bundle(data, size, most, seed, |png| {
            let mut png = mutated(png);
            fix_checksums(&mut png);
            Some(png)
        }),
    }
}

const PNG_START: &[u8] = b"\x89PNG\r\n\x1a\n";

/// Position and length of the contents of each whole chunk.
fn chunks(png: &[u8]) -> Vec<(usize, usize)> {
    let (mut found, mut at) = (Vec::new(), PNG_START.len());
    while let Some(head) = png.get(at..at + 8) {
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if png.len() < at + 12 + length {
            break;
        }
        found.push((at + 8, length));
        at += 12 + length;
    }
    found
}

fn fix_checksums(png: &mut [u8]) {
    for (start, length) in chunks(png) {
        let checksum = crc32fast::hash(&png[start - 4..start + length]);
        png[start + length..start + length + 4].copy_from_slice(&checksum.to_be_bytes());
    }
}

fn through_pixels(png: &[u8]) -> Option<Vec<u8>> {
    let is_pixels = |&(start, _): &(usize, usize)| &png[start - 4..start] == b"IDAT";
    let chunks = chunks(png);
    let packed: Vec<u8> = chunks.iter().filter(|c| is_pixels(c)).flat_map(|&(s, l)| &png[s..s + l]).copied().collect();
    let mut pixels = Vec::new();
    // What can be unpacked of a damaged stream is mutated too.
    let _ = ZlibDecoder::new(&packed[..]).take(UNPACKED as u64).read_to_end(&mut pixels);
    let first = chunks.iter().position(|c| is_pixels(c))?;
    let mut packed = ZlibEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(&mutated(&pixels)).ok()?;
    let packed = packed.finish().ok()?;
    let mut new = PNG_START.to_vec();
    for (index, chunk) in chunks.iter().enumerate() {
        let contents = match (index == first, is_pixels(chunk)) {
            (true, _) => &packed[..],
            (false, true) => continue,
            (false, false) => &png[chunk.0..chunk.0 + chunk.1],
        };
        new.extend((contents.len() as u32).to_be_bytes());
        new.extend(&png[chunk.0 - 4..chunk.0]);
        new.extend(contents);
        new.extend([0; 4]);
    }
    fix_checksums(&mut new);
    Some(new)
}

/// JPEG files: one file of the bundle, so that a change stays inside it.
pub fn jpegs(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    match seed % 8 {
        0 => fuzzer_mutate(data, size, most),
        _ => in_bundle(data, size, most, seed, |jpeg| Some(mutated(jpeg))),
    }
}

/// Zip archives: the contents of an entry, stored or deflated, with lengths and checksums written anew.
pub fn zips(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let new = if seed % 8 == 0 { None } else { through_entries(&data[..size], seed) };
    replace(data, size, most, new)
}

fn through_entries(zip: &[u8], seed: u32) -> Option<Vec<u8>> {
    let mut old = ZipArchive::new(Cursor::new(zip)).ok()?;
    let chosen = (seed >> 8) as usize % old.len().max(1);
    let mut new = ZipWriter::new(Cursor::new(Vec::new()));
    for index in 0..old.len() {
        let mut entry = old.by_index(index).ok()?;
        let mut name = entry.name().ok()?.into_owned();
        let (mut contents, mut method) = (Vec::new(), entry.compression());
        entry.by_ref().take(UNPACKED as u64).read_to_end(&mut contents).ok()?;
        if index == chosen {
            match (seed >> 4) % 8 {
                0 => name = String::from_utf8_lossy(&mutated(name.as_bytes())).into_owned(),
                1 => method = CompressionMethod::Deflated,
                2 => method = CompressionMethod::Stored,
                _ => contents = mutated(&contents),
            }
        }
        new.start_file(name, SimpleFileOptions::default().compression_method(method)).ok()?;
        new.write_all(&contents).ok()?;
    }
    Some(new.finish().ok()?.into_inner())
}

/// Safetensors files: the header, with its length written anew.
pub fn safetensors(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let through_header = || {
        let (length, rest) = data[..size].split_first_chunk::<8>()?;
        let (header, tensors) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        let header = mutated(header);
        let length = (header.len() as u64).to_le_bytes();
        Some([&length[..], &header, tensors].concat())
    };
    let new = if seed % 8 < 3 { None } else { through_header() };
    replace(data, size, most, new)
}

/// Parquet tables: the metadata at the end, with its length written anew, or the pages before it, whose length stays,
/// since the metadata says where each of them is.
pub fn tables(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let new = if seed % 8 == 0 { None } else { through_table(&data[..size], seed % 8 < 4) };
    replace(data, size, most, new)
}

fn through_table(table: &[u8], metadata: bool) -> Option<Vec<u8>> {
    let (body, tail) = table.split_at_checked(table.len().checked_sub(8)?)?;
    let length = u32::from_le_bytes(tail[..4].try_into().ok()?) as usize;
    let (pages, old) = body.split_at_checked(body.len().checked_sub(length)?)?;
    let (mut pages, mut new) = (pages.to_vec(), old.to_vec());
    if metadata {
        new = mutated(old);
    } else {
        let length = pages.len();
        pages = mutated(&pages);
        pages.resize(length, 0);
    }
    let length = (new.len() as u32).to_le_bytes();
    Some([&pages[..], &new, &length, &tail[4..]].concat())
}

/// Tar archives: with the checksums of the headers written anew.
pub fn tars(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let size = fuzzer_mutate(data, size, most);
    if seed.is_multiple_of(8) {
        return size;
    }
    let mut at = 0;
    while at + 512 <= size && data[at..at + 512].iter().any(|&byte| byte != 0) {
        let header = &mut data[at..at + 512];
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let digits = std::str::from_utf8(&header[124..135]).unwrap_or_default();
        let bytes = usize::from_str_radix(digits, 8).unwrap_or(0);
        at += 512 + bytes.next_multiple_of(512).min(most);
    }
    size
}

/// Files of ready bytes: with the hash of header and tables written anew.
pub fn ddpms(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let size = fuzzer_mutate(data, size, most);
    if seed.is_multiple_of(8) || size < 4096 {
        return size;
    }
    let tables = u64::from_le_bytes(data[48..56].try_into().expect("eight bytes")).min(size as u64) as usize;
    let hash = XxHash3_128::oneshot(&[&data[..96], &data[tables..size]].concat());
    data[96..112].copy_from_slice(&hash.to_le_bytes());
    size
}

/// Messages of ranks: the opening, or the head or the body of a message, with its lengths written anew.
pub fn messages(data: &mut [u8], size: usize, most: usize, seed: u32) -> usize {
    let new = if seed % 8 < 2 { None } else { through_messages(&data[..size], seed) };
    replace(data, size, most, new)
}

fn through_messages(bytes: &[u8], seed: u32) -> Option<Vec<u8>> {
    let opening = 13 + usize::from(*bytes.get(12)?);
    let (opening, mut rest) = bytes.split_at_checked(opening)?;
    let mut parts: Vec<[Vec<u8>; 2]> = Vec::new();
    while let Some((lengths, after)) = rest.split_first_chunk::<8>() {
        let [head, body] = [0, 4].map(|at| u32::from_le_bytes(lengths[at..at + 4].try_into().expect("four bytes")));
        let Some((head, after)) = after.split_at_checked(head as usize) else { break };
        let Some((body, after)) = after.split_at_checked(body as usize) else { break };
        parts.push([head.to_vec(), body.to_vec()]);
        rest = after;
    }
    let chosen = (seed >> 8) as usize % parts.len().max(1);
    let part = &mut parts.get_mut(chosen)?[usize::from(seed % 8 == 7)];
    *part = mutated(part);
    let mut new = opening.to_vec();
    for [head, body] in &parts {
        new.extend([head, body].map(|part| (part.len() as u32).to_le_bytes()).as_flattened());
        new.extend(head);
        new.extend(body);
    }
    new.extend(rest);
    Some(new)
}
