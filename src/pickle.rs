//! Reads pickles of PyTorch's weight files and of data sets: a machine with a stack that knows tensors, NumPy arrays of
//! bytes and plain containers, and nothing else.
//!
//! A pickle is a program, and Python's reader calls whatever functions it names. Here nothing is executed: a few names
//! stand for the parts of a tensor or an array, every other is an error that says it. Bytes, instructions and the sizes
//! of lists are bounded by the length of the pickle, which the caller bounds; values lie in one list and refer to each
//! other by index, so that no nesting can exhaust the stack.
//!
//! Deliberately absent: protocol 0, which PyTorch has never written, and everything that only Python objects need.

use std::collections::HashMap;
use std::rc::Rc;

use safetensors::Dtype;

use crate::text::cut;

/// The longest pickle that is read: a network of ten thousand tensors has three megabytes.
pub(crate) const LONGEST: usize = 32 << 20;

/// The most instructions; such a network has half a million.
const MOST_INSTRUCTIONS: usize = 4 << 20;

/// A sentence that begins with the name of the file.
type Sentence<T> = Result<T, String>;

/// Numbers in a file that tensors are views of.
#[derive(Clone, Debug)]
pub(crate) struct Storage {
    pub dtype: Dtype,
    /// Its name in the file.
    pub key: Rc<str>,
    /// How many numbers it has.
    pub len: usize,
}

/// A tensor: a view of a storage.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub storage: Storage,
    /// The first number.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// Numbers from one index to the next, of each dimension.
    pub strides: Vec<usize>,
}

/// A value on the stack.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// A float, or a whole number beyond 64 bits; nothing here depends on its value.
    Plain,
    /// Bytes, or text of Python 2: where in the pickle they are, and how many.
    Bytes(usize, usize),
    Text(Rc<str>),
    Name(Name),
    /// Something in the list of objects.
    Object(usize),
}

/// What a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Name {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
    Reconstruct,
    NdArray,
    ArrayType,
}

/// What a pickle is read for: which names it may hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Reads {
    /// Tensors of PyTorch.
    Weights,
    /// Arrays of NumPy.
    Arrays,
}

impl Name {
    fn of(module: &str, name: &str, reads: Reads) -> Sentence<Self> {
        if reads == Reads::Arrays {
            return match (module, name) {
                ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Ok(Name::Reconstruct),
                ("numpy", "ndarray") => Ok(Name::NdArray),
                ("numpy", "dtype") => Ok(Name::ArrayType),
                _ => Err(format!(
                    "names {}.{}, which is not read: a pickle of NumPy arrays and plain containers is expected, and nothing in it is executed",
                    cut(module),
                    cut(name)
                )),
            };
        }
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Name::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Name::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Name::RebuildParameter),
            ("torch", "FloatStorage") => Ok(Name::Storage(Dtype::F32)),
            ("torch", "HalfStorage") => Ok(Name::Storage(Dtype::F16)),
            ("torch", "BFloat16Storage") => Ok(Name::Storage(Dtype::BF16)),
            ("torch", "DoubleStorage") => Ok(Name::Storage(Dtype::F64)),
            ("torch", "LongStorage") => Ok(Name::Storage(Dtype::I64)),
            ("torch", "IntStorage") => Ok(Name::Storage(Dtype::I32)),
            ("torch", "ByteStorage") => Ok(Name::Storage(Dtype::U8)),
            ("torch", "BoolStorage") => Ok(Name::Storage(Dtype::BOOL)),
            _ => Err(format!(
                "names {}.{}, which is not read: a pickle of tensors and plain containers is expected, and nothing in it is executed",
                cut(module),
                cut(name)
            )),
        }
    }
}

/// What a value may refer to.
#[derive(Debug)]
pub(crate) enum Object {
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Storage(Storage),
    Tensor(View),
    /// The type of an array's elements: true for unsigned bytes.
    ArrayType(bool),
    Array(Array),
}

/// An array of unsigned bytes in C order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Array {
    pub shape: Vec<usize>,
    /// Where in the pickle its elements are, as many as the shape says.
    pub start: usize,
    pub len: usize,
}

/// What a pickle holds.
#[derive(Debug)]
pub(crate) struct Unpickled {
    pub value: Value,
    pub objects: Vec<Object>,
    /// Bytes of the pickle.
    pub len: usize,
}

