//! SLURM's compressed lists of hosts, such as `gnode[10,20-25],login1`: the first host of one.
//!
//! Brackets hold numbers and ranges of numbers, with leading zeros where the names have them; a name may have several
//! brackets, and text behind them. Names are in the order of the list, so the first one needs no expansion of the rest.

/// The longest list that is looked at, in bytes.
const LONGEST: usize = 1 << 20;

/// The name of the first host.
///
/// # Errors
/// What is wrong with the list, the end of a sentence.
pub fn first_host(list: &str) -> Result<String, String> {
    if list.len() > LONGEST {
        return Err(format!("it is {} bytes long", list.len()));
    }
    let mut host = String::new();
    let mut rest = list.trim();
    while let Some(c) = rest.chars().next() {
        match c {
            ',' => break,
            '[' => {
                let Some(end) = rest.find(']') else { return Err("a bracket is not closed".into()) };
                let first = rest[1..end].split([',', '-']).next().unwrap_or_default();
                if first.is_empty() || !first.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(format!(
                        "a number is expected after '[' and not '{}'",
                        crate::text::cut(&rest[1..end])
                    ));
                }
                host += first;
                rest = &rest[end + 1..];
            }
            c if c.is_ascii_alphanumeric() || "-_.".contains(c) => {
                host.push(c);
                rest = &rest[1..];
            }
            c => return Err(format!("'{}' is in no name of a host", c.escape_default())),
        }
    }
    if host.is_empty() { Err("it names no host".into()) } else { Ok(host) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [
            ("gnode[10,20-25]", "gnode10"),
            ("gnode[20-25,10]", "gnode20"),
            ("node1", "node1"),
            ("node1,node2", "node1"),
            (" n[001-128] \n", "n001"),
            ("rack[0-3]node[08-15]", "rack0node08"),
            ("a[1-2]b[3,4]c[5]-ib,z9", "a1b3c5-ib"),
            ("gpu-a.cluster.example,gpu-b.cluster.example", "gpu-a.cluster.example"),
            ("[3-4]", "3"),
            ("login1,gnode[10-12]", "login1"),
            ("n[1000000000000000000000-2000000000000000000000]", "n1000000000000000000000"),
        ] {
            assert_eq!(first_host(list).as_deref(), Ok(host), "{list}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for (list, says) in [
            ("", "names no host"),
            (",a", "names no host"),
            ("a[", "not closed"),
            ("a[1-2", "not closed"),
            ("a[]", "not ''"),
            ("a[x-y]", "not 'x-y'"),
            ("a[-2]", "not '-2'"),
            ("a[[1]]", "not '[1'"),
            ("a]", "']' is in no name"),
            ("a b", "' ' is in no name"),
            ("\u{e4}1", "is in no name"),
            ("a\u{1b}[1]", "\\u{1b}"),
        ] {
            let said = first_host(list).unwrap_err();
            assert!(said.contains(says), "{list:?}: {said}");
        }
        assert!(first_host(&"a".repeat(LONGEST + 1)).is_err());
    }
}
