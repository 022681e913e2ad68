//! How a case of an operation is measured, on the device that is asked for.
//!
//! On the CPU criterion takes the time. On a GPU two events around each launch do, so that what the host needs between
//! launches is left out; before each call more bytes are written than any L2 cache holds, so that its inputs come from
//! memory. On the emulator times mean nothing: there each case is called once and counted, and the time is that of the
//! model of `ddpm-cuda profile`, which says the same of a whole step. With `DDPM_BENCH_JSON=FILE` the figures of a GPU
//! and of the emulator are added to FILE, a line of JSON for each case.

use std::env::{args, var};
use std::fs::OpenOptions;
use std::io::Write;
use std::sync::OnceLock;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput};
use ddpm_cuda::device::cuda::{self, Gpu};
use ddpm_cuda::device::{Choice, Device, Precision};
use ddpm_cuda::profile::card::{CARDS, Card};
use ddpm_cuda::profile::{self, Launch, model};
use ddpm_cuda::tensor::{Shape, Tensor};
use serde_json::{Value, json};

use crate::support::{BATCH, choice, named};

#[path = "cache.rs"]
mod cache;

use cache::EVICTS;

/// The device of [`choice`], opened once for all operations, and so that launches are measured or counted.
pub fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let open = |number, precision: Precision| -> ddpm_cuda::error::Result<Gpu> {
        let gpu = Gpu::open_timed(number, precision)?;
        if !gpu.is_emulated() {
            return Ok(gpu);
        }
        // As `ddpm-cuda profile` counts: each buffer is an allocation of its own.
        let gpu = Gpu::open(number, precision, true)?;
        gpu.count_launches()?;
        Ok(gpu)
    };
    let device = || match choice() {
        (Choice::Cpu, Precision::F32) => Device::cpu(),
        (Choice::Cpu, precision) => panic!("DDPM_BENCH_PRECISION: {precision}, but the CPU computes in f32"),
        (gpu, precision) => {
            let number = if let Choice::Cuda(number) = gpu { number } else { 0 };
            Device::Cuda(open(number, precision).unwrap_or_else(|e| panic!("DDPM_BENCH_DEVICE: {e}")))
        }
    };
    DEVICE.get_or_init(device).clone()
}

/// What a call does.
#[derive(Clone, Copy)]
pub enum Work {
    /// Bytes that have to be moved.
    Bytes(usize),
    /// FLOP; criterion prints FLOP per second as elements per second.
    Flops(usize),
    /// Elements, where something else than memory or FLOP takes the time.
    Elements(usize),
}

/// Cases of one operation.
pub struct Group<'a> {
    name: String,
    device: Device,
    group: BenchmarkGroup<'a, WallTime>,
}

impl<'a> Group<'a> {
    /// Cases of the operation `stem` on `device`.
    pub fn new(c: &'a mut Criterion, device: &Device, stem: &str) -> Self {
        let name = named(stem, device);
        let group = c.benchmark_group(name.clone());
        Group { name, device: device.clone(), group }
    }

    /// Measures calls of `run`.
    pub fn case<O>(&mut self, case: &str, work: Work, run: impl FnMut() -> O) {
        let mut run = run;
        if self.device.is_gpu() {
            return self.case_after(case, work, || (), |()| run());
        }
        self.throughput(work).bench_function(case, |b| b.iter(&mut run));
    }

    /// Measures calls of `run` with what `set_up` has made, which takes no time.
    pub fn case_after<I, O>(
        &mut self,
        case: &str,
        work: Work,
        mut set_up: impl FnMut() -> I,
        mut run: impl FnMut(I) -> O,
    ) {
        let Device::Cuda(gpu) = self.device.clone() else {
            self.throughput(work)
                .bench_function(case, |b| b.iter_batched(&mut set_up, &mut run, BatchSize::PerIteration));
            return;
        };
        let name = format!("{}/{case}", self.name);
        if gpu.is_emulated() {
            if wanted(&name) {
                let input = set_up();
                gpu.counted_launches();
                drop(run(input));
                self.counted(&gpu, &name, work);
            }
            return;
        }
        let (mut all, evicting) = (Vec::new(), self.device.clone());
        self.throughput(work).bench_function(case, |b| {
            b.iter_custom(|rounds| {
                let mut total = 0.0;
                for _ in 0..rounds {
                    let input = set_up();
                    evict(&evicting);
                    milliseconds(&gpu);
                    drop(run(input));
                    all.push(milliseconds(&gpu));
                    total += all.last().expect("just measured");
                }
                Duration::from_secs_f64(total / 1e3)
            });
        });
        if !all.is_empty() {
            self.measured(&gpu, &name, work, all);
        }
    }

