//! Decodes one instruction of text into one step (or a few) on virtual registers.
//!
//! Arithmetic is looked up in [`crate::num::form()`], everything else is decoded here, and the rest is refused by name.

use super::program::*;
use super::{Param, ParseError};
use crate::num::{self, Kind, Type, moves};
use std::collections::HashMap;

/// Largest local memory of a thread, in bytes.
pub const MAX_LOCAL_BYTES: u64 = 512 << 10;

/// What a module-level name refers to.
#[derive(Clone, Copy, Debug)]
pub enum ModuleName {
    /// Index into the globals.
    Global(u32),
    /// Index into the shared variables.
    Shared(u32),
    /// A function; index into `functions`.
    Function(usize),
    /// A kernel.
    Kernel,
}

/// A device function.
#[derive(Debug)]
pub struct Function {
    /// Name.
    pub name: String,
    /// Return parameters, then parameters.
    pub formals: Vec<Param>,
    /// How many of `formals` are return parameters.
    pub returns: usize,
    /// The body, unless it was only declared.
    pub body: Option<Body>,
}

impl Function {
    /// What it returns and takes.
    pub fn signature(&self) -> Signature {
        let (returns, takes) = self.formals.split_at(self.returns);
        Signature { returns: sizes(returns), takes: sizes(takes) }
    }
}

/// The sizes of parameters.
pub fn sizes(formals: &[Param]) -> Vec<u32> {
    formals.iter().map(|formal| formal.bytes).collect()
}

/// What a `.callprototype` or `.calltargets` says about a call through a function's address.
#[derive(Clone, Debug)]
pub struct Prototype {
    /// What the function returns and takes.
    pub signature: Signature,
    /// The functions that `.calltargets` lists.
    pub targets: Option<Vec<u32>>,
}

/// A virtual register, or a constant of the body when [`CONSTANT`] is set.
pub type Value = u32;

/// See [`Value`].
pub const CONSTANT: u32 = 1 << 31;

/// A name other than a register's, plus an offset.
#[derive(Clone, Copy, Debug)]
pub struct SymbolRef<'a> {
    /// The name.
    pub name: &'a str,
    /// Bytes added.
    pub offset: i64,
}

/// An operand as written.
#[derive(Clone, Debug)]
pub enum Operand<'a> {
    /// A register.
    Register(Value),
    /// `!p`
    Not(Value),
    /// An integer; negative ones wrapped.
    Int(u64),
    /// Bits of a 0f literal.
    F32(u32),
    /// Bits of a 0d or decimal literal.
    F64(u64),
    /// A special register.
    Special(Special),
    /// A variable, label or function.
    Symbol(SymbolRef<'a>),
    /// `{a, b}` or `(a, b)`
    Vector(Vec<Operand<'a>>),
    /// `[a + 4]`
    Address(Box<Operand<'a>>, i64),
    /// `a|b`
    Pair(Box<Operand<'a>>, Box<Operand<'a>>),
    /// `_`
    Sink,
}

/// A constant of a body; addresses are known only after inlining.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BodyConstant {
    /// Known.
    Plain(Constant),
    /// Offset in the function's frame of local memory.
    Frame(u64, bool),
    /// A formal parameter of a device function: index, addend.
    Formal(u32, i64, bool),
}

/// An instruction on virtual registers. Branch targets are labels of the body.
#[derive(Clone, Copy, Debug)]
pub struct Ins {
    /// What; `target` fields hold labels.
    pub op: BodyOp,
    /// Guard register and whether negated.
    pub guard: Option<(Value, bool)>,
    /// First operand in the body's pool.
    pub first: u32,
    /// Destinations, which come first.
    pub outputs: u8,
    /// Operands in all.
    pub arity: u8,
    /// Where it stands.
    pub source: Source,
}

/// An operation, or what only exists before inlining.
#[derive(Clone, Copy, Debug)]
pub enum BodyOp {
    /// An operation.
    Op(Op),
    /// A label.
    Label(u32),
    /// A jump to a label, subject to the guard.
    Goto(u32),
    /// An indexed jump through one of the body's tables.
    Table(u32),
    /// Return from the function (the end of the kernel, in a kernel).
    Return,
    /// Call of a function; the operands are the constants of the actual parameters' variables.
    Call(u32),
    /// Call through a function's address, by one of the body's prototypes; the operands are as for a call, then the
    /// address.
    CallAddress(u32),
}

/// A function's code on virtual registers.
#[derive(Debug, Default)]
pub struct Body {
    /// Bits of each virtual register: 1, 8, 16, 32, 64 or 128.
    pub bits: Vec<u8>,
    /// Code.
    pub ins: Vec<Ins>,
    /// Operands.
    pub pool: Vec<Value>,
    /// Constants.
    pub constants: Vec<BodyConstant>,
    /// Tables of labels.
    pub tables: Vec<Vec<u32>>,
    /// Prototypes of calls through functions' addresses.
    pub prototypes: Vec<Prototype>,
    /// How many labels there are.
    pub labels: u32,
    /// Bytes of the frame in local memory.
    pub frame: u64,
    /// Shared variables in order of first mention.
    pub shared: Vec<u32>,
}

#[derive(Clone, Copy)]
enum Name {
    Register(Value),
    Local(u64),
    Formal(u32),
    KernelParam(u32),
    Shared(u32),
}

#[derive(Default)]
struct Scope<'a> {
    names: HashMap<&'a str, Name>,
    families: Vec<(&'a str, u32, u32)>,
    labels: HashMap<&'a str, u32>,
    tables: HashMap<&'a str, u32>,
    prototypes: HashMap<&'a str, u32>,
    parent: usize,
}

enum Target<'a> {
    Goto(&'a str),
    Table(&'a str),
}

/// Decodes a function while it is read.
pub struct Builder<'a> {
    body: Body,
    scopes: Vec<Scope<'a>>,
    scope: usize,
    kernel: bool,
    interned: HashMap<BodyConstant, u32>,
    jumps: Vec<(usize, usize, Target<'a>, u32)>,
    table_labels: Vec<(usize, Vec<&'a str>, u32)>,
    carry: Option<Value>,
    formals: Vec<Param>,
}

/// The special register of a name.
pub fn special(name: &str) -> Option<Special> {
    let axis = |name: &str| match name {
        "x" => Some(0),
        "y" => Some(1),
        "z" => Some(2),
        _ => None,
    };
    let name = name.strip_prefix('%')?;
    if let Some((base, component)) = name.split_once('.') {
        let axis = axis(component)?;
        return Some(match base {
            "tid" => Special::Tid(axis),
            "ntid" => Special::Ntid(axis),
            "ctaid" => Special::Ctaid(axis),
            "nctaid" => Special::Nctaid(axis),
            _ => return None,
        });
    }
    if let Some(number) = name.strip_prefix("envreg") {
        return number.parse().ok().filter(|&n| n < 32).map(Special::Environment);
    }
    Some(match name {
        "laneid" => Special::LaneId,
        "warpid" => Special::WarpId,
        "nwarpid" => Special::NWarpId,
        "smid" => Special::SmId,
        "nsmid" => Special::NSmId,
        "gridid" => Special::GridId,
        "lanemask_eq" => Special::LaneMaskEq,
        "lanemask_le" => Special::LaneMaskLe,
        "lanemask_lt" => Special::LaneMaskLt,
        "lanemask_ge" => Special::LaneMaskGe,
        "lanemask_gt" => Special::LaneMaskGt,
        "clock" => Special::Clock,
        "clock_hi" => Special::ClockHi,
        "clock64" => Special::Clock64,
        "globaltimer" => Special::GlobalTimer,
        "globaltimer_lo" => Special::GlobalTimerLo,
        "globaltimer_hi" => Special::GlobalTimerHi,
        "dynamic_smem_size" => Special::DynamicShared,
        "total_smem_size" => Special::TotalShared,
        "reserved_smem_offset_begin" | "reserved_smem_offset_0" | "reserved_smem_offset_1" => {
            Special::ReservedShared(0)
        }
        "reserved_smem_offset_end" => Special::ReservedShared(1),
        "reserved_smem_offset_cap" => Special::ReservedShared(2),
        _ => return None,
    })
}

/// Context of the instruction being decoded.
struct Context<'c, 'a> {
    opcode: &'a str,
    parts: Vec<&'a str>,
    guard: Option<(Value, bool)>,
    source: Source,
    names: &'c HashMap<String, ModuleName>,
    functions: &'c [Function],
}

impl Context<'_, '_> {
    fn fail<T>(&self, message: impl std::fmt::Display) -> Result<T, ParseError> {
        Err(ParseError::invalid(self.source.line, format!("{}: {message}", self.opcode)))
    }

    fn unsupported<T>(&self) -> Result<T, ParseError> {
        Err(ParseError::invalid(self.source.line, format!("instruction {} is not supported", self.opcode)))
    }

    fn has(&self, part: &str) -> bool {
        self.parts.contains(&part)
    }
}

/// The qualifiers without the required ones, sorted: assemblers accept qualifiers in any order, and published code
/// relies on it (`vote.ballot.sync.b32`, `ldmatrix.sync.aligned.x4.m8n8.shared.b16`). None if a required one is
/// missing.
fn qualifiers<'a>(parts: &[&'a str], required: &[&str]) -> Option<Vec<&'a str>> {
    let mut rest = parts.to_vec();
    for wanted in required {
        let at = rest.iter().position(|part| part == wanted)?;
        rest.remove(at);
    }
    rest.sort_unstable();
    Some(rest)
}

