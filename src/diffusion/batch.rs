//! What a step draws for its images: which, mirrored or not, at which timestep, with which noise.
//!
//! Everything is drawn per image from the image's position in the whole step (or in the held-out split), so a step cut
//! into micro-batches draws the same as one uncut, and a resumed run the same as one never stopped.

use crate::rng::{Purpose, Streams};

/// A batch, or one piece of it when gradients are accumulated over several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Each image's place in the data set.
    pub indices: Vec<usize>,
    /// Whether each is mirrored left to right.
    pub flip: Vec<bool>,
    /// Each one's timestep, in `0..timesteps`.
    pub t: Vec<u32>,
    /// Where each one's noise eps comes from; image `i` of the batch has stream `i` of these.
    pub noise: Streams,
}

impl Batch {
    /// Draws for a piece of training step `step` that starts at position `first` of the step's batch: timesteps uniform
    /// on `0..timesteps` (DDPM, algorithm 1), mirrored with probability one half if `flip`.
    pub fn train(seed: u64, step: u32, first: u32, indices: Vec<usize>, flip: bool, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step, first };
        let (flips, t) = (streams(Purpose::Flip), streams(Purpose::Timestep));
        Batch {
            flip: (0..indices.len()).map(|i| flip && flips.image(i).below(2) == 1).collect(),
            t: (0..indices.len()).map(|i| t.image(i).below(timesteps)).collect(),
            indices,
            noise: streams(Purpose::TrainNoise),
        }
    }

    /// Draws for a piece of the held-out split that starts at position `first` of it. The same at every call, so that
    /// the validation loss moves only because the network does. Nothing is mirrored.
    pub fn validation(seed: u64, first: u32, indices: Vec<usize>, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step: 0, first };
        let t = streams(Purpose::ValidationTimestep);
        Batch {
            flip: vec![false; indices.len()],
            t: (0..indices.len()).map(|i| t.image(i).below(timesteps)).collect(),
            indices,
            noise: streams(Purpose::Validation),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// True if there is no image.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// The timesteps as the network's time embedding takes them.
    pub fn t_f32(&self) -> Vec<f32> {
        // Exact: timesteps stay far below 2^24.
        self.t.iter().map(|&t| t as f32).collect()
    }
}
