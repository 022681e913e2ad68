//! Images as data sets hold them, bytes, on the host or on a GPU: what the forward process reads.

use crate::device::cuda::{Buffer, View};
use crate::tensor::Shape;

/// Images on the host: `(count, h, w, c)` bytes.
#[derive(Clone, Copy, Debug)]
pub struct Images<'a> {
    /// `shape.len()` bytes.
    pub pixels: &'a [u8],
    /// Extent; `n` is the number of images.
    pub shape: Shape,
}

/// Where the images of a batch are.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// On the host; the batch says which of them, and of what class.
    Host(Images<'a>),
    /// On a GPU.
    Cuda {
        /// Bytes of all images.
        pixels: &'a Buffer,
        /// Their extent.
        shape: Shape,
        /// The batch's images, one u32 each: their places in `pixels`, all below the number of images there.
        rows: View<'a>,
        /// Their classes, one u32 each.
        classes: Option<View<'a>>,
    },
}

impl Source<'_> {
    /// Extent of all images there.
    pub fn shape(&self) -> Shape {
        match self {
            Source::Host(images) => images.shape,
            Source::Cuda { shape, .. } => *shape,
        }
    }
}