/// Bits and signedness of a type name.
fn element(name: &str) -> Option<(u8, bool)> {
    Some(match name {
        "b8" | "u8" => (8, false),
        "s8" => (8, true),
        "b16" | "u16" | "f16" | "bf16" => (16, false),
        "s16" => (16, true),
        "b32" | "u32" | "f32" | "f16x2" | "bf16x2" => (32, false),
        "s32" => (32, true),
        "b64" | "u64" | "f64" => (64, false),
        "s64" => (64, true),
        _ => return None,
    })
}

impl<'a> Builder<'a> {
    /// An empty body with its parameters in scope.
    pub fn new(formals: &[Param], kernel: bool) -> Self {
        Builder {
            body: Body::default(),
            scopes: vec![Scope::default()],
            scope: 0,
            kernel,
            interned: HashMap::new(),
            jumps: vec![],
            table_labels: vec![],
            carry: None,
            formals: formals.to_vec(),
        }
    }

    /// Virtual registers so far.
    pub fn registers(&self) -> u32 {
        self.body.bits.len() as u32
    }

    /// Begins a scope.
    pub fn open(&mut self) {
        self.scopes.push(Scope { parent: self.scope, ..Default::default() });
        self.scope = self.scopes.len() - 1;
    }

    /// Ends the scope.
    pub fn close(&mut self) {
        self.scope = self.scopes[self.scope].parent;
    }

    fn new_register(&mut self, bits: u8) -> Value {
        self.body.bits.push(bits);
        self.body.bits.len() as u32 - 1
    }

    /// `.reg` of one register, or of a family `name<count>`.
    pub fn register(&mut self, name: &'a str, count: Option<u32>, bits: u8) {
        let first = self.body.bits.len() as u32;
        self.body.bits.extend(std::iter::repeat_n(bits, count.unwrap_or(1) as usize));
        let scope = &mut self.scopes[self.scope];
        match count {
            Some(count) => scope.families.push((name, count, first)),
            None => {
                scope.names.insert(name, Name::Register(first));
            }
        }
    }

    /// `.local` or `.param` variable.
    pub fn local(&mut self, name: &'a str, bytes: u64, align: u64, line: u32) -> Result<(), ParseError> {
        let offset = self.body.frame.next_multiple_of(align);
        self.body.frame = offset + bytes;
        if self.body.frame > MAX_LOCAL_BYTES {
            return Err(ParseError::invalid(line, format!("more than {MAX_LOCAL_BYTES} bytes of local memory")));
        }
        self.scopes[self.scope].names.insert(name, Name::Local(offset));
        Ok(())
    }

    /// `.shared` variable of the function.
    pub fn shared(&mut self, name: &'a str, index: u32) {
        self.scopes[self.scope].names.insert(name, Name::Shared(index));
    }

    /// A label.
    pub fn label(&mut self, name: &'a str, line: u32) -> Result<(), ParseError> {
        let label = self.body.labels;
        self.body.labels += 1;
        if self.scopes[self.scope].labels.insert(name, label).is_some() {
            return Err(ParseError::invalid(line, format!("label {name} is defined twice")));
        }
        self.push(BodyOp::Label(label), None, &[], 0, Source { line, ..Default::default() });
        Ok(())
    }

    /// `name: .branchtargets a, b;`
    pub fn table(&mut self, name: &'a str, targets: Vec<&'a str>, line: u32) -> Result<(), ParseError> {
        let index = self.table_labels.len() as u32;
        self.table_labels.push((self.scope, targets, line));
        if self.scopes[self.scope].tables.insert(name, index).is_some() {
            return Err(ParseError::invalid(line, format!("label {name} is defined twice")));
        }
        Ok(())
    }

    /// `name: .callprototype` or `name: .calltargets`
    pub fn prototype(&mut self, name: &'a str, prototype: Prototype, line: u32) -> Result<(), ParseError> {
        let index = self.body.prototypes.len() as u32;
        self.body.prototypes.push(prototype);
        if self.scopes[self.scope].prototypes.insert(name, index).is_some() {
            return Err(ParseError::invalid(line, format!("label {name} is defined twice")));
        }
        Ok(())
    }

    fn find_prototype(&self, name: &str) -> Option<u32> {
        let mut at = self.scope;
        loop {
            match self.scopes[at].prototypes.get(name) {
                Some(&found) => return Some(found),
                None if at == 0 => return None,
                None => at = self.scopes[at].parent,
            }
        }
    }

    /// The register of a name, innermost scope first.
    pub fn find_register(&self, name: &str) -> Option<Value> {
        match self.lookup(name)? {
            Name::Register(register) => Some(register),
            _ => None,
        }
    }

    fn lookup(&self, name: &str) -> Option<Name> {
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        let mut at = self.scope;
        loop {
            let scope = &self.scopes[at];
            if let Some(&found) = scope.names.get(name) {
                return Some(found);
            }
            // The name of a register family may itself end in digits: try every split.
            for &(family, count, first) in scope.families.iter().rev() {
                let Some(rest) = name.strip_prefix(family) else {
                    continue;
                };
                let canonical = rest == "0" || !rest.starts_with('0');
                if rest.is_empty() || rest.len() > digits || !canonical {
                    continue;
                }
                if let Ok(index) = rest.parse::<u32>()
                    && index < count
                {
                    return Some(Name::Register(first + index));
                }
            }
            if at == 0 {
                break;
            }
            at = scope.parent;
        }
        let formal = self.formals.iter().position(|formal| formal.name == name)? as u32;
        Some(if self.kernel { Name::KernelParam(formal) } else { Name::Formal(formal) })
    }

    /// The predicate of a name.
    pub fn predicate(&self, name: &str, line: u32) -> Result<Value, ParseError> {
        match self.find_register(name) {
            Some(register) if self.body.bits[register as usize] == 1 => Ok(register),
            Some(_) => Err(ParseError::invalid(line, format!("{name} is not a predicate"))),
            None => Err(ParseError::invalid(line, format!("predicate {name} is not declared"))),
        }
    }

    fn push(&mut self, op: BodyOp, guard: Option<(Value, bool)>, operands: &[Value], outputs: usize, source: Source) {
        let first = self.body.pool.len() as u32;
        self.body.pool.extend_from_slice(operands);
        self.body.ins.push(Ins { op, guard, first, outputs: outputs as u8, arity: operands.len() as u8, source });
    }

    fn emit(&mut self, at: &Context, op: Op, operands: &[Value], outputs: usize) {
        self.push(BodyOp::Op(op), at.guard, operands, outputs, at.source);
    }

    fn constant(&mut self, constant: BodyConstant) -> Value {
        let next = self.body.constants.len() as u32;
        let index = *self.interned.entry(constant).or_insert(next);
        if index == next {
            self.body.constants.push(constant);
        }
        index | CONSTANT
    }

    fn bits32(&mut self, value: u32) -> Value {
        self.constant(BodyConstant::Plain(Constant::B32(value)))
    }

    /// Final check of a body: every jump has its label.
    pub fn finish(mut self, line: u32) -> Result<Body, ParseError> {
        let find_label = |scopes: &[Scope<'a>], mut at: usize, name: &str| loop {
            if let Some(&label) = scopes[at].labels.get(name) {
                return Some(label);
            }
            if at == 0 {
                return None;
            }
            at = scopes[at].parent;
        };
        let missing = |name: &str, line: u32| ParseError::invalid(line, format!("label {name} is not defined"));
        for (ins, scope, target, line) in std::mem::take(&mut self.jumps) {
            self.body.ins[ins].op = match target {
                Target::Goto(name) => {
                    BodyOp::Goto(find_label(&self.scopes, scope, name).ok_or_else(|| missing(name, line))?)
                }
                Target::Table(name) => {
                    let mut at = scope;
                    let table = loop {
                        if let Some(&table) = self.scopes[at].tables.get(name) {
                            break table;
                        }
                        if at == 0 {
                            return Err(missing(name, line));
                        }
                        at = self.scopes[at].parent;
                    };
                    BodyOp::Table(table)
                }
            };
        }
        for (scope, targets, line) in &self.table_labels {
            let labels: Result<Vec<u32>, ParseError> = targets
                .iter()
                .map(|name| find_label(&self.scopes, *scope, name).ok_or_else(|| missing(name, *line)))
                .collect();
            self.body.tables.push(labels?);
        }
        self.push(BodyOp::Return, None, &[], 0, Source { line, ..Default::default() });
        Ok(self.body)
    }

