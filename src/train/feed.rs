//! Brings the images of a data set to the device.
//!
//! On the CPU there is nothing to do: a step reads the data set. If the whole data set fits on a GPU, it stays there,
//! and image indices for many steps ahead are uploaded at once, so most steps upload none. Otherwise the images of each
//! step are uploaded on a stream of their own ([`Staging`]), while the kernels of the step before still run.
//!
//! Either way a step's images are on the GPU, in buffers that stay where they are, before the first of its kernels is
//! launched: they can be captured in a graph, which no copy from the host's memory can.

use std::ops::Range;
use std::sync::Arc;

use crate::data::{Dataset, Rows};
use crate::device::Device;
use crate::device::cuda::{Buffer, Gpu, Staging};
use crate::error::Result;
use crate::images::{Images, Numbers, Source};
use crate::tensor::Shape;

/// Image indices uploaded at a time, 256 KiB: some hundreds of steps of small images.
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

/// Hands out batches from one sequence of images: the training images in the order of the steps, or the held-out
/// images.
pub enum Feed {
    /// Steps read the data set itself.
    Host,
    /// The data set is on the GPU.
    Resident(ResidentFeed),
    /// The images of each step are uploaded.
    Staged(StagedFeed),
}

/// The indices of the next images of a resident data set.
pub struct ResidentFeed {
    gpu: Gpu,
    resident: Resident,
    rows: Option<Buffer>,
    classes: Option<Buffer>,
    /// Positions of the sequence that `rows` covers.
    window: Range<u64>,
}

/// The buffers for batches of a data set that stays on the host.
pub struct StagedFeed {
    staging: Staging,
    pixels: Option<Buffer>,
    /// The numbers from 0 on.
    rows: Option<Buffer>,
    classes: Option<Buffer>,
    /// Positions of the sequence of which the images are there.
    step: Range<u64>,
}

impl Feed {
    /// A feed for a device; `resident` is the data set on it, if it fits.
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
                Feed::Staged(StagedFeed { staging: gpu.staging(), pixels: None, rows: None, classes: None, step: 0..0 })
            }
        }
    }

    /// The images of `data` at positions `places` of the sequence. `rows_of` returns the images at a range of
    /// positions, cut off at the end of the sequence.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn source<'a>(
        &'a mut self,
        data: &'a Dataset,
        places: Range<u64>,
        rows_of: impl FnMut(Range<u64>) -> Rows,
    ) -> Result<Source<'a>> {
        self.begin(data, places.clone(), rows_of)?;
        Ok(self.part(data, places.clone(), places))
    }

    /// Brings the images of a step, those of `data` at positions `places` of the sequence, to the GPU, and returns the
    /// [place](crate::kernels::clock::Clock::place) where they begin. `rows_of` as in [`source`](Self::source).
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn begin(
        &mut self,
        data: &Dataset,
        places: Range<u64>,
        mut rows_of: impl FnMut(Range<u64>) -> Rows,
    ) -> Result<u32> {
        match self {
            Feed::Host => Ok(0),
            Feed::Resident(feed) => {
                if places.start < feed.window.start || places.end > feed.window.end {
                    let ahead = places.start..places.start + WINDOW.max(places.end - places.start);
                    let Rows { rows, classes } = rows_of(ahead);
                    // The kernels do not check them.
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
                Ok((places.start - feed.window.start) as u32)
            }
            Feed::Staged(feed) => {
                let Rows { rows, classes } = rows_of(places.clone());
                let gpu = feed.staging.gpu().clone();
                let bytes = rows.len() * data.extent().len();
                // Until all of it is there, nothing is.
                feed.step = 0..0;
                feed.pixels = Some(feed.staging.upload(feed.pixels.take(), bytes, |to| data.gather(&rows, to))?);
                if feed.rows.as_ref().is_none_or(|old| old.bytes() != 4 * rows.len()) {
                    let in_order: Vec<u32> = (0..rows.len() as u32).collect();
                    feed.rows = Some(up(&gpu, None, &in_order)?);
                }
                feed.classes = classes.map(|c| up(&gpu, feed.classes.take(), &c)).transpose()?;
                feed.step = places.start..places.start + rows.len() as u64;
                Ok(0)
            }
        }
    }

    /// The images at positions `places`, which are among those of the `step` that has [begun](Self::begin).
    pub fn part<'a>(&'a self, data: &'a Dataset, step: Range<u64>, places: Range<u64>) -> Source<'a> {
        assert!(step.start <= places.start && places.end <= step.end, "images {places:?} of a step of {step:?}");
        let (first, count) = ((places.start - step.start) as usize, (places.end - places.start) as usize);
        let (pixels, shape, place, rows, classes) = match self {
            Feed::Host => return Source::Host(data.images()),
            Feed::Resident(ResidentFeed { resident, rows, classes, window, .. }) => {
                assert!(window.start <= step.start && step.end <= window.end, "images {step:?}, loaded are {window:?}");
                (&*resident.pixels, resident.shape, (step.start - window.start) as usize, rows, classes)
            }
            Feed::Staged(StagedFeed { pixels, rows, classes, step: loaded, .. }) => {
                assert_eq!(step, *loaded, "images of the step and those loaded");
                let shape = Shape { n: (step.end - step.start) as usize, ..data.images().shape };
                (pixels.as_ref().expect("a step has begun"), shape, 0, rows, classes)
            }
        };
        let numbers = |buffer: &'a Buffer| Numbers::new(buffer, place, first, count);
        let rows = numbers(rows.as_ref().expect("a step has begun"));
        Source::Cuda { pixels, shape, rows, classes: classes.as_ref().map(numbers) }
    }
}

/// Uploads `data`, into `old` if it has the right size.
fn up(gpu: &Gpu, old: Option<Buffer>, data: &[u32]) -> Result<Buffer> {
    let mut buffer = match old.filter(|old| old.bytes() == 4 * data.len()) {
        Some(old) => old,
        None => gpu.alloc(4 * data.len())?,
    };
    gpu.upload(&mut buffer, data)?;
    Ok(buffer)
}
