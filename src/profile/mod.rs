//! What a step asks of a GPU, kernel by kernel, and how long it would take: the numbers of `ddpm-cuda profile`.
//!
//! The launches are those of the host code itself, at the batch in question, on the emulator ([`count`]). It runs some
//! blocks of each grid (`CUDA_EMU_BLOCKS`), spread over it, and counts what they do. [`Launch`] scales the counts to
//! the whole grid; [`model`] makes a time of them for each of [`CARDS`]; [`bound`] says what traffic could not be
//! avoided; [`exchange`] says what several GPUs add. On a GPU [`measure`] takes times by events. `docs/profiling.md`
//! has the formulas and what they leave out.

pub mod bound;
pub mod card;
pub mod exchange;
pub mod model;

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};

use crate::config::{Config, Size};
use crate::data::{Data, Dataset, Extent};
use crate::device::Device;
use crate::device::cuda::{Counted, Description, Gpu};
use crate::diffusion::{Method, Sampler, Spacing, Timesteps};
use crate::error::{Error, Result};
use crate::kernels;
use crate::names::names;
use crate::params::Params;
use crate::sample::{Drawing, Request, default_variance, labels};
use crate::tensor::Shape;
use crate::train::Trainer;
use crate::unet::UNet;
use crate::usage;
use bound::Least;
use card::{CARDS, Card, Fit};
use exchange::Exchanged;
use model::{Unit, Work};

/// What is profiled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum What {
    /// A training step.
    #[default]
    Train,
    /// A step of the reverse process, as `sample` takes it if it is told nothing.
    Sample,
}

names!(What { Train = "train", Sample = "sample" });

/// Blocks of a launch that are run, at most. They meet every kind of block of these kernels: at a corner, an edge and
/// inside of an image, and in a last segment.
pub const BLOCKS: usize = 16;

/// Images of a step, at most.
pub const MOST_IMAGES: usize = 1024;

/// Steps before those that are measured: the first asks for memory and loads kernels, the second is captured.
const WARM: usize = 2;

/// Steps of which the times are means.
const TIMED: usize = 10;

/// Refuses what cannot be profiled.
///
/// # Errors
/// `Error::Usage`.
pub fn check(config: &Config, what: What, devices: Option<usize>) -> Result<()> {
    let m = &config.model;
    if let Some(devices) = devices {
        exchange::check(devices)?;
    }
    if m.image_size == Size::DATA || m.channels == 0 {
        usage!(
            "--preset {}: its network is made for the data, so give --model of a run, or mnist, cifar10 or celebahq256",
            config.preset
        );
    }
    if what == What::Sample && devices.is_some() {
        usage!("--devices with --what sample: a step of sampling exchanges nothing, use --what train");
    }
    if what == What::Sample && m.classifier {
        usage!("--what sample: a classifier draws no images, use --what train");
    }
    Ok(())
}

/// Every launch of one step of `config`, the second, on the emulator.
///
/// # Errors
/// `Error::Failed` on any other driver; a driver error.
pub fn count(gpu: &Gpu, config: &Config, what: What) -> Result<Vec<Counted>> {
    gpu.count_launches()?;
    let mut counted = Vec::new();
    steps(&Device::Cuda(gpu.clone()), config, what, 2, |_| {
        counted = gpu.counted_launches();
        Ok(())
    })?;
    Ok(counted)
}

/// Graphs that one step of `config` is launched as, once it has been captured; 0 if it is launched kernel by kernel. A
/// `gpu` that counts or is guarded captures nothing.
///
/// # Errors
/// A driver error.
pub fn graphs(gpu: &Gpu, config: &Config, what: What) -> Result<u64> {
    let (mut before, mut of_last) = (gpu.graph_launches(), 0);
    steps(&Device::Cuda(gpu.clone()), config, what, WARM + 1, |_| {
        let launched = gpu.graph_launches();
        of_last = launched - std::mem::replace(&mut before, launched);
        Ok(())
    })?;
    Ok(of_last)
}

/// Times of a step on a GPU.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The GPU's name.
    pub gpu: String,
    /// Its compute capability, (major, minor).
    pub capability: (u32, u32),
    /// Milliseconds of a step, from its first launch to its end.
    pub step: f64,
    /// Milliseconds of each kernel, all its launches in a step together.
    pub kernels: BTreeMap<String, f64>,
}

