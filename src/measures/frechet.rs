//! The Frechet distance of two normal distributions.

use nalgebra::{DMatrix, DVector};

use super::Features;
use crate::error::{Error, Result};

/// Images whose part of a covariance is summed at a time.
const BLOCK: usize = 1024;

/// Mean and covariance.
#[derive(Clone, Debug)]
pub struct Gaussian {
    mean: DVector<f64>,
    covariance: DMatrix<f64>,
}

impl Gaussian {
    /// The mean of the vectors and their covariance, divided by n - 1. The mean is subtracted first: a sum of squares
    /// less n times the square of the mean would lose the digits of features that vary little around a large mean.
    ///
    /// # Errors
    /// `Error::Failed` for fewer than two vectors.
    pub fn of(features: &Features) -> Result<Self> {
        let (n, d) = (features.len(), features.d());
        if n < 2 {
            return Err(Error::Failed(format!("a covariance of {n} images is undefined; at least 2 are needed")));
        }
        let mut mean = DVector::zeros(d);
        for row in features.rows() {
            mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / n as f64);
        }
        // What rounding left of the mean is the mean of the differences from it.
        let mut rest = DVector::zeros(d);
        for row in features.rows() {
            rest.iter_mut().zip(row).zip(&mean).for_each(|((rest, x), mean)| *rest += (x - mean) / n as f64);
        }
        mean += rest;
        let mut covariance = DMatrix::zeros(d, d);
        for first in (0..n).step_by(BLOCK) {
            // (d, BLOCK), a column an image, so that the sum is a product of two matrices.
            let centred = DMatrix::from_fn(d, BLOCK.min(n - first), |k, i| features.row(first + i)[k] - mean[k]);
            covariance.gemm(1.0, &centred, &centred.transpose(), 1.0);
        }
        covariance /= (n - 1) as f64;
        Ok(Gaussian { mean, covariance })
    }

    /// From statistics of another program: `mu` of d and `sigma` of d x d numbers.
    ///
    /// # Errors
    /// `Error::Failed` for numbers that are not finite, and for a sigma that is not symmetric, with a negative variance
    /// or of another size than mu.
    pub fn from_statistics(mu: &[f64], sigma: &[f64]) -> Result<Self> {
        let d = mu.len();
        let failed = |what: String| Err(Error::Failed(what));
        if d == 0 || sigma.len() != d * d {
            return failed(format!(
                "mu has {d} numbers and sigma {}, where mu's number squared is expected",
                sigma.len()
            ));
        }
        if let Some(bad) = mu.iter().chain(sigma).find(|v| !v.is_finite()) {
            return failed(format!("mu or sigma holds {bad}; only finite numbers can be compared"));
        }
        let covariance = DMatrix::from_row_slice(d, d, sigma);
        if let Some(k) = (0..d).find(|&k| covariance[(k, k)] < 0.0) {
            return failed(format!("sigma has the variance {} at {k}; it is no covariance", covariance[(k, k)]));
        }
        // As far as a covariance in f32 may be from symmetric.
        let largest = covariance.amax();
        for i in 0..d {
            for j in 0..i {
                let (one, other) = (covariance[(i, j)], covariance[(j, i)]);
                if (one - other).abs() > 1e-4 * largest {
                    return failed(format!("sigma has {one} at {i}, {j} and {other} at {j}, {i}; it is no covariance"));
                }
            }
        }
        let covariance = (&covariance + covariance.transpose()) / 2.0;
        Ok(Gaussian { mean: DVector::from_column_slice(mu), covariance })
    }

    /// Numbers of a vector.
    pub fn d(&self) -> usize {
        self.mean.len()
    }
}

/// |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Wasserstein distance of two normal distributions, which
/// the literature on generated images calls the Frechet distance.
///
/// tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1 S2, which are those of the symmetric
/// S1^(1/2) S2 S1^(1/2). So two symmetric eigendecompositions suffice: real, and stable where fewer images than
/// features leave S singular. Eigenvalues that rounding has made negative are taken as 0. The root of the product
/// itself has complex parts there.
pub fn frechet_distance(a: &Gaussian, b: &Gaussian) -> f64 {
    assert_eq!(a.d(), b.d(), "Gaussians of {} and of {} dimensions", a.d(), b.d());
    let root = root(&a.covariance);
    let product = &root * &b.covariance * &root;
    // Symmetric but for rounding, of which the decomposition sees one half only.
    let product = (&product + product.transpose()) / 2.0;
    let trace_of_root: f64 = product.symmetric_eigenvalues().iter().map(|v| v.max(0.0).sqrt()).sum();
    let means = (&a.mean - &b.mean).norm_squared();
    // Of equal distributions rounding may leave less than 0.
    (means + a.covariance.trace() + b.covariance.trace() - 2.0 * trace_of_root).max(0.0)
}

/// The symmetric root of a covariance.
fn root(covariance: &DMatrix<f64>) -> DMatrix<f64> {
    let eigen = covariance.clone().symmetric_eigen();
    let mut scaled = eigen.eigenvectors.clone();
    for (k, mut column) in scaled.column_iter_mut().enumerate() {
        column *= eigen.eigenvalues[k].max(0.0).sqrt();
    }
    scaled * eigen.eigenvectors.transpose()
}
