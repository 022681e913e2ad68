//! The clock of training: everything that changes from one step to the next, in one struct.
//!
//! A step's launches differ from the last step's in four things: the step's number, from which random numbers are
//! drawn; the factors of its update (warm-up, bias correction, moving average); the row of the meter that it writes;
//! and where its images are. The first three stand in the clock, which on a GPU is a struct in device memory, written
//! at the start of a step and read by the kernels that need it. So a step launches the same kernels with the same
//! arguments as the last one but for the images', and can be captured in a CUDA graph.

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
    /// A clock on a device, not yet set.
    ///
    /// # Errors
    /// A GPU without memory.
    pub fn new(device: &Device) -> Result<Self> {
        let on_gpu = match device {
            Device::Cpu(_) | Device::Meta(_) => None,
            Device::Cuda(gpu) => Some(DeviceClock::new(gpu)?),
        };
        Ok(Clock { device: device.clone(), on_gpu })
    }

    /// Begins step `step` (from 0), which ends with the update of the factors `adam` and writes row `row` of the meter,
    /// and returns the device to compute it on. On a GPU the operations that draw, measure or update then read the
    /// clock; they assert that it says what their arguments say. The handle must be dropped before the next step
    /// begins. Does not wait.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn begin(&mut self, step: u32, adam: AdamFactors, row: u32) -> Result<Device> {
        match &mut self.on_gpu {
            None => Ok(self.device.clone()),
            Some(on_gpu) => on_gpu.set(clock::Clock { step, row, adam }).map(Device::Cuda),
        }
    }
}
