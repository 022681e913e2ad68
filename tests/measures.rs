//! The measures against numbers worked out by hand or with NumPy in float64.

mod support;

use ddpm_cuda::measures::{
    Features, Gaussian, NEIGHBOURS, Nearest, Nearness, frechet_distance, nearest, nearest_pixels, precision_and_recall,
};
use support::{halves, numbers, same_bits_at_any_number_of_threads};

#[track_caller]
fn near(what: &str, got: f64, want: f64, error: f64) {
    assert!((got - want).abs() <= error, "{what} is {got}, expected {want} +- {error:e}");
}

fn features(rows: &[f64], d: usize) -> Features {
    Features::new(rows.to_vec(), d).unwrap()
}

/// `n` points of a normal distribution in `d` dimensions, the sum of twelve uniform numbers each.
fn normal(seed: u64, n: usize, d: usize) -> Features {
    let uniform = numbers(seed, 12 * n * d);
    features(&uniform.chunks_exact(12).map(|u| u.iter().sum::<f64>() / 2.0).collect::<Vec<_>>(), d)
}

fn frechet(a: &Features, b: &Features) -> f64 {
    frechet_distance(&Gaussian::of(a).unwrap(), &Gaussian::of(b).unwrap())
}

#[test]
fn the_frechet_distance_of_two_by_two_covariances() {
    let a = Gaussian::from_statistics(&[0.0, 0.0], &[2.0, 0.5, 0.5, 1.0]).unwrap();
    let b = Gaussian::from_statistics(&[1.0, -1.0], &[1.0, -0.3, -0.3, 1.5]).unwrap();
    // tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = S1 S2, which has the trace 3.2 and the determinant 2.4675.
    let trace_of_root = (3.2 + 2.0 * 2.4675f64.sqrt()).sqrt();
    near("the trace of the root", trace_of_root, 2.518264405, 1e-9);
    near("the distance", frechet_distance(&a, &b), 2.463471190, 1e-9);
    near("the distance", frechet_distance(&a, &b), 2.0 + 3.0 + 2.5 - 2.0 * trace_of_root, 1e-13);
    near("the other way round", frechet_distance(&b, &a), 2.463471190, 1e-9);
    near("to itself", frechet_distance(&a, &a), 0.0, 1e-14);
}

#[test]
fn a_covariance_is_divided_by_one_less_than_the_images() {
    // Variance 1/2 with ddof 1, 1/4 with ddof 0: in one dimension the distance is (m1 - m2)^2 + (s1 - s2)^2.
    let a = features(&[0.0, 1.0], 1);
    let b = features(&[5.0, 5.0], 1);
    near("the distance", frechet(&a, &b), 4.5f64.powi(2) + 0.5, 1e-14);
}

/// More images than are summed at a time, against the definition.
#[test]
fn a_covariance_is_that_of_all_images() {
    let (n, d) = (2500, 2);
    let x = normal(9, n, d);
    let mean = |f: &dyn Fn(&[f64]) -> f64| x.rows().map(f).sum::<f64>() / n as f64;
    let mu = [mean(&|row| row[0]), mean(&|row| row[1])];
    let entry = |i: usize, j: usize| mean(&|row| (row[i] - mu[i]) * (row[j] - mu[j])) * n as f64 / (n - 1) as f64;
    let sigma = [entry(0, 0), entry(0, 1), entry(1, 0), entry(1, 1)];
    let want = Gaussian::from_statistics(&mu, &sigma).unwrap();
    near("the distance", frechet_distance(&Gaussian::of(&x).unwrap(), &want), 0.0, 1e-12);
}

/// With E[x^2] - E[x]^2 nothing would be left of a deviation of 1 around 1e8: the squares have 16 digits.
#[test]
fn large_means_keep_their_digits() {
    let (a, b) = (normal(1, 200, 3), normal(2, 300, 3));
    let moved = |x: &Features| features(&x.rows().flatten().map(|v| v + 1e8).collect::<Vec<_>>(), 3);
    let want = frechet(&a, &b);
    assert!(want > 1e-3, "{want}");
    // 1e8 + x keeps x to 1e-8.
    near("the distance of what was moved", frechet(&moved(&a), &moved(&b)), want, 1e-6);
}

