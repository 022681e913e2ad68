//! The grammar: directives, declarations, functions, statements.
//!
//! A function's body is decoded as it is read ([`super::decode`]). The result is a body on virtual registers, which
//! [`super::flow`] turns into a program once all functions are known.

use super::decode::{Body, BodyConstant, Builder, Function, ModuleName, Operand, Prototype, SymbolRef, sizes};
use super::lex::{Kind, Lexer, Token};
use super::program::{Constant, Signature, Source};
use super::{Global, GlobalSpace, Limits, Param, ParseError, ParseErrorKind};
use std::collections::HashMap;

/// Largest parameter buffer of a kernel on any device, in bytes.
pub const MAX_PARAM_BYTES: u64 = 32764;
/// More registers than this in one function is refused; real kernels have at most tens of thousands.
const MAX_REGISTERS: u32 = 1 << 22;

/// A `.shared` variable.
#[derive(Clone, Debug)]
pub struct SharedVariable {
    /// Size; 0 for `extern` arrays, whose size is set at launch.
    pub bytes: u64,
    /// Alignment.
    pub align: u64,
    /// `extern .shared`: begins after all others.
    pub dynamic: bool,
}

/// A kernel as parsed.
pub struct Entry {
    /// The kernel's properties, without its program.
    pub kernel: super::Kernel,
    /// Its body.
    pub body: Body,
    /// Line of its name.
    pub line: u32,
}

/// A parsed module, before kernels become programs.
pub struct Unit {
    /// `.version`
    pub version: (u32, u32),
    /// `.target`
    pub target: u32,
    /// Variables.
    pub globals: Vec<Global>,
    /// Shared variables of the module and of all functions.
    pub shared: Vec<SharedVariable>,
    /// Device functions.
    pub functions: Vec<Function>,
    /// Those whose address is taken anywhere in the module, in ascending order.
    pub taken: Vec<u32>,
    /// Kernels.
    pub entries: Vec<Entry>,
}

/// Reader of one module.
struct Reader<'a> {
    lexer: Lexer<'a>,
    token: Token<'a>,
    limits: Limits,
    names: HashMap<String, ModuleName>,
    pending: Vec<(usize, u64, &'a str, i64, u32)>,
    unit: Unit,
}

impl ParseError {
    pub(super) fn invalid(line: u32, message: impl Into<String>) -> Self {
        ParseError { line, message: message.into(), kind: ParseErrorKind::Invalid }
    }
}

/// Reads a module.
pub fn read(text: &str, limits: Limits) -> Result<Unit, ParseError> {
    let mut lexer = Lexer::new(text);
    let token = lexer.next()?;
    let unit = Unit {
        version: (0, 0),
        target: 0,
        globals: vec![],
        shared: vec![],
        functions: vec![],
        taken: vec![],
        entries: vec![],
    };
    let mut reader = Reader { lexer, token, limits, names: HashMap::new(), pending: vec![], unit };
    reader.module()?;
    reader.relocate()?;
    reader.unit.taken = taken(&reader.unit);
    Ok(reader.unit)
}

/// See [`Unit::taken`].
fn taken(unit: &Unit) -> Vec<u32> {
    let bodies = unit.functions.iter().filter_map(|function| function.body.as_ref());
    let constants = bodies.chain(unit.entries.iter().map(|entry| &entry.body)).flat_map(|body| &body.constants);
    let mut taken: Vec<u32> = constants
        .filter_map(|constant| match constant {
            BodyConstant::Plain(Constant::Function(index)) => Some(*index),
            _ => None,
        })
        .chain(unit.globals.iter().flat_map(|global| global.functions.iter().map(|&(_, index)| index)))
        .collect();
    taken.sort_unstable();
    taken.dedup();
    taken
}

/// Bytes of a type.
pub fn type_bytes(name: &str) -> Option<u64> {
    Some(match name {
        ".b8" | ".u8" | ".s8" => 1,
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
        ".b64" | ".u64" | ".s64" | ".f64" => 8,
        ".b128" => 16,
        _ => return None,
    })
}

