//! Grids of the kernels that are built on `include/tile_gemm.cuh` and `include/column_sums.cuh`, and split-K.

use super::launch::{Array, ViewMut};
use super::{Gpu, each_one};
use crate::error::Result;
pub use crate::kernels::column_sums::SUM_THREADS;
pub use crate::kernels::tile_gemm::THREADS as TILE_THREADS;
use crate::kernels::{ByType, Kernel, Twin, tile_gemm};

/// Blocks that fill the largest GPU: eight a multiprocessor. The same on every device, since the number of segments
/// decides the last bits of a weight's gradient.
const BLOCKS: usize = 1024;

/// Steps of k below which a segment of its own costs more than it brings: its tile of 4096 results is written and read
/// once more, as many bytes as operands for 32 steps.
const LEAST: usize = 256;

/// The variant with the fewest tiles over a matrix of `rows` x `cols`, and their number. Tiles have equal areas, so it
/// wastes the least; of two alike the first, which should be the square one: it reads less for each result. No result's
/// bits depend on the tile it is in.
pub fn choose(variants: [&'static ByType; 2], rows: usize, cols: usize) -> (&'static ByType, usize) {
    let count = |variant: &ByType| {
        let (bm, bn) = variant.f32.tile.expect("the kernel of a product is named by its tile");
        rows.div_ceil(bm as usize) * cols.div_ceil(bn as usize)
    };
    let [a, b] = variants;
    let (first, second) = (count(a), count(b));
    if second < first { (b, second) } else { (a, first) }
}

/// How a long sum over k is cut into segments.
struct SplitK {
    /// Steps of k of a segment; the last may be shorter.
    segment: usize,
    /// Segments.
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

/// A matrix product with a long sum over k, such as a weight's gradient, and its kernels: where its tiles alone are too
/// few blocks, k is cut into segments (split-K). Each segment's product is a matrix of its own, and a second kernel
/// adds them up in order.
pub struct Job {
    /// Kernels of the product, by their tile.
    pub variants: [&'static ByType; 2],
    /// Adds parts up: `(to, parts, count, len, accumulate)`.
    pub sum_parts: &'static Kernel,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result.
    pub cols: usize,
    /// Steps of k.
    pub depth: usize,
}

impl Job {
    /// Writes the product of two operands to `to`, f32, or adds it there. The kernels' parameters are `(to, operands,
    /// sizes, segment, accumulate)`.
    ///
    /// # Errors
    /// A GPU that fails, or has no memory for the segments' products.
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

/// Threads side by side along `c` columns that are summed.
pub fn lanes(c: usize) -> usize {
    c.next_power_of_two().min(32)
}
