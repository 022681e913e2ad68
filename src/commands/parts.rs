//! Finished batches of a long drawing, in a folder beside the file that they will make, so that an interrupted one goes
//! on. Nothing stands under the final name before all of them are there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::output::write_atomically;

/// The batches of one drawing.
pub(super) struct Parts {
    folder: PathBuf,
    /// Images of a batch.
    pub together: usize,
    count: usize,
    /// Bytes of an image.
    image: usize,
}

/// The file that says what the batches are of.
const PLAN: &str = "plan";

impl Parts {
    /// The folder for `out`: OUT.part.
    fn folder(out: &Path) -> PathBuf {
        let mut name = out.components().as_path().as_os_str().to_owned();
        name.push(".part");
        name.into()
    }

    /// Whether there are batches of an interrupted drawing.
    pub fn are_there(out: &Path) -> bool {
        Parts::folder(out).join(PLAN).exists()
    }

    /// Opens the batches of a drawing of `count` images of `image` bytes, which `hash` identifies: those that are there
    /// if `resume`, of as many images as they have; otherwise none, of `together`.
    ///
    /// # Errors
    /// `Error::File` for batches of another drawing, or any without `resume`, and a folder that cannot be read or
    /// written.
    pub fn open(out: &Path, hash: &str, resume: bool, count: usize, together: usize, image: usize) -> Result<Self> {
        let folder = Parts::folder(out);
        let mut parts = Parts { folder, together, count, image };
        let folder = &parts.folder;
        let plan = folder.join(PLAN);
        match fs::read_to_string(&plan) {
            Ok(text) => {
                let there =
                    text.split_once(' ').and_then(|(own, rest)| Some((own, rest.trim().parse::<usize>().ok()?)));
                let Some((own, together)) = there.filter(|(_, together)| *together > 0) else {
                    return Err(Error::file(plan, format!("is damaged; delete {} to start anew", folder.display())));
                };
                if own != hash {
                    let what = "holds images of another command, model or device; delete it to start anew, or give another --out";
                    return Err(Error::file(folder, what));
                }
                if !resume {
                    let what =
                        "holds images of this command, which was interrupted: add --resume to go on, or delete it";
                    return Err(Error::file(folder, what));
                }
                parts.together = together;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be created: {e}")))?;
                write_atomically(&plan, format!("{hash} {together}\n").as_bytes())?;
            }
            Err(e) => return Err(Error::file(plan, format!("cannot be read: {e}"))),
        }
        Ok(parts)
    }

    /// Indices of the first images of all batches.
    pub fn firsts(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.count).step_by(self.together)
    }

    /// Images of the batch that begins with `first`.
    pub fn len(&self, first: usize) -> usize {
        self.together.min(self.count - first)
    }

    fn file(&self, first: usize) -> PathBuf {
        self.folder.join(format!("{first}.u8"))
    }

    /// Whether a batch is there, whole.
    pub fn is_done(&self, first: usize) -> bool {
        let whole = (self.len(first) * self.image) as u64;
        fs::metadata(self.file(first)).is_ok_and(|file| file.is_file() && file.len() == whole)
    }

    /// Keeps the bytes of a batch.
    ///
    /// # Errors
    /// `Error::File` if they cannot be written.
    pub fn keep(&self, first: usize, bytes: &[u8]) -> Result<()> {
        write_atomically(&self.file(first), bytes)
    }

    fn file_along(&self, first: usize) -> PathBuf {
        self.folder.join(format!("{first}.along.u8"))
    }

    /// Whether the predictions along the way of a batch are there.
    pub fn has_along(&self, first: usize) -> bool {
        self.file_along(first).is_file()
    }

    /// Keeps the bytes of the predictions along the way of a batch, all images of a step after those of the step
    /// before.
    ///
    /// # Errors
    /// `Error::File` if they cannot be written.
    pub fn keep_along(&self, first: usize, bytes: &[u8]) -> Result<()> {
        write_atomically(&self.file_along(first), bytes)
    }

    /// The predictions along the way of a batch, for each step the bytes of its images.
    ///
    /// # Errors
    /// `Error::File` if they cannot be read.
    pub fn along(&self, first: usize) -> Result<Vec<Vec<u8>>> {
        let file = self.file_along(first);
        let bytes = fs::read(&file).map_err(|e| Error::file(&file, format!("cannot be read: {e}")))?;
        let of_a_step = self.len(first) * self.image;
        if !bytes.len().is_multiple_of(of_a_step) {
            return Err(Error::file(&file, "is not whole"));
        }
        Ok(bytes.chunks(of_a_step).map(<[u8]>::to_vec).collect())
    }

    /// The bytes of every batch, in order.
    pub fn read(&self) -> impl Iterator<Item = io::Result<Vec<u8>>> + '_ {
        self.firsts().map(|first| {
            let bytes = fs::read(self.file(first))?;
            if bytes.len() != self.len(first) * self.image {
                let file = self.file(first);
                return Err(io::Error::other(format!("{} is not whole", file.display())));
            }
            Ok(bytes)
        })
    }

    /// Deletes the batches, once the file that they make is written.
    ///
    /// # Errors
    /// `Error::File` if they cannot be deleted.
    pub fn delete(self) -> Result<()> {
        fs::remove_dir_all(&self.folder).map_err(|e| Error::file(&self.folder, format!("cannot be deleted: {e}")))
    }
}