    /// The value of an operand of a type.
    fn value(&mut self, at: &Context, operand: &Operand<'a>, ty: Type) -> Result<Value, ParseError> {
        let wide = matches!(ty, Type::B64 | Type::F64);
        match operand {
            Operand::Register(register) => {
                let bits = self.body.bits[*register as usize];
                let fits = match ty {
                    Type::Pred => bits == 1,
                    Type::B8 => bits == 8 || bits == 16,
                    Type::B16 => bits == 16,
                    Type::B32 | Type::F32 => bits == 32,
                    Type::B64 | Type::F64 => bits == 64,
                };
                if !fits {
                    return at.fail(format!("a register of {bits} bits where the instruction wants {ty:?}"));
                }
                Ok(*register)
            }
            Operand::Not(predicate) if ty == Type::Pred => {
                let negated = self.new_register(1);
                self.push(BodyOp::Op(Op::Run(&moves::NOT_PRED)), None, &[negated, *predicate], 1, at.source);
                Ok(negated)
            }
            Operand::Int(value) => {
                let constant = match ty {
                    Type::Pred => Constant::Pred(*value != 0),
                    Type::B8 => Constant::B32(*value as u8 as u32),
                    Type::B16 => Constant::B32(*value as u16 as u32),
                    Type::B32 => Constant::B32(*value as u32),
                    Type::B64 => Constant::B64(*value),
                    Type::F32 | Type::F64 => {
                        return at.fail(format!("the integer {value} where the instruction wants a float"));
                    }
                };
                Ok(self.constant(BodyConstant::Plain(constant)))
            }
            Operand::F32(bits) => {
                let constant = match ty {
                    Type::F32 | Type::B32 => Constant::B32(*bits),
                    Type::F64 => Constant::B64(f64::from(f32::from_bits(*bits)).to_bits()),
                    _ => {
                        return at.fail(format!("a 0f literal where the instruction wants {ty:?}"));
                    }
                };
                Ok(self.constant(BodyConstant::Plain(constant)))
            }
            Operand::F64(bits) => {
                let constant = match ty {
                    Type::F64 | Type::B64 => Constant::B64(*bits),
                    Type::F32 => Constant::B32((f64::from_bits(*bits) as f32).to_bits()),
                    _ => {
                        return at.fail(format!("a 64-bit float literal where the instruction wants {ty:?}"));
                    }
                };
                Ok(self.constant(BodyConstant::Plain(constant)))
            }
            Operand::Special(special) => {
                if !matches!(ty, Type::B32 | Type::B64 | Type::B16) {
                    return at.fail(format!("a special register where the instruction wants {ty:?}"));
                }
                let bits = if wide { 64 } else { 32 };
                let register = self.new_register(bits);
                let op = Op::Special { register: *special, bits: if ty == Type::B16 { 16 } else { bits } };
                self.push(BodyOp::Op(op), None, &[register], 1, at.source);
                Ok(register)
            }
            Operand::Symbol(symbol) if matches!(ty, Type::B32 | Type::B64) => {
                if let (None, Some(&ModuleName::Function(index))) =
                    (self.lookup(symbol.name), at.names.get(symbol.name))
                {
                    return self.function_address(at, *symbol, index, wide);
                }
                self.symbol(at, *symbol, wide).map(|(value, _)| value)
            }
            Operand::Sink => Ok(self.new_register(match ty.kind() {
                Kind::Pred => 1,
                Kind::B32 => 32,
                Kind::B64 => 64,
                Kind::B128 => 128,
            })),
            _ => at.fail(format!("an operand that does not fit {ty:?}")),
        }
    }

    /// The address of a variable as a constant, and its space.
    fn symbol(&mut self, at: &Context, symbol: SymbolRef<'a>, wide: bool) -> Result<(Value, Space), ParseError> {
        let SymbolRef { name, offset } = symbol;
        let (constant, space) = match self.lookup(name) {
            Some(Name::Local(base)) => (BodyConstant::Frame(base.wrapping_add(offset as u64), wide), Space::Local),
            Some(Name::Formal(index)) => (BodyConstant::Formal(index, offset, wide), Space::Local),
            Some(Name::KernelParam(index)) => {
                let base = u64::from(self.formals[index as usize].offset);
                (BodyConstant::Plain(Constant::Param(base.wrapping_add(offset as u64), wide)), Space::Param)
            }
            Some(Name::Shared(index)) => (self.shared_constant(index, offset, wide), Space::Shared),
            Some(Name::Register(_)) => return at.fail(format!("{name} is a register")),
            None => match at.names.get(name) {
                Some(&ModuleName::Global(index)) if wide => {
                    (BodyConstant::Plain(Constant::Global(index, offset)), Space::Global)
                }
                Some(&ModuleName::Global(_)) => {
                    return at.fail(format!("the address of {name} needs 64 bits"));
                }
                Some(&ModuleName::Shared(index)) => (self.shared_constant(index, offset, wide), Space::Shared),
                Some(&ModuleName::Function(_)) => return at.fail(format!("{name} is a function, not a variable")),
                Some(&ModuleName::Kernel) => {
                    return at.fail(format!("{name} is a kernel, whose address device code cannot use"));
                }
                None => return at.fail(format!("{name} is not defined")),
            },
        };
        Ok((self.constant(constant), space))
    }

    fn function_address(
        &mut self,
        at: &Context,
        symbol: SymbolRef<'a>,
        index: usize,
        wide: bool,
    ) -> Result<Value, ParseError> {
        let SymbolRef { name, offset } = symbol;
        match (wide, offset) {
            (false, _) => at.fail(format!("the address of function {name} needs 64 bits")),
            (true, 0) => Ok(self.constant(BodyConstant::Plain(Constant::Function(index as u32)))),
            (true, _) => at.fail(format!("an address {offset} bytes inside function {name}, where nothing begins")),
        }
    }

    fn shared_constant(&mut self, index: u32, offset: i64, wide: bool) -> BodyConstant {
        if !self.body.shared.contains(&index) {
            self.body.shared.push(index);
        }
        BodyConstant::Plain(Constant::Shared(index, offset, wide))
    }

    /// A memory operand: base, whether it has 64 bits, offset, and the space where it names a variable.
    fn address(
        &mut self,
        at: &Context,
        operand: &Operand<'a>,
    ) -> Result<(Value, bool, i64, Option<Space>), ParseError> {
        let Operand::Address(base, offset) = operand else {
            return at.fail("expected an address in brackets");
        };
        match &**base {
            Operand::Register(register) => match self.body.bits[*register as usize] {
                32 => Ok((*register, false, *offset, None)),
                64 => Ok((*register, true, *offset, None)),
                bits => at.fail(format!("an address of {bits} bits")),
            },
            Operand::Int(value) => {
                let base = self.constant(BodyConstant::Plain(Constant::B64(*value)));
                Ok((base, true, *offset, None))
            }
            Operand::Symbol(symbol) => {
                let (base, space) =
                    self.symbol(at, SymbolRef { offset: symbol.offset.wrapping_add(*offset), ..*symbol }, true)?;
                Ok((base, true, 0, Some(space)))
            }
            _ => at.fail("an address is a register or a variable, plus a number"),
        }
    }

    /// The space a load or store names, settled with what its address is.
    fn space(&self, at: &Context, named: Option<Space>) -> Result<Space, ParseError> {
        let mut space = Space::Generic;
        for part in &at.parts[1..] {
            space = match *part {
                "global" | "const" => Space::Global,
                "shared" | "shared::cta" => Space::Shared,
                "local" => Space::Local,
                "param" | "param::entry" | "param::func" => match named {
                    Some(named) => named,
                    None if self.kernel => Space::Param,
                    None => Space::Local,
                },
                _ => continue,
            };
        }
        match (space, named) {
            (Space::Generic, Some(named)) => Ok(named),
            (space, Some(named)) if space != named => {
                at.fail(format!("the variable is in {named:?} memory, the instruction says {space:?}"))
            }
            _ => Ok(space),
        }
    }

