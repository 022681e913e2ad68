//! `y[n,i,j,o] = b[o] + sum over u,v,k of x[n, i s + u - top, j s + v - left, k] w[o,u,v,k]`, and in the epilogue
//! `+ shift[n,o] + residual[n,i,j,o]`.
//!
//! What is convolved may be `x` with each pixel repeated in a 2x2 square, and `x` may be two tensors whose channels
//! follow one another ([`Input`]). On a GPU neither is ever made: the kernels read where the pixels are.
//!
//! Shapes: `x` (n, h, w, c_in), `w` (c_out, kh, kw, c_in), `b` (c_out), `y` (n, oh, ow, c_out) with `oh = (h + top +
//! bottom - kh) / s + 1`, likewise `ow`; `x` is zero outside. The shift, (n, 1, 1, c_out), is the time projection of a
//! residual block, and the residual, shaped like `y`, its skip: adding them in the epilogue saves passes over `y`. If
//! the skip is a 1x1 convolution of its own, its channels are further steps of k, which saves writing and reading it.
//!
//! Gradients, by the chain rule (of repeated pixels, `dx` is the sum over each four):
//! - `dx[n,p,q,k] = sum over o,u,v with p = i s + u - top, q = j s + v - left of dy[n,i,j,o] w[o,u,v,k]`
//! - `dw[o,u,v,k] = sum over n,i,j of dy[n,i,j,o] x[n, i s + u - top, j s + v - left, k]`
//! - `dshift[n,o] = sum over i,j of dy[n,i,j,o]`, `db[o] = sum over n of dshift[n,o]`
//! - `dresidual = dy`: the same tensor, passed on.
//! - of a shortcut, a 1x1 convolution that is added ([`Shortcut`]), as of that convolution with `dy`; its bias has the
//!   gradient `db` too.
//!
//! In bf16 on a GPU all of them take `dy` in one launch, `dshift` apart, and what waits to be added to the gradient of
//! `x` is added where `dx` is stored.
//!
//! Saved: a handle to `x`, and to the shortcut's input. `dx` is computed only if it is wanted.
//!
//! On a GPU the gradient of a repeated pixel is summed in one go over all that its four copies reach, 4 kh kw c_out
//! products, and written once: as many products as the four gradients take that the CPU makes and adds. A kernel of 2x2
//! whose weights are sums of those of 3x3 would take 16 of the 36. It is not used, since the sums, rounded to bf16 once
//! more, are other weights than those that the optimiser and the f32 path have.
//!
//! Numerics: f32 sums. An image's `y` and `dx` do not depend on the rest of its batch: their algorithm is chosen by the
//! image's shape alone, and blocking never changes the order in which an element is summed.

use crate::device::Device;
use crate::device::cpu::simd::Isa;
use crate::error::Result;
use crate::ops::concat::Joined;
use crate::ops::upsample;
use crate::params::{Param, Params};
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{DType, Shape, Tensor};

/// Rows and columns of zero padding around the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Pad {
    pub top: usize,
    pub left: usize,
    pub bottom: usize,
    pub right: usize,
}

impl Pad {
    /// The same on every side.
    pub const fn all(pixels: usize) -> Self {
        Pad { top: pixels, left: pixels, bottom: pixels, right: pixels }
    }
}

/// Stride and padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Pixels between outputs, in both dimensions.
    pub stride: usize,
    /// Zeros around the image.
    pub pad: Pad,
}

impl Geometry {
    /// Stride 1 and the padding with which a 3x3 kernel keeps the size.
    pub const SAME_3X3: Geometry = Geometry { stride: 1, pad: Pad::all(1) };
    /// Halves an even size with a 3x3 kernel: padding on the right and below only, as in the paper's code.
    pub const HALVE_3X3: Geometry = Geometry { stride: 2, pad: Pad { top: 0, left: 0, bottom: 1, right: 1 } };
    /// For a 1x1 kernel.
    pub const POINTWISE: Geometry = Geometry { stride: 1, pad: Pad::all(0) };

    /// Shape of the output for an image batch `x` and a weight `w` (c_out, kh, kw, c_in). Panics if the kernel is
    /// larger than the padded image.
    pub fn output(&self, x: Shape, w: Shape) -> Shape {
        let Pad { top, left, bottom, right } = self.pad;
        assert!(
            self.stride > 0 && x.h + top + bottom >= w.h && x.w + left + right >= w.w,
            "conv2d: a {}x{} kernel over {x} with {self:?}",
            w.h,
            w.w
        );
        let extent = |len: usize, k: usize| (len - k) / self.stride + 1;
        Shape::new(x.n, extent(x.h + top + bottom, w.h), extent(x.w + left + right, w.w), w.n)
    }
}

/// What is convolved.
#[derive(Clone)]
pub struct Input {
    x: Joined,
    /// Each pixel is repeated in a 2x2 square.
    doubled: bool,
}

impl From<&Var> for Input {
    fn from(x: &Var) -> Self {
        Input { x: x.into(), doubled: false }
    }
}

impl From<[&Var; 2]> for Input {
    /// Two whose channels follow one another; everything else must agree.
    fn from(x: [&Var; 2]) -> Self {
        Input { x: x.into(), doubled: false }
    }
}

impl From<Joined> for Input {
    fn from(x: Joined) -> Self {
        Input { x, doubled: false }
    }
}

impl Input {
    /// Nearest-neighbour upsampling by two: each pixel repeated in a 2x2 square. For a stride of 1.
    pub fn doubled(x: impl Into<Joined>) -> Self {
        Input { x: x.into(), doubled: true }
    }

    /// The shape of what is convolved.
    pub fn shape(&self) -> Shape {
        let shape = self.x.shape();
        if self.doubled { doubled(shape) } else { shape }
    }

    /// What is convolved. CPU only.
    fn whole(&self, device: &Device) -> Result<Tensor> {
        let x = self.x.concatenated(device)?;
        if !self.doubled {
            return Ok(x);
        }
        let mut y = Tensor::uninit(device, DType::F32, self.shape())?;
        upsample::cpu::forward(y.data_mut(), x.data(), x.shape());
        Ok(y)
    }

    /// Adds the gradient of what is convolved to those of the tensors. CPU only.
    fn add(&self, grads: &mut Grads<'_>, dx: Tensor) -> Result<()> {
        if !self.doubled {
            return self.x.add_parts(grads, dx);
        }
        let mut sums = Tensor::uninit(grads.device(), DType::F32, self.x.shape())?;
        upsample::cpu::backward(sums.data_mut(), dx.data(), self.x.shape());
        self.x.add_parts(grads, sums)
    }
}

/// What the epilogue adds to the convolution.
#[derive(Clone, Copy, Default)]
pub struct Plus<'a> {
    /// (n, 1, 1, c_out), added to every pixel of its image.
    pub shift: Option<&'a Var>,
    /// Shaped like the output, or half as high and wide, each pixel repeated in a 2x2 square.
    pub residual: Option<&'a Var>,
    /// In place of a residual.
    pub shortcut: Option<&'a Shortcut>,
}

