//! `ddpm-cuda profile`: what a step asks of a GPU, kernel by kernel, and how long it takes or would take.
//!
//! Counting needs the emulator as the driver, with settings of its own, and measuring needs the GPU's. A process has
//! one driver, so the program starts itself once more for the counts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::{PRECISION, check_writable, choice};
use crate::checkpoint;
use crate::config::{Config, Preset};
use crate::device::Precision;
use crate::device::cuda::{self, Counted, Gpu};
use crate::error::{Error, Result};
use crate::names::Named;
use crate::output::plot::{Axis, Bars, Plot, Series, write_bars, write_plot};
use crate::output::write_atomically;
use crate::profile::card::CARDS;
use crate::profile::exchange::Exchanged;
use crate::profile::{self, BLOCKS, MOST_IMAGES, Measured, Of, Profile, What};
use crate::say;
use crate::text::{GIB, grouped};
use crate::usage;

/// Arguments of `ddpm-cuda profile`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// mnist, cifar10 or celebahq256 [default: mnist]
    #[arg(long, value_parser = choice::<Preset>(), conflicts_with = "model")]
    pub preset: Option<Preset>,
    /// Run folder (its newest checkpoint), checkpoint, model folder of diffusers, or .pt file of OpenAI's
    #[arg(long, value_name = "RUN|CHECKPOINT|FOLDER|FILE.pt")]
    pub model: Option<PathBuf>,
    /// A flag of OpenAI's scripts that FILE.pt does not tell, such as num_heads=4; may be given several times
    #[arg(long, value_name = "FLAG=VALUE", requires = "model")]
    pub set: Vec<String>,
    /// Images of a step, up to 1024 [default: the preset's or the model's]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// What is computed in.
    #[arg(long, help = PRECISION, default_value = "f32", value_parser = choice::<Precision>())]
    pub precision: Precision,
    /// A step of training or of sampling
    #[arg(long, default_value = "train", value_parser = choice::<What>())]
    pub what: What,
    /// Also say what N GPUs exchange that each take such a training step, how long that takes over several links, and
    /// from how many GPUs on it pays
    #[arg(long, value_name = "N")]
    pub devices: Option<usize>,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the roofline and where a step goes, as SVG and PNG
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Only count, on the emulator, into this file
    #[arg(long, hide = true, value_name = "FILE")]
    pub counts: Option<PathBuf>,
}

/// What the help says behind the flags.
pub const HELP: &str = "\
The launches are those of the program itself at the batch in question. Their counts come from up to 16 blocks of each,
run on the emulator, and are scaled to the whole grid. The emulator's library, libcuda_emu.so, is taken from beside the
program, where `cargo build --release` puts it, or from DDPM_CUDA_DRIVER. With a GPU times are measured, too; without
one they are modelled for H100, A100 and RTX 4090. docs/profiling.md explains every figure.

  ddpm-cuda profile --preset cifar10 --precision bf16 --json step.json --plots plots/";

/// Runs the command.
///
/// # Errors
/// A model that cannot be read, a program without kernels, no emulator, a GPU that fails, and what cannot be written.
pub fn run(args: &Args) -> Result<()> {
    let (config, network) = settings(args)?;
    for (flag, file) in [("--json", &args.json), ("--counts", &args.counts)] {
        if let Some(file) = file {
            check_writable(flag, file)?;
        }
    }
    if let Some(missing) = cuda::missing_in_this_build() {
        return Err(Error::Failed(format!("there is no kernel to profile: {missing}")));
    }
    if let Some(file) = &args.counts {
        // Each buffer an allocation of its own: fresh memory is zero there, whatever a block that did not run owes.
        let gpu = Gpu::open(0, args.precision, true)?;
        let launches = profile::count(&gpu, &config, args.what)?;
        drop(gpu);
        let graphs = profile::graphs(&Gpu::open(0, args.precision, false)?, &config, args.what)?;
        return write_atomically(file, &json_of(&Counts { launches, graphs })?);
    }
    if let Some(folder) = &args.plots {
        fs::create_dir_all(folder).map_err(|e| Error::file(folder, format!("cannot be created: {e}")))?;
    }
    let Counts { launches, graphs } = counted()?;
    let measured = measured(&config, args.what)?;
    let of = Of { network, config: &config, what: args.what, graphs, measured, devices: args.devices };
    let profile = Profile::new(of, &launches)?;
    print(&profile);
    if let Some(file) = &args.json {
        write_atomically(file, &json_of(&profile)?)?;
        say!("figures: {}", file.display());
    }
    if let Some(folder) = &args.plots {
        let [roofline, _] = write_plot(folder, "roofline", &roofline(&profile))?;
        let [step, _] = write_bars(folder, "step", &where_a_step_goes(&profile))?;
        say!("plots: {} and {}, also as .png", roofline.display(), step.display());
    }
    Ok(())
}

