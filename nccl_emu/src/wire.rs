//! Messages between a rank and the hub: a byte that says what it is, eight for the length, and the body. Numbers are
//! little-endian. Both ends are this library in one version; a hello that is not is refused by its first bytes.

use std::ffi::c_int;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::call::Call;
use crate::codes::{Code, Refusal, refusal};

/// What the first bytes of an id and of a hello are. The last two say the version of the messages.
const MAGIC: [u8; 8] = *b"ncclEm01";

/// Bytes of an `ncclUniqueId`.
pub const ID_BYTES: usize = 128;

/// What tells one communicator's hub from another's.
pub type Token = [u8; 16];

/// Where a communicator's ranks meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meeting {
    pub address: SocketAddr,
    pub token: Token,
}

impl Meeting {
    pub fn to_id(self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        let address = match self.address.ip() {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        id[..8].copy_from_slice(&MAGIC);
        id[8..24].copy_from_slice(&self.token);
        id[24..40].copy_from_slice(&address.octets());
        id[40..42].copy_from_slice(&self.address.port().to_le_bytes());
        id
    }

    /// `None` if the id was not made by this library.
    pub fn from_id(id: &[u8; ID_BYTES]) -> Option<Meeting> {
        let mut address = [0; 16];
        address.copy_from_slice(&id[24..40]);
        let mut token = [0; 16];
        token.copy_from_slice(&id[8..24]);
        let address = Ipv6Addr::from(address).to_canonical();
        let port = u16::from_le_bytes([id[40], id[41]]);
        let own = id[..8] == MAGIC && id[42..].iter().all(|&byte| byte == 0);
        own.then_some(Meeting { address: SocketAddr::new(address, port), token })
    }
}

/// Who a rank is, for messages and for telling GPUs apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Who {
    pub pid: u32,
    pub host: String,
    /// Tells machines apart, which may have the same name.
    pub machine: String,
    pub device: c_int,
    pub uuid: [u8; 16],
    /// It accepts that others use its GPU.
    pub shares: bool,
}

/// How a rank introduces itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    pub token: Token,
    pub rank: u32,
    pub size: u32,
    /// Of NCCL.
    pub version: c_int,
    pub who: Who,
}

/// How a communicator ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bye {
    Ended,
    Aborted,
}

/// What a rank says after its hello.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToHub {
    /// The calls of one batch, and what each gives away.
    Calls(Vec<(Call, Vec<u8>)>),
    Bye(Bye),
}

/// What the hub says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ToRank {
    /// All ranks are there. The process in which the hub is, by its number and its host's name, and how many of the
    /// ranks are in it, too.
    Welcome { pid: u32, host: String, ranks: u32 },
    /// Another rank has ended its part; whether it is in the hub's process.
    Ended { with_hub: bool },
    /// What the calls of the last batch get, one behind the other.
    Results(Vec<u8>),
    /// The communicator has failed.
    Failure(Refusal),
}

/// Bytes of a hello, at most: a stranger's is not read further.
const LONGEST_HELLO: u64 = 4096;

const HELLO: u8 = 1;
const CALLS: u8 = 2;
const ENDED: u8 = 3;
const ABORTED: u8 = 4;
const WELCOME: u8 = 5;
const RESULTS: u8 = 6;
const FAILURE: u8 = 7;
const OTHER_ENDED: u8 = 8;

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn frame(what: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(9 + body.len());
    bytes.push(what);
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.extend(body);
    bytes
}

/// The next message; its body has at most `most` bytes.
fn read_frame(from: &mut impl Read, most: u64) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 9];
    from.read_exact(&mut head)?;
    let mut length = [0; 8];
    length.copy_from_slice(&head[1..]);
    let length = u64::from_le_bytes(length);
    if length > most {
        return Err(invalid("a message that is too long"));
    }
    // Memory is taken as the bytes arrive.
    let mut body = Vec::new();
    from.take(length).read_to_end(&mut body)?;
    if body.len() as u64 != length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((head[0], body))
}

