//! Scaled dot-product attention over the pixels of an image (Vaswani et al. 2017, eq. 1), one head or several.
//!
//! `q`, `k`, `v`, `y (n,h,w,c)` are read as `T = h w` tokens of `c` channels; head `e` has the `d = c/heads` channels
//! starting at `e d`. For one image and head, with `i` and `j` tokens:
//!
//! ```text
//! S_ij = q_i . k_j / sqrt(d)      m_i = max_j S_ij      r_i = 1 / sum_j exp(S_ij - m_i)
//! P_ij = exp(S_ij - m_i) r_i      y_i = sum_j P_ij v_j
//! ```
//!
//! Gradient: `dP_ij = dy_i . v_j`; through the softmax, `dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij)`; then
//!
//! ```text
//! dq_i = sum_j dS_ij k_j / sqrt(d)      dk_j = sum_i dS_ij q_i / sqrt(d)      dv_j = sum_i P_ij dy_i
//! ```
//!
//! Saved: `q`, `k`, `v` and, for each row, `m` and `r` (2 numbers for `T` probabilities). Together they are the
//! log-sum-exp `m - log r`, but as one f32 it would lose digits of `r` when `m` is large. The backward pass recomputes
//! `P`. A GPU also saves `y`, since it computes `sum_j P_ij dP_ij` as `dy_i . y_i`, and in bf16 the rounding error of
//! `y`.
//!
//! Numerics: no exponential exceeds 1, since the row's largest score is subtracted first (on a GPU the largest so far;
//! the sums are rescaled when it grows). All sums are f32 and run over `k`'s (or `q`'s) tokens in order, so the bits of
//! an image depend neither on its batch nor on the number of threads. In bf16 a GPU multiplies on tensor cores, for
//! which `P` and `dS` are rounded to bf16 (the derivations bound what that costs).
//!
//! A linear layer that follows a single head, with a residual, can be part of the forward pass
//! ([`attention_then_linear`]): a GPU has whole rows of `y` at hand for it.
//!
//! Work: `4 n T^2 c` FLOP forward, `10 n T^2 c` backward: five products, one of which recomputes the scores. A GPU does
//! seven, because `dq` is a separate pass from `dk` and `dv`, so that each sum has one owner and a fixed order; in
//! bf16, for heads of more than 128 channels, eight or more (`include/attention_mma.cuh`). Scratch
//! on a GPU: `delta`, one number per row and head; no scores. On the CPU: forward, a block of rows of `S` per thread;
//! backward, `P` and `dS` of some heads at a time, 8 MiB each, or of some rows of one head if its scores alone exceed
//! that.

use crate::device::Device;
use crate::device::cpu::simd::Isa;
use crate::error::Result;
use crate::ops::linear::{self, linear};
use crate::params::Param;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

/// Attention of every token of `q` over all tokens of its image. `q`, `k` and `v` have the same shape, and `heads`
/// divides its channels.
pub fn attention(tape: &mut Tape<'_>, q: &Var, k: &Var, v: &Var, heads: usize) -> Result<Var> {
    let shape = extent([q, k, v], heads);
    let mut y = Tensor::uninit(tape.device(), q.value().dtype(), shape)?;
    let mut rows = Tensor::uninit(tape.device(), DType::F32, Shape::new(shape.n, heads, 2, shape.pixels()))?;
    let mut lost = room_for_lost(tape, y.dtype(), shape)?;
    match tape.device() {
        Device::Cpu(_) => {
            let job = cpu::Job { device: tape.device(), shape, heads };
            cpu::forward(&job, y.data_mut(), rows.data_mut(), [q, k, v].map(Var::data));
        }
        Device::Cuda(gpu) => {
            let to = cuda::Outputs { y: Some(&mut y), lost: lost.as_mut(), stats: &mut rows };
            cuda::forward(gpu, heads, to, [q, k, v].map(Var::value), None)?;
        }
        Device::Meta(_) => {}
    }
    recorded(tape, [q, k, v], heads, y, rows, lost)
}