/// An integer literal.
pub fn integer(text: &str) -> Option<u64> {
    let digits = text.strip_suffix('U').unwrap_or(text);
    if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        u64::from_str_radix(hex, 16).ok()
    } else if let Some(binary) = digits.strip_prefix("0b").or_else(|| digits.strip_prefix("0B")) {
        u64::from_str_radix(binary, 2).ok()
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(digits, 8).ok()
    } else {
        digits.parse().ok()
    }
}

/// A number as an operand.
fn number(text: &str, negative: bool) -> Option<Operand<'static>> {
    let bits = |prefix: [&str; 2]| {
        prefix.iter().find_map(|p| text.strip_prefix(p)).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    if let Some(hex) = bits(["0f", "0F"]).filter(|hex| hex.len() == 8) {
        let value = u32::from_str_radix(hex, 16).ok()?;
        return Some(Operand::F32(value ^ if negative { 1 << 31 } else { 0 }));
    }
    if let Some(hex) = bits(["0d", "0D"]).filter(|hex| hex.len() == 16) {
        let value = u64::from_str_radix(hex, 16).ok()?;
        return Some(Operand::F64(value ^ if negative { 1 << 63 } else { 0 }));
    }
    if let Some(value) = integer(text) {
        return Some(Operand::Int(if negative { value.wrapping_neg() } else { value }));
    }
    if text.contains(['.', 'e', 'E'])
        && text.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'))
    {
        let value: f64 = text.parse().ok()?;
        return Some(Operand::F64(if negative { -value } else { value }.to_bits()));
    }
    None
}

