//! What a step draws for its images: which, mirrored or not, at which timestep, with which noise.
//!
//! Everything is drawn per image from the image's position in the whole step (or in the held-out split), so a step cut
//! into micro-batches draws the same as one uncut, and a resumed run the same as one never stopped. A GPU draws for
//! itself, in the kernel, from the same streams.

use crate::rng::{Purpose, Streams};

/// A batch, or one piece of it when gradients are accumulated over several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Each image's place in the data set.
    pub indices: Vec<usize>,
    /// Each image's class, for a conditional network.
    pub labels: Option<Vec<u32>>,
    /// Whether each is mirrored left to right.
    pub flip: Vec<bool>,
    /// Where that comes from, if any is mirrored: image `i` of the batch has stream `i` of these; so for `timestep` and
    /// `noise`.
    pub flips: Option<Streams>,
    /// Each one's timestep, in `0..timesteps`.
    pub t: Vec<u32>,
    /// Where that comes from.
    pub timestep: Streams,
    /// Length of the chain.
    pub timesteps: u32,
    /// Where each one's noise eps comes from.
    pub noise: Streams,
}

impl Batch {
    /// Draws for a piece of training step `step` that starts at position `first` of the step's batch: timesteps uniform
    /// on `0..timesteps` (DDPM, algorithm 1), mirrored with probability one half if `flip`.
    pub fn train(seed: u64, step: u32, first: u32, indices: Vec<usize>, flip: bool, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step, first };
        let flips = flip.then(|| streams(Purpose::Flip));
        Batch::draw(indices, flips, streams(Purpose::Timestep), timesteps, streams(Purpose::TrainNoise))
    }

    /// Draws for a piece of the held-out split that starts at position `first` of it. The same at every call, so that
    /// the validation loss moves only because the network does. Nothing is mirrored.
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

    /// The same with a class for each image.
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
