//! What a step draws for its images: mirrored or not, the timestep, the noise.
//!
//! Everything is drawn per image from its index in the whole step's batch (or in the held-out split). So micro-batches
//! draw the same as the whole batch, and a resumed run the same as an uninterrupted one. A batch holds the streams
//! alone. The CPU path draws from them, and so do the kernels of a GPU, with the same bits: there the host draws
//! nothing.

use crate::rng::{Purpose, Streams};

/// A batch, or one micro-batch of it when gradients are accumulated over several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Each image's index among all images of the source.
    pub indices: Vec<usize>,
    /// Each image's class, for a conditional network.
    pub labels: Option<Vec<u32>>,
    /// The streams of [`flip`](Self::flip); `None`: no image is mirrored. Image `i` of the batch draws from stream `i`,
    /// also in `timestep` and `noise`.
    pub flips: Option<Streams>,
    /// The streams of [`t`](Self::t).
    pub timestep: Streams,
    /// T, the number of timesteps.
    pub timesteps: u32,
    /// The streams of the noise eps.
    pub noise: Streams,
}

impl Batch {
    /// The streams of a micro-batch of training step `step` (from 0) that starts at index `first` of the step's batch:
    /// timesteps uniform on `0..timesteps` (DDPM, algorithm 1), mirrored with probability 1/2 if `flip`.
    pub fn train(seed: u64, step: u32, first: u32, indices: Vec<usize>, flip: bool, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step, first };
        let flips = flip.then(|| streams(Purpose::Flip));
        let (timestep, noise) = (streams(Purpose::Timestep), streams(Purpose::TrainNoise));
        Batch { indices, labels: None, flips, timestep, timesteps, noise }
    }

    /// The streams of a part of the held-out split that starts at its index `first`. They are the same in every call,
    /// so the validation loss changes only because the network does. Nothing is mirrored.
    pub fn validation(seed: u64, first: u32, indices: Vec<usize>, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step: 0, first };
        let (timestep, noise) = (streams(Purpose::ValidationTimestep), streams(Purpose::Validation));
        Batch { indices, labels: None, flips: None, timestep, timesteps, noise }
    }

    /// Draws each image's timestep, in `0..timesteps`.
    pub fn t(&self) -> Vec<u32> {
        (0..self.len()).map(|i| self.timestep.image(i).below(self.timesteps)).collect()
    }

    /// Draws whether each image is mirrored left to right.
    pub fn flip(&self) -> Vec<bool> {
        (0..self.len()).map(|i| self.flips.is_some_and(|flips| flips.image(i).below(2) == 1)).collect()
    }

    /// The same batch with a class for each image.
    pub fn with_labels(self, labels: Option<Vec<u32>>) -> Self {
        assert!(labels.as_ref().is_none_or(|l| l.len() == self.len()), "one label for each of {} images", self.len());
        Batch { labels, ..self }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// True if there is no image.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }
}
