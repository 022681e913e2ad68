//! Numbers and times formatted for people, and paths for shells.

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

/// So many images: `1 image`, `12,345 images`.
pub fn images(count: usize) -> String {
    format!("{} image{}", grouped(count as u64), if count == 1 { "" } else { "s" })
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

/// A length of time in its two largest units: `45 s`, `12 min`, `3 h 20 min`, `2 days 5 h`.
pub fn duration(seconds: f64) -> String {
    // What a file says may be anything; this is longer than the universe is old.
    let seconds = seconds.round().clamp(0.0, 1e18) as u64;
    let (minutes, hours) = ((seconds + 30) / 60, (seconds + 1800) / 3600);
    match seconds {
        0..100 => format!("{seconds} s"),
        100..5970 => format!("{minutes} min"),
        5970..172_800 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{} days {} h", hours / 24, hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_have_commas() {
        let texts = [0, 999, 1000, 35_746_307].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "35,746,307"]);
        assert_eq!([0, 1, 12_345].map(images), ["0 images", "1 image", "12,345 images"]);
    }

    #[test]
    fn times_have_their_largest_units() {
        let texts = [0.4, 99.0, 100.0, 3599.0, 5969.0, 5970.0, 12_000.0, 172_799.0, 172_800.0, 1e6].map(duration);
        let want = [
            "0 s",
            "99 s",
            "2 min",
            "60 min",
            "99 min",
            "1 h 40 min",
            "3 h 20 min",
            "48 h 0 min",
            "2 days 0 h",
            "11 days 14 h",
        ];
        assert_eq!(texts, want);
        assert_eq!([-1.0, f64::NAN].map(duration), ["0 s", "0 s"]);
        assert!(duration(f64::INFINITY).ends_with(" h"));
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
