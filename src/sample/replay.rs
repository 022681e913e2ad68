//! The steps of a reverse process as CUDA graphs: one for each kind of step, replayed at every timestep.
//!
//! A step reads x and writes the next one. A graph reads and writes the same addresses each time, so its last nodes
//! copy what the step has made into the tensors that it began with: a few copies of the size of x, beside a whole
//! network.

use super::Reverse;
use crate::device::Device;
use crate::device::cuda::{DeviceTurn, Gpu, Repeated, eager_note};
use crate::diffusion::sampler::{Before, Guidance, Limit};
use crate::error::Result;
use crate::kernels::sample_step::Turn;
use crate::ops::sample_step::State;
use crate::tensor::{Shape, Tensor};

/// What the launches of a step are called in messages.
const A_STEP: &str = "a reverse step";

/// What determines the launches of a step, but for its turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kind {
    /// 2 if the network is asked with and without classes.
    pub halves: usize,
    /// The same for the next step: how often its input is written.
    pub copies: usize,
    /// What the step reads of the past.
    pub reads: Before,
    /// What the next one will.
    pub wants: Before,
    /// Whether the predicted x_0 is shown.
    pub x_0: bool,
    /// So many images draw the same noise.
    pub row: u32,
    /// How the halves are combined.
    pub guidance: Option<Guidance>,
    /// What x_0 is confined to.
    pub limit: Limit,
    /// Whether the network says the variance: the variance itself, or its logarithm.
    pub learned: Option<bool>,
}

/// What a step leaves for the next one.
pub struct Chain {
    /// x, f32.
    pub x: Tensor,
    /// The network's input for one half and for two; without one, x itself.
    inputs: [Option<Tensor>; 2],
    /// What the next step calls `before`.
    pub before: Option<Tensor>,
    /// The predicted x_0, if it is shown.
    pub x_0: Option<Tensor>,
}

/// The input, if it is not x itself.
fn own_input(state: State) -> (Tensor, Option<Tensor>) {
    let State { x, input } = state;
    let own = x.buffer_id() != input.buffer_id();
    (x, own.then_some(input))
}

impl Chain {
    /// Begins with a state that holds the network's input `copies` times.
    pub fn new(state: State, copies: usize) -> Self {
        let (x, input) = own_input(state);
        let mut inputs = [None, None];
        inputs[copies - 1] = input;
        Chain { x, inputs, before: None, x_0: None }
    }

    /// The network's input.
    pub fn input(&self, halves: usize) -> &Tensor {
        self.inputs[halves - 1].as_ref().unwrap_or(&self.x)
    }

    /// What a step has made takes the place of what was there.
    pub fn replace(&mut self, (after, x_0): (State, Option<Tensor>), kind: &Kind) {
        let before = match kind.wants {
            Before::Nothing => None,
            Before::X0 => x_0.clone(),
            Before::State => Some(self.x.clone()),
        };
        *self = Chain { before, x_0: x_0.filter(|_| kind.x_0), ..Chain::new(after, kind.copies) };
    }

    /// A corrected state takes the place of what was there.
    pub fn correct(&mut self, after: State, copies: usize) {
        let Chain { x, inputs, .. } = Chain::new(after, copies);
        (self.x, self.inputs) = (x, inputs);
    }

    /// Copies what a step has made over what was there.
    fn overwrite(&mut self, gpu: &Gpu, (after, x_0): (State, Option<Tensor>), kind: &Kind) -> Result<()> {
        let copy = |to: &mut Option<Tensor>, from: &Tensor| {
            let to = to.as_mut().expect("room was made for it");
            gpu.copy(to.gpu_buffer_mut(), 0, from.gpu_buffer())
        };
        let (x, input) = own_input(after);
        match kind.wants {
            Before::Nothing => {}
            Before::X0 => copy(&mut self.before, x_0.as_ref().expect("it was wanted"))?,
            Before::State => copy(&mut self.before, &self.x)?,
        }
        gpu.copy(self.x.gpu_buffer_mut(), 0, x.gpu_buffer())?;
        if let Some(input) = input {
            copy(&mut self.inputs[kind.copies - 1], &input)?;
        }
        match x_0.filter(|_| kind.x_0) {
            Some(x_0) => copy(&mut self.x_0, &x_0),
            None => Ok(()),
        }
    }

