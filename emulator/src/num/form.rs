//! The arithmetic instruction forms: how PTX spells them, what they read and write, and the dispatch code by which
//! [`super::ops`] executes them.
//!
//! Refused by name: types and operations that PTX has only for newer targets (fp8, fp6, fp4, `.f32x2`, three-input
//! minimum), and video instructions other than `vadd`, `vsub`, `vavrg`, `vabsdiff`, `vmin` and `vmax` on whole pairs
//! and quads, which are what nvcc's SIMD intrinsics become.

use std::fmt;

/// A type as PTX spells it after a dot. `Pred` is one bit a lane.
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Ty {
    B8,
    B16,
    B32,
    B64,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    U16x2,
    S16x2,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    Pred,
}

impl Ty {
    /// The type spelled `name` (without its dot).
    pub fn parse(name: &str) -> Option<Ty> {
        use Ty::*;
        Some(match name {
            "b8" => B8,
            "b16" => B16,
            "b32" => B32,
            "b64" => B64,
            "u8" => U8,
            "u16" => U16,
            "u32" => U32,
            "u64" => U64,
            "s8" => S8,
            "s16" => S16,
            "s32" => S32,
            "s64" => S64,
            "u16x2" => U16x2,
            "s16x2" => S16x2,
            "f16" => F16,
            "f16x2" => F16x2,
            "bf16" => Bf16,
            "bf16x2" => Bf16x2,
            "tf32" => Tf32,
            "f32" => F32,
            "f64" => F64,
            "pred" => Pred,
            _ => return None,
        })
    }

    /// Bits of one value; 1 for a predicate.
    pub fn bits(self) -> u32 {
        use Ty::*;
        match self {
            Pred => 1,
            B8 | U8 | S8 => 8,
            B16 | U16 | S16 | F16 | Bf16 => 16,
            B32 | U32 | S32 | U16x2 | S16x2 | F16x2 | Bf16x2 | Tf32 | F32 => 32,
            B64 | U64 | S64 | F64 => 64,
        }
    }

    /// Whether a literal of this type is a floating-point literal.
    pub fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2 | Ty::Tf32 | Ty::F32 | Ty::F64)
    }

    /// Signed integers.
    pub fn is_signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64 | Ty::S16x2)
    }

    /// Integers with an arithmetic meaning, of 16, 32 or 64 bits.
    fn is_int(self) -> bool {
        matches!(self, Ty::U16 | Ty::U32 | Ty::U64 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    fn is_half(self) -> bool {
        matches!(self, Ty::F16 | Ty::F16x2 | Ty::Bf16 | Ty::Bf16x2)
    }
}

/// Rounding of an inexact result.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Round {
    /// To nearest, ties to even.
    Rn,
    /// Toward zero.
    Rz,
    /// Toward minus infinity.
    Rm,
    /// Toward plus infinity.
    Rp,
    /// To nearest, ties away from zero (`cvt.rna.tf32.f32`).
    Rna,
}

/// How two values are compared: a base relation, perhaps with operands swapped or the outcome negated. With these, the
/// eighteen operators of PTX need five loops.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Compare {
    /// The relation that is evaluated.
    pub relation: Relation,
    /// Evaluate it on (b, a).
    pub swap: bool,
    /// Negate the outcome.
    pub negate: bool,
}

/// The relations that [`Compare`] is built from; all false on NaN.
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Relation {
    Equal,
    Less,
    LessEqual,
    /// a < b or a > b: the ordered `.ne` of floats.
    LessGreater,
    /// Neither is NaN.
    Ordered,
}

/// Combination of a comparison with a predicate operand.
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum BoolOp {
    None,
    And,
    Or,
    Xor,
}

