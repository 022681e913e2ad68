//! The gradient of a step: the sum of its micro-batches' gradients, whichever rank has computed which.
//!
//! Each micro-batch's gradient is written by itself, and they are added along the tree of [`tree_sum`], this rank's as
//! they come. Of several ranks each then gets its part of the others' sums, and adds these along the rest of the tree:
//! those of its machine, then those of the machines. So the gradient has the same bits for every number of ranks that
//! [`fits`](crate::ops::tree_sum::fits).

use crate::device::Device;
use crate::error::Result;
use crate::exchange::{Exchange, Sums};
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
    /// Of each level of the exchange; none if NCCL adds up.
    levels: Vec<OfLevel>,
    /// This rank's shard of what NCCL has added up.
    reduced: Option<Tensor>,
    /// Sums of squares of the chunks of all shards ([`grad_norm::squares_shape`]).
    squares: Tensor,
}

/// What the sum over the ranks of a level takes.
struct OfLevel {
    ranks: Vec<usize>,
    /// This rank's part of every rank's sum, (ranks, 1, 1, part).
    received: Tensor,
    /// Their sum, (1, 1, 1, part); after the last level this rank's shard.
    sum: Tensor,
}

impl OfRanks {
    fn new(device: &Device, len: usize, exchange: &Exchange) -> Result<Self> {
        let mut part = len;
        let level = |ranks: Vec<usize>| {
            part /= ranks.len();
            let received = Tensor::zeros(device, Shape::new(ranks.len(), 1, 1, part))?;
            Ok(OfLevel { received, sum: Tensor::zeros(device, Shape::vector(part))?, ranks })
        };
        let shard = len / exchange.size();
        let squares = Tensor::zeros(device, grad_norm::squares_shape(device, exchange.size(), shard))?;
        let (levels, reduced) = match exchange.sums() {
            Sums::Tree => (exchange.levels().into_iter().map(level).collect::<Result<_>>()?, None),
            Sums::Nccl => (Vec::new(), Some(Tensor::zeros(device, Shape::vector(shard))?)),
        };
        Ok(OfRanks { levels, reduced, squares })
    }
}

impl Gradient {
    /// For `micro_batches` micro-batches of this rank. `specs` are padded to equal shards.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device, specs: &Specs, micro_batches: usize, exchange: &Exchange) -> Result<Self> {
        let nodes = (0..tree_sum::most_waiting(micro_batches)).map(|_| ParamGrads::new(device, specs));
        let of_ranks = (exchange.size() > 1).then(|| OfRanks::new(device, specs.flat_len(), exchange)).transpose()?;
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
        let Some(OfRanks { levels, reduced, squares }) = &mut self.of_ranks else {
            grad_norm(device, own, max_norm, meter)?;
            return Ok(own);
        };
        if let Some(shard) = reduced {
            exchange.all_reduce(own, shard)?;
        }
        let mut sum: &Tensor = reduced.as_ref().unwrap_or(own);
        for level in levels {
            exchange.all_to_all(sum, &mut level.received, &level.ranks)?;
            tree_sum(device, &mut level.sum, &level.received)?;
            sum = &level.sum;
        }
        grad_norm::squares(device, sum, len, squares, exchange.shard(), meter)?;
        exchange.all_gather(squares)?;
        grad_norm::join(device, squares, max_norm, meter)?;
        Ok(sum)
    }
}
