//! Importance sampling of timesteps by the losses so far (IDDPM, section 3.3).
//!
//! The last ten losses of every timestep are kept, without the weights of their images. Once each timestep has ten, t
//! is drawn with a probability p_t in proportion to the root of their mean square, and a thousandth of the draws
//! uniformly; before that, all are drawn uniformly. A loss counts `1 / (T p_t)` times, so the expectation of loss and
//! gradient is that of uniform timesteps: p_t is a whole number of the 2^32 words from which t is drawn, and the weight
//! is made from that number, so this holds exactly but for the rounding of the weight to f32.
//!
//! Step k draws by the losses of the steps before k - 1. The last one's are left out so that a GPU can work on step
//! k - 1 while the host waits for the losses of step k - 2; every device leaves them out, so that all draw the same.

use std::collections::VecDeque;

use super::batch::{Batch, Timestep};

/// Losses kept of each timestep.
pub const KEPT: usize = 10;

/// The share of draws that are uniform.
const UNIFORM: f64 = 0.001;

/// Steps whose losses are known but not used yet.
pub const PENDING: usize = 2;

/// The losses so far, and the probabilities that follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Importance {
    /// Images of a step.
    batch: usize,
    /// (T, [`KEPT`]), the oldest first.
    losses: Vec<f32>,
    /// How many of them there are, of each timestep.
    counts: Vec<u8>,
    /// The losses of the last steps, each with its timestep.
    pending: VecDeque<Vec<(u32, f32)>>,
    /// Where the words of each timestep end, out of 2^32; empty while draws are uniform.
    ends: Vec<u64>,
}

impl Importance {
    /// Without losses, for steps of `batch` images.
    pub fn new(timesteps: usize, batch: usize) -> Self {
        Importance {
            batch,
            losses: vec![0.0; timesteps * KEPT],
            counts: vec![0; timesteps],
            pending: VecDeque::new(),
            ends: Vec::new(),
        }
    }

    /// T.
    pub fn timesteps(&self) -> usize {
        self.counts.len()
    }

    /// Images of a step.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Whether every timestep has its losses, so that draws are by them.
    pub fn is_warm(&self) -> bool {
        !self.ends.is_empty()
    }

    /// Notes the losses of the step after the last one noted, of each image with its timestep.
    pub fn record(&mut self, losses: Vec<(u32, f32)>) {
        assert_eq!(losses.len(), self.batch, "losses of a step of {} images", self.batch);
        self.pending.push_back(losses);
    }

    /// Makes ready for the next step's draws: uses the losses of all steps but the last one. `unknown` is 1 if those of
    /// the last one are still to be noted, and 0 if they are among the known.
    pub fn begin(&mut self, unknown: usize) {
        while self.pending.len() + unknown > 1 {
            let Some(losses) = self.pending.pop_front() else { break };
            // A loss that is not finite ends the training.
            for (t, loss) in losses.into_iter().filter(|(_, loss)| loss.is_finite()) {
                self.add(t as usize, loss);
            }
        }
        self.ends = if self.counts.iter().all(|&count| usize::from(count) == KEPT) { self.ends() } else { Vec::new() };
    }

    fn add(&mut self, t: usize, loss: f32) {
        let (losses, count) = (&mut self.losses[t * KEPT..(t + 1) * KEPT], usize::from(self.counts[t]));
        if count == KEPT {
            losses.rotate_left(1);
        }
        losses[count.min(KEPT - 1)] = loss;
        self.counts[t] = (count + 1).min(KEPT) as u8;
    }

    fn ends(&self) -> Vec<u64> {
        let root = |losses: &[f32]| {
            let squares = losses.iter().map(|&loss| f64::from(loss) * f64::from(loss)).sum::<f64>();
            (squares / KEPT as f64).sqrt()
        };
        let roots: Vec<f64> = self.losses.chunks(KEPT).map(root).collect();
        let total: f64 = roots.iter().sum();
        let timesteps = roots.len() as f64;
        let mut sum = 0.0;
        let mut ends: Vec<u64> = Vec::with_capacity(roots.len());
        for root in roots {
            // Losses that are all zero are all the same.
            let share = if total > 0.0 { root / total } else { 1.0 / timesteps };
            sum += share * (1.0 - UNIFORM) + UNIFORM / timesteps;
            ends.push((sum * 4_294_967_296.0) as u64);
        }
        if let Some(last) = ends.last_mut() {
            *last = 1 << 32;
        }
        ends
    }