/// Takes a body apart.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> io::Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(|| invalid("a message that is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn i32(&mut self) -> io::Result<i32> {
        self.array().map(i32::from_le_bytes)
    }

    fn text(&mut self) -> io::Result<String> {
        let length = self.u32()? as usize;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn end(&self) -> io::Result<()> {
        if self.0.is_empty() { Ok(()) } else { Err(invalid("a message that is too long")) }
    }
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u32).to_le_bytes());
    to.extend(text.as_bytes());
}

impl Hello {
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut body = MAGIC.to_vec();
        body.extend(self.token);
        body.extend(self.rank.to_le_bytes());
        body.extend(self.size.to_le_bytes());
        body.extend(self.version.to_le_bytes());
        body.extend(self.who.pid.to_le_bytes());
        body.extend(self.who.device.to_le_bytes());
        body.extend(self.who.uuid);
        body.push(self.who.shares.into());
        // Names of hosts are at most 255 bytes long; what tells machines apart is shorter than a hello in any case.
        for text in [&self.who.host, &self.who.machine] {
            put_text(&mut body, &text.chars().take(400).collect::<String>());
        }
        to.write_all(&frame(HELLO, &body))
    }
}

/// Writes the calls of a batch, whose outgoing bytes lie one behind the other.
pub fn write_calls(to: &mut impl Write, calls: &[(Call, usize)], outgoing: &[u8]) -> io::Result<()> {
    let mut head = vec![CALLS];
    let length = 4 + calls.len() * (Call::BYTES + 8) + outgoing.len();
    head.extend((length as u64).to_le_bytes());
    head.extend((calls.len() as u32).to_le_bytes());
    for (call, bytes) in calls {
        head.extend(call.to_bytes());
        head.extend((*bytes as u64).to_le_bytes());
    }
    to.write_all(&head)?;
    to.write_all(outgoing)
}

pub fn write_bye(to: &mut impl Write, bye: Bye) -> io::Result<()> {
    to.write_all(&frame(if bye == Bye::Ended { ENDED } else { ABORTED }, &[]))
}

/// Reads a rank's hello.
pub fn read_hello(from: &mut impl Read) -> io::Result<Hello> {
    let (what, body) = read_frame(from, LONGEST_HELLO)?;
    let mut body = Reader(&body);
    if what != HELLO || body.array::<8>()? != MAGIC {
        return Err(invalid("no hello of this library"));
    }
    let hello = Hello {
        token: body.array()?,
        rank: body.u32()?,
        size: body.u32()?,
        version: body.i32()?,
        who: Who {
            pid: body.u32()?,
            device: body.i32()?,
            uuid: body.array()?,
            shares: body.array::<1>()? != [0],
            host: body.text()?,
            machine: body.text()?,
        },
    };
    body.end()?;
    Ok(hello)
}

/// The next message of a rank that has said hello.
pub fn read_from_rank(from: &mut impl Read) -> io::Result<ToHub> {
    let (what, body) = read_frame(from, u64::MAX)?;
    let mut body = Reader(&body);
    match what {
        ENDED => Ok(ToHub::Bye(Bye::Ended)),
        ABORTED => Ok(ToHub::Bye(Bye::Aborted)),
        CALLS => {
            let count = body.u32()?;
            let mut heads = Vec::new();
            for _ in 0..count {
                let call = Call::from_bytes(&body.array()?).ok_or_else(|| invalid("no call"))?;
                heads.push((call, u64::from_le_bytes(body.array()?)));
            }
            let mut calls = Vec::new();
            for (call, bytes) in heads {
                let bytes = usize::try_from(bytes).map_err(|_| invalid("a call of too many bytes"))?;
                calls.push((call, body.take(bytes)?.to_vec()));
            }
            body.end()?;
            Ok(ToHub::Calls(calls))
        }
        _ => Err(invalid("no message of a rank")),
    }
}

