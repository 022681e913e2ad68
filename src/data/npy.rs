//! Reading NumPy's .npy and .npz (plain or compressed). Arrays in Fortran order and arrays of Python objects are
//! refused.

use std::io::{self, Cursor, Read};
use std::path::Path;

use bytes::Bytes;
use npyz::{DType, NpyHeader, Order, TypeChar};

use super::contents::{Reading, SMALLER, check_room, free_memory};
use crate::error::{Error, Result};

/// An array as stored in a file: raw elements, little- or big-endian, which may be a part of a file that is mapped.
pub struct Array {
    name: String,
    dtype: DType,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    body: Bytes,
}

impl Array {
    /// From the bytes of a .npy file; `name` begins the error, a sentence.
    pub fn parse(name: &str, bytes: impl Into<Bytes>) -> std::result::Result<Self, String> {
        let mut bytes = bytes.into();
        let mut rest = &bytes[..];
        check_header(rest).map_err(|e| format!("{name} is not a .npy array: {e}"))?;
        // The parser's own message is a drawing over several lines.
        let header = NpyHeader::from_reader(&mut rest)
            .map_err(|_| format!("{name} is not a .npy array: its header cannot be understood; it is damaged"))?;
        if header.uses_pickled_array() {
            return Err(format!("{name} holds Python objects; numbers are expected"));
        }
        let shape: Option<Vec<usize>> = header.shape().iter().map(|&d| usize::try_from(d).ok()).collect();
        let shape = shape.ok_or_else(|| format!("{name} claims a shape of {:?}", header.shape()))?;
        if header.order() == Order::Fortran && shape.len() > 1 {
            return Err(format!("{name} is in Fortran order; save numpy.ascontiguousarray of it"));
        }
        let dtype = header.dtype();
        let size = dtype.num_bytes().unwrap_or(0);
        let want = shape.iter().try_fold(size, |n, &d| n.checked_mul(d));
        if want != Some(rest.len()) {
            return Err(format!(
                "{name} should hold {} bytes for its shape {}, but {} are there; it is cut short or damaged",
                want.map_or("more than any file has".into(), |w| w.to_string()),
                extent(&shape),
                rest.len()
            ));
        }
        let body = bytes.split_off(bytes.len() - rest.len());
        Ok(Array { name: name.into(), dtype, shape, body })
    }

    /// NumPy's spelling of the element type, such as `<f4`.
    pub fn type_name(&self) -> String {
        self.dtype.descr().trim_matches('\'').to_string()
    }

    /// True for unsigned bytes.
    pub fn is_u8(&self) -> bool {
        matches!(&self.dtype, DType::Plain(t) if t.type_char() == TypeChar::Uint && t.size_field() == 1)
    }

    /// The elements of an array of unsigned bytes; an error for any other type.
    pub fn into_u8(self) -> std::result::Result<Bytes, String> {
        if self.is_u8() {
            return Ok(self.body);
        }
        Err(format!(
            "{} holds elements of type {}; images are expected as uint8 ('|u1'), 0 to 255",
            self.name,
            self.type_name()
        ))
    }

    /// The elements of any integer type, as i64; u64 beyond its range comes out negative.
    pub fn to_i64(&self) -> std::result::Result<Vec<i64>, String> {
        let (kind, size) = self.kind();
        let elements = self.body.chunks_exact(size.max(1)).map(|b| self.little(b));
        let numbers: Vec<i64> = match (kind, size) {
            (Some(TypeChar::Int), 1) => elements.map(|b| i64::from(b[0] as i8)).collect(),
            (Some(TypeChar::Int), 2) => elements.map(|b| i64::from(i16::from_le_bytes([b[0], b[1]]))).collect(),
            (Some(TypeChar::Int), 4) => {
                elements.map(|b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
            }
            (Some(TypeChar::Int), 8) => elements.map(i64::from_le_bytes).collect(),
            // Zero-extended by `little`; what is beyond i64 comes out negative, and is refused as such by whoever asks.
            (Some(TypeChar::Uint), 1 | 2 | 4 | 8) => elements.map(i64::from_le_bytes).collect(),
            _ => {
                return Err(format!(
                    "{} holds elements of type {}; integers are expected",
                    self.name,
                    self.type_name()
                ));
            }
        };
        Ok(numbers)
    }

    /// The elements of any integer or floating type, rounded to f32.
    pub fn to_f32(&self) -> std::result::Result<Vec<f32>, String> {
        let (kind, size) = self.kind();
        let elements = self.body.chunks_exact(size.max(1)).map(|b| self.little(b));
        match (kind, size) {
            (Some(TypeChar::Float), 2) => {
                Ok(elements.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect())
            }
            (Some(TypeChar::Float), 4) => Ok(elements.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
            (Some(TypeChar::Float), 8) => Ok(elements.map(|b| f64::from_le_bytes(b) as f32).collect()),
            (Some(TypeChar::Int | TypeChar::Uint), _) => Ok(self.to_i64()?.into_iter().map(|i| i as f32).collect()),
            _ => Err(format!("{} holds elements of type {}; numbers are expected", self.name, self.type_name())),
        }
    }

    /// The elements of any integer or floating type, as f64.
    pub fn to_f64(&self) -> std::result::Result<Vec<f64>, String> {
        match self.kind() {
            (Some(TypeChar::Float), 8) => {
                Ok(self.body.chunks_exact(8).map(|b| f64::from_le_bytes(self.little(b))).collect())
            }
            (Some(TypeChar::Int | TypeChar::Uint), _) => Ok(self.to_i64()?.into_iter().map(|i| i as f64).collect()),
            _ => Ok(self.to_f32()?.into_iter().map(f64::from).collect()),
        }
    }

    fn kind(&self) -> (Option<TypeChar>, usize) {
        match &self.dtype {
            DType::Plain(t) => (Some(t.type_char()), self.dtype.num_bytes().unwrap_or(0)),
            _ => (None, 0),
        }
    }

    /// One element's bytes, least significant first, zero-padded to eight.
    fn little(&self, element: &[u8]) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..element.len().min(8)].copy_from_slice(&element[..element.len().min(8)]);
        let big = matches!(&self.dtype, DType::Plain(t) if t.endianness() == npyz::Endianness::Big);
        if big {
            bytes[..element.len().min(8)].reverse();
        }
        bytes
    }
}

