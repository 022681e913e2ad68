//! Distances between sets of images as vectors: what the command `quality` reports.
//!
//! - [`Gaussian`] and [`frechet_distance`]: the distance of two normal distributions fitted to features (Heusel et al.
//!   2017; with the features of Inception-v3 it is called FID).
//! - [`precision_and_recall`]: how many samples lie where the data do, and how much of the data the samples cover
//!   (Kynkaanniemi et al. 2019).
//! - [`nearest`] and [`Nearness`]: whether samples lie nearer to the training set than images that it does not hold
//!   (Meehan et al. 2020).
//!
//! Everything is f64 and knows no tensor and no network; the vectors come from whoever measures. All sums have an order
//! of their own, so that any number of threads gives the same bits. Deliberately absent: the kernel distance, density
//! and coverage.

mod frechet;
mod memorising;
mod neighbours;

pub use frechet::{Gaussian, frechet_distance};
pub use memorising::{COPY_RATIO, Nearest, Nearness, nearest, nearest_pixels};
pub use neighbours::{NEIGHBOURS, PrecisionRecall, precision_and_recall};

use crate::error::{Error, Result};

/// A vector for each image: `n` rows of `d` finite numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Features {
    rows: Vec<f64>,
    d: usize,
}

impl Features {
    /// From rows of `d` numbers, one after the other.
    ///
    /// # Errors
    /// `Error::Failed` for a number that is not finite, of which no distance could be told.
    pub fn new(rows: Vec<f64>, d: usize) -> Result<Self> {
        assert!(d > 0 && rows.len().is_multiple_of(d), "{} numbers are not rows of {d}", rows.len());
        match rows.iter().position(|v| !v.is_finite()) {
            None => Ok(Features { rows, d }),
            Some(i) => Err(Error::Failed(format!(
                "feature {} of image {} is {}; only finite features can be compared",
                i % d,
                i / d,
                rows[i]
            ))),
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.rows.len() / self.d
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Numbers of a row.
    pub fn d(&self) -> usize {
        self.d
    }

    /// The vector of one image.
    pub fn row(&self, image: usize) -> &[f64] {
        &self.rows[image * self.d..][..self.d]
    }

    /// The vectors in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f64]> {
        self.rows.chunks_exact(self.d)
    }

    /// The vectors of some images, in this order.
    pub fn select(&self, images: impl IntoIterator<Item = usize>) -> Features {
        Features { rows: images.into_iter().flat_map(|i| self.row(i).iter().copied()).collect(), d: self.d }
    }
}

/// Squared distance. From the differences themselves: |a|^2 - 2 a b + |b|^2 cancels where vectors are near, and there
/// it is looked at.
fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    // Eight running sums, so that the additions do not wait for each other; joined in a fixed order.
    let mut sums = [0.0; 8];
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for k in 0..8 {
            sums[k] += (a[k] - b[k]) * (a[k] - b[k]);
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(rest_a).zip(rest_b) {
        *sum += (a - b) * (a - b);
    }
    sums.iter().sum()
}
