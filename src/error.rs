//! What the program says. One error type: its text is one sentence for the person at the terminal: what was wrong, with
//! the value, and what would be right. Broken invariants are not errors but `assert!`s with numbers.

use std::path::{Path, PathBuf};

/// What can go wrong for a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, key or value that cannot be used; the program exits with 2.
    #[error("{0}")]
    Usage(String),
    /// A file that is missing, unreadable or not what it should be; exits with 1.
    #[error("{}: {what}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        what: String,
    },
    /// Everything else that stops the job; exits with 1.
    #[error("{0}")]
    Failed(String),
    /// Stopped on request before it was done; exits with 1.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// `Error::File` from a path and a sentence.
    pub fn file(path: impl AsRef<Path>, what: impl std::fmt::Display) -> Self {
        Error::File { path: path.as_ref().to_path_buf(), what: what.to_string() }
    }

    /// Process exit code: 2 for wrong usage, 1 for the rest.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::File { .. } | Error::Failed(_) | Error::Interrupted => 1,
        }
    }
}

/// `std::result::Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Returns [`Error::Usage`] with a formatted sentence.
#[macro_export]
macro_rules! usage {
    ($($arg:tt)*) => { return Err($crate::error::Error::Usage(format!($($arg)*))) };
}

/// `println!` that does not mind a reader who has gone, as in `ddpm-cuda train | head -1`: the work goes on.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}
