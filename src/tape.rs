//! Reverse-mode differentiation on a tape.
//!
//! Each operation appends one named struct with handles to what its backward pass needs. `Tape::backward` walks the
//! list from the end and consumes it, so an activation's buffer returns to the pool as soon as its gradient is done.
//! Gradients that reach a value are added in the order in which they come. Up to two wait to be added: whoever needs
//! the sum adds them, or an operation that computes a third takes them along and adds all where it stores its own
//! ([`Grads::waiting`]). Parameter gradients accumulate in [`ParamGrads`].
//!
//! A part of a network can be recorded as a whole ([`Tape::compute_part`]): of it the tape keeps the inputs alone, and
//! the backward pass computes it again, on a tape of its own ([`Grads::again`]). The bits are the same: the operations
//! are, and so is the order in which the gradients of one value are added.
//!
//! Deliberately absent: globals, closures that outlive a call, a central `match` over operations, higher derivatives.

use std::collections::HashSet;
use std::sync::Arc;

use crate::device::cuda::tile::{Job, Parts, PendingSums};
use crate::device::cuda::{Array, Gpu, View};
use crate::device::{Device, cuda};
use crate::error::Result;
use crate::kernels::Twin;
use crate::names::names;
use crate::params::{Param, ParamGrad, ParamGrads, ParamView, Params};
use crate::tensor::{DType, Shape, Tensor};

/// What a training step computes again in its backward pass instead of keeping it from the forward pass: less memory,
/// more work, the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// In residual blocks what costs little: norms, activations, dropout, concatenations.
    Cheap,
    /// Residual blocks but for their last convolution, whose output the backward pass does not need.
    Blocks,
}

names!(Recompute { None = "none", Cheap = "cheap", Blocks = "blocks" });

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

    /// Whether it can use the sums over the pixels of the gradient of its output ([`Grads::pixel_sums`]).
    fn wants_pixel_sums(&self) -> bool {
        false
    }

    /// Takes `dy`, the gradient of the operation's output, and adds its contribution to the gradients of the inputs.
    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()>;
}

/// What an operation of several outputs leaves on the tape.
pub trait BackwardOfAll: Send {
    /// The operation's stem.
    fn name(&self) -> &'static str;

    /// The tensors held for the backward pass.
    fn saved(&self) -> Vec<&Tensor>;

    /// [`Backward::wants_pixel_sums`], of an operation of one output.
    fn wants_pixel_sums(&self) -> bool {
        false
    }

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

    fn wants_pixel_sums(&self) -> bool {
        Backward::wants_pixel_sums(self)
    }

    fn run(self: Box<Self>, dys: Vec<Option<Tensor>>, grads: &mut Grads<'_>) -> Result<()> {
        let dy = dys.into_iter().flatten().next().expect("a gradient of the only output");
        Backward::run(self, dy, grads)
    }
}

/// Sums over the pixels of each image of a gradient, as whoever stored it found them on a GPU: (n, 1, 1, c).
pub struct PixelSums {
    /// In f32, (n, c).
    pub sums: Arc<cuda::Buffer>,
    /// Rounded to the gradient's type.
    pub rounded: Tensor,
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
    /// What the parts of a network are to keep.
    recompute: Recompute,
    /// Operations are those of a part that is recorded as a whole.
    in_part: bool,
    /// The weight of the convolution whose output nobody reads.
    unread: Option<Param>,
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
            recompute: Recompute::None,
            in_part: false,
            unread: None,
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

    /// The same tape, with parts that compute again what `recompute` says.
    pub fn recomputing(self, recompute: Recompute) -> Self {
        Tape { recompute, ..self }
    }

    /// What parts of a network are to compute again in the backward pass.
    pub fn recompute(&self) -> Recompute {
        self.recompute
    }

    /// Whether nobody reads the output of the convolution with this weight, so that it need not be computed: where a
    /// part that ends with it is computed again.
    pub fn is_unread(&self, weight: Param) -> bool {
        self.unread == Some(weight)
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
        if !self.recording || self.in_part {
            return Ok(ys.into_iter().map(Var::constant).collect());
        }
        let outputs: Vec<VarId> = ys.iter().map(|_| self.new_id()).collect();
        let values = ys.iter().map(identity).collect();
        let vars = ys.into_iter().zip(&outputs).map(|(value, id)| Var { value, id: Some(*id) }).collect();
        self.nodes.push(Node { outputs, values, place: self.place.clone(), op: Box::new(save()) });
        Ok(vars)
    }

