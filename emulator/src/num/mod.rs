//! The meaning of every arithmetic instruction, for a whole warp at a time.
//!
//! [`form()`] maps an opcode with its modifiers (`fma.rn.ftz.f32`) to a [`Form`]: the registers it reads and writes,
//! and one function per instruction set of the host that executes it. The decoder in `ptx` asks here for every opcode
//! that is not control flow, memory access, or communication between lanes. Unknown opcodes are refused by name when
//! the module is loaded.
//!
//! The modules, each using only those below it:
//!
//! - [`moves`]: copies, packing, unpacking, extension.
//! - [`matrix`]: `mma` and `wmma`.
//! - [`ops`]: every other operation, looped over 32 lanes.
//! - [`soft`]: exact arithmetic in integers, for rounding modes and conversions that the host lacks.
//! - [`approx`]: the `.approx` functions.
//! - [`half`]: f16 and bf16 on bits.
//! - [`int`]: integer instructions.
//! - [`float`]: f32 and f64 on bits.
//! - [`form`](mod@form): spelling, operands and dispatch codes of the forms.
//!
//! # Layout of a warp's registers
//!
//! One 64-byte aligned byte array per warp, the register file. An operand is a byte offset into it.
//! - [`Kind::B32`] (also 8- and 16-bit registers, whose high bits are zero): `[u32; 32]`, lane l at index l.
//! - [`Kind::B64`]: `[u64; 32]`.
//! - [`Kind::B128`]: `[u128; 32]`.
//! - [`Kind::Pred`]: one `u32`, bit l is lane l.
//!
//! Vector registers start at multiples of 64 bytes. Immediates are registers too: the decoder broadcasts them into a
//! constant part of the file (for [`Kind::Pred`], all ones or zero), so that a form only ever sees registers.
//!
//! Lanes outside `mask` keep their old destination. Sources of such lanes hold arbitrary bits and must not cause a
//! panic.

// Loops over lanes index several arrays at once. `a < b || a > b` is not `a != b`: NaN is neither. Shifts and masks are
// written as in the hardware manuals.
#![allow(clippy::needless_range_loop, clippy::double_comparisons, clippy::precedence)]

pub mod approx;
pub mod float;
pub mod form;
pub mod half;
pub mod int;
pub mod matrix;
pub mod moves;
pub mod ops;
pub mod soft;

pub use form::Unsupported;
use form::{Decoded, Ty};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What a register holds; see the module's documentation for the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A predicate: one bit per lane in a single `u32`.
    Pred,
    /// 8, 16 or 32 bits per lane, zero-extended, as `[u32; 32]`.
    B32,
    /// 64 bits per lane, as `[u64; 32]`.
    B64,
    /// 128 bits per lane, as `[u128; 32]`.
    B128,
}

/// How an immediate operand is read, and how wide a register operand must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    /// Predicate.
    Pred,
    /// 8-bit integer or untyped bits, held in 32 bits.
    B8,
    /// 16-bit integer or untyped bits, held in 32 bits. Also f16 and bf16.
    B16,
    /// 32-bit integer or untyped bits. Also f16x2 and bf16x2.
    B32,
    /// 64-bit integer or untyped bits.
    B64,
    /// 32-bit float: immediates are `0f` with 8 hexadecimal digits, or decimal or `0d` literals rounded from double.
    F32,
    /// 64-bit float: immediates are `0d` with 16 hexadecimal digits, or decimal.
    F64,
}

impl Type {
    /// The kind of register that holds a value of this type.
    pub const fn kind(self) -> Kind {
        match self {
            Type::Pred => Kind::Pred,
            Type::B8 | Type::B16 | Type::B32 | Type::F32 => Kind::B32,
            Type::B64 | Type::F64 => Kind::B64,
        }
    }
}

/// The counter under which an instruction is booked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// mma and wmma.mma.
    Mma,
    /// Fused multiply-add of floats.
    Fma,
    /// Other arithmetic: integer, conversions, comparisons, moves.
    Arithmetic,
    /// Special functions: ex2, lg2, sin, cos, tanh, rcp, sqrt, rsqrt, div.
    Special,
}

