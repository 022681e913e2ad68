//! What training steps measure, kept where it is computed until the log asks: on a GPU a step then waits for nothing.
//!
//! A row holds a step's losses by quarter of the timesteps and the norm of its gradient. [`loss`](crate::ops::loss::loss) and
//! [`grad_norm`](crate::ops::grad_norm::grad_norm) write it, [`adam`](crate::ops::adam::adam) reads the clipping factor from it. On a GPU
//! a loss or a norm that is not finite also sets a word that stops every later update, so that the weights are still those of the last good step
//! when the host comes to know of it.

use crate::device::Device;
use crate::device::cuda::{Buffer, Gpu, View};
use crate::error::Result;
use crate::ops::loss::Quarters;

/// Steps a GPU measures before it has to be asked.
const ROWS: usize = 256;

/// Numbers of a row on a GPU, f64: four sums of losses, four counts, the norm, the clipping factor.
const ROW: usize = 10;

/// What one step measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Measured {
    /// Losses by quarter of the timesteps.
    pub quarters: Quarters,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Factor of the gradient.
    pub clip: f64,
}

/// Rows of measurements.
pub enum Meter {
    /// On the host.
    Cpu(Vec<Measured>),
    /// On a GPU.
    Cuda(CudaMeter),
}

/// Rows on a GPU.
pub struct CudaMeter {
    gpu: Gpu,
    /// (ROWS, ROW) f64.
    rows: Buffer,
    /// Two words: blocks of a kernel that are done, 0 between kernels; and whether updates are halted.
    words: Buffer,
    used: usize,
    /// Nothing has been written to the last row yet.
    fresh: bool,
}

impl Meter {
    /// Without rows.
    ///
    /// # Errors
    /// A GPU without enough memory.
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(gpu) = device else { return Ok(Meter::Cpu(Vec::new())) };
        let (mut rows, mut words) = (gpu.alloc(8 * ROWS * ROW)?, gpu.alloc(8)?);
        gpu.fill(&mut rows, 0, 2 * ROWS * ROW, 0)?;
        gpu.fill(&mut words, 0, 2, 0)?;
        Ok(Meter::Cuda(CudaMeter { gpu: gpu.clone(), rows, words, used: 0, fresh: true }))
    }

    /// Begins a step's row; [`read`](Self::read) must have been called if the meter [`is_full`](Self::is_full).
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

    /// True if no other row can be begun.
    pub fn is_full(&self) -> bool {
        matches!(self, Meter::Cuda(meter) if meter.used == ROWS)
    }

    /// The last row, on the host.
    pub fn host_row(&mut self) -> &mut Measured {
        match self {
            Meter::Cpu(rows) => rows.last_mut().expect("a row has begun"),
            Meter::Cuda(_) => panic!("the rows are on a GPU"),
        }
    }

    /// All rows since the last time, in order; waits for a GPU. Updates that a GPU has halted may go on.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn read(&mut self) -> Result<Vec<Measured>> {
        match self {
            Meter::Cpu(rows) => Ok(std::mem::take(rows)),
            Meter::Cuda(meter) => meter.read(),
        }
    }
}

impl CudaMeter {
    fn read(&mut self) -> Result<Vec<Measured>> {
        let mut numbers = vec![0.0f64; self.used * ROW];
        self.gpu.download(&mut numbers, &self.rows)?;
        self.gpu.fill(&mut self.words, 4, 1, 0)?;
        self.used = 0;
        let row = |row: &[f64]| Measured {
            quarters: Quarters::from_parts(
                std::array::from_fn(|quarter| row[quarter]),
                std::array::from_fn(|quarter| row[4 + quarter] as u64),
            ),
            grad_norm: row[8],
            clip: row[9],
        };
        Ok(numbers.chunks_exact(ROW).map(row).collect())
    }

    /// The last row, whether something has been written to it, and the count of finished blocks, for the loss's kernel.
    pub(crate) fn for_loss(&mut self) -> (View<'_>, bool, View<'_>) {
        let accumulate = !std::mem::replace(&mut self.fresh, false);
        (self.row(), accumulate, View::new(&self.words, 0, 4))
    }

    /// The last row.
    pub(crate) fn row(&self) -> View<'_> {
        let used = self.used.checked_sub(1).expect("a row has begun");
        View::new(&self.rows, 8 * ROW * used, 8 * ROW)
    }

    /// Count of finished blocks.
    pub(crate) fn done(&self) -> View<'_> {
        View::new(&self.words, 0, 4)
    }

    /// Whether updates are halted.
    pub(crate) fn halt(&self) -> View<'_> {
        View::new(&self.words, 4, 4)
    }
}