/// The dispatch code. What it leaves open is in the other fields of [`Decoded`].
#[allow(missing_docs)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Op {
    // f32, the common forms without a branch on modifiers: .rn, no .sat, with and without .ftz
    FmaF32,
    FmaF32Ftz,
    AddF32,
    AddF32Ftz,
    SubF32,
    SubF32Ftz,
    MulF32,
    MulF32Ftz,
    DivF32,
    MaxF32,
    MinF32,
    SqrtF32,
    RcpF32,
    Ex2F32,
    // f32 with any modifiers
    FmaF32Any,
    FmaF32Rm,
    AddF32Any,
    SubF32Any,
    MulF32Any,
    DivF32Any,
    RcpF32Any,
    SqrtF32Any,
    MinMaxF32Any,
    NegF32,
    AbsF32,
    DivF32Approx,
    RcpF32Approx,
    SqrtF32Approx,
    RsqrtF32,
    Lg2F32,
    SinF32,
    CosF32,
    TanhF32,
    Ex2F32Any,
    CopysignF32,
    TestpF32,
    // f64
    FmaF64,
    AddF64,
    SubF64,
    MulF64,
    DivF64,
    FmaF64Any,
    AddF64Any,
    SubF64Any,
    MulF64Any,
    DivF64Any,
    RcpF64,
    SqrtF64,
    RcpF64Approx,
    RsqrtF64,
    MinF64,
    MaxF64,
    NegF64,
    AbsF64,
    CopysignF64,
    TestpF64,
    // f16, bf16 and their pairs: `ty` says which
    FmaHalf,
    AddHalf,
    SubHalf,
    MulHalf,
    MinMaxHalf,
    NegHalf,
    AbsHalf,
    Ex2Half,
    TanhHalf,
    // 32-bit integers
    AddB32,
    SubB32,
    MulB32,
    MadB32,
    AddSatS32,
    SubSatS32,
    MulHiU32,
    MulHiS32,
    MadHiU32,
    MadHiS32,
    MadHiSatS32,
    MulWideU32,
    MulWideS32,
    MadWideU32,
    MadWideS32,
    Mul24,
    Mad24,
    DivU32,
    DivS32,
    RemU32,
    RemS32,
    MinU32,
    MaxU32,
    MinS32,
    MaxS32,
    AbsS32,
    NegB32,
    SadU32,
    SadS32,
    AndB32,
    OrB32,
    XorB32,
    NotB32,
    CnotB32,
    ShlB32,
    ShrB32,
    ShrS32,
    ShfL,
    ShfR,
    Lop3,
    Lop3Bool,
    Prmt,
    BfeU32,
    BfeS32,
    BfiB32,
    BrevB32,
    PopcB32,
    ClzB32,
    Bfind32,
    Fns,
    Szext,
    Bmsk,
    Dp4a,
    Dp2a,
    Video,
    AddCarry32,
    SubCarry32,
    MadCarry32,
    // 64-bit integers
    AddB64,
    SubB64,
    MulB64,
    MadB64,
    MulHi64,
    MadHi64,
    DivU64,
    DivS64,
    RemU64,
    RemS64,
    MinU64,
    MaxU64,
    MinS64,
    MaxS64,
    AbsS64,
    NegB64,
    SadU64,
    SadS64,
    AndB64,
    OrB64,
    XorB64,
    NotB64,
    CnotB64,
    ShlB64,
    ShrB64,
    ShrS64,
    BfeU64,
    BfeS64,
    BfiB64,
    BrevB64,
    PopcB64,
    ClzB64,
    Bfind64,
    AddCarry64,
    SubCarry64,
    MadCarry64,
    // 16-bit integers and pairs of them
    AddB16,
    SubB16,
    MulB16,
    MadB16,
    MulHi16,
    MadHi16,
    MulWide16,
    MadWide16,
    Div16,
    Rem16,
    Min16,
    Max16,
    AbsS16,
    NegB16,
    Sad16,
    AndB16,
    OrB16,
    XorB16,
    NotB16,
    CnotB16,
    ShlB16,
    ShrB16,
    ShrS16,
    Add16x2,
    MinMax16x2,
    // predicates
    AndPred,
    OrPred,
    XorPred,
    NotPred,
    // comparison and selection
    SetpI32,
    SetpU32,
    SetpF32,
    SetpOther,
    SetOther,
    Selp32,
    Selp64,
    Slct32,
    Slct64,
    // conversion; the named ones are the common ones, `Cvt` is every other
    CvtInt32,
    CvtInt32To64,
    CvtInt64To32,
    CvtInt64,
    CvtF32S32,
    CvtF32U32,
    CvtS32F32,
    CvtU32F32,
    CvtF32F16,
    CvtF32Bf16,
    CvtF16F32,
    CvtBf16F32,
    CvtF16x2F32,
    CvtBf16x2F32,
    CvtF64F32,
    CvtF32F64,
    CvtRoundF32,
    CvtSatF32,
    Cvt,
    CvtPair,
    CvtPack,
}

/// Operations of video instructions on pairs and quads.
pub const VIDEO: [&str; 6] = ["vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax"];

/// Modifier bits of a [`Decoded`].
#[allow(missing_docs)]
pub mod flag {
    pub const FTZ: u16 = 1;
    pub const SAT: u16 = 1 << 1;
    pub const RELU: u16 = 1 << 2;
    /// `.NaN` of minimum and maximum.
    pub const NAN: u16 = 1 << 3;
    /// `.xorsign.abs`.
    pub const XORSIGN: u16 = 1 << 4;
    pub const SATFINITE: u16 = 1 << 5;
    /// Maximum rather than minimum.
    pub const MAX: u16 = 1 << 6;
    /// `.hi` rather than `.lo`; for video instructions: halves rather than bytes.
    pub const HI: u16 = 1 << 7;
    /// Writes the carry flag.
    pub const CC_OUT: u16 = 1 << 8;
    /// Reads the carry flag.
    pub const CC_IN: u16 = 1 << 9;
    /// `.wrap` rather than `.clamp`.
    pub const WRAP: u16 = 1 << 10;
    /// `bfind.shiftamt`.
    pub const SHIFTAMT: u16 = 1 << 11;
    /// Round to an integral value (`cvt.rni` and so on, also between floating-point types).
    pub const INTEGRAL: u16 = 1 << 12;
    /// `dp4a`, `dp2a` and video instructions: the first operand is signed; for `mul24` and the like: signed.
    pub const A_SIGNED: u16 = 1 << 13;
    /// `dp4a`, `dp2a` and video instructions: the second operand is signed.
    pub const B_SIGNED: u16 = 1 << 14;
    /// `.add` of a video instruction: the parts are added to the third operand.
    pub const ACCUMULATE: u16 = 1 << 15;
}

/// One decoded arithmetic instruction form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Decoded {
    /// Dispatch code.
    pub op: Op,
    /// The type of the result.
    pub ty: Ty,
    /// The type of the operands where it differs (`cvt`, `set`, `slct`).
    pub from: Ty,
    /// Rounding mode.
    pub round: Round,
    /// Modifier bits, see [`flag`].
    pub flags: u16,
    /// The comparison of `set` and `setp`.
    pub compare: Compare,
    /// Its combination with a predicate, also for `lop3`.
    pub bool_op: BoolOp,
    /// A variant number: the mode of `prmt` (0 to 6), the test of `testp` (0 to 5), 1 for `div.full`, the operation of
    /// a video instruction in the order of [`VIDEO`].
    pub mode: u8,
    /// Destinations that the instruction at hand has: `setp` may have one or two.
    pub destinations: u8,
}

impl Decoded {
    /// No modifiers, 32 bits.
    pub const NONE: Decoded = Decoded {
        op: Op::Cvt,
        ty: Ty::B32,
        from: Ty::B32,
        round: Round::Rn,
        flags: 0,
        compare: Compare { relation: Relation::Equal, swap: false, negate: false },
        bool_op: BoolOp::None,
        mode: 0,
        destinations: 1,
    };

    /// Whether the modifier bit `flag` is set.
    #[inline(always)]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// What an instruction form writes and reads, in the order of its operands.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Signature {
    /// Destinations. The second one (`p|q` of `setp`, `d|p` of `lop3`) may be absent in `setp`, and the first may be
    /// `_`.
    pub dst: Vec<Ty>,
    /// Sources.
    pub src: Vec<Ty>,
}

