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
//! Saved: a handle to `x`. `dx` is computed only if it is wanted. On a GPU in bf16 one launch computes all gradients.
//!
//! Numerics: `y` and `dx` are f32 sums in order of `k` and `o`, so a row's bits do not depend on the other rows.

use crate::device::Device;
use crate::device::cpu::simd::Isa;
use crate::error::Result;
use crate::ops::silu;
use crate::params::Param;
use crate::tape::{Backward, BackwardOfAll, Grads, Tape, Var, VarId};
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
    recorded(tape, x, weight, bias, residual, isa, y)
}

/// Records `y`, the layer's output, for whoever has computed it.
pub(crate) fn recorded(
    tape: &mut Tape<'_>,
    x: &Var,
    weight: Param,
    bias: Option<Param>,
    residual: Option<&Var>,
    isa: Isa,
    y: Tensor,
) -> Result<Var> {
    tape.push("linear", y, || LinearBackward {
        x: x.value().clone(),
        x_id: x.id(),
        weight,
        bias,
        residual: residual.and_then(Var::id),
        isa,
    })
}

/// The [SiLU](silu::silu) of a [`linear`] layer with bias: in bf16 on a GPU one launch, which stores the layer's own
/// output only if the tape records. The bits are those of both operations.
pub fn linear_silu(tape: &mut Tape<'_>, x: &Var, weight: Param, bias: Param) -> Result<Var> {
    let (xs, ws, params, dtype) = (x.shape(), tape.params().shape(weight), tape.params(), x.value().dtype());
    let gpu = match tape.device() {
        Device::Cuda(gpu) if dtype == DType::Bf16 => gpu,
        _ => {
            let y = linear(tape, x, weight, Some(bias), None)?;
            return silu::silu(tape, &y);
        }
    };
    assert_eq!(ws, Shape::new(ws.n, 1, 1, xs.c), "linear: weight is {ws} for x {xs}");
    assert_eq!(params.shape(bias), Shape::vector(ws.n), "linear: bias is {} for c_out={}", params.shape(bias), ws.n);
    let uninit = || Tensor::uninit(tape.device(), dtype, xs.with_c(ws.n));
    let (mut y, mut activated) = (tape.is_recording().then(uninit).transpose()?, uninit()?);
    let (view, of_bias) = (params.view(weight, dtype), params.view(bias, DType::F32));
    cuda::forward_silu(gpu, y.as_mut(), &mut activated, x.value(), view, of_bias)?;
    match y {
        Some(y) => {
            let y = recorded(tape, x, weight, Some(bias), None, Isa::best(), y)?;
            silu::recorded(tape, &y, activated)
        }
        None => Ok(Var::constant(activated)),
    }
}

/// [`linear`] of several layers that read the same `x`, each with its weight and bias: their outputs, in order. In bf16
/// on a GPU they are one product.
pub fn linears(tape: &mut Tape<'_>, x: &Var, layers: &[(Param, Param)]) -> Result<Vec<Var>> {
    let (xs, dtype, params, isa) = (x.shape(), x.value().dtype(), tape.params(), Isa::best());
    let mut ys = Vec::new();
    for &(weight, bias) in layers {
        let (ws, bs) = (params.shape(weight), params.shape(bias));
        assert_eq!(ws, Shape::new(ws.n, 1, 1, xs.c), "linear: weight is {ws} for x {xs}");
        assert_eq!(bs, Shape::vector(ws.n), "linear: bias is {bs} for c_out={}", ws.n);
        ys.push(Tensor::uninit(tape.device(), dtype, xs.with_c(ws.n))?);
    }
    match tape.device() {
        Device::Cpu(_) => {
            for (&(weight, bias), y) in layers.iter().zip(&mut ys) {
                let plus = cpu::Plus { bias: Some(params.get(bias)), shift: None, residual: None };
                let (w, ws) = (params.get(weight), params.shape(weight));
                cpu::forward(tape.device(), isa, x.data(), w, ws, plus, y.data_mut());
            }
        }
        Device::Cuda(gpu) if cuda::can_group(params, x.value(), layers) => {
            cuda::group_forward(gpu, &mut ys, x.value(), params, layers)?;
        }
        Device::Cuda(gpu) => {
            for (&(weight, bias), y) in layers.iter().zip(&mut ys) {
                let (weight, bias) = (params.view(weight, dtype), params.view(bias, DType::F32));
                cuda::forward(gpu, y, x.value(), weight, Some(bias), None)?;
            }
        }
        Device::Meta(_) => {}
    }
    let save = || LinearsBackward { x: x.value().clone(), x_id: x.id(), layers: layers.to_vec(), isa };
    tape.push_all("linear", ys, save)
}

