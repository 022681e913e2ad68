//! Where tensors live and operations run.
//!
//! Operations match on [`Device`] themselves; there is no backend trait. Buffers come from the device's pool and return
//! to it when their last handle is dropped, so a warm training step asks the system for no memory.

pub mod cpu;
pub mod cuda;
pub mod meta;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::names::names;
use crate::shape::DType;

/// A tensor's memory, on its device.
pub enum Buffer {
    /// Host memory.
    Cpu(cpu::Buffer),
    /// Device memory.
    Cuda(cuda::Buffer),
    /// None.
    Meta(meta::Buffer),
}

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The first GPU that can run the kernels, otherwise the CPU.
    #[default]
    Auto,
    /// The host's cores.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "auto" => Ok(Choice::Auto),
            "cpu" => Ok(Choice::Cpu),
            "cuda" => Ok(Choice::Cuda(0)),
            _ => match s.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(number)) => Ok(Choice::Cuda(number)),
                _ => Err(format!("'{s}' is no device: use auto, cpu, cuda or cuda:N")),
            },
        }
    }
}

/// What `--precision` asks for: the type of activations and their gradients. The master weights are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

names!(Precision { F32 = "f32", Bf16 = "bf16" });

/// A device and its buffer pool; cloning clones the handle.
#[derive(Clone)]
pub enum Device {
    /// The host's cores, through rayon's global pool.
    Cpu(Arc<cpu::Pool>),
    /// An NVIDIA GPU.
    Cuda(cuda::Gpu),
    /// None: shapes alone.
    Meta(meta::Meta),
}

