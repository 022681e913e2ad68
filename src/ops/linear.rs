//! `y[p,o] = b[o] + sum over k of x[p,k] w[o,k]` for every pixel or token `p`, and in the epilogue `+ residual[p,o]`.
//!
//! Shapes: `x` (n, h, w, c_in), `w` (c_out, 1, 1, c_in), `b` (c_out), optional, `y` and the optional residual (n, h, w,
//! c_out).
//!
//! Gradient:
//! - `dx[p,k] = sum over o of dy[p,o] w[o,k]`
//! - `dw[o,k] = sum over p of dy[p,o] x[p,k]`
//! - `db[o] = sum over p of dy[p,o]`
//! - `dresidual = dy`: the same tensor, passed on.
//!
//! Saved: a handle to `x`. `dx` is computed only if it is wanted.
//!
//! Numerics: `y` and `dx` are f32 sums in order of `k` and `o`, so a row's bits do not depend on the other rows.

use crate::device::Device;
use crate::device::cpu::simd::Isa;
use crate::error::Result;
use crate::params::Param;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

/// A linear layer over the channels; `weight` (c_out, 1, 1, c_in), `bias` (1, 1, 1, c_out).
pub fn linear(tape: &mut Tape<'_>, x: &Var, weight: Param, bias: Option<Param>, residual: Option<&Var>) -> Result<Var> {
    linear_by(tape, x, weight, bias, residual, Isa::best())
}

/// [`linear`] at a given SIMD level, for tests.
pub fn linear_by(
    tape: &mut Tape<'_>,
    x: &Var,
    weight: Param,
    bias: Option<Param>,
    residual: Option<&Var>,
    isa: Isa,
) -> Result<Var> {
    let (xs, ws) = (x.shape(), tape.params().shape(weight));
    assert_eq!(ws, Shape::new(ws.n, 1, 1, xs.c), "linear: weight is {ws} for x {xs}");
    if let Some(bias) = bias {
        let bs = tape.params().shape(bias);
        assert_eq!(bs, Shape::vector(ws.n), "linear: bias is {bs} for c_out={}", ws.n);
    }
    let ys = xs.with_c(ws.n);
    if let Some(residual) = residual {
        assert_eq!(residual.shape(), ys, "linear: residual is {}, the output {ys}", residual.shape());
    }
    let mut y = Tensor::uninit(tape.device(), x.value().dtype(), ys)?;
    match tape.device() {
        Device::Cpu(_) => {
            let params = tape.params();
            let plus = cpu::Plus { bias: bias.map(|b| params.get(b)), shift: None, residual: residual.map(Var::data) };
            cpu::forward(tape.device(), isa, x.data(), params.get(weight), ws, plus, y.data_mut());
        }
        Device::Cuda(gpu) => {
            let (params, dtype) = (tape.params(), x.value().dtype());
            let (weight, bias) = (params.view(weight, dtype), bias.map(|b| params.view(b, DType::F32)));
            cuda::forward(gpu, &mut y, x.value(), weight, bias, residual.map(Var::value))?;
        }
        Device::Meta(_) => {}
    }
    tape.push("linear", y, || LinearBackward {
        x: x.value().clone(),
        x_id: x.id(),
        weight,
        bias,
        residual: residual.and_then(Var::id),
        isa,
    })
}

struct LinearBackward {
    x: Tensor,
    x_id: Option<VarId>,
    weight: Param,
    bias: Option<Param>,
    residual: Option<VarId>,
    isa: Isa,
}

