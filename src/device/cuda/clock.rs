//! The device's side of a training step's clock: what changes from one step to the next stands in device memory, so
//! that the launches themselves are the same in every step.

use std::sync::Arc;

use bytemuck::Zeroable;

use super::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::clock::Clock;

/// A clock in the memory of a GPU.
pub struct DeviceClock {
    gpu: Gpu,
    reading: Arc<Reading>,
}

/// A clock and what it says.
pub(super) struct Reading {
    buffer: Buffer,
    now: Clock,
}

impl DeviceClock {
    /// A clock that has not been set.
    ///
    /// # Errors
    /// A GPU without memory.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        let reading = Reading { buffer: gpu.alloc(size_of::<Clock>())?, now: Clock::zeroed() };
        Ok(DeviceClock { gpu: gpu.clone(), reading: Arc::new(reading) })
    }

    /// Sets the clock, in the order of the stream, and returns the GPU through which a step is launched: its launches
    /// read the clock. Does not wait: a copy of so few bytes is queued with the bytes in it (CUDA programming guide,
    /// "Asynchronous Concurrent Execution": up to 64 KB). Panics if the last step's handle is still in use, which would
    /// read this step's clock.
    ///
    /// # Errors
    /// A GPU that fails.
    pub fn set(&mut self, now: Clock) -> Result<Gpu> {
        // So that a step that asks for what the last one asked for gets it at the same addresses.
        self.gpu.pool().sort();
        let reading = Arc::get_mut(&mut self.reading).expect("the last step on this clock is over");
        self.gpu.upload(&mut reading.buffer, &[now])?;
        reading.now = now;
        Ok(Gpu { clock: Some(self.reading.clone()), ..self.gpu.clone() })
    }
}

impl Gpu {
    /// The clock of this handle and what it says.
    pub(super) fn clock(&self) -> Option<(&Buffer, &Clock)> {
        self.clock.as_ref().map(|reading| (&reading.buffer, &reading.now))
    }

    /// What the clock of this handle says; `None` for a handle without one.
    pub fn now(&self) -> Option<&Clock> {
        self.clock().map(|(_, now)| now)
    }

    /// This GPU without a clock.
    pub(super) fn off_clock(&self) -> Gpu {
        Gpu { inner: self.inner.clone(), clock: None }
    }
}
