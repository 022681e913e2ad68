//! Links several modules into one, as text.
//!
//! The result holds the contents of the images: variables first, so that every use follows its definition, then
//! functions, image by image. An `.extern` variable is the one of that name that another image defines. Of several
//! `.weak` definitions the first is used, unless there is a strong one. A symbol local to its image (neither visible
//! nor weak) is renamed if another image uses the name, and so are `extern .shared` arrays, which all begin at the same
//! offset anyway. Functions that no image defines stay declared; a call of one is refused when the result is loaded. An
//! image may declare a function with a return value where the definition has none, or the reverse, as code of two
//! languages does: it then calls a wrapper that passes the parameters on.
//!
//! Not here: archives, aliases, and optimisation across images.

use super::ParseError;
use super::lex::{Kind, Lexer, Token};
use super::parse::MAX_PARAM_BYTES;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Write;
use std::ops::Range;

/// PTX text, and its name for messages.
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Name.
    pub name: &'a str,
    /// Text.
    pub text: &'a str,
}

/// The scope of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Linkage {
    /// Its own image.
    Own,
    Visible,
    /// Also `.common`.
    Weak,
    Extern,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Function,
    Kernel,
    Variable,
    Shared,
    Pragma,
}

/// A declaration or definition at module level.
struct Statement<'a> {
    what: What,
    linkage: Linkage,
    names: Vec<&'a str>,
    /// Its tokens.
    tokens: Range<usize>,
    /// The token that opens a function's body.
    body: Option<usize>,
    line: u32,
}

impl Statement<'_> {
    fn defines(&self) -> bool {
        match self.what {
            What::Function | What::Kernel => self.body.is_some(),
            What::Variable | What::Shared => self.linkage != Linkage::Extern,
            What::Pragma => false,
        }
    }

    /// Whether its name is shared with other images.
    fn shared_name(&self) -> bool {
        match self.what {
            What::Kernel => true,
            What::Shared => matches!(self.linkage, Linkage::Visible | Linkage::Weak),
            _ => self.linkage != Linkage::Own,
        }
    }
}

/// An image's tokens and statements.
struct Scanned<'a> {
    image: Image<'a>,
    tokens: Vec<Token<'a>>,
    statements: Vec<Statement<'a>>,
    version: (u32, u32),
    /// Number and the name with its suffix.
    target: (u32, &'a str),
    debug: bool,
}

struct Scanner<'a> {
    tokens: Vec<Token<'a>>,
    at: usize,
}

impl<'a> Scanner<'a> {
    fn token(&self) -> Token<'a> {
        // The last token is the end of the text; the position stays on it.
        self.tokens[self.at.min(self.tokens.len() - 1)]
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.token();
        self.at += usize::from(token.kind != Kind::End);
        token
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T, ParseError> {
        Err(ParseError::invalid(self.token().line, message))
    }