/// The settings of the step, and its network in words.
fn settings(args: &Args) -> Result<(Config, String)> {
    let (mut config, network) = match &args.model {
        Some(path) => (checkpoint::describe_with(path, &args.set)?.config, path.display().to_string()),
        None => {
            let preset = args.preset.unwrap_or(Preset::Mnist);
            (Config::preset(preset), preset.to_string())
        }
    };
    config.precision = args.precision;
    let batch = args.batch.unwrap_or(config.batch);
    if batch == 0 || batch > MOST_IMAGES || !batch.is_multiple_of(config.accumulate) {
        let by = if config.accumulate > 1 { format!(" that divides by {}", config.accumulate) } else { String::new() };
        usage!("--batch {batch}: a step is profiled for a number of images from 1 to {MOST_IMAGES}{by}");
    }
    config.batch = batch;
    profile::check(&config, args.what, args.devices)?;
    Ok((config, network))
}

fn json_of(figures: &impl Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec_pretty(figures)
        .map_err(|e| Error::Failed(format!("the figures cannot be written as JSON: {e}")))?;
    text.push(b'\n');
    Ok(text)
}

/// What this program counts on the emulator.
#[derive(Serialize, Deserialize)]
struct Counts {
    launches: Vec<Counted>,
    /// That the step is launched as.
    graphs: u64,
}

/// The launches of the step, counted by this program on the emulator.
fn counted() -> Result<Counts> {
    let program = std::env::current_exe()
        .map_err(|e| Error::Failed(format!("the program cannot be started again, not knowing where it is: {e}")))?;
    let emulator = emulator(&program)?;
    let folder = tempfile::tempdir()
        .map_err(|e| Error::Failed(format!("no temporary folder can be made for the counts: {e}")))?;
    let file = folder.path().join("counts.json");
    let output = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .arg("--counts")
        .arg(&file)
        .env("DDPM_CUDA_DRIVER", &emulator)
        .env("CUDA_EMU_BLOCKS", BLOCKS.to_string())
        // Address space, of which only what is touched costs memory.
        .env("CUDA_EMU_MEMORY", "1T")
        .env("CUDA_EMU_CHECKS", "fast")
        .env("CUDA_EMU_CC", "8.0")
        .env("CUDA_EMU_DEVICES", "1")
        .env_remove("CUDA_EMU_SEED")
        .env_remove("CUDA_EMU_PROFILE")
        .env_remove("DDPM_TRACE")
        .output()
        .map_err(|e| Error::Failed(format!("{} cannot be started again to count: {e}", program.display())))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let why = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        let why = why.strip_prefix("ddpm-cuda: ").unwrap_or(why);
        return Err(Error::Failed(format!("counting on the emulator ({}) failed: {why}", emulator.display())));
    }
    let text = fs::read(&file).map_err(|e| Error::file(&file, format!("cannot be read: {e}")))?;
    serde_json::from_slice(&text).map_err(|e| Error::file(&file, format!("is not what was counted: {e}")))
}

/// The emulator's library: the one that `DDPM_CUDA_DRIVER` names, if it is one, or that beside the program.
fn emulator(program: &Path) -> Result<PathBuf> {
    const LIBRARY: &str = "libcuda_emu.so";
    let named = std::env::var_os("DDPM_CUDA_DRIVER").filter(|path| !path.is_empty()).map(PathBuf::from);
    if let Some(path) = named.filter(|path| path.file_name().is_some_and(|name| name == LIBRARY)) {
        return Ok(path);
    }
    let folder = program.parent().unwrap_or(Path::new("."));
    // Beside an example or a test the library is in the same folder or the one above.
    let places = [folder.join(LIBRARY), folder.join("..").join(LIBRARY)];
    places.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        Error::Failed(format!(
            "there is no {LIBRARY} in {}: the kernels are counted on it, so build it with cargo build --release -p \
             cuda_emu, or name it in DDPM_CUDA_DRIVER",
            folder.display()
        ))
    })
}

/// What the step takes on the first GPU that can run it; `None` without one.
fn measured(config: &Config, what: What) -> Result<Option<Measured>> {
    let Some(gpu) = cuda::open_any(config.precision)?.filter(|gpu| !gpu.is_emulated()) else {
        return Ok(None);
    };
    let description = cuda::devices()?.into_iter().find(|other| other.number == gpu.number());
    drop(gpu);
    description.map(|gpu| profile::measure(gpu, config, what)).transpose()
}

