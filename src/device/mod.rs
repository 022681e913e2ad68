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
                _ if list(s).is_some() && matches!(s.parse(), Ok(Devices::Gpus(_))) => Err(format!(
                    "'{s}' names several GPUs, which only train, train-classifier, sample, quality and eval take: give one"
                )),
                _ => Err(format!("'{s}' is no device: use auto, cpu, cuda or cuda:N")),
            },
        }
    }
}

/// What `--device` lists, if it is a list of GPUs.
fn list(s: &str) -> Option<&str> {
    s.strip_prefix("cuda:").filter(|list| list.contains([',', '-']))
}

/// What `--device` asks for where several GPUs may compute together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// One device.
    One(Choice),
    /// The NVIDIA GPUs of these numbers, two or more, each once; the first is rank 0's in a training.
    Gpus(Vec<usize>),
}

/// The most GPUs of one machine.
const MOST_GPUS: usize = 256;

impl FromStr for Devices {
    type Err = String;

    fn from_str(s: &str) -> std::result::Result<Self, String> {
        let Some(list) = list(s) else {
            let one = s.parse::<Choice>().map_err(|_| format!("'{s}' is no device: {DEVICES}"))?;
            return Ok(Devices::One(one));
        };
        let mut gpus = Vec::new();
        for part in list.split(',') {
            let range = part.split_once('-').unwrap_or((part, part));
            let (Ok(first), Ok(last)) = (range.0.parse::<usize>(), range.1.parse::<usize>()) else {
                return Err(match part.is_empty() {
                    true => format!("'{s}' names no GPU at one place of its list: {DEVICES}"),
                    false => format!("'{part}' in '{s}' is neither a number nor a range of numbers: {DEVICES}"),
                });
            };
            if first > last {
                return Err(format!("'{part}' in '{s}' counts down: write {last}-{first}"));
            }
            if last - first >= MOST_GPUS || gpus.len() + (last - first) >= MOST_GPUS {
                return Err(format!("'{s}' names more than {MOST_GPUS} GPUs"));
            }
            if let Some(twice) = (first..=last).find(|gpu| gpus.contains(gpu)) {
                return Err(format!("'{s}' names GPU {twice} twice: name each once"));
            }
            gpus.extend(first..=last);
        }
        match gpus[..] {
            [one] => Ok(Devices::One(Choice::Cuda(one))),
            _ => Ok(Devices::Gpus(gpus)),
        }
    }
}

impl Devices {
    /// The device of one of the ranks of a machine, of which there are `ranks` if that is known, and which see so many
    /// GPUs. Without a list it is the GPU of the rank's number among them, or the only one that it sees: a scheduler
    /// may show each of them its own.
    ///
    /// # Errors
    /// A sentence if the list has another length, or names one GPU for several ranks.
    pub fn of_rank(
        &self,
        local_rank: usize,
        ranks: Option<usize>,
        visible: usize,
    ) -> std::result::Result<Choice, String> {
        match self {
            Devices::Gpus(gpus) if ranks.is_some_and(|ranks| ranks != gpus.len()) || local_rank >= gpus.len() => {
                let ranks = ranks.unwrap_or(local_rank + 1);
                Err(format!("--device names {} GPUs for {ranks} ranks of this machine: give one for each", gpus.len()))
            }
            Devices::Gpus(gpus) => Ok(Choice::Cuda(gpus[local_rank])),
            Devices::One(Choice::Cuda(gpu)) if *gpu > 0 && (local_rank > 0 || ranks.is_none_or(|ranks| ranks > 1)) => {
                Err(format!("--device cuda:{gpu} is one GPU for all ranks of this machine: give --device cuda"))
            }
            Devices::One(Choice::Cuda(gpu)) if *gpu > 0 => Ok(Choice::Cuda(*gpu)),
            Devices::One(Choice::Cpu) => Ok(Choice::Cpu),
            Devices::One(Choice::Auto) if visible == 0 => Ok(Choice::Auto),
            Devices::One(_) => Ok(Choice::Cuda(if visible == 1 { 0 } else { local_rank })),
        }
    }
}

/// What [`Devices`] are named by.
const DEVICES: &str = "use auto, cpu, cuda, cuda:N, or several GPUs as cuda:0-7 or cuda:0,2,3";

