//! Tensors: contiguous and channels-last. A shape with named fields, an element type and a handle to a pooled buffer.
//!
//! On the CPU every tensor is f32. On a GPU activations and their gradients may be bf16, and only [`Tensor::host`]
//! brings elements back to the host. On the meta device a tensor has no elements.
//!
//! Every tensor is `(n, h, w, c)`. Tokens of attention are `(n, h, w, c)` read as `(n, h*w, c)`; a vector per image is
//! `(n, 1, 1, c)`; a convolution's weight is `(c_out, kh, kw, c_in)` and a linear layer's `(c_out, 1, 1, c_in)`.
//!
//! Deliberately absent: strides, views other than reshape, broadcasting. NCHW and OIHW exist only where other tools'
//! files are read and written.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use crate::device::cuda::{Array, Launch, View, ViewMut};
use crate::device::{Buffer, Device, cuda};
use crate::error::Result;
pub use crate::shape::{DType, Shape};

/// A shape, an element type and a handle to a buffer. Cloning clones the handle, not the elements.
#[derive(Clone)]
pub struct Tensor {
    shape: Shape,
    dtype: DType,
    buffer: Arc<Buffer>,
}

impl Tensor {
    /// A tensor with arbitrary contents: whatever the pool's memory held.
    ///
    /// # Errors
    /// Out of GPU memory; likewise for every function here that makes a tensor.
    pub fn uninit(device: &Device, dtype: DType, shape: Shape) -> Result<Self> {
        Ok(Tensor { shape, dtype, buffer: Arc::new(device.alloc(dtype, shape.len())?) })
    }

    /// All zero. Panics unless the size is a whole number of 32-bit words.
    ///
    /// # Errors
    /// See [`Tensor::uninit`].
    pub fn zeros_as(device: &Device, dtype: DType, shape: Shape) -> Result<Self> {
        let mut x = Tensor::uninit(device, dtype, shape)?;
        let bytes = x.bytes();
        assert!(bytes.is_multiple_of(4), "zeros of {bytes} bytes");
        x.zero(0..bytes / 4)?;
        Ok(x)
    }

    /// All zero, f32.
    ///
    /// # Errors
    /// See [`Tensor::uninit`].
    pub fn zeros(device: &Device, shape: Shape) -> Result<Self> {
        Tensor::full(device, shape, 0.0)
    }

    /// `value` everywhere, f32.
    ///
    /// # Errors
    /// See [`Tensor::uninit`].
    pub fn full(device: &Device, shape: Shape, value: f32) -> Result<Self> {
        let mut x = Tensor::uninit(device, DType::F32, shape)?;
        match x.buffer_mut() {
            Buffer::Cpu(buffer) => buffer.as_mut_slice().fill(value),
            Buffer::Cuda(buffer) => buffer.gpu().clone().fill(buffer, 0, shape.len(), value.to_bits())?,
            Buffer::Meta(_) => {}
        }
        Ok(x)
    }

    /// A copy of `data`, which must hold `shape.len()` numbers, f32.
    ///
    /// # Errors
    /// See [`Tensor::uninit`].
    pub fn from_slice(device: &Device, shape: Shape, data: &[f32]) -> Result<Self> {
        Tensor::from_slice_as(device, DType::F32, shape, data)
    }

    /// A copy of `data`, which must hold `shape.len()` numbers, rounded to `dtype`.
    ///
    /// # Errors
    /// See [`Tensor::uninit`].
    pub fn from_slice_as(device: &Device, dtype: DType, shape: Shape, data: &[f32]) -> Result<Self> {
        let mut x = Tensor::uninit(device, dtype, shape)?;
        x.write(data)?;
        Ok(x)
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A number shared by all handles of one buffer, and by no other buffer while one of them lives.
    pub fn buffer_id(&self) -> usize {
        Arc::as_ptr(&self.buffer).addr()
    }

    /// Size of the elements in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.len() * self.dtype.size()
    }