/// Fewer images than features: S is singular, and its product with another has no root that a general algorithm finds.
#[test]
fn singular_covariances_have_a_distance() {
    for (n, m, d) in [(2, 3, 8), (5, 4, 16), (40, 7, 33)] {
        let (a, b) = (normal(3, n, d), normal(4, m, d));
        let (there, back) = (frechet(&a, &b), frechet(&b, &a));
        assert!(there.is_finite() && there > 0.0, "{there}");
        near("the other way round", back, there, 1e-7 * there);
        near("to itself", frechet(&a, &a), 0.0, 1e-6);
        // A subspace more, in which both are 0, changes nothing.
        let wider =
            |x: &Features| features(&x.rows().flat_map(|row| [row, &[0.0]].concat()).collect::<Vec<_>>(), d + 1);
        near("with a feature that is 0", frechet(&wider(&a), &wider(&b)), there, 1e-7 * there);
    }
    let constant = features(&[1.0; 12], 4);
    near("of equal points", frechet(&constant, &features(&[2.0; 8], 4)), 4.0, 1e-12);
}

/// The expected distance of two samples of one normal distribution is (d + d (d + 1) / 4) (1/n + 1/m) to first order.
/// What the second order and chance add is well within a quarter of it.
#[test]
fn finite_samples_have_the_floor_of_their_size() {
    let (n, m, d) = (500, 2000, 16);
    let expected = (d + d * (d + 1) / 4) as f64 * (1.0 / n as f64 + 1.0 / m as f64);
    let got = frechet(&normal(5, n, d), &normal(6, m, d));
    near("the floor", got, expected, 0.25 * expected);
}

#[test]
fn statistics_that_are_none_are_refused() {
    let refused = |mu: &[f64], sigma: &[f64]| Gaussian::from_statistics(mu, sigma).unwrap_err().to_string();
    assert_eq!(refused(&[0.0, 0.0], &[1.0; 3]), "mu has 2 numbers and sigma 3, where mu's number squared is expected");
    assert_eq!(refused(&[f64::NAN], &[1.0]), "mu or sigma holds NaN; only finite numbers can be compared");
    assert_eq!(refused(&[0.0], &[-1.0]), "sigma has the variance -1 at 0; it is no covariance");
    assert_eq!(
        refused(&[0.0, 0.0], &[1.0, 0.5, -0.5, 1.0]),
        "sigma has -0.5 at 1, 0 and 0.5 at 0, 1; it is no covariance"
    );
    assert!(refused(&[], &[]).starts_with("mu has 0 numbers"));
    let one = Gaussian::of(&features(&[1.0, 2.0], 2)).unwrap_err().to_string();
    assert_eq!(one, "a covariance of 1 images is undefined; at least 2 are needed");
    let nan = Features::new(vec![0.0, 1.0, f64::NEG_INFINITY, 3.0], 2).unwrap_err().to_string();
    assert_eq!(nan, "feature 0 of image 1 is -inf; only finite features can be compared");
}

#[test]
fn precision_and_recall_in_one_dimension() {
    let data = features(&[0.0, 1.0, 2.0, 4.0, 7.0, 11.0], 1);
    let samples = features(&[0.5, 1.5, 3.0, 20.0, 2.2], 1);
    let at = |k| precision_and_recall(&data, &samples, k).unwrap();
    // The outlier's radius covers all the data.
    assert_eq!((at(1).precision, at(1).recall), (0.8, 1.0));
    assert_eq!((at(3).precision, at(3).recall), (1.0, 1.0));
    // The other way round they change places.
    let swapped = precision_and_recall(&samples, &data, 1).unwrap();
    assert_eq!((swapped.precision, swapped.recall), (1.0, 0.8));
}

/// Radii by hand, k = 1: of the data 0, 1, 3 they are 1, 1, 2; of the samples -1, 5.0, 5.5 they are 6, 0.5, 0.5. -1 is
/// on the edge of 0, 5.0 on that of 3, 5.5 beyond; 0, 1 and 3 are within 6 of -1.
#[test]
fn a_point_on_the_edge_is_within() {
    let (data, samples) = (features(&[0.0, 1.0, 3.0], 1), features(&[-1.0, 5.0, 5.5], 1));
    let got = precision_and_recall(&data, &samples, 1).unwrap();
    assert_eq!((got.precision, got.recall), (2.0 / 3.0, 1.0));
    // Duplicates have the radius 0 and cover each other.
    let (twins, other) = (features(&[2.0, 2.0, 9.0, 9.0], 1), features(&[2.0, 9.0, 30.0, 31.0], 1));
    let got = precision_and_recall(&twins, &other, 1).unwrap();
    assert_eq!((got.precision, got.recall), (0.5, 1.0));
}