/// [`attention`], then a [`linear`](super::linear::linear) layer with `weight` (c, 1, 1, c) and `bias` (1, 1, 1, c),
/// plus `residual`, shaped like `q`. In bf16 on a GPU a single head of up to 256 channels takes one launch for both,
/// which stores what is between them only if the tape records. The bits are those of both operations.
pub fn attention_then_linear(
    tape: &mut Tape<'_>,
    [q, k, v]: [&Var; 3],
    heads: usize,
    weight: Param,
    bias: Param,
    residual: &Var,
) -> Result<Var> {
    let (shape, params, dtype) = (extent([q, k, v], heads), tape.params(), q.value().dtype());
    let gpu = match tape.device() {
        Device::Cuda(gpu) if dtype == DType::Bf16 && heads == 1 && cuda::goes_on(shape.c) => gpu,
        _ => {
            let y = attention(tape, q, k, v, heads)?;
            return linear(tape, &y, weight, Some(bias), Some(residual));
        }
    };
    let (ws, bs) = (params.shape(weight), params.shape(bias));
    assert_eq!(ws, Shape::new(shape.c, 1, 1, shape.c), "attention_then_linear: weight is {ws} for {shape}");
    assert_eq!(bs, Shape::vector(shape.c), "attention_then_linear: bias is {bs} for {shape}");
    assert_eq!(residual.shape(), shape, "attention_then_linear: residual is {}, q {shape}", residual.shape());
    let uninit = || Tensor::uninit(tape.device(), dtype, shape);
    let (mut y, mut z) = (tape.is_recording().then(uninit).transpose()?, uninit()?);
    let mut rows = Tensor::uninit(tape.device(), DType::F32, Shape::new(shape.n, heads, 2, shape.pixels()))?;
    let mut lost = room_for_lost(tape, dtype, shape)?;
    let to = cuda::Outputs { y: y.as_mut(), lost: lost.as_mut(), stats: &mut rows };
    let (view, of_bias) = (params.view(weight, dtype), params.view(bias, DType::F32));
    let then = cuda::Then { z: &mut z, weight: view, bias: of_bias, residual: residual.value() };
    cuda::forward(gpu, heads, to, [q, k, v].map(Var::value), Some(then))?;
    match y {
        Some(y) => {
            let y = recorded(tape, [q, k, v], heads, y, rows, lost)?;
            linear::recorded(tape, &y, weight, Some(bias), Some(residual), Isa::best(), z)
        }
        None => Ok(Var::constant(z)),
    }
}

/// The shape of all three.
fn extent([q, k, v]: [&Var; 3], heads: usize) -> Shape {
    let shape = q.shape();
    assert!(
        k.shape() == shape && v.shape() == shape,
        "attention: q is {shape}, k is {}, v is {}",
        k.shape(),
        v.shape()
    );
    assert!(heads > 0 && shape.c.is_multiple_of(heads), "attention: {heads} heads of {} channels", shape.c);
    shape
}

/// A GPU computes delta from the output, in bf16 also from its rounding error; the CPU computes it from P and dP.
fn room_for_lost(tape: &Tape<'_>, dtype: DType, shape: Shape) -> Result<Option<Tensor>> {
    let needed = tape.device().is_gpu() && tape.is_recording() && dtype == DType::Bf16;
    needed.then(|| Tensor::uninit(tape.device(), DType::Bf16, shape)).transpose()
}

fn recorded(
    tape: &mut Tape<'_>,
    qkv: [&Var; 3],
    heads: usize,
    y: Tensor,
    rows: Tensor,
    lost: Option<Tensor>,
) -> Result<Var> {
    let output = tape.device().is_gpu().then(|| y.clone());
    tape.push("attention", y, || AttentionBackward {
        ids: qkv.map(Var::id),
        qkv: qkv.map(|x| x.value().clone()),
        rows,
        y: output,
        lost,
        heads,
    })
}

struct AttentionBackward {
    ids: [Option<VarId>; 3],
    qkv: [Tensor; 3],
    /// (n, heads, 2, T): `m` (on a GPU `m log2 e`), then `r`.
    rows: Tensor,
    /// The output. GPU only.
    y: Option<Tensor>,
    /// The rounding error of `y` in bf16. GPU only.
    lost: Option<Tensor>,
    heads: usize,
}

impl Backward for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn saved(&self) -> Vec<&Tensor> {
        self.qkv.iter().chain([&self.rows]).chain(&self.y).chain(&self.lost).collect()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let shape = dy.shape();
        let uninit = || Tensor::uninit(grads.device(), dy.dtype(), shape);
        let mut dqkv = [uninit()?, uninit()?, uninit()?];
        match grads.device() {
            Device::Cpu(_) => {
                let job = cpu::Job { device: grads.device(), shape, heads: self.heads };
                let dqkv = dqkv.each_mut().map(Tensor::data_mut);
                cpu::backward(&job, dqkv, self.qkv.each_ref().map(Tensor::data), self.rows.data(), dy.data());
            }
            Device::Cuda(gpu) => cuda::backward(gpu, &self, dqkv.each_mut(), &dy)?,
            Device::Meta(_) => {}
        }
        for (id, dx) in self.ids.into_iter().zip(dqkv) {
            if let Some(id) = id {
                grads.add(id, dx)?;
            }
        }
        Ok(())
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use crate::tensor::Shape;

    /// `y` for `[q, k, v]`.
    pub fn forward<T: Float>([q, k, v]: [&[T]; 3], shape: Shape, heads: usize) -> Vec<T> {
        let mut y = vec![T::zero(); shape.len()];
        each_row(q, k, shape, heads, |i, keys, p| {
            for (&j, &p) in keys.iter().zip(p) {
                for l in 0..shape.c / heads {
                    y[i + l] = y[i + l] + p * v[j + l];
                }
            }
        });
        y
    }

