//! What ranks say to each other, as bytes.
//!
//! A connection begins with an opening from each side: `ddpmrank`, the protocol (u32), and a secret (a byte of length,
//! then so many), which is empty in the answer. It stays the same in every version of the protocol, so that a rank of
//! another one can be refused by name. Then come messages: the lengths of head and body (u32 each), the head, which is
//! JSON, and the body, which is any bytes. Numbers are little-endian.
//!
//! [`Decoder`] reads both from whatever pieces a connection gives. Anybody can connect: a length is compared with the
//! most there can be before anything follows from it, and memory grows with the bytes that came and not with those that
//! were announced.

use std::fmt;

use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_128;

use crate::error::{Error, Result};
use crate::text::cut;

/// What a connection begins with.
const MAGIC: [u8; 8] = *b"ddpmrank";
/// Version of all that follows the opening.
pub const PROTOCOL: u32 = 1;
/// Bytes of a secret, at most.
pub const LONGEST_TOKEN: usize = 128;
/// Bytes of a head, at most. The largest one has the settings of a run.
pub const LONGEST_HEAD: usize = 1 << 20;
/// Bytes of a body, at most.
pub const LONGEST_BODY: usize = 1 << 30;

/// A rank, as messages name it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Its number.
    pub rank: usize,
    /// Its number among those of its machine.
    pub local_rank: usize,
    /// Name of its machine.
    pub host: String,
    /// Number of its process there.
    pub process: u32,
    /// What it computes on.
    pub device: String,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} ({}, process {}", self.rank, self.host, self.process)?;
        if !self.device.is_empty() {
            write!(f, ", {}", self.device)?;
        }
        f.write_str(")")
    }
}

/// Something that must be the same on all ranks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// What, such as a setting.
    pub name: String,
    /// Its value here.
    pub value: String,
}

/// Bytes of a fact's value that are sent as they are.
const LONGEST_VALUE: usize = 200;

impl Fact {
    /// A fact. Of a long value, such as a list of betas, there is the beginning and a hash.
    pub fn new(name: impl Into<String>, value: impl fmt::Display) -> Self {
        let whole = value.to_string();
        let value = match whole.len() > LONGEST_VALUE {
            true => {
                let hash = XxHash3_128::oneshot(whole.as_bytes());
                format!("{} ({} bytes, hash {hash:032x})", cut(&whole), whole.len())
            }
            false => whole,
        };
        Fact { name: name.into(), value }
    }
}

/// Where all ranks stop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    /// The last step that is done.
    pub after: u32,
    /// The code that every rank exits with.
    pub code: u8,
    /// Why, such as the name of a signal.
    pub why: String,
    /// The rank that asked for it first.
    pub rank: usize,
}

/// How a rank introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Who it is.
    pub who: Who,
    /// How many ranks it thinks there are.
    pub size: usize,
    /// How many its machine has, if it knows.
    pub local_size: Option<usize>,
    /// What must be as on rank 0.
    pub facts: Vec<Fact>,
}

/// A task that all ranks do together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// How many came before it.
    pub number: u64,
    /// What it is.
    pub name: String,
}

/// A message. Those to rank 0 come from another rank, the others from rank 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "lowercase")]
pub enum Message {
    /// To rank 0, the first one.
    Hello(Hello),
    /// The run does not begin, and why.
    Refused {
        /// A sentence.
        why: String,
    },
    /// All have come.
    Welcome {
        /// All ranks, in order.
        ranks: Vec<Who>,
    },
    /// Both ways: a sign of life.
    Alive {
        /// The step that the rank is at.
        step: u32,
    },
    /// Both ways: a rank does something alone that may take long.
    Working {
        /// The rank.
        rank: usize,
        /// What it does.
        what: String,
        /// Milliseconds that it takes at most; 0 once it is done.
        millis: u64,
    },
    /// To rank 0: all should stop.
    Ask {
        /// The code to exit with.
        code: u8,
        /// Why.
        why: String,
    },
    /// Begin no further step and say which one has begun.
    Where,
    /// To rank 0, the answer.
    At {
        /// The last step that has begun.
        step: u32,
    },
    /// Stop there.
    Stop(Stop),
    /// Both ways: the run has failed.
    Failed {
        /// The rank that is to blame.
        rank: usize,
        /// A sentence.
        text: String,
    },
    /// To rank 0, with a body: a rank's part of a common task.
    Part(Call),
    /// With a body: the outcome.
    Answer(Call),
    /// To rank 0: this rank has done all its work.
    Leave,
    /// So have all.
    Goodbye,
}

