//! What training steps measure. It stays where it was computed until the log asks for it, so a step on a GPU never
//! waits.
//!
//! A row holds a step's losses by quarter of the timesteps, the norm of its gradient and the clipping factor. `loss`
//! and `grad_norm` write it; `adam` reads the clipping factor. On a GPU a loss or norm that is not finite also sets a
//! halt flag that blocks every later update, so the weights are still those of the last good step when the host finds
//! out.

use crate::device::Device;
use crate::device::cuda::{Buffer, Gpu, View, ViewMut};
use crate::error::Result;
use crate::kernels::clock::Clock;
use crate::kernels::meter::{MeterRow, QUARTERS};

/// Steps a GPU can record before its meter must be read.
const ROWS: usize = 256;

/// Number of quarters.
const PARTS: usize = QUARTERS as usize;

/// Losses summed by the quarter of the chain each image was noised to. The mean over all timesteps hides that the later
/// quarters are nearly solved while the first is not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Quarters {
    sums: [f64; PARTS],
    counts: [u64; PARTS],
}

impl Quarters {
    /// From the sum and the number of losses in each quarter.
    pub fn from_parts(sums: [f64; PARTS], counts: [u64; PARTS]) -> Self {
        Quarters { sums, counts }
    }

    /// Adds one loss per image, at timestep `t` of a chain of `timesteps`.
    pub fn add(&mut self, t: &[u32], timesteps: u32, per_image: &[f64]) {
        assert_eq!(t.len(), per_image.len(), "one loss for each of the images");
        for (&t, loss) in t.iter().zip(per_image) {
            let quarter = (u64::from(QUARTERS) * u64::from(t) / u64::from(timesteps)) as usize;
            self.sums[quarter] += loss;
            self.counts[quarter] += 1;
        }
    }

    /// Adds the sums and counts of another.
    pub fn merge(&mut self, other: &Quarters) {
        for quarter in 0..PARTS {
            self.sums[quarter] += other.sums[quarter];
            self.counts[quarter] += other.counts[quarter];
        }
    }

    /// Mean loss of each quarter, from least noise to most; `None` for a quarter without images.
    pub fn means(&self) -> [Option<f64>; PARTS] {
        std::array::from_fn(|q| (self.counts[q] > 0).then(|| self.sums[q] / self.counts[q] as f64))
    }

    /// Mean loss over all images; `None` if there are none.
    pub fn mean(&self) -> Option<f64> {
        let count: u64 = self.counts.iter().sum();
        (count > 0).then(|| self.sums.iter().sum::<f64>() / count as f64)
    }
}

/// What one step measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Losses by quarter of the timesteps.
    pub quarters: Quarters,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Clipping factor, which multiplies the gradient.
    pub clip: f64,
    /// Sum over the images of T times a term of the bound, in bits per dimension, if the loss has one.
    pub vlb_sum: f64,
    /// Of a classifier: 1 for each image whose class it tells rightly, else 0, by quarter of the timesteps.
    pub right: Quarters,
}

impl From<MeterRow> for Measured {
    fn from(row: MeterRow) -> Self {
        let counts = row.counts.map(|count| count as u64);
        Measured {
            quarters: Quarters::from_parts(row.loss_sums, counts),
            grad_norm: row.grad_norm,
            clip: row.clip,
            vlb_sum: row.vlb_sum,
            right: Quarters::from_parts(row.right, counts),
        }
    }
}

/// Rows of measurements.
pub enum Meter {
    /// On the host.
    Cpu(Vec<Measured>),
    /// On a GPU.
    Cuda(Box<CudaMeter>),
}

/// Rows on a GPU.
pub struct CudaMeter {
    gpu: Gpu,
    /// [`ROWS`] times [`MeterRow`].
    rows: Buffer,
    /// One word: blocks of the running kernel that have finished; 0 between kernels.
    done: Buffer,
    /// One word: nonzero if updates are halted.
    halt: Buffer,
    used: usize,
    /// No loss has been written to the last row yet.
    fresh: bool,
}

/// What a measuring kernel writes to.
pub(crate) struct ToWrite<'a> {
    /// The step's row; with a clock, which names the row, all rows.
    pub rows: ViewMut<'a>,
    /// Number of finished blocks.
    pub done: &'a mut Buffer,
    /// The halt flag.
    pub halt: &'a mut Buffer,
    /// The row already holds losses; new ones are added to them.
    pub has_losses: bool,
    /// Set it to false after writing losses.
    pub fresh: &'a mut bool,
}

