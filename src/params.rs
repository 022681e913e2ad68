//! The network's parameters: one flat buffer with a named range for each, and a second one for the gradients.
//!
//! With one buffer the optimiser, the moving average and the gradient norm are single passes over memory (on a GPU,
//! single kernels). Operations hold a [`Param`], a handle of a few bytes. The tape borrows [`Params`], so the weights
//! cannot change between a forward pass and its backward pass.

use std::borrow::Cow;
use std::ops::Range;

use crate::device::cuda::{View, ViewMut};
use crate::device::{Device, cuda};
use crate::error::Result;
use crate::rng::{Purpose, Stream};
use crate::tensor::{DType, Shape, Tensor};

/// Handle of one parameter in its [`Params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    index: usize,
}

/// A parameter's layout in other tools' files. In memory it is always [`Spec::shape`], channels last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Convolution weight: `(c_out, kh, kw, c_in)` here, OIHW in files.
    Conv,
    /// Linear weight or embedding table: `(rows, 1, 1, columns)` here, `[rows, columns]` in files.
    Matrix,
    /// Bias, gain or shift: `(1, 1, 1, c)` here, `[c]` in files.
    Vector,
}

/// How a parameter is initialised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// Uniform on `[-b, b]`, `b = sqrt(6 scale / (fan_in + fan_out))`: `variance_scaling(fan_avg, uniform)` of the
    /// paper's code, which uses scale 1, and 1e-10 for the last layer of each residual branch.
    FanAvg {
        /// Scale of the variance.
        scale: f64,
    },
    /// Standard normal (embedding tables).
    Normal,
    /// All zero.
    Zeros,
    /// All one.
    Ones,
}

/// Name, shape and initialisation of one parameter.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name in diffusers' `UNet2DModel`.
    pub name: String,
    /// Shape in memory.
    pub shape: Shape,
    /// Layout in files.
    pub layout: Layout,
    /// Initial distribution.
    pub init: Init,
    offset: usize,
}

/// The parameters of a network, before any memory is allocated for them.
#[derive(Clone, Debug, Default)]
pub struct Specs {
    specs: Vec<Spec>,
    end: usize,
    /// Elements of the flat buffer behind the end.
    padding: usize,
}

impl Specs {
    /// Adds a parameter. Each starts on a 64-byte boundary of the flat buffer; the gaps stay zero.
    pub fn add(&mut self, name: String, shape: Shape, layout: Layout, init: Init) -> Param {
        assert_eq!(self.padding, 0, "{name} behind the padding");
        let offset = self.end;
        self.end = (offset + shape.len()).next_multiple_of(16);
        self.specs.push(Spec { name, shape, layout, init, offset });
        Param { index: self.specs.len() - 1 }
    }

    /// Makes the length of the flat buffer a multiple of `multiple`, by a gap at its end. Nothing can be added then.
    pub(crate) fn pad(&mut self, multiple: usize) {
        self.padding = self.end.next_multiple_of(multiple) - self.end;
    }

    /// Length of the flat buffer without that gap.
    pub(crate) fn end(&self) -> usize {
        self.end
    }

    /// Number of trainable values, gaps not counted.
    pub fn count(&self) -> usize {
        self.specs.iter().map(|s| s.shape.len()).sum()
    }

    /// Length of the flat buffer in elements, gaps included.
    pub fn flat_len(&self) -> usize {
        self.end + self.padding
    }

    /// All parameters with their handles, in the order they were added.
    pub fn iter(&self) -> impl Iterator<Item = (Param, &Spec)> {
        self.specs.iter().enumerate().map(|(index, spec)| (Param { index }, spec))
    }

    /// The spec of one parameter.
    pub fn spec(&self, p: Param) -> &Spec {
        &self.specs[p.index]
    }

    /// From where the first of `params` begins in a flat buffer to where the last ends. Panics if there are none.
    pub(crate) fn span(&self, params: impl Iterator<Item = Param> + Clone) -> Range<usize> {
        let start = params.clone().map(|p| self.range(p).start).min();
        let end = params.map(|p| self.range(p).end).max();
        start.expect("a parameter")..end.expect("a parameter")
    }

    /// Its range of elements in a flat buffer.
    pub fn range(&self, p: Param) -> Range<usize> {
        let s = &self.specs[p.index];
        s.offset..s.offset + s.shape.len()
    }
}

