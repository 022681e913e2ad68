//! Files and folders that appear whole or not at all: written beside, synced, renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Ending of the names that files and folders have until they are whole. The names start with a dot.
pub const UNFINISHED: &str = ".unfinished";

/// Writes a file.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Writes a file piece by piece.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut temporary = file_builder().tempfile_in(parent(path))?;
        let mut writer = BufWriter::new(temporary.as_file_mut());
        fill(&mut writer)?;
        writer.flush()?;
        drop(writer);
        temporary.as_file().sync_all()?;
        temporary.persist(path)?;
        sync_folder(parent(path))
    };
    write().map_err(|e| Error::file(path, format!("cannot be written: {e}")))
}

/// Makes the folder `path`, which must not exist or be empty: `fill` writes into a temporary one beside it, and
/// everything in that is synced before it gets its name. If `fill` fails nothing is left.
pub fn write_folder_atomically(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e: io::Error| Error::file(path, format!("cannot be written: {e}"));
    let temporary = unfinished().tempdir_in(parent(path)).map_err(failed)?;
    fill(temporary.path())?;
    sync_tree(temporary.path()).map_err(failed)?;
    fs::rename(temporary.path(), path).map_err(failed)?;
    // It has another name now; there is nothing to clean up.
    let _ = temporary.keep();
    sync_folder(parent(path)).map_err(failed)
}

/// Deletes what a program that was killed while it wrote into `folder` has left there.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    let failed = |e: io::Error| Error::file(folder, format!("cannot be cleaned of unfinished files: {e}"));
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().ends_with(UNFINISHED.as_bytes()) {
            let is_folder = entry.file_type().map_err(failed)?.is_dir();
            let remove = if is_folder { fs::remove_dir_all } else { fs::remove_file };
            remove(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

/// The folder that `path` stands in.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn unfinished() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(UNFINISHED);
    builder
}

/// Files as anyone else would make them, where a temporary file would be for its owner's eyes alone.
#[cfg(unix)]
fn file_builder() -> tempfile::Builder<'static, 'static> {
    use std::os::unix::fs::PermissionsExt;
    let mut builder = unfinished();
    builder.permissions(fs::Permissions::from_mode(0o666)); // less the umask
    builder
}

#[cfg(not(unix))]
fn file_builder() -> tempfile::Builder<'static, 'static> {
    unfinished()
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        // To be written, since Windows syncs nothing else.
        if path.is_dir() { sync_tree(&path)? } else { File::options().write(true).open(&path)?.sync_all()? }
    }
    sync_folder(folder)
}

/// Makes names in a folder survive a power cut. Only Unix can open a folder for it.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}
