//! `y = x_0 + x_1 + ... + x_{n-1}` along a fixed binary tree: the same bits, whoever has added which parts of it.
//!
//! A node of `n > 1` terms is the sum of its left child, which has the largest power of two below `n` of them, and its
//! right child, which has the rest (the tree of RFC 6962, section 2.1). So in a sum of P terms every run of 2^k terms
//! that begins at a multiple of 2^k is a node, and if 2^k divides P, the sum of the P / 2^k nodes along the same tree
//! is the sum of the terms.
//!
//! Training adds the gradients of a step's P micro-batches so. Of W ranks each adds up P / W of them in a row, and the
//! owner of a shard the W sums. The bits are those of one rank if the ranks' sums are nodes: if W is 1, or P / W a
//! whole power of two ([`fits`]). For 6 micro-batches that is so of 1, 3 and 6 ranks.
//!
//! ```text
//! P = 6, W = 1           ((x_0 + x_1) + (x_2 + x_3)) + (x_4 + x_5)
//! W = 3                     rank 0        rank 1          rank 2       one sum each; the owner of a shard adds these
//! ```
//!
//! Terms that come one after the other, as micro-batches do, are added up like the digits of a binary counter
//! ([`waiting`], [`rises`]); those that are there at once by [`tree_sum`]. No gradient: it is not on the tape.
//! Numerics: f32, one rounding for each addition, as many as the tree is high: the error grows with log2 n, not with n
//! (Higham 1993, pairwise summation). Bound by memory.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::{Shape, Tensor};

/// Terms of the left child of a node of `terms`, of two at least.
fn left(terms: usize) -> usize {
    terms.next_power_of_two() / 2
}

/// Nodes that wait for their right sibling when `done` terms have been added up as they came.
pub fn waiting(done: usize) -> usize {
    done.count_ones() as usize
}

/// How often the next term after `done` others, and each sum in its turn, completes a node of as many terms as wait
/// before it, and is added to it.
pub fn rises(done: usize) -> usize {
    done.trailing_ones() as usize
}

/// Nodes that are there at once, at most, while `terms` are added up as they come.
pub fn most_waiting(terms: usize) -> usize {
    1 + terms.ilog2() as usize
}

/// Whether `ranks` ranks have the bits of one for a sum of `terms`.
pub fn fits(terms: usize, ranks: usize) -> bool {
    ranks == 1 || (ranks > 0 && terms.is_multiple_of(ranks) && (terms / ranks).is_power_of_two())
}

/// Writes the sum of the rows of `x`, (n, 1, 1, len), to `y`, (1, 1, 1, len). On a GPU `len` is a multiple of four.
///
/// # Errors
/// A GPU error.
pub fn tree_sum(device: &Device, y: &mut Tensor, x: &Tensor) -> Result<()> {
    let (Shape { n, c: len, .. }, shape) = (x.shape(), y.shape());
    assert!(n > 0 && x.shape() == Shape::new(n, 1, 1, len), "tree_sum: rows of {}", x.shape());
    assert_eq!(shape, Shape::vector(len), "tree_sum: the sum of rows of {len}");
    match device {
        Device::Cpu(_) => cpu::forward(y.data_mut(), x.data(), n),
        Device::Cuda(gpu) => cuda::forward(gpu, y, x)?,
        Device::Meta(_) => {}
    }
    Ok(())
}

/// The definition.
pub mod reference {
    use std::ops::Add;

    /// The sum of terms of equally many numbers each.
    pub fn forward<T: Copy + Add<Output = T>>(terms: &[&[T]]) -> Vec<T> {
        if let [term] = terms {
            return term.to_vec();
        }
        let (left, right) = terms.split_at(super::left(terms.len()));
        forward(left).into_iter().zip(forward(right)).map(|(left, right)| left + right).collect()
    }
}

mod cpu {
    use rayon::prelude::*;

    /// Elements per task: 16 KiB, so that the nodes of one stay in a cache.
    const CHUNK: usize = 1 << 12;

    pub fn forward(y: &mut [f32], x: &[f32], terms: usize) {
        let len = y.len();
        let chunk = |(k, y): (usize, &mut [f32])| {
            let end = k * CHUNK + y.len();
            node(y, &|term| &x[term * len..][k * CHUNK..end], 0, terms);
        };
        y.par_chunks_mut(CHUNK).enumerate().for_each(chunk);
    }

    /// Writes the node of terms `first..first + terms` to `y`.
    fn node<'a>(y: &mut [f32], term: &impl Fn(usize) -> &'a [f32], first: usize, terms: usize) {
        if terms == 1 {
            return y.copy_from_slice(term(first));
        }
        let left = super::left(terms);
        node(y, term, first, left);
        let mut right = [0.0; CHUNK];
        let right = &mut right[..y.len()];
        node(right, term, first + left, terms - left);
        y.iter_mut().zip(right).for_each(|(y, right)| *y += *right);
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::{Gpu, each_four};
    use crate::kernels::tree_sum::{FWD, LEVELS};

    pub fn forward(gpu: &Gpu, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let Shape { n, c: len, .. } = x.shape();
        assert!(len.is_multiple_of(4), "tree_sum: rows of {len}, a multiple of 4 is expected");
        assert!(n < 1 << LEVELS, "tree_sum: {n} rows, the kernel adds up to {}", (1 << LEVELS) - 1);
        gpu.launch(&FWD, each_four(len), 256).write(y).read(x).u64(len).u32(n).run()
    }
}