/// A 1x1 convolution of another input, as high and wide as the output, with bias: `weight` (c_out, 1, 1, c_in), `bias`
/// (1, 1, 1, c_out). In bf16 on a GPU its channels are further steps of the same sums.
#[derive(Clone)]
#[allow(missing_docs)]
pub struct Shortcut {
    pub x: Joined,
    pub weight: Param,
    pub bias: Param,
}

/// How a convolution is computed on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// As a matrix product over gathered patches; any convolution.
    Direct,
    /// F(4x4, 3x3); 3x3 kernels at stride 1 with a padding of at most 2.
    Winograd,
}

impl Algorithm {
    /// True if it can compute a convolution with a weight of shape `w`.
    pub fn can(self, w: Shape, geometry: Geometry) -> bool {
        let Pad { top, left, bottom, right } = geometry.pad;
        match self {
            Algorithm::Direct => true,
            Algorithm::Winograd => {
                (w.h, w.w, geometry.stride) == (3, 3, 1) && [top, left, bottom, right].iter().all(|&p| p <= 2)
            }
        }
    }
}

/// An algorithm for each of the three products, and the vector instructions to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// For `y`.
    pub forward: Algorithm,
    /// For `dx`.
    pub dgrad: Algorithm,
    /// For `dw`.
    pub wgrad: Algorithm,
    /// Instructions.
    pub isa: Isa,
}

impl Method {
    /// One algorithm for all three.
    pub fn all(algorithm: Algorithm, isa: Isa) -> Self {
        Method { forward: algorithm, dgrad: algorithm, wgrad: algorithm, isa }
    }

    /// The fastest method known for this shape. The number of images does not affect the choice for `y` and `dx`, so an
    /// image's bits do not depend on its batch.
    ///
    /// Winograd's algorithm needs enough channels to sum over for its transforms to be a small part of the work. In
    /// `dw` its 36 sums per pair of channels are written and read once however few the tiles; it pays from 16 tiles on.
    pub fn choose(x: Shape, w: Shape, geometry: Geometry) -> Self {
        let y = geometry.output(x, w);
        let tiles = y.n * y.h.div_ceil(4) * y.w.div_ceil(4);
        let winograd_if = |worth: bool| {
            if worth && Algorithm::Winograd.can(w, geometry) { Algorithm::Winograd } else { Algorithm::Direct }
        };
        Method {
            forward: winograd_if(x.c >= 16),
            dgrad: winograd_if(y.c >= 16),
            wgrad: winograd_if(x.c >= 16 && y.c >= 16 && tiles >= 16),
            isa: Isa::best(),
        }
    }
}

/// Convolution with bias; `weight` (c_out, kh, kw, c_in), `bias` (1, 1, 1, c_out). `x` is a value, two whose channels
/// follow one another, or an [`Input`].
pub fn conv2d(
    tape: &mut Tape<'_>,
    x: impl Into<Input>,
    weight: Param,
    bias: Param,
    geometry: Geometry,
    plus: Plus<'_>,
) -> Result<Var> {
    let x = x.into();
    let method = Method::choose(x.shape(), tape.params().shape(weight), geometry);
    conv2d_by(tape, x, weight, bias, geometry, plus, method)
}

/// [`conv2d`] by a given method, for tests and for benches that look for the crossovers.
pub fn conv2d_by(
    tape: &mut Tape<'_>,
    x: impl Into<Input>,
    weight: Param,
    bias: Param,
    geometry: Geometry,
    plus: Plus<'_>,
    method: Method,
) -> Result<Var> {
    let x = x.into();
    let y_type = x.x.dtype();
    let (xs, ws, bs) = (x.shape(), tape.params().shape(weight), tape.params().shape(bias));
    assert_eq!(ws.c, xs.c, "conv2d: weight expects c_in={}, x has c={} (x: {xs})", ws.c, xs.c);
    assert_eq!(bs, Shape::vector(ws.n), "conv2d: bias is {bs} for c_out={}", ws.n);
    for algorithm in [method.forward, method.dgrad, method.wgrad] {
        assert!(algorithm.can(ws, geometry), "conv2d: {algorithm:?} cannot do weight {ws} with {geometry:?}");
    }
    assert!(!x.doubled || geometry.stride == 1, "conv2d: repeated pixels with {geometry:?}; their stride is 1");
    let ys = geometry.output(xs, ws);
    assert!(!x.doubled || ys.h.min(ys.w) > 1, "conv2d: one row or column of y, {ys}, of repeated pixels");
    if let Some(shift) = plus.shift {
        let want = Shape::new(ys.n, 1, 1, ys.c);
        assert_eq!(shift.shape(), want, "conv2d: shift is {}, expected {want}", shift.shape());
    }
    if let Some(residual) = plus.residual {
        let shape = residual.shape();
        assert!(shape == ys || doubled(shape) == ys, "conv2d: residual is {shape}, the output {ys}");
    }
    if let Some(Shortcut { x, weight, bias }) = plus.shortcut {
        let (w, b) = (tape.params().shape(*weight), tape.params().shape(*bias));
        assert!(plus.residual.is_none(), "conv2d: a residual and a shortcut");
        assert_eq!(w, Shape::new(ys.c, 1, 1, x.shape().c), "conv2d: the shortcut's weight is {w} for {}", x.shape());
        assert_eq!(b, Shape::vector(ys.c), "conv2d: the shortcut's bias is {b}");
        assert_eq!(x.shape().with_c(ys.c), ys, "conv2d: the shortcut's input is {}, the output {ys}", x.shape());
        assert_eq!(x.dtype(), y_type, "conv2d: the shortcut's input");
    }
    let mut y = Tensor::uninit(tape.device(), y_type, ys)?;
    match tape.device() {
        _ if tape.is_unread(weight) => {}
        Device::Cpu(_) => {
            let residual = plus.residual.map(|r| if r.shape() == ys { r.into() } else { Input::doubled(r) });
            let residual = match plus.shortcut {
                Some(shortcut) => Some(shortcut.on_cpu(tape.device(), tape.params(), method.isa, ys)?),
                None => residual.map(|r| r.whole(tape.device())).transpose()?,
            };
            let (weight, bias) = (tape.params().get(weight), tape.params().get(bias));
            let plus = cpu::Plus {
                bias: Some(bias),
                shift: plus.shift.map(Var::data),
                residual: residual.as_ref().map(Tensor::data),
            };
            let x = x.whole(tape.device())?;
            cpu::forward(tape.device(), method, x.data(), xs, weight, ws, geometry, plus, y.data_mut());
        }
        Device::Cuda(gpu) => cuda::forward(gpu, &mut y, &x, tape.params(), weight, bias, geometry, plus)?,
        Device::Meta(_) => {}
    }
    tape.push("conv2d", y, || Conv2dBackward {
        x,
        weight,
        bias,
        shift: plus.shift.and_then(Var::id),
        residual: plus.residual.and_then(|r| Some((r.id()?, r.shape()))),
        shortcut: plus.shortcut.cloned(),
        geometry,
        method,
    })
}

