//! Reverse-mode differentiation on a tape.
//!
//! Each operation appends one named struct with handles to what its backward pass needs. `Tape::backward` walks the
//! list from the end and consumes it, so an activation's buffer returns to the pool as soon as its gradient is done.
//! The first gradient to reach a value moves in; later ones are added. Parameter gradients accumulate in
//! [`ParamGrads`], so splitting a batch into micro-batches costs no extra buffers.
//!
//! Deliberately absent: globals, closures, a central `match` over operations, higher derivatives, recomputation.

use std::collections::HashSet;

use crate::device::Device;
use crate::device::cuda::tile::{Job, Parts, Waiting};
use crate::device::cuda::{Array, Gpu, View};
use crate::error::Result;
use crate::kernels::Twin;
use crate::params::{Param, ParamGrad, ParamGrads, ParamView, Params};
use crate::tensor::{DType, Shape, Tensor};

/// Identifies a value on the tape whose gradient is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VarId(usize);

/// A tensor in a computation, with an id if its gradient is wanted.
#[derive(Clone, Debug)]
pub struct Var {
    value: Tensor,
    id: Option<VarId>,
}

impl Var {
    /// A value that takes no gradient.
    pub fn constant(value: Tensor) -> Self {
        Var { value, id: None }
    }

    /// The tensor.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The tensor, without its place on the tape.
    pub fn into_value(self) -> Tensor {
        self.value
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.value.shape()
    }

    /// Its elements. CPU only.
    pub fn data(&self) -> &[f32] {
        self.value.data()
    }

    /// Its id on the tape, if its gradient is wanted.
    pub fn id(&self) -> Option<VarId> {
        self.id
    }
}

/// What an operation leaves on the tape.
pub trait Backward: Send {
    /// The operation's stem.
    fn name(&self) -> &'static str;

    /// The tensors held for the backward pass.
    fn saved(&self) -> Vec<&Tensor>;

    /// Takes `dy`, the gradient of the operation's output, and adds its contribution to the gradients of the inputs.
    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()>;
}

/// What an operation of several outputs leaves on the tape.
pub trait BackwardOfAll: Send {
    /// The operation's stem.
    fn name(&self) -> &'static str;

    /// The tensors held for the backward pass.
    fn saved(&self) -> Vec<&Tensor>;

    /// Takes the gradients of the outputs, `None` for one that nothing depends on, and adds their contribution to the
    /// gradients of the inputs. It is called if there is one.
    fn run(self: Box<Self>, dys: Vec<Option<Tensor>>, grads: &mut Grads<'_>) -> Result<()>;
}

impl<B: Backward> BackwardOfAll for B {
    fn name(&self) -> &'static str {
        Backward::name(self)
    }

    fn saved(&self) -> Vec<&Tensor> {
        Backward::saved(self)
    }

    fn run(self: Box<Self>, dys: Vec<Option<Tensor>>, grads: &mut Grads<'_>) -> Result<()> {
        let dy = dys.into_iter().flatten().next().expect("a gradient of the only output");
        Backward::run(self, dy, grads)
    }
}

struct Node {
    outputs: Vec<VarId>,
    /// Their values, by which they are found among what operations hold.
    values: Vec<Identity>,
    place: String,
    op: Box<dyn BackwardOfAll>,
}

/// A tensor that may no longer be there: another can have its buffer's number then, but hardly its shape too.
type Identity = (usize, Shape, DType);

fn identity(tensor: &Tensor) -> Identity {
    (tensor.buffer_id(), tensor.shape(), tensor.dtype())
}

/// One entry of [`Tape::saved`].
#[derive(Clone, Debug)]
pub struct Saved {
    /// Where in the network the operation is, as last set by [`Tape::at`].
    pub place: String,
    /// The operation's stem.
    pub name: &'static str,
    /// Bytes of the tensors it holds that no earlier operation holds.
    pub bytes: usize,
}