#[test]
fn precision_and_recall_need_more_points_than_neighbours() {
    let (three, four) = (normal(1, 3, 2), normal(2, 4, 2));
    for (data, samples) in [(&three, &four), (&four, &three)] {
        let refused = precision_and_recall(data, samples, NEIGHBOURS).unwrap_err().to_string();
        assert!(refused.starts_with("precision and recall of 3 images are undefined; more than 3 are needed"));
    }
    let all = precision_and_recall(&four, &four, NEIGHBOURS).unwrap();
    assert_eq!((all.precision, all.recall), (1.0, 1.0));
}

fn at(distances: &[f64]) -> Vec<Nearest> {
    distances.iter().map(|&d| Nearest { images: vec![0, 1], distances: vec![d, 2.0 * d] }).collect()
}

#[test]
fn copies_are_nearer_than_held_out_images() {
    let got = Nearness::of(&at(&[0.1, 0.4, 0.35, 0.8]), &at(&[0.5, 0.6, 0.9, 0.2, 1.0]));
    // U = 5 of 20 pairs.
    near("z", got.z, -1.1022704, 1e-7);
    near("the share", got.nearer_than_held_out, 0.75, 1e-15);
    near("the mean", got.distance, 0.4125, 1e-15);
    near("the mean of held-out images", got.held_out_distance, 0.64, 1e-15);
    assert_eq!(got.copies, 0.0);
    // A tie counts half.
    let tied = Nearness::of(&at(&[1.0, 2.0]), &at(&[1.0, 1.0]));
    near("the share with ties", tied.nearer_than_held_out, 0.25, 1e-15);
    let of = |distances: &[f64]| Nearest { images: vec![0; distances.len()], distances: distances.to_vec() };
    assert_eq!([&[1.0, 4.0][..], &[0.0, 0.0], &[2.0]].map(|d| of(d).ratio()), [0.25, 0.0, 1.0]);
    let copies = Nearness::of(&at(&[0.0, 0.0]), &at(&[1.0, 2.0, 3.0]));
    assert_eq!((copies.nearer_than_held_out, copies.copies), (1.0, 1.0));
    assert!(copies.z < 0.0);
}

#[test]
fn the_nearest_images_come_first() {
    let data = features(&[5.0, 1.0, 4.0, 1.0, -7.0], 1);
    let got = nearest(&features(&[1.5, 100.0], 1), &data, 5, 3);
    assert_eq!(got[0], Nearest { images: vec![1, 3, 2], distances: vec![0.5, 0.5, 2.5] });
    assert_eq!(got[1], Nearest { images: vec![0, 2, 1], distances: vec![95.0, 96.0, 99.0] });
    // Fewer than asked for.
    assert_eq!(nearest(&features(&[1.5], 1), &data, 5, 9)[0].images, [1, 3, 2, 0, 4]);
    // Rows 3.. are the mirror images of 0..3: an image comes once, by the nearer of the two.
    let mirrored = features(&[5.0, 1.0, 4.0, 0.0, 2.0, 9.0], 1);
    let got = nearest(&features(&[0.4], 1), &mirrored, 3, 3);
    assert_eq!(got[0].images, [0, 1, 2]);
    near("the distance of a mirror image", got[0].distances[0], 0.4, 1e-15);
    near("of an image that is nearer than its mirror image", got[0].distances[1], 0.6, 1e-15);
}

#[test]
fn distances_in_pixels_are_of_numbers_in_plus_minus_one() {
    let data = [0, 0, 255, 255, 10, 20];
    let got = nearest_pixels(&[0, 1, 255, 0], &data, 2, 3, 2);
    assert_eq!(got[0].images, [0, 2]);
    near("one step", got[0].distances[0], 1.0 / 127.5, 1e-15);
    near("10 and 19 steps", got[0].distances[1], 461.0f64.sqrt() / 127.5, 1e-15);
    assert_eq!(got[1].images, [2, 0]);
    near("black to white", got[1].distances[1], 2.0, 1e-15);
    // More bytes than 32 bits hold the squares of.
    let (black, white) = (vec![0; 200_000], vec![255; 200_000]);
    near("a large image", nearest_pixels(&black, &white, 200_000, 1, 1)[0].distance(), 2.0 * 200_000f64.sqrt(), 1e-9);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    let (a, b) = (normal(7, 60, 11), normal(8, 50, 11));
    same_bits_at_any_number_of_threads("measures", || {
        let shares = precision_and_recall(&a, &b, NEIGHBOURS).unwrap();
        let distances = nearest(&a, &b, b.len(), 2).into_iter().flat_map(|nearest| nearest.distances);
        let numbers = [frechet(&a, &b), shares.precision, shares.recall].into_iter().chain(distances);
        numbers.flat_map(halves).collect()
    });
}