struct LinearsBackward {
    x: Tensor,
    x_id: Option<VarId>,
    /// Weights and biases.
    layers: Vec<(Param, Param)>,
    isa: Isa,
}

impl BackwardOfAll for LinearsBackward {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn saved(&self) -> Vec<&Tensor> {
        vec![&self.x]
    }

    fn run(self: Box<Self>, dys: Vec<Option<Tensor>>, grads: &mut Grads<'_>) -> Result<()> {
        let used = self.layers.into_iter().zip(dys).filter_map(|(layer, dy)| Some((layer, dy?)));
        let (layers, dys): (Vec<(Param, Param)>, Vec<Tensor>) = used.unzip();
        if let Device::Cuda(gpu) = grads.device()
            && cuda::can_group(grads.params(), &self.x, &layers)
        {
            return cuda::group_backward(gpu, grads, &self.x, self.x_id, &layers, &dys);
        }
        // The last first, as if they had been recorded one by one.
        for (&(weight, bias), dy) in layers.iter().zip(&dys).rev() {
            backward(grads, &self.x, self.x_id, weight, Some(bias), dy, self.isa)?;
        }
        Ok(())
    }
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
        backward(grads, &self.x, self.x_id, self.weight, self.bias, &dy, self.isa)?;
        if let Some(residual) = self.residual {
            grads.add(residual, dy)?;
        }
        Ok(())
    }
}