impl Device {
    /// Opens the device that the command line asks for. `auto` is the first GPU that can run this build's kernels,
    /// otherwise the CPU. The sentences are for the user: why an NVIDIA driver or GPU is passed over, or
    /// [`Gpu::notes`](cuda::Gpu::notes).
    ///
    /// # Errors
    /// `Error::Failed` for a GPU that was asked for by number and is not available, or a precision that is not,
    /// `Error::Usage` for a `DDPM_CUDA_SIMD` that is not a SIMD level.
    pub fn open(choice: Choice, precision: Precision) -> Result<(Self, Vec<String>)> {
        // For a GPU too: the host prepares its data.
        cpu::simd::limit().map_err(Error::Usage)?;
        let activations = match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        };
        let (gpu, note) = match choice {
            Choice::Cuda(number) => (Some(cuda::Gpu::open(number, activations, false)?), None),
            Choice::Cpu => (None, None),
            Choice::Auto => match cuda::open_any(activations) {
                Ok(gpu) => (gpu, None),
                Err(why) => (None, Some(why.to_string())),
            },
        };
        match gpu {
            Some(gpu) => {
                let notes = gpu.notes().to_vec();
                Ok((Device::Cuda(gpu), notes))
            }
            None if precision == Precision::Bf16 => {
                let why = note.map_or(String::new(), |why| format!(" ({why})"));
                let what = "bf16 was asked for, but the CPU computes in f32 only";
                Err(Error::Failed(format!("{what}{why}: use --precision f32")))
            }
            None => {
                let notes = note.iter().map(|why| format!("computing on the CPU: {why}")).collect();
                Ok((Device::cpu(), notes))
            }
        }
    }

    /// The CPU with an empty pool.
    pub fn cpu() -> Self {
        Device::Cpu(cpu::Pool::new(false))
    }

    /// The CPU with a guarded pool: buffers are filled with NaN when handed out and lie between guard words that are
    /// checked when they come back. Tests use it to show that an operation writes all of its output and nothing else.
    pub fn cpu_guarded() -> Self {
        Device::Cpu(cpu::Pool::new(true))
    }

    /// A meta device that counts memory as this device would use it.
    pub fn meta(&self) -> Self {
        let unit = if self.is_gpu() { cuda::UNIT } else { cpu::UNIT };
        Device::Meta(meta::Meta::new(self.activations(), self.is_gpu(), unit))
    }

    /// A meta device that stands for a GPU with f32 activations, where there is none to ask.
    pub fn meta_gpu() -> Self {
        Device::meta_gpu_for(DType::F32)
    }

    /// The same with activations of type `activations`.
    pub fn meta_gpu_for(activations: DType) -> Self {
        Device::Meta(meta::Meta::new(activations, true, cuda::UNIT))
    }

    /// True for a GPU and for a meta device that stands for one.
    pub fn is_gpu(&self) -> bool {
        match self {
            Device::Cpu(_) => false,
            Device::Cuda(_) => true,
            Device::Meta(meta) => meta.is_gpu(),
        }
    }

    /// Type of activations and their gradients.
    pub fn activations(&self) -> DType {
        match self {
            Device::Cpu(_) => DType::F32,
            Device::Cuda(gpu) => gpu.activations(),
            Device::Meta(meta) => meta.activations(),
        }
    }

    /// The same as a setting.
    pub fn precision(&self) -> Precision {
        match self.activations() {
            DType::Bf16 => Precision::Bf16,
            _ => Precision::F32,
        }
    }

    /// A buffer for `len` elements, contents arbitrary.
    ///
    /// # Errors
    /// Out of GPU memory.
    pub fn alloc(&self, dtype: DType, len: usize) -> Result<Buffer> {
        match self {
            Device::Cpu(pool) => {
                assert_eq!(dtype, DType::F32, "the CPU computes in f32");
                Ok(Buffer::Cpu(cpu::Pool::alloc(pool, len)))
            }
            Device::Cuda(gpu) => Ok(Buffer::Cuda(gpu.alloc(len * dtype.size())?)),
            Device::Meta(meta) => Ok(Buffer::Meta(meta.alloc(len * dtype.size()))),
        }
    }

    /// Scratch space of `len` floats for an operation's CPU path. CPU only.
    pub(crate) fn scratch(&self, len: usize) -> cpu::Buffer {
        match self {
            Device::Cpu(pool) => cpu::Pool::alloc(pool, len),
            other => panic!("{other} has no scratch space of the CPU"),
        }
    }

    /// The pool's counters.
    pub fn pool_stats(&self) -> PoolStats {
        match self {
            Device::Cpu(pool) => pool.stats(),
            Device::Cuda(gpu) => gpu.pool_stats(),
            Device::Meta(meta) => meta.pool_stats(),
        }
    }

    /// The sentences for the user that have come up since the last call: why work is not done as fast as it might be.
    pub fn take_notes(&self) -> Vec<String> {
        match self {
            Device::Cpu(_) | Device::Meta(_) => Vec::new(),
            Device::Cuda(gpu) => gpu.take_notes(),
        }
    }

    /// Waits until the device has finished all its work.
    ///
    /// # Errors
    /// A GPU error, including one from a kernel launched earlier.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Cpu(_) | Device::Meta(_) => Ok(()),
            Device::Cuda(gpu) => gpu.synchronize(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(_) => write!(f, "CPU, {} threads", rayon::current_num_threads()),
            Device::Cuda(gpu) => gpu.fmt(f),
            Device::Meta(_) => f.write_str("shapes alone"),
        }
    }
}

/// Bytes a pool uses for a buffer of `bytes`: rounded up to a multiple of `unit` of the form `(8..16) 2^k` units, or to
/// the next unit from 64 MiB on, where sizes are rarely shared and rounding would waste much.
fn size_class(bytes: usize, unit: usize) -> usize {
    let units = bytes.div_ceil(unit);
    if bytes >= 64 << 20 {
        return units * unit;
    }
    let step = 1usize << units.max(8).ilog2().saturating_sub(3);
    units.next_multiple_of(step) * unit
}

/// Counters of a buffer pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Allocations served from a returned buffer.
    pub hits: u64,
    /// Allocations that had to ask the system for memory.
    pub misses: u64,
    /// Bytes in buffers handed out and not yet returned.
    pub in_use: u64,
    /// The largest `in_use` so far.
    pub peak: u64,
    /// Bytes asked of the system so far, all of them still held.
    pub held: u64,
}
