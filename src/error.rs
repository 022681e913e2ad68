//! Errors and output. There is one error type. Its text is one sentence for the person at the terminal: what was wrong,
//! with the value, and what would be right. Broken invariants are not errors but `assert!`s with numbers.

use std::path::{Path, PathBuf};

/// What can go wrong for a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An unusable flag, key or value; exits with 2.
    #[error("{}", printable(.0))]
    Usage(String),
    /// A missing, unreadable or invalid file or folder; exits with 1.
    #[error("{}: {what}", printable(&path.display().to_string()))]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        what: String,
    },
    /// Any other failure; exits with 1.
    #[error("{}", printable(.0))]
    Failed(String),
    /// A loss, gradient or weight that is not finite: the state is not worth saving; exits with 1.
    #[error("{0}")]
    NotFinite(String),
    /// Stopped on request before it was finished; exits with 1.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// `Error::File` from a path and a sentence.
    pub fn file(path: impl AsRef<Path>, what: impl std::fmt::Display) -> Self {
        // Messages of libraries end with periods, and quote what a file holds.
        let what = printable(what.to_string().trim_end_matches('.'));
        Error::File { path: path.as_ref().to_path_buf(), what }
    }

    /// Process exit code: 2 for wrong usage, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Usage(_) => 2,
            Error::File { .. } | Error::Failed(_) | Error::NotFinite(_) | Error::Interrupted => 1,
        }
    }
}

/// `text` with its control characters escaped: a name in a file must neither break the line nor command the terminal.
pub(crate) fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(shown).collect()
}

/// `std::result::Result` with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Returns [`Error::Usage`] with a formatted sentence.
#[macro_export]
macro_rules! usage {
    ($($arg:tt)*) => { return Err($crate::error::Error::Usage(format!($($arg)*))) };
}

/// `println!` that ignores a closed pipe, as in `ddpm-cuda train | head -1`: the work goes on.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($arg)*);
    }};
}
