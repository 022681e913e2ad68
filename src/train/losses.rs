//! The losses of the images of each step, for timesteps that are drawn by them ([`Importance`]).
//!
//! On the CPU they are known at once. On a GPU each micro-batch leaves sums of 16 bytes per 4,096 elements of an image,
//! which are copied to the host in stream order. At its start, step k waits for the copies of step k - 2 alone: by then
//! step k - 1 has been launched, so the GPU works on while the host draws and launches step k. It runs at most one step
//! ahead, though, not hundreds as without importance sampling.
//!
//! Of several ranks each knows the losses of its own images; they give them to each other when a step is complete.

use std::collections::VecDeque;

use crate::device::Device;
use crate::device::cuda::Readback;
use crate::diffusion::Importance;
use crate::error::Result;
use crate::exchange::Exchange;
use crate::ops::loss::{Loss, Table};

/// The losses so far.
pub struct Losses {
    importance: Importance,
    /// This rank's micro-batches of a step.
    micro_batches: usize,
    /// The losses of a step that is not complete, each with its timestep.
    step: Vec<(u32, f32)>,
    on_gpu: Option<OnGpu>,
}

struct OnGpu {
    readback: Readback,
    /// The timesteps of the micro-batches whose sums are on their way, and the elements of an image.
    timesteps: VecDeque<(Vec<u32>, usize)>,
}

impl Losses {
    /// None yet, of steps of so many micro-batches of this rank.
    pub fn new(device: &Device, importance: Importance, micro_batches: usize) -> Self {
        let on_gpu = match device {
            Device::Cuda(gpu) => Some(OnGpu { readback: gpu.readback(), timesteps: VecDeque::new() }),
            Device::Cpu(_) | Device::Meta(_) => None,
        };
        Losses { importance, micro_batches, step: Vec::new(), on_gpu }
    }

    /// What is known. On a GPU, [`finish`](Self::finish) makes that all.
    pub fn known(&self) -> &Importance {
        &self.importance
    }

    /// The same, to be filled from a checkpoint.
    pub fn known_mut(&mut self) -> &mut Importance {
        &mut self.importance
    }

    /// Begins a step: waits for all losses but those of the step before, and makes ready to draw by them.
    pub fn begin(&mut self, table: &Table, exchange: &Exchange) -> Result<()> {
        // What a step that failed half-way has left.
        self.step.clear();
        self.take(table, exchange, self.micro_batches)?;
        let under_way = self.on_gpu.as_ref().map_or(0, |on_gpu| on_gpu.timesteps.len());
        self.importance.begin(under_way / self.micro_batches);
        Ok(())
    }

    /// Adds the losses of a micro-batch at the timesteps `t`.
    pub fn add(&mut self, t: &[u32], loss: &Loss, exchange: &Exchange) -> Result<()> {
        match (&mut self.on_gpu, &loss.per_image, &loss.partial) {
            (Some(on_gpu), _, Some(partial)) => {
                on_gpu.readback.begin(partial)?;
                on_gpu.timesteps.push_back((t.to_vec(), loss.image));
            }
            (None, Some(per_image), _) => self.note(t, per_image, exchange)?,
            _ => panic!("the losses of a batch with weights are known"),
        }
        Ok(())
    }

    /// Waits for the losses of all steps.
    pub fn finish(&mut self, table: &Table, exchange: &Exchange) -> Result<()> {
        self.take(table, exchange, 0)
    }

    /// Takes the copies under way but for the last `left`.
    fn take(&mut self, table: &Table, exchange: &Exchange, left: usize) -> Result<()> {
        while let Some(on_gpu) = &mut self.on_gpu
            && on_gpu.timesteps.len() > left
        {
            let bytes = on_gpu.readback.take()?.expect("as many copies as timesteps");
            let (t, image) = on_gpu.timesteps.pop_front().expect("counted above");
            let partial: Vec<[f64; 2]> = bytemuck::pod_collect_to_vec(&bytes);
            let losses = table.losses(&t, image, &partial);
            self.note(&t, &losses, exchange)?;
        }
        Ok(())
    }

    fn note(&mut self, t: &[u32], losses: &[f64], exchange: &Exchange) -> Result<()> {
        self.step.extend(t.iter().zip(losses).map(|(&t, &loss)| (t, loss as f32)));
        if self.step.len() == self.importance.batch() / exchange.size() {
            let (t, losses): (Vec<u32>, Vec<f32>) = std::mem::take(&mut self.step).into_iter().unzip();
            let (t, losses) = (exchange.gather(&t)?.concat(), exchange.gather(&losses)?.concat());
            self.importance.record(t.into_iter().zip(losses).collect());
        }
        Ok(())
    }
}