/// The opening of a connection, with the secret of the one who connects.
///
/// # Panics
/// For a secret longer than [`LONGEST_TOKEN`].
pub fn opening(token: &str) -> Vec<u8> {
    assert!(token.len() <= LONGEST_TOKEN, "a secret of {} bytes", token.len());
    let length = token.len() as u8;
    [&MAGIC[..], &PROTOCOL.to_le_bytes(), &[length], token.as_bytes()].concat()
}

/// A message up to its body of so many bytes.
///
/// # Panics
/// For a head or a body that no decoder takes.
pub fn head(message: &Message, body: usize) -> Vec<u8> {
    let json = serde_json::to_vec(message).expect("numbers and texts");
    assert!(json.len() <= LONGEST_HEAD && body <= LONGEST_BODY, "{} and {body} bytes", json.len());
    let lengths = [json.len() as u32, body as u32].map(u32::to_le_bytes);
    [lengths.as_flattened(), &json].concat()
}

/// What an opening says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The protocol of the other side.
    pub protocol: u32,
    /// Its secret.
    pub token: Vec<u8>,
}

/// Bytes of a connection that are not yet understood.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// Adds what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// How many bytes wait.
    pub fn waiting(&self) -> usize {
        self.bytes.len()
    }

    /// The opening, if all of it is there.
    ///
    /// # Errors
    /// `Error::Failed` as soon as the bytes cannot be one.
    pub fn opening(&mut self) -> Result<Option<Opening>> {
        const LENGTH: usize = MAGIC.len() + 4;
        let begun = self.bytes.len().min(MAGIC.len());
        if self.bytes[..begun] != MAGIC[..begun] {
            return Err(Error::Failed("the connection is not of this program".into()));
        }
        let Some(&length) = self.bytes.get(LENGTH) else { return Ok(None) };
        let end = LENGTH + 1 + usize::from(length);
        if usize::from(length) > LONGEST_TOKEN {
            return Err(Error::Failed(format!("a secret of {length} bytes; {LONGEST_TOKEN} are the most")));
        }
        if self.bytes.len() < end {
            return Ok(None);
        }
        let protocol = self.bytes[MAGIC.len()..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        let token = self.bytes[LENGTH + 1..end].to_vec();
        self.bytes.drain(..end);
        Ok(protocol.map(|protocol| Opening { protocol, token }))
    }

    /// The next message and its body, if all of it is there.
    ///
    /// # Errors
    /// `Error::Failed` for lengths that are too large, a head that is no message, or a body where there is none.
    pub fn message(&mut self) -> Result<Option<(Message, Vec<u8>)>> {
        let Some(lengths) = self.bytes.first_chunk::<8>() else { return Ok(None) };
        let (head, body) = lengths.split_at(4);
        let length = |bytes: &[u8]| bytes.iter().rev().fold(0, |all, &byte| all << 8 | usize::from(byte));
        let (head, body) = (length(head), length(body));
        if head > LONGEST_HEAD || body > LONGEST_BODY {
            return Err(Error::Failed(format!(
                "a message of {head} bytes with {body} behind it; {LONGEST_HEAD} and {LONGEST_BODY} are the most"
            )));
        }
        let (start, end) = (8 + head, 8 + head + body);
        if self.bytes.len() < end {
            return Ok(None);
        }
        let message: Message = serde_json::from_slice(&self.bytes[8..start])
            .map_err(|e| Error::Failed(format!("a message that is none: {e}")))?;
        if body > 0 && !matches!(message, Message::Part(_) | Message::Answer(_)) {
            return Err(Error::Failed(format!("{body} bytes behind a message that has none")));
        }
        let rest = self.bytes.split_off(end);
        let mut bytes = std::mem::replace(&mut self.bytes, rest);
        bytes.drain(..start);
        Ok(Some((message, bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(rank: usize) -> Who {
        Who {
            rank,
            local_rank: rank % 2,
            host: format!("h{}", rank / 2),
            process: 70 + rank as u32,
            device: "X".into(),
        }
    }

    /// One of each kind.
    fn all() -> Vec<Message> {
        let call = || Call { number: 7, name: "gather of m".into() };
        let hello =
            Hello { who: who(1), size: 4, local_size: Some(2), facts: vec![Fact::new("version", "\"\n\u{e4}")] };
        vec![
            Message::Hello(hello),
            Message::Refused { why: "because".into() },
            Message::Welcome { ranks: (0..4).map(who).collect() },
            Message::Alive { step: u32::MAX },
            Message::Working { rank: 0, what: "saving".into(), millis: 60_000 },
            Message::Ask { code: 130, why: "Ctrl-C".into() },
            Message::Where,
            Message::At { step: 3 },
            Message::Stop(Stop { after: 4, code: 143, why: "SIGTERM".into(), rank: 3 }),
            Message::Failed { rank: 2, text: "out of memory".into() },
            Message::Part(call()),
            Message::Answer(call()),
            Message::Leave,
            Message::Goodbye,
        ]
    }

    fn body(message: &Message) -> Vec<u8> {
        match message {
            Message::Part(_) => (0..=255).cycle().take(3000).collect(),
            _ => Vec::new(),
        }
    }

    /// Whatever the pieces, the messages are those that were sent.
    #[test]
    fn messages_are_read_from_any_pieces() {
        let sent: Vec<(Message, Vec<u8>)> =
            all().into_iter().map(|message| (message.clone(), body(&message))).collect();
        let mut bytes = opening("secret");
        for (message, body) in &sent {
            bytes.extend(head(message, body.len()));
            bytes.extend(body);
        }
        for piece in [1, 2, 7, 64, 1000, bytes.len()] {
            let (mut decoder, mut opened, mut read) = (Decoder::default(), None, Vec::new());
            for piece in bytes.chunks(piece) {
                decoder.push(piece);
                if opened.is_none() {
                    opened = decoder.opening().unwrap();
                }
                while opened.is_some()
                    && let Some(message) = decoder.message().unwrap()
                {
                    read.push(message);
                }
            }
            assert_eq!(opened, Some(Opening { protocol: PROTOCOL, token: b"secret".to_vec() }));
            assert_eq!(read, sent, "pieces of {piece} bytes");
            assert_eq!(decoder.waiting(), 0);
        }
    }

    #[test]
    fn strangers_are_known_by_their_first_bytes() {
        for junk in [&b"GET / HTTP/1.1\r\n"[..], b"S", b"ddpmrunk", b"\0", b"\x16\x03\x01"] {
            let mut decoder = Decoder::default();
            decoder.push(junk);
            assert!(decoder.opening().is_err(), "{junk:?}");
        }
        let mut decoder = Decoder::default();
        decoder.push(b"ddpm");
        assert_eq!(decoder.opening().unwrap(), None);
        decoder.push(b"rank\x02\x01\0\0\xff");
        assert!(decoder.opening().unwrap_err().to_string().contains("a secret of 255 bytes"));
        // Another version of the protocol is read as far as this.
        let mut decoder = Decoder::default();
        decoder.push(b"ddpmrank\x02\x01\0\0\x01xyz");
        assert_eq!(decoder.opening().unwrap(), Some(Opening { protocol: 258, token: b"x".to_vec() }));
        assert_eq!(decoder.waiting(), 2);
    }

    #[test]
    fn announced_lengths_are_not_believed() {
        let refused = |bytes: &[u8]| {
            let mut decoder = Decoder::default();
            decoder.push(bytes);
            decoder.message().expect_err("no message").to_string()
        };
        assert!(refused(b"\xff\xff\xff\xff\0\0\0\0").contains("a message of 4294967295 bytes"));
        assert!(refused(b"\x02\0\0\0\x01\0\0\x40{}").contains("1073741825 behind it"));
        assert!(refused(b"\0\0\0\0\0\0\0\0").contains("a message that is none"));
        assert!(refused(b"\x02\0\0\0\0\0\0\0{}").contains("missing field `is`"));
        let with_body = [head(&Message::Where, 3), b"abc".to_vec()].concat();
        assert!(refused(&with_body).contains("3 bytes behind a message that has none"));
        // The largest body takes no room before it comes.
        let mut decoder = Decoder::default();
        decoder.push(&head(&Message::Part(Call { number: 0, name: String::new() }), LONGEST_BODY));
        assert_eq!(decoder.message().unwrap(), None);
        assert!(decoder.bytes.capacity() < 4096, "{} bytes", decoder.bytes.capacity());
    }

    #[test]
    fn long_values_differ_by_their_hash() {
        let [a, b] = ["a", "b"].map(|last| Fact::new("betas", "0.001, ".repeat(1000) + last));
        assert!(a != b && a.value.len() < LONGEST_VALUE && a.value.starts_with("0.001, 0.001, "), "{a:?}");
        assert_eq!(Fact::new("steps", 7).value, "7");
    }

    #[test]
    fn ranks_are_named_with_all_that_is_known() {
        assert_eq!(who(3).to_string(), "rank 3 (h1, process 73, X)");
        assert_eq!(Who { device: String::new(), ..who(0) }.to_string(), "rank 0 (h0, process 70)");
    }
}