impl ToRank {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        match self {
            ToRank::Welcome { pid, host, ranks } => {
                body.extend(pid.to_le_bytes());
                body.extend(ranks.to_le_bytes());
                put_text(&mut body, host);
                frame(WELCOME, &body)
            }
            ToRank::Ended { with_hub } => frame(OTHER_ENDED, &[(*with_hub).into()]),
            ToRank::Results(bytes) => frame(RESULTS, bytes),
            ToRank::Failure(refusal) => {
                body.extend(refusal.code.0.to_le_bytes());
                put_text(&mut body, &refusal.message);
                frame(FAILURE, &body)
            }
        }
    }

    pub fn read(from: &mut impl Read) -> io::Result<ToRank> {
        let (what, bytes) = read_frame(from, u64::MAX)?;
        let mut body = Reader(&bytes);
        match what {
            WELCOME => Ok(ToRank::Welcome { pid: body.u32()?, ranks: body.u32()?, host: body.text()? }),
            OTHER_ENDED => Ok(ToRank::Ended { with_hub: body.array::<1>()? != [0] }),
            FAILURE => Ok(ToRank::Failure(refusal(Code(body.i32()?), body.text()?))),
            RESULTS => Ok(ToRank::Results(bytes)),
            _ => Err(invalid("no message of a hub")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::Kind;
    use crate::call::tests::plain;

    fn hello() -> Hello {
        let who = Who {
            pid: 77,
            host: "left".into(),
            machine: "left/net:[1]".into(),
            device: 3,
            uuid: [9; 16],
            shares: true,
        };
        Hello { token: [5; 16], rank: 2, size: 4, version: 23003, who }
    }

    #[test]
    fn ids_are_read_back_and_others_are_not() {
        for address in ["127.0.0.1:4711", "10.9.0.1:1", "[::1]:65535"] {
            let meeting = Meeting { address: address.parse().unwrap(), token: [0xab; 16] };
            let id = meeting.to_id();
            assert_eq!(Meeting::from_id(&id), Some(meeting));
            for at in [0, 7, 42, 127] {
                let mut other = id;
                other[at] ^= 1;
                assert_eq!(Meeting::from_id(&other), None, "byte {at}");
            }
        }
    }

    #[test]
    fn messages_are_read_back() {
        let mut bytes = Vec::new();
        hello().write(&mut bytes).unwrap();
        assert_eq!(read_hello(&mut &bytes[..]).unwrap(), hello());

        let calls = [(plain(1, Kind::Send, 2), 8), (plain(2, Kind::Recv, 7), 0), (plain(3, Kind::Send, 1), 4)];
        let outgoing: Vec<u8> = (0..12).collect();
        let mut bytes = Vec::new();
        write_calls(&mut bytes, &calls, &outgoing).unwrap();
        write_bye(&mut bytes, Bye::Aborted).unwrap();
        write_bye(&mut bytes, Bye::Ended).unwrap();
        let mut from = &bytes[..];
        let parts = [outgoing[..8].to_vec(), vec![], outgoing[8..].to_vec()];
        let expected = calls.iter().map(|(call, _)| *call).zip(parts).collect();
        assert_eq!(read_from_rank(&mut from).unwrap(), ToHub::Calls(expected));
        assert_eq!(read_from_rank(&mut from).unwrap(), ToHub::Bye(Bye::Aborted));
        assert_eq!(read_from_rank(&mut from).unwrap(), ToHub::Bye(Bye::Ended));
        assert_eq!(read_from_rank(&mut from).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        for message in [
            ToRank::Welcome { pid: 9, host: "right".into(), ranks: 2 },
            ToRank::Ended { with_hub: true },
            ToRank::Ended { with_hub: false },
            ToRank::Results(vec![1, 2, 3]),
            ToRank::Results(vec![]),
            ToRank::Failure(refusal(Code::REMOTE, "rank 1 is gone")),
        ] {
            assert_eq!(ToRank::read(&mut &message.to_bytes()[..]).unwrap(), message);
        }
    }

    #[test]
    fn strangers_and_broken_messages_are_refused() {
        let mut bytes = Vec::new();
        hello().write(&mut bytes).unwrap();
        for broken in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), bytes[..bytes.len() - 1].to_vec(), {
            let mut other = bytes.clone();
            other[9] ^= 1;
            other
        }] {
            assert!(read_hello(&mut &broken[..]).is_err());
        }
        // A length that is not there, or that the rest of the message does not have.
        assert!(read_frame(&mut &[HELLO, 255, 255, 255, 255, 255, 255, 255, 255][..], LONGEST_HELLO).is_err());
        let mut calls = Vec::new();
        write_calls(&mut calls, &[(plain(1, Kind::Send, 2), 8)], &[0; 4]).unwrap();
        assert!(read_from_rank(&mut &calls[..]).is_err());
    }
}
