//! Tensors: contiguous, channels-last, f32, a shape with named fields and a handle to a pooled buffer.
//!
//! Every tensor is `(n, h, w, c)`. Tokens of attention are `(n, h, w, c)` read as `(n, h*w, c)`; a vector per image is
//! `(n, 1, 1, c)`; a convolution's weight is `(c_out, kh, kw, c_in)` and a linear layer's `(c_out, 1, 1, c_in)`.
//!
//! Deliberately absent: strides, views other than reshape, broadcasting. NCHW and OIHW exist only where files of other
//! tools are read and written.

use std::fmt;
use std::sync::Arc;

use crate::device::{Buffer, Device};

/// Extent of a tensor; `c` is contiguous in memory, then `w`, `h`, `n`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Images (or output channels of a weight).
    pub n: usize,
    /// Rows (or kernel rows of a weight).
    pub h: usize,
    /// Columns (or kernel columns of a weight).
    pub w: usize,
    /// Channels (or input channels of a weight).
    pub c: usize,
}

impl Shape {
    /// `(n, h, w, c)`.
    pub const fn new(n: usize, h: usize, w: usize, c: usize) -> Self {
        Shape { n, h, w, c }
    }

    /// `(1, 1, 1, c)`: a bias, a gain, a table of numbers.
    pub const fn vector(c: usize) -> Self {
        Shape::new(1, 1, 1, c)
    }

    /// Number of elements.
    pub const fn len(&self) -> usize {
        self.n * self.h * self.w * self.c
    }

    /// True if there is no element.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pixels of one image, `h*w`.
    pub const fn pixels(&self) -> usize {
        self.h * self.w
    }

    /// Rows of length `c`, `n*h*w`.
    pub const fn rows(&self) -> usize {
        self.n * self.h * self.w
    }

    /// The same image extent with another number of channels.
    pub const fn with_c(self, c: usize) -> Self {
        Shape { c, ..self }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}x{}", self.n, self.h, self.w, self.c)
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A handle to a buffer and its shape. Cloning clones the handle, not the numbers.
#[derive(Clone)]
pub struct Tensor {
    shape: Shape,
    buffer: Arc<Buffer>,
}

impl Tensor {
    /// A tensor to be written: its contents are whatever the pool's memory held.
    pub fn uninit(device: &Device, shape: Shape) -> Self {
        Tensor { shape, buffer: Arc::new(device.alloc(shape.len())) }
    }

    /// All zero.
    pub fn zeros(device: &Device, shape: Shape) -> Self {
        let mut x = Tensor::uninit(device, shape);
        x.data_mut().fill(0.0);
        x
    }

    /// A copy of `data`, which must hold `shape.len()` numbers.
    pub fn from_slice(device: &Device, shape: Shape, data: &[f32]) -> Self {
        assert_eq!(data.len(), shape.len(), "tensor {shape} from {} numbers", data.len());
        let mut x = Tensor::uninit(device, shape);
        x.data_mut().copy_from_slice(data);
        x
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> usize {
        self.shape.len() * size_of::<f32>()
    }

    /// The elements, in `(n, h, w, c)` order.
    pub fn data(&self) -> &[f32] {
        self.buffer.as_slice()
    }

    /// The elements, to be written; panics if another handle shares the buffer.
    pub fn data_mut(&mut self) -> &mut [f32] {
        Arc::get_mut(&mut self.buffer).expect("only a tensor with one handle is written").as_mut_slice()
    }

    /// True if no other handle shares the buffer, so that it may be written in place.
    pub fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.buffer).is_some()
    }

    /// This tensor if no other handle shares its buffer, otherwise a copy: something to be written in place.
    pub fn into_unique(mut self, device: &Device) -> Self {
        if self.is_unique() { self } else { Tensor::from_slice(device, self.shape, self.data()) }
    }

    /// The same elements under another shape of the same length.
    pub fn reshape(self, shape: Shape) -> Self {
        assert_eq!(self.shape.len(), shape.len(), "reshape {} to {shape}", self.shape);
        Tensor { shape, buffer: self.buffer }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({})", self.shape)
    }
}