/// Parameters with their values.
pub struct Params {
    specs: Specs,
    /// f32 on every device.
    flat: Tensor,
    /// Copy rounded to bf16, for a GPU with bf16 activations: what convolutions and linear layers multiply by.
    rounded: Option<Tensor>,
}

impl Params {
    /// All zero.
    ///
    /// # Errors
    /// Out of GPU memory; likewise for every function here that makes parameters.
    pub fn zeros(device: &Device, specs: Specs) -> Result<Self> {
        let shape = Shape::vector(specs.flat_len());
        let rounded = match device.activations() {
            DType::F32 => None,
            DType::Bf16 => Some(Tensor::zeros_as(device, DType::Bf16, shape)?),
        };
        Ok(Params { flat: Tensor::zeros(device, shape)?, specs, rounded })
    }

    /// Parameters with the values of `flat`, gaps included, which must be zero.
    ///
    /// # Errors
    /// See [`Params::zeros`].
    pub fn from_host(device: &Device, specs: Specs, flat: &[f32]) -> Result<Self> {
        let uninit = Tensor::uninit(device, DType::F32, Shape::vector(specs.flat_len()))?;
        let mut params = Params::of_flat(device, specs, uninit)?;
        params.write(flat)?;
        Ok(params)
    }

    /// Parameters with the values of `flat`, f32, in its memory, and a rounded copy with arbitrary contents.
    ///
    /// # Errors
    /// See [`Params::zeros`].
    pub(crate) fn of_flat(device: &Device, specs: Specs, flat: Tensor) -> Result<Self> {
        let shape = Shape::vector(specs.flat_len());
        assert_eq!((flat.shape(), flat.dtype()), (shape, DType::F32), "the values of {} parameters", specs.count());
        let rounded = match device.activations() {
            DType::F32 => None,
            DType::Bf16 => Some(Tensor::uninit(device, DType::Bf16, shape)?),
        };
        Ok(Params { flat, specs, rounded })
    }

    /// Every parameter drawn according to its [`Init`], each from its own stream of `seed`, so that adding a parameter
    /// at the end changes no other.
    ///
    /// # Errors
    /// See [`Params::zeros`].
    pub fn init(device: &Device, specs: Specs, seed: u64) -> Result<Self> {
        let mut flat = vec![0.0; specs.flat_len()];
        for (p, spec) in specs.iter() {
            let stream = Stream { seed, purpose: Purpose::Init, step: 0, stream: p.index as u32 };
            let out = &mut flat[specs.range(p)];
            let Shape { n, h, w, c } = spec.shape;
            match spec.init {
                Init::FanAvg { scale } => {
                    // fan_in = kh kw c_in, fan_out = kh kw c_out.
                    let bound = (6.0 * scale / (h * w * (c + n)) as f64).sqrt() as f32;
                    stream.uniforms(out);
                    out.iter_mut().for_each(|v| *v = bound * (2.0 * *v - 1.0));
                }
                Init::Normal => stream.normals(out),
                Init::Zeros => out.fill(0.0),
                Init::Ones => out.fill(1.0),
            }
        }
        Params::from_host(device, specs, &flat)
    }

    /// The same values on another device, through the host. Waits for a GPU.
    ///
    /// # Errors
    /// A GPU error, or no memory left.
    pub fn copy_to(&self, device: &Device) -> Result<Self> {
        Params::from_host(device, self.specs.clone(), &self.host()?)
    }

    /// The specs of all parameters.
    pub fn specs(&self) -> &Specs {
        &self.specs
    }

    /// Shape of one parameter.
    pub fn shape(&self, p: Param) -> Shape {
        self.specs.spec(p).shape
    }

    /// Values of one parameter, channels last. CPU only.
    pub fn get(&self, p: Param) -> &[f32] {
        &self.flat.data()[self.specs.range(p)]
    }

    /// Values of one parameter, mutable. CPU only.
    pub fn get_mut(&mut self, p: Param) -> &mut [f32] {
        let range = self.specs.range(p);
        &mut self.flat.data_mut()[range]
    }