/// What `--precision` asks for: the type of activations and their gradients, and what is multiplied. The master weights
/// are always f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 32-bit floats in memory, of which convolutions and linear layers multiply roundings to 10 bits of fraction, on
    /// tensor cores, and add up the products in f32.
    Tf32,
    /// bfloat16.
    Bf16,
}

names!(Precision { F32 = "f32", Tf32 = "tf32", Bf16 = "bf16" });

impl Precision {
    /// Type of activations and their gradients.
    pub const fn activations(self) -> DType {
        match self {
            Precision::F32 | Precision::Tf32 => DType::F32,
            Precision::Bf16 => DType::Bf16,
        }
    }

    /// Its name, and what the name does not say.
    pub const fn described(self) -> &'static str {
        match self {
            Precision::Tf32 => "tf32 (f32 in memory, products of operands of 10 bits of fraction)",
            other => other.name(),
        }
    }

    /// What its name does not say, as a sentence for the user.
    pub const fn note(self) -> Option<&'static str> {
        match self {
            Precision::Tf32 => Some(
                "tf32: activations, gradients and weights are f32 in memory, but convolutions and linear layers multiply \
                 operands of 10 bits of fraction, each off by up to 2^-11 of it; sums and everything else are f32",
            ),
            Precision::F32 | Precision::Bf16 => None,
        }
    }
}

