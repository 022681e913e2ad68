//! What a step draws for its images: mirrored or not, the timestep, the noise.
//!
//! Everything is drawn per image from its index in the whole step's batch (or in the held-out split). So micro-batches
//! draw the same as the whole batch, and a resumed run the same as an uninterrupted one. On a GPU the kernels draw for
//! themselves, from the same streams.

use crate::rng::{Purpose, Streams};

/// A batch, or one micro-batch of it when gradients are accumulated over several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Each image's index among all images of the source.
    pub indices: Vec<usize>,
    /// Each image's class, for a conditional network.
    pub labels: Option<Vec<u32>>,
    /// Whether each is mirrored left to right.
    pub flip: Vec<bool>,
    /// The streams of `flip`; `None`: no image is mirrored. Image `i` of the batch draws from stream `i`, also in
    /// `timestep` and `noise`.
    pub flips: Option<Streams>,
    /// Each image's timestep, in `0..timesteps`.
    pub t: Vec<u32>,
    /// The streams of `t`.
    pub timestep: Streams,
    /// T, the number of timesteps.
    pub timesteps: u32,
    /// The streams of the noise eps.
    pub noise: Streams,
}

impl Batch {
    /// Draws for a micro-batch of training step `step` (from 0) that starts at index `first` of the step's batch:
    /// timesteps uniform on `0..timesteps` (DDPM, algorithm 1), mirrored with probability 1/2 if `flip`.
    pub fn train(seed: u64, step: u32, first: u32, indices: Vec<usize>, flip: bool, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step, first };
        let flips = flip.then(|| streams(Purpose::Flip));
        Batch::draw(indices, flips, streams(Purpose::Timestep), timesteps, streams(Purpose::TrainNoise))
    }

    /// Draws for a part of the held-out split that starts at its index `first`. Every call draws the same, so the
    /// validation loss changes only because the network does. Nothing is mirrored.
    pub fn validation(seed: u64, first: u32, indices: Vec<usize>, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step: 0, first };
        Batch::draw(indices, None, streams(Purpose::ValidationTimestep), timesteps, streams(Purpose::Validation))
    }

    fn draw(indices: Vec<usize>, flips: Option<Streams>, timestep: Streams, timesteps: u32, noise: Streams) -> Self {
        let images = 0..indices.len();
        Batch {
            labels: None,
            flip: images.clone().map(|i| flips.is_some_and(|flips| flips.image(i).below(2) == 1)).collect(),
            flips,
            t: images.map(|i| timestep.image(i).below(timesteps)).collect(),
            timestep,
            timesteps,
            indices,
            noise,
        }
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