/// Why a form is refused; displays as one clause that names the modifier or type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsupported(pub String);

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unsupported {}

/// Modifiers met while reading a form, taken out one by one as the opcode accepts them.
struct Reader<'a> {
    text: &'a str,
    types: Vec<Ty>,
    words: Vec<&'a str>,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> (&'a str, Reader<'a>) {
        let mut parts = text.split('.').filter(|p| !p.is_empty());
        let opcode = parts.next().unwrap_or("");
        let mut reader = Reader { text, types: Vec::new(), words: Vec::new() };
        for part in parts {
            match Ty::parse(part) {
                Some(ty) => reader.types.push(ty),
                None => reader.words.push(part),
            }
        }
        (opcode, reader)
    }

    fn take(&mut self, word: &str) -> bool {
        match self.words.iter().position(|w| *w == word) {
            Some(i) => {
                self.words.remove(i);
                true
            }
            None => false,
        }
    }

    fn take_flag(&mut self, word: &str, flag: u16) -> u16 {
        if self.take(word) { flag } else { 0 }
    }

    fn take_round(&mut self) -> Option<Round> {
        [("rn", Round::Rn), ("rz", Round::Rz), ("rm", Round::Rm), ("rp", Round::Rp)]
            .into_iter()
            .find(|(word, _)| self.take(word))
            .map(|(_, round)| round)
    }

    fn one_type(&self) -> Result<Ty, Unsupported> {
        match self.types[..] {
            [ty] => Ok(ty),
            _ => Err(self.refuse(format!("needs one type, found {}", self.types.len()))),
        }
    }

    fn two_types(&self) -> Result<(Ty, Ty), Unsupported> {
        match self.types[..] {
            [to, from] => Ok((to, from)),
            _ => Err(self.refuse(format!("needs two types, found {}", self.types.len()))),
        }
    }

    fn refuse(&self, why: impl fmt::Display) -> Unsupported {
        Unsupported(format!("instruction {} {}", self.text, why))
    }

    fn no_such_type(&self) -> Unsupported {
        self.refuse("is not supported for this type")
    }

    fn finish(self, form: Decoded, dst: &[Ty], src: &[Ty]) -> Result<(Decoded, Signature), Unsupported> {
        if let Some(word) = self.words.first() {
            return Err(self.refuse(format!("is not supported: unknown modifier .{word}")));
        }
        Ok((form, Signature { dst: dst.to_vec(), src: src.to_vec() }))
    }
}

/// The comparison operator spelled `word`, for floats or integers. The second value is whether it asks for unsigned
/// integers (`lo`, `ls`, `hi`, `hs`).
fn compare(word: &str, float: bool) -> Option<(Compare, bool)> {
    use Relation::*;
    let make = |relation, swap, negate| Compare { relation, swap, negate };
    if float {
        let c = match word {
            "eq" => make(Equal, false, false),
            "ne" => make(LessGreater, false, false),
            "lt" => make(Less, false, false),
            "le" => make(LessEqual, false, false),
            "gt" => make(Less, true, false),
            "ge" => make(LessEqual, true, false),
            // The unordered operators are the negations of the ordered opposites.
            "equ" => make(LessGreater, false, true),
            "neu" => make(Equal, false, true),
            "ltu" => make(LessEqual, true, true),
            "leu" => make(Less, true, true),
            "gtu" => make(LessEqual, false, true),
            "geu" => make(Less, false, true),
            "num" => make(Ordered, false, false),
            "nan" => make(Ordered, false, true),
            _ => return None,
        };
        return Some((c, false));
    }
    Some(match word {
        "eq" => (make(Equal, false, false), false),
        "ne" => (make(Equal, false, true), false),
        "lt" => (make(Less, false, false), false),
        "le" => (make(Less, true, true), false),
        "gt" => (make(Less, true, false), false),
        "ge" => (make(Less, false, true), false),
        "lo" => (make(Less, false, false), true),
        "ls" => (make(Less, true, true), true),
        "hi" => (make(Less, true, false), true),
        "hs" => (make(Less, false, true), true),
        _ => return None,
    })
}