    /// The elements, in `(n, h, w, c)` order. CPU only.
    pub fn data(&self) -> &[f32] {
        match &*self.buffer {
            Buffer::Cpu(buffer) => buffer.as_slice(),
            Buffer::Cuda(_) => panic!("the elements of {self:?} are on a GPU"),
            Buffer::Meta(_) => panic!("{self:?} is a shape alone"),
        }
    }

    /// The elements, mutable. CPU only. Panics if another handle shares the buffer.
    pub fn data_mut(&mut self) -> &mut [f32] {
        match self.buffer_mut() {
            Buffer::Cpu(buffer) => buffer.as_mut_slice(),
            Buffer::Cuda(_) => panic!("the elements are on a GPU"),
            Buffer::Meta(_) => panic!("a tensor that is a shape alone"),
        }
    }

    /// The elements as f32 on the host, in `(n, h, w, c)` order: borrowed on the CPU, copied from a GPU, for which it
    /// waits.
    ///
    /// # Errors
    /// A GPU error, including one from a kernel launched earlier.
    pub fn host(&self) -> Result<Cow<'_, [f32]>> {
        match (&*self.buffer, self.dtype) {
            (Buffer::Cpu(buffer), _) => Ok(Cow::Borrowed(buffer.as_slice())),
            (Buffer::Cuda(buffer), DType::F32) => {
                let mut data = vec![0.0; self.shape.len()];
                buffer.gpu().download(&mut data, buffer)?;
                Ok(Cow::Owned(data))
            }
            (Buffer::Cuda(buffer), DType::Bf16) => {
                let mut data = vec![bf16::ZERO; self.shape.len()];
                buffer.gpu().download(&mut data, buffer)?;
                Ok(Cow::Owned(data.into_iter().map(f32::from).collect()))
            }
            (Buffer::Meta(_), _) => panic!("{self:?} is a shape alone"),
        }
    }

    /// A copy of [`host`](Self::host).
    ///
    /// # Errors
    /// The same.
    pub fn to_vec(&self) -> Result<Vec<f32>> {
        self.host().map(Cow::into_owned)
    }

    /// Overwrites all elements with `data`, rounded to the tensor's type. Panics if the lengths differ.
    ///
    /// # Errors
    /// A GPU error.
    pub fn write(&mut self, data: &[f32]) -> Result<()> {
        assert_eq!(data.len(), self.shape.len(), "tensor {} from {} numbers", self.shape, data.len());
        let dtype = self.dtype;
        match (self.buffer_mut(), dtype) {
            (Buffer::Cpu(buffer), _) => buffer.as_mut_slice().copy_from_slice(data),
            (Buffer::Cuda(buffer), DType::F32) => buffer.gpu().clone().upload(buffer, data)?,
            (Buffer::Cuda(buffer), DType::Bf16) => {
                let rounded: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
                buffer.gpu().clone().upload(buffer, &rounded)?;
            }
            (Buffer::Meta(_), _) => {}
        }
        Ok(())
    }

    /// Zeroes elements `range` of an f32 tensor, or those 32-bit words of any other.
    ///
    /// # Errors
    /// A GPU error.
    pub(crate) fn zero(&mut self, range: Range<usize>) -> Result<()> {
        match self.buffer_mut() {
            Buffer::Cpu(buffer) => buffer.as_mut_slice()[range].fill(0.0),
            Buffer::Cuda(buffer) => buffer.gpu().clone().fill(buffer, 4 * range.start, range.len(), 0)?,
            Buffer::Meta(_) => {}
        }
        Ok(())
    }

    /// Copies all elements of `from`, of the same type on the same device, to those from `first` on.
    ///
    /// # Errors
    /// A GPU error.
    pub(crate) fn put(&mut self, first: usize, from: &Tensor) -> Result<()> {
        let (dtype, len) = (self.dtype, from.shape.len());
        assert!(dtype == from.dtype && first + len <= self.shape.len(), "{from:?} into {self:?} from {first} on");
        match (self.buffer_mut(), &*from.buffer) {
            (Buffer::Cpu(to), Buffer::Cpu(from)) => {
                to.as_mut_slice()[first..first + len].copy_from_slice(from.as_slice());
            }
            (Buffer::Cuda(to), Buffer::Cuda(from)) => from.gpu().copy(to, first * dtype.size(), from)?,
            (Buffer::Meta(_), Buffer::Meta(_)) => {}
            _ => panic!("{from:?} is on another device"),
        }
        Ok(())
    }

    /// True if no other handle shares the buffer, so it may be written in place.
    pub fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.buffer).is_some()
    }

    /// A tensor that may be written in place: this one if no other handle shares its buffer, otherwise a copy.
    ///
    /// # Errors
    /// See [`Tensor::uninit`].
    pub fn into_unique(mut self, device: &Device) -> Result<Self> {
        if self.is_unique() {
            return Ok(self);
        }
        let mut copy = Tensor::uninit(device, self.dtype, self.shape)?;
        copy.put(0, &self)?;
        Ok(copy)
    }

    /// The same elements with another shape. Panics if the lengths differ.
    pub fn reshape(self, shape: Shape) -> Self {
        assert_eq!(self.shape.len(), shape.len(), "reshape {} to {shape}", self.shape);
        Tensor { shape, ..self }
    }

    /// The device memory behind a GPU tensor.
    pub(crate) fn gpu_buffer(&self) -> &cuda::Buffer {
        match &*self.buffer {
            Buffer::Cuda(buffer) => buffer,
            Buffer::Cpu(_) | Buffer::Meta(_) => panic!("{self:?} is not on a GPU"),
        }
    }

    /// The same, mutable; panics if another handle shares the buffer.
    pub(crate) fn gpu_buffer_mut(&mut self) -> &mut cuda::Buffer {
        match self.buffer_mut() {
            Buffer::Cuda(buffer) => buffer,
            Buffer::Cpu(_) | Buffer::Meta(_) => panic!("a tensor that is not on a GPU"),
        }
    }

    /// A GPU tensor as a kernel reads it.
    pub(crate) fn array(&self) -> Array<'_> {
        Array { buffer: self.gpu_buffer(), shape: self.shape, dtype: self.dtype }
    }

    /// Elements `range` of a GPU tensor.
    pub(crate) fn view(&self, range: Range<usize>) -> View<'_> {
        let size = self.dtype.size();
        View::new(self.gpu_buffer(), range.start * size, range.len() * size)
    }

    /// The same, mutable; panics if another handle shares the buffer.
    pub(crate) fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        let size = self.dtype.size();
        ViewMut::new(self.gpu_buffer_mut(), range.start * size, range.len() * size)
    }

    fn buffer_mut(&mut self) -> &mut Buffer {
        Arc::get_mut(&mut self.buffer).expect("only a tensor with one handle is written")
    }
}

