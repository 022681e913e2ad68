//! Numbers formatted for people, and paths for shells.

use std::path::{MAIN_SEPARATOR, Path};

/// Bytes in a GiB, for messages.
pub const GIB: f64 = (1u64 << 30) as f64;

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Text for a sentence: the first 80 characters.
pub(crate) fn cut(text: &str) -> String {
    match text.char_indices().nth(80) {
        None => text.into(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// A path as one word of a command line that can be pasted into a shell: quoted if it must be, and not to be taken for
/// a flag.
pub fn shell_word(path: &Path) -> String {
    let flag = path.as_os_str().as_encoded_bytes().starts_with(b"-");
    let path = if flag { Path::new(".").join(path) } else { path.to_path_buf() };
    let plain = |c: char| c.is_alphanumeric() || "/._-+:@,".contains(c) || c == MAIN_SEPARATOR;
    match path.to_str() {
        Some(text) if !text.is_empty() && text.chars().all(plain) => text.into(),
        // Windows has no double quotes in paths, and its shells do not know single ones.
        _ if cfg!(windows) => format!("\"{}\"", path.display()),
        Some(text) if !text.chars().any(char::is_control) => format!("'{}'", text.replace('\'', r"'\''")),
        // Bytes that are no text, and control characters.
        _ => {
            let escaped = path.as_os_str().as_encoded_bytes().iter().map(|&byte| match byte {
                b'\'' | b'\\' => format!("\\{}", char::from(byte)),
                b' '..=b'~' => char::from(byte).to_string(),
                _ => format!("\\{byte:03o}"),
            });
            format!("$'{}'", escaped.collect::<String>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_have_commas() {
        let texts = [0, 999, 1000, 35_746_307].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "35,746,307"]);
    }

    /// Shells give each word back as the path it was made of.
    #[cfg(unix)]
    #[test]
    fn shells_read_the_words_as_the_paths() {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        let names: [&[u8]; 12] = [
            b"runs/mnist",
            b"my run",
            b"it's",
            b"\"a\" $HOME `b` \\ !x",
            "\u{dc}ber \u{1f642}".as_bytes(),
            b"~",
            b"a*b?[c]",
            b"new\nline\tand 'tab'",
            b"not \xff text\\",
            b"-x",
            b"#a;b&c|d<e>f(g)",
            b"\x017",
        ];
        assert_eq!(shell_word(Path::new("runs/mnist-2")), "runs/mnist-2");
        assert_eq!(shell_word(Path::new("")), "''");
        for name in names {
            let word = shell_word(Path::new(OsStr::from_bytes(name)));
            // Only bash knows the quotes that control characters need.
            for shell in if word.starts_with('$') { &["bash"][..] } else { &["sh", "bash"][..] } {
                let out =
                    std::process::Command::new(shell).args(["-c", &format!("printf %s {word}")]).output().unwrap();
                let want = if name.starts_with(b"-") { [b"./", name].concat() } else { name.to_vec() };
                assert_eq!(out.stdout, want, "{shell} reads {word}");
            }
        }
    }
}
