//! What a step draws for its images: mirrored or not, the timestep, the noise.
//!
//! Everything is drawn per image from its index in the whole step's batch (or in the held-out split). So micro-batches
//! draw the same as the whole batch, and a resumed run the same as an uninterrupted one. A batch holds the streams
//! alone. The CPU path draws from them, and so do the kernels of a GPU, with the same bits: there the host draws
//! nothing.

use crate::names::names;
use crate::rng::{Purpose, Streams};

/// How a training step draws its timesteps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// Uniform on `0..T` (DDPM, algorithm 1).
    Uniform,
    /// Evenly over the images of a batch ([`Timestep::Stratified`]).
    Stratified,
    /// By the losses so far ([`Importance`](super::Importance)).
    Importance,
}

names!(Sampling { Uniform = "uniform", Stratified = "stratified", Importance = "importance" });

/// Where the images' timesteps come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Timestep {
    /// Uniform on `0..T`, each image from its own stream (DDPM, algorithm 1).
    Uniform(Streams),
    /// One u for the whole batch of a step, in which image i of B has t = floor(T ((u + i/B) mod 1)): each is uniform,
    /// and together they cover the chain evenly (Kingma et al. 2021, appendix I). u is the first word of stream 0 of
    /// these streams, in units of 2^-32, so a timestep's probability is off by less than T 2^-32 of itself.
    Stratified {
        /// The streams; an image's index in the batch of the step is that of its stream.
        streams: Streams,
        /// B, images in the batch of the step, of all its micro-batches.
        images: u32,
    },
    /// Given, one for each image.
    Given(Vec<u32>),
}

/// Which labels are replaced by the null class, for classifier-free guidance (Ho and Salimans 2022).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// An image whose stream begins with a word below `below` loses its label.
    pub streams: Streams,
    /// The share of the labels in units of 2^-32.
    pub below: u32,
    /// The number of the null class: the number of classes.
    pub null: u32,
}

/// A batch, or one micro-batch of it when gradients are accumulated over several.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// Each image's index among all images of the source.
    pub indices: Vec<usize>,
    /// Each image's class, for a conditional network.
    pub labels: Option<Vec<u32>>,
    /// Which of them the network does not get to see.
    pub dropped: Option<Dropped>,
    /// The streams of [`flip`](Self::flip); `None`: no image is mirrored. Image `i` of the batch draws from stream `i`,
    /// also in `timestep` and `noise`.
    pub flips: Option<Streams>,
    /// Where [`t`](Self::t) comes from.
    pub timestep: Timestep,
    /// T, the number of timesteps.
    pub timesteps: u32,
    /// The streams of the noise eps.
    pub noise: Streams,
    /// A factor of each image's loss and gradient; `None`: 1.
    pub weights: Option<Vec<f32>>,
}