/// That in which nothing is rounded but to the type of the activations.
impl From<DType> for Precision {
    fn from(activations: DType) -> Self {
        match activations {
            DType::F32 => Precision::F32,
            DType::Bf16 => Precision::Bf16,
        }
    }
}

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
        let (gpu, note) = match choice {
            Choice::Cuda(number) => (Some(cuda::Gpu::open(number, precision, false)?), None),
            Choice::Cpu => (None, None),
            Choice::Auto => match cuda::open_any(precision) {
                Ok(gpu) => (gpu, None),
                Err(why) => (None, Some(why.to_string())),
            },
        };
        match gpu {
            Some(gpu) => {
                let notes = precision.note().map(String::from).into_iter().chain(gpu.notes().to_vec()).collect();
                Ok((Device::Cuda(gpu), notes))
            }
            None if precision != Precision::F32 => {
                let why = note.map_or(String::new(), |why| format!(" ({why})"));
                let what = format!("{precision} was asked for, but the CPU computes in f32 only");
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
        Device::Meta(meta::Meta::new(self.precision(), self.is_gpu(), unit))
    }

    /// A meta device that stands for a GPU with f32 activations, where there is none to ask.
    pub fn meta_gpu() -> Self {
        Device::meta_gpu_for(DType::F32)
    }

    /// The same for a precision, or for a type of activations.
    pub fn meta_gpu_for(precision: impl Into<Precision>) -> Self {
        Device::Meta(meta::Meta::new(precision.into(), true, cuda::UNIT))
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
        self.precision().activations()
    }

    /// What it was opened for.
    pub fn precision(&self) -> Precision {
        match self {
            Device::Cpu(_) => Precision::F32,
            Device::Cuda(gpu) => gpu.precision(),
            Device::Meta(meta) => meta.precision(),
        }
    }

    /// What computes, without which of several alike it is: devices of one kind compute the same bits, others may
    /// round differently.
    pub fn kind(&self) -> String {
        match self {
            Device::Cpu(_) => "CPU".into(),
            Device::Cuda(gpu) => gpu.kind(),
            Device::Meta(_) => "shapes alone".into(),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_gpus() {
        let gpus = |list: &str| match list.parse() {
            Ok(Devices::Gpus(gpus)) => gpus,
            other => panic!("{list}: {other:?}"),
        };
        assert_eq!(gpus("cuda:0-7"), (0..8).collect::<Vec<_>>());
        assert_eq!(gpus("cuda:0,2,3"), [0, 2, 3]);
        assert_eq!(gpus("cuda:4-5,0,2-3"), [4, 5, 0, 2, 3]);
        assert_eq!(gpus("cuda:1000000,0"), [1_000_000, 0]);
        assert_eq!(gpus("cuda:0-255").len(), MOST_GPUS);
        for (one, choice) in [
            ("auto", Choice::Auto),
            ("cpu", Choice::Cpu),
            ("cuda", Choice::Cuda(0)),
            ("cuda:3", Choice::Cuda(3)),
            ("cuda:3-3", Choice::Cuda(3)),
        ] {
            assert_eq!(one.parse(), Ok(Devices::One(choice)), "{one}");
        }
    }

    #[test]
    fn one_device_is_no_list() {
        let refused = |s: &str| s.parse::<Choice>().expect_err(s);
        for list in ["cuda:0-3", "cuda:0,2"] {
            let said = refused(list);
            assert!(
                said.contains(list)
                    && said.contains("which only train, train-classifier, sample, quality and eval take"),
                "{said}"
            );
        }
        for none in ["cuda:0,", "cuda:3-3", "cuda:x", "0-3", "a,b", "gpu"] {
            assert!(refused(none).contains("is no device: use auto, cpu, cuda or cuda:N"), "{none}");
        }
    }

    #[test]
    fn each_rank_of_a_machine_has_a_device_of_its_own() {
        let of = |devices: &str, local_rank, ranks, visible| {
            devices.parse::<Devices>().unwrap().of_rank(local_rank, ranks, visible)
        };
        for devices in ["cuda", "auto"] {
            assert_eq!(of(devices, 3, Some(8), 8), Ok(Choice::Cuda(3)), "{devices}");
            assert_eq!(of(devices, 3, Some(8), 1), Ok(Choice::Cuda(0)), "{devices}: a scheduler shows it its own");
            assert_eq!(of(devices, 0, Some(1), 8), Ok(Choice::Cuda(0)), "{devices}");
        }
        assert_eq!(of("auto", 3, Some(8), 0), Ok(Choice::Auto));
        assert_eq!(of("cpu", 3, Some(8), 8), Ok(Choice::Cpu));
        assert_eq!(of("cuda:4,2", 1, Some(2), 8), Ok(Choice::Cuda(2)));
        assert_eq!(of("cuda:4,2", 1, None, 8), Ok(Choice::Cuda(2)));
        assert_eq!(of("cuda:5", 0, Some(1), 8), Ok(Choice::Cuda(5)));
        for (devices, local_rank, ranks, says) in [
            ("cuda:4,2", 0, Some(8), "names 2 GPUs for 8 ranks"),
            ("cuda:4,2", 2, None, "names 2 GPUs for 3 ranks"),
            ("cuda:5", 0, Some(2), "cuda:5 is one GPU for all ranks"),
            ("cuda:5", 0, None, "cuda:5 is one GPU for all ranks"),
        ] {
            let said = of(devices, local_rank, ranks, 8).unwrap_err();
            assert!(said.contains(says), "{devices}: {said}");
        }
    }

    #[test]
    fn lists_that_are_none() {
        for (list, says) in [
            ("cuda:", "'cuda:' is no device: use auto"),
            ("gpu", "'gpu' is no device"),
            ("cpu,cuda", "'cpu,cuda' is no device"),
            ("cuda:7-0", "'7-0' in 'cuda:7-0' counts down: write 0-7"),
            ("cuda:0,0", "'cuda:0,0' names GPU 0 twice"),
            ("cuda:0-3,2", "names GPU 2 twice"),
            ("cuda:2,0-3", "names GPU 2 twice"),
            ("cuda:0,", "names no GPU at one place"),
            ("cuda:,", "names no GPU at one place"),
            ("cuda:-", "'-' in 'cuda:-' is neither a number nor a range"),
            ("cuda:0-", "'0-' in"),
            ("cuda:-1", "'-1' in"),
            ("cuda:0-1-2", "'0-1-2' in"),
            ("cuda:0, 1", "' 1' in"),
            ("cuda:0-256", "more than 256 GPUs"),
            ("cuda:0-18446744073709551615", "more than 256 GPUs"),
            ("cuda:0-99999999999999999999", "is neither a number"),
            ("cuda:0-99,100-199,200-299", "more than 256 GPUs"),
        ] {
            let said = list.parse::<Devices>().expect_err(list);
            assert!(said.contains(says), "{list}: {said}");
        }
    }
}