impl Backward for LinearBackward {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn saved(&self) -> Vec<&Tensor> {
        vec![&self.x]
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (device, xs) = (grads.device(), self.x.shape());
        let ws = grads.weight_shape(self.weight);
        match device {
            Device::Cpu(_) => {
                if let Some(dw) = grads.param(self.weight) {
                    cpu::wgrad(device, self.isa, self.x.data(), dy.data(), ws, dw);
                }
                if let Some(db) = self.bias.and_then(|bias| grads.param(bias)) {
                    cpu::bias_grad(device, self.isa, dy.data(), db);
                }
                if let Some(id) = self.x_id {
                    let mut dx = Tensor::uninit(device, DType::F32, xs)?;
                    cpu::dgrad(device, self.isa, dy.data(), grads.weight(self.weight), ws, dx.data_mut());
                    grads.add(id, dx)?;
                }
            }
            Device::Cuda(gpu) => {
                if let Some(dw) = grads.param_view(self.weight) {
                    cuda::wgrad(gpu, dw, &self.x, &dy)?;
                }
                if let Some(db) = self.bias.and_then(|bias| grads.param_view(bias)) {
                    cuda::bias_grad(gpu, db, &dy)?;
                }
                if let Some(id) = self.x_id {
                    let mut dx = Tensor::uninit(device, dy.dtype(), xs)?;
                    cuda::dgrad(gpu, &mut dx, &dy, grads.weight_view(self.weight, dy.dtype()))?;
                    grads.add(id, dx)?;
                }
            }
            Device::Meta(_) => {}
        }
        if let Some(residual) = self.residual {
            grads.add(residual, dy)?;
        }
        Ok(())
    }
}

/// The definition; `x` holds rows of `c_in`, `weight` `c_out` rows of `c_in`.
pub mod reference {
    use num_traits::Float;

    /// `y`.
    pub fn forward<T: Float>(x: &[T], weight: &[T], c_in: usize, bias: Option<&[T]>, residual: Option<&[T]>) -> Vec<T> {
        let c_out = weight.len() / c_in;
        let mut y = Vec::with_capacity(x.len() / c_in * c_out);
        for x in x.chunks_exact(c_in) {
            for (o, w) in weight.chunks_exact(c_in).enumerate() {
                let mut sum = x.iter().zip(w).fold(T::zero(), |sum, (&x, &w)| sum + x * w);
                if let Some(bias) = bias {
                    sum = sum + bias[o];
                }
                if let Some(residual) = residual {
                    sum = sum + residual[y.len()];
                }
                y.push(sum);
            }
        }
        y
    }

    /// `dx`, `dw`, `db`; the gradient of the residual is `dy`.
    pub fn backward<T: Float>(x: &[T], weight: &[T], c_in: usize, dy: &[T]) -> [Vec<T>; 3] {
        let c_out = weight.len() / c_in;
        let mut dx = vec![T::zero(); x.len()];
        let mut dw = vec![T::zero(); weight.len()];
        let mut db = vec![T::zero(); c_out];
        for (p, dy) in dy.chunks_exact(c_out).enumerate() {
            for o in 0..c_out {
                db[o] = db[o] + dy[o];
                for k in 0..c_in {
                    dx[p * c_in + k] = dx[p * c_in + k] + dy[o] * weight[o * c_in + k];
                    dw[o * c_in + k] = dw[o * c_in + k] + dy[o] * x[p * c_in + k];
                }
            }
        }
        [dx, dw, db]
    }
}

/// A linear layer is a 1x1 convolution over one long row of pixels.
mod cpu {
    pub(super) use crate::device::cpu::direct::Plus;
    use crate::device::cpu::direct::{self, Axis, Patches, TapOf, Target, Towards, Weight};
    use crate::device::cpu::gemm;
    use crate::device::cpu::vector::with_vector;
    use crate::params::ParamGrad;

    use super::*;

    const TAP: [TapOf; 2] = [TapOf { first: 0, step: 1 }; 2];

    fn pixels(count: usize, c: usize) -> Patches {
        let axis = |len| Axis { out: len, len, taps: 1, stride: 1, first: 0 };
        Patches { n: 1, rows: axis(1), cols: axis(count), c }
    }

