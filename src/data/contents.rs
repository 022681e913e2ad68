//! The bytes of the files that hold arrays: mapped where they lie, unpacked where they are compressed, into memory or
//! into a file without a name.
//!
//! What is mapped takes no memory, however large it is: the system reads what is looked at, and forgets it when the
//! room is wanted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;

use super::Extent;
use crate::error::{Error, Result};
use crate::text::{GIB, shell_word};

/// Bytes that are unpacked before more room is asked for.
const STEP: usize = 1 << 20;

/// Advice where nothing better is known.
pub const SMALLER: &str = "use a smaller part of it";

/// How arrays are read.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    /// What the user has named, for the command in a refusal.
    pub source: &'a Path,
    /// The channels that are asked for, by which the layout of an array is told.
    pub channels: Option<usize>,
    /// The folder for what is unpacked and has no room in memory. Without one it is refused.
    pub scratch: Option<&'a Path>,
}

/// A file's bytes, unpacked if they are gzip data; for files that are small beside the images.
pub fn contents(path: &Path) -> Result<Bytes> {
    Reading { source: path, channels: None, scratch: None }.contents(path)
}

impl Reading<'_> {
    /// A file's bytes, unpacked if they are gzip data.
    pub fn contents(&self, path: &Path) -> Result<Bytes> {
        let unreadable = |e: io::Error| Error::file(path, format!("cannot be read: {e}"));
        let file = File::open(path).map_err(unreadable)?;
        let bytes = match map(&file) {
            Ok(mapped) => mapped,
            // Not every file system maps its files.
            Err(_) => {
                let len = file.metadata().map_err(unreadable)?.len();
                check_room("the file takes", len, free_memory(), &self.advice()).map_err(|e| Error::file(path, e))?;
                std::fs::read(path).map_err(unreadable)?.into()
            }
        };
        if !bytes.starts_with(&[0x1F, 0x8B]) {
            return Ok(bytes);
        }
        let damaged = |e: io::Error| format!("is not whole gzip data ({e}); it is cut short or damaged");
        let packed = flate2::read::MultiGzDecoder::new(&bytes[..]);
        self.unpack("its content", packed, damaged).map_err(|e| Error::file(path, e))
    }

    /// All that `packed` gives, in memory, or where that has no room in the scratch folder. Errors are the end of a
    /// sentence that begins with the file; `damaged` makes them of those of `packed`, others begin with `name`.
    pub fn unpack(
        &self,
        name: &str,
        mut packed: impl Read,
        damaged: impl Fn(io::Error) -> String,
    ) -> std::result::Result<Bytes, String> {
        let free = free_memory();
        // A conversion needs some of it for the images under way.
        let room = if self.scratch.is_some() { free / 2 } else { free };
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < room {
            // Not twice as much each time: room that is reserved counts against the limits of a process.
            let more = (bytes.len() / 4).max(STEP).min((room - bytes.len() as u64) as usize);
            if bytes.try_reserve_exact(more).is_err() {
                break;
            }
            if packed.by_ref().take(more as u64).read_to_end(&mut bytes).map_err(&damaged)? < more {
                return Ok(bytes.into());
            }
        }
        let Some(folder) = self.scratch else {
            drop(bytes);
            return Err(format!(
                "{name} takes more than the {:.2} GiB of memory that are available; {}",
                free as f64 / GIB,
                self.advice()
            ));
        };
        let unwritten =
            |e: io::Error| format!("cannot be unpacked into a file without a name in {}: {e}", folder.display());
        let mut file = tempfile::tempfile_in(folder).map_err(unwritten)?;
        file.write_all(&bytes).map_err(unwritten)?;
        drop(bytes);
        let mut piece = vec![0; STEP];
        loop {
            let read = packed.read(&mut piece).map_err(&damaged)?;
            if read == 0 {
                return map(&file).map_err(unwritten);
            }
            file.write_all(&piece[..read]).map_err(unwritten)?;
        }
    }

    /// What to do about a source that does not fit into memory.
    pub fn advice(&self) -> String {
        match self.scratch {
            // The conversion is what is under way.
            Some(_) => SMALLER.into(),
            None => format!("convert it once {}", conversion(self.source, None)),
        }
    }
}

/// A file's bytes, of which those are read that are looked at.
fn map(file: &File) -> io::Result<Bytes> {
    // SAFETY: the mapping is only read, as bytes, of which any value is good, and what readers conclude from them never
    // reaches beyond a slice unchecked. Whoever writes into the file meanwhile changes pixels, or what a header says,
    // and the reader fails or reads something else; whoever cuts it short ends this process with SIGBUS when it touches
    // what is gone. That can happen only until the images are in memory or converted, and docs/data.md says it. A file
    // of the scratch folder has no name by which anybody could.
    let map = unsafe { Mmap::map(file) }?;
    // Whole arrays are read, from their beginning to their end.
    #[cfg(unix)]
    let _ = map.advise(memmap2::Advice::Sequential);
    Ok(Bytes::from_owner(map))
}

/// Bytes of memory that the machine can still give; without an answer, more than there is anywhere.
pub fn free_memory() -> u64 {
    crate::device::cpu::available_memory().unwrap_or(u64::MAX)
}

/// Refuses what does not fit into memory, before it is allocated. `takes` begins the sentence, `advice` ends it.
pub fn check_room(takes: &str, bytes: u64, room: u64, advice: &str) -> std::result::Result<(), String> {
    if bytes <= room {
        return Ok(());
    }
    Err(format!(
        "{takes} {:.2} GiB, but {:.2} GiB of memory are available; {advice}",
        bytes as f64 / GIB,
        room as f64 / GIB
    ))
}

/// Refuses images that do not fit into memory, and says how they can be trained on all the same.
pub fn needs_room(source: &Path, images: usize, extent: Extent, room: u64) -> Result<()> {
    let bytes = (images as u64).saturating_mul(extent.len() as u64);
    let advice = convert_them(source, extent);
    check_room(&format!("{images} images of {extent} take"), bytes, room, &advice).map_err(|e| Error::file(source, e))
}

/// How images can be trained on that are too large for memory, fitted to `extent`: the end of a sentence.
pub fn convert_them(source: &Path, extent: Extent) -> String {
    format!("convert them once {}", conversion(source, Some(extent)))
}

/// The command that converts a source, perhaps to a size, and what then is to be given.
fn conversion(source: &Path, extent: Option<Extent>) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let stem = if !stem.is_empty() && stem.chars().all(plain) { &*stem } else { "data" };
    let size = extent.map(|Extent { size, .. }| if size.h == size.w { size.h.to_string() } else { size.to_string() });
    let flag = size.as_ref().map_or(String::new(), |size| format!(" --image-size {size}"));
    // One that is converted already, and to be at another size, keeps its name.
    let name = match (&size, source.extension().is_some_and(|ending| ending == "ddpm")) {
        (Some(size), true) => format!("{stem}-{size}.ddpm"),
        _ => format!("{stem}.ddpm"),
    };
    format!(
        "with ddpm-cuda data {} --out {name}{flag}, and give --data {name}, which stays on disk",
        shell_word(source)
    )
}