/// A tensor that is kept from the forward pass for the backward pass, an entry of [`Tape::plan`].
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Where in the network the first operation is that holds it.
    pub place: String,
    /// That operation's stem.
    pub op: &'static str,
    /// Its shape.
    pub shape: Shape,
    /// Type of its elements.
    pub dtype: DType,
    /// Its size in bytes.
    pub bytes: usize,
    /// The backward pass computes a gradient of it: an operation on the tape made it.
    pub gradient: bool,
}

/// Records operations (training) or only carries device and parameters along (sampling).
pub struct Tape<'p> {
    device: Device,
    params: &'p Params,
    recording: bool,
    /// Check every output and fail at the first non-finite one, naming it.
    check_finite: bool,
    nodes: Vec<Node>,
    ids: usize,
    place: String,
}

impl<'p> Tape<'p> {
    /// A tape that records.
    pub fn recording(device: &Device, params: &'p Params) -> Self {
        Tape {
            device: device.clone(),
            params,
            recording: true,
            check_finite: false,
            nodes: Vec::new(),
            ids: 0,
            place: String::new(),
        }
    }

    /// A tape that does not record: nothing is saved and there are no gradients.
    pub fn inference(device: &Device, params: &'p Params) -> Self {
        Tape { recording: false, ..Tape::recording(device, params) }
    }

    /// A tape on which an operation fails if its output holds a NaN or an infinity: for rerunning a batch whose loss
    /// was not finite. It records, so that it computes exactly what a recording tape does.
    pub fn inspecting(device: &Device, params: &'p Params) -> Self {
        Tape { check_finite: true, ..Tape::recording(device, params) }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The parameters.
    pub fn params(&self) -> &'p Params {
        self.params
    }

    /// True for a tape that records.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Sets where in the network the following operations are, for messages and listings.
    pub fn at(&mut self, place: &str) {
        self.place.clear();
        self.place.push_str(place);
        if let Device::Cuda(gpu) = &self.device {
            gpu.memory_is_for(format_args!("the forward pass of {place}"));
        }
    }

    /// A leaf whose gradient `Tape::backward` returns.
    pub fn leaf(&mut self, value: Tensor) -> Var {
        let id = self.recording.then(|| self.new_id());
        Var { value, id }
    }