/// Measures a step on `gpu`: the whole, and then each launch by two events.
///
/// # Errors
/// A GPU that cannot be used, or that fails.
pub fn measure(gpu: Description, config: &Config, what: What) -> Result<Measured> {
    let Description { number, name, capability, .. } = gpu;
    let gpu = Gpu::open(number, config.precision, false)?;
    let device = Device::Cuda(gpu.clone());
    let (mut start, mut step) = (Instant::now(), 0.0);
    steps(&device, config, what, WARM + TIMED, |done| {
        if done == WARM {
            gpu.synchronize()?;
            start = Instant::now();
        } else if done == WARM + TIMED {
            gpu.synchronize()?;
            step = 1e3 * start.elapsed().as_secs_f64() / TIMED as f64;
        }
        Ok(())
    })?;
    let gpu = Gpu::open_timed(number, config.precision)?;
    let mut kernels = BTreeMap::new();
    steps(&Device::Cuda(gpu.clone()), config, what, WARM + TIMED, |done| {
        if done == WARM {
            gpu.launch_times()?;
        } else if done == WARM + TIMED {
            for (kernel, (_, ms)) in gpu.launch_times()? {
                kernels.insert(kernel.to_string(), ms / TIMED as f64);
            }
        }
        Ok(())
    })?;
    Ok(Measured { gpu: name, capability, step, kernels })
}

/// Takes `count` steps and calls `each` after every one, with their number so far.
fn steps(
    device: &Device,
    config: &Config,
    what: What,
    count: usize,
    mut each: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    match what {
        What::Train => {
            let mut trainer = Trainer::new(config, data(config), device)?;
            (1..=count).try_for_each(|done| {
                trainer.step()?;
                each(done)
            })
        }
        What::Sample => {
            let (unet, specs) = UNet::new(&config.model)?;
            let params = Params::init(device, specs, config.seed)?;
            let schedule = config.diffusion.noise_schedule()?;
            // The last step adds no noise and is not like the others.
            let kept = Timesteps::Spaced(Spacing::Even).kept(&schedule, false, 0, count + 1)?;
            let variance = default_variance(config.diffusion.variance, count + 1, schedule.len());
            let prediction = config.diffusion.prediction;
            let sampler = Sampler::over(&schedule, prediction, Method::Ancestral(variance), &kept)?;
            let labels = labels(config.model.classes, None, config.batch)?;
            let drawing = Drawing { device, unet: &unet, params: &params, sampler: &sampler, seed: config.seed };
            let request = Request { count: config.batch, labels: labels.as_deref(), ..Request::default() };
            let mut failed = Ok(());
            let drawn = drawing.draw(&request, None, |progress| {
                if progress.done <= count {
                    failed = each(progress.done);
                }
                // Nobody wants the images.
                if progress.done < count && failed.is_ok() { Ok(()) } else { Err(Error::Interrupted) }
            });
            match drawn {
                Ok(_) | Err(Error::Interrupted) => failed,
                Err(why) => Err(why),
            }
        }
    }
}

/// Images for a step: no kernel's work depends on what they show.
fn data(config: &Config) -> Data {
    let m = &config.model;
    let extent = Extent { size: m.image_size, channels: m.channels };
    let images = (0..config.batch * extent.len()).map(|i| (i * 97 % 251) as u8).collect();
    let classes = (m.classes > 0).then(|| (0..config.batch).map(|i| (i % m.classes) as u32).collect());
    let train = Dataset::new(extent, images, classes);
    let none = Dataset::new(extent, Vec::new(), (m.classes > 0).then(Vec::new));
    Data { train, held_out: none, classes: Vec::new(), notes: Vec::new(), skipped: Vec::new() }
}

/// A launch, its counts scaled from the blocks that ran to all.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Its kernel.
    pub kernel: &'static kernels::Kernel,
    /// Blocks that ran.
    pub ran: u64,
    /// Bytes that lanes asked for.
    pub asked: f64,
    /// Cycles of shared memory without bank conflicts.
    pub shared_ideal: f64,
    /// FLOP outside the tensor cores.
    pub flops_outside: f64,
    /// What the model needs.
    pub work: Work,
    /// What it has on each of [`CARDS`].
    pub fits: [Option<Fit>; CARDS.len()],
}