    /// Values of one parameter on a GPU: the f32 master or the copy rounded to bf16.
    pub(crate) fn view(&self, p: Param, dtype: DType) -> View<'_> {
        self.view_range(self.specs.range(p), dtype)
    }

    /// The same for the elements `range` of all values.
    pub(crate) fn view_range(&self, range: Range<usize>, dtype: DType) -> View<'_> {
        self.of_type(dtype).view(range)
    }

    fn of_type(&self, dtype: DType) -> &Tensor {
        match dtype {
            DType::F32 => &self.flat,
            DType::Bf16 => self.rounded.as_ref().expect("a GPU with bf16 activations has weights rounded to bf16"),
        }
    }

    /// All values, gaps included. Waits for the GPU.
    ///
    /// # Errors
    /// A GPU error.
    pub fn host(&self) -> Result<Cow<'_, [f32]>> {
        self.flat.host()
    }

    /// All values as one tensor, f32, gaps included.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// All values rounded to bf16, gaps included; `None` if the activations are f32.
    pub fn rounded(&self) -> Option<&Tensor> {
        self.rounded.as_ref()
    }

    /// Overwrites all values, gaps included, which must be zero.
    ///
    /// # Errors
    /// A GPU error.
    pub fn write(&mut self, flat: &[f32]) -> Result<()> {
        self.flat.write(flat)?;
        self.rounded.as_mut().map_or(Ok(()), |rounded| rounded.write(flat))
    }

    /// All values, gaps included, and their rounded copy, for the optimiser; the gaps must stay zero.
    pub(crate) fn tensors_mut(&mut self) -> (&mut Tensor, Option<&mut Tensor>) {
        (&mut self.flat, self.rounded.as_mut())
    }
}

/// Gradients of the parameters: one flat buffer with the same ranges.
pub struct ParamGrads {
    flat: Tensor,
    written: Vec<bool>,
}

/// Where an operation writes a parameter's gradient.
pub struct ParamGrad<'a> {
    /// The gradient, shaped like the parameter.
    pub data: &'a mut [f32],
    /// True: add to the contents. False: the contents are stale, overwrite all of them.
    pub accumulate: bool,
}

/// The same on a GPU.
pub struct ParamView<'a> {
    /// The gradient, f32, shaped like the parameter.
    pub view: ViewMut<'a>,
    /// True: add to the contents. False: the contents are stale, overwrite all of them.
    pub accumulate: bool,
}

impl ParamGrads {
    /// Gradients with nothing accumulated yet.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device, specs: &Specs) -> Result<Self> {
        Ok(ParamGrads {
            flat: Tensor::zeros(device, Shape::vector(specs.flat_len()))?,
            written: vec![false; specs.specs.len()],
        })
    }

    /// Forgets all gradients: the next contribution to each overwrites.
    pub fn reset(&mut self) {
        self.written.fill(false);
    }

    /// The range of `p`; the caller must write or add to all of it.
    pub fn slot(&mut self, specs: &Specs, p: Param) -> ParamGrad<'_> {
        let accumulate = std::mem::replace(&mut self.written[p.index], true);
        ParamGrad { data: &mut self.flat.data_mut()[specs.range(p)], accumulate }
    }

    /// The same on a GPU.
    pub(crate) fn view(&mut self, specs: &Specs, p: Param) -> ParamView<'_> {
        let accumulate = std::mem::replace(&mut self.written[p.index], true);
        ParamView { view: self.flat.view_mut(specs.range(p)), accumulate }
    }

    /// Where the gradient of `p` is, in elements of [`buffer_mut`](Self::buffer_mut), and whether to add to it; the
    /// caller must write or add to all of it.
    pub(crate) fn place(&mut self, specs: &Specs, p: Param) -> (Range<usize>, bool) {
        (specs.range(p), std::mem::replace(&mut self.written[p.index], true))
    }

    /// The memory of all gradients on a GPU.
    pub(crate) fn buffer_mut(&mut self) -> &mut cuda::Buffer {
        self.flat.gpu_buffer_mut()
    }

    /// All gradients, as far as they have been written.
    pub(crate) fn flat_mut(&mut self) -> &mut Tensor {
        &mut self.flat
    }

    /// All gradients, after zeroing those that no operation has written since [`reset`](Self::reset).
    ///
    /// # Errors
    /// A GPU error.
    pub fn finish(&mut self, specs: &Specs) -> Result<&mut Tensor> {
        for (p, _) in specs.iter() {
            if !std::mem::replace(&mut self.written[p.index], true) {
                self.flat.zero(specs.range(p))?;
            }
        }
        Ok(&mut self.flat)
    }
}