/// Decodes an instruction's full name, such as `fma.rn.ftz.f32`.
///
/// # Errors
/// Names the modifier or type for which there is no such instruction here.
pub fn parse(text: &str) -> Result<(Decoded, Signature), Unsupported> {
    use Ty::*;
    use flag::*;
    let (opcode, mut r) = Reader::new(text);
    let mut form = Decoded::NONE;
    match opcode {
        "cvt" => return parse_cvt(r, form),
        "set" | "setp" => return parse_compare(opcode, r, form),
        "selp" => {
            let ty = r.one_type()?;
            form.ty = ty;
            form.op = match ty.bits() {
                16 | 32 if !matches!(ty, U16x2 | S16x2 | F16x2 | Bf16x2 | Tf32) => Op::Selp32,
                64 => Op::Selp64,
                _ => return Err(r.no_such_type()),
            };
            return r.finish(form, &[ty], &[ty, ty, Pred]);
        }
        "slct" => {
            let (ty, by) = r.two_types()?;
            form.ty = ty;
            form.from = by;
            if by == F32 {
                form.flags = r.take_flag("ftz", FTZ);
            } else if by != S32 {
                return Err(r.no_such_type());
            }
            form.op = if ty.bits() == 64 { Op::Slct64 } else { Op::Slct32 };
            if ty == Pred || ty.bits() < 16 {
                return Err(r.no_such_type());
            }
            return r.finish(form, &[ty], &[ty, ty, by]);
        }
        "dp4a" | "dp2a" => {
            let (a, b) = r.two_types()?;
            if !matches!(a, U32 | S32) || !matches!(b, U32 | S32) {
                return Err(r.no_such_type());
            }
            form.flags = if a == S32 { A_SIGNED } else { 0 } | if b == S32 { B_SIGNED } else { 0 };
            form.op = Op::Dp4a;
            if opcode == "dp2a" {
                form.op = Op::Dp2a;
                form.flags |= r.take_flag("hi", HI);
                if !form.has(HI) && !r.take("lo") {
                    return Err(r.refuse("needs .lo or .hi"));
                }
            }
            form.ty = if form.flags & (A_SIGNED | B_SIGNED) == 0 { U32 } else { S32 };
            return r.finish(form, &[form.ty], &[a, b, form.ty]);
        }
        _ => {}
    }
    let video = |count| opcode.strip_suffix(count).and_then(|name| VIDEO.iter().position(|known| *known == name));
    if let Some(operation) = video("2").or_else(|| video("4")) {
        let [to @ (U32 | S32), a @ (U32 | S32), b @ (U32 | S32)] = r.types[..] else {
            return Err(r.no_such_type());
        };
        form.op = Op::Video;
        form.ty = to;
        form.mode = operation as u8;
        form.flags = r.take_flag("sat", SAT) | r.take_flag("add", ACCUMULATE);
        if form.flags == SAT | ACCUMULATE {
            return Err(r.refuse("takes .sat or .add, not both"));
        }
        form.flags |= if a == S32 { A_SIGNED } else { 0 } | if b == S32 { B_SIGNED } else { 0 };
        form.flags |= if opcode.ends_with('2') { HI } else { 0 };
        return r.finish(form, &[to], &[a, b, to]);
    }

    let ty = r.one_type()?;
    form.ty = ty;
    form.from = ty;
    let cc = matches!(opcode, "add" | "sub" | "mad") && r.take("cc");
    let carry = cc || matches!(opcode, "addc" | "subc" | "madc");
    if carry {
        if !matches!(ty, U32 | S32 | U64 | S64) {
            return Err(r.no_such_type());
        }
        form.flags = if cc { CC_OUT } else { CC_IN | r.take_flag("cc", CC_OUT) };
        let wide = ty.bits() == 64;
        let (op32, op64) = match opcode {
            "add" | "addc" => (Op::AddCarry32, Op::AddCarry64),
            "sub" | "subc" => (Op::SubCarry32, Op::SubCarry64),
            _ => (Op::MadCarry32, Op::MadCarry64),
        };
        form.op = if wide { op64 } else { op32 };
        if opcode.starts_with("mad") {
            form.flags |= r.take_flag("hi", HI);
            if !form.has(HI) && !r.take("lo") {
                return Err(r.refuse("needs .lo or .hi"));
            }
            return r.finish(form, &[ty], &[ty, ty, ty]);
        }
        return r.finish(form, &[ty], &[ty, ty]);
    }

    // How many sources of the instruction's own type; the exceptions return from their arms.
    let sources = match opcode {
        "add" | "sub" | "mul" | "fma" | "mad" if ty == F32 || ty == F64 => {
            let fused = matches!(opcode, "fma" | "mad");
            match r.take_round() {
                Some(round) => form.round = round,
                None if fused => return Err(r.refuse("needs a rounding modifier")),
                None => {}
            }
            if ty == F32 {
                form.flags = r.take_flag("ftz", FTZ) | r.take_flag("sat", SAT);
            }
            let plain = form.round == Round::Rn && !form.has(SAT);
            let ftz = form.has(FTZ);
            form.op = match (opcode, ty == F32, plain, ftz) {
                ("add", true, true, false) => Op::AddF32,
                ("add", true, true, true) => Op::AddF32Ftz,
                ("add", true, false, _) => Op::AddF32Any,
                ("sub", true, true, false) => Op::SubF32,
                ("sub", true, true, true) => Op::SubF32Ftz,
                ("sub", true, false, _) => Op::SubF32Any,
                ("mul", true, true, false) => Op::MulF32,
                ("mul", true, true, true) => Op::MulF32Ftz,
                ("mul", true, false, _) => Op::MulF32Any,
                (_, true, true, false) => Op::FmaF32,
                (_, true, true, true) => Op::FmaF32Ftz,
                (_, true, false, false) if form.round == Round::Rm && !form.has(SAT) => Op::FmaF32Rm,
                (_, true, false, _) => Op::FmaF32Any,
                ("add", false, true, _) => Op::AddF64,
                ("add", false, false, _) => Op::AddF64Any,
                ("sub", false, true, _) => Op::SubF64,
                ("sub", false, false, _) => Op::SubF64Any,
                ("mul", false, true, _) => Op::MulF64,
                ("mul", false, false, _) => Op::MulF64Any,
                (_, false, true, _) => Op::FmaF64,
                (_, false, false, _) => Op::FmaF64Any,
            };
            if fused { 3 } else { 2 }
        }
        "add" | "sub" | "mul" | "fma" if ty.is_half() => {
            if r.take_round().unwrap_or(Round::Rn) != Round::Rn {
                return Err(r.refuse("rounds to nearest even only"));
            }
            form.op = match opcode {
                "add" => Op::AddHalf,
                "sub" => Op::SubHalf,
                "mul" => Op::MulHalf,
                _ => Op::FmaHalf,
            };
            if matches!(ty, F16 | F16x2) {
                form.flags |= r.take_flag("ftz", FTZ) | r.take_flag("sat", SAT);
            }
            if opcode == "fma" {
                form.flags |= r.take_flag("relu", RELU);
                if form.has(RELU) && form.has(SAT) {
                    return Err(r.refuse("takes .sat or .relu, not both"));
                }
                3
            } else {
                2
            }
        }
        "add" | "sub" => {
            form.op = match (opcode, ty) {
                ("add", U32 | S32) => Op::AddB32,
                ("sub", U32 | S32) => Op::SubB32,
                ("add", U64 | S64) => Op::AddB64,
                ("sub", U64 | S64) => Op::SubB64,
                ("add", U16 | S16) => Op::AddB16,
                ("sub", U16 | S16) => Op::SubB16,
                ("add", U16x2 | S16x2) => Op::Add16x2,
                _ => return Err(r.no_such_type()),
            };
            if ty == S32 && r.take("sat") {
                form.op = if opcode == "add" { Op::AddSatS32 } else { Op::SubSatS32 };
            }
            2
        }
        "mul" | "mad" => {
            if !ty.is_int() {
                return Err(r.no_such_type());
            }
            let mul = opcode == "mul";
            let signed = ty.is_signed();
            let (hi, lo, wide) = (r.take("hi"), r.take("lo"), r.take("wide"));
            if [hi, lo, wide].iter().filter(|x| **x).count() != 1 {
                return Err(r.refuse("needs one of .lo, .hi and .wide"));
            }
            form.op = match (ty.bits(), hi, lo, mul) {
                (16, _, true, true) => Op::MulB16,
                (16, _, true, false) => Op::MadB16,
                (16, true, _, true) => Op::MulHi16,
                (16, true, _, false) => Op::MadHi16,
                (16, _, _, true) => Op::MulWide16,
                (16, _, _, false) => Op::MadWide16,
                (32, _, true, true) => Op::MulB32,
                (32, _, true, false) => Op::MadB32,
                (32, true, _, true) => {
                    if signed {
                        Op::MulHiS32
                    } else {
                        Op::MulHiU32
                    }
                }
                (32, true, _, false) => {
                    if signed {
                        Op::MadHiS32
                    } else {
                        Op::MadHiU32
                    }
                }
                (32, _, _, true) => {
                    if signed {
                        Op::MulWideS32
                    } else {
                        Op::MulWideU32
                    }
                }
                (32, _, _, false) => {
                    if signed {
                        Op::MadWideS32
                    } else {
                        Op::MadWideU32
                    }
                }
                (_, _, true, true) => Op::MulB64,
                (_, _, true, false) => Op::MadB64,
                (_, true, _, true) => Op::MulHi64,
                (_, true, _, false) => Op::MadHi64,
                _ => return Err(r.no_such_type()),
            };
            if form.op == Op::MadHiS32 && r.take("sat") {
                form.op = Op::MadHiSatS32;
            }
            if wide {
                let to = match ty {
                    U16 => U32,
                    S16 => S32,
                    U32 => U64,
                    _ => S64,
                };
                form.ty = to;
                let src = [ty, ty, to];
                return r.finish(form, &[to], &src[..if mul { 2 } else { 3 }]);
            }
            if mul { 2 } else { 3 }
        }
        "mul24" | "mad24" => {
            if !matches!(ty, U32 | S32) {
                return Err(r.no_such_type());
            }
            form.op = if opcode == "mul24" { Op::Mul24 } else { Op::Mad24 };
            form.flags = r.take_flag("hi", HI) | if ty == S32 { A_SIGNED } else { 0 };
            if !form.has(HI) && !r.take("lo") {
                return Err(r.refuse("needs .lo or .hi"));
            }
            if form.op == Op::Mad24 && form.has(HI) && ty == S32 {
                form.flags |= r.take_flag("sat", SAT);
            }
            if opcode == "mul24" { 2 } else { 3 }
        }
        "div" if ty == F32 => {
            form.flags = r.take_flag("ftz", FTZ);
            form.op = if r.take("approx") {
                Op::DivF32Approx
            } else if r.take("full") {
                form.mode = 1;
                Op::DivF32Approx
            } else {
                form.round = r.take_round().ok_or_else(|| r.refuse("needs .approx, .full or a rounding modifier"))?;
                if form.round == Round::Rn && form.flags == 0 { Op::DivF32 } else { Op::DivF32Any }
            };
            2
        }
        "div" if ty == F64 => {
            form.round = r.take_round().ok_or_else(|| r.refuse("needs a rounding modifier"))?;
            form.op = if form.round == Round::Rn { Op::DivF64 } else { Op::DivF64Any };
            2
        }
        "div" | "rem" => {
            let div = opcode == "div";
            form.op = match ty {
                U32 => {
                    if div {
                        Op::DivU32
                    } else {
                        Op::RemU32
                    }
                }
                S32 => {
                    if div {
                        Op::DivS32
                    } else {
                        Op::RemS32
                    }
                }
                U64 => {
                    if div {
                        Op::DivU64
                    } else {
                        Op::RemU64
                    }
                }
                S64 => {
                    if div {
                        Op::DivS64
                    } else {
                        Op::RemS64
                    }
                }
                U16 | S16 => {
                    if div {
                        Op::Div16
                    } else {
                        Op::Rem16
                    }
                }
                _ => return Err(r.no_such_type()),
            };
            2
        }
        "rcp" | "sqrt" | "rsqrt" => {
            let approx = r.take("approx");
            let ftz = r.take("ftz");
            form.flags = if ftz { FTZ } else { 0 };
            if !approx {
                form.round = r.take_round().ok_or_else(|| r.refuse("needs .approx or a rounding modifier"))?;
            }
            let plain = form.round == Round::Rn && !ftz;
            form.op = match (opcode, ty, approx) {
                ("rcp", F32, true) => Op::RcpF32Approx,
                ("rcp", F32, false) => {
                    if plain {
                        Op::RcpF32
                    } else {
                        Op::RcpF32Any
                    }
                }
                ("rcp", F64, true) if ftz => Op::RcpF64Approx,
                ("rcp", F64, false) if !ftz => Op::RcpF64,
                ("sqrt", F32, true) => Op::SqrtF32Approx,
                ("sqrt", F32, false) => {
                    if plain {
                        Op::SqrtF32
                    } else {
                        Op::SqrtF32Any
                    }
                }
                ("sqrt", F64, false) if !ftz => Op::SqrtF64,
                ("rsqrt", F32, true) => Op::RsqrtF32,
                ("rsqrt", F64, true) => Op::RsqrtF64,
                _ => return Err(r.refuse("is not supported with these modifiers")),
            };
            1
        }
        "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
            if !r.take("approx") {
                return Err(r.refuse("needs .approx"));
            }
            if opcode != "tanh" {
                form.flags = r.take_flag("ftz", FTZ);
            }
            form.op = match (opcode, ty) {
                ("ex2", F32) => {
                    if form.has(FTZ) {
                        Op::Ex2F32Any
                    } else {
                        Op::Ex2F32
                    }
                }
                ("lg2", F32) => Op::Lg2F32,
                ("sin", F32) => Op::SinF32,
                ("cos", F32) => Op::CosF32,
                ("tanh", F32) => Op::TanhF32,
                ("ex2", _) if ty.is_half() => Op::Ex2Half,
                ("tanh", _) if ty.is_half() => Op::TanhHalf,
                _ => return Err(r.no_such_type()),
            };
            1
        }
        "neg" | "abs" => {
            let neg = opcode == "neg";
            if matches!(ty, F32 | F16 | F16x2) {
                form.flags = r.take_flag("ftz", FTZ);
            }
            form.op = match ty {
                F32 => {
                    if neg {
                        Op::NegF32
                    } else {
                        Op::AbsF32
                    }
                }
                F64 => {
                    if neg {
                        Op::NegF64
                    } else {
                        Op::AbsF64
                    }
                }
                S32 => {
                    if neg {
                        Op::NegB32
                    } else {
                        Op::AbsS32
                    }
                }
                S64 => {
                    if neg {
                        Op::NegB64
                    } else {
                        Op::AbsS64
                    }
                }
                S16 => {
                    if neg {
                        Op::NegB16
                    } else {
                        Op::AbsS16
                    }
                }
                _ if ty.is_half() => {
                    if neg {
                        Op::NegHalf
                    } else {
                        Op::AbsHalf
                    }
                }
                _ => return Err(r.no_such_type()),
            };
            1
        }
        "min" | "max" => {
            let max = opcode == "max";
            form.flags = if max { MAX } else { 0 };
            if ty == F32 || ty.is_half() {
                if ty != Bf16 && ty != Bf16x2 {
                    form.flags |= r.take_flag("ftz", FTZ);
                }
                form.flags |= r.take_flag("NaN", NAN);
                if r.take("xorsign") {
                    if !r.take("abs") {
                        return Err(r.refuse("needs .abs after .xorsign"));
                    }
                    form.flags |= XORSIGN;
                }
            }
            if matches!(ty, S32 | S16x2) {
                form.flags |= r.take_flag("relu", RELU);
            }
            form.op = match ty {
                F32 if form.flags & !MAX == 0 => {
                    if max {
                        Op::MaxF32
                    } else {
                        Op::MinF32
                    }
                }
                F32 => Op::MinMaxF32Any,
                F64 => {
                    if max {
                        Op::MaxF64
                    } else {
                        Op::MinF64
                    }
                }
                U32 => {
                    if max {
                        Op::MaxU32
                    } else {
                        Op::MinU32
                    }
                }
                S32 => {
                    if max {
                        Op::MaxS32
                    } else {
                        Op::MinS32
                    }
                }
                U64 => {
                    if max {
                        Op::MaxU64
                    } else {
                        Op::MinU64
                    }
                }
                S64 => {
                    if max {
                        Op::MaxS64
                    } else {
                        Op::MinS64
                    }
                }
                U16 | S16 => {
                    if max {
                        Op::Max16
                    } else {
                        Op::Min16
                    }
                }
                U16x2 | S16x2 => Op::MinMax16x2,
                _ if ty.is_half() => Op::MinMaxHalf,
                _ => return Err(r.no_such_type()),
            };
            2
        }
        "copysign" => {
            form.op = match ty {
                F32 => Op::CopysignF32,
                F64 => Op::CopysignF64,
                _ => return Err(r.no_such_type()),
            };
            2
        }
        "testp" => {
            form.op = match ty {
                F32 => Op::TestpF32,
                F64 => Op::TestpF64,
                _ => return Err(r.no_such_type()),
            };
            let tests = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"];
            let found = tests.iter().position(|t| r.take(t));
            form.mode = found.ok_or_else(|| r.refuse("needs the property to test"))? as u8;
            return r.finish(form, &[Pred], &[ty]);
        }
        "sad" => {
            form.op = match ty {
                U32 => Op::SadU32,
                S32 => Op::SadS32,
                U64 => Op::SadU64,
                S64 => Op::SadS64,
                U16 | S16 => Op::Sad16,
                _ => return Err(r.no_such_type()),
            };
            3
        }
        "and" | "or" | "xor" | "not" | "cnot" => {
            form.op = match (opcode, ty) {
                ("and", B16) => Op::AndB16,
                ("and", B32) => Op::AndB32,
                ("and", B64) => Op::AndB64,
                ("and", Pred) => Op::AndPred,
                ("or", B16) => Op::OrB16,
                ("or", B32) => Op::OrB32,
                ("or", B64) => Op::OrB64,
                ("or", Pred) => Op::OrPred,
                ("xor", B16) => Op::XorB16,
                ("xor", B32) => Op::XorB32,
                ("xor", B64) => Op::XorB64,
                ("xor", Pred) => Op::XorPred,
                ("not", B16) => Op::NotB16,
                ("not", B32) => Op::NotB32,
                ("not", B64) => Op::NotB64,
                ("not", Pred) => Op::NotPred,
                ("cnot", B16) => Op::CnotB16,
                ("cnot", B32) => Op::CnotB32,
                ("cnot", B64) => Op::CnotB64,
                _ => return Err(r.no_such_type()),
            };
            if matches!(opcode, "not" | "cnot") { 1 } else { 2 }
        }
        "shl" | "shr" => {
            form.op = match (opcode, ty) {
                ("shl", B16) => Op::ShlB16,
                ("shl", B32) => Op::ShlB32,
                ("shl", B64) => Op::ShlB64,
                ("shr", B16 | U16) => Op::ShrB16,
                ("shr", B32 | U32) => Op::ShrB32,
                ("shr", B64 | U64) => Op::ShrB64,
                ("shr", S16) => Op::ShrS16,
                ("shr", S32) => Op::ShrS32,
                ("shr", S64) => Op::ShrS64,
                _ => return Err(r.no_such_type()),
            };
            return r.finish(form, &[ty], &[ty, U32]);
        }
        "shf" if ty == B32 => {
            let (left, right) = (r.take("l"), r.take("r"));
            let (wrap, clamp) = (r.take("wrap"), r.take("clamp"));
            if left == right || wrap == clamp {
                return Err(r.refuse("needs .l or .r and .wrap or .clamp"));
            }
            form.op = if left { Op::ShfL } else { Op::ShfR };
            form.flags = if wrap { WRAP } else { 0 };
            return r.finish(form, &[B32], &[B32, B32, U32]);
        }
        "lop3" if ty == B32 => {
            if r.take("or") {
                form.bool_op = BoolOp::Or;
            } else if r.take("and") {
                form.bool_op = BoolOp::And;
            }
            if form.bool_op == BoolOp::None {
                form.op = Op::Lop3;
                return r.finish(form, &[B32], &[B32, B32, B32, B32]);
            }
            form.op = Op::Lop3Bool;
            return r.finish(form, &[B32, Pred], &[B32, B32, B32, B32, Pred]);
        }
        "prmt" if ty == B32 => {
            form.op = Op::Prmt;
            let modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"];
            form.mode = modes.iter().position(|m| r.take(m)).map_or(0, |i| i as u8 + 1);
            3
        }
        "bfe" => {
            form.op = match ty {
                U32 => Op::BfeU32,
                S32 => Op::BfeS32,
                U64 => Op::BfeU64,
                S64 => Op::BfeS64,
                _ => return Err(r.no_such_type()),
            };
            return r.finish(form, &[ty], &[ty, U32, U32]);
        }
        "bfi" => {
            form.op = match ty {
                B32 => Op::BfiB32,
                B64 => Op::BfiB64,
                _ => return Err(r.no_such_type()),
            };
            return r.finish(form, &[ty], &[ty, ty, U32, U32]);
        }
        "brev" => {
            form.op = match ty {
                B32 => Op::BrevB32,
                B64 => Op::BrevB64,
                _ => return Err(r.no_such_type()),
            };
            1
        }
        "popc" | "clz" => {
            form.op = match (opcode, ty) {
                ("popc", B32) => Op::PopcB32,
                ("popc", B64) => Op::PopcB64,
                ("clz", B32) => Op::ClzB32,
                ("clz", B64) => Op::ClzB64,
                _ => return Err(r.no_such_type()),
            };
            return r.finish(form, &[U32], &[ty]);
        }
        "bfind" => {
            form.flags = r.take_flag("shiftamt", SHIFTAMT) | if ty.is_signed() { A_SIGNED } else { 0 };
            form.op = match ty {
                U32 | S32 => Op::Bfind32,
                U64 | S64 => Op::Bfind64,
                _ => return Err(r.no_such_type()),
            };
            return r.finish(form, &[U32], &[ty]);
        }
        "fns" if ty == B32 => {
            form.op = Op::Fns;
            return r.finish(form, &[B32], &[B32, B32, S32]);
        }
        "szext" | "bmsk" => {
            form.op = match (opcode, ty) {
                ("szext", U32 | S32) => Op::Szext,
                ("bmsk", B32) => Op::Bmsk,
                _ => return Err(r.no_such_type()),
            };
            form.flags = r.take_flag("wrap", WRAP);
            if !form.has(WRAP) && !r.take("clamp") {
                return Err(r.refuse("needs .wrap or .clamp"));
            }
            return r.finish(form, &[ty], &[ty, U32]);
        }
        _ => return Err(r.refuse("is not supported")),
    };
    r.finish(form, &[ty], &[ty, ty, ty][..sources])
}

