//! What a call asks for, in numbers and in words.

use std::ffi::c_int;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Send,
    Recv,
    Broadcast,
    AllGather,
    AllReduce,
    Reduce,
    ReduceScatter,
}

/// Type of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Type {
    I8,
    U8,
    I32,
    U32,
    I64,
    U64,
    F16,
    F32,
    F64,
    Bf16,
}

/// How elements are joined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    Sum,
    Prod,
    Max,
    Min,
    Avg,
}

const KINDS: [Kind; 7] =
    [Kind::Send, Kind::Recv, Kind::Broadcast, Kind::AllGather, Kind::AllReduce, Kind::Reduce, Kind::ReduceScatter];

/// In the order of `ncclDataType_t`.
const TYPES: [(Type, &str, u64); 10] = [
    (Type::I8, "i8", 1),
    (Type::U8, "u8", 1),
    (Type::I32, "i32", 4),
    (Type::U32, "u32", 4),
    (Type::I64, "i64", 8),
    (Type::U64, "u64", 8),
    (Type::F16, "f16", 2),
    (Type::F32, "f32", 4),
    (Type::F64, "f64", 8),
    (Type::Bf16, "bf16", 2),
];

/// In the order of `ncclRedOp_t`.
const OPS: [(Op, &str); 5] =
    [(Op::Sum, "sum"), (Op::Prod, "product"), (Op::Max, "maximum"), (Op::Min, "minimum"), (Op::Avg, "average")];

impl Kind {
    /// True if all ranks take part.
    pub fn is_collective(self) -> bool {
        !matches!(self, Kind::Send | Kind::Recv)
    }

    fn reduces(self) -> bool {
        matches!(self, Kind::AllReduce | Kind::Reduce | Kind::ReduceScatter)
    }
}

impl Type {
    /// That of an `ncclDataType_t`.
    pub fn from_number(number: c_int) -> Option<Type> {
        usize::try_from(number).ok().and_then(|at| TYPES.get(at)).map(|entry| entry.0)
    }

    fn entry(self) -> (Type, &'static str, u64) {
        TYPES[self as usize]
    }

    /// Bytes of an element.
    pub fn size(self) -> u64 {
        self.entry().2
    }
}

impl Op {
    /// That of an `ncclRedOp_t`.
    pub fn from_number(number: c_int) -> Option<Op> {
        usize::try_from(number).ok().and_then(|at| OPS.get(at)).map(|entry| entry.0)
    }
}

/// One call of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Call {
    /// Its number, counted from 1 over all calls of the rank, those of graphs each time that they are launched.
    pub number: u64,
    pub kind: Kind,
    /// Elements: of each rank's part for all-gather and reduce-scatter, otherwise of the buffer.
    pub count: u64,
    pub dtype: Type,
    /// The sum where nothing is reduced.
    pub op: Op,
    /// The rank at the other end of a send or a receive, or the root; 0 if there is neither.
    pub other: u32,
    /// Launched by a graph.
    pub captured: bool,
    /// Its place among the collective calls of its group, from 1, and how many these are; zeros for a send or receive.
    pub place: (u32, u32),
}

/// What two calls differ in that is not said otherwise.
#[derive(Clone, Copy)]
struct Also {
    captured: bool,
    place: bool,
}

impl Call {
    /// Bytes that rank `rank` of `size` gives away; `None` if they cannot be counted in 64 bits.
    pub fn sends(&self, rank: u32, size: u32) -> Option<u64> {
        let parts = match self.kind {
            Kind::Recv => 0,
            Kind::Broadcast => u64::from(rank == self.other),
            Kind::Send | Kind::AllGather | Kind::AllReduce | Kind::Reduce => 1,
            Kind::ReduceScatter => size.into(),
        };
        self.count.checked_mul(self.dtype.size())?.checked_mul(parts)
    }