impl Unpickled {
    /// The entries of a dictionary.
    pub fn dict(&self, value: &Value) -> Option<&[(Value, Value)]> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::Dict(entries) => Some(entries),
                _ => None,
            },
            _ => None,
        }
    }

    /// A tensor.
    pub fn tensor(&self, value: &Value) -> Option<&View> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::Tensor(view) => Some(view),
                _ => None,
            },
            _ => None,
        }
    }

    /// An array.
    pub fn array(&self, value: &Value) -> Option<&Array> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::Array(array) => Some(array),
                _ => None,
            },
            _ => None,
        }
    }

    /// The items of a list.
    pub fn list(&self, value: &Value) -> Option<&[Value]> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::List(items) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }
}

struct Machine<'a> {
    bytes: &'a [u8],
    reads: Reads,
    at: usize,
    stack: Vec<Value>,
    /// Heights of the stack at the marks that are open.
    marks: Vec<usize>,
    memo: HashMap<u32, Value>,
    objects: Vec<Object>,
}

/// Reads the pickle that `bytes` begin with.
///
/// # Errors
/// A sentence for anything but plain containers of tensors, or of arrays.
pub(crate) fn read(bytes: &[u8], reads: Reads) -> Sentence<Unpickled> {
    let mut machine = Machine {
        bytes,
        reads,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        objects: Vec::new(),
    };
    for _ in 0..MOST_INSTRUCTIONS {
        if machine.step()? {
            let value = machine.pop()?;
            return Ok(Unpickled { value, objects: machine.objects, len: machine.at });
        }
    }
    Err(format!("holds a pickle of more than {MOST_INSTRUCTIONS} instructions; no weights and no labels have as many"))
}

fn damaged(what: &str) -> String {
    format!("holds a pickle that is cut short or damaged: {what}")
}

