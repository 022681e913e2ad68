//! Images as data sets hold them, in bytes, on the host or on a GPU: the input of the forward process.

use crate::device::cuda::{Buffer, View};
use crate::kernels::clock::Clock;
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
        /// For each image of the batch its index in `pixels`, below `shape.n`.
        rows: Numbers<'a>,
        /// For each image of the batch its class.
        classes: Option<Numbers<'a>>,
    },
}

/// A number for each image of a batch, u32 on a GPU: a part of those of a step's images, which are a part of those of
/// many steps.
#[derive(Clone, Copy)]
pub struct Numbers<'a> {
    buffer: &'a Buffer,
    place: usize,
    first: usize,
    count: usize,
}

impl<'a> Numbers<'a> {
    /// Of the `count` images from image `first` on of a step whose images begin at number `place` of `buffer`.
    pub fn new(buffer: &'a Buffer, place: usize, first: usize, count: usize) -> Self {
        let (end, held) = (place + first + count, buffer.bytes() / 4);
        assert!(end <= held, "numbers {} to {end} of {held}", place + first);
        Numbers { buffer, place, first, count }
    }

    /// Just these; with a clock, which says where its step's images begin, all that would follow if they began at 0, so
    /// that the argument is the same in every step.
    pub(crate) fn view(&self, clock: Option<&Clock>) -> View<'a> {
        match clock {
            None => View::new(self.buffer, 4 * (self.place + self.first), 4 * self.count),
            Some(clock) => {
                assert_eq!(clock.place as usize, self.place, "place of the images by the clock and by the feed");
                View::new(self.buffer, 4 * self.first, self.buffer.bytes() - 4 * self.first)
            }
        }
    }
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