    fn weight(data: &[f32], ws: Shape) -> Weight<'_> {
        Weight { data, c_out: ws.n, kh: 1, kw: 1, c_in: ws.c }
    }

    pub fn forward(device: &Device, isa: Isa, x: &[f32], w: &[f32], ws: Shape, plus: Plus<'_>, y: &mut [f32]) {
        let (pixels, w) = (pixels(x.len() / ws.c, ws.c), weight(w, ws));
        let target = Target { h: 1, w: pixels.cols.out, c: ws.n, step: 1, row: 0, col: 0, plus };
        with_vector!(isa, V, token => {
            direct::outputs::<V>(token, device, x, pixels, w, Towards::Output, TAP, y, target)
        });
    }

    pub fn dgrad(device: &Device, isa: Isa, dy: &[f32], w: &[f32], ws: Shape, dx: &mut [f32]) {
        let (pixels, w) = (pixels(dy.len() / ws.n, ws.n), weight(w, ws));
        let plus = Plus::default();
        let target = Target { h: 1, w: pixels.cols.out, c: ws.c, step: 1, row: 0, col: 0, plus };
        with_vector!(isa, V, token => {
            direct::outputs::<V>(token, device, dy, pixels, w, Towards::Input, TAP, dx, target)
        });
    }

    pub fn wgrad(device: &Device, isa: Isa, x: &[f32], dy: &[f32], ws: Shape, dw: ParamGrad<'_>) {
        let pixels = pixels(x.len() / ws.c, ws.c);
        with_vector!(isa, V, token => {
            direct::weight_gradient::<V>(token, device, x, pixels, dy, ws.n, dw.data, dw.accumulate)
        });
    }

    pub fn bias_grad(device: &Device, isa: Isa, dy: &[f32], db: ParamGrad<'_>) {
        let c = db.data.len();
        let mut sums = device.scratch(c);
        with_vector!(isa, V, token => gemm::column_sums::<V>(token, device, dy, 1, c, sums.as_mut_slice()));
        let sums = sums.as_slice();
        if db.accumulate {
            db.data.iter_mut().zip(sums).for_each(|(db, s)| *db += s);
        } else {
            db.data.copy_from_slice(sums);
        }
    }
}

mod cuda {
    use super::*;
    use crate::device::cuda::tile::{Job, MANY, SUM_THREADS, choose, choose_mma, lanes, shared, sum_parts, tiles};
    use crate::device::cuda::{Gpu, View};
    use crate::kernels::linear::{
        BWD_BIAS, BWD_SUMS, CHUNK, DGRAD_64X64_F32, DGRAD_128X32_F32, DGRAD_MMA_64X64, DGRAD_MMA_64X64_ANY,
        DGRAD_MMA_128X128, FWD_64X64_F32, FWD_128X32_F32, FWD_MMA_64X64, FWD_MMA_64X64_ANY, FWD_MMA_128X128, SUM_PARTS,
        Sizes, WGRAD_32X128_F32, WGRAD_64X64_F32, WGRAD_MMA_64X64, WGRAD_MMA_64X64_ANY, WGRAD_MMA_128X128,
    };
    use crate::kernels::tile_mma::BK;
    use crate::params::ParamView;

    /// Steps of k in a slab of a product on tensor cores.
    const SLAB: usize = BK as usize;

    /// The sizes in the kernels' form.
    fn sizes(rows: usize, c_in: usize, c_out: usize) -> Sizes {
        for (what, count) in [("rows", rows), ("c_in", c_in), ("c_out", c_out)] {
            assert!(count < 1 << 30, "linear: {what} is {count}; the kernels count to 2^30");
        }
        Sizes { rows: rows as u32, c_in: c_in as u32, c_out: c_out as u32 }
    }

