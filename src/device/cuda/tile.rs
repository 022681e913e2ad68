//! Launch grids of the kernels built on `include/tile_gemm.cuh`, `include/column_sums.cuh` and `include/rows.cuh`, and
//! split-K.

use super::Gpu;
use super::launch::{Array, ViewMut};
use super::pool::Buffer;
use crate::error::Result;
pub use crate::kernels::column_sums::SUM_THREADS;
pub use crate::kernels::tile_gemm::THREADS as TILE_THREADS;
use crate::kernels::{ByType, Kernel, Twin, tile_gemm};

/// Blocks of a weight's gradient that a multiprocessor holds at once. Each of its four schedulers has 512 registers a
/// lane, and a thread takes 134 to 167, more than a quarter and at most a third of them: three warps each, six blocks
/// of two. Shared memory, 12 KiB a block with what the driver adds, leaves room for as many on every architecture. (The
/// linear layer's 32x128 in bf16 takes 127; such small products have no second wave.)
pub const RESIDENT: usize = 6;

/// Multiprocessors of the GPUs for which split-K is chosen: A100, RTX 4090 and H100.
pub const MULTIPROCESSORS: [usize; 3] = [108, 128, 132];

/// What a segment costs beside its own steps of k, in such steps. Its tile of 4096 f32 results is written and read once
/// more: as many bytes as the f32 operands of 64 steps, and about the time of 64 steps of FMAs at a multiprocessor's
/// share of the memory's bandwidth.
const JOIN: usize = 64;

/// Fewest steps of k worth a segment of their own: joining it then costs at most half of it.
const LEAST: usize = 2 * JOIN;

/// Waves of blocks, at most, into which split-K cuts a product. In four waves 3,072 blocks keep all three GPUs busy
/// (0.95, 1.00 and 0.97 of their time). Their partial sums are 48 MiB.
const WAVES: usize = 4;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitK {
    /// Steps of k per segment, a multiple of 8; the last may be shorter.
    pub segment: usize,
    /// Number of segments.
    pub count: usize,
}

impl SplitK {
    /// For `depth` steps of k and a product of `tiles` tiles. The same for every GPU, since the number of segments
    /// affects the last bits of a weight's gradient: the one that wastes least where it wastes most.
    ///
    /// A GPU computes the blocks in waves, as many at a time as it holds, each wave as long as a segment and its join.
    /// With more segments in the same number of waves, each is shorter. So only those numbers of segments are tried
    /// that just fill a number of waves of one of the GPUs.
    pub fn new(tiles: usize, depth: usize) -> Self {
        let most = (depth / LEAST).max(1);
        let full = |(slots, waves): (usize, usize)| (waves * slots / tiles).clamp(1, most);
        let every = slots().into_iter().flat_map(|slots| (1..=WAVES).map(move |waves| (slots, waves)));
        let split = |wanted: usize| {
            let segment = depth.div_ceil(wanted).next_multiple_of(tile_gemm::BK as usize);
            SplitK { segment, count: depth.div_ceil(segment).max(1) }
        };
        let best = every.map(full).map(split).min_by_key(|split| (split.time(tiles), split.count));
        best.expect("there are GPUs, and each has a wave")
    }

    /// The steps of k for which it takes all resident blocks of a GPU: of that for which they are most.
    fn time(&self, tiles: usize) -> usize {
        let join = if self.count > 1 { JOIN } else { 0 };
        let of_gpu = |slots: usize| (tiles * self.count).div_ceil(slots) * slots * (self.segment + join);
        slots().into_iter().map(of_gpu).max().expect("there are GPUs")
    }
}

/// Rows of a product of `cols` columns, all its k in one block each, whose tiles of 64x64 fill the largest of the GPUs
/// `waves` times.
pub fn rows_of_waves(waves: usize, cols: usize) -> usize {
    let [.., largest] = MULTIPROCESSORS;
    64 * (waves * tile_gemm::RESIDENT as usize * largest).div_ceil(cols.div_ceil(64))
}

/// Blocks of a weight's gradient that each of the three GPUs holds at once.
fn slots() -> [usize; 3] {
    MULTIPROCESSORS.map(|multiprocessors| RESIDENT * multiprocessors)
}

/// A matrix product with a long sum over k, such as a weight's gradient, and its kernels. If its tiles alone make too
/// few blocks, k is split into segments (split-K): each segment's product is a matrix of its own, and a second kernel
/// adds them up in order.
pub struct Job {
    /// The product's kernels, one per tile shape.
    pub variants: [&'static ByType; 2],
    /// Adds up the segments' products, as [`sum_parts`] says.
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
        sum_parts(gpu, self.sum_parts, to, &parts, count, len, accumulate)
    }
}

/// Writes the column sums of `parts` (count, len) to `to` (len), f32, or adds them if `accumulate`. The kernel's
/// parameters are `(to, parts, count, len, accumulate, lanes)`.
///
/// # Errors
/// A GPU error.
pub fn sum_parts(
    gpu: &Gpu,
    kernel: &'static Kernel,
    to: ViewMut<'_>,
    parts: &Buffer,
    count: usize,
    len: usize,
    accumulate: bool,
) -> Result<()> {
    let lanes = part_lanes(count);
    let launch = gpu.launch(kernel, [len.div_ceil(lanes), 1, 1], SUM_THREADS).view_mut(to).buffer(parts);
    launch.u32(count).u64(len).u32(accumulate.into()).u32(lanes).run()
}

/// Threads side by side along the sums of `count` parts: a thread adds up at most eight, unless there are more than
/// 256. The number of results does not matter, so that they do not depend on it.
fn part_lanes(count: usize) -> usize {
    SUM_THREADS as usize / count.div_ceil(8).next_power_of_two().min(32)
}

/// Threads side by side along the `c` columns of a column sum.
pub fn lanes(c: usize) -> usize {
    c.next_power_of_two().min(32)
}

/// Grid for a kernel built on `include/rows.cuh`, over `rows` rows of `width` items, with blocks of `threads` threads
/// (a power of two), and its `lane_bits`: as many threads side by side along a row as cover it, if a block has them.
pub fn over_rows(rows: usize, width: usize, threads: u32) -> ([usize; 3], usize) {
    assert!(width < 1 << 31, "rows of {width} items; the kernels count to 2^31");
    let threads = threads as usize;
    let lanes = width.next_power_of_two().min(threads);
    ([rows.div_ceil(threads / lanes), 1, 1], lanes.ilog2() as usize)
}

/// Elements of `bytes` bytes in 16, and 1 if they do not divide every one of `widths`: how many a copy built on
/// `include/rows.cuh` moves at a time.
pub fn at_a_time(bytes: usize, widths: &[usize]) -> usize {
    let wide = 16 / bytes;
    if widths.iter().all(|width| width.is_multiple_of(wide)) { wide } else { 1 }
}