/// The table, totals and what they mean.
fn print(profile: &Profile) {
    let Profile { what, batch, precision, network, .. } = profile;
    let (_, card) = profile.card();
    say!("a {what} step of {network}, {batch} images, {precision}");
    if let Some(note) = Precision::named(precision).and_then(Precision::note) {
        say!("{note}");
    }
    say!("");
    let measured = profile.measured_ms.is_some();
    say!(
        "{:<36} {:>8} {:>9} {:>5} {:>9} {:>9} {:>9} {:>6} {:>9} {:>4} {:>6} {:>4} {:>7} {:>8} {:>8} {:>8} {}{}",
        "kernel",
        "launches",
        "GFLOP",
        "mma",
        "MB asked",
        "moved",
        "touched",
        "shared",
        "Minstr",
        "regs",
        "KiB",
        "occ",
        "waves",
        "H100 ms",
        "A100",
        "4090",
        if measured { "measured " } else { "" },
        "bound by",
    );
    for kernel in &profile.kernels {
        let [h100, a100, rtx4090] = kernel.modelled_ms.0;
        let shared = match kernel.shared_ideal {
            0 => "-".to_string(),
            ideal => format!("{:.2}", kernel.shared_cycles as f64 / ideal as f64),
        };
        let time = match kernel.measured_ms {
            Some(ms) => format!("{ms:>8.3} "),
            None if measured => format!("{:>8} ", "-"),
            None => String::new(),
        };
        say!(
            "{:<36} {:>8} {:>9.2} {:>4.0}% {:>9.1} {:>9.1} {:>9.1} {:>6} {:>9.2} {:>4} {:>6.1} {:>3.0}% {:>7.2} \
             {:>8.3} {:>8.3} {:>8.3} {time}{}",
            kernel.name,
            kernel.launches,
            kernel.flops as f64 / 1e9,
            100.0 * kernel.tensor_core_share,
            kernel.bytes_asked as f64 / 1e6,
            kernel.bytes_moved as f64 / 1e6,
            kernel.bytes_touched as f64 / 1e6,
            shared,
            kernel.instructions as f64 / 1e6,
            kernel.registers,
            kernel.shared_bytes as f64 / 1024.0,
            100.0 * kernel.occupancy,
            kernel.waves,
            h100,
            a100,
            rtx4090,
            kernel.bound_by,
        );
    }
    let [h100, a100, rtx4090] = profile.modelled_ms.0;
    let launched = match profile.graphs {
        0 => "kernel by kernel".to_string(),
        1 => "as one graph".to_string(),
        graphs => format!("as {graphs} graphs"),
    };
    say!("");
    say!(
        "in all: {} launches, {launched}, {:.1} GFLOP, {:.2} % of the multiply-adds on tensor cores",
        profile.launches,
        profile.flops as f64 / 1e9,
        100.0 * profile.tensor_core_share
    );
    say!(
        "memory traffic: {:.2} GiB, {:.2} times the least possible for what the tape keeps, {:.2} GiB",
        profile.bytes_moved as f64 / GIB,
        profile.bytes_moved as f64 / profile.bytes_least as f64,
        profile.bytes_least as f64 / GIB
    );
    say!("modelled: {h100:.2} ms on an H100, {a100:.2} ms on an A100, {rtx4090:.2} ms on an RTX 4090");
    match (&profile.gpu, profile.measured_ms) {
        (Some(gpu), Some(ms)) => say!("measured on {gpu}: {ms:.2} ms, {:.0} images/s", 1e3 * *batch as f64 / ms),
        _ => say!("measured: nothing, since there is no GPU here"),
    }
    if let Some(exchange) = &profile.exchange {
        print_exchange(profile, exchange);
    }
    say!("");
    say!(
        "{} of {} blocks ran on the emulator, at most {BLOCKS} of each launch, spread over its grid; the counts are \
         scaled to all",
        grouped(profile.blocks_counted),
        grouped(profile.blocks)
    );
    say!("mma: multiply-adds on tensor cores; asked: by lanes; moved: in sectors, between multiprocessors and L2");
    say!("cache; touched: between it and memory, if a launch finds nothing of the last one there; shared: cycles of");
    say!("its banks by those without conflicts; Minstr: million warp instructions of PTX, a slot of issue each; regs,");
    say!("KiB of shared memory, occupancy, waves, bound by: on an {}", card.name);
    if std::env::var_os("DDPM_KERNELS").is_some_and(|folder| !folder.is_empty()) {
        say!(
            "regs, static shared memory, occupancy, waves: of the build's kernels, not of those that DDPM_KERNELS names"
        );
    }
}

