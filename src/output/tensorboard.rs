//! TensorBoard's event files: scalars and images by step.
//!
//! A file is a row of records: the length of a message (u64), its masked CRC-32C, the message and its masked CRC-32C,
//! all little-endian. A message is the protobuf `Event` of TensorFlow's event.proto; the few fields used here are
//! written by hand, which takes fewer lines than a description for a code generator.
//!
//! A process writes a file of its own. It begins with the version of the format and the start of a session at the step
//! that comes next: TensorBoard then forgets what earlier files say of that step and later ones, as a resumed run does.
//! TensorBoard reads the files of a folder in the order of their names, so a name begins with a time above all others.
//!
//! Deliberately absent: histograms, graphs, text, and reading.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crc::{CRC_32_ISCSI, Crc};

use crate::error::{Error, Result};

/// CRC-32C.
static CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);
/// What the names of event files begin with; TensorBoard looks for `tfevents`.
const STEM: &str = "events.out.tfevents.";

/// Something measured or drawn.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// A number.
    Scalar(f64),
    /// A picture.
    Image {
        /// Rows.
        h: u32,
        /// Columns.
        w: u32,
        /// A whole PNG file.
        png: &'a [u8],
    },
}

/// An event file that is being written.
pub struct EventFile {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    whole: u64,
}

impl EventFile {
    /// Begins a file in `folder`, which is created where it is missing, for a process on the machine `host` whose first
    /// step is `first`. Of that step and later ones, earlier files of the folder count no more.
    ///
    /// # Errors
    /// `Error::File` if it cannot be written.
    pub fn create(folder: &Path, host: &str, first: u32) -> Result<Self> {
        fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be created: {e}")))?;
        let host: String = host.chars().filter(|c| c.is_ascii_alphanumeric() || "-.".contains(*c)).collect();
        let host = if host.is_empty() { "localhost" } else { &host };
        let begun = (now() as u64).max(newest(folder).map_or(0, |newest| newest + 1));
        let path = folder.join(format!("{STEM}{begun:010}.{host}.{}.0", std::process::id()));
        let file = File::options().append(true).create_new(true).open(&path);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be created: {e}")))?;
        let mut events = EventFile { path, file, whole: 0 };
        let version = event(0, 3, b"brain.Event:2");
        let start = event(first, 7, &number(1, 1));
        events.append(&[record(&version), record(&start)].concat())?;
        Ok(events)
    }

    /// Appends the values of a step, each with its tag; `train/loss` is the curve `loss` of the group `train`. Either
    /// all of them are in the file afterwards or none.
    ///
    /// # Errors
    /// `Error::File` if it cannot be written.
    pub fn write(&mut self, step: u32, values: &[(String, Value<'_>)]) -> Result<()> {
        let values = values.iter().map(|(tag, value)| {
            let value = match value {
                Value::Scalar(v) => [&[2 << 3 | 5][..], &(*v as f32).to_le_bytes()].concat(),
                Value::Image { h, w, png } => {
                    // The number of channels, which TensorBoard does not read: the PNG has its own.
                    let image =
                        [number(1, u64::from(*h)), number(2, u64::from(*w)), number(3, 3), bytes(4, png)].concat();
                    bytes(4, &image)
                }
            };
            bytes(1, &[bytes(1, tag.as_bytes()), value].concat())
        });
        let summary: Vec<u8> = values.flatten().collect();
        self.append(&record(&event(step, 5, &summary)))
    }

    /// True while the file is where it was begun.
    pub fn is_there(&self) -> bool {
        self.path.exists()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn append(&mut self, records: &[u8]) -> Result<()> {
        self.file.write_all(records).map_err(|e| {
            // A full disk may have taken a part of a record, and a reader stops at one.
            let _ = self.file.set_len(self.whole);
            Error::file(&self.path, format!("cannot be written: {e}"))
        })?;
        self.whole += records.len() as u64;
        Ok(())
    }
}

/// The folder of a run's event files.
pub fn folder(run: &Path) -> PathBuf {
    run.join("tensorboard")
}

/// The largest time in the names of event files of a folder, in seconds.
fn newest(folder: &Path) -> Option<u64> {
    let seconds = |name: &OsStr| name.to_str()?.strip_prefix(STEM)?.split('.').next()?.parse().ok();
    fs::read_dir(folder).ok()?.filter_map(|entry: io::Result<fs::DirEntry>| seconds(&entry.ok()?.file_name())).max()
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// The message `Event` of a step with one field of bytes.
fn event(step: u32, field: u8, content: &[u8]) -> Vec<u8> {
    [&[1 << 3 | 1][..], &now().to_le_bytes(), &number(2, u64::from(step)), &bytes(field, content)].concat()
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), message, &masked(message)].concat()
}

/// The CRC-32C of some bytes, rotated and shifted so that the CRC of data that hold CRCs is no trivial one.
fn masked(bytes: &[u8]) -> [u8; 4] {
    CRC.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// A field of protobuf that is a whole number.
fn number(field: u8, value: u64) -> Vec<u8> {
    [&[field << 3][..], &varint(value)].concat()
}

/// A field of protobuf that is a text, bytes or another message.
fn bytes(field: u8, content: &[u8]) -> Vec<u8> {
    [&[field << 3 | 2][..], &varint(content.len() as u64), content].concat()
}

/// Seven bits a byte, the lowest first; all but the last byte have the highest bit.
fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
