//! Shapes and element types: what tensors, launches and the kernel table know of an array without holding its elements.

use std::fmt;

/// Extent of a tensor. `c` varies fastest in memory, then `w`, `h` and `n`.
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

    /// `(1, 1, 1, c)`: a bias, a gain, any flat array.
    pub const fn vector(c: usize) -> Self {
        Shape::new(1, 1, 1, c)
    }

    /// Number of elements, `n*h*w*c`.
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

    /// Number of rows of `c` elements, `n*h*w`.
    pub const fn rows(&self) -> usize {
        self.n * self.h * self.w
    }

    /// The same extent with `c` channels.
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

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    #[default]
    F32,
    /// bfloat16, the upper half of an f32. GPU only.
    Bf16,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }
}
