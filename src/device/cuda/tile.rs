//! Launch grids of the kernels built on `include/tile_gemm.cuh`, `include/tile_mma.cuh`, `include/column_sums.cuh` and
//! `include/rows.cuh`, split-K, and the sums of partial sums, which `add.cu` adds up.

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Zeroable;

use super::Gpu;
use super::launch::{Array, Launch, View, ViewMut};
use super::pool::Buffer;
use crate::device::Precision;
use crate::error::Result;
use crate::kernels::add::PARTS;
pub use crate::kernels::column_sums::SUM_THREADS;
use crate::kernels::column_sums::{SUMS, Sum, Sums};
use crate::kernels::{Kernel, Twin, tile_gemm, tile_mma};

/// Blocks of a weight's gradient that a multiprocessor holds at once. Each of its four schedulers has 512 registers a
/// lane, and a thread takes 134 to 167, more than a quarter and at most a third of them: three warps each, six blocks
/// of two. Shared memory, 12 KiB a block with what the driver adds, leaves room for as many on every architecture. (The
/// linear layer's 32x128 in bf16 takes 127; such small products have no second wave. In tf32 they take 126 to 160, and
/// are six to eight.)
pub const RESIDENT: usize = 6;

/// Multiprocessors of the GPUs for which split-K is chosen: A100, RTX 4090 and H100.
pub const MULTIPROCESSORS: [usize; 3] = [108, 128, 132];

/// What split-K knows of the blocks of a weight's gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// How many each of the GPUs of [`MULTIPROCESSORS`] holds at once.
    pub slots: [usize; 3],
    /// Steps of k that a block takes at a time.
    pub step: usize,
    /// What a segment costs beside its own steps of k, in such steps: its tile of f32 results is written and read once
    /// more. No segment has fewer than twice as many steps: joining it costs at most half of it.
    pub join: usize,
}

/// Of `include/tile_gemm.cuh`. A tile of 4096 results and back is as many bytes as the f32 operands of 64 steps, and
/// about the time of 64 steps of FMAs at a multiprocessor's share of the memory's bandwidth.
pub const FMA: Blocks =
    Blocks { slots: [RESIDENT * 108, RESIDENT * 128, RESIDENT * 132], step: tile_gemm::BK as usize, join: 64 };

/// Of the 128x128 tiles of `include/tile_mma.cuh`, whose 98 KiB of shared memory leave room for one on an A100 and on
/// an RTX 4090 and for two on an H100. An A100 takes 16 cycles for a step of k of a tile; its 128 KiB to the L2 cache
/// and back are at its share of 47 bytes a cycle 2,800 cycles.
pub const MMA_128: Blocks = Blocks { slots: [108, 128, 2 * 132], step: tile_mma::BK as usize, join: 192 };

/// Of the 64x64 tiles, which take 50 KiB: three, one and three a multiprocessor, of which an H100 would have room for a
/// fourth, but not registers.
pub const MMA_64: Blocks = Blocks { slots: [3 * 108, 128, 3 * 132], step: tile_mma::BK as usize, join: 192 };

/// The same of channels that 8 does not divide, whose operands are gathered element by element: two, one and two.
pub const MMA_64_ANY: Blocks = Blocks { slots: [2 * 108, 128, 2 * 132], ..MMA_64 };

/// Waves of blocks, at most, into which split-K cuts a product. In four waves 3,072 blocks on FMAs keep all three GPUs
/// busy (0.95, 1.00 and 0.97 of their time). Their partial sums are 48 MiB.
const WAVES: usize = 4;

/// Rows and columns of a kernel's tile.
pub fn tile(kernel: &Kernel) -> (usize, usize) {
    let (bm, bn) = kernel.tile.expect("the kernel of a product is named by its tile");
    (bm as usize, bn as usize)
}

/// Number of a kernel's tiles that cover a `rows` x `cols` matrix.
pub fn tiles(kernel: &Kernel, rows: usize, cols: usize) -> usize {
    let (bm, bn) = tile(kernel);
    rows.div_ceil(bm) * cols.div_ceil(bn)
}

