//! The clock of training: everything that changes from one step to the next, in one struct.
//!
//! Four things change from step to step: the step number, which seeds the random streams; the factors of the update
//! (warm-up, bias correction, moving average); the meter row the step writes; and the place of its images among those
//! that are loaded. On a GPU the clock is a struct of these in device memory, written at the start of a step and read
//! by the kernels that need it. So every step launches the same kernels with the same arguments, and is captured in a
//! CUDA graph that later steps replay.

use crate::device::Device;
use crate::device::cuda::DeviceClock;
use crate::error::Result;
use crate::kernels::clock::{self, AdamFactors};

/// The clock of one training run.
pub struct Clock {
    device: Device,
    on_gpu: Option<DeviceClock>,
}

impl Clock {
    /// A clock on `device`, not yet set.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(device: &Device) -> Result<Self> {
        let on_gpu = match device {
            Device::Cpu(_) | Device::Meta(_) => None,
            Device::Cuda(gpu) => Some(DeviceClock::new(gpu)?),
        };
        Ok(Clock { device: device.clone(), on_gpu })
    }

    /// Begins step `step` (from 0), whose images begin at place `place` of those loaded, which writes row `row` of the
    /// meter and ends with the update described by `adam`.
    /// Returns the device to run it on: on a GPU, a handle through which operations that draw, measure or update read
    /// the clock, after asserting that it agrees with their arguments. Drop the handle before the next step begins.
    /// Does not wait for the GPU.
    ///
    /// # Errors
    /// A GPU error.
    pub fn begin(&mut self, step: u32, place: u32, adam: AdamFactors, row: u32) -> Result<Device> {
        match &mut self.on_gpu {
            None => Ok(self.device.clone()),
            Some(on_gpu) => on_gpu.set(clock::Clock { step, row, place, adam }).map(Device::Cuda),
        }
    }
}