/// Type under which floating-point operations are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlopType {
    /// f16 and f16x2.
    F16,
    /// bf16 and bf16x2.
    Bf16,
    /// tf32 (mma only).
    Tf32,
    /// f32.
    F32,
    /// f64.
    F64,
}

/// Index of the code for any processor in [`Form::run`].
pub const PORTABLE: usize = 0;
/// Index of the code for AVX2, FMA, F16C, BMI1, BMI2, LZCNT and POPCNT.
pub const AVX2: usize = 1;
/// Index of the code for AVX-512 F, VL, BW, DQ and all of [`AVX2`].
pub const AVX512: usize = 2;

/// Executes `count` instructions of one form in order.
///
/// `operands` holds `count` times (destinations, sources, and the carry flag as source and destination if the form has
/// them), each a byte offset from `registers`. Runs of one form go into one call, which makes dispatch cheap.
///
/// # Safety
/// `registers` is 64-byte aligned. `operands` holds `count` times the form's operands, each an offset inside the file
/// with room for its kind. The processor supports the instruction set that the function was compiled for. Source and
/// destination registers may coincide in any combination.
pub type Run = unsafe fn(form: &Form, registers: *mut u8, operands: *const u32, count: usize, mask: u32);

/// What the code of a [`Form`] reads.
#[derive(Debug)]
pub struct Detail {
    /// How many offsets an instruction has: destinations, sources and the carry flag.
    operands: usize,
    /// The decoded name.
    decoded: Decoded,
    /// The decoded product of `mma` and `wmma.mma`.
    matrix: Option<matrix::Matrix>,
}

impl Detail {
    /// For forms whose code reads none of it.
    pub const NONE: Detail = Detail { operands: 0, decoded: Decoded::NONE, matrix: None };
}

/// One instruction form.
#[derive(Debug)]
pub struct Form {
    /// Types of the destinations, in the order of the PTX text. `setp` with and without a second destination are
    /// separate forms.
    pub dst: &'static [Type],
    /// Types of the sources, in the order of the PTX text; vector operands (mma) flattened.
    pub src: &'static [Type],
    /// Whether the carry flag (a predicate register) is appended as a last source.
    pub carry_in: bool,
    /// Whether the carry flag is appended as a last destination (after `dst`, before the sources).
    pub carry_out: bool,
    /// For the counters.
    pub class: Class,
    /// Floating-point operations per active lane (for mma: per warp), by type.
    pub flops: Option<(FlopType, u32)>,
    /// What tells apart the forms that share code.
    pub detail: Detail,
    /// The code, called with this form, for [`PORTABLE`], [`AVX2`] and [`AVX512`].
    pub run: [Run; 3],
}

/// On which lanes of its sources a lane of the result depends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dependence {
    /// The same lane of every source.
    All,
    /// The same lane of the predicate and of the source that it selects.
    Select,
    /// The same lane of both predicates, unless one is false.
    And,
    /// The same lane of both predicates, unless one is true.
    Or,
    /// The same lane of all, unless the last, a predicate, is false.
    AndLast,
    /// The same lane of all, unless the last, a predicate, is true.
    OrLast,
    /// See [`Form::spread`].
    Matrix,
}

impl Form {
    /// See [`Dependence`].
    pub fn dependence(&self) -> Dependence {
        match self.detail.decoded.op {
            _ if self.detail.matrix.is_some() => Dependence::Matrix,
            form::Op::Selp32 | form::Op::Selp64 => Dependence::Select,
            form::Op::AndPred => Dependence::And,
            form::Op::OrPred => Dependence::Or,
            form::Op::SetpI32 | form::Op::SetpU32 | form::Op::SetpF32 | form::Op::SetpOther => {
                match self.detail.decoded.bool_op {
                    form::BoolOp::And => Dependence::AndLast,
                    form::BoolOp::Or => Dependence::OrLast,
                    _ => Dependence::All,
                }
            }
            _ => Dependence::All,
        }
    }

    /// Of a matrix product: which lanes of each destination (by operand index) depend on the lanes that `marked` gives
    /// for each source.
    pub fn spread(&self, marked: impl Fn(usize) -> u32) -> Vec<(usize, u32)> {
        self.detail.matrix.as_ref().map_or(vec![], |matrix| matrix.spread(marked))
    }