    /// Decodes one instruction.
    pub fn instruction(
        &mut self,
        opcode: &'a str,
        guard: Option<(Value, bool)>,
        operands: Vec<Operand<'a>>,
        source: Source,
        names: &HashMap<String, ModuleName>,
        functions: &[Function],
    ) -> Result<(), ParseError> {
        let at = Context { opcode, parts: opcode.split('.').collect(), guard, source, names, functions };
        let parts = &at.parts;
        let count = |n: usize| match operands.len() == n {
            true => Ok(()),
            false => at.fail(format!("expected {n} operands, found {}", operands.len())),
        };
        match parts[0] {
            "mov" => {
                count(2)?;
                self.mov(&at, &operands[0], &operands[1])
            }
            "ld" | "ldu" => {
                count_with_policy(&at, &operands, 2)?;
                self.load(&at, &operands)
            }
            "st" => {
                count_with_policy(&at, &operands, 2)?;
                self.store(&at, &operands)
            }
            "atom" | "red" => self.atom(&at, &operands),
            "cvta" => {
                count(2)?;
                self.cvta(&at, &operands)
            }
            "isspacep" => {
                count(2)?;
                let space = match parts.get(1) {
                    Some(&"global") | Some(&"const") => Space::Global,
                    Some(&"shared") | Some(&"shared::cta") => Space::Shared,
                    Some(&"local") => Space::Local,
                    Some(&"param") => Space::Param,
                    _ => return at.unsupported(),
                };
                let d = self.value(&at, &operands[0], Type::Pred)?;
                let a = self.value(&at, &operands[1], Type::B64)?;
                self.emit(&at, Op::IsSpace(space), &[d, a], 1);
                Ok(())
            }
            "bra" => {
                if parts[1..].iter().any(|part| *part != "uni") {
                    return at.unsupported();
                }
                count(1)?;
                let Operand::Symbol(SymbolRef { name, offset: 0 }) = operands[0] else {
                    return at.fail("the target is no label");
                };
                self.jumps.push((self.body.ins.len(), self.scope, Target::Goto(name), source.line));
                self.push(BodyOp::Goto(0), guard, &[], 0, source);
                Ok(())
            }
            "brx" => {
                if parts.get(1) != Some(&"idx") {
                    return at.unsupported();
                }
                count(2)?;
                let index = self.value(&at, &operands[0], Type::B32)?;
                let Operand::Symbol(SymbolRef { name, .. }) = operands[1] else {
                    return at.fail("the targets are no .branchtargets label");
                };
                self.jumps.push((self.body.ins.len(), self.scope, Target::Table(name), source.line));
                self.push(BodyOp::Table(0), guard, &[index], 0, source);
                Ok(())
            }
            "call" => self.call(&at, operands),
            "ret" if parts[1..].iter().all(|part| *part == "uni") => {
                count(0)?;
                self.push(BodyOp::Return, guard, &[], 0, source);
                Ok(())
            }
            "exit" if parts.len() == 1 => {
                count(0)?;
                self.emit(&at, Op::Exit { fall: 0 }, &[], 0);
                Ok(())
            }
            "trap" if parts.len() == 1 => {
                count(0)?;
                self.emit(&at, Op::Trap, &[], 0);
                Ok(())
            }
            "bar" | "barrier" => self.barrier(&at, &operands),
            "membar" => {
                count(0)?;
                match parts.get(1) {
                    Some(&"cta") => self.emit(&at, Op::Fence(false), &[], 0),
                    Some(&"gl" | &"sys") => self.emit(&at, Op::Fence(true), &[], 0),
                    _ => return at.unsupported(),
                }
                Ok(())
            }
            "fence" => {
                let known = ["acq_rel", "sc", "acquire", "release", "cta", "gpu", "sys", "cluster"];
                if parts[1..].iter().any(|part| !known.contains(part)) {
                    return at.unsupported();
                }
                count(0)?;
                self.emit(&at, Op::Fence(at.has("gpu") || at.has("sys")), &[], 0);
                Ok(())
            }
            "shfl" => self.shuffle(&at, &operands),
            "vote" => self.vote(&at, &operands),
            "match" => self.match_lanes(&at, &operands),
            "redux" => self.redux(&at, &operands),
            "activemask" => {
                count(1)?;
                let d = self.value(&at, &operands[0], Type::B32)?;
                self.emit(&at, Op::ActiveMask, &[d], 1);
                Ok(())
            }
            "cp" if parts.get(2) == Some(&"mbarrier") => self.mbarrier(&at, &operands),
            "cp" => self.cp_async(&at, &operands),
            "mbarrier" => self.mbarrier(&at, &operands),
            "ldmatrix" => self.ldmatrix(&at, &operands),
            "movmatrix" => {
                if qualifiers(&parts[1..], &["sync", "aligned", "m8n8", "trans", "b16"])
                    .is_none_or(|rest| !rest.is_empty())
                {
                    return at.unsupported();
                }
                count(2)?;
                let d = self.value(&at, &operands[0], Type::B32)?;
                let a = self.value(&at, &operands[1], Type::B32)?;
                self.emit(&at, Op::MovMatrix, &[d, a], 1);
                Ok(())
            }
            "wmma" if parts.get(1) == Some(&"load") => self.wmma_load(&at, &operands),
            "wmma" if parts.get(1) == Some(&"store") => self.wmma_store(&at, &operands),
            "createpolicy" => {
                let Some(first) = operands.first() else {
                    return at.fail("expected a destination");
                };
                let d = self.value(&at, first, Type::B64)?;
                let zero = self.constant(BodyConstant::Plain(Constant::B64(0)));
                self.emit(&at, Op::Run(&moves::COPY64), &[d, zero], 1);
                Ok(())
            }
            "prefetch" | "prefetchu" | "discard" | "applypriority" | "nanosleep" | "pmevent" => {
                self.emit(&at, Op::Nop, &[], 0);
                Ok(())
            }
            _ => self.arithmetic(&at, &operands),
        }
    }

    fn arithmetic(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let Some((destination, sources)) = operands.split_first() else {
            return at.unsupported();
        };
        let mut outputs: Vec<&Operand> = vec![];
        match destination {
            Operand::Pair(first, second) => outputs.extend([&**first, &**second]),
            Operand::Vector(list) => outputs.extend(list),
            other => outputs.push(other),
        }
        let mut inputs: Vec<&Operand> = vec![];
        for source in sources {
            match source {
                Operand::Vector(list) => inputs.extend(list),
                other => inputs.push(other),
            }
        }
        let Some(form) = num::form(at.opcode, outputs.len(), inputs.len()) else {
            return at.unsupported();
        };
        if form.dst.len() != outputs.len() || form.src.len() != inputs.len() {
            let message = format!(
                "expected {} destinations and {} sources, found {} and {}",
                form.dst.len(),
                form.src.len(),
                outputs.len(),
                inputs.len()
            );
            return at.fail(message);
        }
        let mut values = Vec::with_capacity(16);
        for (operand, &ty) in outputs.iter().zip(form.dst) {
            if !matches!(operand, Operand::Register(_) | Operand::Sink) {
                return at.fail("the destination is no register");
            }
            values.push(match (operand, at.parts[0]) {
                (Operand::Register(register), "cvt") => self.cvt_register(at, *register, ty)?,
                _ => self.value(at, operand, ty)?,
            });
        }
        if form.carry_out {
            values.push(self.carry());
        }
        let outputs_in_all = values.len();
        for (operand, &ty) in inputs.iter().zip(form.src) {
            values.push(match (operand, at.parts[0]) {
                (Operand::Register(register), "cvt") => self.cvt_source(at, *register, ty)?,
                _ => self.value(at, operand, ty)?,
            });
        }
        if form.carry_in {
            values.push(self.carry());
        }
        let op = if form.class == num::Class::Mma { Op::Mma(form, 0) } else { Op::Run(form) };
        self.emit(at, op, &values, outputs_in_all);
        if let (Operand::Register(register), "cvt") = (outputs[0], at.parts[0]) {
            self.cvt_widen(at, *register, values[0])?;
        }
        Ok(())
    }

    fn carry(&mut self) -> Value {
        if self.carry.is_none() {
            self.carry = Some(self.new_register(1));
        }
        self.carry.unwrap_or(0)
    }

    /// cvt may write a register wider than its type: it then writes a temporary, extended by [`Builder::cvt_widen`].
    fn cvt_register(&mut self, at: &Context, register: Value, ty: Type) -> Result<Value, ParseError> {
        let bits = self.body.bits[register as usize];
        match (ty, bits) {
            (Type::B8, 8 | 16) | (Type::B16, 16) | (Type::B32 | Type::F32, 32) | (Type::B64 | Type::F64, 64) => {
                Ok(register)
            }
            (Type::B8 | Type::B16, 32 | 64) => Ok(self.new_register(16)),
            (Type::B32, 64) => Ok(self.new_register(32)),
            _ => at.fail(format!("a register of {bits} bits for a result of type {ty:?}")),
        }
    }

    fn cvt_widen(&mut self, at: &Context, register: Value, result: Value) -> Result<(), ParseError> {
        if register == result {
            return Ok(());
        }
        let signed = at.parts.iter().rev().nth(1).is_some_and(|to| to.starts_with('s'));
        let form = match (self.body.bits[result as usize], self.body.bits[register as usize], signed) {
            (16, 32, true) => &moves::EXTEND_16_32,
            (16, 64, true) => &moves::EXTEND_16_64,
            (32, 64, true) => &moves::EXTEND_32_64,
            (_, 32, _) => &moves::COPY32,
            _ => &moves::ZERO_EXTEND_64,
        };
        self.emit(at, Op::Run(form), &[register, result], 1);
        Ok(())
    }