impl Launch {
    /// From what was counted.
    ///
    /// # Errors
    /// `Error::Failed` for a kernel that this build does not have, and a launch of which nothing ran.
    pub fn new(counted: &Counted) -> Result<Self> {
        let kernel = kernels::called(&counted.kernel)
            .ok_or_else(|| Error::Failed(format!("{} is no kernel of this build", counted.kernel)))?;
        let c = &counted.counters;
        if c.blocks == 0 {
            return Err(Error::Failed(format!("no block of {} ran", counted.kernel)));
        }
        let scale = counted.blocks as f64 / c.blocks as f64;
        let all = |count: u64| count as f64 * scale;
        let work = Work {
            blocks: counted.blocks as f64,
            tensor_flops: all(c.flops_f16 + c.flops_bf16),
            tf32_flops: all(c.flops_tf32),
            fma: all(c.fma),
            double_flops: all(c.flops_f64),
            special: all(c.special),
            instructions: all(c.instructions()),
            shared_cycles: all(c.shared_wavefronts),
            moved: all(32 * c.global_sectors),
            touched: touched(counted, scale),
        };
        Ok(Launch {
            kernel,
            ran: c.blocks,
            asked: all(c.global_load_bytes + c.global_store_bytes),
            shared_ideal: all(c.shared_ideal),
            flops_outside: all(c.flops_f32 + c.flops_f64),
            work,
            fits: CARDS.map(|card| card.fit(kernel, counted.threads, counted.shared)),
        })
    }

    /// FLOP in all.
    fn flops(&self) -> f64 {
        self.work.tensor_flops + self.work.tf32_flops + self.flops_outside
    }
}

/// Bytes that a launch moves between memory and chip if its blocks share what they read in common through the L2 cache:
/// what they write, what they write over after reading it, and of what they only read as much as all blocks read or,
/// if that is less, the arrays hold.
fn touched(counted: &Counted, scale: f64) -> f64 {
    let (c, [read_only, writable]) = (&counted.counters, counted.arrays.map(|bytes| bytes as f64));
    // Blocks of several kinds are weighted and each count is rounded, so that the union may be larger by one.
    let both = (c.distinct_read_bytes + c.distinct_written_bytes).saturating_sub(c.distinct_bytes);
    let scaled = |bytes: u64, most: f64| (bytes as f64 * scale).min(most);
    scaled(c.distinct_read_bytes - both, read_only)
        + scaled(both, writable)
        + scaled(c.distinct_written_bytes, writable)
}

/// A number for each of [`CARDS`]; in JSON by their keys.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ByCard(pub [f64; CARDS.len()]);

impl Serialize for ByCard {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(CARDS.len()))?;
        for (card, number) in CARDS.iter().zip(self.0) {
            map.serialize_entry(card.key, &number)?;
        }
        map.end()
    }
}

/// All launches of a kernel in a step.
#[derive(Clone, Debug, Serialize)]
pub struct KernelProfile {
    /// Its name.
    pub name: String,
    /// Launches.
    pub launches: u64,
    /// FLOP.
    pub flops: u64,
    /// The share of its multiply-adds on tensor cores; 0 if it has none.
    pub tensor_core_share: f64,
    /// Bytes that lanes asked for.
    pub bytes_asked: u64,
    /// Bytes between the multiprocessors and the L2 cache, in sectors of 32.
    pub bytes_moved: u64,
    /// Bytes between the L2 cache and the memory, if each launch finds nothing of the last one in the cache.
    pub bytes_touched: u64,
    /// Cycles of the banks of shared memory.
    pub shared_cycles: u64,
    /// As many as they would be without bank conflicts.
    pub shared_ideal: u64,
    /// Warp instructions (of PTX): slots of issue.
    pub instructions: u64,
    /// Registers of a thread, on the reference card.
    pub registers: u32,
    /// Bytes of shared memory of a block, static and dynamic; the most of its launches.
    pub shared_bytes: u64,
    /// Warps that a multiprocessor holds, of the most that it could; the least of its launches.
    pub occupancy: f64,
    /// Waves of blocks, the mean of its launches.
    pub waves: f64,
    /// What most of its modelled time is bound by.
    pub bound_by: String,
    /// Modelled milliseconds.
    pub modelled_ms: ByCard,
    /// Measured milliseconds.
    pub measured_ms: Option<f64>,
}