    /// Makes the tensors that [`overwrite`](Self::overwrite) writes. True if all were there, with no handle but ours:
    /// who has been shown x may have kept it, as it was.
    fn make_room(&mut self, device: &Device, kind: &Kind) -> Result<bool> {
        let mut same = true;
        let own = |tensor: &mut Tensor| -> Result<bool> {
            if tensor.is_unique() {
                return Ok(true);
            }
            *tensor = tensor.clone().into_unique(device)?;
            Ok(false)
        };
        same &= own(&mut self.x)?;
        let (x, [one, two]) = (&self.x, &mut self.inputs);
        let input = if kind.copies == 2 { two } else { one };
        let (dtype, shape) = (device.activations(), x.shape());
        let input_is_own = kind.copies == 2 || dtype != x.dtype();
        let wanted = [
            (input_is_own, input, dtype, kind.copies),
            (kind.wants != Before::Nothing, &mut self.before, x.dtype(), 1),
            (kind.x_0, &mut self.x_0, x.dtype(), 1),
        ];
        for (_, tensor, dtype, copies) in wanted.into_iter().filter(|(wanted, ..)| *wanted) {
            match tensor {
                Some(tensor) => same &= own(tensor)?,
                None => {
                    let n = copies * shape.n;
                    *tensor = Some(Tensor::uninit(device, dtype, Shape { n, ..shape })?);
                    same = false;
                }
            }
        }
        Ok(same)
    }
}

/// Hands what changes from step to step to the device.
pub struct Turns {
    device: Device,
    on_gpu: Option<DeviceTurn>,
}

impl Turns {
    /// For steps on `device`.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device) -> Result<Self> {
        let on_gpu = match device {
            Device::Cpu(_) | Device::Meta(_) => None,
            Device::Cuda(gpu) => Some(DeviceTurn::new(gpu)?),
        };
        Ok(Turns { device: device.clone(), on_gpu })
    }

    /// Begins a step. Returns the device to take it on: on a GPU, a handle through which the step reads its turn. Drop
    /// it before the next step.
    ///
    /// # Errors
    /// A GPU error.
    pub fn begin(&mut self, turn: Turn) -> Result<Device> {
        match &mut self.on_gpu {
            None => Ok(self.device.clone()),
            Some(on_gpu) => on_gpu.set(turn).map(Device::Cuda),
        }
    }
}

/// The graphs of a process.
pub struct Replays(Vec<(Kind, Repeated)>);

impl Replays {
    /// For a process whose steps can be replayed, otherwise `None`; `guided` by a classifier or not.
    pub fn new(reverse: &Reverse<'_>, guided: bool) -> Option<Self> {
        let Device::Cuda(gpu) = reverse.device else { return None };
        if !reverse.replays || !gpu.captures() {
            return None;
        }
        let corrected = reverse.sampler.correction(0).is_some();
        let why = match (guided, corrected) {
            (true, _) => "the gradient of a classifier goes through the host",
            (_, true) => "Langevin corrections are launched between steps",
            (false, false) => return Some(Replays(Vec::new())),
        };
        gpu.add_note(eager_note(A_STEP, why));
        None
    }

    /// Takes a step of this kind: launches what `take` makes of the chain, or replays it.
    ///
    /// # Errors
    /// Those of `take`; a GPU error.
    pub fn step(
        &mut self,
        gpu: &Gpu,
        chain: &mut Chain,
        kind: Kind,
        mut take: impl FnMut(&Chain) -> Result<(State, Option<Tensor>)>,
    ) -> Result<()> {
        if !chain.make_room(&Device::Cuda(gpu.clone()), &kind)? {
            self.0.iter_mut().for_each(|(_, repeated)| repeated.forget());
        }
        let at = self.0.iter().position(|(known, _)| *known == kind).unwrap_or_else(|| {
            self.0.push((kind, Repeated::new(A_STEP)));
            self.0.len() - 1
        });
        self.0[at].1.run(gpu, || {
            let after = take(chain)?;
            chain.overwrite(gpu, after, &kind)
        })
    }
}