    /// Computes a part of a network that the caller records as a whole: of its operations nothing is recorded. The
    /// backward pass of what is [`push`](Self::push)ed in their place must compute them again, as [`Grads::again`]
    /// does.
    ///
    /// # Errors
    /// Those of `part`.
    pub fn compute_part(&mut self, part: impl FnOnce(&mut Self) -> Result<Var>) -> Result<Tensor> {
        assert!(!self.in_part, "a part within a part");
        self.in_part = true;
        let y = part(self);
        self.in_part = false;
        Ok(y?.into_value())
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
        let mut grads = Grads::new(&self.device, self.params, param_grads, self.ids, accumulate);
        grads.walk(self.nodes, start, dy, None)?;
        grads.add_up()?;
        (0..self.ids).map(|id| grads.sum(VarId(id))).collect::<Result<_>>().map(LeafGrads)
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
    vars: Vec<Sum>,
    /// Of the gradient that the running operation was given.
    pixel_sums: Option<PixelSums>,
    accumulate: Accumulate,
    /// Gradients of parameters on a GPU that are partial sums so far.
    pending: PendingSums,
}

/// The gradient of a value.
#[derive(Default)]
struct Sum {
    /// What waits to be added, in its order.
    waiting: [Option<Tensor>; 2],
    /// If the first of these is all.
    pixel_sums: Option<PixelSums>,
    wants_pixel_sums: bool,
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
        let waits = self.pending.concerns(&self.params.specs().range(p));
        assert!(!waits, "the gradient of {} waits for its partial sums", self.params.specs().spec(p).name);
        Some(self.param_grads.as_mut()?.view(self.params.specs(), p))
    }

    /// Writes a product with a long sum over k to the gradient of `p` on a GPU, or adds it, if it is wanted; if k is
    /// split, by [`sum_later`](Self::sum_later). So does it with the sums over k of the first operand for `biases`, all
    /// of them the same; none unless the job can leave them.
    pub(crate) fn product(
        &mut self,
        gpu: &Gpu,
        p: Param,
        biases: &[Param],
        job: &Job,
        operands: &[Option<Array<'_>>],
        sizes: impl Twin,
    ) -> Result<()> {
        if !self.wants_params() {
            return Ok(());
        }
        let count = job.split().count;
        let mut sums = None;
        if !biases.is_empty() {
            sums = Some(gpu.alloc(8 * count * job.rows)?); // (segments, rows), f64
        }
        if count > 1 {
            let parts = job.run_split(gpu, operands, sizes, sums.as_mut())?;
            self.sum_later(gpu, p, parts)?;
        } else if let Some(ParamView { view, accumulate }) = self.param_view(p) {
            job.run(gpu, view, accumulate, operands, sizes, sums.as_mut())?;
        }
        match sums {
            Some(sums) => self.sums_later(gpu, biases, sums, count, job.rows),
            None => Ok(()),
        }
    }

    /// [`sum_later`](Self::sum_later) of `sums`, f64 (count, len), for each of `biases`.
    pub(crate) fn sums_later(
        &mut self,
        gpu: &Gpu,
        biases: &[Param],
        sums: cuda::Buffer,
        count: usize,
        len: usize,
    ) -> Result<()> {
        let parts = Parts { buffer: Arc::new(sums), size: 8, from: 0, count, pitch: len };
        biases.iter().try_for_each(|bias| self.sum_later(gpu, *bias, parts.clone()))
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
        if self.pending.concerns(&to) {
            self.pending.run(gpu, param_grads.buffer_mut())?;
        }
        self.pending.push(parts, to, accumulate);
        if self.pending.is_full() { self.pending.run(gpu, param_grads.buffer_mut()) } else { Ok(()) }
    }

    /// Adds up what waits for it.
    fn add_up(&mut self) -> Result<()> {
        match (self.device, self.param_grads.as_deref_mut()) {
            (Device::Cuda(gpu), Some(param_grads)) => self.pending.run(gpu, param_grads.buffer_mut()),
            _ => Ok(()),
        }
    }

    /// Where to write a parameter's gradient on the CPU, if it is wanted.
    pub fn param(&mut self, p: Param) -> Option<ParamGrad<'_>> {
        Some(self.param_grads.as_mut()?.slot(self.params.specs(), p))
    }

    fn new(
        device: &'a Device,
        params: &'a Params,
        param_grads: Option<&'a mut ParamGrads>,
        ids: usize,
        accumulate: Accumulate,
    ) -> Self {
        let vars = (0..ids).map(|_| Sum::default()).collect();
        Grads { device, params, param_grads, vars, pixel_sums: None, accumulate, pending: PendingSums::default() }
    }