    /// `[dq, dk, dv]`.
    pub fn backward<T: Float>([q, k, v]: [&[T]; 3], dy: &[T], shape: Shape, heads: usize) -> [Vec<T>; 3] {
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![T::zero(); shape.len()]);
        let d = shape.c / heads;
        each_row(q, k, shape, heads, |i, keys, p| {
            let dp: Vec<T> = keys.iter().map(|&j| dot(&dy[i..i + d], &v[j..j + d])).collect();
            let mean = dot(p, &dp);
            for ((&j, &p), &dp) in keys.iter().zip(p).zip(&dp) {
                let ds = p * (dp - mean) * scale(d);
                for l in 0..d {
                    dq[i + l] = dq[i + l] + ds * k[j + l];
                    dk[j + l] = dk[j + l] + ds * q[i + l];
                    dv[j + l] = dv[j + l] + p * dy[i + l];
                }
            }
        });
        [dq, dk, dv]
    }

    /// Calls `f` for each image, head and token with the offset of the token's channels of that head, the offsets of
    /// all keys' channels, and the row of `P`.
    fn each_row<T: Float>(q: &[T], k: &[T], shape: Shape, heads: usize, mut f: impl FnMut(usize, &[usize], &[T])) {
        let (d, tokens) = (shape.c / heads, shape.pixels());
        for (image, head) in (0..shape.n * heads).map(|pair| (pair / heads, pair % heads)) {
            let places: Vec<usize> = (0..tokens).map(|t| (image * tokens + t) * shape.c + head * d).collect();
            for &i in &places {
                let s: Vec<T> = places.iter().map(|&j| dot(&q[i..i + d], &k[j..j + d]) * scale(d)).collect();
                let largest = s.iter().fold(T::neg_infinity(), |m, &s| m.max(s));
                let e: Vec<T> = s.iter().map(|&s| (s - largest).exp()).collect();
                let sum = e.iter().fold(T::zero(), |sum, &e| sum + e);
                f(i, &places, &e.iter().map(|&e| e / sum).collect::<Vec<T>>());
            }
        }
    }

    fn scale<T: Float>(d: usize) -> T {
        T::from(d).expect("a count").sqrt().recip()
    }

    fn dot<T: Float>(a: &[T], b: &[T]) -> T {
        a.iter().zip(b).fold(T::zero(), |sum, (&a, &b)| sum + a * b)
    }
}

mod cpu {
    use std::ops::Range;

    use super::*;
    use crate::device::cpu::Buffer;
    use crate::device::cpu::gemm::{self, Accumulate, Overwrite, Shared, Slots, nth_chunk, panel_width, rows_by_panel};
    use crate::device::cpu::simd::{self, Isa, Simd};
    use crate::device::cpu::vector::{Vector, with_vector};

    /// Most rows of scores per task: three register tiles of AVX-512, so that a panel of keys read from L2 once is used
    /// three times, and few enough that 256 tokens of one image make 7 tasks.
    const BLOCK: usize = 42;

    /// Scores the backward pass holds at a time: 8 MiB of `P` and as much of `dS`.
    const SCORES: usize = 1 << 21;

