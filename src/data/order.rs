//! The order in which training sees the images.

use std::ops::Range;

use rand::Rng;

use crate::rng::{Generator, Purpose, Stream};

/// The order in which training sees images: one endless sequence, a new permutation per epoch, of which each step takes
/// the next batch. A pure function of (seed, position); only the permutation last used is kept.
pub struct Order {
    seed: u64,
    images: usize,
    epoch: u64,
    permutation: Vec<u32>,
}

impl Order {
    /// The order of a data set of `images` images, at least one.
    pub fn new(seed: u64, images: usize) -> Self {
        assert!(images > 0 && images <= u32::MAX as usize, "an order of {images} images");
        Order { seed, images, epoch: 0, permutation: permutation(seed, 0, images) }
    }

    /// Indices of the images of step `step` (from 0). A batch may cross the end of an epoch, or of several.
    pub fn indices(&mut self, step: u32, batch: usize) -> Vec<usize> {
        let first = u64::from(step) * batch as u64;
        self.range(first..first + batch as u64)
    }

    /// Indices of the images at positions `places` of the endless sequence.
    pub fn range(&mut self, places: Range<u64>) -> Vec<usize> {
        places.map(|place| self.at(place)).collect()
    }

    fn at(&mut self, place: u64) -> usize {
        let (epoch, place) = (place / self.images as u64, (place % self.images as u64) as usize);
        if epoch != self.epoch {
            (self.epoch, self.permutation) = (epoch, permutation(self.seed, epoch, self.images));
        }
        self.permutation[place] as usize
    }
}

/// `0..n`, shuffled with the stream of `epoch`.
fn permutation(seed: u64, epoch: u64, n: usize) -> Vec<u32> {
    let stream = Stream { seed, purpose: Purpose::Shuffle, step: (epoch >> 32) as u32, stream: epoch as u32 };
    shuffled(n as u32, stream)
}

/// `0..n` after a Fisher-Yates shuffle (Durstenfeld 1964): element i changes places with one of `0..=i`, for rising i.
///
/// Part of the definition of a run, so it is here and not a library's: another version of it would order the images of
/// a resumed run anew. The indices are drawn in groups: one number below the product of as many successive bounds as
/// fit into 32 bits holds an index for each, the first in its lowest digit (Brackett-Rozinsky, Lemire 2024).
fn shuffled(n: u32, stream: Stream) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n).collect();
    let mut generator = stream.generator();
    // Element 0 has nowhere to go, and costs no random number.
    let mut i = 1;
    while i < n {
        let (product, end) = group(i, n);
        let mut number = below(product, &mut generator);
        for at in i..end {
            order.swap(at as usize, (number % (at + 1)) as usize);
            number /= at + 1;
        }
        i = end;
    }
    order
}

/// The product of the bounds `i + 1`, `i + 2`, ... as far as it fits into 32 bits, and the first i that it leaves out.
/// It does not end with the last element `n - 1`, so that an order of few images takes the same first numbers as one of
/// many.
fn group(i: u32, n: u32) -> (u32, u32) {
    let (mut product, mut end) = (i + 1, i + 1);
    while let Some(larger) = end.checked_add(1).and_then(|bound| product.checked_mul(bound)) {
        (product, end) = (larger, end + 1);
    }
    (product, end.min(n))
}

/// A number on `0..bound`, from one word, or from two if the first leaves the result open (Canon's method). Each result
/// has its probability to within `bound / 2^64`.
fn below(bound: u32, generator: &mut Generator) -> u32 {
    let scaled = |word: u32| u64::from(word) * u64::from(bound);
    let first = scaled(generator.next_u32());
    let (result, fraction) = ((first >> 32) as u32, first as u32);
    if fraction <= bound.wrapping_neg() {
        return result;
    }
    let carry = fraction.checked_add((scaled(generator.next_u32()) >> 32) as u32).is_none();
    result + u32::from(carry)
}