impl Meter {
    /// A meter with no rows begun.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(gpu) = device else { return Ok(Meter::Cpu(Vec::new())) };
        let bytes = ROWS * size_of::<MeterRow>();
        let [mut rows, mut done, mut halt] = [gpu.alloc(bytes)?, gpu.alloc(4)?, gpu.alloc(4)?];
        gpu.fill(&mut rows, 0, bytes / 4, 0)?;
        gpu.fill(&mut done, 0, 1, 0)?;
        gpu.fill(&mut halt, 0, 1, 0)?;
        Ok(Meter::Cuda(Box::new(CudaMeter { gpu: gpu.clone(), rows, done, halt, used: 0, fresh: true })))
    }

    /// Begins a step's row. A meter that [`is_full`](Self::is_full) must be [`read`](Self::read) first.
    pub fn begin(&mut self) {
        match self {
            Meter::Cpu(rows) => rows.push(Measured::default()),
            Meter::Cuda(meter) => {
                assert!(meter.used < ROWS, "a meter of {ROWS} rows is full");
                meter.used += 1;
                meter.fresh = true;
            }
        }
    }

    /// The last row begun holds nothing yet, whatever has been captured: for work that is launched twice.
    pub fn restart(&mut self) {
        if let Meter::Cuda(meter) = self {
            meter.fresh = true;
        }
    }

    /// Index of the last row begun, from 0.
    pub fn row(&self) -> u32 {
        let used = match self {
            Meter::Cpu(rows) => rows.len(),
            Meter::Cuda(meter) => meter.used,
        };
        used.checked_sub(1).and_then(|row| u32::try_from(row).ok()).expect("a row has begun")
    }

    /// True if no further row can be begun.
    pub fn is_full(&self) -> bool {
        matches!(self, Meter::Cuda(meter) if meter.used == ROWS)
    }

    /// The last row. CPU only: panics if the rows are on a GPU.
    pub fn host_row(&mut self) -> &mut Measured {
        match self {
            Meter::Cpu(rows) => rows.last_mut().expect("a row has begun"),
            Meter::Cuda(_) => panic!("the rows are on a GPU"),
        }
    }

    /// All rows since the last call, in order. Waits for the GPU and clears its halt flag.
    ///
    /// # Errors
    /// A GPU error.
    pub fn read(&mut self) -> Result<Vec<Measured>> {
        match self {
            Meter::Cpu(rows) => Ok(std::mem::take(rows)),
            Meter::Cuda(meter) => meter.read(),
        }
    }
}

impl CudaMeter {
    fn read(&mut self) -> Result<Vec<Measured>> {
        let mut rows = vec![<MeterRow as bytemuck::Zeroable>::zeroed(); self.used];
        self.gpu.download(&mut rows, &self.rows)?;
        self.gpu.fill(&mut self.halt, 0, 1, 0)?;
        self.used = 0;
        Ok(rows.into_iter().map(Measured::from).collect())
    }

    /// Offset and length, in bytes, of what kernels get as their row. With a clock it is all rows, so that the argument
    /// is the same in every step.
    fn part(&self, clock: Option<&Clock>) -> (usize, usize) {
        let row = self.used.checked_sub(1).expect("a row has begun");
        match clock {
            None => (size_of::<MeterRow>() * row, size_of::<MeterRow>()),
            Some(clock) => {
                assert_eq!(clock.row as usize, row, "row of the clock and of the meter");
                (0, self.rows.bytes())
            }
        }
    }

    /// The buffers a measuring kernel writes to.
    pub(crate) fn for_writing(&mut self, clock: Option<&Clock>) -> ToWrite<'_> {
        let (offset, bytes) = self.part(clock);
        let rows = ViewMut::new(&mut self.rows, offset, bytes);
        let (done, halt, has_losses, fresh) = (&mut self.done, &mut self.halt, !self.fresh, &mut self.fresh);
        ToWrite { rows, done, halt, has_losses, fresh }
    }

    /// The step's row (with a clock, all rows), for reading.
    pub(crate) fn rows(&self, clock: Option<&Clock>) -> View<'_> {
        let (offset, bytes) = self.part(clock);
        View::new(&self.rows, offset, bytes)
    }

    /// The halt flag: one word, nonzero if updates are halted.
    pub(crate) fn halt(&self) -> &Buffer {
        &self.halt
    }
}