    /// The last call of every differentiable operation: records `y`, and what `save` returns for the backward pass.
    /// `save` is called only if the tape records. On an [`inspecting`](Self::inspecting) tape it fails if `y` is not
    /// finite.
    pub fn push<B: Backward + 'static>(
        &mut self,
        name: &'static str,
        y: Tensor,
        save: impl FnOnce() -> B,
    ) -> Result<Var> {
        let mut vars = self.push_all(name, vec![y], save)?;
        Ok(vars.pop().expect("one output"))
    }

    /// [`push`](Self::push) of an operation of several outputs.
    pub fn push_all<B: BackwardOfAll + 'static>(
        &mut self,
        name: &'static str,
        ys: Vec<Tensor>,
        save: impl FnOnce() -> B,
    ) -> Result<Vec<Var>> {
        if self.check_finite {
            ys.iter().try_for_each(|y| self.refuse_non_finite(name, y))?;
        }
        if !self.recording {
            return Ok(ys.into_iter().map(Var::constant).collect());
        }
        let outputs: Vec<VarId> = ys.iter().map(|_| self.new_id()).collect();
        let values = ys.iter().map(identity).collect();
        let vars = ys.into_iter().zip(&outputs).map(|(value, id)| Var { value, id: Some(*id) }).collect();
        self.nodes.push(Node { outputs, values, place: self.place.clone(), op: Box::new(save()) });
        Ok(vars)
    }

    /// Every tensor that the recorded operations hold, once, in the order of the forward pass.
    pub fn plan(&self) -> Vec<Kept> {
        let made: HashSet<Identity> = self.nodes.iter().flat_map(|node| &node.values).copied().collect();
        let mut held = HashSet::new();
        let of_node = |node: &Node| {
            let new = node.op.saved().into_iter().filter(|tensor| held.insert(tensor.buffer_id()));
            let kept = |tensor: &Tensor| Kept {
                place: node.place.clone(),
                op: node.op.name(),
                shape: tensor.shape(),
                dtype: tensor.dtype(),
                bytes: tensor.bytes(),
                gradient: made.contains(&identity(tensor)),
            };
            new.map(kept).collect::<Vec<Kept>>()
        };
        self.nodes.iter().flat_map(of_node).collect()
    }

    /// What each recorded operation holds, in the order of the forward pass.
    pub fn saved(&self) -> Vec<Saved> {
        let mut held = HashSet::new();
        let mut line = |n: &Node| Saved {
            place: n.place.clone(),
            name: n.op.name(),
            bytes: n.op.saved().into_iter().filter(|t| held.insert(t.buffer_id())).map(Tensor::bytes).sum(),
        };
        self.nodes.iter().map(&mut line).collect()
    }

    /// The backward pass, given the function that adds two gradients of one value. `ops` wraps it as `Tape::backward`,
    /// since this module knows no operation.
    pub(crate) fn backward_by(
        self,
        y: &Var,
        dy: Tensor,
        param_grads: Option<&mut ParamGrads>,
        accumulate: Accumulate,
    ) -> Result<LeafGrads> {
        assert_eq!(y.shape(), dy.shape(), "gradient of shape {} for a value of shape {}", dy.shape(), y.shape());
        let start = y.id.expect("backward starts from a value that this tape has recorded");
        let vars = vec![None; self.ids];
        let sums = Waiting::default();
        let mut grads = Grads { device: &self.device, params: self.params, param_grads, vars, accumulate, sums };
        grads.vars[start.0] = Some(dy);
        for node in self.nodes.into_iter().rev() {
            let dys: Vec<Option<Tensor>> = node.outputs.iter().map(|id| grads.vars[id.0].take()).collect();
            if dys.iter().any(Option::is_some) {
                if let Device::Cuda(gpu) = &self.device {
                    gpu.memory_is_for(format_args!("the backward pass of {} at {}", node.op.name(), node.place));
                }
                node.op.run(dys, &mut grads)?;
            }
        }
        grads.add_up()?;
        Ok(LeafGrads(grads.vars))
    }

    fn new_id(&mut self) -> VarId {
        self.ids += 1;
        VarId(self.ids - 1)
    }

    fn refuse_non_finite(&self, name: &str, y: &Tensor) -> Result<()> {
        let values = y.host()?;
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(i) => Err(crate::error::Error::Failed(format!(
                "the first tensor with a value that is not finite is the output of {name} at {} (shape {}, element {i} is {})",
                if self.place.is_empty() { "the network's start" } else { &self.place },
                y.shape(),
                values[i],
            ))),
        }
    }
}

/// Gradients during a backward pass.
pub struct Grads<'a> {
    device: &'a Device,
    params: &'a Params,
    param_grads: Option<&'a mut ParamGrads>,
    vars: Vec<Option<Tensor>>,
    accumulate: Accumulate,
    /// Gradients of parameters on a GPU that are partial sums so far.
    sums: Waiting,
}

/// `sum + term`.
pub(crate) type Accumulate = fn(&Device, sum: Tensor, term: Tensor) -> Result<Tensor>;