    /// cvt may read a register wider than its type: it reads the low bits.
    fn cvt_source(&mut self, at: &Context, register: Value, ty: Type) -> Result<Value, ParseError> {
        let bits = self.body.bits[register as usize];
        let wanted = match ty {
            Type::Pred => 1,
            Type::B8 => 8,
            Type::B16 => 16,
            Type::B32 | Type::F32 => 32,
            Type::B64 | Type::F64 => 64,
        };
        if bits < wanted || (bits == 1) != (wanted == 1) {
            return at.fail(format!("a register of {bits} bits for a source of type {ty:?}"));
        }
        let narrow = match (bits, wanted) {
            (64, 8 | 16 | 32) => &moves::LOW_32,
            _ => return self.narrow(at, register, bits, wanted),
        };
        let low = self.new_register(32);
        self.push(BodyOp::Op(Op::Run(narrow)), None, &[low, register], 1, at.source);
        self.narrow(at, low, 32, wanted)
    }

    /// The low `wanted` bits of a register of at most 32, in a register whose high bits are zero.
    fn narrow(&mut self, at: &Context, register: Value, bits: u8, wanted: u8) -> Result<Value, ParseError> {
        if bits == wanted || wanted >= 32 {
            return Ok(register);
        }
        let low = self.new_register(16);
        let form = if wanted == 8 { &moves::LOW_8 } else { &moves::LOW_16 };
        self.push(BodyOp::Op(Op::Run(form)), None, &[low, register], 1, at.source);
        Ok(low)
    }

    fn mov(&mut self, at: &Context, to: &Operand<'a>, from: &Operand<'a>) -> Result<(), ParseError> {
        let &[_, ty] = at.parts.as_slice() else {
            return at.unsupported();
        };
        let ty = match ty {
            "pred" => Type::Pred,
            "b16" | "u16" | "s16" => Type::B16,
            "b32" | "u32" | "s32" => Type::B32,
            "b64" | "u64" | "s64" => Type::B64,
            "f32" => Type::F32,
            "f64" => Type::F64,
            _ => return at.unsupported(),
        };
        match (to, from) {
            (Operand::Vector(list), from) => {
                let whole = self.value(at, from, ty)?;
                let Some((form, part)) = moves::unpack(ty, list.len()) else {
                    return at.fail(format!("{} parts", list.len()));
                };
                let mut values = vec![];
                for operand in list {
                    if !matches!(operand, Operand::Register(_) | Operand::Sink) {
                        return at.fail("the destination is no register");
                    }
                    values.push(self.value(at, operand, part)?);
                }
                let outputs = values.len();
                values.push(whole);
                self.emit(at, Op::Run(form), &values, outputs);
            }
            (Operand::Register(_) | Operand::Sink, Operand::Vector(list)) => {
                let mut values = vec![self.value(at, to, ty)?];
                let Some((form, part)) = moves::pack(ty, list.len()) else {
                    return at.fail(format!("{} parts", list.len()));
                };
                for operand in list {
                    values.push(self.value(at, operand, part)?);
                }
                self.emit(at, Op::Run(form), &values, 1);
            }
            (Operand::Register(_) | Operand::Sink, Operand::Special(special)) => {
                let d = self.value(at, to, ty)?;
                if matches!(ty, Type::Pred | Type::F32 | Type::F64) {
                    return at.fail("a special register is an integer");
                }
                let bits = match ty {
                    Type::B16 => 16,
                    Type::B32 => 32,
                    _ => 64,
                };
                self.emit(at, Op::Special { register: *special, bits }, &[d], 1);
            }
            (Operand::Register(_) | Operand::Sink, _) => {
                let d = self.value(at, to, ty)?;
                let a = self.value(at, from, ty)?;
                let form = match ty.kind() {
                    Kind::Pred => &moves::COPY_PRED,
                    Kind::B32 => &moves::COPY32,
                    _ => &moves::COPY64,
                };
                self.emit(at, Op::Run(form), &[d, a], 1);
            }
            _ => return at.fail("the destination is no register"),
        }
        Ok(())
    }

    /// The element type, vector length and flags of a load or store.
    fn access(&mut self, at: &Context, base: &Operand<'a>) -> Result<(Access, Value), ParseError> {
        let (base, wide_base, offset, named) = self.address(at, base)?;
        let space = self.space(at, named)?;
        let Some((bits, signed)) = at.parts.last().and_then(|name| element(name)) else {
            return at.unsupported();
        };
        let mut elements = 1;
        let (mut strong, mut past_l1) = (false, false);
        let last = at.parts.len() - 1;
        for (i, part) in at.parts[1..last].iter().enumerate() {
            match *part {
                "v2" => elements = 2,
                "v4" => elements = 4,
                "volatile" | "relaxed" | "acquire" | "release" | "mmio" => strong = true,
                "weak" | "cta" | "gpu" | "sys" | "cluster" => {}
                "global" | "const" | "shared" | "shared::cta" | "local" | "param" | "param::entry" | "param::func" => {}
                "cg" | "cv" => past_l1 = true,
                "ca" | "cs" | "lu" | "wb" | "wt" | "nc" => {}
                hint if hint.starts_with("L1::") || hint.starts_with("L2::") => {}
                "noftz" => {}
                _ if i + 2 == last => return at.unsupported(),
                _ => return at.unsupported(),
            }
        }
        if space == Space::Generic && !wide_base {
            return at.fail("a generic address needs 64 bits");
        }
        if space == Space::Global && !wide_base {
            return at.fail("a global address needs 64 bits");
        }
        if u32::from(bits) * elements > 128 {
            return at.unsupported();
        }
        let access = Access {
            space,
            bytes: bits / 8,
            elements: elements as u8,
            wide_base,
            signed,
            float: matches!(at.parts.last(), Some(&("f32" | "f64"))),
            register_bits: 0,
            strong,
            past_l1,
            offset,
        };
        Ok((access, base))
    }

    /// Registers of a load's destination or a store's source: all of one width, at least the element's.
    fn elements(
        &mut self,
        at: &Context,
        operand: &Operand<'a>,
        access: &mut Access,
        store: bool,
    ) -> Result<Vec<Value>, ParseError> {
        let single = std::slice::from_ref(operand);
        let list = match operand {
            Operand::Vector(list) => list.as_slice(),
            _ => single,
        };
        if list.len() != access.elements as usize {
            return at.fail(format!("expected {} elements, found {}", access.elements, list.len()));
        }
        let float = at.parts.last().is_some_and(|ty| matches!(*ty, "f32" | "f64"));
        let width = access.bytes * 8;
        let mut bits = None;
        for operand in list {
            if let Operand::Register(register) = operand {
                let found = self.body.bits[*register as usize];
                if found < width || found == 1 || found == 128 || bits.is_some_and(|bits| bits != found) {
                    return at.fail(format!("a register of {found} bits for an element of {width}"));
                }
                bits = Some(found);
            } else if !store && !matches!(operand, Operand::Sink) {
                return at.fail("the destination is no register");
            }
        }
        let bits = bits.unwrap_or(width.max(16));
        access.register_bits = bits;
        let ty = match (bits, float) {
            (64, true) => Type::F64,
            (64, false) => Type::B64,
            (32, true) => Type::F32,
            (32, false) => Type::B32,
            (16, _) => Type::B16,
            _ => Type::B8,
        };
        let mut values = Vec::with_capacity(4);
        for operand in list {
            values.push(self.value(at, operand, ty)?);
        }
        Ok(values)
    }

    fn load(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let (mut access, base) = self.access(at, &operands[1])?;
        let mut values = self.elements(at, &operands[0], &mut access, false)?;
        let outputs = values.len();
        values.push(base);
        self.emit(at, Op::Load(access), &values, outputs);
        self.ordering(at, &["acquire"]);
        Ok(())
    }

    fn store(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let (mut access, base) = self.access(at, &operands[0])?;
        if access.space == Space::Param || at.has("const") || at.has("nc") {
            return at.fail("this memory cannot be written");
        }
        let mut values = vec![base];
        values.extend(self.elements(at, &operands[1], &mut access, true)?);
        self.ordering(at, &["release"]);
        self.emit(at, Op::Store(access), &values, 0);
        Ok(())
    }

    /// Emits a fence if the instruction's semantics include one.
    fn ordering(&mut self, at: &Context, semantics: &[&str]) {
        if semantics.iter().any(|part| at.has(part)) {
            self.emit(at, Op::Fence(!at.has("cta")), &[], 0);
        }
    }