fn doubled(shape: Shape) -> Shape {
    Shape { h: 2 * shape.h, w: 2 * shape.w, ..shape }
}

impl Shortcut {
    /// It as a convolution.
    fn input(&self) -> Input {
        Input { x: self.x.clone(), doubled: false }
    }

    /// The method for its shape.
    fn method(&self, ws: Shape, isa: Isa) -> Method {
        Method { isa, ..Method::choose(self.x.shape(), ws, Geometry::POINTWISE) }
    }

    /// Whether it has the pixels of `x`, each as the tap (top, left) of its patch for a weight `w`: then its products
    /// are part of the convolution's on a GPU.
    fn is_beside(&self, x: &Input, w: Shape, g: Geometry) -> bool {
        let inside = !x.doubled && g.stride == 1 && g.pad.top < w.h && g.pad.left < w.w;
        inside && self.x.shape().with_c(0) == x.shape().with_c(0)
    }

    /// Its output, shaped `ys`. CPU only.
    fn on_cpu(&self, device: &Device, params: &Params, isa: Isa, ys: Shape) -> Result<Tensor> {
        let (x, ws) = (self.input().whole(device)?, params.shape(self.weight));
        let (weight, bias) = (params.get(self.weight), params.get(self.bias));
        let mut y = Tensor::uninit(device, DType::F32, ys)?;
        let plus = cpu::Plus { bias: Some(bias), ..cpu::Plus::default() };
        let method = self.method(ws, isa);
        cpu::forward(device, method, x.data(), x.shape(), weight, ws, Geometry::POINTWISE, plus, y.data_mut());
        Ok(y)
    }
}

struct Conv2dBackward {
    x: Input,
    weight: Param,
    bias: Param,
    shift: Option<VarId>,
    residual: Option<(VarId, Shape)>,
    shortcut: Option<Shortcut>,
    geometry: Geometry,
    method: Method,
}

