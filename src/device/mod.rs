//! Where tensors live and operations run.
//!
//! Operations match on [`Device`] themselves; there is no backend trait. Buffers come from the device's pool and return
//! to it when their last handle is dropped, so that a training step, once warm, allocates nothing.

pub mod cpu;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::{Error, Result};

pub use cpu::Buffer;

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The best there is.
    #[default]
    Auto,
    /// The host's cores.
    Cpu,
    /// An NVIDIA GPU by its number.
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

/// What `--precision` asks for: the type of activations and gradients. Weights are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

/// A device and its buffer pool; cloning clones the handle.
#[derive(Clone)]
pub enum Device {
    /// The host's cores, through rayon's global pool.
    Cpu(Arc<cpu::Pool>),
}

impl Device {
    /// The device that the command line asks for.
    ///
    /// # Errors
    /// `Error::Failed` for a GPU or a precision this build cannot compute with.
    pub fn open(choice: Choice, precision: Precision) -> Result<Self> {
        if let Choice::Cuda(number) = choice {
            return Err(Error::Failed(format!(
                "cuda:{number} was asked for, but this version computes on the CPU only: use --device cpu or auto"
            )));
        }
        if precision == Precision::Bf16 {
            return Err(Error::Failed(
                "bf16 was asked for, but the CPU computes in f32 only: use --precision f32".into(),
            ));
        }
        Ok(Device::cpu())
    }

    /// The CPU with an empty pool.
    pub fn cpu() -> Self {
        Device::Cpu(cpu::Pool::new(false))
    }

    /// The CPU with a guarded pool: buffers are full of NaN when handed out and stand between guard words that are checked
    /// when they come back. Tests use it to see that an operation writes all of its output and nothing else.
    pub fn cpu_guarded() -> Self {
        Device::Cpu(cpu::Pool::new(true))
    }

    /// A buffer for `len` numbers, contents arbitrary.
    pub fn alloc(&self, len: usize) -> Buffer {
        match self {
            Device::Cpu(pool) => cpu::Pool::alloc(pool, len),
        }
    }

    /// What the pool has done so far.
    pub fn pool_stats(&self) -> PoolStats {
        match self {
            Device::Cpu(pool) => pool.stats(),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu(_) => write!(f, "CPU, {} threads", rayon::current_num_threads()),
        }
    }
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