fn parse_compare(opcode: &str, mut r: Reader<'_>, mut form: Decoded) -> Result<(Decoded, Signature), Unsupported> {
    use Ty::*;
    let (to, ty) = if opcode == "setp" { (Pred, r.one_type()?) } else { r.two_types()? };
    form.ty = to;
    form.from = ty;
    let word = r.words.iter().position(|w| compare(w, ty.is_float()).is_some());
    let word = word.ok_or_else(|| r.refuse("has no comparison operator for this type"))?;
    let word = r.words.remove(word);
    let (comparison, unsigned) = compare(word, ty.is_float()).unwrap_or_else(|| unreachable!("found just above"));
    form.compare = comparison;
    for (word, op) in [("and", BoolOp::And), ("or", BoolOp::Or), ("xor", BoolOp::Xor)] {
        if r.take(word) {
            form.bool_op = op;
        }
    }
    if matches!(ty, F32 | F16 | F16x2) {
        form.flags = r.take_flag("ftz", flag::FTZ);
    }
    // Bits have no order.
    if matches!(ty, B16 | B32 | B64) && comparison.relation != Relation::Equal {
        return Err(r.refuse("compares bits, which have no order"));
    }
    if unsigned && ty.is_signed() {
        return Err(r.refuse("compares signed integers by an operator for unsigned ones"));
    }
    match ty {
        B16 | U16 | S16 | B32 | U32 | S32 | B64 | U64 | S64 | F16 | Bf16 | F16x2 | Bf16x2 | F32 | F64 => {}
        _ => return Err(r.no_such_type()),
    }
    let pair = matches!(ty, F16x2 | Bf16x2);
    form.op = if opcode == "setp" {
        match ty {
            S32 => Op::SetpI32,
            U32 | B32 => Op::SetpU32,
            F32 => Op::SetpF32,
            _ => Op::SetpOther,
        }
    } else {
        let ok = match to {
            U32 | S32 => true,
            F32 => !ty.is_half(),
            U16 | S16 => matches!(ty, F16 | Bf16),
            F16 => !pair && ty != Bf16,
            Bf16 => !pair && ty != F16,
            F16x2 | Bf16x2 => to == ty,
            _ => false,
        };
        if !ok {
            return Err(r.no_such_type());
        }
        Op::SetOther
    };
    let src = [ty, ty, Pred];
    let src = &src[..if form.bool_op == BoolOp::None { 2 } else { 3 }];
    if opcode == "setp" { r.finish(form, &[Pred, Pred], src) } else { r.finish(form, &[to], src) }
}