impl Backward for Conv2dBackward {
    fn name(&self) -> &'static str {
        "conv2d"
    }

    fn saved(&self) -> Vec<&Tensor> {
        self.x.x.tensors().into_iter().chain(self.shortcut.iter().flat_map(|s| s.x.tensors())).collect()
    }

    fn wants_pixel_sums(&self) -> bool {
        true
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let (device, xs, ys) = (grads.device(), self.x.shape(), dy.shape());
        let ws = grads.weight_shape(self.weight);
        match device {
            Device::Cpu(_) => {
                if let Some(dw) = grads.param(self.weight) {
                    let x = self.x.whole(device)?;
                    cpu::wgrad(device, self.method, x.data(), xs, dy.data(), ws, self.geometry, dw);
                }
                if grads.wants_params() || self.shift.is_some() {
                    // (n, 1, 1, c_out)
                    let mut dshift = Tensor::uninit(device, DType::F32, Shape::new(ys.n, 1, 1, ys.c))?;
                    cpu::sum_pixels(device, self.method, dy.data(), &mut dshift);
                    for bias in [Some(self.bias), self.shortcut.as_ref().map(|s| s.bias)].into_iter().flatten() {
                        if let Some(db) = grads.param(bias) {
                            cpu::sum_images(dshift.data(), db);
                        }
                    }
                    if let Some(shift) = self.shift {
                        grads.add(shift, dshift)?;
                    }
                }
                if self.x.x.wants_gradient() {
                    let mut dx = Tensor::uninit(device, DType::F32, xs)?;
                    let weight = grads.weight(self.weight);
                    cpu::dgrad(device, self.method, dy.data(), ys, weight, ws, self.geometry, xs, dx.data_mut());
                    self.x.add(grads, dx)?;
                }
            }
            Device::Cuda(gpu) => {
                let biases: Vec<Param> = [self.bias].into_iter().chain(self.shortcut.iter().map(|s| s.bias)).collect();
                let known = grads.pixel_sums().filter(|_| grads.wants_params() || self.shift.is_some());
                // Who stored dy may have summed its pixels; otherwise the pass for dw does, but for dshift.
                let (dshift, with_dw) = match known {
                    Some(known) => {
                        cuda::bias_gradients(gpu, grads, &biases, &known)?;
                        (Some(known.rounded), &[][..])
                    }
                    None if self.shift.is_some() || dy.dtype() == DType::F32 && grads.wants_params() => {
                        (cuda::sums(gpu, grads, &biases, &dy, self.shift.map(|_| device))?, &[][..])
                    }
                    None => (None, &biases[..]),
                };
                if let (Some(shift), Some(dshift)) = (self.shift, dshift) {
                    grads.add(shift, dshift)?;
                }
                let layer = cuda::Layer { x: &self.x, weight: self.weight, g: self.geometry };
                cuda::backward(gpu, grads, layer, self.shortcut.as_ref(), with_dw, &dy)?;
            }
            Device::Meta(_) => {}
        }
        if let (Some(shortcut), Device::Cpu(_)) = (&self.shortcut, device) {
            let (ws, x, g) = (grads.weight_shape(shortcut.weight), shortcut.input(), Geometry::POINTWISE);
            let method = shortcut.method(ws, self.method.isa);
            if let Some(dw) = grads.param(shortcut.weight) {
                let x = x.whole(device)?;
                cpu::wgrad(device, method, x.data(), x.shape(), dy.data(), ws, g, dw);
            }
            if x.x.wants_gradient() {
                let xs = x.shape();
                let mut dx = Tensor::uninit(device, DType::F32, xs)?;
                let weight = grads.weight(shortcut.weight);
                cpu::dgrad(device, method, dy.data(), ys, weight, ws, g, xs, dx.data_mut());
                x.add(grads, dx)?;
            }
        }
        match self.residual {
            Some((id, shape)) if shape == ys => grads.add(id, dy),
            Some((id, shape)) => {
                let mut sums = Tensor::uninit(device, dy.dtype(), shape)?;
                match device {
                    Device::Cpu(_) => upsample::cpu::backward(sums.data_mut(), dy.data(), shape),
                    Device::Cuda(gpu) => upsample::cuda::backward(gpu, &mut sums, &dy)?,
                    Device::Meta(_) => {}
                }
                grads.add(id, sums)
            }
            None => Ok(()),
        }
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use super::Geometry;
    use crate::tensor::Shape;

    /// A convolution's inputs; `shift` and `residual` are those of [`super::Plus`].
    #[derive(Clone, Copy)]
    #[allow(missing_docs)]
    pub struct Inputs<'a, T> {
        pub x: &'a [T],
        pub x_shape: Shape,
        pub weight: &'a [T],
        pub weight_shape: Shape,
        pub bias: &'a [T],
        pub shift: Option<&'a [T]>,
        pub residual: Option<&'a [T]>,
        pub geometry: Geometry,
    }

    /// Gradients of [`Inputs`]; the residual's is `dy`.
    #[allow(missing_docs)]
    pub struct Gradients<T> {
        pub x: Vec<T>,
        pub weight: Vec<T>,
        pub bias: Vec<T>,
        pub shift: Vec<T>,
    }

    impl<T> Inputs<'_, T> {
        /// Calls `f(y, x, w)` with the indices of every product that enters an output, in the order of y, then u, v, k.
        fn for_each_product(&self, mut f: impl FnMut(usize, usize, usize)) {
            let (xs, ws) = (self.x_shape, self.weight_shape);
            let (ys, s, pad) = (self.geometry.output(xs, ws), self.geometry.stride, self.geometry.pad);
            for n in 0..ys.n {
                for i in 0..ys.h {
                    for j in 0..ys.w {
                        for o in 0..ys.c {
                            for u in 0..ws.h {
                                for v in 0..ws.w {
                                    // Row and column, counted from the corner of the padding.
                                    let (p, q) = (i * s + u, j * s + v);
                                    if p < pad.top || p >= xs.h + pad.top || q < pad.left || q >= xs.w + pad.left {
                                        continue;
                                    }
                                    let x = ((n * xs.h + p - pad.top) * xs.w + q - pad.left) * xs.c;
                                    let w = ((o * ws.h + u) * ws.w + v) * ws.c;
                                    for k in 0..xs.c {
                                        f(((n * ys.h + i) * ys.w + j) * ys.c + o, x + k, w + k);
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// `y`.
    pub fn forward<T: Float>(a: &Inputs<'_, T>) -> Vec<T> {
        let ys = a.geometry.output(a.x_shape, a.weight_shape);
        let mut y = vec![T::zero(); ys.len()];
        a.for_each_product(|iy, ix, iw| y[iy] = y[iy] + a.x[ix] * a.weight[iw]);
        for (i, y) in y.iter_mut().enumerate() {
            let (image, o) = (i / (ys.pixels() * ys.c), i % ys.c);
            *y = *y + a.bias[o];
            if let Some(shift) = a.shift {
                *y = *y + shift[image * ys.c + o];
            }
            if let Some(residual) = a.residual {
                *y = *y + residual[i];
            }
        }
        y
    }

    /// `dx`, `dw`, `db`, `dshift`.
    pub fn backward<T: Float>(a: &Inputs<'_, T>, dy: &[T]) -> Gradients<T> {
        let ys = a.geometry.output(a.x_shape, a.weight_shape);
        let mut d = Gradients {
            x: vec![T::zero(); a.x.len()],
            weight: vec![T::zero(); a.weight.len()],
            bias: vec![T::zero(); ys.c],
            shift: vec![T::zero(); ys.n * ys.c],
        };
        a.for_each_product(|iy, ix, iw| {
            d.x[ix] = d.x[ix] + dy[iy] * a.weight[iw];
            d.weight[iw] = d.weight[iw] + dy[iy] * a.x[ix];
        });
        for (i, &dy) in dy.iter().enumerate() {
            let (image, o) = (i / (ys.pixels() * ys.c), i % ys.c);
            d.bias[o] = d.bias[o] + dy;
            d.shift[image * ys.c + o] = d.shift[image * ys.c + o] + dy;
        }
        d
    }
}

mod cpu {
    pub(super) use crate::device::cpu::direct::Plus;
    use crate::device::cpu::direct::{self, Axis, Patches, TapOf, Target, Towards, Weight};
    use crate::device::cpu::gemm;
    use crate::device::cpu::vector::with_vector;
    use crate::device::cpu::winograd::{self, Tiles};
    use crate::params::ParamGrad;

    use super::*;

    /// The patches of the forward pass.
    fn patches(xs: Shape, ws: Shape, ys: Shape, g: Geometry) -> Patches {
        let axis = |out, len, taps, before: usize| Axis { out, len, taps, stride: g.stride, first: -(before as isize) };
        let (rows, cols) = (axis(ys.h, xs.h, ws.h, g.pad.top), axis(ys.w, xs.w, ws.w, g.pad.left));
        Patches { n: xs.n, rows, cols, c: xs.c }
    }

    /// The tiles of a 3x3 convolution from `input` to `output`.
    fn tiles(input: Shape, output: Shape, top: usize, left: usize) -> Tiles {
        let Shape { n, h, w, c } = input;
        Tiles { n, h, w, c, out_h: output.h, out_w: output.w, top, left }
    }

    fn weight(data: &[f32], ws: Shape) -> Weight<'_> {
        Weight { data, c_out: ws.n, kh: ws.h, kw: ws.w, c_in: ws.c }
    }

    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        device: &Device,
        method: Method,
        x: &[f32],
        xs: Shape,
        w: &[f32],
        ws: Shape,
        g: Geometry,
        plus: Plus<'_>,
        y: &mut [f32],
    ) {
        let ys = g.output(xs, ws);
        match method.forward {
            Algorithm::Direct => {
                let straight = TapOf { first: 0, step: 1 };
                let target = Target { h: ys.h, w: ys.w, c: ys.c, step: 1, row: 0, col: 0, plus };
                let (patches, w) = (patches(xs, ws, ys, g), weight(w, ws));
                with_vector!(method.isa, V, token => {
                    direct::outputs::<V>(token, device, x, patches, w, Towards::Output, [straight; 2], y, target)
                });
            }
            Algorithm::Winograd => {
                let tiles = tiles(xs, ys, g.pad.top, g.pad.left);
                with_vector!(method.isa, V, token => {
                    winograd::outputs::<V>(token, device, x, tiles, weight(w, ws), Towards::Output, y, plus)
                });
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub fn dgrad(
        device: &Device,
        method: Method,
        dy: &[f32],
        ys: Shape,
        w: &[f32],
        ws: Shape,
        g: Geometry,
        xs: Shape,
        dx: &mut [f32],
    ) {
        match method.dgrad {
            Algorithm::Direct => {
                // Pixels p = s i + a of dx, for one remainder a, are reached by the taps u = a + before (mod s), from
                // dy's pixel i + (a + before - u) / s. In order of that pixel, so the largest u first.
                let axis = |a: usize, x_len: usize, y_len: usize, k: usize, before: usize| {
                    let u = (a + before) % g.stride;
                    let taps = if u < k { (k - 1 - u) / g.stride + 1 } else { 0 };
                    let largest = u + taps.saturating_sub(1) * g.stride;
                    let first = ((a + before) as isize - largest as isize) / g.stride as isize;
                    let out = x_len.saturating_sub(a).div_ceil(g.stride);
                    let tap_of = TapOf { first: largest as isize, step: -(g.stride as isize) };
                    (Axis { out, len: y_len, taps, stride: 1, first }, tap_of)
                };
                for a in 0..g.stride {
                    for b in 0..g.stride {
                        let (rows, row_tap) = axis(a, xs.h, ys.h, ws.h, g.pad.top);
                        let (cols, col_tap) = axis(b, xs.w, ys.w, ws.w, g.pad.left);
                        let patches = Patches { n: xs.n, rows, cols, c: ws.n };
                        let plus = Plus::default();
                        let target = Target { h: xs.h, w: xs.w, c: xs.c, step: g.stride, row: a, col: b, plus };
                        let (w, taps) = (weight(w, ws), [row_tap, col_tap]);
                        with_vector!(method.isa, V, token => {
                            direct::outputs::<V>(token, device, dy, patches, w, Towards::Input, taps, dx, target)
                        });
                    }
                }
            }
            Algorithm::Winograd => {
                // dx is the convolution of dy with the kernel rotated by 180 degrees; a padding p becomes k - 1 - p.
                let tiles = tiles(ys, xs, 2 - g.pad.top, 2 - g.pad.left);
                with_vector!(method.isa, V, token => {
                    winograd::outputs::<V>(token, device, dy, tiles, weight(w, ws), Towards::Input, dx, Plus::default())
                });
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    pub fn wgrad(
        device: &Device,
        method: Method,
        x: &[f32],
        xs: Shape,
        dy: &[f32],
        ws: Shape,
        g: Geometry,
        dw: ParamGrad<'_>,
    ) {
        let ys = g.output(xs, ws);
        match method.wgrad {
            Algorithm::Direct => {
                let patches = patches(xs, ws, ys, g);
                with_vector!(method.isa, V, token => {
                    direct::weight_gradient::<V>(token, device, x, patches, dy, ys.c, dw.data, dw.accumulate)
                });
            }
            Algorithm::Winograd => {
                let tiles = tiles(xs, ys, g.pad.top, g.pad.left);
                with_vector!(method.isa, V, token => {
                    winograd::weight_gradient::<V>(token, device, x, tiles, dy, ys.c, dw.data, dw.accumulate)
                });
            }
        }
    }

    /// `dshift`, shaped (n, 1, 1, c).
    pub fn sum_pixels(device: &Device, method: Method, dy: &[f32], dshift: &mut Tensor) {
        let Shape { n, c, .. } = dshift.shape();
        with_vector!(method.isa, V, token => gemm::column_sums::<V>(token, device, dy, n, c, dshift.data_mut()));
    }

    /// `db`: sums `dshift` over the images, in order.
    pub fn sum_images(dshift: &[f32], db: ParamGrad<'_>) {
        let c = db.data.len();
        for (o, db_o) in db.data.iter_mut().enumerate() {
            let sum = dshift[o..].iter().step_by(c).fold(0.0, |sum, s| sum + s);
            *db_o = if db.accumulate { *db_o + sum } else { sum };
        }
    }
}

mod cuda {
    use std::sync::Arc;

    use super::*;
    use crate::device::cuda::tile::{
        Job, MANY, Parts, SUM_THREADS, Segments, SplitK, backward_kernel, backward_launches, choose, choose_mma, lanes,
        of_f32, over_rows, ring, shared, split_in, tile, tiles,
    };
    use crate::device::cuda::{Buffer, Gpu, Launch, View};
    use crate::kernels::Kernel;
    use crate::kernels::conv2d::{
        BWD_MMA_64X64, BWD_MMA_64X64_128X128, BWD_MMA_128X128, BWD_SHIFT, DGRAD_64X64_F32, DGRAD_64X64_TF32,
        DGRAD_128X32_F32, DGRAD_128X32_TF32, DGRAD_MMA_64X64_ANY, FWD_64X64_F32, FWD_64X64_TF32, FWD_128X32_F32,
        FWD_128X32_TF32, FWD_MMA_64X64, FWD_MMA_64X64_ANY, FWD_MMA_128X16, FWD_MMA_128X128, JOIN_SEGMENTS,
        WGRAD_32X128_F32, WGRAD_32X128_TF32, WGRAD_64X64_F32, WGRAD_64X64_TF32, WGRAD_MMA_64X64_ANY,
        WGRAD_MMA_64X64_ANY_X, WGRAD_MMA_64X64_ANY_Y,
    };
    use crate::kernels::conv2d_mma::{ORIGINS, SOURCES, TAP};
    use crate::kernels::geometry;
    use crate::kernels::tile_mma::{BK, BackwardBlocks};
    use crate::tape::PixelSums;

    /// Steps of k in a slab of a product on tensor cores: channels of one tap.
    const SLAB: usize = BK as usize;

    /// Slabs of a sum over `taps` taps of tensors of so many channels.
    fn slabs(taps: usize, widths: &[usize]) -> usize {
        taps * widths.iter().map(|c| c.div_ceil(SLAB)).sum::<usize>()
    }

    /// True if all chunks or slabs of so many channels are whole.
    fn whole(widths: &[usize], channels: usize) -> bool {
        widths.iter().all(|c| c.is_multiple_of(channels))
    }

    /// Shared memory of a kernel on tensor cores whose plan has `taps` taps, and of others.
    fn shared_with_plan(kernel: &Kernel, taps: usize) -> usize {
        if shared(kernel) == 0 { 0 } else { with_plan(tile(kernel), taps) }
    }

    /// Shared memory of a product with such tiles on tensor cores whose plan has `taps` taps.
    fn with_plan((bm, bn): (usize, usize), taps: usize) -> usize {
        // Beside a ring of 96 KiB an RTX 4090 has room for so many.
        assert!(taps <= 120, "conv2d: {taps} taps of all tensors together; in bf16 they are at most 120");
        ring(bm, bn) + 4 * (bm + bn) + SOURCES as usize + TAP as usize * taps
    }

    /// The sizes in the kernels' form.
    fn sizes(x: &Input, ws: Shape, g: Geometry) -> geometry::Geometry {
        let (dtype, xs) = (x.x.dtype(), x.shape());
        let ys = g.output(xs, ws);
        let taps = ws.h * ws.w;
        // The kernels index pixels and patch elements with 32 bits, and step up to a tile beyond the last.
        for (what, count) in
            [("x", xs.rows()), ("y", ys.rows()), ("c_in taps", xs.c * taps), ("c_out taps", ys.c * taps)]
        {
            assert!(count < 1 << 30, "conv2d: {what} is {count} for x {xs}, weight {ws}; the kernels count to 2^30");
        }
        if dtype == DType::Bf16 {
            // Those on tensor cores add 32-bit offsets from tap to tap and from one block of channels to the next, and
            // know a pixel's taps by two times 15 bits.
            let patch = 2 * ws.h * (xs.w * xs.c).max(ys.w * ys.c);
            for (what, count) in [("the extent of a patch", patch), ("the extent of the weight", ws.len())] {
                assert!(count < 1 << 31, "conv2d: {what} is {count} for x {xs}, weight {ws}; the limit is 2^31");
            }
            let most = if x.doubled { 7 } else { 15 };
            assert!(ws.h.max(ws.w) <= most, "conv2d: the weight is {ws}; in bf16 it has at most {most} x {most} taps");
        }
        let number = |v: usize| u32::try_from(v).unwrap_or_else(|_| panic!("conv2d: {v} in {xs}, {ws}, {g:?}"));
        geometry::Geometry {
            n: number(xs.n),
            h: number(x.x.shape().h),
            w: number(x.x.shape().w),
            c_in: number(xs.c),
            oh: number(ys.h),
            ow: number(ys.w),
            c_out: number(ys.c),
            kh: number(ws.h),
            kw: number(ws.w),
            stride: number(g.stride),
            top: number(g.pad.top),
            left: number(g.pad.left),
            c_first: number(x.x.first().shape().c),
            up: x.doubled.into(),
            s_in: 0,
            s_first: 0,
        }
    }

    /// Rows are pixels of `y`, columns `c_out`.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        gpu: &Gpu,
        y: &mut Tensor,
        input: &Input,
        params: &Params,
        weight: Param,
        bias: Param,
        g: Geometry,
        plus: Plus<'_>,
    ) -> Result<()> {
        let (x, dtype) = (&input.x, input.x.dtype());
        let in_sum = plus.shortcut.filter(|s| dtype == DType::Bf16 && s.is_beside(input, params.shape(weight), g));
        let apart = match plus.shortcut {
            Some(s) if in_sum.is_none() => {
                let mut y = Tensor::uninit(&Device::Cuda(gpu.clone()), dtype, y.shape())?;
                forward(gpu, &mut y, &s.input(), params, s.weight, s.bias, Geometry::POINTWISE, Plus::default())?;
                Some(y)
            }
            _ => None,
        };
        let [shift, residual] = [plus.shift, plus.residual].map(|v| v.map(Var::value));
        for v in [shift, residual].into_iter().flatten() {
            assert_eq!(v.dtype(), dtype, "conv2d: {v:?} is added to the convolution of {:?}", x.first());
        }
        let residual = residual.or(apart.as_ref());
        let (ws, ys) = (params.shape(weight), y.shape());
        let (of_x, of_s) = (x.widths(), in_sum.map_or(Vec::new(), |s| s.x.widths()));
        let widths: Vec<usize> = of_x.iter().chain(&of_s).copied().collect();
        let (weight, bias) = (params.view(weight, dtype), params.view(bias, DType::F32));
        // Of repeated pixels, y has four classes, of pixels that meet the same taps in the same places; the first is
        // the largest.
        let classes = if input.doubled { 4 } else { 1 };
        let of_class = |side: usize| if input.doubled { side.div_ceil(2) } else { side };
        let rows = ys.n * of_class(ys.h) * of_class(ys.w);
        let taps = ws.h * ws.w;
        let segments = Segments::new(ys.pixels(), slabs(taps, &of_x) + slabs(1, &of_s));
        let kernel = match dtype {
            DType::F32 => {
                let kernels = of_f32(gpu, [&FWD_64X64_F32, &FWD_128X32_F32], [&FWD_64X64_TF32, &FWD_128X32_TF32]);
                choose(kernels, rows, ys.c).0
            }
            DType::Bf16 if !whole(&widths, 8) => &FWD_MMA_64X64_ANY,
            DType::Bf16 if ys.c <= 16 => &FWD_MMA_128X16,
            DType::Bf16 => {
                let large = (whole(&widths, SLAB) && segments.count == 1).then_some(&FWD_MMA_128X128);
                choose_mma(large, &FWD_MMA_64X64, MANY.div_ceil(classes), rows, ys.c)
            }
        };
        let tiles = tiles(kernel, rows, ys.c);
        let sizes = geometry::Geometry {
            s_in: of_s.iter().sum::<usize>() as u32,
            s_first: of_s.first().map_or(0, |&c| c as u32),
            ..sizes(input, ws, g)
        };
        let s_weight = in_sum.map(|s| params.view(s.weight, dtype));
        let s_bias = in_sum.map(|s| params.view(s.bias, DType::F32));
        let launch = |blocks| {
            let shared = shared_with_plan(kernel, taps * of_x.len() + of_s.len());
            gpu.launch(kernel, [tiles, classes, blocks], kernel.max_threads).shared(shared)
        };
        let halved = if residual.is_some_and(|r| r.shape() != ys) { ys.w } else { 0 };
        if !std::ptr::eq(kernel, &FWD_MMA_64X64) {
            let launch = launch(1).write(y).read(x.first()).read_opt(x.second()).view(weight).view(bias);
            let launch = launch.read_opt(shift).read_opt(residual).u32(halved);
            let launch = match dtype {
                DType::F32 => launch,
                DType::Bf16 => read_shortcut(launch, in_sum, s_weight).view_opt(s_bias),
            };
            return launch.value(sizes).run();
        }
        let blocks = segments.blocks(classes * tiles);
        if blocks == 1 {
            let launch = launch(1).write(y).null().read(x.first()).read_opt(x.second()).view(weight).view(bias);
            let launch = launch.read_opt(shift).read_opt(residual).u32(halved);
            let launch = read_shortcut(launch, in_sum, s_weight).view_opt(s_bias);
            return launch.value(sizes).u32(segments.segment).run();
        }
        let mut parts = gpu.alloc(4 * blocks * ys.len())?; // (segments, n, oh, ow, c_out)
        let launch = launch(blocks).null().buffer_mut(&mut parts).read(x.first()).read_opt(x.second()).view(weight);
        let launch = read_shortcut(launch.null().null().null().u32(0), in_sum, s_weight).null();
        launch.value(sizes).u32(segments.segment).run()?;
        join(gpu, y, None, &parts, blocks, |launch| {
            launch.view(bias).read_opt(shift).read_opt(residual).u32(halved).view_opt(s_bias)
        })
    }

    /// Both tensors of a shortcut and its weight.
    fn read_shortcut<'a>(launch: Launch<'a>, s: Option<&'a Shortcut>, weight: Option<View<'a>>) -> Launch<'a> {
        let x = s.map(|s| &s.x);
        launch.read_opt(x.map(Joined::first)).read_opt(x.and_then(Joined::second)).view_opt(weight)
    }

    /// Adds up the sums of segments, and what `plus` passes: biases, shift and residual.
    fn join<'a>(
        gpu: &'a Gpu,
        to: &'a mut Tensor,
        to_second: Option<&'a mut Tensor>,
        parts: &'a Buffer,
        count: usize,
        plus: impl FnOnce(Launch<'a>) -> Launch<'a>,
    ) -> Result<()> {
        let (shape, second) = (to.shape(), to_second.as_ref().map_or(0, |second| second.shape().c));
        let c = shape.c + second;
        let (grid, lane_bits) = over_rows(shape.rows(), c.div_ceil(4), JOIN_SEGMENTS.max_threads);
        let launch = gpu.launch(&JOIN_SEGMENTS, grid, JOIN_SEGMENTS.max_threads).write(to).write_opt(to_second);
        let launch = plus(launch.buffer(parts)).u32(count).u64(shape.rows());
        launch.u32(shape.c).u32(c).u32(shape.pixels()).u32(lane_bits).run()
    }

    /// A convolution, or a shortcut as one.
    #[derive(Clone, Copy)]
    pub struct Layer<'a> {
        pub x: &'a Input,
        pub weight: Param,
        pub g: Geometry,
    }

    /// The product for `dx`: rows are its pixels in one class of remainders modulo the stride, of which class 0 is the
    /// largest; columns `c_in`.
    struct ForDx {
        rows: usize,
        cols: usize,
        classes: usize,
        taps: usize,
        segments: Segments,
    }

    impl ForDx {
        fn new(x: &Input, ws: Shape, g: Geometry) -> Self {
            let xs = x.x.shape();
            // A repeated pixel is reached through each tap four times.
            let taps = if x.doubled { 4 * ws.h * ws.w } else { ws.h * ws.w };
            // The classes of a stride have different numbers of taps.
            let segments = if g.stride == 1 { Segments::new(xs.pixels(), slabs(taps, &[ws.n])) } else { Segments::ONE };
            let rows = xs.n * xs.h.div_ceil(g.stride) * xs.w.div_ceil(g.stride);
            ForDx { rows, cols: xs.c, classes: g.stride * g.stride, taps, segments }
        }

        /// The side of its tiles beside those of `dw`; `None` if 8 does not divide the channels, which have a kernel of
        /// their own.
        fn side(&self, c_out: usize) -> Option<usize> {
            let whole = c_out.is_multiple_of(SLAB) && self.cols.is_multiple_of(128) && self.segments.count == 1;
            let kernel = choose_mma(whole.then_some(&BWD_MMA_128X128), &BWD_MMA_64X64, MANY, self.rows, self.cols);
            (c_out.is_multiple_of(8) && self.cols.is_multiple_of(8)).then_some(tile(kernel).0)
        }
    }

    /// The same for `dw`: rows are `c_out`, columns `(u, v, c_in)`, and the sum runs over the pixels of `y`.
    fn dw_side(x: &Input, ws: Shape) -> Option<usize> {
        let large = ws.n.is_multiple_of(128).then_some(&BWD_MMA_128X128);
        let kernel = choose_mma(large, &BWD_MMA_64X64, 1, ws.n, ws.h * ws.w * ws.c);
        (whole(&x.x.widths(), 8) && ws.n.is_multiple_of(8)).then_some(tile(kernel).0)
    }

    /// The gradients of `x` and of the weight, each if it is wanted; of `biases`, which are the sums of `dy`, unless dw
    /// is computed in f32; and those of a shortcut.
    pub fn backward(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        layer: Layer<'_>,
        shortcut: Option<&Shortcut>,
        biases: &[Param],
        dy: &Tensor,
    ) -> Result<()> {
        let Layer { x, weight, g } = layer;
        let ws = grads.weight_shape(weight);
        let (mut dw, mut dx) = (None, None);
        if dy.dtype() == DType::Bf16 {
            (dw, dx) = (dw_side(x, ws), ForDx::new(x, ws, g).side(ws.n));
        }
        if dw.is_none() && grads.wants_params() {
            dw_alone(gpu, grads, layer, biases, dy)?;
        }
        if dx.is_none() && x.x.wants_gradient() {
            dx_alone(gpu, grads, layer, dy)?;
        }
        // By the sizes alone, so that no gradient's bits depend on which others are wanted.
        let in_one = dw.is_some() && backward_launches(dw, dx).len() == 1;
        (dw, dx) = (dw.filter(|_| grads.wants_params()), dx.filter(|_| x.x.wants_gradient()));
        let launches = backward_launches(dw, dx);
        let beside = shortcut.filter(|s| {
            let fits = |side: usize| if side == 64 { 8 } else { side };
            let divides = dx.is_some_and(|side| s.x.shape().c.is_multiple_of(fits(side))) && whole(&s.x.widths(), 8);
            in_one && divides && s.x.wants_gradient() && s.is_beside(x, ws, g)
        });
        for sides in launches {
            one_launch(gpu, grads, layer, sides, beside, biases, dy)?;
        }
        match shortcut {
            Some(shortcut) if beside.is_none() => {
                let x = shortcut.input();
                let layer = Layer { x: &x, weight: shortcut.weight, g: Geometry::POINTWISE };
                backward(gpu, grads, layer, None, &[], dy)
            }
            _ => Ok(()),
        }
    }

    /// On tensor cores what of `dw` and `dx` has a side for its tiles, in one launch, with both gradients of a shortcut
    /// whose pixels are those of `x`.
    fn one_launch(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        Layer { x, weight, g }: Layer<'_>,
        sides: [Option<usize>; 2],
        shortcut: Option<&Shortcut>,
        biases: &[Param],
        dy: &Tensor,
    ) -> Result<()> {
        let ([dw, dx], ws, xs, dtype) = (sides, grads.weight_shape(weight), x.x.shape(), dy.dtype());
        let kernel = backward_kernel(sides, [&BWD_MMA_128X128, &BWD_MMA_64X64_128X128, &BWD_MMA_64X64]);
        let of_s = shortcut.map_or(Vec::new(), |s| s.x.widths());
        let s_in = of_s.iter().sum::<usize>();

        // dw, and the shortcut's: each tensor's columns have tiles of their own.
        let (rows, depth, len) = (ws.n, dy.shape().rows(), ws.len() + ws.n * s_in);
        let (mut dw_tiles, mut split, mut shared) = (0, SplitK { segment: 0, count: 0 }, 0);
        let (mut parts, mut sums) = (None, None);
        if let Some(side) = dw {
            let of_x = x.x.widths().into_iter().map(|c| ws.h * ws.w * c);
            let across: usize = of_x.chain(of_s.iter().copied()).map(|width| width.div_ceil(side)).sum();
            dw_tiles = rows.div_ceil(side) * across;
            split = split_in(sides, dw_tiles, depth);
            parts = Some(gpu.alloc(4 * split.count * len)?); // (segments, weights)
            if !biases.is_empty() {
                sums = Some(gpu.alloc(8 * split.count * rows)?); // (segments, c_out), f64
            }
            shared = ring(side, side) + ORIGINS as usize;
        }

        // dx, and the shortcut's.
        let of_dx = ForDx::new(x, ws, g);
        let (mut dx_tiles, mut dx_segments, mut ds_tiles) = (0, 1, 0);
        let (mut to, mut to_s, mut dx_parts, mut waiting) = (None, None, None, [None, None]);
        if let Some(side) = dx {
            dx_tiles = of_dx.rows.div_ceil(side) * of_dx.cols.div_ceil(side);
            dx_segments = of_dx.segments.blocks(dx_tiles);
            ds_tiles = dy.shape().rows().div_ceil(side) * s_in.div_ceil(side);
            to = Some(x.x.gradients(grads.device())?);
            to_s = shortcut.map(|s| s.x.gradients(grads.device())).transpose()?;
            if dx_segments > 1 {
                dx_parts = Some(gpu.alloc(4 * dx_segments * xs.len())?); // (segments, n, h, w, c_in)
            } else if let ([Some(id), _], None) = (x.x.ids(), x.x.second()) {
                waiting = grads.waiting(id);
            }
            shared = shared.max(with_plan((side, side), of_dx.taps));
        }
        let written = to.as_mut().filter(|_| dx_segments == 1);
        let (first, second) = written.map_or((None, None), |(first, second)| (Some(first), second.as_mut()));
        let (s_first, s_second) = to_s.as_mut().map_or((None, None), |(first, second)| (Some(first), second.as_mut()));

        let number = |v: usize| u32::try_from(v).unwrap_or_else(|_| panic!("conv2d: {v} in {}", kernel.name));
        let blocks = BackwardBlocks {
            dw_tiles: number(dw_tiles),
            dw_segments: number(split.count),
            dw_depth: number(split.segment),
            dx_tiles: number(dx_tiles),
            dx_segments: number(dx_segments),
            dx_depth: number(of_dx.segments.segment),
        };
        let sizes = geometry::Geometry {
            s_in: number(s_in),
            s_first: of_s.first().map_or(0, |&c| number(c)),
            ..sizes(x, ws, g)
        };
        let kinds = [dw_tiles * split.count, dx_tiles * of_dx.classes * dx_segments, ds_tiles];
        let launch = gpu.launch(kernel, [kinds.iter().sum(), 1, 1], kernel.max_threads).shared(shared).kinds(&kinds);
        let launch = launch.buffer_mut_opt(parts.as_mut()).buffer_mut_opt(sums.as_mut());
        let launch = launch.write_opt(first).write_opt(second).write_opt(s_first).write_opt(s_second);
        let launch = launch.buffer_mut_opt(dx_parts.as_mut()).read(x.x.first()).read_opt(x.x.second());
        let launch = launch.read_opt(shortcut.map(|s| s.x.first())).read_opt(shortcut.and_then(|s| s.x.second()));
        let launch = launch.read(dy).view(grads.weight_view(weight, dtype));
        let launch = launch.view_opt(shortcut.map(|s| grads.weight_view(s.weight, dtype)));
        let launch = launch.read_opt(waiting[0].as_ref()).read_opt(waiting[1].as_ref());
        launch.value(sizes).value(blocks).run()?;

        if let Some(parts) = parts {
            let all = Parts { buffer: Arc::new(parts), size: 4, from: 0, count: split.count, pitch: len };
            grads.sum_later(gpu, weight, all.clone())?;
            if let Some(shortcut) = shortcut {
                grads.sum_later(gpu, shortcut.weight, Parts { from: ws.len(), ..all })?;
            }
        }
        if let Some(sums) = sums {
            grads.sums_later(gpu, biases, sums, split.count, rows)?;
        }
        if let Some((mut first, mut second)) = to {
            if let Some(parts) = &dx_parts {
                join(gpu, &mut first, second.as_mut(), parts, dx_segments, |launch| {
                    launch.null().null().null().u32(0).null()
                })?;
            }
            x.x.add(grads, (first, second))?;
        }
        match (shortcut, to_s) {
            (Some(shortcut), Some(to_s)) => shortcut.x.add(grads, to_s),
            _ => Ok(()),
        }
    }

    /// `dx` in f32, or of channels that 8 does not divide.
    fn dx_alone(gpu: &Gpu, grads: &mut Grads<'_>, Layer { x, weight, g }: Layer<'_>, dy: &Tensor) -> Result<()> {
        let ws = grads.weight_shape(weight);
        let ForDx { rows, cols, classes, taps, .. } = ForDx::new(x, ws, g);
        let kernel = match dy.dtype() {
            DType::F32 => {
                let tf32 = [&DGRAD_64X64_TF32, &DGRAD_128X32_TF32];
                choose(of_f32(gpu, [&DGRAD_64X64_F32, &DGRAD_128X32_F32], tf32), rows, cols).0
            }
            DType::Bf16 => &DGRAD_MMA_64X64_ANY,
        };
        let (mut dx, mut second) = x.x.gradients(grads.device())?;
        let launch = gpu.launch(kernel, [tiles(kernel, rows, cols), classes, 1], kernel.max_threads);
        let launch = launch.shared(shared_with_plan(kernel, taps)).write(&mut dx).write_opt(second.as_mut());
        launch.read(dy).view(grads.weight_view(weight, dy.dtype())).value(sizes(x, ws, g)).run()?;
        x.x.add(grads, (dx, second))
    }

    /// `dw` in f32, or of channels that 8 does not divide, and then the gradients of `biases`.
    fn dw_alone(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        Layer { x, weight, g }: Layer<'_>,
        biases: &[Param],
        dy: &Tensor,
    ) -> Result<()> {
        let ws = grads.weight_shape(weight);
        let (widths, taps) = (x.x.widths(), ws.h * ws.w);
        let (rows, cols, depth) = (ws.n, taps * ws.c, dy.shape().rows());
        let job = match dy.dtype() {
            DType::F32 => {
                let tf32 = [&WGRAD_64X64_TF32, &WGRAD_32X128_TF32];
                Job::of_f32(of_f32(gpu, [&WGRAD_64X64_F32, &WGRAD_32X128_F32], tf32), rows, cols, depth)
            }
            DType::Bf16 => {
                // The network's first convolution has few channels of x, its last few of y.
                let kernel = match (whole(&widths, 8), ws.n.is_multiple_of(8)) {
                    (false, true) => &WGRAD_MMA_64X64_ANY_X,
                    (true, false) => &WGRAD_MMA_64X64_ANY_Y,
                    _ => &WGRAD_MMA_64X64_ANY,
                };
                // The columns of each tensor have tiles of their own.
                let tiles = widths.iter().map(|c| tiles(kernel, rows, taps * c)).sum();
                Job { tiles, ..Job::on_mma(kernel, ORIGINS as usize, rows, cols, depth) }
            }
        };
        let operands = [Some(x.x.first()), x.x.second(), Some(dy)].map(|x| x.map(Tensor::array));
        grads.product(gpu, weight, biases, &job, &operands, sizes(x, ws, g))
    }

    /// The gradients of `biases`, each if it is wanted, from the sums over each image's pixels.
    pub fn bias_gradients(gpu: &Gpu, grads: &mut Grads<'_>, biases: &[Param], known: &PixelSums) -> Result<()> {
        let Shape { n, c, .. } = known.rounded.shape();
        let parts = Parts { buffer: known.sums.clone(), size: 4, from: 0, count: n, pitch: c };
        biases.iter().try_for_each(|bias| grads.sum_later(gpu, *bias, parts.clone()))
    }

    /// The gradients of `biases`, each if it is wanted, and `dshift` (n, 1, 1, c_out) if `shift_on` names its device. A
    /// block sums an image's pixels for up to 32 channels side by side.
    pub fn sums(
        gpu: &Gpu,
        grads: &mut Grads<'_>,
        biases: &[Param],
        dy: &Tensor,
        shift_on: Option<&Device>,
    ) -> Result<Option<Tensor>> {
        let Shape { n, h, w, c } = dy.shape();
        let mut dshift =
            shift_on.map(|device| Tensor::uninit(device, dy.dtype(), Shape::new(n, 1, 1, c))).transpose()?;
        let mut sums = gpu.alloc(8 * n * c)?; // (n, c), f64
        let lanes = lanes(c);
        let launch = gpu.launch(BWD_SHIFT.of(dy.dtype()), [n, c.div_ceil(lanes), 1], SUM_THREADS);
        let launch = launch.buffer_mut(&mut sums).write_opt(dshift.as_mut()).read(dy);
        launch.u32(h * w).u64(n * h * w).u32(c).u32(lanes).run()?;
        grads.sums_later(gpu, biases, sums, n, c)?;
        Ok(dshift)
    }
}
