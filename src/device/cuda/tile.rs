//! Grids of the kernels that are built on `include/tile_gemm.cuh` and `include/column_sums.cuh`.

use crate::kernels::ByType;

/// Threads of a block that computes a tile; `THREADS` there.
pub const TILE_THREADS: u32 = 64;

/// Threads of a block that sums columns.
pub const SUM_THREADS: u32 = 256;

/// Steps of k between two barriers; `DEPTH` there.
const DEPTH: usize = 8;

/// Blocks that fill the largest GPU: eight a multiprocessor. The same on every device, since the number of shares decides the last bits
/// of a weight's gradient.
const BLOCKS: usize = 1024;

/// Steps of k below which a share of its own costs more than it brings: its tile of 4096 results is written and read once more, as
/// many bytes as operands for 32 steps.
const LEAST: usize = 256;

/// Results of a block: rows and columns, the N and M in a kernel's name `..._NxM`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile(pub usize, pub usize);

impl Tile {
    /// Tiles that cover a matrix.
    pub fn count(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(self.0) * cols.div_ceil(self.1)
    }
}

/// The variant with the fewest tiles over a matrix, and their number. Tiles have equal areas, so it wastes the least; of two alike the first,
/// which should be the square one: it reads less for each result. No result's bits depend on the tile it is in.
pub fn choose(variants: [(Tile, &'static ByType); 2], rows: usize, cols: usize) -> (&'static ByType, usize) {
    let [(first, a), (second, b)] = variants;
    let (count, other) = (first.count(rows, cols), second.count(rows, cols));
    if other < count { (b, other) } else { (a, count) }
}

/// How `depth` steps of k are shared out where `tiles` tiles alone are too few blocks: the length of a share (the last may be shorter), and
/// their number.
pub fn shares(tiles: usize, depth: usize) -> (usize, usize) {
    let wanted = BLOCKS.div_ceil(tiles).min(depth / LEAST).max(1);
    let share = depth.div_ceil(wanted).next_multiple_of(DEPTH);
    (share, depth.div_ceil(share))
}

/// Threads side by side along `c` columns that are summed.
pub fn lanes(c: usize) -> usize {
    c.next_power_of_two().min(32)
}