    /// Skips past the bracket that closes the one at the current position.
    fn skip_group(&mut self) -> Result<(), ParseError> {
        let line = self.token().line;
        let mut depth = 0;
        loop {
            let token = self.next();
            match token.kind {
                Kind::Mark(b'(' | b'{' | b'[') => depth += 1,
                Kind::Mark(b')' | b'}' | b']') => depth -= 1,
                Kind::End => return Err(ParseError::invalid(line, "what opens here is never closed")),
                _ => {}
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn skip_to(&mut self, mark: u8) -> Result<(), ParseError> {
        while !self.next().is(mark) {
            if self.token().kind == Kind::End {
                return self.fail(format!("expected '{}', found the end of the text", mark as char));
            }
        }
        Ok(())
    }

    fn name(&mut self) -> Result<&'a str, ParseError> {
        let token = self.token();
        if token.kind != Kind::Word || token.text.starts_with('.') {
            return self.fail(format!("expected a name, found '{}'", token.text));
        }
        self.next();
        Ok(token.text)
    }

    /// Reads a function or kernel after its directive: its name, and where its body opens.
    fn function(&mut self) -> Result<(&'a str, Option<usize>), ParseError> {
        while self.token().is(b'(') || self.token().text.starts_with('.') {
            match self.token().is(b'(') {
                true => self.skip_group()?,
                false => _ = self.next(),
            }
        }
        let name = self.name()?;
        loop {
            let token = self.token();
            match token.kind {
                Kind::Mark(b'(') => self.skip_group()?,
                Kind::Mark(b';') => {
                    self.next();
                    return Ok((name, None));
                }
                Kind::Mark(b'{') => {
                    let body = self.at;
                    self.skip_group()?;
                    return Ok((name, Some(body)));
                }
                Kind::Word if token.text == ".pragma" => self.skip_to(b';')?,
                Kind::End => return self.fail(format!("the declaration of {name} has no end")),
                _ => _ = self.next(),
            }
        }
    }

    /// Reads variables after the directive of their space.
    fn variables(&mut self) -> Result<Vec<&'a str>, ParseError> {
        while self.token().text.starts_with('.') {
            match self.next().text {
                ".align" => _ = self.next(),
                ".attribute" => self.skip_group()?,
                _ => {}
            }
        }
        let mut names = vec![];
        loop {
            names.push(self.name()?);
            loop {
                match self.token().kind {
                    Kind::Mark(b'[' | b'{' | b'(') => self.skip_group()?,
                    Kind::Mark(b',' | b';') => break,
                    Kind::End => return self.fail("the declaration of a variable has no end"),
                    _ => _ = self.next(),
                }
            }
            if self.next().is(b';') {
                return Ok(names);
            }
        }
    }
}

fn scan(image: Image<'_>) -> Result<Scanned<'_>, ParseError> {
    let mut lexer = Lexer::new(image.text);
    let mut tokens = vec![];
    loop {
        tokens.push(lexer.next()?);
        if tokens.last().is_some_and(|token| token.kind == Kind::End) {
            break;
        }
    }
    let mut scanner = Scanner { tokens, at: 0 };
    let mut statements = vec![];
    let (mut version, mut target, mut debug) = ((0, 0), (0, "sm_0"), false);
    loop {
        let (start, token) = (scanner.at, scanner.next());
        if token.is(b';') {
            continue;
        }
        let mut directive = token;
        let mut linkage = Linkage::Own;
        match token.text {
            _ if token.kind == Kind::End => break,
            ".version" => {
                let number = scanner.next();
                let parts = number.text.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
                let Some(found) = parts else {
                    return Err(ParseError::invalid(number.line, format!("'{}' is no version", number.text)));
                };
                version = found;
                continue;
            }
            ".target" => {
                loop {
                    let name = scanner.name()?;
                    let digits = name.strip_prefix("sm_").map(|digits| digits.trim_end_matches(['a', 'f']));
                    match digits.and_then(|digits| digits.parse().ok()) {
                        Some(number) => target = (number, name),
                        None if name == "debug" => debug = true,
                        None => return scanner.fail(format!("target option {name} is not supported")),
                    }
                    if !scanner.token().is(b',') {
                        break;
                    }
                    scanner.next();
                }
                continue;
            }
            ".address_size" => {
                scanner.next();
                continue;
            }
            ".file" => {
                while scanner.token().line == token.line && scanner.token().kind != Kind::End {
                    scanner.next();
                }
                continue;
            }
            ".section" => {
                while !scanner.token().is(b'{') && scanner.token().kind != Kind::End {
                    scanner.next();
                }
                scanner.skip_group()?;
                continue;
            }
            ".visible" | ".weak" | ".common" | ".extern" => {
                linkage = match token.text {
                    ".visible" => Linkage::Visible,
                    ".extern" => Linkage::Extern,
                    _ => Linkage::Weak,
                };
                directive = scanner.next();
            }
            _ => {}
        }
        let mut body = None;
        let (what, names) = match directive.text {
            ".func" | ".entry" => {
                let (name, opens) = scanner.function()?;
                body = opens;
                (if directive.text == ".func" { What::Function } else { What::Kernel }, vec![name])
            }
            ".global" | ".const" => (What::Variable, scanner.variables()?),
            ".shared" => (What::Shared, scanner.variables()?),
            ".pragma" => {
                scanner.skip_to(b';')?;
                (What::Pragma, vec![])
            }
            other => {
                return Err(ParseError::invalid(directive.line, format!("directive {other} is not supported")));
            }
        };
        statements.push(Statement { what, linkage, names, tokens: start..scanner.at, body, line: token.line });
    }
    Ok(Scanned { image, tokens: scanner.tokens, statements, version, target, debug })
}

/// A parameter as declared: alignment, type and dimension.
#[derive(Clone, Copy, Debug)]
struct Formal<'a> {
    align: &'a str,
    kind: &'a str,
    dimension: &'a str,
}

impl Formal<'_> {
    fn same(&self, other: &Formal) -> bool {
        (self.size(), self.dimension.is_empty()) == (other.size(), other.dimension.is_empty())
    }

    /// Element size and count; 0 if the declaration is wrong, which the parser will report.
    fn size(&self) -> (u64, u64) {
        let element = super::parse::type_bytes(self.kind).unwrap_or(0);
        (element, super::parse::integer(self.dimension).unwrap_or(u64::from(self.dimension.is_empty())))
    }

    fn declare(&self, name: &str) -> String {
        let align = if self.align.is_empty() { String::new() } else { format!(".align {} ", self.align) };
        let dimension = if self.dimension.is_empty() { String::new() } else { format!("[{}]", self.dimension) };
        format!(".param {align}{} {name}{dimension}", self.kind)
    }

