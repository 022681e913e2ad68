//! What changes from one repetition of work to the next: a training step's clock and a reverse step's turn. They live
//! in device memory, so that the launches themselves are identical in every repetition.

use std::sync::Arc;

use super::{Buffer, Gpu};
use crate::error::Result;
use crate::kernels::Twin;
use crate::kernels::clock::Clock;
use crate::kernels::sample_step::Turn;

/// A struct in GPU memory that launches read in place of some arguments.
pub struct OnDevice<T> {
    gpu: Gpu,
    reading: Arc<Reading<T>>,
    /// A handle that is bound to it.
    bind: fn(Gpu, Arc<Reading<T>>) -> Gpu,
}

/// The clock of training steps.
pub type DeviceClock = OnDevice<Clock>;

/// The turn of the steps of a reverse process.
pub type DeviceTurn = OnDevice<Turn>;

/// A buffer and its contents.
pub(super) struct Reading<T> {
    buffer: Buffer,
    now: T,
}

impl DeviceClock {
    /// A clock, not yet set.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        OnDevice::unset(gpu, |gpu, clock| Gpu { clock: Some(clock), ..gpu })
    }
}

impl DeviceTurn {
    /// A turn, not yet set.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn new(gpu: &Gpu) -> Result<Self> {
        OnDevice::unset(gpu, |gpu, turn| Gpu { turn: Some(turn), ..gpu })
    }
}

impl<T: Twin> OnDevice<T> {
    fn unset(gpu: &Gpu, bind: fn(Gpu, Arc<Reading<T>>) -> Gpu) -> Result<Self> {
        let reading = Reading { buffer: gpu.alloc(size_of::<T>())?, now: T::zeroed() };
        Ok(OnDevice { gpu: gpu.clone(), reading: Arc::new(reading), bind })
    }

    /// Sets it, in stream order, and returns the handle through which to launch what reads it. Does not wait: the
    /// driver queues the contents of a host-to-device copy of up to 64 KB (CUDA programming guide, "Asynchronous
    /// Concurrent Execution"). Panics if the last handle is still alive, since its launches would read what is set
    /// here.
    ///
    /// # Errors
    /// A GPU error.
    pub fn set(&mut self, now: T) -> Result<Gpu> {
        // So that a step that makes the same requests as the last one gets the same addresses.
        self.gpu.pool().sort();
        let reading = Arc::get_mut(&mut self.reading).expect("the last step is over");
        self.gpu.upload(&mut reading.buffer, &[now])?;
        reading.now = now;
        Ok((self.bind)(self.gpu.clone(), self.reading.clone()))
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

    /// This handle's turn and its contents.
    pub(super) fn turn(&self) -> Option<(&Buffer, &Turn)> {
        self.turn.as_ref().map(|reading| (&reading.buffer, &reading.now))
    }

    /// The contents of this handle's turn; `None` if it has no turn.
    pub fn this_turn(&self) -> Option<&Turn> {
        self.turn().map(|(_, now)| now)
    }

    /// A handle of this GPU without clock and turn.
    pub(super) fn off_clock(&self) -> Gpu {
        Gpu { inner: self.inner.clone(), clock: None, turn: None }
    }
}