/// The variant that covers a `rows` x `cols` matrix with the fewest tiles, and their number. All tiles have the same
/// area, so that one wastes the least. On a tie, the first: list the square tile first, which reads less per result.
/// The choice does not affect any result's bits.
pub fn choose(variants: [&'static Kernel; 2], rows: usize, cols: usize) -> (&'static Kernel, usize) {
    let [a, b] = variants;
    let (first, second) = (tiles(a, rows, cols), tiles(b, rows, cols));
    if second < first { (b, second) } else { (a, first) }
}

/// The kernels of a product of f32 tensors: those on FMAs or, where the GPU was opened for tf32, on tensor cores.
pub fn of_f32(gpu: &Gpu, fma: [&'static Kernel; 2], tf32: [&'static Kernel; 2]) -> [&'static Kernel; 2] {
    if gpu.precision() == Precision::Tf32 { tf32 } else { fma }
}

/// Bytes of the ring of a product on tensor cores with tiles of `bm` x `bn`.
pub fn ring(bm: usize, bn: usize) -> usize {
    (tile_mma::STAGES * tile_mma::BK) as usize * 2 * (bm + bn)
}

/// Bytes of dynamic shared memory of a product's kernel: the ring of those on tensor cores, `S_PASS_mma_BMxBN`.
pub fn shared(kernel: &Kernel) -> usize {
    let (bm, bn) = tile(kernel);
    if kernel.name.contains("_mma_") { ring(bm, bn) } else { 0 }
}

/// Fewest tiles of 128x128 worth their size in a product whose k is not split: fewer leave most multiprocessors of a
/// GPU idle, which four times as many of 64x64 do not.
pub const MANY: usize = 96;

/// The 128x128 kernel `large` for a product of `rows` x `cols` on tensor cores if there are at least `least` tiles and
/// they multiply no more than an eighth in vain beside what tiles of 64x64 would; otherwise `small`. The choice does
/// not affect any result's bits.
pub fn choose_mma(
    large: Option<&'static Kernel>,
    small: &'static Kernel,
    least: usize,
    rows: usize,
    cols: usize,
) -> &'static Kernel {
    let good = |large: &&Kernel| {
        let count = tiles(large, rows, cols);
        count >= least && 8 * 4 * count <= 9 * rows.div_ceil(64) * cols.div_ceil(64)
    };
    large.filter(good).unwrap_or(small)
}

/// How a long sum over k is split into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SplitK {
    /// Steps of k per segment, a multiple of the blocks' own; the last may be shorter.
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
    pub fn new(blocks: Blocks, tiles: usize, depth: usize) -> Self {
        let most = (depth / (2 * blocks.join)).max(1);
        let full = |(slots, waves): (usize, usize)| (waves * slots / tiles).clamp(1, most);
        let every = blocks.slots.into_iter().flat_map(|slots| (1..=WAVES).map(move |waves| (slots, waves)));
        let split = |wanted: usize| {
            let segment = depth.div_ceil(wanted).next_multiple_of(blocks.step);
            SplitK { segment, count: depth.div_ceil(segment).max(1) }
        };
        let best = every.map(full).map(split).min_by_key(|split| (split.time(blocks, tiles), split.count));
        best.expect("there are GPUs, and each has a wave")
    }

    /// The same for a product whose blocks are launched before others that take as many products of two numbers in all:
    /// the gradient of a weight, before that of its input. The others fill the waves, so that few segments do, and with
    /// them few partial sums, as long as a segment ends before the launch: after fifteen sixteenths of what each
    /// multiprocessor of the largest GPU has to do, if it has as many blocks at a time as it holds. (Seven eighths
    /// left a quarter more partial sums.)
    pub fn beside_as_many(blocks: Blocks, tiles: usize, depth: usize) -> Self {
        let [.., multiprocessors] = MULTIPROCESSORS;
        let [.., slots] = blocks.slots;
        let of_launch = 2 * tiles * depth / multiprocessors;
        let longest = (15 * of_launch / (16 * slots / multiprocessors)).max(2 * blocks.join);
        let segment = depth.div_ceil(depth.div_ceil(longest).max(1)).next_multiple_of(blocks.step);
        SplitK { segment, count: depth.div_ceil(segment).max(1) }
    }

    /// The steps of k for which it takes all resident blocks of a GPU: of that for which they are most.
    fn time(&self, blocks: Blocks, tiles: usize) -> usize {
        let join = if self.count > 1 { blocks.join } else { 0 };
        let of_gpu = |slots: usize| (tiles * self.count).div_ceil(slots) * slots * (self.segment + join);
        blocks.slots.into_iter().map(of_gpu).max().expect("there are GPUs")
    }
}

