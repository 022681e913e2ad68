//! A look at a table's metadata before the library has one: it makes room for as many children of a group of columns as
//! the group claims. The metadata are in Thrift's compact protocol.

/// Structures within each other, at most.
const DEEPEST: usize = 32;

const I32: u8 = 5;
const BINARY: u8 = 8;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// True if the metadata can be read to their end and no group of columns claims more children than there are columns
/// and groups.
pub fn is_sound(metadata: &[u8]) -> bool {
    Thrift(metadata).file().is_some()
}

/// Bytes that are not read yet. All return `None` at what is damaged.
struct Thrift<'a>(&'a [u8]);

impl Thrift<'_> {
    fn file(&mut self) -> Option<()> {
        let mut last = 0;
        while let Some((id, kind)) = self.field(&mut last)? {
            match (id, kind) {
                (1, I32) => self.skip(kind, 0)?,
                (2, LIST) => self.schema()?,
                // The library may go by the number alone.
                (1 | 2, _) => return None,
                _ => self.skip(kind, 0)?,
            }
        }
        Some(())
    }

    fn schema(&mut self) -> Option<()> {
        let (elements, kind) = self.list()?;
        if kind != STRUCT {
            return None;
        }
        for _ in 0..elements {
            let mut last = 0;
            while let Some((id, kind)) = self.field(&mut last)? {
                match (id, kind) {
                    // The number of children, in zigzag.
                    (5, I32) => {
                        let children = self.number()? / 2;
                        if children > elements {
                            return None;
                        }
                    }
                    (1..=3 | 6..=9, I32) | (4, BINARY) | (10, STRUCT) => self.skip(kind, 1)?,
                    (1..=10, _) => return None,
                    _ => self.skip(kind, 1)?,
                }
            }
        }
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    /// The number and the kind of the next field, whose number follows `last`; `Some(None)` at the end of a structure.
    fn field(&mut self, last: &mut u64) -> Option<Option<(u64, u8)>> {
        let head = self.byte()?;
        let kind = head & 0x0f;
        if kind == 0 {
            return Some(None);
        }
        *last = match head >> 4 {
            // In zigzag, where a field is far from the one before it.
            0 => self.number()? / 2,
            more => last.saturating_add(u64::from(more)),
        };
        Some(Some((*last, kind)))
    }

    /// The number of elements of a list and their kind.
    fn list(&mut self) -> Option<(u64, u8)> {
        let head = self.byte()?;
        let len = if head >> 4 == 15 { self.number()? } else { u64::from(head >> 4) };
        Some((len, head & 0x0f))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        if depth > DEEPEST {
            return None;
        }
        match kind {
            // Truth is in the kind.
            1 | 2 => {}
            3 => _ = self.byte()?,
            4..=6 => _ = self.number()?,
            7 => self.0 = self.0.get(8..)?,
            BINARY => {
                let len = usize::try_from(self.number()?).ok()?;
                self.0 = self.0.get(len..)?;
            }
            LIST | 10 => {
                let (len, kind) = self.list()?;
                for _ in 0..len {
                    self.element(kind, depth)?;
                }
            }
            11 => {
                let len = self.number()?;
                let kinds = if len > 0 { self.byte()? } else { 0 };
                for _ in 0..len {
                    self.element(kinds >> 4, depth)?;
                    self.element(kinds & 0x0f, depth)?;
                }
            }
            STRUCT => {
                let mut last = 0;
                while let Some((_, kind)) = self.field(&mut last)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            _ => return None,
        }
        Some(())
    }

    /// An element of a list or a map, where truth takes a byte, so that each takes one at least.
    fn element(&mut self, kind: u8, depth: usize) -> Option<()> {
        self.skip(if kind <= 2 { 3 } else { kind }, depth + 1)
    }
}
