//! What training steps measure. It stays where it was computed until the log asks for it, so a step on a GPU never
//! waits.
//!
//! A row holds a step's losses by quarter of the timesteps, the norm of its gradient and the clipping factor. `loss`
//! and `grad_norm` write it; `adam` reads the clipping factor. On a GPU a loss or norm that is not finite also sets a
//! halt flag that blocks every later update, so the weights are still those of the last good step when the host finds
//! out.
//!
//! A row is the sum of its parts, in order: on the host of its images, on a GPU of its micro-batches, each of which has
//! a [`MeterRow`] of its own. So whoever has the parts of a step's micro-batches, wherever they were computed, gets the
//! same sums.

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

    /// The same of losses with the weights of importance sampling, drawn from a chain of `timesteps`. The weights make
    /// up for how often a quarter is drawn, so it is not the number drawn in it that its sum is divided by, but the
    /// share of all that uniform sampling would draw there: unbiased, and over the quarters the mean over all images.
    pub fn means_of_weighted(&self, timesteps: u32) -> [Option<f64>; PARTS] {
        let (images, timesteps) = (self.counts.iter().sum::<u64>() as f64, u64::from(timesteps));
        let first = |q: usize| (q as u64 * timesteps).div_ceil(u64::from(QUARTERS)) as f64;
        let uniform = |q: usize| images * (first(q + 1) - first(q)) / timesteps as f64;
        std::array::from_fn(|q| (self.counts[q] > 0).then(|| self.sums[q] / uniform(q)))
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

impl Measured {
    /// Adds what `part` has of losses, right answers and the bound.
    pub fn add(&mut self, part: &Measured) {
        self.quarters.merge(&part.quarters);
        self.right.merge(&part.right);
        self.vlb_sum += part.vlb_sum;
    }
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

impl From<&Measured> for MeterRow {
    fn from(measured: &Measured) -> Self {
        MeterRow {
            loss_sums: measured.quarters.sums,
            counts: measured.quarters.counts.map(|count| count as f64),
            grad_norm: measured.grad_norm,
            clip: measured.clip,
            vlb_sum: measured.vlb_sum,
            right: measured.right.sums,
        }
    }
}

/// A row as it was written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// Norm and clipping factor, and no losses.
    pub step: Measured,
    /// The parts, without norm and clipping factor.
    pub parts: Vec<Measured>,
}

impl Row {
    /// The sum of its parts, in order, with norm and clipping factor.
    pub fn measured(&self) -> Measured {
        let mut sum = self.step;
        self.parts.iter().for_each(|part| sum.add(part));
        sum
    }
}

/// Rows of measurements.
pub enum Meter {
    /// On the host.
    Cpu(Vec<Row>),
    /// On a GPU.
    Cuda(Box<CudaMeter>),
}

/// Rows on a GPU.
pub struct CudaMeter {
    gpu: Gpu,
    /// [`ROWS`] times a [`MeterRow`] for each micro-batch of a step. Norm and clipping factor are in the first of them.
    rows: Buffer,
    /// One word: blocks of the running kernel that have finished; 0 between kernels.
    done: Buffer,
    /// One word: nonzero if updates are halted.
    halt: Buffer,
    /// Micro-batches of a step.
    micro_batches: usize,
    /// That which is measured.
    micro_batch: usize,
    /// Steps begun.
    used: usize,
    /// No loss of the micro-batch has been written yet.
    fresh: bool,
}

/// What a measuring kernel writes to.
pub(crate) struct ToWrite<'a> {
    /// The micro-batch's row; with a clock, which says how much further on it is, that of the meter's first step and
    /// what follows.
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
    /// A meter with no rows begun, of steps of one micro-batch.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device) -> Result<Self> {
        Meter::of_micro_batches(device, 1)
    }

    /// The same of steps of so many micro-batches.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn of_micro_batches(device: &Device, micro_batches: usize) -> Result<Self> {
        let Device::Cuda(gpu) = device else { return Ok(Meter::Cpu(Vec::new())) };
        let bytes = ROWS * micro_batches * size_of::<MeterRow>();
        let [mut rows, mut done, mut halt] = [gpu.alloc(bytes)?, gpu.alloc(4)?, gpu.alloc(4)?];
        gpu.fill(&mut rows, 0, bytes / 4, 0)?;
        gpu.fill(&mut done, 0, 1, 0)?;
        gpu.fill(&mut halt, 0, 1, 0)?;
        let gpu = gpu.clone();
        let meter = CudaMeter { gpu, rows, done, halt, micro_batches, micro_batch: 0, used: 0, fresh: true };
        Ok(Meter::Cuda(Box::new(meter)))
    }

    /// Begins a step's row, with its first micro-batch. A meter that [`is_full`](Self::is_full) must be
    /// [`read`](Self::read) first.
    pub fn begin(&mut self) {
        match self {
            Meter::Cpu(rows) => rows.push(Row::default()),
            Meter::Cuda(meter) => {
                assert!(meter.used < ROWS, "a meter of {ROWS} rows is full");
                meter.used += 1;
            }
        }
        self.micro_batch(0);
    }

    /// What is measured from now on is of micro-batch `k` of the step, and all of it so far.
    pub fn micro_batch(&mut self, k: usize) {
        if let Meter::Cuda(meter) = self {
            assert!(k < meter.micro_batches, "micro-batch {k} of a meter of {}", meter.micro_batches);
            (meter.micro_batch, meter.fresh) = (k, true);
        }
    }

    /// How much further on the rows of the last step are than those of the meter's first: the clock's row.
    pub fn row(&self) -> u32 {
        let row = match self {
            Meter::Cpu(rows) => rows.len().checked_sub(1),
            Meter::Cuda(meter) => meter.used.checked_sub(1).map(|step| step * meter.micro_batches),
        };
        row.and_then(|row| u32::try_from(row).ok()).expect("a row has begun")
    }

    /// True if no further row can be begun.
    pub fn is_full(&self) -> bool {
        matches!(self, Meter::Cuda(meter) if meter.used == ROWS)
    }

    /// Adds what images measured at timesteps `t` of a chain of `timesteps`: each one's loss, of a classifier whether
    /// it was right, and the sum of their terms of the bound. CPU only: panics if the rows are on a GPU.
    pub fn add(&mut self, t: &[u32], timesteps: u32, losses: &[f64], right: Option<&[f64]>, vlb_sum: Option<f64>) {
        let Meter::Cpu(rows) = self else { panic!("the rows are on a GPU") };
        assert_eq!(t.len(), losses.len(), "one loss for each of the images");
        let row = rows.last_mut().expect("a row has begun");
        for (i, t) in t.chunks(1).enumerate() {
            let mut image = Measured::default();
            image.quarters.add(t, timesteps, &losses[i..=i]);
            if let Some(right) = right {
                image.right.add(t, timesteps, &right[i..=i]);
            }
            row.parts.push(image);
        }
        row.parts.extend(vlb_sum.map(|vlb_sum| Measured { vlb_sum, ..Measured::default() }));
    }

    /// Norm and clipping factor of the last row. CPU only: panics if the rows are on a GPU.
    pub fn host_row(&mut self) -> &mut Measured {
        match self {
            Meter::Cpu(rows) => &mut rows.last_mut().expect("a row has begun").step,
            Meter::Cuda(_) => panic!("the rows are on a GPU"),
        }
    }

    /// Whether all losses of the last row are finite. CPU only: panics if the rows are on a GPU.
    pub fn losses_are_finite(&self) -> bool {
        match self {
            Meter::Cpu(rows) => {
                let parts = &rows.last().expect("a row has begun").parts;
                parts.iter().all(|part| part.quarters.sums.iter().all(|sum| sum.is_finite()))
            }
            Meter::Cuda(_) => panic!("the rows are on a GPU"),
        }
    }

    /// All rows since the last call, in order. Waits for the GPU and clears its halt flag.
    ///
    /// # Errors
    /// A GPU error.
    pub fn read(&mut self) -> Result<Vec<Measured>> {
        Ok(self.rows()?.iter().map(Row::measured).collect())
    }

    /// The same with their parts.
    ///
    /// # Errors
    /// A GPU error.
    pub fn rows(&mut self) -> Result<Vec<Row>> {
        match self {
            Meter::Cpu(rows) => Ok(std::mem::take(rows)),
            Meter::Cuda(meter) => meter.read(),
        }
    }
}

