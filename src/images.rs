//! Images as data sets hold them, in bytes, on the host or on a GPU: the input of the forward process.

use crate::device::cuda::{Buffer, View};
use crate::tensor::Shape;

/// Images on the host: `(count, h, w, c)` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// `shape.len()` bytes.
    pub pixels: &'a [u8],
    /// Their shape; `n` is the number of images.
    pub shape: Shape,
}

/// Where the images of a batch are stored.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// On the host; the batch holds the indices and the classes of its images.
    Host(Images<'a>),
    /// On a GPU.
    Cuda {
        /// Bytes of all images, `(count, h, w, c)`.
        pixels: &'a Buffer,
        /// Their shape.
        shape: Shape,
        /// For each image of the batch its index in `pixels`, a u32 below `shape.n`.
        rows: View<'a>,
        /// For each image of the batch its class, a u32.
        classes: Option<View<'a>>,
    },
}

impl Source<'_> {
    /// Shape of all stored images.
    pub fn shape(&self) -> Shape {
        match self {
            Source::Host(images) => images.shape,
            Source::Cuda { shape, .. } => *shape,
        }
    }
}