fn parse_cvt(mut r: Reader<'_>, mut form: Decoded) -> Result<(Decoded, Signature), Unsupported> {
    use Ty::*;
    use flag::*;
    if r.take("pack") {
        return parse_cvt_pack(r, form);
    }
    let (to, from) = r.two_types()?;
    form.ty = to;
    form.from = from;
    let mut rounded = false;
    for (word, round) in [("rni", Round::Rn), ("rzi", Round::Rz), ("rmi", Round::Rm), ("rpi", Round::Rp)] {
        if r.take(word) {
            form.round = round;
            form.flags |= INTEGRAL;
            rounded = true;
        }
    }
    if let Some(round) = r.take_round() {
        if rounded {
            return Err(r.refuse("has two rounding modifiers"));
        }
        form.round = round;
        rounded = true;
    } else if to == Tf32 && r.take("rna") {
        form.round = Round::Rna;
        rounded = true;
    }
    form.flags |= r.take_flag("ftz", FTZ)
        | r.take_flag("sat", SAT)
        | r.take_flag("relu", RELU)
        | r.take_flag("satfinite", SATFINITE);
    let float = |ty: Ty| matches!(ty, F16 | Bf16 | F32 | F64);
    let int = |ty: Ty| matches!(ty, U8 | U16 | U32 | U64 | S8 | S16 | S32 | S64);

    if matches!(to, F16x2 | Bf16x2) {
        if from != F32
            || !rounded
            || form.flags & !(RELU | SATFINITE) != 0
            || !matches!(form.round, Round::Rn | Round::Rz)
        {
            return Err(r.refuse("is not supported with these types and modifiers"));
        }
        form.op = match (to, form.round, form.flags) {
            (F16x2, Round::Rn, 0) => Op::CvtF16x2F32,
            (Bf16x2, Round::Rn, 0) => Op::CvtBf16x2F32,
            _ => Op::CvtPair,
        };
        return r.finish(form, &[to], &[F32, F32]);
    }
    if to == Tf32 {
        if from != F32
            || !rounded
            || form.flags & !(RELU | SATFINITE) != 0
            || matches!(form.round, Round::Rm | Round::Rp)
        {
            return Err(r.refuse("is not supported with these types and modifiers"));
        }
        form.op = Op::Cvt;
        return r.finish(form, &[B32], &[F32]);
    }
    if !(float(to) || int(to)) || !(float(from) || int(from)) {
        return Err(r.no_such_type());
    }
    if form.has(FTZ) && to != F32 && from != F32 {
        return Err(r.refuse("takes .ftz only where one type is .f32"));
    }
    if form.flags & (RELU | SATFINITE) != 0
        && !(matches!(to, F16 | Bf16) && from == F32 && rounded && !form.has(INTEGRAL))
    {
        return Err(r.refuse("takes .relu and .satfinite only from .f32 to .f16 and .bf16"));
    }
    let integral = form.has(INTEGRAL);
    if int(from) && int(to) {
        if rounded {
            return Err(r.refuse("rounds, between integers"));
        }
    } else if int(from) {
        if integral || !rounded {
            return Err(r.refuse("needs one of .rn, .rz, .rm and .rp"));
        }
    } else if int(to) {
        if !integral {
            return Err(r.refuse("needs one of .rni, .rzi, .rmi and .rpi"));
        }
    } else {
        // Between floating-point types: rounding where precision or range is lost, integral rounding only at equal
        // width.
        let lossy = match (to, from) {
            (F16, Bf16) | (Bf16, F16) => true,
            _ => to.bits() < from.bits(),
        };
        if integral && to != from {
            return Err(r.refuse("rounds to an integral value between different types"));
        }
        if lossy && !rounded {
            return Err(r.refuse("needs one of .rn, .rz, .rm and .rp"));
        }
        if !lossy && rounded && !integral && to != from && !(to.is_half() || from.is_half()) {
            return Err(r.refuse("rounds, though the conversion is exact"));
        }
    }
    let narrow = |ty: Ty| ty.bits() <= 32;
    let plain = form.flags & !INTEGRAL == 0;
    form.op = if int(from) && int(to) && !form.has(SAT) {
        match (narrow(to), narrow(from)) {
            (true, true) => Op::CvtInt32,
            (false, true) => Op::CvtInt32To64,
            (true, false) => Op::CvtInt64To32,
            (false, false) => Op::CvtInt64,
        }
    } else {
        match (to, from, form.round) {
            (F32, S32, Round::Rn) if plain => Op::CvtF32S32,
            (F32, U32, Round::Rn) if plain => Op::CvtF32U32,
            (S32, F32, Round::Rz) if plain => Op::CvtS32F32,
            (U32, F32, Round::Rz) if plain => Op::CvtU32F32,
            (F32, F16, _) if plain => Op::CvtF32F16,
            (F32, Bf16, _) if plain => Op::CvtF32Bf16,
            (F16, F32, Round::Rn) if plain => Op::CvtF16F32,
            (Bf16, F32, Round::Rn) if plain => Op::CvtBf16F32,
            (F64, F32, _) if plain => Op::CvtF64F32,
            (F32, F64, Round::Rn) if plain => Op::CvtF32F64,
            (F32, F32, _) if integral && plain => Op::CvtRoundF32,
            (F32, F32, _) if form.flags == SAT => Op::CvtSatF32,
            _ => Op::Cvt,
        }
    };
    r.finish(form, &[to], &[from])
}

/// `cvt.pack.sat.convertType.abType{.cType}`: two 32-bit integers saturated to 8 or 16 bits and packed.
fn parse_cvt_pack(mut r: Reader<'_>, mut form: Decoded) -> Result<(Decoded, Signature), Unsupported> {
    use Ty::*;
    if !r.take("sat") {
        return Err(r.refuse("needs .sat"));
    }
    let (to, from, third) = match r.types[..] {
        [to @ (U16 | S16), from] => (to, from, false),
        [to @ (U8 | S8), from, B32] => (to, from, true),
        _ => return Err(r.no_such_type()),
    };
    if from != S32 {
        return Err(r.no_such_type());
    }
    form.op = Op::CvtPack;
    form.ty = to;
    form.from = from;
    r.finish(form, &[B32], &[S32, S32, B32][..if third { 3 } else { 2 }])
}