    /// The batch with the timesteps and the weights of this step. Its own timesteps must be uniform.
    pub fn draw(&self, batch: Batch) -> Batch {
        let n = batch.len();
        let Timestep::Uniform(streams) = &batch.timestep else { panic!("the timesteps are given already") };
        if !self.is_warm() {
            return batch.weighted(vec![1.0; n]);
        }
        let place = |i: usize| {
            let word = u64::from(streams.image(i).block(0)[0]);
            self.ends.partition_point(|&end| end <= word) as u32
        };
        let t: Vec<u32> = (0..n).map(place).collect();
        let weights = t.iter().map(|&t| self.weight(t) as f32).collect();
        batch.at(t).weighted(weights)
    }

    /// The probability of a timestep.
    pub fn probability(&self, t: u32) -> f64 {
        if !self.is_warm() {
            return 1.0 / self.timesteps() as f64;
        }
        let t = t as usize;
        let begin = if t == 0 { 0 } else { self.ends[t - 1] };
        (self.ends[t] - begin) as f64 / 4_294_967_296.0
    }

    /// How often a loss at a timestep counts.
    pub fn weight(&self, t: u32) -> f64 {
        1.0 / (self.timesteps() as f64 * self.probability(t))
    }

    /// The state as numbers, for a checkpoint: the losses, how many there are of each timestep, and timesteps and
    /// losses of the [`PENDING`] last steps, the oldest first, -1 for a step that there is not.
    pub fn to_numbers(&self) -> [Vec<f32>; 4] {
        assert!(self.pending.len() <= PENDING, "{} steps whose losses are not used", self.pending.len());
        let nothing = vec![(None, 0.0); (PENDING - self.pending.len()) * self.batch];
        let known = self.pending.iter().flatten().map(|&(t, loss)| (Some(t), loss));
        let pending: Vec<(Option<u32>, f32)> = nothing.into_iter().chain(known).collect();
        [
            self.losses.clone(),
            self.counts.iter().map(|&count| f32::from(count)).collect(),
            pending.iter().map(|(t, _)| t.map_or(-1.0, |t| t as f32)).collect(),
            pending.iter().map(|(_, loss)| *loss).collect(),
        ]
    }

    /// Takes the state from such numbers, of the same lengths.
    ///
    /// # Errors
    /// A clause for numbers that no state has.
    pub fn set_numbers(&mut self, [losses, counts, t, pending]: [&[f32]; 4]) -> Result<(), String> {
        let lengths = self.to_numbers().map(|numbers| numbers.len());
        assert_eq!(lengths, [losses.len(), counts.len(), t.len(), pending.len()], "numbers of the state");
        let count = |&count: &f32| (0..=KEPT as u8).find(|&whole| f32::from(whole) == count);
        let counts: Option<Vec<u8>> = counts.iter().map(count).collect();
        self.counts = counts.ok_or(format!("counts losses otherwise than from 0 to {KEPT}"))?;
        let timesteps = self.timesteps();
        let at = |&t: &f32| (t.fract() == 0.0 && (0.0..timesteps as f32).contains(&t)).then_some(t as u32);
        self.pending.clear();
        for (t, losses) in t.chunks(self.batch).zip(pending.chunks(self.batch)) {
            if t.iter().all(|&t| t == -1.0) {
                continue;
            }
            let t: Option<Vec<u32>> = t.iter().map(at).collect();
            let t = t.ok_or(format!("holds losses of timesteps that are not among {timesteps}"))?;
            self.pending.push_back(t.into_iter().zip(losses.iter().copied()).collect());
        }
        self.losses = losses.to_vec();
        Ok(())
    }
}