impl<'a> Reader<'a> {
    fn fail<T>(&self, message: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError::invalid(self.token.line, message))
    }

    fn advance(&mut self) -> Result<Token<'a>, ParseError> {
        let next = self.lexer.next()?;
        Ok(std::mem::replace(&mut self.token, next))
    }

    fn accept(&mut self, mark: u8) -> Result<bool, ParseError> {
        let found = self.token.is(mark);
        if found {
            self.advance()?;
        }
        Ok(found)
    }

    fn expect(&mut self, mark: u8) -> Result<(), ParseError> {
        if self.accept(mark)? {
            return Ok(());
        }
        self.fail(format!("expected '{}', found {}", mark as char, self.found()))
    }

    fn found(&self) -> String {
        match self.token.kind {
            Kind::End => "the end of the text".into(),
            _ => format!("'{}'", self.token.text.chars().take(60).collect::<String>()),
        }
    }

    fn word(&mut self, what: &str) -> Result<&'a str, ParseError> {
        if self.token.kind != Kind::Word {
            return self.fail(format!("expected {what}, found {}", self.found()));
        }
        Ok(self.advance()?.text)
    }

    fn unsigned(&mut self) -> Result<u64, ParseError> {
        match (self.token.kind, integer(self.token.text)) {
            (Kind::Number, Some(value)) => {
                self.advance()?;
                Ok(value)
            }
            _ => self.fail(format!("expected an integer, found {}", self.found())),
        }
    }

    fn module(&mut self) -> Result<(), ParseError> {
        self.version()?;
        self.target()?;
        loop {
            let line = self.token.line;
            if self.token.kind == Kind::End {
                return Ok(());
            }
            if self.accept(b';')? {
                continue;
            }
            match self.word("a directive")? {
                ".address_size" => {
                    let bits = self.unsigned()?;
                    if bits != 64 {
                        return Err(ParseError::invalid(line, format!("addresses of {bits} bits; 64 are supported")));
                    }
                }
                ".target" => self.target_list(line)?,
                ".file" => self.skip_line(line)?,
                ".section" => self.skip_section()?,
                ".pragma" => {
                    self.advance()?;
                    self.expect(b';')?;
                }
                ".visible" | ".weak" | ".common" => self.declaration(false)?,
                ".extern" => self.declaration(true)?,
                word => self.declare(word, false, line)?,
            }
        }
    }

    fn version(&mut self) -> Result<(), ParseError> {
        let line = self.token.line;
        if self.token.text != ".version" {
            return self.fail("a module begins with .version");
        }
        self.advance()?;
        let text = self.token.text;
        let parts = text
            .split_once('.')
            .and_then(|(major, minor)| Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?)));
        let Some(version) = parts else {
            return self.fail(format!("expected a version such as 8.0, found {}", self.found()));
        };
        self.advance()?;
        if version > self.limits.version {
            let (major, minor) = self.limits.version;
            let message =
                format!("PTX version {text} is newer than {major}.{minor}, the newest that this driver takes");
            return Err(ParseError { line, message, kind: ParseErrorKind::Version });
        }
        self.unit.version = version;
        Ok(())
    }

    fn target(&mut self) -> Result<(), ParseError> {
        let line = self.token.line;
        if self.token.text != ".target" {
            return self.fail("expected .target after .version");
        }
        self.advance()?;
        self.target_list(line)
    }

    fn target_list(&mut self, line: u32) -> Result<(), ParseError> {
        loop {
            let name = self.word("a target such as sm_80")?;
            if let Some(digits) = name.strip_prefix("sm_") {
                let number = digits.trim_end_matches(['a', 'f']);
                let Ok(target) = number.parse::<u32>() else {
                    return Err(ParseError::invalid(line, format!("unknown target {name}")));
                };
                let exact = number.len() < digits.len();
                if target > self.limits.target || (exact && target != self.limits.target) {
                    let message = format!("the module is for {name}, the device is sm_{}", self.limits.target);
                    return Err(ParseError { line, message, kind: ParseErrorKind::Target });
                }
                self.unit.target = target;
            } else if name != "debug" {
                return Err(ParseError::invalid(line, format!("target option {name} is not supported")));
            }
            if !self.accept(b',')? {
                return Ok(());
            }
        }
    }

    fn skip_line(&mut self, line: u32) -> Result<(), ParseError> {
        while self.token.line == line && self.token.kind != Kind::End {
            self.advance()?;
        }
        Ok(())
    }

    fn skip_section(&mut self) -> Result<(), ParseError> {
        self.advance()?;
        self.expect(b'{')?;
        while !self.token.is(b'}') {
            if self.token.kind == Kind::End {
                return self.fail("a .section has no closing brace");
            }
            self.advance()?;
        }
        self.expect(b'}')
    }

    fn declaration(&mut self, external: bool) -> Result<(), ParseError> {
        let line = self.token.line;
        let word = self.word("a declaration")?;
        self.declare(word, external, line)
    }

    fn declare(&mut self, word: &str, external: bool, line: u32) -> Result<(), ParseError> {
        match word {
            ".global" => self.variables(Some(GlobalSpace::Global), external),
            ".const" => self.variables(Some(GlobalSpace::Const), external),
            ".shared" => self.variables(None, external),
            ".entry" => self.entry(),
            ".func" => self.function(),
            _ => Err(ParseError::invalid(line, format!("directive {word} is not supported"))),
        }
    }

    fn define(&mut self, name: &str, what: ModuleName, line: u32) -> Result<(), ParseError> {
        if self.names.insert(name.to_string(), what).is_some() {
            return Err(ParseError::invalid(line, format!("{name} is defined twice")));
        }
        Ok(())
    }

    /// `.align`, attributes, vector and element type: (alignment, bytes).
    fn variable_type(&mut self) -> Result<(u64, u64), ParseError> {
        let (mut align, mut vector) = (0, 1);
        loop {
            let line = self.token.line;
            match self.word("a type")? {
                ".align" => {
                    align = self.unsigned()?;
                    if !align.is_power_of_two() || align > 1 << 20 {
                        return Err(ParseError::invalid(line, format!("alignment {align} is not a power of two")));
                    }
                }
                ".attribute" => {
                    self.expect(b'(')?;
                    self.word("an attribute")?;
                    self.expect(b')')?;
                }
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                word => {
                    let Some(bytes) = type_bytes(word) else {
                        return Err(ParseError::invalid(line, format!("type {word} is not supported for a variable")));
                    };
                    return Ok((align.max(bytes * vector), bytes * vector));
                }
            }
        }
    }

    /// `[2][3]` after a name: elements, None for `[]`.
    fn dimensions(&mut self) -> Result<Option<u64>, ParseError> {
        let mut count = Some(1u64);
        while self.accept(b'[')? {
            if self.accept(b']')? {
                count = None;
                continue;
            }
            let n = self.unsigned()?;
            self.expect(b']')?;
            count = match count.map(|c| c.checked_mul(n).filter(|&c| c < 1 << 40)) {
                Some(Some(product)) => Some(product),
                Some(None) => return self.fail("an array larger than any device"),
                None => None,
            };
        }
        Ok(count)
    }

    fn variables(&mut self, space: Option<GlobalSpace>, external: bool) -> Result<(), ParseError> {
        let (align, bytes) = self.variable_type()?;
        loop {
            let line = self.token.line;
            let name = self.word("the name of a variable")?;
            let count = self.dimensions()?;
            match space {
                None => {
                    if count.is_none() && !external {
                        return Err(ParseError::invalid(line, format!("shared array {name} has no size")));
                    }
                    let index = self.unit.shared.len() as u32;
                    let dynamic = external && count.is_none_or(|c| c == 0);
                    self.unit.shared.push(SharedVariable { bytes: count.unwrap_or(0) * bytes, align, dynamic });
                    self.define(name, ModuleName::Shared(index), line)?;
                }
                Some(space) => {
                    if external {
                        return Err(ParseError::invalid(
                            line,
                            format!("external variable {name}: linking of modules is not supported"),
                        ));
                    }
                    let index = self.unit.globals.len();
                    let mut global = Global {
                        name: name.to_string(),
                        bytes: 0,
                        align,
                        init: vec![],
                        relocations: vec![],
                        functions: vec![],
                        space,
                    };
                    if self.accept(b'=')? {
                        self.initialiser(&mut global.init, index, bytes, 0)?;
                    }
                    let Some(count) = count
                        .or(Some(global.init.len() as u64 / bytes))
                        .filter(|_| count.is_some() || !global.init.is_empty())
                    else {
                        return Err(ParseError::invalid(
                            line,
                            format!("array {name} has neither a size nor an initialiser"),
                        ));
                    };
                    global.bytes = count * bytes;
                    if global.init.len() as u64 > global.bytes {
                        return Err(ParseError::invalid(
                            line,
                            format!("the initialiser of {name} is longer than its {} bytes", global.bytes),
                        ));
                    }
                    self.unit.globals.push(global);
                    self.define(name, ModuleName::Global(index as u32), line)?;
                }
            }
            if !self.accept(b',')? {
                return self.expect(b';');
            }
        }
    }

    fn initialiser(&mut self, init: &mut Vec<u8>, variable: usize, bytes: u64, depth: u32) -> Result<(), ParseError> {
        if depth > 8 {
            return self.fail("an initialiser nested more than eight deep");
        }
        if self.accept(b'{')? {
            while !self.accept(b'}')? {
                self.initialiser(init, variable, bytes, depth + 1)?;
                if !self.accept(b',')? && !self.token.is(b'}') {
                    return self.fail(format!("expected ',' or '}}', found {}", self.found()));
                }
            }
            return Ok(());
        }
        let line = self.token.line;
        if self.token.kind == Kind::Word {
            let mut name = self.advance()?.text;
            if name == "generic" && self.accept(b'(')? {
                name = self.word("the name of a variable")?;
                self.expect(b')')?;
            }
            let addend = self.addend()?;
            if bytes != 8 {
                return Err(ParseError::invalid(
                    line,
                    format!("the address of {name} needs 64 bits, the element has {}", bytes * 8),
                ));
            }
            self.pending.push((variable, init.len() as u64, name, addend, line));
            init.extend([0; 8]);
            return Ok(());
        }
        let negative = self.accept(b'-')?;
        let value = match (self.token.kind, number(self.token.text, negative)) {
            (Kind::Number, Some(Operand::Int(value))) => value,
            (Kind::Number, Some(Operand::F32(value))) => u64::from(value),
            (Kind::Number, Some(Operand::F64(value))) if bytes == 4 => {
                u64::from((f64::from_bits(value) as f32).to_bits())
            }
            (Kind::Number, Some(Operand::F64(value))) => value,
            _ => return self.fail(format!("expected a number, found {}", self.found())),
        };
        self.advance()?;
        init.extend(&u128::from(value).to_le_bytes()[..bytes.min(16) as usize]);
        Ok(())
    }

    /// `+8`, `-8` or `+-8` after a name or register.
    fn addend(&mut self) -> Result<i64, ParseError> {
        let negative = if self.accept(b'+')? {
            self.accept(b'-')?
        } else if self.accept(b'-')? {
            true
        } else {
            return Ok(0);
        };
        let value = self.unsigned()? as i64;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    fn relocate(&mut self) -> Result<(), ParseError> {
        for (variable, offset, name, addend, line) in std::mem::take(&mut self.pending) {
            let fail = |message: String| Err(ParseError::invalid(line, message));
            let global = &mut self.unit.globals[variable];
            match self.names.get(name) {
                Some(&ModuleName::Global(target)) => global.relocations.push((offset, target as usize, addend)),
                Some(&ModuleName::Function(target)) if addend == 0 => global.functions.push((offset, target as u32)),
                Some(&ModuleName::Function(_)) => {
                    return fail(format!("an address {addend} bytes inside function {name}, where nothing begins"));
                }
                Some(&ModuleName::Kernel) => {
                    return fail(format!("{name} is a kernel, whose address device code cannot use"));
                }
                _ => return fail(format!("{name} in an initialiser is no variable or function of this module")),
            }
        }
        Ok(())
    }

    /// A parenthesised list of `.param` (or `.reg`) declarations.
    fn formals(&mut self) -> Result<Vec<Param>, ParseError> {
        self.expect(b'(')?;
        let mut formals: Vec<Param> = vec![];
        let mut end = 0u64;
        while !self.accept(b')')? {
            if self.word("a .param declaration")? != ".param" {
                return self.fail("only .param parameters are supported");
            }
            let (align, bytes) = self.variable_type()?;
            if self.token.text == ".ptr" {
                self.advance()?;
                while self.token.kind == Kind::Word && self.token.text.starts_with('.') {
                    if self.advance()?.text == ".align" {
                        self.unsigned()?;
                    }
                }
            }
            let name = self.word("the name of a parameter")?;
            let Some(count) = self.dimensions()? else {
                return self.fail(format!("parameter {name} has no size"));
            };
            let (offset, size) = (end.next_multiple_of(align), count * bytes);
            end = offset + size;
            if end > MAX_PARAM_BYTES {
                return self.fail(format!("the parameters have more than {MAX_PARAM_BYTES} bytes"));
            }
            formals.push(Param {
                name: name.to_string(),
                offset: offset as u32,
                bytes: size as u32,
                align: align as u32,
            });
            if !self.accept(b',')? && !self.token.is(b')') {
                return self.fail(format!("expected ',' or ')', found {}", self.found()));
            }
        }
        Ok(formals)
    }

    fn function(&mut self) -> Result<(), ParseError> {
        let mut formals = if self.token.is(b'(') { self.formals()? } else { vec![] };
        let returns = formals.len();
        let line = self.token.line;
        let name = self.word("the name of a function")?;
        if self.token.is(b'(') {
            formals.extend(self.formals()?);
        }
        while self.token.text.starts_with('.') && self.token.kind == Kind::Word {
            match self.advance()?.text {
                ".noreturn" => {}
                ".pragma" => {
                    self.advance()?;
                    self.expect(b';')?;
                }
                other => {
                    return self.fail(format!("directive {other} is not supported on a function"));
                }
            }
        }
        let index = match self.names.get(name) {
            Some(&ModuleName::Function(index)) => {
                let declared = &self.unit.functions[index];
                if declared.returns != returns || sizes(&declared.formals) != sizes(&formals) {
                    let message = format!("{name} was declared with other parameters");
                    return Err(ParseError::invalid(line, message));
                }
                index
            }
            Some(_) => {
                return Err(ParseError::invalid(line, format!("{name} is defined twice")));
            }
            None => {
                self.unit.functions.push(Function {
                    name: name.to_string(),
                    formals: formals.clone(),
                    returns,
                    body: None,
                });
                let index = self.unit.functions.len() - 1;
                self.define(name, ModuleName::Function(index), line)?;
                index
            }
        };
        if self.accept(b';')? {
            return Ok(());
        }
        if self.unit.functions[index].body.is_some() {
            return Err(ParseError::invalid(line, format!("{name} is defined twice")));
        }
        let body = self.body(&formals, false)?;
        let function = &mut self.unit.functions[index];
        (function.formals, function.returns, function.body) = (formals, returns, Some(body));
        Ok(())
    }

    fn entry(&mut self) -> Result<(), ParseError> {
        let line = self.token.line;
        let name = self.word("the name of a kernel")?;
        match self.names.get(name) {
            Some(ModuleName::Kernel) => {}
            _ => self.define(name, ModuleName::Kernel, line)?,
        }
        let params = if self.token.is(b'(') { self.formals()? } else { vec![] };
        let mut kernel = super::Kernel {
            name: name.to_string(),
            param_bytes: params.last().map_or(0, |p| p.offset + p.bytes),
            params,
            ..Default::default()
        };
        while self.token.kind == Kind::Word {
            match self.advance()?.text {
                ".maxntid" => kernel.max_threads = Some(self.extents()?),
                ".reqntid" => kernel.required_threads = Some(self.extents()?),
                ".minnctapersm" => kernel.min_blocks = Some(self.extents()?[0]),
                ".maxnreg" | ".maxnctapersm" => {
                    self.extents()?;
                }
                ".pragma" => {
                    self.advance()?;
                    self.expect(b';')?;
                }
                other => {
                    return self.fail(format!("directive {other} is not supported on a kernel"));
                }
            }
        }
        if self.unit.entries.iter().any(|entry| entry.kernel.name == name) {
            return Err(ParseError::invalid(line, format!("{name} is defined twice")));
        }
        if self.accept(b';')? {
            return Ok(());
        }
        let formals = kernel.params.clone();
        let body = self.body(&formals, true)?;
        self.unit.entries.push(Entry { kernel, body, line });
        Ok(())
    }

    fn extents(&mut self) -> Result<[u32; 3], ParseError> {
        let mut extents = [1; 3];
        for (i, extent) in extents.iter_mut().enumerate() {
            if i > 0 && !self.accept(b',')? {
                break;
            }
            let value = self.unsigned()?;
            let Ok(value) = u32::try_from(value) else {
                return self.fail(format!("{value} is too large here"));
            };
            *extent = value;
        }
        Ok(extents)
    }

    fn body(&mut self, formals: &[Param], kernel: bool) -> Result<Body, ParseError> {
        self.expect(b'{')?;
        let mut builder = Builder::new(formals, kernel);
        let mut depth = 1;
        loop {
            let line = self.token.line;
            match self.token.kind {
                Kind::End => return self.fail("a function has no closing brace"),
                Kind::Mark(b'{') => {
                    depth += 1;
                    builder.open();
                    self.advance()?;
                }
                Kind::Mark(b'}') => {
                    depth -= 1;
                    self.advance()?;
                    if depth == 0 {
                        return builder.finish(self.token.line);
                    }
                    builder.close();
                }
                Kind::Mark(b';') => {
                    self.advance()?;
                }
                Kind::Mark(b'@') => self.instruction(&mut builder)?,
                Kind::Word => {
                    let text = self.token.text;
                    if text.starts_with('.') {
                        self.advance()?;
                        self.local_directive(text, line, &mut builder)?;
                        continue;
                    }
                    let mut ahead = self.lexer;
                    if ahead.next()?.is(b':') {
                        self.advance()?;
                        self.advance()?;
                        if self.token.text == ".branchtargets" {
                            self.advance()?;
                            let targets = self.name_list("a label")?;
                            builder.table(text, targets, line)?;
                        } else if self.token.text == ".callprototype" {
                            self.advance()?;
                            let signature = self.call_prototype()?;
                            builder.prototype(text, Prototype { signature, targets: None }, line)?;
                        } else if self.token.text == ".calltargets" {
                            self.advance()?;
                            let prototype = self.call_targets()?;
                            builder.prototype(text, prototype, line)?;
                        } else {
                            builder.label(text, line)?;
                        }
                    } else {
                        self.instruction(&mut builder)?;
                    }
                }
                _ => return self.fail(format!("expected a statement, found {}", self.found())),
            }
        }
    }

    fn name_list(&mut self, what: &str) -> Result<Vec<&'a str>, ParseError> {
        let mut names = vec![self.word(what)?];
        while self.accept(b',')? {
            names.push(self.word(what)?);
        }
        self.expect(b';')?;
        Ok(names)
    }

    /// `.callprototype (.param .b32 _) _ (.param .b64 _, .param .b32 _);`
    fn call_prototype(&mut self) -> Result<Signature, ParseError> {
        let returns = if self.token.is(b'(') { self.formals()? } else { vec![] };
        if self.word("an underscore")? != "_" {
            return self.fail("a prototype has an underscore in place of a name");
        }
        let takes = if self.token.is(b'(') { self.formals()? } else { vec![] };
        if self.token.text == ".noreturn" {
            self.advance()?;
        }
        self.expect(b';')?;
        Ok(Signature { returns: sizes(&returns), takes: sizes(&takes) })
    }

    /// `.calltargets f, g;`, functions of one signature.
    fn call_targets(&mut self) -> Result<Prototype, ParseError> {
        let line = self.token.line;
        let mut targets = vec![];
        let mut first: Option<(&str, Signature)> = None;
        for name in self.name_list("the name of a function")? {
            let Some(&ModuleName::Function(index)) = self.names.get(name) else {
                return Err(ParseError::invalid(line, format!("function {name} is not defined")));
            };
            let signature = self.unit.functions[index].signature();
            match &first {
                None => first = Some((name, signature)),
                Some((other, expected)) if *expected != signature => {
                    let message = format!("{name} {signature}, but {other} of the same list {expected}");
                    return Err(ParseError::invalid(line, message));
                }
                Some(_) => {}
            }
            targets.push(index as u32);
        }
        targets.sort_unstable();
        targets.dedup();
        let signature = first.map(|(_, signature)| signature).unwrap_or_default();
        Ok(Prototype { signature, targets: Some(targets) })
    }

    fn local_directive(&mut self, directive: &str, line: u32, builder: &mut Builder<'a>) -> Result<(), ParseError> {
        match directive {
            ".reg" => {
                let name = self.word("a register type")?;
                if matches!(name, ".v2" | ".v4") {
                    return self.fail("vector registers are not supported");
                }
                let bits = match type_bytes(name) {
                    _ if name == ".pred" => 1,
                    Some(bytes) => bytes as u32 * 8,
                    None => {
                        return self.fail(format!("type {name} is not supported for a register"));
                    }
                };
                loop {
                    let name = self.word("the name of a register")?;
                    let count = if self.accept(b'<')? {
                        let count = self.unsigned()?;
                        self.expect(b'>')?;
                        Some(u32::try_from(count).unwrap_or(u32::MAX))
                    } else {
                        None
                    };
                    if builder.registers().saturating_add(count.unwrap_or(1)) > MAX_REGISTERS {
                        return self.fail(format!("more than {MAX_REGISTERS} registers in one function"));
                    }
                    builder.register(name, count, bits as u8);
                    if !self.accept(b',')? {
                        return self.expect(b';');
                    }
                }
            }
            ".local" | ".param" | ".shared" => {
                let (align, bytes) = self.variable_type()?;
                loop {
                    let name = self.word("the name of a variable")?;
                    let Some(count) = self.dimensions()? else {
                        return self.fail(format!("array {name} has no size"));
                    };
                    if directive == ".shared" {
                        builder.shared(name, self.unit.shared.len() as u32);
                        self.unit.shared.push(SharedVariable { bytes: count * bytes, align, dynamic: false });
                    } else {
                        builder.local(name, count * bytes, align, line)?;
                    }
                    if !self.accept(b',')? {
                        return self.expect(b';');
                    }
                }
            }
            ".pragma" => {
                self.advance()?;
                self.expect(b';')
            }
            ".loc" => self.skip_line(line),
            ".global" | ".const" => self.fail(format!("{directive} variables inside a function are not supported")),
            _ => Err(ParseError::invalid(line, format!("directive {directive} is not supported in a function"))),
        }
    }

    fn instruction(&mut self, builder: &mut Builder<'a>) -> Result<(), ParseError> {
        let (line, start) = (self.token.line, self.token.start);
        let mut guard = None;
        if self.accept(b'@')? {
            let negate = self.accept(b'!')?;
            let name = self.word("a predicate")?;
            guard = Some((builder.predicate(name, line)?, negate));
        }
        let opcode = self.word("an instruction")?;
        let mut operands = Vec::with_capacity(4);
        if !self.token.is(b';') {
            loop {
                let operand = self
                    .operand(builder, 0)
                    .map_err(|error| ParseError { message: format!("{opcode}: {}", error.message), ..error })?;
                operands.push(operand);
                if !self.accept(b',')? {
                    break;
                }
            }
        }
        let end = self.token.start + 1;
        if !self.token.is(b';') {
            return self.fail(format!("expected ';' after {opcode}, found {}", self.found()));
        }
        let source = Source { line, start: start as u32, length: (end - start) as u32 };
        builder.instruction(opcode, guard, operands, source, &self.names, &self.unit.functions)?;
        self.advance()?;
        Ok(())
    }

    fn operand(&mut self, builder: &Builder<'a>, depth: u32) -> Result<Operand<'a>, ParseError> {
        if depth > 3 {
            return self.fail("operands nested too deep");
        }
        let line = self.token.line;
        match self.token.kind {
            Kind::Mark(b'{') | Kind::Mark(b'(') => {
                let close = if self.token.is(b'{') { b'}' } else { b')' };
                self.advance()?;
                let mut list = Vec::with_capacity(4);
                while !self.accept(close)? {
                    list.push(self.operand(builder, depth + 1)?);
                    if !self.accept(b',')? && !self.token.is(close) {
                        return self.fail(format!("expected ',' or '{}', found {}", close as char, self.found()));
                    }
                }
                Ok(Operand::Vector(list))
            }
            Kind::Mark(b'[') => {
                self.advance()?;
                let base = self.operand(builder, depth + 1)?;
                let offset = self.addend()?;
                if self.token.is(b',') {
                    return self.fail("tensor and texture coordinates are not supported");
                }
                self.expect(b']')?;
                Ok(Operand::Address(Box::new(base), offset))
            }
            Kind::Mark(b'!') => {
                self.advance()?;
                let name = self.word("a predicate")?;
                Ok(Operand::Not(builder.predicate(name, line)?))
            }
            Kind::Mark(b'-') => {
                self.advance()?;
                self.literal(true)
            }
            Kind::Number => self.literal(false),
            Kind::Word => {
                let name = self.advance()?.text;
                let first = self.named(builder, name, line)?;
                if self.accept(b'|')? {
                    let line = self.token.line;
                    let name = self.word("a second destination")?;
                    let second = self.named(builder, name, line)?;
                    return Ok(Operand::Pair(Box::new(first), Box::new(second)));
                }
                if let Operand::Symbol(symbol) = first
                    && depth == 0
                    && (self.token.is(b'+') || self.token.is(b'-'))
                {
                    let offset = self.addend()?;
                    return Ok(Operand::Symbol(SymbolRef { offset, ..symbol }));
                }
                Ok(first)
            }
            _ => self.fail(format!("expected an operand, found {}", self.found())),
        }
    }

    fn literal(&mut self, negative: bool) -> Result<Operand<'a>, ParseError> {
        match (self.token.kind, number(self.token.text, negative)) {
            (Kind::Number, Some(operand)) => {
                self.advance()?;
                Ok(operand)
            }
            _ => self.fail(format!("expected a number, found {}", self.found())),
        }
    }

    fn named(&self, builder: &Builder<'a>, name: &'a str, line: u32) -> Result<Operand<'a>, ParseError> {
        if name == "_" {
            return Ok(Operand::Sink);
        }
        if name == "WARP_SZ" {
            return Ok(Operand::Int(32));
        }
        if let Some(register) = builder.find_register(name) {
            return Ok(Operand::Register(register));
        }
        if name.starts_with('%') {
            return match super::decode::special(name) {
                Some(special) => Ok(Operand::Special(special)),
                None => Err(ParseError::invalid(
                    line,
                    format!("register {name} is neither declared nor a special register that is supported"),
                )),
            };
        }
        Ok(Operand::Symbol(SymbolRef { name, offset: 0 }))
    }
}
