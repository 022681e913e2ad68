//! The gradient of a step: the sum of its micro-batches' gradients, whichever rank has computed which.
//!
//! Each micro-batch's gradient is written by itself, and they are added along the tree of [`tree_sum`], this rank's as
//! they come. Of several ranks each then gets its shard of every rank's sum, and adds these along the rest of the tree.
//! So the gradient has the same bits for every number of ranks that [`fits`](crate::ops::tree_sum::fits).

use crate::device::Device;
use crate::error::Result;
use crate::exchange::Exchange;
use crate::meter::Meter;
use crate::ops::add::add_assign;
use crate::ops::grad_norm::{self, grad_norm};
use crate::ops::tree_sum::{self, tree_sum};
use crate::params::{ParamGrads, Specs};
use crate::tensor::{Shape, Tensor};

/// The gradient of a step.
pub(super) struct Gradient {
    /// Nodes of the tree that wait for their right sibling, and what is being written.
    nodes: Vec<ParamGrads>,
    /// Micro-batches of this rank that are added up.
    done: usize,
    of_ranks: Option<OfRanks>,
}

/// What the sum over several ranks takes.
struct OfRanks {
    /// This rank's shard of every rank's sum, (ranks, 1, 1, shard).
    received: Tensor,
    /// Their sum, (1, 1, 1, shard).
    sum: Tensor,
    /// Sums of squares of the chunks of all shards ([`grad_norm::squares_shape`]).
    squares: Tensor,
}

impl Gradient {
    /// For `micro_batches` micro-batches of this rank. `specs` are padded to equal shards.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device, specs: &Specs, micro_batches: usize, ranks: usize) -> Result<Self> {
        let nodes = (0..tree_sum::most_waiting(micro_batches)).map(|_| ParamGrads::new(device, specs));
        let of_ranks = || {
            let shard = specs.flat_len() / ranks;
            let received = Tensor::zeros(device, Shape::new(ranks, 1, 1, shard))?;
            let sum = Tensor::zeros(device, Shape::vector(shard))?;
            let squares = Tensor::zeros(device, grad_norm::squares_shape(device, ranks, shard))?;
            Ok(OfRanks { received, sum, squares })
        };
        let of_ranks = (ranks > 1).then(of_ranks).transpose()?;
        Ok(Gradient { nodes: nodes.collect::<Result<_>>()?, done: 0, of_ranks })
    }

    /// Begins a step.
    pub fn begin(&mut self) {
        self.done = 0;
    }

    /// Where the gradient of the next micro-batch is written.
    pub fn next(&mut self) -> &mut ParamGrads {
        let next = &mut self.nodes[tree_sum::waiting(self.done)];
        next.reset();
        next
    }

    /// Adds what has been written there.
    ///
    /// # Errors
    /// A GPU error.
    pub fn add(&mut self, device: &Device, specs: &Specs) -> Result<()> {
        let node = tree_sum::waiting(self.done);
        self.nodes[node].finish(specs)?;
        for rise in 0..tree_sum::rises(self.done) {
            self.join(device, node - rise)?;
        }
        self.done += 1;
        Ok(())
    }

    /// Adds a node to the one before it.
    fn join(&mut self, device: &Device, node: usize) -> Result<()> {
        let (before, from) = self.nodes.split_at_mut(node);
        add_assign(device, before[node - 1].flat_mut(), from[0].flat_mut())
    }

    /// The sum over this rank's micro-batches.
    ///
    /// # Errors
    /// A GPU error.
    pub fn of_rank(&mut self, device: &Device) -> Result<&Tensor> {
        for node in (1..tree_sum::waiting(self.done)).rev() {
            self.join(device, node)?;
        }
        Ok(self.nodes[0].flat_mut())
    }

    /// The sum over all micro-batches of the step: this rank's shard, of `len` elements and padding, of a run of one
    /// rank all of it. Writes the norm of the whole, and the factor that clips it to `max_norm`, to the meter's row.
    ///
    /// # Errors
    /// A GPU error; another rank that has ended.
    pub fn sum(
        &mut self,
        device: &Device,
        exchange: &Exchange,
        len: usize,
        max_norm: f64,
        meter: &mut Meter,
    ) -> Result<&Tensor> {
        self.of_rank(device)?;
        let own = self.nodes[0].flat_mut();
        let Some(OfRanks { received, sum, squares }) = &mut self.of_ranks else {
            grad_norm(device, own, max_norm, meter)?;
            return Ok(own);
        };
        exchange.all_to_all(own, received)?;
        tree_sum(device, sum, received)?;
        grad_norm::squares(device, sum, len, squares, exchange.rank(), meter)?;
        exchange.all_gather(squares)?;
        grad_norm::join(device, squares, max_norm, meter)?;
        Ok(sum)
    }
}
