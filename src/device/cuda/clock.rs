//! The device side of a training step's clock. What changes from step to step lives in device memory, so that the
//! launches themselves are identical in every step.

use std::sync::Arc;

use bytemuck::Zeroable;

use super::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::clock::Clock;

/// A clock in GPU memory.
pub struct DeviceClock {
    gpu: Gpu,
    reading: Arc<Reading>,
}

/// A clock's buffer and its contents.
pub(super) struct Reading {
    buffer: Buffer,
    now: Clock,
}

impl DeviceClock {
    /// A clock, not yet set.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let reading = Reading { buffer: gpu.alloc(size_of::<Clock>())?, now: Clock::zeroed() };
        Ok(DeviceClock { gpu: gpu.clone(), reading: Arc::new(reading) })
    }

    /// Sets the clock, in stream order, and returns the handle through which to launch the step: its launches read the
    /// clock. Does not wait: the driver queues the contents of a host-to-device copy of up to 64 KB (CUDA programming
    /// guide, "Asynchronous Concurrent Execution"). Panics if the last step's handle is still alive, since its launches
    /// would read this step's clock.
    ///
    /// # Errors
    /// A GPU error.
    pub fn set(&mut self, now: Clock) -> Result<Gpu> {
        // So that a step that makes the same requests as the last one gets the same addresses.
        self.gpu.pool().sort();
        let reading = Arc::get_mut(&mut self.reading).expect("the last step on this clock is over");
        self.gpu.upload(&mut reading.buffer, &[now])?;
        reading.now = now;
        Ok(Gpu { clock: Some(self.reading.clone()), ..self.gpu.clone() })
    }
}

impl Gpu {
    /// This handle's clock and its contents.
    pub(super) fn clock(&self) -> Option<(&Buffer, &Clock)> {
        self.clock.as_ref().map(|reading| (&reading.buffer, &reading.now))
    }

    /// The contents of this handle's clock; `None` if it has no clock.
    pub fn now(&self) -> Option<&Clock> {
        self.clock().map(|(_, now)| now)
    }

    /// A handle of this GPU without a clock.
    pub(super) fn off_clock(&self) -> Gpu {
        Gpu { inner: self.inner.clone(), clock: None }
    }
}