/// A step.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// The GPU that was measured.
    pub gpu: Option<String>,
    /// Its network, in words.
    pub network: String,
    /// train or sample.
    pub what: &'static str,
    /// Images.
    pub batch: u64,
    /// f32, tf32 or bf16.
    pub precision: &'static str,
    /// Launches of kernels.
    pub launches: u64,
    /// Graphs that launch them; 0: they are launched one by one.
    pub graphs: u64,
    /// FLOP.
    pub flops: u64,
    /// The share of its multiply-adds on tensor cores.
    pub tensor_core_share: f64,
    /// The sum of the kernels' `bytes_asked`.
    pub bytes_asked: u64,
    /// Traffic of the memory: the sum of the kernels' `bytes_touched`.
    pub bytes_moved: u64,
    /// The least possible for what the tape keeps.
    pub bytes_least: u64,
    /// The same by what it is of.
    pub least: Least,
    /// The key of the card that registers, occupancy, waves and `bound_by` are of.
    pub reference: &'static str,
    /// Blocks that ran.
    pub blocks_counted: u64,
    /// Blocks of all launches.
    pub blocks: u64,
    /// Modelled milliseconds.
    pub modelled_ms: ByCard,
    /// Measured milliseconds.
    pub measured_ms: Option<f64>,
    /// What it would exchange as one of several GPUs' steps, if that was asked for.
    pub exchange: Option<Exchanged>,
    /// By kernel, the longest first.
    pub kernels: Vec<KernelProfile>,
}

/// Sums over the launches of a kernel or a step.
#[derive(Clone, Default)]
struct Sum {
    launches: u64,
    flops: f64,
    tensor_flops: f64,
    asked: f64,
    shared_ideal: f64,
    work: Work,
    seconds: [f64; CARDS.len()],
    /// By what binds, on the reference card.
    bound: BTreeMap<Unit, f64>,
    registers: u32,
    shared: usize,
    occupancy: f64,
    waves: f64,
}

impl Sum {
    fn add(&mut self, launch: &Launch, reference: usize) {
        let Launch { work, fits, .. } = launch;
        self.launches += 1;
        self.flops += launch.flops();
        self.tensor_flops += work.tensor_flops + work.tf32_flops;
        self.asked += launch.asked;
        self.shared_ideal += launch.shared_ideal;
        self.work.fma += work.fma;
        self.work.instructions += work.instructions;
        self.work.shared_cycles += work.shared_cycles;
        self.work.moved += work.moved;
        self.work.touched += work.touched;
        for (place, card) in CARDS.iter().enumerate() {
            let (seconds, unit) = model::time(card, work);
            self.seconds[place] += seconds;
            if place == reference {
                *self.bound.entry(unit).or_default() += seconds;
            }
        }
        if let Some(Fit { registers, shared, resident, occupancy }) = fits[reference] {
            self.registers = self.registers.max(registers);
            self.shared = self.shared.max(shared);
            self.occupancy = if self.launches == 1 { occupancy } else { self.occupancy.min(occupancy) };
            self.waves += work.blocks / (resident.max(1) * CARDS[reference].multiprocessors) as f64;
        }
    }

    /// A multiply-add outside the tensor cores is 64 FLOP of a warp instruction.
    fn tensor_core_share(&self) -> f64 {
        let all = self.tensor_flops + 64.0 * self.work.fma;
        if all > 0.0 { self.tensor_flops / all } else { 0.0 }
    }

    fn modelled_ms(&self) -> ByCard {
        ByCard(self.seconds.map(|seconds| 1e3 * seconds))
    }
}

/// The card that the figures of one card are of: that of the GPU at hand, or the first.
pub fn reference(capability: Option<(u32, u32)>) -> &'static Card {
    CARDS.iter().find(|card| Some(card.capability) == capability).unwrap_or(&CARDS[0])
}

/// What a profile is of.
pub struct Of<'a> {
    /// The network, in words.
    pub network: String,
    /// Settings, with the batch.
    pub config: &'a Config,
    /// Training or sampling.
    pub what: What,
    /// Graphs that it is launched as.
    pub graphs: u64,
    /// What it took on a GPU.
    pub measured: Option<Measured>,
    /// GPUs that each take such a step, with an exchange between them.
    pub devices: Option<usize>,
}