    /// A plan for a run of matrix products that all lanes execute, with the operands that [`Self::run`] would get.
    pub fn plan(&self, operands: &[u32]) -> Option<matrix::Plan> {
        self.detail.matrix.as_ref().map(|matrix| matrix.plan(operands, self.detail.operands))
    }
}

/// How the decoder reads an operand of a type.
fn operand_type(ty: Ty) -> Type {
    match ty {
        Ty::Pred => Type::Pred,
        Ty::F32 => Type::F32,
        Ty::F64 => Type::F64,
        _ => match ty.bits() {
            8 => Type::B8,
            16 => Type::B16,
            32 => Type::B32,
            _ => Type::B64,
        },
    }
}

/// Under which type a form's operations are counted.
fn flop_type(ty: Ty) -> Option<FlopType> {
    Some(match ty {
        Ty::F16 | Ty::F16x2 => FlopType::F16,
        Ty::Bf16 | Ty::Bf16x2 => FlopType::Bf16,
        Ty::Tf32 => FlopType::Tf32,
        Ty::F32 => FlopType::F32,
        Ty::F64 => FlopType::F64,
        _ => return None,
    })
}

/// The form of an arithmetic opcode with all its modifiers, spelled as in PTX (`setp.lt.and.f32`). None if there is no
/// such form.
///
/// `destinations` and `sources` count the instruction's operands with vectors flattened: `setp.eq.s32 %p|%q, ...` has 2
/// destinations.
pub fn form(opcode: &str, destinations: usize, sources: usize) -> Option<&'static Form> {
    // Every form that was ever asked for, leaked: there are some thousands at most.
    static FORMS: Mutex<BTreeMap<(String, usize), &'static Form>> = Mutex::new(BTreeMap::new());
    let key = (opcode.to_string(), destinations);
    let mut forms = FORMS.lock().unwrap_or_else(PoisonError::into_inner);
    let form = match forms.get(&key) {
        Some(form) => *form,
        None => {
            let form: &'static Form = Box::leak(Box::new(make(opcode, destinations).ok()?));
            forms.insert(key, form);
            form
        }
    };
    (form.dst.len() == destinations && form.src.len() == sources).then_some(form)
}

fn make(opcode: &str, destinations: usize) -> Result<Form, Unsupported> {
    let types =
        |types: &[Ty]| -> &'static [Type] { types.iter().map(|ty| operand_type(*ty)).collect::<Vec<_>>().leak() };
    let base = opcode.split('.').next().unwrap_or("");
    if base == "mma" || opcode.starts_with("wmma.mma.") {
        let parsed = matrix::parse(opcode)?;
        let (dst, src) = (types(&parsed.dst), types(&parsed.src));
        return Ok(Form {
            dst,
            src,
            carry_in: false,
            carry_out: false,
            class: Class::Mma,
            flops: parsed.element.and_then(flop_type).map(|ty| (ty, parsed.flops)),
            detail: Detail { operands: dst.len() + src.len(), decoded: Decoded::NONE, matrix: Some(parsed.matrix) },
            run: matrix::RUNS,
        });
    }
    let (mut decoded, mut signature) = form::parse(opcode)?;
    if base == "setp" && destinations == 1 {
        signature.dst.pop();
    }
    decoded.destinations = signature.dst.len() as u8;
    let (carry_in, carry_out) = (decoded.has(form::flag::CC_IN), decoded.has(form::flag::CC_OUT));
    let float = decoded.ty.is_float();
    let class = match base {
        "fma" | "mad" if float => Class::Fma,
        "div" | "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" if float => Class::Special,
        _ => Class::Arithmetic,
    };
    let operations = match base {
        "fma" | "mad" => 2,
        "add" | "sub" | "mul" | "div" | "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => 1,
        _ => 0,
    };
    let pairs = if matches!(decoded.ty, Ty::F16x2 | Ty::Bf16x2) { 2 } else { 1 };
    Ok(Form {
        dst: types(&signature.dst),
        src: types(&signature.src),
        carry_in,
        carry_out,
        class,
        flops: flop_type(decoded.ty).filter(|_| operations > 0).map(|ty| (ty, operations * pairs)),
        detail: Detail {
            operands: signature.dst.len() + signature.src.len() + carry_in as usize + carry_out as usize,
            decoded,
            matrix: None,
        },
        run: ops::runs(decoded.op),
    })
}

