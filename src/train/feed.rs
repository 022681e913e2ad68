//! The way of a data set's images to where steps are computed.
//!
//! On the CPU there is none: a step reads the data set. A GPU holds the whole data set where it fits, and the numbers
//! of the images of many steps ahead, copied in one go, so that a step copies nothing. Where the data set does not fit,
//! each batch's bytes go up through page-locked memory, two batches in turn, so that the host fills one while the other
//! is copied.

use std::ops::Range;
use std::sync::Arc;

use crate::data::{Dataset, Rows};
use crate::device::Device;
use crate::device::cuda::{Buffer, Gpu, Staging, View};
use crate::error::Result;
use crate::images::{Images, Source};
use crate::tensor::Shape;

/// Image numbers that go up at a time: some hundreds of steps of small images, 256 KiB.
const WINDOW: u64 = 1 << 16;

/// All bytes of a data set on a GPU.
#[derive(Clone)]
pub struct Resident {
    pixels: Arc<Buffer>,
    shape: Shape,
}

impl Resident {
    /// Copies the images to the GPU.
    ///
    /// # Errors
    /// A GPU without enough memory.
    pub fn new(gpu: &Gpu, images: Images<'_>) -> Result<Self> {
        let mut pixels = gpu.alloc(images.pixels.len())?;
        gpu.upload(&mut pixels, images.pixels)?;
        Ok(Resident { pixels: Arc::new(pixels), shape: images.shape })
    }
}

/// Hands out batches of one sequence of images: the training images in the order of the steps, or the held-out ones.
pub enum Feed {
    /// Steps read the data set itself.
    Host,
    /// The data set is on the GPU.
    Resident(ResidentFeed),
    /// Batches go up one by one.
    Staged(StagedFeed),
}

/// The numbers of the next images of a resident data set.
pub struct ResidentFeed {
    gpu: Gpu,
    resident: Resident,
    rows: Option<Buffer>,
    classes: Option<Buffer>,
    /// Places of the sequence that `rows` holds.
    window: Range<u64>,
}

/// The last batches of a data set that stays on the host.
pub struct StagedFeed {
    staging: Staging,
    pixels: Option<Buffer>,
    rows: Option<Buffer>,
    classes: Option<Buffer>,
}

impl Feed {
    /// For a device; `resident` is the data set on it, where it fits.
    pub fn new(device: &Device, resident: Option<&Resident>) -> Self {
        match (device, resident) {
            (Device::Cpu(_) | Device::Meta(_), _) => Feed::Host,
            (Device::Cuda(gpu), Some(resident)) => Feed::Resident(ResidentFeed {
                gpu: gpu.clone(),
                resident: resident.clone(),
                rows: None,
                classes: None,
                window: 0..0,
            }),
            (Device::Cuda(gpu), None) => {
                Feed::Staged(StagedFeed { staging: gpu.staging(), pixels: None, rows: None, classes: None })
            }
        }
    }

    /// Where a kernel finds the images of `data` at `places` of the sequence. `rows_of` says what stands at a range of
    /// places, as far as the sequence goes.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn source<'a>(
        &'a mut self,
        data: &'a Dataset,
        places: Range<u64>,
        mut rows_of: impl FnMut(Range<u64>) -> Rows,
    ) -> Result<Source<'a>> {
        match self {
            Feed::Host => Ok(Source::Host(data.images())),
            Feed::Resident(feed) => {
                if places.start < feed.window.start || places.end > feed.window.end {
                    let ahead = places.start..places.start + WINDOW.max(places.end - places.start);
                    let Rows { rows, classes } = rows_of(ahead);
                    // The kernels trust them.
                    let beyond = rows.iter().find(|&&row| row as usize >= feed.resident.shape.n);
                    assert!(beyond.is_none(), "image {beyond:?} of {}", feed.resident.shape.n);
                    feed.window = places.start..places.start + rows.len() as u64;
                    assert!(
                        places.end <= feed.window.end,
                        "images {places:?} of a sequence that ends at {:?}",
                        feed.window
                    );
                    feed.rows = Some(up(&feed.gpu, feed.rows.take(), &rows)?);
                    feed.classes = classes.map(|c| up(&feed.gpu, feed.classes.take(), &c)).transpose()?;
                }
                let (offset, bytes) =
                    (4 * (places.start - feed.window.start) as usize, 4 * (places.end - places.start) as usize);
                let view = |buffer: &'a Buffer| View::new(buffer, offset, bytes);
                Ok(Source::Cuda {
                    pixels: &feed.resident.pixels,
                    shape: feed.resident.shape,
                    rows: view(feed.rows.as_ref().expect("a window is loaded")),
                    classes: feed.classes.as_ref().map(view),
                })
            }
            Feed::Staged(feed) => {
                let Rows { rows, classes } = rows_of(places);
                let gpu = feed.staging.gpu().clone();
                let bytes = rows.len() * data.extent().len();
                let pixels = feed.staging.upload(feed.pixels.take(), bytes, |to| data.gather(&rows, to))?;
                let in_order: Vec<u32> = (0..rows.len() as u32).collect();
                feed.rows = Some(up(&gpu, feed.rows.take(), &in_order)?);
                feed.classes = classes.map(|c| up(&gpu, feed.classes.take(), &c)).transpose()?;
                let whole = |buffer: &'a Buffer| View::new(buffer, 0, buffer.bytes());
                Ok(Source::Cuda {
                    pixels: feed.pixels.insert(pixels),
                    shape: Shape { n: rows.len(), ..data.images().shape },
                    rows: whole(feed.rows.as_ref().expect("just made")),
                    classes: feed.classes.as_ref().map(whole),
                })
            }
        }
    }
}

/// `data` on the GPU, in `old` if that has its size.
fn up(gpu: &Gpu, old: Option<Buffer>, data: &[u32]) -> Result<Buffer> {
    let mut buffer = match old.filter(|old| old.bytes() == 4 * data.len()) {
        Some(old) => old,
        None => gpu.alloc(4 * data.len())?,
    };
    gpu.upload(&mut buffer, data)?;
    Ok(buffer)
}