impl<'a> Machine<'a> {
    /// Does one instruction; true after the last.
    fn step(&mut self) -> Sentence<bool> {
        let [code] = self.take_array()?;
        match code {
            0x80 => {
                let [protocol] = self.take_array()?;
                if !(2..=5).contains(&protocol) {
                    return Err(format!("holds a pickle of protocol {protocol}; 2 to 5 are read"));
                }
            }
            0x95 => _ = self.take(8)?, // a frame's length: frames are for readers from a stream
            b'.' => return Ok(true),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => _ = self.pop()?,
            b'1' => _ = self.pop_to_mark()?,
            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'J' => {
                let number = i32::from_le_bytes(self.take_array()?);
                self.stack.push(Value::Int(number.into()));
            }
            b'K' => {
                let [number] = self.take_array()?;
                self.stack.push(Value::Int(number.into()));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.take_array()?);
                self.stack.push(Value::Int(number.into()));
            }
            0x8a => {
                let [len] = self.take_array()?;
                let number = self.take(len.into())?;
                self.stack.push(whole(number));
            }
            b'G' => {
                self.take(8)?;
                self.stack.push(Value::Plain);
            }
            b'X' => self.text(4)?,
            0x8c => self.text(1)?,
            0x8d => self.text(8)?,
            b'T' | b'B' => self.plain(4)?,
            b'U' | b'C' => self.plain(1)?,
            0x8e => self.plain(8)?,
            b')' => self.add(Object::Tuple(Vec::new())),
            b']' => self.add(Object::List(Vec::new())),
            b'}' => self.add(Object::Dict(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.add(Object::Tuple(items));
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x84..code {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.add(Object::Tuple(items));
            }
            b'l' => {
                let items = self.pop_to_mark()?;
                self.add(Object::List(items));
            }
            b'd' => {
                let items = self.pop_to_mark()?;
                let pairs = pairs(items)?;
                self.add(Object::Dict(pairs));
            }
            b'a' => {
                let item = self.pop()?;
                self.last_list()?.push(item);
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.last_list()?.extend(items);
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.last_dict()?.push((key, value));
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.last_dict()?.extend(pairs(items)?);
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Name(Name::of(module, name, self.reads)?));
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => {
                    self.stack.push(Value::Name(Name::of(&module, &name, self.reads)?));
                }
                _ => return Err(damaged("a name that is no text")),
            },
            b'R' => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                let made = self.call(&function, &arguments)?;
                self.stack.push(made);
            }
            // The state of an object; a state dictionary's is `_metadata`, the versions of its modules.
            b'b' => {
                let state = self.pop()?;
                let dict = match self.stack.last() {
                    Some(Value::Object(i)) => matches!(self.objects[*i], Object::Dict(_)),
                    _ => false,
                };
                if self.reads == Reads::Arrays {
                    self.build(&state)?;
                } else if !dict {
                    return Err("holds the state of a Python object; tensors and plain containers are expected".into());
                }
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(&id)?;
                self.add(Object::Storage(storage));
            }
            b'q' => {
                let [at] = self.take_array()?;
                self.remember(at.into())?;
            }
            b'r' => {
                let at = u32::from_le_bytes(self.take_array()?);
                self.remember(at)?;
            }
            0x94 => {
                let at = self.memo.len() as u32;
                self.remember(at)?;
            }
            b'h' => {
                let [at] = self.take_array()?;
                self.recall(at.into())?;
            }
            b'j' => {
                let at = u32::from_le_bytes(self.take_array()?);
                self.recall(at)?;
            }
            other => {
                return Err(format!(
                    "holds the pickle instruction 0x{other:02x}, which is not read: none is but those for tensors, arrays and plain containers"
                ));
            }
        }
        Ok(false)
    }

    fn take(&mut self, len: usize) -> Sentence<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..len).ok_or_else(|| damaged("it ends within an instruction"))?;
        self.at += len;
        Ok(taken)
    }

    fn take_array<const N: usize>(&mut self) -> Sentence<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("N bytes"))
    }

    /// Bytes after their length, which has `width` bytes.
    fn counted(&mut self, width: usize) -> Sentence<&'a [u8]> {
        let mut len = [0; 8];
        len[..width].copy_from_slice(self.take(width)?);
        self.take(usize::try_from(u64::from_le_bytes(len)).unwrap_or(usize::MAX))
    }

    fn text(&mut self, width: usize) -> Sentence<()> {
        let text = std::str::from_utf8(self.counted(width)?).map_err(|_| damaged("a text that is not UTF-8"))?;
        self.stack.push(Value::Text(text.into()));
        Ok(())
    }

    fn plain(&mut self, width: usize) -> Sentence<()> {
        let len = self.counted(width)?.len();
        self.stack.push(Value::Bytes(self.at - len, len));
        Ok(())
    }

    fn line(&mut self) -> Sentence<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().take(1000).position(|&b| b == b'\n').ok_or_else(|| damaged("a name without end"))?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| damaged("a name that is not UTF-8"))
    }

    fn add(&mut self, object: Object) {
        self.objects.push(object);
        self.stack.push(Value::Object(self.objects.len() - 1));
    }

    fn pop(&mut self) -> Sentence<Value> {
        // What lies below a mark belongs to the instruction that closes it.
        if self.marks.last() == Some(&self.stack.len()) {
            return Err(damaged("an instruction without its operand"));
        }
        self.stack.pop().ok_or_else(|| damaged("an instruction without its operand"))
    }

    fn pop_to_mark(&mut self) -> Sentence<Vec<Value>> {
        let mark = self.marks.pop().ok_or_else(|| damaged("an end without its beginning"))?;
        Ok(self.stack.split_off(mark))
    }

    fn last_list(&mut self) -> Sentence<&mut Vec<Value>> {
        match self.stack.last() {
            Some(Value::Object(i)) => match &mut self.objects[*i] {
                Object::List(items) => Ok(items),
                _ => Err(damaged("an item of what is no list")),
            },
            _ => Err(damaged("an item of what is no list")),
        }
    }

    fn last_dict(&mut self) -> Sentence<&mut Vec<(Value, Value)>> {
        match self.stack.last() {
            Some(Value::Object(i)) => match &mut self.objects[*i] {
                Object::Dict(entries) => Ok(entries),
                _ => Err(damaged("an entry of what is no dictionary")),
            },
            _ => Err(damaged("an entry of what is no dictionary")),
        }
    }

    fn remember(&mut self, at: u32) -> Sentence<()> {
        let value = self.stack.last().cloned().ok_or_else(|| damaged("nothing to remember"))?;
        self.memo.insert(at, value);
        Ok(())
    }

    fn recall(&mut self, at: u32) -> Sentence<()> {
        let value = self.memo.get(&at).cloned().ok_or_else(|| damaged("it recalls what was never remembered"))?;
        self.stack.push(value);
        Ok(())
    }

    fn tuple(&self, value: &Value) -> Option<&[Value]> {
        match value {
            Value::Object(i) => match &self.objects[*i] {
                Object::Tuple(items) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }

    fn numbers(&self, value: &Value) -> Option<Vec<usize>> {
        let number = |value: &Value| match value {
            Value::Int(number) => usize::try_from(*number).ok(),
            _ => None,
        };
        self.tuple(value)?.iter().map(number).collect()
    }

    /// What the call of a name makes.
    fn call(&mut self, function: &Value, arguments: &Value) -> Sentence<Value> {
        let Value::Name(name) = function else { return Err(damaged("a call of what is no name")) };
        let unfit = || damaged("a call whose arguments do not fit");
        let arguments = self.tuple(arguments).ok_or_else(unfit)?;
        let made = match (name, arguments) {
            (Name::OrderedDict, []) => Object::Dict(Vec::new()),
            (Name::RebuildTensor, [Value::Object(storage), Value::Int(offset), shape, strides, ..]) => {
                let Object::Storage(storage) = &self.objects[*storage] else { return Err(unfit()) };
                let offset = usize::try_from(*offset).map_err(|_| unfit())?;
                let (shape, strides) = self.numbers(shape).zip(self.numbers(strides)).ok_or_else(unfit)?;
                if shape.len() != strides.len() || shape.len() > 8 {
                    return Err(unfit());
                }
                Object::Tensor(View { storage: storage.clone(), offset, shape, strides })
            }
            (Name::RebuildParameter, [tensor @ Value::Object(i), ..])
                if matches!(self.objects[*i], Object::Tensor(_)) =>
            {
                return Ok(tensor.clone());
            }
            (Name::Reconstruct, [Value::Name(Name::NdArray), ..]) => Object::Array(Array::default()),
            (Name::ArrayType, [Value::Bytes(start, len), ..]) => {
                Object::ArrayType(&self.bytes[*start..start + len] == b"u1")
            }
            (Name::ArrayType, [Value::Text(name), ..]) => Object::ArrayType(&**name == "u1"),
            _ => return Err(unfit()),
        };
        self.objects.push(made);
        Ok(Value::Object(self.objects.len() - 1))
    }

    /// Gives the array or element type on the stack its state: to an array (version, shape, type, whether columns come
    /// first, elements), to a type its byte order and the like, which bytes do not have.
    fn build(&mut self, state: &Value) -> Sentence<()> {
        let unfit = || damaged("a state that is no array's");
        let Some(Value::Object(object)) = self.stack.last() else { return Err(unfit()) };
        let object = *object;
        if matches!(self.objects[object], Object::ArrayType(_)) {
            return Ok(());
        }
        let Some([_, shape, Value::Object(of), fortran, Value::Bytes(start, len)]) = self.tuple(state) else {
            return Err(unfit());
        };
        let (Some(shape), Object::ArrayType(bytes)) = (self.numbers(shape), &self.objects[*of]) else {
            return Err(unfit());
        };
        if !bytes || !matches!(fortran, Value::Bool(false)) {
            return Err("holds an array that is not of unsigned bytes in C order".into());
        }
        let array = Array { shape, start: *start, len: *len };
        if array.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)) != Some(array.len) {
            return Err(damaged("an array of another size than its shape"));
        }
        if !matches!(self.objects[object], Object::Array(_)) {
            return Err(unfit());
        }
        self.objects[object] = Object::Array(array);
        Ok(())
    }

    /// The storage of `('storage', class, key, device, numbers)`.
    fn storage(&self, id: &Value) -> Sentence<Storage> {
        match self.tuple(id) {
            Some(
                [Value::Text(kind), Value::Name(Name::Storage(dtype)), Value::Text(key), _, Value::Int(len), rest @ ..],
            ) if &**kind == "storage" && rest.iter().all(|value| matches!(value, Value::None)) => {
                let len = usize::try_from(*len).map_err(|_| damaged("a storage of negative length"))?;
                Ok(Storage { dtype: *dtype, key: key.clone(), len })
            }
            _ => Err(damaged("a reference that is no storage")),
        }
    }
}

/// A whole number of up to eight bytes, two's complement, least significant first.
fn whole(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Plain;
    }
    let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
    let mut number = [sign; 8];
    number[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(number))
}

/// Keys and values in turn.
fn pairs(items: Vec<Value>) -> Sentence<Vec<(Value, Value)>> {
    if !items.len().is_multiple_of(2) {
        return Err(damaged("a key without a value"));
    }
    let mut items = items.into_iter();
    Ok(std::iter::from_fn(|| items.next().zip(items.next())).collect())
}