impl CudaMeter {
    fn read(&mut self) -> Result<Vec<Row>> {
        let mut rows = vec![<MeterRow as bytemuck::Zeroable>::zeroed(); self.used * self.micro_batches];
        self.gpu.download(&mut rows, &self.rows)?;
        self.gpu.fill(&mut self.halt, 0, 1, 0)?;
        self.used = 0;
        let of_step = |rows: &[MeterRow]| {
            let MeterRow { grad_norm, clip, .. } = rows[0];
            let part = |row: &MeterRow| Measured { grad_norm: 0.0, clip: 0.0, ..Measured::from(*row) };
            Row { step: Measured { grad_norm, clip, ..Measured::default() }, parts: rows.iter().map(part).collect() }
        };
        Ok(rows.chunks(self.micro_batches).map(of_step).collect())
    }

    /// Micro-batches of a step.
    pub(crate) fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// Offset and length, in bytes, of what kernels get as the row of a micro-batch, and of those after it. With a
    /// clock it is that of the first step and all that follows, so that the argument is the same in every step.
    fn part(&self, micro_batch: usize, clock: Option<&Clock>) -> (usize, usize) {
        let row = self.micro_batches * self.used.checked_sub(1).expect("a row has begun");
        let (first, end) = match clock {
            None => (row + micro_batch, row + self.micro_batches),
            Some(clock) => {
                assert_eq!(clock.row as usize, row, "row of the clock and of the meter");
                (micro_batch, ROWS * self.micro_batches)
            }
        };
        (size_of::<MeterRow>() * first, size_of::<MeterRow>() * (end - first))
    }

    /// The buffers that a kernel writes to which measures the micro-batch.
    pub(crate) fn for_writing(&mut self, clock: Option<&Clock>) -> ToWrite<'_> {
        self.buffers(self.micro_batch, clock)
    }

    /// The same for one which measures the step.
    pub(crate) fn for_writing_step(&mut self, clock: Option<&Clock>) -> ToWrite<'_> {
        self.buffers(0, clock)
    }

    fn buffers(&mut self, micro_batch: usize, clock: Option<&Clock>) -> ToWrite<'_> {
        let (offset, bytes) = self.part(micro_batch, clock);
        let rows = ViewMut::new(&mut self.rows, offset, bytes);
        let (done, halt, has_losses, fresh) = (&mut self.done, &mut self.halt, !self.fresh, &mut self.fresh);
        ToWrite { rows, done, halt, has_losses, fresh }
    }

    /// The rows of the step's micro-batches (with a clock, those of all steps), for reading.
    pub(crate) fn rows(&self, clock: Option<&Clock>) -> View<'_> {
        let (offset, bytes) = self.part(0, clock);
        View::new(&self.rows, offset, bytes)
    }

    /// The halt flag: one word, nonzero if updates are halted.
    pub(crate) fn halt(&self) -> &Buffer {
        &self.halt
    }
}
