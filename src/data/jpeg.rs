//! Whether a JPEG file is whole. The decoder fills what is missing with grey.

const START: [u8; 2] = [0xFF, 0xD8];

/// Refuses a file without its end marker.
pub fn check(bytes: &[u8]) -> Result<(), &'static str> {
    if has_end(bytes) { Ok(()) } else { Err("it is cut short") }
}

fn has_end(bytes: &[u8]) -> bool {
    let mut at = START.len();
    loop {
        match (bytes.get(at), bytes.get(at + 1)) {
            (Some(0xFF), Some(0xD9)) => return true,
            // In compressed data: a stuffed 0xFF, a restart marker, a fill byte.
            (Some(0xFF), Some(0x00 | 0xD0..=0xD7)) => at += 2,
            (Some(0xFF), Some(0xFF)) => at += 1,
            // Any other marker starts a segment with a length; it may hold a thumbnail with an end marker of its own.
            (Some(0xFF), Some(_)) => match bytes.get(at + 2..at + 4) {
                Some(length) => at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
            (Some(_), _) => at += 1,
            (None, _) => return false,
        }
    }
}