/// Where the elements of a wmma fragment are held.
///
/// The layout is not specified by the manual; what matters is that loads, stores and `wmma.mma` agree.
#[derive(Debug)]
pub struct Fragment {
    /// 32-bit registers per lane (64-bit ones for f64).
    pub registers: u32,
    /// Elements in one register: 4 of 8 bits, 2 of 16 bits, or 1.
    pub per_register: u32,
    /// Bytes of an element in memory: 1, 2, 4 or 8.
    pub element_bytes: u32,
    /// (row, column) of an element: lane, register, element of the register.
    pub at: fn(u32, u32, u32) -> (u32, u32),
}

/// The fragment of `wmma.load.a.sync.aligned.row.m16n16k16.bf16`: matrix 'a', 'b', 'c' or 'd', shape `m16n16k16`,
/// element type `bf16`; the same for row-major and column-major matrices. None if there is no such fragment.
pub fn fragment(matrix: char, shape: &str, element: &str) -> Option<&'static Fragment> {
    matrix::fragment(matrix, shape, element)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A register of up to 64 bits per lane.
    #[repr(align(64))]
    #[derive(Clone, Copy, PartialEq, Debug)]
    struct Slot([u32; 64]);

    /// The destinations after one instruction, whose operand i is slot `operands[i]`.
    fn run(form: &Form, operands: &[u32], mut file: Vec<Slot>, mask: u32) -> Vec<Slot> {
        let offsets: Vec<u32> = operands.iter().map(|slot| 256 * slot).collect();
        assert!(operands.iter().all(|&slot| (slot as usize) < file.len()));
        // SAFETY: every operand is an aligned slot of the file, with room for 64 bits per lane.
        unsafe { (form.run[PORTABLE])(form, file.as_mut_ptr().cast(), offsets.as_ptr(), 1, mask) };
        operands[..form.dst.len()].iter().map(|&slot| file[slot as usize]).collect()
    }

    #[test]
    fn destinations_may_be_sources() {
        // Destinations and sources; the first source that destinations take the place of.
        let product = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32";
        let forms = [("add.s32", 1, 2, 0), ("fma.rn.f32", 1, 3, 2), ("min.f16x2", 1, 2, 1), ("mul.lo.u64", 1, 2, 0)];
        for (opcode, destinations, sources, first) in
            forms.into_iter().chain([(product, 4, 10, 6), (product, 4, 10, 0)])
        {
            let form = form(opcode, destinations, sources).unwrap_or_else(|| panic!("no form {opcode}"));
            let count = (destinations + sources) as u32;
            let number = |slot: u32, i: u32| (slot * 64 + i).wrapping_mul(0x9e37_79b9) & 0xbfff_bfff;
            let file: Vec<Slot> = (0..count).map(|s| Slot(std::array::from_fn(|i| number(s, i as u32)))).collect();
            let apart: Vec<u32> = (0..count).collect();
            let mut in_place = apart.clone();
            (0..destinations).for_each(|d| in_place[d] = (destinations + first + d) as u32);
            let want = run(form, &apart, file.clone(), u32::MAX);
            assert_ne!(want, file[..destinations], "{opcode} computes something");
            assert_eq!(used(form, run(form, &in_place, file.clone(), u32::MAX)), used(form, want), "{opcode}");
            if !opcode.starts_with("mma") {
                assert_eq!(run(form, &apart, file.clone(), 0), file[..destinations], "{opcode} with no lane");
            }
        }
    }

    /// Only the bits that destinations have.
    fn used(form: &Form, mut slots: Vec<Slot>) -> Vec<Slot> {
        for (slot, ty) in slots.iter_mut().zip(form.dst) {
            if ty.kind() == Kind::B32 {
                slot.0[32..].fill(0);
            }
        }
        slots
    }
}
