//! Whether samples are copies of training images: each one's nearest training images, and how near they are compared
//! with images that were not trained on.

use rayon::prelude::*;

use super::{Features, squared_distance};

/// A sample whose nearest training image is nearer than this share of the distance to the second nearest is a copy. Of
/// 2,000 held-out digits of MNIST, compared with 8,000 others, none has less than 0.6 in pixels.
pub const COPY_RATIO: f64 = 1.0 / 3.0;

/// The nearest training images of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Nearest {
    /// Their indices, nearest first, of equally near ones the lower index first.
    pub images: Vec<usize>,
    /// Their distances.
    pub distances: Vec<f64>,
}

impl Nearest {
    /// Distance to the nearest.
    pub fn distance(&self) -> f64 {
        self.distances[0]
    }

    /// The distance to the nearest as a share of that to the second nearest: small for the copy of one image, whether
    /// images of its kind lie close together or not. 0 for an image that is a training image, 1 where there is no
    /// second.
    pub fn ratio(&self) -> f64 {
        match self.distances[..] {
            [0.0, ..] => 0.0,
            [nearest, second, ..] => nearest / second,
            _ => 1.0,
        }
    }
}

/// The `count` nearest rows of `data` for each row of `of`, by Euclidean distance; fewer if there are fewer. Row i of
/// `data` belongs to training image i modulo `images`: mirror images of all of them may follow, and the nearer of an
/// image and its mirror image counts.
pub fn nearest(of: &Features, data: &Features, images: usize, count: usize) -> Vec<Nearest> {
    assert_eq!(of.d(), data.d(), "features of {} and of {} numbers", of.d(), data.d());
    let rows: Vec<&[f64]> = of.rows().collect();
    let found = |row: &&[f64]| best(data.rows().map(|other| squared_distance(row, other)), images, count, f64::sqrt);
    rows.par_iter().map(found).collect()
}

/// [`nearest`] for the bytes of images of `len` bytes each, as numbers in [-1, 1]: byte / 127.5 - 1. Sums of integers:
/// exact.
pub fn nearest_pixels(of: &[u8], data: &[u8], len: usize, images: usize, count: usize) -> Vec<Nearest> {
    let squared = |a: &[u8], b: &[u8]| -> f64 {
        // 65,536 squares of at most 255^2 fit into 32 bits.
        let part = |(a, b): (&[u8], &[u8])| {
            u64::from(a.iter().zip(b).map(|(&a, &b)| u32::from(a.abs_diff(b)).pow(2)).sum::<u32>())
        };
        a.chunks(1 << 16).zip(b.chunks(1 << 16)).map(part).sum::<u64>() as f64
    };
    let found = |image: &[u8]| {
        let all = data.chunks_exact(len).map(|other| squared(image, other));
        best(all, images, count, |sum| sum.sqrt() / 127.5)
    };
    of.par_chunks_exact(len).map(found).collect()
}

/// The `count` images with the least of `squared`, of which entry i is of image i modulo `images`.
fn best(squared: impl Iterator<Item = f64>, images: usize, count: usize, distance: impl Fn(f64) -> f64) -> Nearest {
    let mut least: Vec<(f64, usize)> = Vec::with_capacity(count + 1);
    for (i, squared) in squared.enumerate() {
        let entry = (squared, i % images);
        let before = |a: &(f64, usize), b: &(f64, usize)| a.0 < b.0 || (a.0 == b.0 && a.1 < b.1);
        if least.len() == count && !before(&entry, &least[count - 1]) {
            continue;
        }
        match least.iter().position(|kept| kept.1 == entry.1) {
            Some(same) if !before(&entry, &least[same]) => continue,
            Some(same) => drop(least.remove(same)),
            None => {}
        }
        let place = least.partition_point(|kept| before(kept, &entry));
        least.insert(place, entry);
        least.truncate(count);
    }
    let (squared, images) = least.into_iter().unzip::<_, _, Vec<f64>, _>();
    Nearest { images, distances: squared.into_iter().map(distance).collect() }
}

/// How near samples are to the training set compared with held-out images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nearness {
    /// Share of the pairs of a sample and a held-out image in which the sample is nearer to its nearest training image
    /// than the held-out image to its own; a tie counts half. 1/2 if samples are like held-out images, 1 if all are
    /// copies.
    pub nearer_than_held_out: f64,
    /// How many standard deviations that share is from 1/2 (Mann and Whitney's U with continuity correction): far below
    /// 0 for copies, far above for samples that are unlike any image.
    pub z: f64,
    /// Share of the samples that are the same as a training image, or much nearer to one than to any other
    /// ([`COPY_RATIO`]).
    pub copies: f64,
    /// Mean distance of a sample to its nearest training image.
    pub distance: f64,
    /// The same for held-out images.
    pub held_out_distance: f64,
}

impl Nearness {
    /// Compares the nearest training images of samples with those of held-out images. Neither may be empty.
    pub fn of(samples: &[Nearest], held_out: &[Nearest]) -> Self {
        assert!(!samples.is_empty() && !held_out.is_empty(), "{} samples, {} held out", samples.len(), held_out.len());
        let mean = |of: &[Nearest]| of.iter().map(Nearest::distance).sum::<f64>() / of.len() as f64;
        let mut theirs: Vec<f64> = held_out.iter().map(Nearest::distance).collect();
        theirs.sort_unstable_by(f64::total_cmp);
        // U: pairs in which the sample is farther.
        let farther = |sample: &Nearest| {
            let below = theirs.partition_point(|&d| d < sample.distance());
            let up_to = theirs.partition_point(|&d| d <= sample.distance());
            (below + up_to) as f64 / 2.0
        };
        let u: f64 = samples.iter().map(farther).sum();
        let (n, m) = (samples.len() as f64, held_out.len() as f64);
        let deviation = (n * m * (n + m + 1.0) / 12.0).sqrt();
        Nearness {
            nearer_than_held_out: 1.0 - u / (n * m),
            z: (u - (n * m / 2.0 - 0.5)) / deviation,
            copies: samples.iter().filter(|nearest| nearest.ratio() < COPY_RATIO).count() as f64 / n,
            distance: mean(samples),
            held_out_distance: mean(held_out),
        }
    }
}