    /// Bytes that it gets.
    pub fn receives(&self, rank: u32, size: u32) -> Option<u64> {
        let parts = match self.kind {
            Kind::Send => 0,
            Kind::Reduce => u64::from(rank == self.other),
            Kind::Recv | Kind::Broadcast | Kind::AllReduce | Kind::ReduceScatter => 1,
            Kind::AllGather => size.into(),
        };
        self.count.checked_mul(self.dtype.size())?.checked_mul(parts)
    }

    /// True if the collective calls of two ranks are one.
    pub fn agrees(&self, other: &Call) -> bool {
        Call { number: other.number, ..*self } == *other
    }

    /// True if a send and a receive are one.
    pub fn pairs(&self, other: &Call) -> bool {
        (self.count, self.dtype, self.captured) == (other.count, other.dtype, other.captured)
    }

    /// `all-gathers 4096 f32`.
    pub fn words(&self) -> String {
        self.said(true, Also { captured: false, place: false })
    }

    fn said(&self, with_verb: bool, also: Also) -> String {
        let verb = match self.kind {
            Kind::Send => "sends ",
            Kind::Recv => "receives ",
            Kind::Broadcast => "broadcasts ",
            Kind::AllGather => "all-gathers ",
            Kind::AllReduce => "all-reduces ",
            Kind::Reduce => "reduces ",
            Kind::ReduceScatter => "reduce-scatters ",
        };
        let mut said = format!("{}{} {}", if with_verb { verb } else { "" }, self.count, self.dtype.entry().1);
        if self.kind.reduces() {
            said += &format!(" ({})", OPS[self.op as usize].1);
        }
        match self.kind {
            Kind::Send | Kind::Reduce => said += &format!(" to rank {}", self.other),
            Kind::Recv | Kind::Broadcast => said += &format!(" from rank {}", self.other),
            Kind::AllGather | Kind::AllReduce | Kind::ReduceScatter => {}
        }
        if also.captured {
            said += if self.captured { " in a graph" } else { " outside any graph" };
        }
        if also.place {
            said += &match self.place {
                (_, 1) => " alone".to_string(),
                (at, of) => format!(" as number {at} of {of} collective calls of a group"),
            };
        }
        said
    }

    /// Its bytes in a message.
    pub fn to_bytes(self) -> [u8; Call::BYTES] {
        let mut bytes = [0; Call::BYTES];
        bytes[0..8].copy_from_slice(&self.number.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.count.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.other.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.place.0.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.place.1.to_le_bytes());
        bytes[28..].copy_from_slice(&[self.kind as u8, self.dtype as u8, self.op as u8, self.captured.into()]);
        bytes
    }

    /// Bytes of one in a message.
    pub const BYTES: usize = 32;

    /// The call of such bytes; `None` if they are none.
    pub fn from_bytes(bytes: &[u8; Call::BYTES]) -> Option<Call> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Some(Call {
            number: long(0),
            count: long(8),
            other: word(16),
            place: (word(20), word(24)),
            kind: *KINDS.get(usize::from(bytes[28]))?,
            dtype: Type::from_number(bytes[29].into())?,
            op: Op::from_number(bytes[30].into())?,
            captured: bytes[31] != 0,
        })
    }
}