    /// What both passes need.
    pub struct Job<'a> {
        pub device: &'a Device,
        pub shape: Shape,
        pub heads: usize,
    }

    impl Job<'_> {
        fn tokens(&self) -> usize {
            self.shape.pixels()
        }

        /// Channels of a head.
        fn d(&self) -> usize {
            self.shape.c / self.heads
        }

        fn scale(&self) -> f32 {
            (self.d() as f32).sqrt().recip()
        }

        /// Offset of row `token` of a pair (image, head) in a tensor of `shape`.
        fn at(&self, pair: usize, token: usize) -> usize {
            (pair / self.heads * self.tokens() + token) * self.shape.c + pair % self.heads * self.d()
        }

        /// All pairs (image, head), as many at a time as [`SCORES`] allows.
        fn waves(&self) -> impl Iterator<Item = Range<usize>> {
            let pairs = self.shape.n * self.heads;
            let together = (SCORES / (self.tokens() * self.tokens())).max(1);
            (0..pairs).step_by(together).map(move |first| first..pairs.min(first + together))
        }
    }

    /// One of `q`, `k`, `v`, `dy` for the pairs of a wave, packed into consecutive panels as the right factor of
    /// products.
    struct Packed {
        buffer: Buffer,
        first_pair: usize,
        /// Rows and columns of the factor.
        depth: usize,
        columns: usize,
    }

    impl Packed {
        /// The factor is `(T, d)`, tokens along the rows; or, if `transposed`, `(d, T)`.
        fn new<V: Vector>(isa: V::Token, job: &Job<'_>, pairs: Range<usize>, x: &[f32], transposed: bool) -> Self {
            assert_eq!(x.len(), job.shape.len(), "a factor of {}", job.shape);
            let (depth, columns) = if transposed { (job.d(), job.tokens()) } else { (job.tokens(), job.d()) };
            let panels = columns.div_ceil(panel_width::<V>());
            let each = depth * panel_width::<V>();
            let mut buffer = job.device.scratch(pairs.len() * panels * each);
            let out = Shared::new(buffer.as_mut_slice());
            gemm::for_each_task(pairs.len() * panels, |i| {
                let (pair, first) = (pairs.start + i / panels, i % panels * panel_width::<V>());
                let count = panel_width::<V>().min(columns - first);
                // SAFETY: the pair has tokens and channels 0..depth and first..first + count (either way round), so
                // everything read is in `x`, which has the length asserted; task i alone has the i-th panel of the
                // buffer, `depth * panel_width` long.
                unsafe {
                    let (panel, c) = (out.at(i * each), job.shape.c);
                    if transposed {
                        gemm::pack_columns::<V>(isa, depth, count, x[job.at(pair, first)..].as_ptr(), c, panel);
                    } else {
                        gemm::pack_rows::<V>(isa, depth, count, x[job.at(pair, 0) + first..].as_ptr(), c, panel);
                    }
                }
            });
            Packed { buffer, first_pair: pairs.start, depth, columns }
        }

        /// Calls `f(first column, columns, panel)` for the panels of a pair, each from row `from` on.
        fn panels<V: Vector>(&self, pair: usize, from: usize, mut f: impl FnMut(usize, usize, &[f32])) {
            let (width, count) = (panel_width::<V>(), self.columns.div_ceil(panel_width::<V>()));
            let each = self.depth * width;
            let of_pair = &self.buffer.as_slice()[(pair - self.first_pair) * count * each..][..count * each];
            for (i, panel) in of_pair.chunks_exact(each).enumerate() {
                f(i * width, width.min(self.columns - i * width), &panel[from * width..]);
            }
        }
    }

    /// A left factor: `rows` rows of `depth` floats, `stride` apart; or, transposed, `depth` rows of `rows` floats.
    #[derive(Clone, Copy)]
    struct Left<'a> {
        x: &'a [f32],
        stride: usize,
        rows: usize,
        depth: usize,
    }

    impl Left<'_> {
        /// The product with `right`'s rows from `from` on, written to rows `stride` apart at `c`, or added there if
        /// `add`.
        ///
        /// # Safety
        /// `rows` rows of `right.columns` floats, `stride` apart, are writable at `c` and belong to the caller's task
        /// alone; if `add`, they are initialised.
        #[allow(clippy::too_many_arguments)]
        unsafe fn times<V: Vector, const TRANSPOSED: bool>(
            self,
            isa: V::Token,
            right: &Packed,
            pair: usize,
            from: usize,
            c: *mut f32,
            stride: usize,
            add: bool,
        ) {
            let Left { x, stride: step, rows, depth } = self;
            let (outer, inner) = if TRANSPOSED { (depth, rows) } else { (rows, depth) };
            assert!(
                (outer - 1) * step + inner <= x.len() && from + depth <= right.depth,
                "a product beyond its factors"
            );
            right.panels::<V>(pair, from, |first, columns, panel| {
                // SAFETY: the assertion above: x holds the left factor, and the panel, from row `from` on, `depth`
                // rows; `c` is the caller's promise, and columns first..first + columns are below `right.columns`.
                unsafe {
                    let c = Shared::new_at(c.add(first));
                    let (x, panel) = (x.as_ptr(), panel.as_ptr());
                    if add {
                        let epilogue = Accumulate { c, stride };
                        rows_by_panel::<V, _, TRANSPOSED>(isa, rows, columns, depth, x, step, panel, x, epilogue);
                    } else {
                        let epilogue = Overwrite { c, stride };
                        rows_by_panel::<V, _, TRANSPOSED>(isa, rows, columns, depth, x, step, panel, x, epilogue);
                    }
                }
            });
        }
    }

    /// `rows` is (n, heads, 2, T).
    pub fn forward(job: &Job<'_>, y: &mut [f32], rows: &mut [f32], qkv: [&[f32]; 3]) {
        with_vector!(Isa::best(), V, isa => forward_by::<V>(isa, job, y, rows, qkv));
    }

    fn forward_by<V: Vector>(isa: V::Token, job: &Job<'_>, y: &mut [f32], rows: &mut [f32], [q, k, v]: [&[f32]; 3]) {
        let (tokens, d, c) = (job.tokens(), job.d(), job.shape.c);
        assert_eq!((y.len(), rows.len()), (job.shape.len(), 2 * job.shape.n * job.heads * tokens), "{}", job.shape);
        let blocks = tokens.div_ceil(BLOCK);
        let (y, rows) = (Shared::new(y), Shared::new(rows));
        let mut slots = Slots::new(job.device, BLOCK * tokens);
        for pairs in job.waves() {
            let keys = Packed::new::<V>(isa, job, pairs.clone(), k, true); // (d, T)
            let values = Packed::new::<V>(isa, job, pairs.clone(), v, false); // (T, d)
            slots.run(pairs.len() * blocks, |i, scratch| {
                let (pair, block) = (pairs.start + i / blocks, nth_chunk(tokens, blocks, i % blocks));
                let s = &mut scratch[..block.len() * tokens]; // (block, T)
                // SAFETY: this task alone has this block of the pair: in `y` its rows' channels of the head, in `rows`
                // the block's `m` and `r`, after `2 T pair` and `2 T pair + T`, which do not overlap. All of these are
                // within the tensors, which have the lengths asserted. `s` has a row of T for each row of the block.
                unsafe {
                    let left = Left { x: &q[job.at(pair, block.start)..], stride: c, rows: block.len(), depth: d };
                    left.times::<V, false>(isa, &keys, pair, 0, s.as_mut_ptr(), tokens, false);
                    let of = |part| rows.at((2 * pair + part) * tokens + block.start);
                    let row = |part| std::slice::from_raw_parts_mut(of(part), block.len());
                    let (m, r) = (row(0), row(1));
                    softmax(s, m, r, job.scale());
                    let left = Left { x: s, stride: tokens, rows: block.len(), depth: tokens };
                    let y = y.at(job.at(pair, block.start));
                    left.times::<V, false>(isa, &values, pair, 0, y, c, false);
                    for (i, r) in r.iter().enumerate() {
                        scale_row(std::slice::from_raw_parts_mut(y.add(i * c), d), *r);
                    }
                }
            });
        }
    }

    pub fn backward(job: &Job<'_>, dqkv: [&mut [f32]; 3], qkv: [&[f32]; 3], rows: &[f32], dy: &[f32]) {
        with_vector!(Isa::best(), V, isa => backward_by::<V>(isa, job, dqkv, qkv, rows, dy));
    }

    /// Two rounds per wave: first blocks of rows of `P` and `dS`, and from them `dq`; then blocks of their columns, and
    /// from them `dk` and `dv`.
    fn backward_by<V: Vector>(
        isa: V::Token,
        job: &Job<'_>,
        dqkv: [&mut [f32]; 3],
        [q, k, v]: [&[f32]; 3],
        rows: &[f32],
        dy: &[f32],
    ) {
        let (tokens, d, c) = (job.tokens(), job.d(), job.shape.c);
        assert!(dqkv.iter().all(|dx| dx.len() == job.shape.len()), "gradients of {}", job.shape);
        let [dq, dk, dv] = dqkv.map(Shared::new);
        let blocks = tokens.div_ceil(BLOCK);
        for pairs in job.waves() {
            let keys = Packed::new::<V>(isa, job, pairs.clone(), k, true); // (d, T)
            let values = Packed::new::<V>(isa, job, pairs.clone(), v, true); // (d, T)
            let [queries, keys_by_token, dy_by_token] =
                [q, k, dy].map(|x| Packed::new::<V>(isa, job, pairs.clone(), x, false)); // (T, d)
            // As many rows of each pair at a time as [`SCORES`] allows: all of them, unless the wave is a single pair.
            let together = tokens.min((SCORES / tokens).max(BLOCK));
            let mut p = job.device.scratch(pairs.len() * together * tokens); // (pairs, together, T)
            let mut ds = job.device.scratch(pairs.len() * together * tokens); // (pairs, together, T)
            for first in (0..tokens).step_by(together) {
                let count = together.min(tokens - first);
                let row_blocks = count.div_ceil(BLOCK);
                let (all_p, all_ds) = (Shared::new(p.as_mut_slice()), Shared::new(ds.as_mut_slice()));
                gemm::for_each_task(pairs.len() * row_blocks, |i| {
                    let (pair, block) = (pairs.start + i / row_blocks, nth_chunk(count, row_blocks, i % row_blocks));
                    let len = block.len() * tokens;
                    let token = first + block.start;
                    let at = job.at(pair, token);
                    let from = ((pair - pairs.start) * together + block.start) * tokens;
                    let left = |x| Left { x, stride: c, rows: block.len(), depth: d };
                    // SAFETY: this task alone has these rows of P and dS, `len` numbers from `from` on in buffers of
                    // (pairs, together, T); the products write all of them before they are lent as slices.
                    let (p, ds) = unsafe {
                        left(&q[at..]).times::<V, false>(isa, &keys, pair, 0, all_p.at(from), tokens, false);
                        left(&dy[at..]).times::<V, false>(isa, &values, pair, 0, all_ds.at(from), tokens, false);
                        let slice = |x: Shared| std::slice::from_raw_parts_mut(x.at(from), len);
                        (slice(all_p), slice(all_ds))
                    };
                    let of_pair = &rows[2 * pair * tokens..][..2 * tokens];
                    let [m, r] = [0, tokens].map(|part| &of_pair[part + token..][..block.len()]);
                    softmax_gradient(p, ds, m, r, job.scale());
                    let left = Left { x: ds, stride: tokens, rows: block.len(), depth: tokens };
                    // SAFETY: this task alone has these rows of `dq`, of the length asserted, in the channels of its
                    // head.
                    unsafe { left.times::<V, false>(isa, &keys_by_token, pair, 0, dq.at(at), c, false) };
                });
                let (all_p, all_ds) = (p.as_slice(), ds.as_slice());
                gemm::for_each_task(pairs.len() * blocks, |i| {
                    let (pair, block) = (pairs.start + i / blocks, nth_chunk(tokens, blocks, i % blocks));
                    let from = (pair - pairs.start) * together * tokens + block.start;
                    let at = job.at(pair, block.start);
                    let left = |x| Left { x, stride: tokens, rows: block.len(), depth: count };
                    // SAFETY: this task alone has these rows of `dk` and `dv`, of the lengths asserted, in the channels
                    // of its head; they are added to only if an earlier block of rows has written them.
                    unsafe {
                        let (queries, dy) = (&queries, &dy_by_token);
                        left(&all_ds[from..]).times::<V, true>(isa, queries, pair, first, dk.at(at), c, first > 0);
                        left(&all_p[from..]).times::<V, true>(isa, dy, pair, first, dv.at(at), c, first > 0);
                    }
                });
            }
        }
    }

    simd::dispatch! {
        /// Turns rows of unscaled scores `s` into rows of `P / r`, and writes `m` and `r` for the output and the
        /// backward pass.
        fn softmax<S>(s: &mut [f32], m: &mut [f32], r: &mut [f32], scale: f32) {
            let tokens = s.len() / m.len();
            for ((s, m), r) in s.chunks_exact_mut(tokens).zip(m).zip(r) {
                // The scale is positive, so the largest stays the largest.
                *m = scale * largest(s);
                *r = 1.0 / exponentials::<S>(s, *m, scale);
            }
        }
    }

    simd::dispatch! {
        /// `y *= r`.
        fn scale_row<S>(y: &mut [f32], r: f32) {
            y.iter_mut().for_each(|y| *y *= r);
        }
    }

    simd::dispatch! {
        /// `p` holds unscaled scores and becomes `P`; `ds` holds `dP` and becomes `dS` times the scale.
        fn softmax_gradient<S>(p: &mut [f32], ds: &mut [f32], m: &[f32], r: &[f32], scale: f32) {
            let tokens = p.len() / m.len();
            for (((p, ds), m), r) in p.chunks_exact_mut(tokens).zip(ds.chunks_exact_mut(tokens)).zip(m).zip(r) {
                let mean = probabilities::<S>(p, ds, *m, *r, scale);
                for (ds, p) in ds.iter_mut().zip(p) {
                    *ds = *p * (*ds - mean) * scale;
                }
            }
        }
    }

    // The reductions have 16 lanes, joined in order at the end: they vectorise at every level, and the order is the
    // same at each.

    #[inline(always)]
    fn largest(x: &[f32]) -> f32 {
        let (chunks, rest) = x.as_chunks::<16>();
        let larger = |a: f32, b: f32| if b > a { b } else { a };
        let mut lanes = [f32::NEG_INFINITY; 16];
        for chunk in chunks {
            for i in 0..16 {
                lanes[i] = larger(lanes[i], chunk[i]);
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, &b| larger(a, b))
    }

    /// `s = exp(scale s - m)`; returns the sum.
    #[inline(always)]
    fn exponentials<S: Simd>(s: &mut [f32], m: f32, scale: f32) -> f32 {
        let (chunks, rest) = s.as_chunks_mut::<16>();
        let e = |s: f32| simd::exp::<S>(S::mul_add(s, scale, -m));
        let mut lanes = [0.0; 16];
        for chunk in chunks {
            for i in 0..16 {
                chunk[i] = e(chunk[i]);
                lanes[i] += chunk[i];
            }
        }
        rest.iter_mut().for_each(|s| *s = e(*s));
        lanes.iter().chain(&*rest).sum()
    }

    /// `p` holds unscaled scores and becomes `P`; returns the sum of `P dP`.
    #[inline(always)]
    fn probabilities<S: Simd>(p: &mut [f32], dp: &[f32], m: f32, r: f32, scale: f32) -> f32 {
        let ((chunks, rest), (dp_chunks, dp_rest)) = (p.as_chunks_mut::<16>(), dp.as_chunks::<16>());
        let probability = |s: f32| simd::exp::<S>(S::mul_add(s, scale, -m)) * r;
        let mut lanes = [0.0; 16];
        for (p, dp) in chunks.iter_mut().zip(dp_chunks) {
            for i in 0..16 {
                p[i] = probability(p[i]);
                lanes[i] = S::mul_add(p[i], dp[i], lanes[i]);
            }
        }
        let mut sum: f32 = lanes.iter().sum();
        for (p, dp) in rest.iter_mut().zip(dp_rest) {
            *p = probability(*p);
            sum = S::mul_add(*p, *dp, sum);
        }
        sum
    }
}