/// Refuses a header that ends beyond the file, before room is made for it, and one nested so deeply that parsing it
/// would exhaust the stack or never end.
fn check_header(bytes: &[u8]) -> std::result::Result<(), &'static str> {
    let (length, start) = match bytes.get(6..8) {
        Some([1, _]) => (bytes.get(8..10).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]]))), 10),
        Some(_) => (bytes.get(8..12).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize), 12),
        None => (None, 0),
    };
    let header = length.and_then(|length| bytes.get(start..)?.get(..length));
    let header = header.ok_or("it ends within its header")?;
    // NumPy writes four levels. The parser tries each one twice, so that 30 take minutes.
    const DEEPEST: usize = 8;
    let mut open = 0usize;
    for c in header {
        match c {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        if open > DEEPEST {
            return Err("its header is nested too deeply; it is damaged");
        }
    }
    Ok(())
}

/// Reads one .npy file.
pub fn read(path: &Path) -> Result<Array> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    Array::parse("the file", bytes).map_err(|e| Error::file(path, e))
}

/// A .npz archive, plain or compressed, of which arrays are read one at a time.
pub struct Archive {
    zip: zip::ZipArchive<Cursor<Bytes>>,
    /// Names of the arrays, in the order of the archive, with their places in it.
    arrays: Vec<(String, usize)>,
    bytes: Bytes,
}

impl Archive {
    /// Reads the list of contents.
    pub fn open(bytes: impl Into<Bytes>) -> std::result::Result<Self, String> {
        let bytes = bytes.into();
        let mut zip = zip::ZipArchive::new(Cursor::new(bytes.clone())).map_err(broken)?;
        let mut arrays = Vec::new();
        for index in 0..zip.len() {
            let name = zip.by_index_raw(index).map_err(broken)?.name().map_err(broken)?.into_owned();
            if let Some(name) = npyz::npz::array_name_from_file_name(&name) {
                arrays.push((name.to_string(), index));
            }
        }
        Ok(Archive { zip, arrays, bytes })
    }

    /// Names of the arrays, in the order of the archive.
    pub fn names(&self) -> Vec<String> {
        self.arrays.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Reads the array `name`, which must be one of [`names`](Self::names).
    pub fn array(&mut self, name: &str) -> std::result::Result<Array, String> {
        self.member(name, |entry, size| {
            check_room(&format!("its array '{name}' takes"), size, free_memory(), SMALLER)?;
            let mut content = Vec::new();
            entry.read_to_end(&mut content).map_err(broken)?;
            Ok(content.into())
        })
    }

    /// The same for images, which may be larger than memory.
    pub(super) fn array_by(&mut self, name: &str, reading: &Reading<'_>) -> std::result::Result<Array, String> {
        let label = format!("its array '{name}'");
        self.member(name, |entry, size| {
            if reading.scratch.is_none() {
                check_room(&format!("{label} takes"), size, free_memory(), &reading.advice())?;
            }
            reading.unpack(&label, entry, broken)
        })
    }

    /// An array: a part of the archive if it is stored as it is, otherwise what `unpack` makes of it and of its size.
    fn member(
        &mut self,
        name: &str,
        unpack: impl FnOnce(&mut dyn Read, u64) -> std::result::Result<Bytes, String>,
    ) -> std::result::Result<Array, String> {
        // DEFLATE makes at most 1032 bytes of one.
        const MOST: u64 = 1100;
        let place = self.arrays.iter().find(|(own, _)| own == name);
        let (_, index) = place.ok_or_else(|| format!("holds no array '{name}'"))?;
        let mut entry = self.zip.by_index(*index).map_err(broken)?;
        let (size, packed) = (entry.size(), entry.compressed_size().min(self.bytes.len() as u64));
        if size > packed.saturating_mul(MOST).saturating_add(MOST) {
            return Err(broken(format!("its array '{name}' claims {size} bytes, packed in {packed}")));
        }
        let place = entry.data_start().and_then(|start| usize::try_from(start).ok());
        let stored = place.filter(|_| entry.compression() == zip::CompressionMethod::Stored);
        let content = match stored {
            Some(start) => {
                // To its end, for the sum that it is checked by.
                let len = io::copy(&mut entry, &mut io::sink()).map_err(broken)? as usize;
                self.bytes.slice(start..start + len)
            }
            // One byte more, so that an array longer than it claims is noticed.
            None => unpack(&mut entry.take(size.saturating_add(1)), size)?,
        };
        Array::parse(&format!("its array '{name}'"), content)
    }
}

fn broken(e: impl std::fmt::Display) -> String {
    format!("is not a whole .npz archive ({e}); it is cut short or damaged")
}

/// Every array of a .npz archive with its name, in the order of the archive.
pub fn parse_npz(bytes: &[u8]) -> std::result::Result<Vec<(String, Array)>, String> {
    let mut archive = Archive::open(bytes.to_vec())?;
    archive.names().into_iter().map(|name| Ok((name.clone(), archive.array(&name)?))).collect()
}

/// `10000x28x28`.
pub fn extent(shape: &[usize]) -> String {
    if shape.is_empty() { "()".into() } else { shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x") }
}