impl Batch {
    /// The streams of a micro-batch of training step `step` (from 0) that starts at index `first` of the step's batch:
    /// timesteps uniform on `0..timesteps` (DDPM, algorithm 1), mirrored with probability 1/2 if `flip`.
    pub fn train(seed: u64, step: u32, first: u32, indices: Vec<usize>, flip: bool, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step, first };
        let flips = flip.then(|| streams(Purpose::Flip));
        let (timestep, noise) = (Timestep::Uniform(streams(Purpose::Timestep)), streams(Purpose::TrainNoise));
        Batch { indices, labels: None, dropped: None, flips, timestep, timesteps, noise, weights: None }
    }

    /// The streams of a part of the held-out split that starts at its index `first`. They are the same in every call,
    /// so the validation loss changes only because the network does. Nothing is mirrored.
    pub fn validation(seed: u64, first: u32, indices: Vec<usize>, timesteps: u32) -> Self {
        let streams = |purpose| Streams { seed, purpose, step: 0, first };
        let (timestep, noise) = (Timestep::Uniform(streams(Purpose::ValidationTimestep)), streams(Purpose::Validation));
        Batch { indices, labels: None, dropped: None, flips: None, timestep, timesteps, noise, weights: None }
    }

    /// Images that are all noised to timestep `t`, to measure the bound: image i of them has the noise of image
    /// `first + i` in draw `draw`, and every draw and timestep its own. Nothing is mirrored. The draw and the timestep
    /// share a number of 32 bits: `draw timesteps + t` is below 2^32.
    pub fn evaluation(seed: u64, draw: u32, first: u32, indices: Vec<usize>, t: u32, timesteps: u32) -> Self {
        let step = draw.checked_mul(timesteps).and_then(|step| step.checked_add(t));
        let step = step.unwrap_or_else(|| panic!("draw {draw} of {timesteps} timesteps: streams end at 2^32"));
        let noise = Streams { seed, purpose: Purpose::Evaluation, step, first };
        let timestep = Timestep::Given(vec![t; indices.len()]);
        Batch { indices, labels: None, dropped: None, flips: None, timestep, timesteps, noise, weights: None }
    }

    /// Each image's timestep, in `0..timesteps`.
    pub fn t(&self) -> Vec<u32> {
        match &self.timestep {
            Timestep::Uniform(streams) => (0..self.len()).map(|i| streams.image(i).below(self.timesteps)).collect(),
            Timestep::Stratified { streams, images } => {
                let [u, ..] = Streams { first: 0, ..*streams }.image(0).block(0);
                let stratum = |i: usize| (u64::from(streams.image(i).stream) << 32) / u64::from(*images);
                let place = |i: usize| u.wrapping_add(stratum(i) as u32);
                (0..self.len()).map(|i| ((u64::from(place(i)) * u64::from(self.timesteps)) >> 32) as u32).collect()
            }
            Timestep::Given(t) => t.clone(),
        }
    }

    /// The labels that the network gets: some replaced by the null class.
    pub fn labels(&self) -> Option<Vec<u32>> {
        let mut labels = self.labels.clone()?;
        if let Some(Dropped { streams, below, null }) = self.dropped {
            let dropped = |i: usize| streams.image(i).block(0)[0] < below;
            labels.iter_mut().enumerate().filter(|(i, _)| dropped(*i)).for_each(|(_, label)| *label = null);
        }
        Some(labels)
    }

    /// Draws whether each image is mirrored left to right.
    pub fn flip(&self) -> Vec<bool> {
        (0..self.len()).map(|i| self.flips.is_some_and(|flips| flips.image(i).below(2) == 1)).collect()
    }

    /// The same batch of a training step with stratified timesteps; `images` in the batch of the step.
    pub fn stratified(self, images: usize) -> Self {
        let Timestep::Uniform(streams) = self.timestep else { panic!("the timesteps are given") };
        let images = u32::try_from(images).expect("a batch below 2^32");
        Batch { timestep: Timestep::Stratified { streams, images }, ..self }
    }

    /// The same batch at the given timesteps.
    pub fn at(self, t: Vec<u32>) -> Self {
        assert_eq!(t.len(), self.len(), "one timestep for each of the images");
        assert!(t.iter().all(|t| *t < self.timesteps), "timesteps {t:?} of {}", self.timesteps);
        Batch { timestep: Timestep::Given(t), ..self }
    }

    /// The same batch with a factor for the loss of each image.
    pub fn weighted(self, weights: Vec<f32>) -> Self {
        assert_eq!(weights.len(), self.len(), "one weight for each of the images");
        Batch { weights: Some(weights), ..self }
    }

    /// The same batch of a training step with the share `share` of its labels, in [0, 1), replaced by `null`.
    pub fn dropping(self, share: f64, null: usize) -> Self {
        let streams = Streams { purpose: Purpose::LabelDropout, ..self.noise };
        let below = (share * 4_294_967_296.0) as u32;
        Batch { dropped: (below > 0).then_some(Dropped { streams, below, null: null as u32 }), ..self }
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