    pub fn forward(
        gpu: &Gpu,
        y: &mut Tensor,
        x: &Tensor,
        weight: View<'_>,
        bias: Option<View<'_>>,
        residual: Option<&Tensor>,
    ) -> Result<()> {
        if let Some(residual) = residual {
            assert_eq!(residual.dtype(), x.dtype(), "linear: {residual:?} is added to a layer of {x:?}");
        }
        let (rows, c_in, c_out) = (x.shape().rows(), x.shape().c, y.shape().c);
        let kernel = match x.dtype() {
            DType::F32 => choose([&FWD_64X64_F32, &FWD_128X32_F32], rows, c_out).0,
            DType::Bf16 if !c_in.is_multiple_of(8) => &FWD_MMA_64X64_ANY,
            DType::Bf16 => {
                let large = c_in.is_multiple_of(SLAB).then_some(&FWD_MMA_128X128);
                choose_mma(large, &FWD_MMA_64X64, MANY, rows, c_out)
            }
        };
        let launch = gpu.launch(kernel, [tiles(kernel, rows, c_out), 1, 1], kernel.max_threads).shared(shared(kernel));
        let launch = launch.write(y).read(x).view(weight).view_opt(bias).read_opt(residual);
        launch.value(sizes(rows, c_in, c_out)).run()
    }

    pub fn dgrad(gpu: &Gpu, dx: &mut Tensor, dy: &Tensor, weight: View<'_>) -> Result<()> {
        let (rows, c_in, c_out) = (dy.shape().rows(), dx.shape().c, dy.shape().c);
        let kernel = match dy.dtype() {
            DType::F32 => choose([&DGRAD_64X64_F32, &DGRAD_128X32_F32], rows, c_in).0,
            DType::Bf16 if !(c_in.is_multiple_of(8) && c_out.is_multiple_of(8)) => &DGRAD_MMA_64X64_ANY,
            DType::Bf16 => {
                let whole = c_out.is_multiple_of(SLAB) && c_in.is_multiple_of(128);
                choose_mma(whole.then_some(&DGRAD_MMA_128X128), &DGRAD_MMA_64X64, MANY, rows, c_in)
            }
        };
        let launch = gpu.launch(kernel, [tiles(kernel, rows, c_in), 1, 1], kernel.max_threads).shared(shared(kernel));
        launch.write(dx).read(dy).view(weight).value(sizes(rows, c_in, c_out)).run()
    }

    /// Rows are `c_out`, columns `c_in`, and the sum runs over the rows of `x`.
    pub fn wgrad(gpu: &Gpu, dw: ParamView<'_>, x: &Tensor, dy: &Tensor) -> Result<()> {
        let (depth, cols, rows) = (dy.shape().rows(), x.shape().c, dy.shape().c);
        let job = match x.dtype() {
            DType::F32 => Job::on_fma([&WGRAD_64X64_F32, &WGRAD_32X128_F32], &SUM_PARTS, rows, cols, depth),
            DType::Bf16 => {
                let kernel = if cols.is_multiple_of(8) && rows.is_multiple_of(8) {
                    let whole = cols.is_multiple_of(128) && rows.is_multiple_of(128);
                    choose_mma(whole.then_some(&WGRAD_MMA_128X128), &WGRAD_MMA_64X64, 1, rows, cols)
                } else {
                    &WGRAD_MMA_64X64_ANY
                };
                Job::on_mma(kernel, 0, &SUM_PARTS, rows, cols, depth)
            }
        };
        let operands = [x, dy].map(|x| Some(x.array()));
        job.run(gpu, dw.view, dw.accumulate, &operands, sizes(depth, cols, rows))
    }

    /// Sums chunks of rows, up to 32 channels side by side, then the chunks in order.
    pub fn bias_grad(gpu: &Gpu, db: ParamView<'_>, dy: &Tensor) -> Result<()> {
        let (rows, c) = (dy.shape().rows(), dy.shape().c);
        let (chunks, lanes) = (rows.div_ceil(CHUNK as usize), lanes(c));
        let mut sums = gpu.alloc(8 * chunks * c)?; // (chunks, c), f64
        let launch = gpu.launch(BWD_SUMS.of(dy.dtype()), [chunks, c.div_ceil(lanes), 1], SUM_THREADS);
        launch.buffer_mut(&mut sums).read(dy).u64(rows).u32(c).u32(lanes).run()?;
        sum_parts(gpu, &BWD_BIAS, db.view, &sums, chunks, c, db.accumulate)
    }
}