/// Tensors as kernel arguments.
impl<'a> Launch<'a> {
    /// A tensor that the kernel reads.
    pub fn read(self, x: &'a Tensor) -> Self {
        self.array(x.array())
    }

    /// A tensor that the kernel reads, or a null pointer.
    pub fn read_opt(self, x: Option<&'a Tensor>) -> Self {
        self.array_opt(x.map(Tensor::array))
    }

    /// A tensor that the kernel writes; no other handle may share its buffer.
    pub fn write(self, x: &'a mut Tensor) -> Self {
        let (shape, dtype) = (x.shape, x.dtype);
        self.array_mut(x.gpu_buffer_mut(), shape, dtype)
    }

    /// The address of a tensor that the kernel reads, for a struct among the arguments.
    pub fn read_in_struct(&mut self, x: &'a Tensor) -> u64 {
        self.address_in_struct(x.view(0..x.shape.len()))
    }

    /// The same of one that the kernel writes; no other handle may share its buffer.
    pub fn write_in_struct(&mut self, x: &'a mut Tensor) -> u64 {
        let len = x.shape.len();
        self.address_in_struct_mut(x.view_mut(0..len))
    }

    /// A tensor that the kernel writes, or a null pointer.
    pub fn write_opt(self, x: Option<&'a mut Tensor>) -> Self {
        match x {
            Some(x) => self.write(x),
            None => self.null(),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}, {:?})", self.shape, self.dtype)
    }
}