/// Rows of a product of `cols` columns, all its k in one block each, whose tiles of 64x64 fill the largest of the GPUs
/// `waves` times.
pub fn rows_of_waves(waves: usize, cols: usize) -> usize {
    let [.., largest] = MULTIPROCESSORS;
    64 * (waves * tile_gemm::RESIDENT as usize * largest).div_ceil(cols.div_ceil(64))
}

/// A matrix product with a long sum over k, such as a weight's gradient, and its kernels. If its tiles alone make too
/// few blocks, k is split into segments (split-K): each segment's product is a matrix of its own, and `add_parts` adds
/// them up in order.
pub struct Job {
    /// The product's kernel.
    pub kernel: &'static Kernel,
    /// Bytes of its shared memory.
    pub shared: usize,
    /// How its blocks split k.
    pub blocks: Blocks,
    /// Rows of the result.
    pub rows: usize,
    /// Columns of the result.
    pub cols: usize,
    /// Steps of k.
    pub depth: usize,
    /// Tiles of the result.
    pub tiles: usize,
    /// Its kernel can leave the sums over k of the first operand, f64 (segments, rows), by its last parameter.
    pub sums: bool,
}

impl Job {
    /// Of f32 tensors, by that of the `variants` that wastes least. In tf32 k is split as in f32.
    pub fn of_f32(variants: [&'static Kernel; 2], rows: usize, cols: usize, depth: usize) -> Self {
        let (kernel, tiles) = choose(variants, rows, cols);
        Job { kernel, shared: 0, blocks: FMA, rows, cols, depth, tiles, sums: false }
    }

    /// On tensor cores, by a kernel with tiles of 128x128 or 64x64. `more`: bytes of shared memory beside its ring.
    pub fn on_mma(kernel: &'static Kernel, more: usize, rows: usize, cols: usize, depth: usize) -> Self {
        let blocks = match kernel.tile {
            Some((128, 128)) => MMA_128,
            _ if kernel.name.contains("_any") => MMA_64_ANY,
            _ => MMA_64,
        };
        let tiles = tiles(kernel, rows, cols);
        Job { kernel, shared: shared(kernel) + more, blocks, rows, cols, depth, tiles, sums: true }
    }

    /// How k is split.
    pub fn split(&self) -> SplitK {
        SplitK::new(self.blocks, self.tiles, self.depth)
    }

    /// Writes the product, of which k is not split, to `to`, f32, or adds it if `accumulate`. The kernel's parameters
    /// are `to`, the operands, and `(sizes, segment, accumulate)`; and `sums`, if it can leave them.
    ///
    /// # Errors
    /// A GPU error.
    pub fn run(
        &self,
        gpu: &Gpu,
        to: ViewMut<'_>,
        accumulate: bool,
        operands: &[Option<Array<'_>>],
        sizes: impl Twin,
        sums: Option<&mut Buffer>,
    ) -> Result<()> {
        assert_eq!(to.bytes(), 4 * self.rows * self.cols, "bytes of a product {} x {}", self.rows, self.cols);
        self.launch(gpu, |launch| launch.view_mut(to), accumulate, operands, sizes, sums)
    }

    /// The products of the segments.
    ///
    /// # Errors
    /// A GPU error, or no memory for them.
    pub fn run_split(
        &self,
        gpu: &Gpu,
        operands: &[Option<Array<'_>>],
        sizes: impl Twin,
        sums: Option<&mut Buffer>,
    ) -> Result<Parts> {
        let (len, count) = (self.rows * self.cols, self.split().count);
        let mut buffer = gpu.alloc(4 * count * len)?; // (count, rows, cols)
        self.launch(gpu, |launch| launch.buffer_mut(&mut buffer), false, operands, sizes, sums)?;
        Ok(Parts { buffer: Arc::new(buffer), size: 4, from: 0, count, pitch: len })
    }

    fn launch<'a>(
        &self,
        gpu: &'a Gpu,
        to: impl FnOnce(Launch<'a>) -> Launch<'a>,
        accumulate: bool,
        operands: &[Option<Array<'a>>],
        sizes: impl Twin,
        sums: Option<&'a mut Buffer>,
    ) -> Result<()> {
        let SplitK { segment, count } = self.split();
        let product = gpu.launch(self.kernel, [self.tiles, count, 1], self.kernel.max_threads).shared(self.shared);
        let product = operands.iter().fold(to(product), |launch, x| launch.array_opt(*x));
        let product = product.value(sizes).u32(segment).u32(accumulate.into());
        assert!(self.sums || sums.is_none(), "{} leaves no sums", self.kernel.name);
        if self.sums { product.buffer_mut_opt(sums).run() } else { product.run() }
    }
}

/// The launches for the gradient of a weight and for that of its input, on tensor cores, by the sides of their tiles,
/// 64 or 128, if they are wanted: one for both, unless those of the input's gradient are larger, for which there is no
/// kernel.
pub fn backward_launches(dw: Option<usize>, dx: Option<usize>) -> Vec<[Option<usize>; 2]> {
    match (dw, dx) {
        (None, None) => vec![],
        (Some(of_dw), Some(of_dx)) if of_dw < of_dx => vec![[dw, None], [None, dx]],
        _ => vec![[dw, dx]],
    }
}

/// The kernel of such a launch: of those with tiles of 128x128 for both, of 64x64 for the input's gradient, and of
/// 64x64 for both.
pub fn backward_kernel([dw, dx]: [Option<usize>; 2], kernels: [&'static Kernel; 3]) -> &'static Kernel {
    let [large, mixed, small] = kernels;
    match (dw.or(dx), dx.or(dw)) {
        (Some(128), Some(128)) => large,
        (Some(128), Some(64)) => mixed,
        (Some(64), Some(64)) => small,
        sides => panic!("no kernel has tiles of {sides:?} for the gradients of a weight and its input"),
    }
}

/// How such a launch splits k of the weight's gradient, which has so many tiles.
pub fn split_in([dw, dx]: [Option<usize>; 2], tiles: usize, depth: usize) -> SplitK {
    let blocks = if dw == Some(128) { MMA_128 } else { MMA_64 };
    if dx.is_some() { SplitK::beside_as_many(blocks, tiles, depth) } else { SplitK::new(blocks, tiles, depth) }
}

/// A product on tensor cores whose k is cut into segments of whole slabs by the layer's shape, so that an image's bits
/// do not depend on its batch; see `include/conv2d_mma.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segments {
    /// Slabs in a segment; the last may be shorter.
    pub segment: usize,
    /// Number of segments.
    pub count: usize,
}

impl Segments {
    /// Pixels, at most, of an image whose sums are cut: with more a batch of one has enough tiles.
    const PIXELS: usize = 64;
    /// Segments of a sum, at most, and slabs of one, at least.
    const MOST: usize = 8;
    const LEAST: usize = 4;

    /// All slabs in one.
    pub const ONE: Segments = Segments { segment: usize::MAX >> 33, count: 1 };

    /// For images of `pixels` pixels and `slabs` slabs.
    pub fn new(pixels: usize, slabs: usize) -> Self {
        let wanted = if pixels <= Self::PIXELS { (slabs / Self::LEAST).clamp(1, Self::MOST) } else { 1 };
        let segment = slabs.div_ceil(wanted).max(1);
        Segments { segment, count: slabs.div_ceil(segment).max(1) }
    }

    /// How many blocks share a tile: one for each segment if `tiles` tiles alone leave multiprocessors idle. From
    /// [`MANY`] on, each has a block or nearly, whose four warps keep it busy, and sums that are stored, read and added
    /// up by a launch more would take longer than they save.
    pub fn blocks(&self, tiles: usize) -> usize {
        if tiles < MANY { self.count } else { 1 }
    }
}

/// Partial sums, whose sum becomes a parameter's gradient: `count` parts, of which the next begins `pitch` elements
/// further on.
#[derive(Clone)]
pub struct Parts {
    /// The memory.
    pub buffer: Arc<Buffer>,
    /// Bytes of an element: 4 for f32, 8 for f64.
    pub size: usize,
    /// Elements before the first part.
    pub from: usize,
    /// How many.
    pub count: usize,
    /// Elements from one to the next.
    pub pitch: usize,
}

/// [`Parts`] that have yet to be added up. Most sums are a launch of some microseconds, and a backward pass has more
/// than a hundred: so they wait for each other, at the price of the memory that they hold.
#[derive(Default)]
pub struct PendingSums {
    list: Vec<(Parts, Range<usize>, bool)>,
}

impl PendingSums {
    /// Bytes that may wait. More would save less: a pass over `cifar10` has some 1.4 GB of partial sums in all.
    const MOST: usize = 128 << 20;

    /// The sum of `parts` is to be written to the elements `to` of a buffer of f32, or added if `accumulate`.
    pub fn push(&mut self, parts: Parts, to: Range<usize>, accumulate: bool) {
        self.list.push((parts, to, accumulate));
    }

    /// True if elements of `to` wait for a sum.
    pub fn concerns(&self, to: &Range<usize>) -> bool {
        self.list.iter().any(|(_, of, _)| of.start < to.end && to.start < of.end)
    }

    /// True if they should wait no longer.
    pub fn is_full(&self) -> bool {
        let bytes = |(parts, to, _): &(Parts, Range<usize>, bool)| parts.size * parts.count * to.len();
        self.list.iter().map(bytes).sum::<usize>() >= Self::MOST
    }

    /// Adds them up, into `to`.
    ///
    /// # Errors
    /// A GPU error.
    pub fn run(&mut self, gpu: &Gpu, to: &mut Buffer) -> Result<()> {
        self.list.chunks(SUMS as usize).try_for_each(|sums| add_parts(gpu, to, sums))?;
        self.list.clear();
        Ok(())
    }
}

fn add_parts(gpu: &Gpu, to: &mut Buffer, sums: &[(Parts, Range<usize>, bool)]) -> Result<()> {
    let kernel = &PARTS;
    let start = sums.iter().map(|(_, to, _)| to.start).min().expect("some sums");
    let end = sums.iter().map(|(_, to, _)| to.end).max().expect("some sums");
    let number = |v: usize| u32::try_from(v).unwrap_or_else(|_| panic!("{}: {v} in {} sums", kernel.name, sums.len()));
    let blocks = |(parts, to, _): &(Parts, Range<usize>, bool)| to.len().div_ceil(part_lanes(parts.count));
    let grid = [sums.iter().map(blocks).sum(), 1, 1];
    let mut launch = gpu.launch(kernel, grid, SUM_THREADS).view_mut(ViewMut::new(to, 4 * start, 4 * (end - start)));
    let mut table = Sums { count: number(sums.len()), ..Sums::zeroed() };
    let mut first = 0;
    for (row, sum) in table.sums.iter_mut().zip(sums) {
        let (parts, to, accumulate) = sum;
        assert!(to.len() <= parts.pitch, "{}: {} elements of parts {} apart", kernel.name, to.len(), parts.pitch);
        let len = (parts.count - 1) * parts.pitch + to.len();
        let view = View::new(&parts.buffer, parts.size * parts.from, parts.size * len);
        *row = Sum {
            parts: launch.address_in_struct(view),
            pitch: parts.pitch as u64,
            len: to.len() as u64,
            to: number(to.start - start),
            count: number(parts.count),
            lanes: part_lanes(parts.count) as u32,
            first: number(first),
            add: (*accumulate).into(),
            wide: (parts.size == 8).into(),
        };
        first += blocks(sum);
    }
    launch.value(table).run()
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