/// What such a step exchanges as one of several, over each link.
fn print_exchange(profile: &Profile, exchange: &Exchanged) {
    let Exchanged { devices, step_ms, rank_step_ms, bytes, bytes_sent, links } = exchange;
    let step = match &profile.gpu {
        Some(gpu) => format!("measured on {gpu}"),
        None => format!("modelled for an {}", profile.card().1.name),
    };
    say!("");
    say!(
        "if each of {devices} GPUs takes such a step, {} images in all, it sends {:.1} MB to the others: of {:.1} MB of gradients and as many of weights all but its own shard",
        *devices as u64 * profile.batch,
        *bytes_sent as f64 / 1e6,
        bytes.gradient as f64 / 1e6
    );
    say!(
        "its step takes {step_ms:.2} ms on one GPU, {step}, and {rank_step_ms:.2} ms on one of {devices}, each of which updates a shard"
    );
    say!("");
    say!("{:<36} {:>6} {:>11} {:>6} {:>10} {:>9}", "link", "GB/s", "exchange ms", "share", "efficiency", "pays from");
    for row in links {
        say!(
            "{:<36} {:>6} {:>11.2} {:>5.0}% {:>9.0}% {:>9}",
            row.name,
            row.bandwidth / 1e9,
            row.exchange_ms,
            100.0 * row.share,
            100.0 * row.efficiency,
            row.pays_from.map_or("never".into(), |devices| devices.to_string()),
        );
    }
}

/// The longest kernels that plots name.
const NAMED: usize = 6;

/// FLOP/s over FLOP per byte of memory traffic, under the roofs of the card.
fn roofline(profile: &Profile) -> Plot {
    let (place, card) = profile.card();
    let point = |kernel: &profile::KernelProfile| {
        let ms = kernel.measured_ms.unwrap_or(kernel.modelled_ms.0[place]);
        (kernel.flops as f64 / kernel.bytes_touched as f64, kernel.flops as f64 / ms / 1e9)
    };
    let of = |name: &str, kernels: &[profile::KernelProfile]| Series {
        name: name.into(),
        points: kernels.iter().map(point).collect(),
        line: false,
    };
    let (named, others) = profile.kernels.split_at(NAMED.min(profile.kernels.len()));
    let mut series: Vec<Series> = named.iter().map(|kernel| of(&kernel.name, std::slice::from_ref(kernel))).collect();
    series.push(of("other kernels", others));
    let roof = |peak: f64| {
        let at = |step: i32| 10f64.powf(f64::from(step) / 10.0);
        (-20..=40).map(at).map(|x| (x, peak.min(x * card.memory) / 1e12)).collect::<Vec<_>>()
    };
    let tensor_cores = match Precision::named(profile.precision) {
        Some(Precision::Tf32) => ("roof: tensor cores in tf32, memory", card.peak(Precision::Tf32)),
        _ => ("roof: tensor cores, memory", card.tensor_peak()),
    };
    series.push(Series { name: tensor_cores.0.into(), points: roof(tensor_cores.1), line: true });
    series.push(Series { name: "roof: f32 lanes".into(), points: roof(card.lanes_peak()), line: true });
    let times = if profile.measured_ms.is_some() { "measured" } else { "modelled" };
    Plot {
        title: format!(
            "Roofline of {}, {} images, {}: {}, {times}",
            profile.network, profile.batch, profile.precision, card.name
        ),
        x: Axis { label: "FLOP per byte of memory traffic".into(), log: true },
        y: Axis { label: "TFLOP/s".into(), log: true },
        series,
        marks: false,
    }
}

/// Milliseconds of the longest kernels and of all others.
fn where_a_step_goes(profile: &Profile) -> Bars {
    const SHOWN: usize = 14;
    let measured = profile.measured_ms.is_some();
    let times = |kernel: &profile::KernelProfile| {
        let mut times = kernel.modelled_ms.0.to_vec();
        times.extend(measured.then(|| kernel.measured_ms.unwrap_or(0.0)));
        times
    };
    let (shown, others) = profile.kernels.split_at(SHOWN.min(profile.kernels.len()));
    let mut groups: Vec<(String, Vec<f64>)> = shown.iter().map(|kernel| (kernel.name.clone(), times(kernel))).collect();
    if !others.is_empty() {
        let mut sums = vec![0.0; CARDS.len() + usize::from(measured)];
        others.iter().flat_map(|kernel| times(kernel).into_iter().enumerate()).for_each(|(k, ms)| sums[k] += ms);
        groups.push((format!("{} others", others.len()), sums));
    }
    let mut kinds: Vec<String> = CARDS.iter().map(|card| format!("{}, modelled", card.name)).collect();
    kinds.extend(profile.gpu.as_ref().filter(|_| measured).map(|gpu| format!("{gpu}, measured")));
    Bars {
        title: format!(
            "Where a {} step of {} goes: {} images, {}",
            profile.what, profile.network, profile.batch, profile.precision
        ),
        label: "ms".into(),
        kinds,
        groups,
    }
}