mod cuda {
    use std::f64::consts::LOG2_E;

    use super::*;
    use crate::device::cuda::tile::MANY;
    use crate::device::cuda::{Gpu, Launch, View};
    use crate::error::Error;
    use crate::kernels::attention::{B_R, B_R_D512, THREADS};
    use crate::kernels::attention_mma::{BC, BOTH_SUMS, MOST, SLOTS, Sizes};
    use crate::kernels::tile_mma::BK;
    use crate::kernels::{Kernel, attention as kernels};

    /// The entries for heads of up to `d` channels, and the rows (tokens) per block: forward, backward for q, backward
    /// for k and v.
    struct Size {
        d: usize,
        rows: usize,
        fwd: &'static Kernel,
        bwd_q: &'static Kernel,
        bwd_kv: &'static Kernel,
    }

    /// A [`Size`].
    macro_rules! size {
        ($d:expr, $rows:expr, $fwd:ident, $bwd_q:ident, $bwd_kv:ident) => {
            Size { d: $d, rows: $rows, fwd: &kernels::$fwd, bwd_q: &kernels::$bwd_q, bwd_kv: &kernels::$bwd_kv }
        };
    }

    /// f32, on FMAs.
    const ON_FMA: [Size; 5] = [
        size!(32, B_R as usize, FWD_D32_F32, BWD_Q_D32_F32, BWD_KV_D32_F32),
        size!(64, B_R as usize, FWD_D64_F32, BWD_Q_D64_F32, BWD_KV_D64_F32),
        size!(128, B_R as usize, FWD_D128_F32, BWD_Q_D128_F32, BWD_KV_D128_F32),
        size!(256, B_R as usize, FWD_D256_F32, BWD_Q_D256_F32, BWD_KV_D256_F32),
        size!(512, B_R_D512 as usize, FWD_D512_F32, BWD_Q_D512_F32, BWD_KV_D512_F32),
    ];

