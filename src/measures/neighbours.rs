//! Improved precision and recall (Kynkaanniemi et al. 2019).

use rayon::prelude::*;

use super::{Features, squared_distance};
use crate::error::{Error, Result};

/// Which neighbour's distance is the radius around a point: k of the paper and of everyone's figures.
pub const NEIGHBOURS: usize = 3;

/// Shares between 0 and 1. Not 1 for a perfect model: two sets from one normal distribution in 64 dimensions, 2,000
/// points each, have 0.61 and 0.58.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PrecisionRecall {
    /// Share of the samples that lie within the radius of some point of the data.
    pub precision: f64,
    /// Share of the data that lie within the radius of some sample.
    pub recall: f64,
}

/// The radius of a point is the distance to its `k`-th nearest other point of its own set. A point on the edge is
/// within, as in guided-diffusion: with a strict comparison, duplicates, whose radius may be 0, would not even cover
/// themselves. The two sets should be of the same size, since radii shrink as sets grow.
///
/// # Errors
/// `Error::Failed` for a set of no more than `k` points.
pub fn precision_and_recall(data: &Features, samples: &Features, k: usize) -> Result<PrecisionRecall> {
    assert_eq!(data.d(), samples.d(), "features of {} and of {} numbers", data.d(), samples.d());
    let fewest = data.len().min(samples.len());
    if fewest <= k {
        return Err(Error::Failed(format!(
            "precision and recall of {fewest} images are undefined; more than {k} are needed, since the {k} nearest others tell how far a point reaches"
        )));
    }
    Ok(PrecisionRecall {
        precision: covered(samples, data, &squared_radii(data, k)),
        recall: covered(data, samples, &squared_radii(samples, k)),
    })
}

/// The squared distance of each point to its `k`-th nearest other point, k >= 1.
fn squared_radii(points: &Features, k: usize) -> Vec<f64> {
    let radius = |i: usize| {
        let others = (0..points.len()).filter(|&j| j != i);
        let mut distances: Vec<f64> = others.map(|j| squared_distance(points.row(i), points.row(j))).collect();
        *distances.select_nth_unstable_by(k - 1, f64::total_cmp).1
    };
    (0..points.len()).into_par_iter().map(radius).collect()
}

/// The share of `points` within the radius of some centre.
fn covered(points: &Features, centres: &Features, squared_radii: &[f64]) -> f64 {
    let within = |i: &usize| {
        let mut centres = centres.rows().zip(squared_radii);
        centres.any(|(centre, &radius)| squared_distance(points.row(*i), centre) <= radius)
    };
    let count = (0..points.len()).into_par_iter().filter(within).count();
    count as f64 / points.len() as f64
}
