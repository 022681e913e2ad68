//! Tokens of PTX text.
//!
//! A token keeps its dots: `ld.global.L1::no_allocate.f32` and `%tid.x` are one token each, `.reg.b16` is two. That is
//! all the context the grammar needs.

use super::ParseError;

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Identifier, opcode with modifiers, directive, register.
    Word,
    /// Integer or float literal, checked by the parser.
    Number,
    /// Quoted text, with its quotes.
    Text,
    /// One character.
    Mark(u8),
    /// End of the text.
    End,
}

/// A token: a range of the text.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// What it is.
    pub kind: Kind,
    /// Its characters.
    pub text: &'a str,
    /// Byte offset of the first.
    pub start: usize,
    /// Line, from 1.
    pub line: u32,
}

impl Token<'_> {
    /// Whether it is this punctuation.
    pub fn is(&self, mark: u8) -> bool {
        self.kind == Kind::Mark(mark)
    }
}

/// A position in the text. Cheap to copy, so lookahead is a copy.
#[derive(Clone, Copy)]
pub struct Lexer<'a> {
    text: &'a str,
    at: usize,
    line: u32,
}

fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$' | b'%' | b'.')
}

impl<'a> Lexer<'a> {
    /// At the start of a text.
    pub fn new(text: &'a str) -> Self {
        Lexer { text, at: 0, line: 1 }
    }

    /// The next token.
    pub fn next(&mut self) -> Result<Token<'a>, ParseError> {
        self.skip_blanks()?;
        let bytes = self.text.as_bytes();
        let (start, line) = (self.at, self.line);
        let Some(&first) = bytes.get(start) else {
            return Ok(Token { kind: Kind::End, text: "", start, line });
        };
        let kind = match first {
            b'"' => {
                let Some(length) = self.text[start + 1..].find(['"', '\n']) else {
                    return Err(ParseError::invalid(line, "this text has no closing quote"));
                };
                if bytes[start + 1 + length] == b'\n' {
                    return Err(ParseError::invalid(line, "this text has no closing quote"));
                }
                self.at = start + length + 2;
                Kind::Text
            }
            b'0'..=b'9' => {
                self.number(bytes);
                Kind::Number
            }
            _ if in_word(first) => {
                self.word(bytes);
                Kind::Word
            }
            _ if first.is_ascii_graphic() => {
                self.at += 1;
                Kind::Mark(first)
            }
            _ => {
                let bad = self.text[start..].chars().next().unwrap_or('?');
                return Err(ParseError::invalid(line, format!("character {bad:?} has no meaning in PTX")));
            }
        };
        Ok(Token { kind, text: &self.text[start..self.at], start, line })
    }

    fn number(&mut self, bytes: &[u8]) {
        let hex = bytes[self.at] == b'0' && matches!(bytes.get(self.at + 1), Some(b'x' | b'X'));
        while let Some(&byte) = bytes.get(self.at) {
            let sign_of_exponent = !hex
                && matches!(byte, b'+' | b'-')
                && matches!(bytes[self.at - 1], b'e' | b'E')
                && !matches!(bytes.get(self.at - 2), Some(b'x' | b'f' | b'd' | b'F' | b'D'));
            if !(byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'_' || sign_of_exponent) {
                break;
            }
            self.at += 1;
        }
    }

    fn word(&mut self, bytes: &[u8]) {
        // Blanks between directives are optional: `.reg.b16 x;` is `.reg .b16 x;`.
        let directive = bytes[self.at] == b'.';
        self.at += usize::from(directive);
        while let Some(&byte) = bytes.get(self.at) {
            if in_word(byte) && !(directive && byte == b'.') {
                self.at += 1;
            } else if byte == b':'
                && bytes.get(self.at + 1) == Some(&b':')
                && bytes.get(self.at + 2).is_some_and(|&b| in_word(b))
            {
                self.at += 2;
            } else {
                break;
            }
        }
    }

    fn skip_blanks(&mut self) -> Result<(), ParseError> {
        let bytes = self.text.as_bytes();
        while let Some(&byte) = bytes.get(self.at) {
            match byte {
                b'\n' => {
                    self.line += 1;
                    self.at += 1;
                }
                b' ' | b'\t' | b'\r' | 0x0b | 0x0c => self.at += 1,
                b'/' if bytes.get(self.at + 1) == Some(&b'/') => {
                    self.at += self.text[self.at..].find('\n').unwrap_or(self.text.len() - self.at);
                }
                b'/' if bytes.get(self.at + 1) == Some(&b'*') => {
                    let Some(length) = self.text[self.at + 2..].find("*/") else {
                        return Err(ParseError::invalid(self.line, "this comment has no end"));
                    };
                    let comment = &self.text[self.at..self.at + length + 4];
                    self.line += comment.bytes().filter(|&b| b == b'\n').count() as u32;
                    self.at += comment.len();
                }
                _ => break,
            }
        }
        Ok(())
    }
}