/// What two ranks ask for that should be one: `call 41: rank 0 all-gathers 4096 f32, rank 1 4095 f32`.
pub fn both((rank, call): (u32, &Call), (other_rank, other): (u32, &Call)) -> String {
    let also = Also { captured: call.captured != other.captured, place: call.place != other.place };
    // The place of a send or receive says nothing, and different kinds say enough.
    let also = Also { place: also.place && call.kind == other.kind, ..also };
    let sides = [call.said(true, also), other.said(call.kind != other.kind, also)];
    if call.number == other.number {
        format!("call {}: rank {rank} {}, rank {other_rank} {}", call.number, sides[0], sides[1])
    } else {
        let (number, other_number) = (call.number, other.number);
        format!(
            "rank {rank} {} in its call {number}, rank {other_rank} {} in its call {other_number}",
            sides[0], sides[1]
        )
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A call with nothing special about it.
    pub fn plain(number: u64, kind: Kind, count: u64) -> Call {
        let place = if kind.is_collective() { (1, 1) } else { (0, 0) };
        Call { number, kind, count, dtype: Type::F32, op: Op::Sum, other: 0, captured: false, place }
    }

    #[test]
    fn calls_survive_a_message() {
        for (k, kind) in KINDS.into_iter().enumerate() {
            for (t, (dtype, ..)) in TYPES.into_iter().enumerate() {
                let call = Call {
                    number: u64::MAX - k as u64,
                    kind,
                    count: 1 << (40 + t),
                    dtype,
                    op: OPS[t % 5].0,
                    other: 70_000 + k as u32,
                    captured: t % 2 == 1,
                    place: (3 + k as u32, 90_000),
                };
                assert_eq!(Call::from_bytes(&call.to_bytes()), Some(call));
            }
        }
        let wrong = |at: usize| {
            let mut bytes = plain(1, Kind::Send, 1).to_bytes();
            bytes[at] = 200;
            Call::from_bytes(&bytes)
        };
        assert_eq!([28, 29, 30].map(wrong), [None; 3]);
    }

    #[test]
    fn bytes_of_each_kind() {
        let of = |kind, rank| {
            let call = Call { other: 1, ..plain(1, kind, 10) };
            (call.sends(rank, 4), call.receives(rank, 4))
        };
        assert_eq!(of(Kind::Send, 0), (Some(40), Some(0)));
        assert_eq!(of(Kind::Recv, 0), (Some(0), Some(40)));
        assert_eq!([of(Kind::Broadcast, 0), of(Kind::Broadcast, 1)], [(Some(0), Some(40)), (Some(40), Some(40))]);
        assert_eq!(of(Kind::AllGather, 0), (Some(40), Some(160)));
        assert_eq!(of(Kind::AllReduce, 0), (Some(40), Some(40)));
        assert_eq!([of(Kind::Reduce, 0), of(Kind::Reduce, 1)], [(Some(40), Some(0)), (Some(40), Some(40))]);
        assert_eq!(of(Kind::ReduceScatter, 0), (Some(160), Some(40)));
        assert_eq!(plain(1, Kind::Send, u64::MAX / 2).sends(0, 4), None);
    }

    #[test]
    fn both_sides_are_named() {
        let call = plain(41, Kind::AllGather, 4096);
        let less = Call { count: 4095, ..call };
        assert_eq!(both((0, &call), (1, &less)), "call 41: rank 0 all-gathers 4096 f32, rank 1 4095 f32");
        let later = Call { number: 42, dtype: Type::Bf16, ..call };
        let expected = "rank 0 all-gathers 4096 f32 in its call 41, rank 2 4096 bf16 in its call 42";
        assert_eq!(both((0, &call), (2, &later)), expected);
        let sum = Call { op: Op::Max, ..plain(41, Kind::AllReduce, 4096) };
        assert_eq!(
            both((0, &call), (1, &sum)),
            "call 41: rank 0 all-gathers 4096 f32, rank 1 all-reduces 4096 f32 (maximum)"
        );
        let root = |other| Call { other, ..plain(7, Kind::Broadcast, 5) };
        let expected = "call 7: rank 0 broadcasts 5 f32 from rank 0, rank 3 5 f32 from rank 1";
        assert_eq!(both((0, &root(0)), (3, &root(1))), expected);
        let captured = Call { captured: true, ..call };
        let expected = "call 41: rank 0 all-gathers 4096 f32 outside any graph, rank 1 4096 f32 in a graph";
        assert_eq!(both((0, &call), (1, &captured)), expected);
        let grouped = Call { place: (2, 3), ..call };
        let expected = "call 41: rank 0 all-gathers 4096 f32 alone, rank 1 4096 f32 as number 2 of 3 collective calls of \
                        a group";
        assert_eq!(both((0, &call), (1, &grouped)), expected);
    }
}