    fn atom(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let reduce = at.parts[0] == "red";
        let mut rmw = None;
        let ty = at.parts[at.parts.len() - 1];
        let Some((bits, signed)) = element(ty) else {
            return at.unsupported();
        };
        for part in &at.parts[1..at.parts.len() - 1] {
            let integer = matches!(ty, "u32" | "s32" | "u64" | "s64");
            let untyped = matches!(ty, "b32" | "b64");
            rmw = Some(match *part {
                "relaxed" | "acquire" | "release" | "acq_rel" | "cta" | "gpu" | "sys" | "cluster" => continue,
                "global" | "shared" | "shared::cta" | "noftz" => continue,
                hint if hint.starts_with("L2::") => continue,
                "add" if ty == "f16" => Rmw::AddF16,
                "add" if ty == "bf16" => Rmw::AddBf16,
                "add" if ty == "f16x2" => Rmw::AddF16x2,
                "add" if ty == "bf16x2" => Rmw::AddBf16x2,
                "add" if ty == "f32" => Rmw::AddF32,
                "add" if ty == "f64" => Rmw::AddF64,
                "add" if integer => Rmw::AddInt,
                "min" if integer && signed => Rmw::MinS,
                "min" if integer => Rmw::MinU,
                "max" if integer && signed => Rmw::MaxS,
                "max" if integer => Rmw::MaxU,
                "and" if untyped => Rmw::And,
                "or" if untyped => Rmw::Or,
                "xor" if untyped => Rmw::Xor,
                "exch" if untyped && !reduce => Rmw::Exch,
                "cas" if (untyped || ty == "b16") && !reduce => Rmw::Cas,
                "inc" if ty == "u32" => Rmw::Inc,
                "dec" if ty == "u32" => Rmw::Dec,
                _ => return at.unsupported(),
            });
        }
        let Some(rmw) = rmw else {
            return at.unsupported();
        };
        let skip = usize::from(!reduce);
        let wanted = skip + 2 + usize::from(rmw == Rmw::Cas);
        count_with_policy(at, operands, wanted)?;
        let (base, wide_base, offset, named) = self.address(at, &operands[skip])?;
        let space = self.space(at, named)?;
        if !wide_base && space != Space::Shared || matches!(space, Space::Local | Space::Param) {
            return at.fail("the address is not one of global, shared or generic memory");
        }
        let access = Access {
            space,
            bytes: bits / 8,
            elements: 1,
            wide_base,
            signed: false,
            float: false,
            register_bits: bits,
            strong: true,
            past_l1: false,
            offset,
        };
        let ty = match ty {
            "f32" => Type::F32,
            "f64" => Type::F64,
            _ if bits == 64 => Type::B64,
            _ if bits == 16 => Type::B16,
            _ => Type::B32,
        };
        let mut values = vec![];
        if !reduce {
            if !matches!(operands[0], Operand::Register(_) | Operand::Sink) {
                return at.fail("the destination is no register");
            }
            values.push(self.value(at, &operands[0], ty)?);
        }
        values.push(base);
        for operand in &operands[skip + 1..wanted] {
            values.push(self.value(at, operand, ty)?);
        }
        self.ordering(at, &["release", "acq_rel"]);
        self.emit(at, Op::Atom { rmw, reduce, access }, &values, skip);
        self.ordering(at, &["acquire", "acq_rel"]);
        Ok(())
    }

    fn cvta(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let (to, space, ty) = match at.parts[1..] {
            ["to", space, ty] => (true, space, ty),
            [space, ty] => (false, space, ty),
            _ => return at.unsupported(),
        };
        let window = match space {
            "global" | "const" => 0,
            "shared" | "shared::cta" => SHARED_WINDOW,
            "local" => LOCAL_WINDOW,
            "param" | "param::entry" => PARAM_WINDOW,
            _ => return at.unsupported(),
        };
        if ty != "u64" {
            return at.unsupported();
        }
        let d = self.value(at, &operands[0], Type::B64)?;
        let a = self.value(at, &operands[1], Type::B64)?;
        if window == 0 {
            self.emit(at, Op::Run(&moves::COPY64), &[d, a], 1);
        } else if to && window == SHARED_WINDOW {
            let window = self.constant(BodyConstant::Plain(Constant::B64(window)));
            self.emit(at, Op::Run(&moves::TO_WINDOW), &[d, a, window], 1);
        } else {
            let window = if to { window.wrapping_neg() } else { window };
            let window = self.constant(BodyConstant::Plain(Constant::B64(window)));
            self.emit(at, Op::Run(&moves::ADD64), &[d, a, window], 1);
        }
        Ok(())
    }

    fn call(&mut self, at: &Context, operands: Vec<Operand<'a>>) -> Result<(), ParseError> {
        if at.parts[1..].iter().any(|part| *part != "uni") {
            return at.unsupported();
        }
        use Operand::{Register, Symbol, Vector};
        let (returned, callee, given, prototype): (&[Operand], &Operand, &[Operand], _) = match operands.as_slice() {
            [Vector(returned), callee, Vector(given)] => (returned, callee, given, None),
            [Vector(returned), callee, Vector(given), Symbol(prototype)] => {
                (returned, callee, given, Some(prototype.name))
            }
            [callee, Vector(given), Symbol(prototype)] => (&[], callee, given, Some(prototype.name)),
            [Vector(returned), callee @ Register(_), Symbol(prototype)] => {
                (returned, callee, &[], Some(prototype.name))
            }
            [callee @ Register(_), Symbol(prototype)] => (&[], callee, &[], Some(prototype.name)),
            [Vector(returned), callee] => (returned, callee, &[], None),
            [callee, Vector(given)] => (&[], callee, given, None),
            [callee] => (&[], callee, &[], None),
            _ => return at.fail("expected results, a function, parameters, and for a call by address a prototype"),
        };
        // What is called, its name, and how many results and parameters it has.
        let (op, name, returns, takes) = match (callee, prototype) {
            (Symbol(SymbolRef { name, .. }), None) => match at.names.get(*name) {
                Some(&ModuleName::Function(index)) => {
                    let function = &at.functions[index];
                    let takes = function.formals.len() - function.returns;
                    (BodyOp::Call(index as u32), *name, function.returns, takes)
                }
                Some(&ModuleName::Kernel) => {
                    return at.fail(format!("{name} is a kernel, which can be launched, but not called"));
                }
                _ => return at.fail(format!("function {name} is not defined")),
            },
            (Symbol(SymbolRef { name, .. }), Some(prototype)) => {
                return at.fail(format!("{name} is called by its name, so prototype {prototype} has no meaning"));
            }
            (Register(_), Some(prototype)) => {
                let Some(index) = self.find_prototype(prototype) else {
                    return at.fail(format!("no .callprototype or .calltargets {prototype} stands above the call"));
                };
                let signature = &self.body.prototypes[index as usize].signature;
                (BodyOp::CallAddress(index), prototype, signature.returns.len(), signature.takes.len())
            }
            _ => return at.fail("a call by address needs a register with it and a .callprototype or .calltargets"),
        };
        if (returns, takes) != (returned.len(), given.len()) {
            let message = format!(
                "{name} has {returns} results and {takes} parameters, the call {} and {}",
                returned.len(),
                given.len()
            );
            return at.fail(message);
        }
        let mut values = vec![];
        for operand in returned.iter().chain(given) {
            let Operand::Symbol(symbol) = operand else {
                return at.fail("parameters of a call are .param variables");
            };
            match self.symbol(at, *symbol, true)? {
                (value, Space::Local) => values.push(value),
                _ => {
                    return at.fail(format!("{} is no .param variable of this function", symbol.name));
                }
            }
        }
        if matches!(op, BodyOp::CallAddress(_)) {
            values.push(self.value(at, callee, Type::B64)?);
        }
        if values.len() > 255 {
            return at.fail("more than 254 parameters");
        }
        self.push(op, at.guard, &values, 0, at.source);
        Ok(())
    }

    fn barrier(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let mut parts: Vec<&str> = at.parts[1..].iter().copied().filter(|part| *part != "cta").collect();
        if parts.first() == Some(&"warp") {
            if parts != ["warp", "sync"] || operands.len() != 1 {
                return at.unsupported();
            }
            let mask = self.value(at, &operands[0], Type::B32)?;
            self.emit(at, Op::WarpSync, &[mask], 0);
            return Ok(());
        }
        let aligned = at.parts[0] == "bar" || parts.contains(&"aligned");
        parts.retain(|part| *part != "aligned");
        let (mode, result) = match parts.as_slice() {
            ["sync"] => (Barrier::Sync, None),
            ["arrive"] => (Barrier::Arrive, None),
            ["red", "popc", "u32"] => (Barrier::Popc, Some(Type::B32)),
            ["red", "and", "pred"] => (Barrier::And, Some(Type::Pred)),
            ["red", "or", "pred"] => (Barrier::Or, Some(Type::Pred)),
            _ => return at.unsupported(),
        };
        let mut values = vec![];
        let mut rest = operands;
        let mut predicate = None;
        if let Some(ty) = result {
            let ([destination, inner @ ..], Some(last)) = (operands, operands.last()) else {
                return at.fail("expected a destination");
            };
            if inner.len() < 2 || !matches!(destination, Operand::Register(_)) {
                return at.fail("expected a destination, a barrier and a predicate");
            }
            values.push(self.value(at, destination, ty)?);
            predicate = Some(last);
            rest = &inner[..inner.len() - 1];
        }
        let (barrier, threads) = match rest {
            [barrier] => (barrier, None),
            [barrier, threads] => (barrier, Some(threads)),
            _ => return at.fail("expected a barrier and perhaps a number of threads"),
        };
        if mode == Barrier::Arrive && threads.is_none() {
            return at.fail("expected a number of threads");
        }
        values.push(self.value(at, barrier, Type::B32)?);
        values.push(match threads {
            Some(threads) => self.value(at, threads, Type::B32)?,
            None => self.bits32(0),
        });
        let mut negate = false;
        if let Some(predicate) = predicate {
            negate = matches!(predicate, Operand::Not(_));
            values.push(match predicate {
                Operand::Not(register) => *register,
                other => self.value(at, other, Type::Pred)?,
            });
        }
        let counted = threads.is_some();
        self.emit(at, Op::Barrier { mode, aligned, counted, negate }, &values, usize::from(result.is_some()));
        Ok(())
    }