impl Profile {
    /// The profile of a step whose launches are `counted`.
    ///
    /// # Errors
    /// Those of [`Launch::new`] and [`UNet::new`].
    pub fn new(of: Of<'_>, counted: &[Counted]) -> Result<Self> {
        let Of { network, config, what, graphs, measured, devices } = of;
        let card = reference(measured.as_ref().map(|measured| measured.capability));
        let place = CARDS.iter().position(|other| other.key == card.key).expect("it is one of them");
        let launches: Vec<Launch> = counted.iter().map(Launch::new).collect::<Result<_>>()?;
        let (mut all, mut by_kernel) = (Sum::default(), BTreeMap::<&str, Sum>::new());
        for launch in &launches {
            all.add(launch, place);
            by_kernel.entry(launch.kernel.name).or_default().add(launch, place);
        }
        let of_kernel = |(name, sum): (&str, Sum)| {
            let most = sum.bound.iter().max_by(|a, b| a.1.total_cmp(b.1));
            KernelProfile {
                name: name.to_string(),
                launches: sum.launches,
                flops: sum.flops.round() as u64,
                tensor_core_share: sum.tensor_core_share(),
                bytes_asked: sum.asked.round() as u64,
                bytes_moved: sum.work.moved.round() as u64,
                bytes_touched: sum.work.touched.round() as u64,
                shared_cycles: sum.work.shared_cycles.round() as u64,
                shared_ideal: sum.shared_ideal.round() as u64,
                instructions: sum.work.instructions.round() as u64,
                registers: sum.registers,
                shared_bytes: sum.shared as u64,
                occupancy: sum.occupancy,
                waves: sum.waves / sum.launches as f64,
                bound_by: most.map_or(String::new(), |(unit, _)| unit.to_string()),
                modelled_ms: sum.modelled_ms(),
                measured_ms: measured.as_ref().and_then(|measured| measured.kernels.get(name).copied()),
            }
        };
        let mut kernels: Vec<KernelProfile> = by_kernel.into_iter().map(of_kernel).collect();
        let time = |kernel: &KernelProfile| kernel.measured_ms.unwrap_or(kernel.modelled_ms.0[place]);
        kernels.sort_by(|a, b| time(b).total_cmp(&time(a)));
        let least = least(config, what)?;
        let (modelled_ms, measured_ms) = (all.modelled_ms(), measured.as_ref().map(|measured| measured.step));
        let exchange = match devices {
            None => None,
            Some(devices) => {
                let (_, specs) = UNet::new(&config.model)?;
                let step_ms = measured_ms.unwrap_or(modelled_ms.0[place]);
                Some(Exchanged::new(devices, &specs, step_ms, card))
            }
        };
        Ok(Profile {
            gpu: measured.as_ref().map(|measured| measured.gpu.clone()),
            network,
            what: what.name(),
            batch: config.batch as u64,
            precision: config.precision.name(),
            launches: all.launches,
            graphs,
            flops: all.flops.round() as u64,
            tensor_core_share: all.tensor_core_share(),
            bytes_asked: all.asked.round() as u64,
            bytes_moved: all.work.touched.round() as u64,
            bytes_least: least.total(),
            least,
            reference: card.key,
            blocks_counted: launches.iter().map(|launch| launch.ran).sum(),
            blocks: counted.iter().map(|launch| launch.blocks).sum(),
            modelled_ms,
            measured_ms,
            exchange,
            kernels,
        })
    }

    /// The card that its figures of one card are of.
    pub fn card(&self) -> (usize, &'static Card) {
        CARDS.iter().enumerate().find(|(_, card)| card.key == self.reference).expect("it was made from one of them")
    }
}

/// The fewest bytes of a step.
fn least(config: &Config, what: What) -> Result<Least> {
    let m = &config.model;
    let (unet, specs) = UNet::new(m)?;
    let dtype = config.precision.activations();
    let images = if what == What::Train { config.batch / config.accumulate } else { config.batch };
    let shape = Shape::new(images, m.image_size.h, m.image_size.w, m.channels);
    let plan = unet.tape_plan(&Device::meta_gpu_for(dtype), config.recompute, &specs, shape)?;
    Ok(match what {
        What::Train => bound::of_training(config, &specs, &plan, dtype),
        What::Sample => bound::of_sampling(config, &specs, &plan, dtype),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cuda::Counters;

    #[test]
    fn what_is_written_alone_is_touched_once() {
        let counted = |distinct_bytes: u64| Counted {
            kernel: "k".into(),
            blocks: 8,
            threads: 32,
            shared: 0,
            arrays: [1_000_000, 50_000],
            counters: Counters {
                distinct_read_bytes: 1000,
                distinct_written_bytes: 500,
                distinct_bytes,
                ..Counters::default()
            },
        };
        assert_eq!(touched(&counted(1500), 4.0), 6000.0);
        // Rounded up.
        assert_eq!(touched(&counted(1501), 4.0), 6000.0);
        // A hundred bytes are written over.
        assert_eq!(touched(&counted(1400), 4.0), 6000.0);
        // Arrays bound it.
        assert_eq!(touched(&counted(1500), 400.0), 400_000.0 + 50_000.0);
    }
}