    /// Copies the parameter `from` to `to` through a register.
    fn copy(&self, from: &str, to: &str, text: &mut String) {
        let (element, elements) = self.size();
        for at in 0..elements {
            let (offset, bits) = (at * element, element * 8);
            let _ = writeln!(text, "ld.param.b{bits} %b{bits}, [{from}+{offset}];");
            let _ = writeln!(text, "st.param.b{bits} [{to}+{offset}], %b{bits};");
        }
    }
}

/// A function's return parameters and parameters.
struct Signature<'a> {
    returns: Vec<Formal<'a>>,
    takes: Vec<Formal<'a>>,
}

/// Reads the heading of a function.
fn signature<'a>(tokens: &[Token<'a>], name: &str) -> Signature<'a> {
    let mut found = Signature { returns: vec![], takes: vec![] };
    let (mut depth, mut named) = (0, false);
    let mut formal: Option<Formal> = None;
    for at in 0..tokens.len() {
        let token = tokens[at];
        match token.kind {
            Kind::Mark(b'(') => depth += 1,
            Kind::Mark(b')' | b',') if depth > 0 => {
                let list = if named { &mut found.takes } else { &mut found.returns };
                list.extend(formal.take());
                depth -= i32::from(token.is(b')'));
            }
            Kind::Word if depth == 0 => named |= token.text == name,
            Kind::Word if token.text == ".param" => {
                formal = Some(Formal { align: "", kind: "", dimension: "" });
            }
            Kind::Word | Kind::Number => {
                if let Some(formal) = &mut formal {
                    match tokens[at - 1].text {
                        ".align" => formal.align = token.text,
                        "[" => formal.dimension = token.text,
                        _ if token.text.starts_with('.') && token.text != ".align" => formal.kind = token.text,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    found
}

/// A function `alias` that returns what `declared` says and calls `name`, which returns what `defined` says.
fn pass_on(alias: &str, name: &str, declared: &Signature, defined: &Signature) -> String {
    let list = |formals: &[Formal], prefix: &str| {
        let declared: Vec<String> =
            formals.iter().enumerate().map(|(at, formal)| formal.declare(&format!("{prefix}{at}"))).collect();
        declared.join(", ")
    };
    let names = |formals: &[Formal], prefix: &str| {
        (0..formals.len()).map(|at| format!("{prefix}{at}")).collect::<Vec<_>>().join(", ")
    };
    let returns = |signature: &Signature, prefix: &str| match signature.returns.len() {
        0 => String::new(),
        _ => format!("({})", list(&signature.returns, prefix)),
    };
    let mut text = format!(
        ".func {} {name}({});\n.func {} {alias}({})\n{{\n.reg .b16 %b8, %b16;\n.reg .b32 %b32;\n.reg .b64 %b64;\n",
        returns(defined, "r"),
        list(&defined.takes, "p"),
        returns(declared, "r"),
        list(&declared.takes, "p"),
    );
    for (prefix, formals) in [("a", &defined.takes), ("s", &defined.returns)] {
        for (at, formal) in formals.iter().enumerate() {
            let _ = writeln!(text, "{};", formal.declare(&format!("{prefix}{at}")));
        }
    }
    for (at, formal) in defined.takes.iter().enumerate() {
        formal.copy(&format!("p{at}"), &format!("a{at}"), &mut text);
    }
    let result = match defined.returns.len() {
        0 => String::new(),
        _ => format!("({}), ", names(&defined.returns, "s")),
    };
    let _ = writeln!(text, "call {result}{name}, ({});\nret;\n}}", names(&defined.takes, "a"));
    text
}

/// Why images do not link: one sentence with the name of the image.
fn refuse<T>(image: &Image, why: ParseError) -> Result<T, ParseError> {
    Err(ParseError { message: format!("in image {}: {}", image.name, why.message), ..why })
}

/// Links all images into one module. A single image is taken as it is. Text that no assembler would accept may pass:
/// parsing the result tells.
pub fn link(images: &[Image]) -> Result<String, ParseError> {
    if let [only] = images {
        return Ok(only.text.into());
    }
    let mut scanned = vec![];
    for &image in images {
        scanned.push(scan(image).or_else(|why| refuse(&image, why))?);
    }
    // The image and statement that define each name that all share.
    let mut definitions: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    let mut users: HashMap<&str, BTreeSet<usize>> = HashMap::new();
    for (at, unit) in scanned.iter().enumerate() {
        for (number, statement) in unit.statements.iter().enumerate() {
            for &name in &statement.names {
                users.entry(name).or_default().insert(at);
                if !statement.defines() || !statement.shared_name() {
                    continue;
                }
                let Some(&(image, earlier)) = definitions.get(name) else {
                    definitions.insert(name, (at, number));
                    continue;
                };
                let weak = |statement: &Statement| statement.linkage == Linkage::Weak;
                match (weak(&scanned[image].statements[earlier]), weak(statement)) {
                    (_, true) => {}
                    (true, false) => _ = definitions.insert(name, (at, number)),
                    (false, false) => {
                        let message = format!("{name} is defined twice, also in image {}", images[image].name);
                        return refuse(&images[at], ParseError::invalid(statement.line, message));
                    }
                }
            }
        }
    }
    let words: HashSet<&str> = scanned.iter().flat_map(|unit| unit.tokens.iter().map(|token| token.text)).collect();
    // A name that occurs in no image.
    let fresh = |name: &str, image: usize| {
        let mut names = (0..).map(|number| format!("{name}$image{image}_{number}"));
        names.find(|name| !words.contains(&**name)).expect("there are more numbers than words")
    };
    let (mut variables, mut functions) = (String::new(), String::new());
    for (at, unit) in scanned.iter().enumerate() {
        let mut renamed: HashMap<&str, String> = HashMap::new();
        for statement in unit.statements.iter().filter(|statement| !statement.shared_name()) {
            for &name in statement.names.iter().filter(|name| users[*name].len() > 1) {
                renamed.insert(name, fresh(name, at));
            }
        }
        let _ = writeln!(functions, "\n// image {}", unit.image.name.replace(['\n', '\r'], " "));
        for (number, statement) in unit.statements.iter().enumerate() {
            let mut tokens = statement.tokens.clone();
            let target = match statement.what {
                What::Variable | What::Shared => &mut variables,
                _ => &mut functions,
            };
            if let (What::Function, None, [name]) = (statement.what, statement.body, &statement.names[..])
                && let Some(&(image, number)) = definitions.get(name)
                && statement.linkage == Linkage::Extern
            {
                if renamed.contains_key(name) {
                    continue;
                }
                let definition = &scanned[image].statements[number];
                let heading = definition.tokens.start..definition.body.unwrap_or(definition.tokens.end);
                let declared = signature(&unit.tokens[tokens.clone()], name);
                let defined = signature(&scanned[image].tokens[heading], name);
                let same = |a: &[Formal], b: &[Formal]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.same(b));
                if !same(&declared.takes, &defined.takes) {
                    let message =
                        format!("{name} is declared with other parameters than image {} defines", images[image].name);
                    return refuse(&unit.image, ParseError::invalid(statement.line, message));
                }
                let bytes = |formal: &Formal| formal.size().0.saturating_mul(formal.size().1);
                if defined.takes.iter().any(|formal| bytes(formal) > MAX_PARAM_BYTES) {
                    let message = format!("a parameter of {name} has more than {MAX_PARAM_BYTES} bytes");
                    return refuse(&unit.image, ParseError::invalid(statement.line, message));
                }
                if !same(&declared.returns, &defined.returns) {
                    let alias = fresh(name, at);
                    functions.push_str(&pass_on(&alias, name, &declared, &defined));
                    renamed.insert(name, alias);
                    continue;
                }
            }
            let elsewhere = |name: &&str| definitions.get(name).is_some_and(|&place| place != (at, number));
            let mut end = "";
            if statement.what == What::Variable && statement.linkage == Linkage::Extern {
                if let Some(name) = statement.names.iter().find(|name| !definitions.contains_key(**name)) {
                    let message = format!("no image defines {name}");
                    return refuse(&unit.image, ParseError::invalid(statement.line, message));
                }
                continue;
            }
            if statement.shared_name() && statement.defines() && statement.names.iter().any(elsewhere) {
                match (statement.what, statement.body) {
                    // Calls in this image need its declaration.
                    (What::Function, Some(body)) => (tokens.end, end) = (body, ";"),
                    (What::Kernel, _) => continue,
                    _ if statement.names.iter().all(elsewhere) => continue,
                    _ => {
                        let message = "one of several variables of a declaration is another image's";
                        return refuse(&unit.image, ParseError::invalid(statement.line, message));
                    }
                }
            }
            let mut from = unit.tokens[tokens.start].start;
            for token in &unit.tokens[tokens] {
                target.push_str(&unit.image.text[from..token.start]);
                let text = renamed.get(token.text).filter(|_| token.kind == Kind::Word);
                target.push_str(text.map_or(token.text, |text| text));
                from = token.start + token.text.len();
            }
            target.push_str(end);
            target.push('\n');
        }
    }
    let version = scanned.iter().map(|unit| unit.version).max().unwrap_or_default();
    let target = scanned.iter().map(|unit| unit.target).max().unwrap_or_default();
    let debug = if scanned.iter().any(|unit| unit.debug) { ", debug" } else { "" };
    let (major, minor) = version;
    Ok(format!(".version {major}.{minor}\n.target {}{debug}\n.address_size 64\n\n{variables}{functions}", target.1))
}
