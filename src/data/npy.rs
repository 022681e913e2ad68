//! Reading NumPy's .npy and .npz (plain or compressed). Arrays in Fortran order and arrays of Python objects are
//! refused.

use std::io::{Cursor, Read};
use std::path::Path;

use npyz::{DType, NpyHeader, Order, TypeChar};

use crate::error::{Error, Result};

/// An array as stored in a file: raw elements, little- or big-endian.
pub struct Array {
    name: String,
    dtype: DType,
    /// Dimensions, slowest first.
    pub shape: Vec<usize>,
    body: Vec<u8>,
}

impl Array {
    /// From the bytes of a .npy file; `name` begins the error, a sentence.
    pub fn parse(name: &str, bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut rest = bytes;
        let header = NpyHeader::from_reader(&mut rest).map_err(|e| format!("{name} is not a .npy array: {e}"))?;
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
        Ok(Array { name: name.into(), dtype, shape, body: rest.to_vec() })
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
    pub fn into_u8(self) -> std::result::Result<Vec<u8>, String> {
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

/// Reads one .npy file.
pub fn read(path: &Path) -> Result<Array> {
    let bytes = std::fs::read(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
    Array::parse("the file", &bytes).map_err(|e| Error::file(path, e))
}

/// Every array of a .npz archive with its name, in the order of the archive.
pub fn parse_npz(bytes: &[u8]) -> std::result::Result<Vec<(String, Array)>, String> {
    let broken = |e: &dyn std::fmt::Display| format!("is not a whole .npz archive ({e}); it is cut short or damaged");
    let mut archive = zip::ZipArchive::new(Cursor::new(bytes)).map_err(|e| broken(&e))?;
    let mut arrays = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|e| broken(&e))?;
        let name = entry.name().map_err(|e| broken(&e))?.into_owned();
        let Some(name) = npyz::npz::array_name_from_file_name(&name) else { continue };
        let mut content = Vec::new();
        entry.read_to_end(&mut content).map_err(|e| broken(&e))?;
        arrays.push((name.to_string(), Array::parse(&format!("its array '{name}'"), &content)?));
    }
    Ok(arrays)
}

/// `10000x28x28`.
pub fn extent(shape: &[usize]) -> String {
    if shape.is_empty() { "()".into() } else { shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x") }
}
