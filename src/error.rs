//! Errors and output. There is one error type. Its text is one sentence for the person at the terminal: what was wrong,
//! with the value, and what would be right. Broken invariants are not errors but `assert!`s with numbers.

use std::path::{Path, PathBuf};

/// What can go wrong for a user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An unusable flag, key or value; exits with 2.
    #[error("{}", readable(.0))]
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
    #[error("{}", readable(.0))]
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
        let what = readable(what.to_string().trim_end_matches('.'));
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

/// Characters of a sentence, at most; what it quotes, as a value of a file, may be longer.
const LONGEST: usize = 1000;

/// A sentence, printable and without the middle of one that is too long: how it begins says what was wrong, how it ends
/// what would be right.
fn readable(sentence: &str) -> String {
    let sentence = printable(sentence);
    let characters = sentence.chars().count();
    if characters <= LONGEST {
        return sentence;
    }
    let begin = sentence.chars().take(LONGEST / 2);
    begin.chain(" ... ".chars()).chain(sentence.chars().skip(characters - LONGEST / 2)).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_quotation_loses_its_middle() {
        let whole = format!("steps = {}: a whole number is expected", "\n".repeat(LONGEST / 2 - 20));
        assert_eq!(Error::Usage(whole.clone()).to_string().matches("\\n").count(), LONGEST / 2 - 20);
        let value = "é\u{7}".repeat(5000);
        let sentence = format!("steps = {value}: a whole number is expected");
        let path = "config.toml";
        let errors = [Error::Usage(sentence.clone()), Error::Failed(sentence.clone()), Error::file(path, &sentence)];
        for error in errors {
            let shown = error.to_string();
            let own = shown.strip_prefix("config.toml: ").unwrap_or(&shown);
            assert!(
                own.starts_with("steps = é\\u{7}é") && own.ends_with("é\\u{7}: a whole number is expected"),
                "{own}"
            );
            assert_eq!(own.chars().count(), LONGEST + 5);
        }
    }
}