/// The gradients of a layer's parameters and of `x`.
fn backward(
    grads: &mut Grads<'_>,
    x: &Tensor,
    x_id: Option<VarId>,
    weight: Param,
    bias: Option<Param>,
    dy: &Tensor,
    isa: Isa,
) -> Result<()> {
    let (device, xs) = (grads.device(), x.shape());
    let ws = grads.weight_shape(weight);
    match device {
        Device::Cpu(_) => {
            if let Some(dw) = grads.param(weight) {
                cpu::wgrad(device, isa, x.data(), dy.data(), ws, dw);
            }
            if let Some(db) = bias.and_then(|bias| grads.param(bias)) {
                cpu::bias_grad(device, isa, dy.data(), db);
            }
            if let Some(id) = x_id {
                let mut dx = Tensor::uninit(device, DType::F32, xs)?;
                cpu::dgrad(device, isa, dy.data(), grads.weight(weight), ws, dx.data_mut());
                grads.add(id, dx)?;
            }
        }
        Device::Cuda(gpu) => cuda::backward(gpu, grads, x, x_id, weight, bias, dy)?,
        Device::Meta(_) => {}
    }
    Ok(())
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
    use std::ops::Range;
    use std::sync::Arc;

    use bytemuck::Zeroable;

    use super::*;
    use crate::device::cuda::tile::{
        Job, MANY, Parts, SUM_THREADS, SplitK, backward_kernel, backward_launches, choose, choose_mma, lanes, of_f32,
        ring, shared, split_in, tile, tiles,
    };
    use crate::device::cuda::{Gpu, Launch, View, each_four};
    use crate::kernels::Kernel;
    use crate::kernels::linear::{
        BWD_MMA_64X64, BWD_MMA_64X64_128X128, BWD_MMA_128X128, BWD_SUMS_F32, CHUNK, DGRAD_64X64_F32, DGRAD_64X64_TF32,
        DGRAD_128X32_F32, DGRAD_128X32_TF32, DGRAD_MMA_64X64_ANY, FWD_64X64_F32, FWD_64X64_TF32, FWD_128X32_F32,
        FWD_128X32_TF32, FWD_MMA_64X64, FWD_MMA_64X64_ANY, FWD_MMA_128X128, GROUP_BWD_MMA_64X64,
        GROUP_BWD_MMA_64X64_128X128, GROUP_BWD_MMA_128X128, GROUP_FWD_MMA_64X64, GROUP_FWD_MMA_128X128, GROUP_JOIN,
        LAYERS, Layer, Layers, Sizes, WGRAD_32X128_F32, WGRAD_32X128_TF32, WGRAD_64X64_F32, WGRAD_64X64_TF32,
        WGRAD_MMA_64X64_ANY,
    };
    use crate::kernels::tile_mma::{BK, BackwardBlocks};
    use crate::params::{Params, Specs};

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
        let c_out = y.shape().c;
        forward_of(gpu, [Some(y), None], c_out, x, weight, bias, residual)
    }

    /// In bf16: `y`, if it is there, and its SiLU.
    pub fn forward_silu(
        gpu: &Gpu,
        y: Option<&mut Tensor>,
        activated: &mut Tensor,
        x: &Tensor,
        weight: View<'_>,
        bias: View<'_>,
    ) -> Result<()> {
        let c_out = activated.shape().c;
        forward_of(gpu, [y, Some(activated)], c_out, x, weight, Some(bias), None)
    }

    /// `y` and, in bf16 alone, its SiLU, each if it is there.
    fn forward_of(
        gpu: &Gpu,
        [y, activated]: [Option<&mut Tensor>; 2],
        c_out: usize,
        x: &Tensor,
        weight: View<'_>,
        bias: Option<View<'_>>,
        residual: Option<&Tensor>,
    ) -> Result<()> {
        let (rows, c_in) = (x.shape().rows(), x.shape().c);
        let kernel = match x.dtype() {
            DType::F32 => {
                let kernels = of_f32(gpu, [&FWD_64X64_F32, &FWD_128X32_F32], [&FWD_64X64_TF32, &FWD_128X32_TF32]);
                choose(kernels, rows, c_out).0
            }
            DType::Bf16 if !c_in.is_multiple_of(8) => &FWD_MMA_64X64_ANY,
            DType::Bf16 => {
                let large = c_in.is_multiple_of(SLAB).then_some(&FWD_MMA_128X128);
                choose_mma(large, &FWD_MMA_64X64, MANY, rows, c_out)
            }
        };
        let launch = gpu.launch(kernel, [tiles(kernel, rows, c_out), 1, 1], kernel.max_threads).shared(shared(kernel));
        let launch = launch.write_opt(y).read(x).view(weight).view_opt(bias).read_opt(residual);
        let launch = launch.value(sizes(rows, c_in, c_out));
        match x.dtype() {
            DType::F32 => launch.run(),
            DType::Bf16 => launch.write_opt(activated).run(),
        }
    }

    /// The gradients of the layer's parameters and of `x`, each if it is wanted: in bf16, with channels in whole
    /// chunks, by one launch.
    pub fn backward(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        x: &Tensor,
        x_id: Option<VarId>,
        weight: Param,
        bias: Option<Param>,
        dy: &Tensor,
    ) -> Result<()> {
        let (rows, c_in, c_out, dtype) = (dy.shape().rows(), x.shape().c, dy.shape().c, dy.dtype());
        if dtype == DType::F32 || !whole(&[c_in, c_out], 8) {
            dw_alone(gpu, grads, weight, bias, x, dy)?;
            return x_id.map_or(Ok(()), |id| dx_alone(gpu, grads, weight, x, id, dy));
        }
        let large = whole(&[c_in, c_out], 128).then_some(&BWD_MMA_128X128);
        let dw = choose_mma(large, &BWD_MMA_64X64, 1, c_out, c_in);
        let large = (whole(&[c_in], 128) && whole(&[c_out], SLAB)).then_some(&BWD_MMA_128X128);
        let dx = choose_mma(large, &BWD_MMA_64X64, MANY, rows, c_in);
        for sides in backward_launches(grads.wants_params().then(|| tile(dw).0), x_id.map(|_| tile(dx).0)) {
            let kernel = backward_kernel(sides, [&BWD_MMA_128X128, &BWD_MMA_64X64_128X128, &BWD_MMA_64X64]);
            let plan = Plan::new(sides, |side| c_out.div_ceil(side), rows, c_in, [1, 1]);
            let (count, [of_dw, of_dx]) = (plan.count(), sides.map(|side| side.is_some()));
            let mut parts = of_dw.then(|| gpu.alloc(4 * count * c_out * c_in)).transpose()?; // (segments, c_out, c_in)
            let of_bias = of_dw && bias.is_some();
            let mut sums = of_bias.then(|| gpu.alloc(8 * count * c_out)).transpose()?; // (segments, c_out), f64
            let mut dx = of_dx.then(|| Tensor::uninit(grads.device(), dtype, x.shape())).transpose()?;
            let launch = plan.launch(gpu, kernel).buffer_mut_opt(parts.as_mut()).buffer_mut_opt(sums.as_mut());
            let launch = launch.write_opt(dx.as_mut()).read(x).read(dy).view(grads.weight_view(weight, dtype));
            launch.value(sizes(rows, c_in, c_out)).value(plan.blocks).run()?;
            if let Some(parts) = parts {
                let parts = Parts { buffer: Arc::new(parts), size: 4, from: 0, count, pitch: c_out * c_in };
                grads.sum_later(gpu, weight, parts)?;
            }
            if let Some(sums) = sums {
                grads.sums_later(gpu, bias.as_slice(), sums, count, c_out)?;
            }
            if let (Some(id), Some(dx)) = (x_id, dx) {
                grads.add(id, dx)?;
            }
        }
        Ok(())
    }

    /// True if `unit` divides each of so many channels.
    fn whole(widths: &[usize], unit: usize) -> bool {
        widths.iter().all(|c| c.is_multiple_of(unit))
    }

    /// A launch for the gradients of weights, for that of `x`, or for both.
    struct Plan {
        /// Of the tiles.
        side: usize,
        blocks: BackwardBlocks,
    }

    impl Plan {
        /// For tiles with such sides, `units(side)` of them along the channels of all outputs. dx is one sum over all
        /// layers or several, so many segments of so many layers each.
        fn new(
            sides: [Option<usize>; 2],
            units: impl Fn(usize) -> usize,
            rows: usize,
            c_in: usize,
            [segments, layers]: [usize; 2],
        ) -> Self {
            let [dw, dx] = sides;
            let dw_tiles = dw.map_or(0, |side| units(side) * c_in.div_ceil(side));
            let split = dw.map_or(SplitK { segment: 0, count: 0 }, |_| split_in(sides, dw_tiles, rows));
            let number = |v: usize| u32::try_from(v).unwrap_or_else(|_| panic!("linear: {v} in a launch"));
            let blocks = BackwardBlocks {
                dw_tiles: number(dw_tiles),
                dw_segments: number(split.count),
                dw_depth: number(split.segment),
                dx_tiles: number(dx.map_or(0, |side| rows.div_ceil(side) * c_in.div_ceil(side))),
                dx_segments: number(segments),
                dx_depth: number(layers),
            };
            Plan { side: dw.max(dx).expect("a gradient is wanted"), blocks }
        }

        /// Segments of the rows, for dw.
        fn count(&self) -> usize {
            self.blocks.dw_segments as usize
        }

        fn launch<'a>(&self, gpu: &'a Gpu, kernel: &'static Kernel) -> Launch<'a> {
            let BackwardBlocks { dw_tiles, dw_segments, dx_tiles, dx_segments, .. } = self.blocks;
            let kinds = [dw_tiles * dw_segments, dx_tiles * dx_segments].map(|blocks| blocks as usize);
            let launch = gpu.launch(kernel, [kinds.iter().sum(), 1, 1], kernel.max_threads);
            launch.shared(ring(self.side, self.side)).kinds(&kinds)
        }
    }

    /// The gradient of `x` in f32, or of channels that 8 does not divide.
    fn dx_alone(gpu: &Gpu, grads: &mut Grads<'_>, weight: Param, x: &Tensor, id: VarId, dy: &Tensor) -> Result<()> {
        let (rows, c_in, c_out, dtype) = (dy.shape().rows(), x.shape().c, dy.shape().c, dy.dtype());
        let kernel = match dtype {
            DType::F32 => {
                let tf32 = [&DGRAD_64X64_TF32, &DGRAD_128X32_TF32];
                choose(of_f32(gpu, [&DGRAD_64X64_F32, &DGRAD_128X32_F32], tf32), rows, c_in).0
            }
            DType::Bf16 => &DGRAD_MMA_64X64_ANY,
        };
        let mut dx = Tensor::uninit(grads.device(), dtype, x.shape())?;
        let launch = gpu.launch(kernel, [tiles(kernel, rows, c_in), 1, 1], kernel.max_threads).shared(shared(kernel));
        let launch = launch.write(&mut dx).read(dy).view(grads.weight_view(weight, dtype));
        launch.value(sizes(rows, c_in, c_out)).run()?;
        grads.add(id, dx)
    }

    /// The gradients of the parameters, if they are wanted, in f32, or of channels that 8 does not divide. Rows are
    /// `c_out`, columns `c_in`, and the sum runs over the rows of `x`.
    fn dw_alone(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        weight: Param,
        bias: Option<Param>,
        x: &Tensor,
        dy: &Tensor,
    ) -> Result<()> {
        let (depth, cols, rows) = (dy.shape().rows(), x.shape().c, dy.shape().c);
        let (job, with_dw) = match x.dtype() {
            DType::F32 => {
                let tf32 = [&WGRAD_64X64_TF32, &WGRAD_32X128_TF32];
                (Job::of_f32(of_f32(gpu, [&WGRAD_64X64_F32, &WGRAD_32X128_F32], tf32), rows, cols, depth), None)
            }
            DType::Bf16 => (Job::on_mma(&WGRAD_MMA_64X64_ANY, 0, rows, cols, depth), bias),
        };
        let operands = [x, dy].map(|x| Some(x.array()));
        grads.product(gpu, weight, with_dw.as_slice(), &job, &operands, sizes(depth, cols, rows))?;
        match bias {
            Some(bias) if with_dw.is_none() && grads.wants_params() => bias_grad(gpu, grads, bias, dy),
            _ => Ok(()),
        }
    }

    /// In f32: sums chunks of rows, up to 32 channels side by side, then the chunks in order.
    fn bias_grad(gpu: &Gpu, grads: &mut Grads<'_>, bias: Param, dy: &Tensor) -> Result<()> {
        let (rows, c) = (dy.shape().rows(), dy.shape().c);
        let (chunks, lanes) = (rows.div_ceil(CHUNK as usize), lanes(c));
        let mut sums = gpu.alloc(8 * chunks * c)?; // (chunks, c), f64
        let launch = gpu.launch(&BWD_SUMS_F32, [chunks, c.div_ceil(lanes), 1], SUM_THREADS);
        launch.buffer_mut(&mut sums).read(dy).u64(rows).u32(c).u32(lanes).run()?;
        grads.sums_later(gpu, &[bias], sums, chunks, c)
    }

    /// True if layers are computed as a group: in bf16, with channels in whole chunks.
    pub fn can_group(params: &Params, x: &Tensor, layers: &[(Param, Param)]) -> bool {
        let divide = |weight| params.shape(weight).n.is_multiple_of(8);
        x.dtype() == DType::Bf16 && x.shape().c.is_multiple_of(8) && layers.iter().all(|(weight, _)| divide(*weight))
    }

    /// A group of layers that one launch takes.
    struct Group<'a> {
        layers: &'a [(Param, Param)],
        /// Channels of each output.
        widths: Vec<usize>,
        /// Where the weights and the biases lie in the flat buffer, with what is between them.
        weights: Range<usize>,
        biases: Range<usize>,
        rows: usize,
        c_in: usize,
    }

    impl<'a> Group<'a> {
        fn new(params: &Params, layers: &'a [(Param, Param)], x: Shape) -> Self {
            let specs = params.specs();
            Group {
                layers,
                widths: layers.iter().map(|(weight, _)| specs.spec(*weight).shape.n).collect(),
                weights: specs.span(layers.iter().map(|(weight, _)| *weight)),
                biases: specs.span(layers.iter().map(|(_, bias)| *bias)),
                rows: x.rows(),
                c_in: x.c,
            }
        }

        /// Channels of all outputs.
        fn width(&self) -> usize {
            self.widths.iter().sum()
        }

        fn divides(&self, by: usize) -> bool {
            self.widths.iter().all(|c| c.is_multiple_of(by))
        }

        /// Units of `unit` channels of all outputs, each output's last perhaps not full.
        fn units(&self, unit: usize) -> usize {
            self.widths.iter().map(|c| c.div_ceil(unit)).sum()
        }

        /// In the kernels' form: with the addresses of the outputs or their gradients, and units of `unit` channels.
        fn table(&self, specs: &Specs, unit: usize, addresses: impl Iterator<Item = u64>) -> Layers {
            let number = |v: usize| u32::try_from(v).unwrap_or_else(|_| panic!("linear: {v} in a group of layers"));
            let mut table = Layers::zeroed();
            let mut first = 0;
            let rows = table.layers.iter_mut().zip(self.layers).zip(&self.widths).zip(addresses);
            for (((row, &(weight, bias)), &c_out), y) in rows {
                *row = Layer {
                    y,
                    weight: number(specs.range(weight).start - self.weights.start),
                    bias: number(specs.range(bias).start - self.biases.start),
                    c_out: number(c_out),
                    first: number(first),
                };
                first += c_out.div_ceil(unit);
            }
            let Sizes { rows, c_in, .. } = sizes(self.rows, self.c_in, self.width());
            Layers { rows, c_in, count: number(self.layers.len()), total: number(first), ..table }
        }
    }

    pub fn group_forward(
        gpu: &Gpu,
        ys: &mut [Tensor],
        x: &Tensor,
        params: &Params,
        layers: &[(Param, Param)],
    ) -> Result<()> {
        for (layers, ys) in layers.chunks(LAYERS as usize).zip(ys.chunks_mut(LAYERS as usize)) {
            let group = Group::new(params, layers, x.shape());
            let large = (group.c_in.is_multiple_of(SLAB) && group.divides(128)).then_some(&GROUP_FWD_MMA_128X128);
            let kernel = choose_mma(large, &GROUP_FWD_MMA_64X64, MANY, group.rows, group.width());
            let (bm, bn) = tile(kernel);
            let grid = [group.rows.div_ceil(bm) * group.units(bn), 1, 1];
            let launch = gpu.launch(kernel, grid, kernel.max_threads).shared(shared(kernel)).read(x);
            let launch = launch.view(params.view_range(group.weights.clone(), DType::Bf16));
            let mut launch = launch.view(params.view_range(group.biases.clone(), DType::F32));
            let addresses: Vec<u64> = ys.iter_mut().map(|y| launch.write_in_struct(y)).collect();
            launch.value(group.table(params.specs(), bn, addresses.into_iter())).run()?;
        }
        Ok(())
    }

    /// One product for the weights, whose rows are the channels of all outputs, and one sum over these for dx. Where an
    /// image is one row there are few tiles of dx, but many layers: each is a segment of its own.
    pub fn group_backward(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        x: &Tensor,
        x_id: Option<VarId>,
        layers: &[(Param, Param)],
        dys: &[Tensor],
    ) -> Result<()> {
        for (layers, dys) in layers.chunks(LAYERS as usize).zip(dys.chunks(LAYERS as usize)) {
            let group = Group::new(grads.params(), layers, x.shape());
            let large = (whole(&[group.c_in], 128) && group.divides(128)).then_some(&GROUP_BWD_MMA_128X128);
            let dw = choose_mma(large, &GROUP_BWD_MMA_64X64, 1, group.width(), group.c_in);
            let large = (whole(&[group.c_in], 128) && group.divides(SLAB)).then_some(&GROUP_BWD_MMA_128X128);
            let dx = choose_mma(large, &GROUP_BWD_MMA_64X64, MANY, group.rows, group.c_in);
            for sides in backward_launches(grads.wants_params().then(|| tile(dw).0), x_id.map(|_| tile(dx).0)) {
                if let (Some(dx), Some(id)) = (group_launch(gpu, grads, &group, x, dys, sides)?, x_id) {
                    grads.add(id, dx)?;
                }
            }
        }
        Ok(())
    }

    /// Returns dx, if it has a side for its tiles.
    fn group_launch(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        group: &Group<'_>,
        x: &Tensor,
        dys: &[Tensor],
        sides: [Option<usize>; 2],
    ) -> Result<Option<Tensor>> {
        let kernels = [&GROUP_BWD_MMA_128X128, &GROUP_BWD_MMA_64X64_128X128, &GROUP_BWD_MMA_64X64];
        let (params, layers, xs) = (grads.params(), group.layers.len(), x.shape());
        let segments = if xs.pixels() == 1 { layers } else { 1 };
        let units = |side: usize| group.units(side);
        let plan = Plan::new(sides, units, group.rows, group.c_in, [segments, layers / segments]);
        let (count, [of_dw, of_dx]) = (plan.count(), sides.map(|side| side.is_some()));
        // Each layer's channels in whole tiles.
        let unit = sides[0].unwrap_or(SLAB);
        let channels = group.units(unit) * unit;
        let pitch = channels * group.c_in;
        let mut parts = of_dw.then(|| gpu.alloc(4 * count * pitch)).transpose()?; // (segments, channels, c_in)
        let mut sums = of_dw.then(|| gpu.alloc(8 * count * channels)).transpose()?; // (segments, channels), f64
        let mut dx = of_dx.then(|| Tensor::uninit(grads.device(), DType::Bf16, xs)).transpose()?;
        let split = of_dx && segments > 1;
        let mut dx_parts = split.then(|| gpu.alloc(4 * segments * xs.len())).transpose()?; // (segments, rows, c_in)

        let launch = plan.launch(gpu, backward_kernel(sides, kernels));
        let launch = launch.buffer_mut_opt(parts.as_mut()).buffer_mut_opt(sums.as_mut());
        let launch = launch.write_opt(dx.as_mut().filter(|_| !split)).buffer_mut_opt(dx_parts.as_mut()).read(x);
        let mut launch = launch.view(params.view_range(group.weights.clone(), DType::Bf16));
        let addresses: Vec<u64> = dys.iter().map(|dy| launch.read_in_struct(dy)).collect();
        let table = group.table(params.specs(), unit, addresses.into_iter());
        launch.value(table).value(plan.blocks).run()?;

        if let (Some(parts), Some(sums)) = (parts, sums) {
            let (parts, sums) = (Arc::new(parts), Arc::new(sums));
            let mut first = 0;
            for (&(weight, bias), c_out) in group.layers.iter().zip(&group.widths) {
                let of_weight = Parts { buffer: parts.clone(), size: 4, from: first * group.c_in, count, pitch };
                grads.sum_later(gpu, weight, of_weight)?;
                let of_bias = Parts { buffer: sums.clone(), size: 8, from: first, count, pitch: channels };
                grads.sum_later(gpu, bias, of_bias)?;
                first += c_out.next_multiple_of(unit);
            }
        }
        if let (Some(dx), Some(parts)) = (&mut dx, &dx_parts) {
            let launch = gpu.launch(&GROUP_JOIN, each_four(xs.len()), GROUP_JOIN.max_threads).write(dx);
            launch.buffer(parts).u32(segments).u64(xs.len()).run()?;
        }
        Ok(dx)
    }
}