    fn shuffle(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let mode = match qualifiers(&at.parts[1..], &["sync", "b32"]).as_deref() {
            Some(["up"]) => Shuffle::Up,
            Some(["down"]) => Shuffle::Down,
            Some(["bfly"]) => Shuffle::Bfly,
            Some(["idx"]) => Shuffle::Idx,
            _ => return at.unsupported(),
        };
        let [destination, sources @ ..] = operands else {
            return at.fail("expected 5 operands");
        };
        if sources.len() != 4 {
            return at.fail("expected 5 operands");
        }
        let mut values = self.pair(at, destination, Type::B32)?;
        let outputs = values.len();
        for operand in sources {
            values.push(self.value(at, operand, Type::B32)?);
        }
        self.emit(at, Op::Shuffle { mode, with_predicate: outputs == 2 }, &values, outputs);
        Ok(())
    }

    /// `d` or `d|p`.
    fn pair(&mut self, at: &Context, operand: &Operand<'a>, ty: Type) -> Result<Vec<Value>, ParseError> {
        let destination = |operand: &Operand| matches!(operand, Operand::Register(_) | Operand::Sink);
        match operand {
            Operand::Pair(first, second) if destination(first) && destination(second) => {
                Ok(vec![self.value(at, first, ty)?, self.value(at, second, Type::Pred)?])
            }
            other if destination(other) => Ok(vec![self.value(at, other, ty)?]),
            _ => at.fail("the destination is no register"),
        }
    }

    fn vote(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let (vote, ty) = match qualifiers(&at.parts[1..], &["sync"]).as_deref() {
            Some(["all", "pred"]) => (Vote::All, Type::Pred),
            Some(["any", "pred"]) => (Vote::Any, Type::Pred),
            Some(["pred", "uni"]) => (Vote::Uni, Type::Pred),
            Some(["b32", "ballot"]) => (Vote::Ballot, Type::B32),
            _ => return at.unsupported(),
        };
        let [destination, predicate, mask] = operands else {
            return at.fail("expected 3 operands");
        };
        let d = self.pair(at, destination, ty)?[0];
        let (p, negate) = match predicate {
            Operand::Not(register) => (*register, true),
            other => (self.value(at, other, Type::Pred)?, false),
        };
        let mask = self.value(at, mask, Type::B32)?;
        self.emit(at, Op::Vote { vote, negate }, &[d, p, mask], 1);
        Ok(())
    }

    fn match_lanes(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let (all, ty) = match qualifiers(&at.parts[1..], &["sync"]).as_deref() {
            Some(["any", "b32"]) => (false, Type::B32),
            Some(["any", "b64"]) => (false, Type::B64),
            Some(["all", "b32"]) => (true, Type::B32),
            Some(["all", "b64"]) => (true, Type::B64),
            _ => return at.unsupported(),
        };
        let [destination, value, mask] = operands else {
            return at.fail("expected 3 operands");
        };
        let mut values = self.pair(at, destination, Type::B32)?;
        let outputs = values.len();
        if outputs == 2 && !all {
            return at.fail("only match.all has a predicate");
        }
        values.push(self.value(at, value, ty)?);
        values.push(self.value(at, mask, Type::B32)?);
        self.emit(at, Op::Match { all, wide: ty == Type::B64, with_predicate: outputs == 2 }, &values, outputs);
        Ok(())
    }

    fn redux(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let redux = match qualifiers(&at.parts[1..], &["sync"]).as_deref() {
            Some(["add", "u32" | "s32"]) => Redux::Add,
            Some(["min", "u32"]) => Redux::MinU,
            Some(["min", "s32"]) => Redux::MinS,
            Some(["max", "u32"]) => Redux::MaxU,
            Some(["max", "s32"]) => Redux::MaxS,
            Some(["and", "b32"]) => Redux::And,
            Some(["b32", "or"]) => Redux::Or,
            Some(["b32", "xor"]) => Redux::Xor,
            _ => return at.unsupported(),
        };
        let [destination, value, mask] = operands else {
            return at.fail("expected 3 operands");
        };
        let d = self.pair(at, destination, Type::B32)?[0];
        let a = self.value(at, value, Type::B32)?;
        let mask = self.value(at, mask, Type::B32)?;
        self.emit(at, Op::Redux(redux), &[d, a, mask], 1);
        Ok(())
    }

    fn cp_async(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let [_, "async", rest @ ..] = at.parts.as_slice() else {
            return at.unsupported();
        };
        match rest {
            ["commit_group"] => {
                self.emit(at, Op::CpCommit, &[], 0);
                return Ok(());
            }
            ["wait_all"] => {
                self.emit(at, Op::CpWait(u32::MAX), &[], 0);
                return Ok(());
            }
            ["wait_group"] => {
                let [Operand::Int(n)] = operands else {
                    return at.fail("expected a number of groups");
                };
                self.emit(at, Op::CpWait(u32::try_from(*n).unwrap_or(u32::MAX - 1).min(u32::MAX - 1)), &[], 0);
                return Ok(());
            }
            _ => {}
        }
        let (cache, hints) = match rest {
            [cache @ ("ca" | "cg"), "shared" | "shared::cta", "global", hints @ ..] => (*cache, hints),
            _ => return at.unsupported(),
        };
        if hints.iter().any(|hint| !hint.starts_with("L2::")) {
            return at.unsupported();
        }
        let (extra, policy) = if hints.contains(&"L2::cache_hint") { (1, true) } else { (0, false) };
        let [to, from, Operand::Int(bytes), more @ ..] = operands else {
            return at.fail("expected a destination, a source and a number of bytes");
        };
        if more.len() > 1 + extra || (policy && more.is_empty()) {
            return at.fail("too many operands");
        }
        if !(matches!(bytes, 4 | 8 | 16) && (cache == "ca" || *bytes == 16)) {
            return at.fail(format!("{bytes} bytes cannot be copied"));
        }
        let more = &more[..more.len() - extra];
        let (to, wide_to, to_offset, to_space) = self.address(at, to)?;
        let (from, wide_from, from_offset, from_space) = self.address(at, from)?;
        if to_space.is_some_and(|space| space != Space::Shared)
            || from_space.is_some_and(|space| space != Space::Global)
            || !wide_from
        {
            return at.fail("copies go from global to shared memory");
        }
        let mut values = vec![to, from];
        let mut ignore = false;
        match more {
            [] => {}
            [Operand::Register(register)] if self.body.bits[*register as usize] == 1 => {
                ignore = true;
                values.push(*register);
            }
            [size] => values.push(self.value(at, size, Type::B32)?),
            _ => return at.fail("too many operands"),
        }
        self.emit(
            at,
            Op::CpAsync { bytes: *bytes as u8, to: to_offset, from: from_offset, wide_to, ignore },
            &values,
            0,
        );
        Ok(())
    }

    /// `mbarrier` and `cp.async.mbarrier.arrive` as sm_80 has them.
    fn mbarrier(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let words = match at.parts.as_slice() {
            ["cp", "async", "mbarrier", "arrive", words @ ..] => {
                let counted = words.first() == Some(&"noinc");
                return self.mbarrier_at(
                    at,
                    Mbarrier::CopyArrive { counted },
                    &words[usize::from(counted)..],
                    operands,
                );
            }
            ["mbarrier", words @ ..] => words,
            _ => return at.unsupported(),
        };
        let Some((&what, mut words)) = words.split_first() else {
            return at.unsupported();
        };
        let mut next = |names: &[&str]| match words.split_first() {
            Some((word, rest)) if names.contains(word) => {
                words = rest;
                true
            }
            _ => false,
        };
        let mode = match what {
            "init" => Mbarrier::Init,
            "inval" => Mbarrier::Inval,
            "arrive" | "arrive_drop" => {
                next(&["release"]);
                next(&["cta"]);
                Mbarrier::Arrive { drop: what == "arrive_drop", stay: next(&["noComplete"]) }
            }
            "test_wait" => {
                let parity = next(&["parity"]);
                next(&["acquire"]);
                next(&["cta"]);
                Mbarrier::TestWait { parity }
            }
            "pending_count" => Mbarrier::PendingCount,
            _ => return at.unsupported(),
        };
        self.mbarrier_at(at, mode, words, operands)
    }