impl<'a> Grads<'a> {
    /// The device.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// Values of a parameter. CPU only.
    pub fn weight(&self, p: Param) -> &'a [f32] {
        self.params.get(p)
    }

    /// Shape of a parameter.
    pub fn weight_shape(&self, p: Param) -> Shape {
        self.params.shape(p)
    }

    /// Values of a parameter on a GPU: the f32 master or the copy rounded to bf16.
    pub(crate) fn weight_view(&self, p: Param, dtype: DType) -> View<'a> {
        self.params.view(p, dtype)
    }

    /// Whether gradients of parameters are wanted; otherwise an operation leaves out the work for them.
    pub fn wants_params(&self) -> bool {
        self.param_grads.is_some()
    }

    /// Where to write a parameter's gradient on a GPU, if it is wanted.
    pub(crate) fn param_view(&mut self, p: Param) -> Option<ParamView<'_>> {
        let waits = self.sums.concerns(&self.params.specs().range(p));
        assert!(!waits, "the gradient of {} waits for its partial sums", self.params.specs().spec(p).name);
        Some(self.param_grads.as_mut()?.view(self.params.specs(), p))
    }

    /// Writes a product with a long sum over k to the gradient of `p` on a GPU, or adds it, if it is wanted; if k is
    /// split, by [`sum_later`](Self::sum_later).
    pub(crate) fn product(
        &mut self,
        gpu: &Gpu,
        p: Param,
        job: &Job,
        operands: &[Option<Array<'_>>],
        sizes: impl Twin,
    ) -> Result<()> {
        if self.wants_params() && job.split().count > 1 {
            let parts = job.run_split(gpu, operands, sizes)?;
            return self.sum_later(gpu, p, parts);
        }
        match self.param_view(p) {
            Some(ParamView { view, accumulate }) => job.run(gpu, view, accumulate, operands, sizes),
            None => Ok(()),
        }
    }

    /// Where to write the gradients of several parameters on a GPU, if they are wanted; see [`ParamGrads::view_span`].
    pub(crate) fn param_span(&mut self, params: impl Iterator<Item = Param> + Clone) -> Option<ParamView<'_>> {
        let specs = self.params.specs();
        let waits = params.clone().any(|p| self.sums.concerns(&specs.range(p)));
        assert!(!waits, "gradients of one group, of which some wait for their partial sums");
        Some(self.param_grads.as_mut()?.view_span(specs, params))
    }

    /// The parameters, on a GPU.
    pub(crate) fn params(&self) -> &'a Params {
        self.params
    }

    /// Writes the sum of `parts` to the gradient of `p` on a GPU, or adds it, if it is wanted: at the end of the
    /// backward pass at the latest.
    pub(crate) fn sum_later(&mut self, gpu: &Gpu, p: Param, parts: Parts) -> Result<()> {
        let Some(param_grads) = self.param_grads.as_deref_mut() else { return Ok(()) };
        let (to, accumulate) = param_grads.place(self.params.specs(), p);
        if self.sums.concerns(&to) {
            self.sums.run(gpu, param_grads.buffer_mut())?;
        }
        self.sums.push(parts, to, accumulate);
        if self.sums.is_full() { self.sums.run(gpu, param_grads.buffer_mut()) } else { Ok(()) }
    }

    /// Adds up what waits for it.
    fn add_up(&mut self) -> Result<()> {
        match (self.device, self.param_grads.as_deref_mut()) {
            (Device::Cuda(gpu), Some(param_grads)) => self.sums.run(gpu, param_grads.buffer_mut()),
            _ => Ok(()),
        }
    }

    /// Where to write a parameter's gradient on the CPU, if it is wanted.
    pub fn param(&mut self, p: Param) -> Option<ParamGrad<'_>> {
        Some(self.param_grads.as_mut()?.slot(self.params.specs(), p))
    }

    /// Adds `dx` to the gradient of a value: the first contribution moves in, later ones are added.
    ///
    /// # Errors
    /// A GPU error.
    pub fn add(&mut self, id: VarId, dx: Tensor) -> Result<()> {
        let slot = &mut self.vars[id.0];
        *slot = Some(match slot.take() {
            None => dx,
            Some(sum) => (self.accumulate)(self.device, sum, dx)?,
        });
        Ok(())
    }
}

/// Gradients of leaves after a backward pass.
pub struct LeafGrads(Vec<Option<Tensor>>);

impl LeafGrads {
    /// Takes the gradient of a leaf; `None` if nothing reached it.
    pub fn take(&mut self, leaf: &Var) -> Option<Tensor> {
        self.0[leaf.id?.0].take()
    }
}