    /// bf16, on tensor cores, if 8 divides `d`.
    const LARGE: [Size; 5] = [
        size!(32, 64, FWD_MMA_D32_LARGE, BWD_Q_MMA_D32_LARGE, BWD_KV_MMA_D32_LARGE),
        size!(64, 64, FWD_MMA_D64_LARGE, BWD_Q_MMA_D64_LARGE, BWD_KV_MMA_D64_LARGE),
        size!(128, 64, FWD_MMA_D128_LARGE, BWD_Q_MMA_D128_LARGE, BWD_KV_MMA_D128_LARGE),
        size!(256, 64, FWD_MMA_D256_LARGE, BWD_Q_MMA_D256_LARGE, BWD_KV_MMA_D256_LARGE),
        size!(512, 32, FWD_MMA_D512_LARGE, BWD_Q_MMA_D512_LARGE, BWD_KV_MMA_D512_LARGE),
    ];

    /// The same where those would be too few blocks.
    const SMALL: [Size; 4] = [
        size!(64, 16, FWD_MMA_D64_SMALL, BWD_Q_MMA_D64_SMALL, BWD_KV_MMA_D64_SMALL),
        size!(128, 16, FWD_MMA_D128_SMALL, BWD_Q_MMA_D128_SMALL, BWD_KV_MMA_D128_SMALL),
        size!(256, 16, FWD_MMA_D256_SMALL, BWD_Q_MMA_D256_SMALL, BWD_KV_MMA_D256_SMALL),
        size!(512, 16, FWD_MMA_D512_SMALL, BWD_Q_MMA_D512_SMALL, BWD_KV_MMA_D512_SMALL),
    ];