    /// Takes the gradient `dy` of the value `start`, and the sums over its pixels if they are known, back through the
    /// operations `nodes`.
    fn walk(&mut self, nodes: Vec<Node>, start: VarId, dy: Tensor, sums: Option<PixelSums>) -> Result<()> {
        for node in &nodes {
            if let [output] = node.outputs[..] {
                self.vars[output.0].wants_pixel_sums = node.op.wants_pixel_sums();
            }
        }
        self.add_with_sums(start, dy, sums)?;
        for node in nodes.into_iter().rev() {
            let dys: Vec<Option<Tensor>> = node.outputs.iter().map(|id| self.sum(*id)).collect::<Result<_>>()?;
            if dys.iter().any(Option::is_some) {
                self.pixel_sums = self.vars[node.outputs[0].0].pixel_sums.take();
                if let Device::Cuda(gpu) = self.device {
                    gpu.memory_is_for(format_args!("the backward pass of {} at {}", node.op.name(), node.place));
                }
                node.op.run(dys, self)?;
            }
        }
        Ok(())
    }

    /// The backward pass of a part that was recorded as a whole: computes it again from its `inputs`, and takes `dy`,
    /// the gradient of its output, back to them. `part` gets values that stand for the inputs, in their order; the
    /// output of its convolution with the weight `last` is not computed. No input is there twice.
    ///
    /// # Errors
    /// Those of `part` and of its operations' backward passes.
    pub fn again<const N: usize>(
        &mut self,
        place: &str,
        inputs: [Option<&Var>; N],
        last: Param,
        dy: Tensor,
        part: impl FnOnce(&mut Tape<'_>, [Option<Var>; N]) -> Result<Var>,
    ) -> Result<()> {
        let mut tape = Tape { unread: Some(last), ..Tape::recording(self.device, self.params) };
        tape.at(place);
        let leaves = inputs.map(|input| {
            let Var { value, id } = input?;
            Some(if id.is_some() { tape.leaf(value.clone()) } else { Var::constant(value.clone()) })
        });
        let ids = std::array::from_fn::<_, N, _>(|i| leaves[i].as_ref()?.id.zip(inputs[i]?.id));
        let start = part(&mut tape, leaves)?.id.expect("a part that is recorded has an output that is");
        let param_grads = self.param_grads.as_deref_mut();
        let mut grads = Grads::new(self.device, self.params, param_grads, tape.ids, self.accumulate);
        grads.pending = std::mem::take(&mut self.pending);
        // What has reached an input so far moves in, so that the sum is taken in the order that it has without parts.
        for (leaf, input) in ids.into_iter().flatten() {
            grads.vars[leaf.0] = std::mem::take(&mut self.vars[input.0]);
        }
        grads.walk(tape.nodes, start, dy, self.pixel_sums.take())?;
        let Grads { mut vars, pending, .. } = grads;
        self.pending = pending;
        for (leaf, input) in ids.into_iter().flatten() {
            self.vars[input.0] = std::mem::take(&mut vars[leaf.0]);
        }
        Ok(())
    }

    /// Adds `dx` to the gradient of a value. A third contribution makes the first two one.
    ///
    /// # Errors
    /// A GPU error.
    pub fn add(&mut self, id: VarId, dx: Tensor) -> Result<()> {
        self.vars[id.0].waiting = match self.waiting(id) {
            [None, _] => [Some(dx), None],
            [first, None] => [first, Some(dx)],
            [Some(first), Some(second)] => [Some((self.accumulate)(self.device, first, second)?), Some(dx)],
        };
        Ok(())
    }

    /// The same with the sums over the pixels of `dx`, which count if nothing is added to it.
    ///
    /// # Errors
    /// A GPU error.
    pub fn add_with_sums(&mut self, id: VarId, dx: Tensor, sums: Option<PixelSums>) -> Result<()> {
        let is_all = self.vars[id.0].waiting[0].is_none();
        self.add(id, dx)?;
        self.vars[id.0].pixel_sums = sums.filter(|_| is_all);
        Ok(())
    }

    /// Whether the operation that made this value can use the sums over the pixels of its gradient.
    pub fn wants_pixel_sums(&self, id: VarId) -> bool {
        self.vars[id.0].wants_pixel_sums
    }

    /// Takes the sums over the pixels of the gradient that the running operation was given, if they are known.
    pub fn pixel_sums(&mut self) -> Option<PixelSums> {
        self.pixel_sums.take()
    }

    /// Takes the contributions to the gradient of a value that wait to be added, in their order, for an operation that
    /// adds them where it stores its own: what it stores is then the gradient so far, and goes to
    /// [`add`](Self::add). Of the first two terms of the sum `(first + second) + own` neither is rounded.
    pub fn waiting(&mut self, id: VarId) -> [Option<Tensor>; 2] {
        let var = &mut self.vars[id.0];
        var.pixel_sums = None;
        std::mem::take(&mut var.waiting)
    }

    /// Takes the gradient of a value, if one has reached it.
    fn sum(&mut self, id: VarId) -> Result<Option<Tensor>> {
        match std::mem::take(&mut self.vars[id.0].waiting) {
            [Some(first), Some(second)] => (self.accumulate)(self.device, first, second).map(Some),
            [one, _] => Ok(one),
        }
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