    fn mbarrier_at(
        &mut self,
        at: &Context,
        mode: Mbarrier,
        words: &[&str],
        operands: &[Operand<'a>],
    ) -> Result<(), ParseError> {
        let named = match words {
            ["shared" | "shared::cta", "b64"] => Some(Space::Shared),
            ["b64"] => None,
            _ => return at.unsupported(),
        };
        let wrong = || at.fail("wrong operands");
        let mut values = vec![];
        let (address, outputs) = match (mode, operands) {
            (Mbarrier::Init, [address, count]) => {
                values.push(self.value(at, count, Type::B32)?);
                (Some(address), 0)
            }
            (Mbarrier::Inval | Mbarrier::CopyArrive { .. }, [address]) => (Some(address), 0),
            (Mbarrier::Arrive { .. }, [state, address, count @ ..]) if count.len() < 2 => {
                values.push(self.destinations(at, state, Type::B64)?[0]);
                values.push(match count {
                    [count] => self.value(at, count, Type::B32)?,
                    _ => self.value(at, &Operand::Int(1), Type::B32)?,
                });
                (Some(address), 1)
            }
            (Mbarrier::TestWait { parity }, [done, address, state]) => {
                values.push(self.destinations(at, done, Type::Pred)?[0]);
                values.push(self.value(at, state, if parity { Type::B32 } else { Type::B64 })?);
                (Some(address), 1)
            }
            (Mbarrier::PendingCount, [count, state]) => {
                values.push(self.destinations(at, count, Type::B32)?[0]);
                values.push(self.value(at, state, Type::B64)?);
                (None, 1)
            }
            _ => return wrong(),
        };
        let mut access = Access {
            space: Space::Shared,
            bytes: 8,
            elements: 1,
            wide_base: false,
            signed: false,
            float: false,
            register_bits: 64,
            strong: true,
            past_l1: false,
            offset: 0,
        };
        if let Some(address) = address {
            let (base, wide_base, offset, found) = self.address(at, address)?;
            let space = named.or(found).unwrap_or(Space::Generic);
            if !matches!(space, Space::Shared | Space::Generic) || found.is_some_and(|found| found != Space::Shared) {
                return at.fail("an mbarrier is in shared memory");
            }
            access = Access { space, wide_base, offset, ..access };
            values.insert(outputs, base);
        }
        self.emit(at, Op::Mbarrier { mode, access }, &values, outputs);
        Ok(())
    }

    fn ldmatrix(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let Some(mut rest) = qualifiers(&at.parts[1..], &["sync", "aligned", "m8n8", "b16"]) else {
            return at.unsupported();
        };
        rest.retain(|part| !matches!(*part, "shared" | "shared::cta"));
        let (number, trans) = match rest.as_slice() {
            [number] => (*number, false),
            ["trans", number] => (*number, true),
            _ => return at.unsupported(),
        };
        let matrices = match number {
            "x1" => 1,
            "x2" => 2,
            "x4" => 4,
            _ => return at.unsupported(),
        };
        let [destination, address] = operands else {
            return at.fail("expected 2 operands");
        };
        let mut values = self.destinations(at, destination, Type::B32)?;
        if values.len() != matrices {
            return at.fail(format!("expected {matrices} destinations, found {}", values.len()));
        }
        let (base, wide_base, offset, named) = self.address(at, address)?;
        let space = self.space(at, named)?;
        if !matches!(space, Space::Shared | Space::Generic) {
            return at.fail("matrices are loaded from shared memory");
        }
        values.push(base);
        let access = Access {
            space,
            bytes: 16,
            elements: matrices as u8,
            wide_base,
            signed: false,
            float: false,
            register_bits: 32,
            strong: false,
            past_l1: false,
            offset,
        };
        self.emit(at, Op::LdMatrix { trans, access }, &values, matrices);
        Ok(())
    }

    fn destinations(&mut self, at: &Context, operand: &Operand<'a>, ty: Type) -> Result<Vec<Value>, ParseError> {
        let single = std::slice::from_ref(operand);
        let list = match operand {
            Operand::Vector(list) => list.as_slice(),
            _ => single,
        };
        let mut values = vec![];
        for operand in list {
            if !matches!(operand, Operand::Register(_) | Operand::Sink) {
                return at.fail("the destination is no register");
            }
            values.push(self.value(at, operand, ty)?);
        }
        Ok(values)
    }

    /// Shape, layout and element of `wmma.load.a.sync.aligned.row.m16n16k16.shared.bf16` with the matrix's address.
    fn wmma(
        &mut self,
        at: &Context,
        address: &Operand<'a>,
    ) -> Result<(&'static num::Fragment, bool, Access, Value), ParseError> {
        let [_, _, matrix, "sync", "aligned", rest @ ..] = at.parts.as_slice() else {
            return at.unsupported();
        };
        let mut layout = "";
        let mut shape = "";
        for part in &rest[..rest.len().saturating_sub(1)] {
            match *part {
                "row" | "col" => layout = part,
                part if part.starts_with('m') => shape = part,
                "global" | "shared" | "shared::cta" => {}
                _ => return at.unsupported(),
            }
        }
        let element = rest.last().copied().unwrap_or("");
        let Some(fragment) = matrix.chars().next().and_then(|matrix| num::fragment(matrix, shape, element)) else {
            return at.unsupported();
        };
        let (base, wide_base, offset, named) = self.address(at, address)?;
        let space = self.space(at, named)?;
        if matches!(space, Space::Local | Space::Param) || (space != Space::Shared && !wide_base) {
            return at.fail("the address is not one of global, shared or generic memory");
        }
        let bits = if fragment.element_bytes == 8 { 64 } else { 32 };
        let access = Access {
            space,
            bytes: fragment.element_bytes as u8,
            elements: fragment.registers as u8,
            wide_base,
            signed: false,
            float: false,
            register_bits: bits,
            strong: false,
            past_l1: false,
            offset,
        };
        Ok((fragment, layout == "col", access, base))
    }

    /// The stride operand, or the width of a dense matrix.
    fn stride(
        &mut self,
        at: &Context,
        operand: Option<&Operand<'a>>,
        fragment: &num::Fragment,
        column: bool,
    ) -> Result<Value, ParseError> {
        if let Some(operand) = operand {
            return self.value(at, operand, Type::B32);
        }
        let mut widest = 0;
        for lane in 0..32 {
            for register in 0..fragment.registers {
                for part in 0..fragment.per_register {
                    let (row, col) = (fragment.at)(lane, register, part);
                    widest = widest.max(if column { row } else { col });
                }
            }
        }
        Ok(self.bits32(widest + 1))
    }

    fn wmma_load(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let ([destination, address] | [destination, address, _]) = operands else {
            return at.fail("expected 2 or 3 operands");
        };
        let (fragment, column, access, base) = self.wmma(at, address)?;
        let ty = if access.register_bits == 64 { Type::F64 } else { Type::B32 };
        let mut values = self.destinations(at, destination, ty)?;
        if values.len() != fragment.registers as usize {
            return at.fail(format!("expected {} destinations, found {}", fragment.registers, values.len()));
        }
        let outputs = values.len();
        values.push(base);
        values.push(self.stride(at, operands.get(2), fragment, column)?);
        self.emit(at, Op::WmmaLoad { fragment, column, access }, &values, outputs);
        Ok(())
    }

    fn wmma_store(&mut self, at: &Context, operands: &[Operand<'a>]) -> Result<(), ParseError> {
        let ([address, source] | [address, source, _]) = operands else {
            return at.fail("expected 2 or 3 operands");
        };
        let (fragment, column, access, base) = self.wmma(at, address)?;
        let ty = if access.register_bits == 64 { Type::F64 } else { Type::B32 };
        let mut values = vec![base];
        let single = std::slice::from_ref(source);
        let list = match source {
            Operand::Vector(list) => list.as_slice(),
            _ => single,
        };
        if list.len() != fragment.registers as usize {
            return at.fail(format!("expected {} values, found {}", fragment.registers, list.len()));
        }
        for operand in list {
            values.push(self.value(at, operand, ty)?);
        }
        values.push(self.stride(at, operands.get(2), fragment, column)?);
        self.emit(at, Op::WmmaStore { fragment, column, access }, &values, 0);
        Ok(())
    }
}

/// Skips a cache policy after the operands, which has no effect here.
fn count_with_policy(at: &Context, operands: &[Operand], wanted: usize) -> Result<(), ParseError> {
    let policy = usize::from(at.has("L2::cache_hint"));
    if operands.len() == wanted + policy {
        return Ok(());
    }
    at.fail(format!("expected {wanted} operands, found {}", operands.len()))
}