    /// For any `d`.
    const ANY: [Size; 2] = [
        size!(64, 16, FWD_MMA_D64_ANY, BWD_Q_MMA_D64_ANY, BWD_KV_MMA_D64_ANY),
        size!(512, 16, FWD_MMA_D512_ANY, BWD_Q_MMA_D512_ANY, BWD_KV_MMA_D512_ANY),
    ];

    impl Size {
        /// The first of `sizes` that has room for heads of `d` channels.
        fn of(sizes: &'static [Size], d: usize) -> Result<&'static Size> {
            let largest = sizes[sizes.len() - 1].d;
            sizes.iter().find(|size| d <= size.d).ok_or_else(|| {
                Error::Failed(format!(
                    "attention: heads of {d} channels, but on a GPU they have {largest} at most: use a smaller head_dim, or --device cpu"
                ))
            })
        }

        /// On tensor cores, for `pairs` of image and head: large blocks if they are many and not mostly idle rows. One
        /// head of 256 tokens has four of them, so that 24 images fill most multiprocessors of a GPU once; fewer images
        /// take 16 small blocks each. The choice does not affect any result's bits, which are sums over columns in the
        /// same order either way.
        fn on_mma(pairs: usize, tokens: usize, d: usize) -> Result<&'static Size> {
            if !d.is_multiple_of(8) {
                return Size::of(&ANY, d);
            }
            let (large, small) = (Size::of(&LARGE, d)?, Size::of(&SMALL, d)?);
            let [of_large, of_small] = [large, small].map(|size| pairs * tokens.div_ceil(size.rows));
            let idle = 8 * of_large * large.rows > 9 * of_small * small.rows;
            Ok(if of_large >= MANY && !idle { large } else { small })
        }

        /// Bytes of shared memory of a kernel on tensor cores: rows of q (or k), and of dy (or v) if `operands` is 2;
        /// the ring; m, 1 / l and delta of its columns.
        fn shared(&self, operands: usize) -> usize {
            let (bk, bc) = (BK as usize, BC as usize);
            2 * bk * (operands * self.d.div_ceil(bk) * self.rows + SLOTS as usize * bc) + 3 * 4 * bc
        }

        /// Beside that, of a forward pass that goes on with a linear layer: 32 channels of its rows in f32.
        fn staged(&self) -> usize {
            4 * 32 * self.rows
        }

        /// Blocks of the backward pass for k and v on tensor cores for the same rows: one for each of dk and dv, if one
        /// has no room for both.
        fn sums(&self) -> usize {
            if self.d > BOTH_SUMS as usize { 2 } else { 1 }
        }
    }