    fn throughput(&mut self, work: Work) -> &mut BenchmarkGroup<'a, WallTime> {
        self.group.throughput(match work {
            Work::Bytes(bytes) => Throughput::Bytes(bytes as u64),
            Work::Flops(count) | Work::Elements(count) => Throughput::Elements(count as u64),
        })
    }

    /// Says how fast the calls were that took `all` milliseconds.
    fn measured(&self, gpu: &Gpu, name: &str, work: Work, mut all: Vec<f64>) {
        all.sort_by(f64::total_cmp);
        let ms = all[all.len() / 2];
        let capability = cuda::devices().ok().and_then(|all| all.get(gpu.number()).map(|one| one.capability));
        let (figure, share, card) = self.rate(work, ms / 1e3, profile::reference(capability));
        let of = if Some(card.capability) == capability { "its" } else { card.name };
        println!("{name}: {:.1} us by events, {figure}, {:.0} % of {of} peak", 1e3 * ms, 100.0 * share);
        record(json!({
            "name": name, "gpu": format!("{gpu}"), "median_ms": ms, "least_ms": all[0], "calls": all.len(),
            "share_of_peak": share, "peak_of": card.key,
        }));
    }

    /// Says what the emulator has counted of a call.
    fn counted(&self, gpu: &Gpu, name: &str, work: Work) {
        let counted = gpu.counted_launches();
        let launches: Vec<Launch> =
            counted.iter().map(|one| Launch::new(one).unwrap_or_else(|e| panic!("{name}: {e}"))).collect();
        let sum = |of: fn(&Launch) -> f64| launches.iter().map(of).sum::<f64>();
        let [cycles, ideal] = [sum(|l| l.work.shared_cycles), sum(|l| l.shared_ideal)];
        let [asked, moved, touched] = [sum(|l| l.asked), sum(|l| l.work.moved), sum(|l| l.work.touched)];
        let card = &CARDS[0];
        let seconds: f64 = launches.iter().map(|launch| model::time(card, &launch.work).0).sum();
        let (figure, share, _) = self.rate(work, seconds, card);
        println!(
            "{name}: {} launches, {:.2} MB asked for, {:.2} in sectors, {:.2} from memory, shared cycles {:.3} of the \
             ideal; modelled for an {}: {:.1} us, {figure}, {:.0} % of the peak",
            launches.len(),
            asked / 1e6,
            moved / 1e6,
            touched / 1e6,
            if ideal > 0.0 { cycles / ideal } else { 1.0 },
            card.name,
            1e6 * seconds,
            100.0 * share
        );
        record(json!({
            "name": name, "gpu": Value::Null, "launches": launches.len(), "bytes_asked": asked, "bytes_moved": moved,
            "bytes_touched": touched, "shared_cycles": cycles, "shared_ideal": ideal, "modelled_ms": 1e3 * seconds,
            "share_of_peak": share, "peak_of": card.key,
        }));
    }

    /// A rate in words, and its share of what `card` sustains.
    fn rate(&self, work: Work, seconds: f64, card: &'static Card) -> (String, f64, &'static Card) {
        let flops = card.peak(self.device.precision());
        match work {
            Work::Flops(count) => {
                let rate = count as f64 / seconds;
                (format!("{:.1} TFLOP/s", rate / 1e12), rate / flops, card)
            }
            Work::Bytes(count) => {
                let rate = count as f64 / seconds;
                (format!("{:.0} GB/s", rate / 1e9), rate / card.memory, card)
            }
            Work::Elements(count) => {
                let rate = count as f64 / seconds;
                // Of an element, in f32 or bf16, that is read and written.
                let bytes = 2.0 * self.device.activations().size() as f64;
                (format!("{:.1} G elements/s", rate / 1e9), bytes * rate / card.memory, card)
            }
        }
    }
}

/// At the batch of a GPU, if one is measured; a single image stays one.
pub fn batched(shape: Shape) -> Shape {
    if device().is_gpu() && shape.n > 1 { Shape { n: BATCH, ..shape } } else { shape }
}

/// True unless the command line asks for others: by a part of the name, as criterion's filter.
fn wanted(name: &str) -> bool {
    args().skip(1).find(|argument| !argument.starts_with('-')).is_none_or(|part| name.contains(&part))
}

/// Writes over what the L2 cache holds.
fn evict(device: &Device) {
    drop(Tensor::zeros(device, Shape::vector(EVICTS / 4)).expect("room for it"));
}

/// Milliseconds of the launches since the last call.
fn milliseconds(gpu: &Gpu) -> f64 {
    let times = gpu.launch_times().expect("the kernels do what they should");
    times.values().map(|(_, ms)| ms).sum()
}

/// Adds a line to the record, if there is to be one.
fn record(figures: Value) {
    let Ok(file) = var("DDPM_BENCH_JSON") else { return };
    let opened = OpenOptions::new().create(true).append(true).open(&file);
    let written = opened.and_then(|mut to| writeln!(to, "{figures}"));
    written.unwrap_or_else(|e| panic!("DDPM_BENCH_JSON: {file} cannot be written: {e}"));
}
