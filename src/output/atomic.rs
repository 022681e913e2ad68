//! Files and folders that appear complete or not at all: written beside the final name, synced, renamed.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Suffix of the temporary names, which start with a dot.
pub const UNFINISHED: &str = ".unfinished";

/// Writes a file.
///
/// # Errors
/// `Error::File` if it cannot be written.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes))
}

/// Writes a file through a buffered writer.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> Result<()> {
    let write = || -> io::Result<()> {
        let mut temporary = file_builder().tempfile_in(parent(path)).map_err(without_name)?;
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

/// Makes the folder `path`, which must be empty if it exists: `fill` writes into a temporary folder beside it, whose
/// contents are synced before it is renamed. If `fill` fails, nothing remains.
///
/// # Errors
/// Those of `fill`, and `Error::File` if the folder cannot be written.
pub fn write_folder_atomically(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let failed = |e: io::Error| Error::file(path, format!("cannot be written: {e}"));
    let temporary = unfinished().tempdir_in(parent(path)).map_err(without_name).map_err(failed)?;
    fill(temporary.path()).map_err(|e| match e {
        // In the words of who reads it, the file is where it would have come to lie.
        Error::File { path: file, what } => match file.strip_prefix(temporary.path()) {
            Ok(inside) => Error::file(path.join(inside), what),
            Err(_) => Error::file(file, what),
        },
        other => other,
    })?;
    sync_tree(temporary.path()).map_err(failed)?;
    fs::rename(temporary.path(), path).map_err(failed)?;
    // It has been renamed; there is nothing to clean up.
    let _ = temporary.keep();
    sync_folder(parent(path)).map_err(failed)
}

/// Deletes unfinished files and folders that a killed program left in `folder`.
///
/// # Errors
/// `Error::File` if they cannot be listed or deleted.
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

/// The folder that holds `path`.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The system's error alone. tempfile adds the random name, which helps nobody and differs each time, so that one cause
/// would look like many; it keeps the error itself to itself.
fn without_name(error: io::Error) -> io::Error {
    match error.to_string().split_once(" at path ") {
        Some((cause, _)) => io::Error::new(error.kind(), cause.to_string()),
        None => error,
    }
}

fn unfinished() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".").suffix(UNFINISHED);
    builder
}

/// Files with the usual permissions; a temporary file would be readable by its owner only.
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
        // Opened for writing, since Windows cannot sync other handles.
        if path.is_dir() { sync_tree(&path)? } else { File::options().write(true).open(&path)?.sync_all()? }
    }
    sync_folder(folder)
}

/// Makes the names in a folder survive a power cut. Only Unix can open a folder to sync it.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_do_not_tell_random_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("missing/file");
        let said = [write_atomically(&path, b""), write_folder_atomically(&path, |_| Ok(()))];
        for error in said.map(|said| said.unwrap_err().to_string()) {
            let want = format!("{}: cannot be written: ", path.display());
            assert!(error.starts_with(&want) && !error.contains(UNFINISHED), "{error}");
        }
    }
}