    /// What all passes over tensors of one shape share.
    struct Job<'a> {
        gpu: &'a Gpu,
        shape: Shape,
        heads: usize,
        dtype: DType,
        size: &'static Size,
    }

    impl<'a> Job<'a> {
        fn new(gpu: &'a Gpu, x: &Tensor, heads: usize) -> Result<Self> {
            let (shape, dtype) = (x.shape(), x.dtype());
            let size = match dtype {
                DType::F32 => Size::of(&ON_FMA, shape.c / heads)?,
                DType::Bf16 => Size::on_mma(shape.n * heads, shape.pixels(), shape.c / heads)?,
            };
            Ok(Job { gpu, shape, heads, dtype, size })
        }

        /// `operands`: how many of its rows' operands the kernel keeps in shared memory; `sums`: blocks for the same
        /// rows.
        fn launch(&self, kernel: &'static Kernel, operands: usize, sums: usize) -> Launch<'a> {
            let blocks = self.shape.n * self.heads * self.shape.pixels().div_ceil(self.size.rows);
            match self.dtype {
                DType::F32 => self.gpu.launch(kernel, [blocks, 1, 1], THREADS),
                DType::Bf16 => {
                    let launch = self.gpu.launch(kernel, [blocks, sums, 1], kernel.max_threads);
                    launch.shared(self.size.shared(operands))
                }
            }
        }

        /// In whole chunks; the others have kernels that end with y.
        fn in_chunks(&self) -> bool {
            (self.shape.c / self.heads).is_multiple_of(8)
        }

        /// 1 / sqrt(d).
        fn scale(&self) -> f64 {
            ((self.shape.c / self.heads) as f64).sqrt().recip()
        }

        /// Adds the parameters that follow the tensors: extents and scales. On FMAs the forward pass takes the second
        /// scale alone, and all are told whether groups of 4 channels are aligned: if and only if 4 divides d.
        fn sized(&self, launch: Launch<'a>, forward: bool) -> Launch<'a> {
            let (tokens, c, heads) = (self.shape.pixels(), self.shape.c, self.heads);
            let [scale, scale_log2] = [self.scale(), self.scale() * LOG2_E].map(|scale| scale as f32);
            match self.dtype {
                DType::F32 => {
                    let launch = launch.u32(tokens).u32(c).u32(heads);
                    let launch = if forward { launch } else { launch.f32(scale) };
                    launch.f32(scale_log2).u32((c / heads).is_multiple_of(4).into())
                }
                DType::Bf16 => {
                    let elements = self.shape.len();
                    assert!(elements < 1 << 31, "attention: {elements} elements; the kernels count to 2^31");
                    let [tokens, c, heads] = [tokens, c, heads].map(|extent| extent as u32);
                    launch.value(Sizes { tokens, c, heads, scale, scale_log2 })
                }
            }
        }
    }

    /// What a forward pass writes: `y` unless it goes on, its rounding error in bf16 if it is wanted, and statistics.
    pub struct Outputs<'a> {
        pub y: Option<&'a mut Tensor>,
        pub lost: Option<&'a mut Tensor>,
        pub stats: &'a mut Tensor,
    }

    /// The linear layer that a forward pass of one head goes on with: `z = residual + y w^T + b`.
    pub struct Then<'a> {
        pub z: &'a mut Tensor,
        pub weight: View<'a>,
        pub bias: View<'a>,
        pub residual: &'a Tensor,
    }

    /// Whether the forward pass of one head of `d` channels can go on with a linear layer, in bf16.
    pub fn goes_on(d: usize) -> bool {
        d.is_multiple_of(8) && d <= MOST as usize
    }

    pub fn forward(
        gpu: &Gpu,
        heads: usize,
        to: Outputs<'_>,
        [q, k, v]: [&Tensor; 3],
        then: Option<Then<'_>>,
    ) -> Result<()> {
        let job = Job::new(gpu, q, heads)?;
        let launch = job.launch(job.size.fwd, 1, 1);
        let launch = if then.is_some() { launch.shared(job.size.shared(1) + job.size.staged()) } else { launch };
        let launch = launch.write_opt(to.y);
        let launch = if job.dtype == DType::Bf16 { launch.write_opt(to.lost) } else { launch };
        let launch = job.sized(launch.write(to.stats).read(q).read(k).read(v), true);
        match then {
            Some(Then { z, weight, bias, residual }) => launch.write(z).view(weight).view(bias).read(residual).run(),
            None if job.dtype == DType::Bf16 && job.in_chunks() => launch.null().null().null().null().run(),
            None => launch.run(),
        }
    }

    pub fn backward(gpu: &Gpu, saved: &AttentionBackward, [dq, dk, dv]: [&mut Tensor; 3], dy: &Tensor) -> Result<()> {
        let AttentionBackward { qkv: [q, k, v], rows: stats, y: Some(y), lost, heads, .. } = saved else {
            unreachable!("the forward pass on a GPU keeps its output")
        };
        let job = Job::new(gpu, q, *heads)?;
        let by_row = Shape::new(job.shape.n, *heads, 1, job.shape.pixels());
        let mut delta = Tensor::uninit(&Device::Cuda(gpu.clone()), DType::F32, by_row)?;
        let launch = job.launch(job.size.bwd_q, 2, 1).write(dq).write(&mut delta).read(q).read(k).read(v).read(y);
        let launch = if job.dtype == DType::Bf16 { launch.read_opt(lost.as_ref()) } else { launch };
        job.sized(launch.read(dy).read(stats), false).run()?;

        let launch = job.launch(job.size.bwd_kv, 2, job.size.sums()).write(dk).write(dv).read(q).read(k).read(v);
        job.sized(launch.read(dy).read(stats).read(&delta), false).run()
    }
}
