//! What the emulator counted of a launch, asked of the emulator itself: it exports a function for it, which no other
//! driver has.

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int};
use std::sync::PoisonError;

use serde::{Deserialize, Serialize};

use super::driver::sys;
use super::{Gpu, driver_error};
use crate::error::{Error, Result};

/// The function of `emulator/include/cuda_emu.h` that describes the calling thread's last launch.
const LAST_LAUNCH: &[u8] = b"emu_last_launch_json\0";

/// The function that changes how it runs the calling thread's launches.
const CONFIGURE: &[u8] = b"emu_configure\0";

/// A launch and what the emulator counted while it ran some blocks of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// The kernel's name.
    pub kernel: String,
    /// Blocks of its grid.
    pub blocks: u64,
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    /// Bytes of the arrays that it can only read, and of those that it can write, each counted once.
    pub arrays: [u64; 2],
    /// Of the blocks that ran.
    pub counters: Counters,
}

/// Counters of the emulator; its README says what they mean.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the emulator documents its counters")]
pub struct Counters {
    pub mma: u64,
    pub fma: u64,
    pub arithmetic: u64,
    pub special: u64,
    pub global: u64,
    pub shared: u64,
    pub local: u64,
    pub control: u64,
    pub flops_f16: u64,
    pub flops_bf16: u64,
    pub flops_tf32: u64,
    pub flops_f32: u64,
    pub flops_f64: u64,
    pub global_load_bytes: u64,
    pub global_store_bytes: u64,
    pub global_sectors: u64,
    pub distinct_bytes: u64,
    pub distinct_read_bytes: u64,
    pub distinct_written_bytes: u64,
    pub shared_wavefronts: u64,
    pub shared_ideal: u64,
    pub blocks: u64,
}

impl Counters {
    /// Warp instructions.
    pub fn instructions(&self) -> u64 {
        [self.mma, self.fma, self.arithmetic, self.special, self.global, self.shared, self.local, self.control]
            .into_iter()
            .sum()
    }
}

impl Gpu {
    /// Starts counting launches, each with what the emulator says of it.
    ///
    /// # Errors
    /// `Error::Failed` on any other driver.
    pub fn count_launches(&self) -> Result<()> {
        if !self.is_emulated() {
            return Err(Error::Failed(format!("{self} counts nothing: only the emulator does")));
        }
        self.inner.counted.get_or_init(Default::default);
        Ok(())
    }

    /// The launches counted since the last call, in order.
    pub fn counted_launches(&self) -> Vec<Counted> {
        let counted = self.inner.counted.get();
        counted.map_or(Vec::new(), |c| std::mem::take(&mut *c.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Milliseconds of the launches since the last call by kernel, and how many they were, for a GPU that was opened
    /// with [`Gpu::open_timed`]. Waits for it.
    ///
    /// # Errors
    /// A driver error.
    pub fn launch_times(&self) -> Result<BTreeMap<&'static str, (u64, f64)>> {
        self.inner.trace.take().map_err(|e| driver_error("reading the events", e))
    }
}

/// Tells the emulator that this thread's next launch has so many blocks of each kind; none: that all are alike.
pub(super) fn say_kinds(kinds: &[usize]) -> Result<()> {
    let text = kinds.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    type Tell = unsafe extern "C" fn(*const c_char, *const c_char) -> c_int;
    let text = CString::new(text).expect("digits and commas");
    // SAFETY: the driver is open, and the function has the type that `cuda_emu.h` declares.
    let tell = unsafe { sys::culib().get::<Tell>(CONFIGURE) };
    // SAFETY: both are terminated strings, which the function only reads.
    match tell.map(|tell| unsafe { tell(c"kinds".as_ptr(), text.as_ptr()) }) {
        Ok(0) => Ok(()),
        _ => Err(Error::Failed("the emulator does not sample blocks of several kinds: it is of another build".into())),
    }
}

/// What the emulator counted of this thread's last launch.
pub(super) fn of_last_launch() -> Result<Counters> {
    let failed = |what: &str| Error::Failed(format!("the emulator's counters cannot be read: {what}"));
    type Ask = unsafe extern "C" fn(*mut c_char, *mut usize) -> c_int;
    // SAFETY: the driver is open, and the function has the type that `cuda_emu.h` declares.
    let ask = unsafe { sys::culib().get::<Ask>(LAST_LAUNCH) }.map_err(|_| failed("it has no function for it"))?;
    let mut bytes = 0;
    // SAFETY: without room for a text the function only says how long it is.
    let asked = unsafe { ask(std::ptr::null_mut(), &mut bytes) };
    let mut text = vec![0u8; bytes];
    // SAFETY: the text has as many bytes as `bytes` says.
    if asked != 0 || unsafe { ask(text.as_mut_ptr().cast(), &mut bytes) } != 0 {
        return Err(failed("it refuses"));
    }
    text.truncate(bytes.saturating_sub(1));
    serde_json::from_slice(&text).map_err(|e| failed(&e.to_string()))
}
