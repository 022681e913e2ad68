//! The rungs of the ladder, `kernels/steps`: how each is launched, and its arguments in the order of its header. The
//! tests launch them on the emulator and the benches on a GPU, so an argument is of either's type, `A`.

/// Name, threads, and pixels and channels of a block's tile.
pub const RUNGS: [(&str, u32, usize, usize); 10] = [
    ("conv2d_0_naive", 128, 4, 32),
    ("conv2d_1_tile", 128, 64, 64),
    ("conv2d_2_registers", 64, 64, 64),
    ("conv2d_3_mma", 128, 64, 64),
    ("conv2d_4_swizzle", 128, 64, 64),
    ("conv2d_5_cp_async", 128, 64, 64),
    ("conv2d_6_epilogue", 128, 64, 64),
    ("conv2d_7_walk", 128, 64, 64),
    ("conv2d_8_segments", 128, 64, 64),
    ("conv2d_9_two_inputs", 128, 64, 64),
];

/// Channels of a slab from rung 3 on.
pub const BK: usize = 32;

/// Slabs of k from rung 3 on, with `c_first` of `c_in` channels in the first tensor.
pub fn slabs(c_first: usize, c_in: usize) -> usize {
    9 * (c_first.div_ceil(BK) + (c_in - c_first).div_ceil(BK))
}

/// The grid of a rung for so many pixels and channels, each segment of k with blocks of its own.
pub fn grid(rung: usize, pixels: usize, c_out: usize, segments: usize) -> [u32; 3] {
    let (_, _, bm, bn) = RUNGS[rung];
    [pixels.div_ceil(bm) as u32, c_out.div_ceil(bn) as u32, segments as u32]
}

/// Tensors of a rung. What a rung does not take yet is left out.
#[derive(Clone, Copy)]
pub struct Tensors<A> {
    pub y: A,
    pub x: A,
    pub weight: A,
    /// From rung 6 on: bias, shift, residual.
    pub added: [A; 3],
    /// From rung 8 on: sums of the segments, and slabs of each.
    pub parts: A,
    pub segment: A,
    /// Rung 9: the second tensor, and channels of the first.
    pub second: A,
    pub c_first: A,
}

impl<A: Copy> Tensors<A> {
    /// With extents n, h, w, c_in, c_out.
    pub fn args(&self, rung: usize, extents: [A; 5]) -> Vec<A> {
        let mut args = vec![self.y, self.x, self.weight];
        args.extend(extents);
        if rung >= 6 {
            args.extend(self.added);
        }
        if rung >= 8 {
            args.extend([self.parts, self.segment]);
        }
        if rung == 9 {
            args.extend([self.second, self.c_first]);
        }
        args
    }

    /// Those of the entry that adds up segments: segments, n, h, w, c_out.
    pub fn join_args(&self, extents: [A; 5]) -> Vec<A> {
        [self.y, self.parts].into_iter().chain(extents).chain(self.added).collect()
    }
}

/// Threads of the entry that adds up segments, and its grid.
pub const JOIN_THREADS: u32 = 256;

pub fn join_grid(pixels: usize, c_out: usize) -> [u32; 3] {
    [pixels.div_ceil(4) as u32, c_out.div_ceil(64) as u32, 1]
}

/// The entry that adds up segments.
pub fn join_name(rung: usize) -> String {
    format!("conv2d_{rung}_join")
}

/// Name, threads, and rows of a block.
pub const ATTENTION: [(&str, u32, usize); 5] = [
    ("attention_0_naive", 64, 1),
    ("attention_1_online", 64, 64),
    ("attention_2_mma", 128, 64),
    ("attention_3_cp_async", 128, 64),
    ("attention_4_exp2", 128, 64),
];

/// Channels of the attention's head.
pub const D: usize = 64;

/// `s` is memory for the scores, which rung 0 alone has.
pub fn attention_args<A>(o: A, [q, k, v]: [A; 3], s: Option<A>, tokens: A) -> Vec<A> {
    [o, q, k, v].into_iter().chain(s).chain([tokens]).collect()
}

pub fn attention_grid(rung: usize, tokens: usize) -> [u32; 3] {
    [tokens.div_ceil(ATTENTION[rung].2) as u32, 1, 1]
}
