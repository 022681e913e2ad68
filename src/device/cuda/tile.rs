//! Launch grids of the kernels built on `include/tile_gemm.cuh` and `include/column_sums.cuh`, and split-K.

use super::launch::{Array, ViewMut};
use super::{Gpu, each_one};
use crate::error::Result;
pub use crate::kernels::column_sums::SUM_THREADS;
pub use crate::kernels::tile_gemm::THREADS as TILE_THREADS;
use crate::kernels::{ByType, Kernel, Twin, tile_gemm};

/// Blocks that fill the largest GPU, eight per multiprocessor. The same on every device, because the number of split-K
/// segments affects the last bits of a weight's gradient.
const BLOCKS: usize = 1024;

/// Fewest steps of k worth a segment of their own. A segment's tile of 4096 f32 results is written and read once more:
/// as many bytes as the f32 operands of 64 steps.
const LEAST: usize = 256;

/// The variant that covers a `rows` x `cols` matrix with the fewest tiles, and their number. All tiles have the same
/// area, so that one wastes the least. On a tie, the first: list the square tile first, which reads less per result.
/// The choice does not affect any result's bits.
pub fn choose(variants: [&'static ByType; 2], rows: usize, cols: usize) -> (&'static ByType, usize) {
    let count = |variant: &ByType| {
        let (bm, bn) = variant.f32.tile.expect("the kernel of a product is named by its tile");
        rows.div_ceil(bm as usize) * cols.div_ceil(bn as usize)
    };
    let [a, b] = variants;
    let (first, second) = (count(a), count(b));
    if second < first { (b, second) } else { (a, first) }
}

/// How a long sum over k is split into segments.
struct SplitK {
    /// Steps of k per segment; the last may be shorter.
    segment: usize,
    /// Number of segments.
    count: usize,
}

impl SplitK {
    /// For `depth` steps of k and a product of `tiles` tiles.
    fn new(tiles: usize, depth: usize) -> Self {
        let wanted = BLOCKS.div_ceil(tiles).min(depth / LEAST).max(1);
        let segment = depth.div_ceil(wanted).next_multiple_of(tile_gemm::BK as usize);
        SplitK { segment, count: depth.div_ceil(segment) }
    }
}

/// A matrix product with a long sum over k, such as a weight's gradient, and its kernels. If its tiles alone make too
/// few blocks, k is split into segments (split-K): each segment's product is a matrix of its own, and a second kernel
/// adds them up in order.
pub struct Job {
    /// The product's kernels, one per tile shape.
    pub variants: [&'static ByType; 2],
    /// Adds up the segments' products: `(to, parts, count, len, accumulate)`.
    pub sum_parts: &'static Kernel,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result.
    pub cols: usize,
    /// Steps of k.
    pub depth: usize,
}

impl Job {
    /// Writes the product of `a` and `b` to `to`, f32, or adds it if `accumulate`. The kernels' parameters are `(to, a,
    /// b, sizes, segment, accumulate)`.
    ///
    /// # Errors
    /// A GPU error, or no memory for the segments' products.
    pub fn run(
        &self,
        gpu: &Gpu,
        to: ViewMut<'_>,
        accumulate: bool,
        [a, b]: [Array<'_>; 2],
        sizes: impl Twin,
    ) -> Result<()> {
        let len = self.rows * self.cols;
        assert_eq!(to.bytes(), 4 * len, "bytes of a product {} x {}", self.rows, self.cols);
        let (variant, tiles) = choose(self.variants, self.rows, self.cols);
        let SplitK { segment, count } = SplitK::new(tiles, self.depth);
        let product = gpu.launch(variant.of(a.dtype), [tiles, count, 1], TILE_THREADS);
        if count == 1 {
            let product = product.view_mut(to).array(a).array(b).value(sizes);
            return product.u32(segment).u32(accumulate.into()).run();
        }
        let mut parts = gpu.alloc(4 * count * len)?; // (count, rows, cols)
        product.buffer_mut(&mut parts).array(a).array(b).value(sizes).u32(segment).u32(0).run()?;
        let sum = gpu.launch(self.sum_parts, each_one(len), SUM_THREADS).view_mut(to).buffer(&parts);
        sum.u32(count).u64(len).u32(accumulate.into()).run()
    }
}

/// Threads side by side along the `c` columns of a column sum.
pub fn lanes(c: usize) -> usize {
    c.next_power_of_two().min(32)
}
