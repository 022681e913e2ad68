//! Shared by the tests: comparison of results, tolerances, finite differences, random inputs.
//!
//! Tolerances are derived, never felt. For a result computed in f32 the oracle is the operation's reference in f64, and
//! the yardstick is the same reference in f32: an implementation may err by at most twice the largest error that the
//! plain f32 loops make on the same case, plus one rounding of the output (2^-24 of the value). This budget adapts to
//! reduction length, magnitude and cancellation; the factor of two allows another order of summation.

#![allow(dead_code, reason = "each test target uses its own part of this module")]

pub mod gpu;
pub mod network;
pub mod places;
pub mod plant;
mod tests;
pub mod winograd;

use std::path::{Path, PathBuf};

use ddpm_cuda::checkpoint::{self, Loaded};
use ddpm_cuda::config::{Config, Preset, Size};
use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::Prediction;
use ddpm_cuda::error::Result;
use ddpm_cuda::exchange::Exchange;
use ddpm_cuda::params::{Init, Layout, Param, ParamGrads, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};

/// Command-line settings of a network whose steps take milliseconds.
pub const TINY: [&str; 8] =
    ["--set", "widths=8,16", "--set", "groups=4", "--set", "attention_resolutions=14", "--set", "timesteps=50"];

/// Command-line settings of a network as in the paper, whose step size does not depend on the number of steps.
pub const PLAIN: [&str; 4] = ["--set", "prediction=eps", "--set", "cooldown=0"];

/// Ends what the tests were started with: a shell script ignores SIGINT for what it runs in the background, `nohup`
/// SIGHUP, and the program leaves ignored signals alone.
#[cfg(unix)]
pub fn hear_signals(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let default = || {
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
            // SAFETY: `signal` may be called between fork and exec, with a signal's number and the default action.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: the closure allocates nothing and calls only `signal`, which is safe after a fork.
    unsafe { command.pre_exec(default) };
}

/// A minimal network with everything that draws random numbers: two levels, attention at the lower one, dropout, flips,
/// two micro-batches. It predicts eps, as in the paper.
pub fn tiny(h: usize, w: usize, channels: usize) -> Config {
    let mut c = Config::preset(Preset::Mnist);
    c.model.image_size = Size { h, w };
    c.model.channels = channels;
    c.model.widths = vec![8, 16];
    c.model.attention_resolutions = vec![h.max(w) / 2];
    c.model.groups = 4;
    c.model.dropout = 0.1;
    c.diffusion.timesteps = 100;
    c.batch = 4;
    c.accumulate = 2;
    c.flip = true;
    c.diffusion.prediction = Prediction::Eps;
    c.warmup_steps = 3;
    c.cooldown = 0.0;
    c.seed = 11;
    c
}

/// Largest relative rounding error of an f32, half a unit in the last place: one rounding.
pub const F32_ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// Largest error of `got` against `want` as a fraction of its budget. Fails if it is above 1, and on whatever would
/// make the comparison meaningless: no numbers, a wrong length, a NaN or an infinity on either side, or a budget that
/// is negative or not finite.
#[track_caller]
pub fn worst(name: &str, got: &[f32], want: &[f64], budget: impl Fn(f64) -> f64) -> f64 {
    worst_at(name, got, want, |_, w| budget(w))
}

/// [`worst`] with a budget for each element, by its index.
#[track_caller]
pub fn worst_at(name: &str, got: &[f32], want: &[f64], budget: impl Fn(usize, f64) -> f64) -> f64 {
    assert_eq!(got.len(), want.len(), "{name}: {} numbers, expected {}", got.len(), want.len());
    assert!(!want.is_empty(), "{name}: there is nothing to compare");
    let mut share = 0.0;
    let mut line = String::new();
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert!(w.is_finite(), "{name}: the oracle itself is {w} at {i}");
        assert!(g.is_finite(), "{name}: element {i} is {g}, expected {w}");
        let (error, allowed) = ((f64::from(g) - w).abs(), budget(i, w));
        assert!(allowed.is_finite() && allowed >= 0.0, "{name}: element {i} has a budget of {allowed}");
        // An error of zero is within a budget of zero.
        let used = if error == 0.0 { 0.0 } else { error / allowed };
        if used > share {
            share = used;
            line = format!(
                "{name}: element {i} of {} is {g:e}, expected {w:e}: error {error:.3e} is {used:.2} of its budget",
                got.len()
            );
        }
    }
    assert!(share <= 1.0, "{line}");
    share
}

/// Compares `got` (f32) with the oracle in f64; the yardstick is the reference in f32. Returns the fraction of the
/// budget used.
#[track_caller]
pub fn close(name: &str, got: &[f32], oracle: &[f64], yardstick: &[f32]) -> f64 {
    close_but_for(name, got, oracle, yardstick, 0.0)
}

/// [`close`] with `allowance` added to the budget: an absolute error that the implementation makes but the reference
/// does not, such as from its own exponential. The caller derives it.
#[track_caller]
pub fn close_but_for(name: &str, got: &[f32], oracle: &[f64], yardstick: &[f32], allowance: f64) -> f64 {
    let own = error_of_reference(name, yardstick, oracle);
    worst(name, got, oracle, |w| 2.0 * own + F32_ROUNDING * w.abs() + allowance)
}

/// [`close`] for a result of type `dtype`; the budget includes its rounding to `dtype`. The inputs of oracle and
/// yardstick must be rounded to `dtype`.
#[track_caller]
pub fn close_as(dtype: DType, name: &str, got: &[f32], oracle: &[f64], yardstick: &[f32]) -> f64 {
    close_as_but_for(dtype, name, got, oracle, yardstick, 0.0)
}

/// [`close_as`] with `allowance` added to the budget, as in [`close_but_for`].
#[track_caller]
pub fn close_as_but_for(
    dtype: DType,
    name: &str,
    got: &[f32],
    oracle: &[f64],
    yardstick: &[f32],
    allowance: f64,
) -> f64 {
    close_as_but_for_each(dtype, name, got, oracle, yardstick, |_| allowance)
}

/// [`close_as_but_for`] with an allowance for each element, by its index.
#[track_caller]
pub fn close_as_but_for_each(
    dtype: DType,
    name: &str,
    got: &[f32],
    oracle: &[f64],
    yardstick: &[f32],
    allowance: impl Fn(usize) -> f64,
) -> f64 {
    let (rounding, own) = (gpu::rounding(dtype), 2.0 * error_of_reference(name, yardstick, oracle));
    worst_at(name, got, oracle, |i, w| {
        let own = own + allowance(i);
        own + rounding * (w.abs() + own)
    })
}

/// The largest error of the reference in f32. `f64::max` ignores NaN, so every number is checked.
#[track_caller]
fn error_of_reference(name: &str, yardstick: &[f32], oracle: &[f64]) -> f64 {
    assert_eq!(yardstick.len(), oracle.len(), "{name}: yardstick and oracle differ in length");
    yardstick.iter().zip(oracle).enumerate().fold(0.0, |largest: f64, (i, (&y, &o))| {
        let error = (f64::from(y) - o).abs();
        assert!(error.is_finite(), "{name}: at {i} the reference is {y} in f32 and {o} in f64");
        largest.max(error)
    })
}

/// Compares `got` with numbers that it must reproduce to within `relative` of the tensor's largest element, such as a
/// [`network`]'s outputs and gradients.
#[track_caller]
pub fn close_to_largest(name: &str, got: &[f32], want: &[f32], relative: f64) -> f64 {
    let want: Vec<f64> = want.iter().map(|&w| f64::from(w)).collect();
    let largest = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
    worst(name, got, &want, |_| relative * largest)
}

/// A checkpoint of these weights, as training writes it.
pub fn saved(run: &Path, config: &Config, params: &Params) -> PathBuf {
    let zeros = Tensor::zeros(&Device::cpu(), Shape::vector(params.specs().flat_len())).unwrap();
    let state = checkpoint::State {
        step: 1,
        params,
        ema: params.flat(),
        m: &zeros,
        v: &zeros,
        data: None,
        importance: None,
        curve: None,
    };
    checkpoint::save(run, config, state).unwrap()
}

/// Asserts that today's program writes a model that was loaded from `folder` as it is there.
#[track_caller]
pub fn assert_written_alike(model: &Loaded, folder: &Path) {
    let run = tempfile::tempdir().unwrap();
    let written = saved(run.path(), &model.config, &model.params);
    for file in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ] {
        assert!(
            std::fs::read(written.join(file)).unwrap() == std::fs::read(folder.join(file)).unwrap(),
            "{} has changed",
            folder.join(file).display()
        );
    }
}

/// Asserts that all bits are the same.
#[track_caller]
pub fn same_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}: {} numbers, expected {}", got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            g.to_bits() == w.to_bits(),
            "{name}: element {i} is {g:e} ({:#x}), expected {w:e} ({:#x})",
            g.to_bits(),
            w.to_bits()
        );
    }
}

/// Checks `gradients` by central finite differences in f64: `f` maps the inputs to a scalar, and `gradients[k]` is its
/// derived gradient for `inputs[k]`, of which every element is varied.
///
/// With step h the difference quotient errs by h^2/6 |f'''| (truncation) and eps |f| terms / h (rounding, for a scalar
/// that sums `terms` products). h = 1e-4 balances the two for functions with derivatives of order one. The budget is
/// the sum of both, with 100 times the largest gradient (or 1) in place of |f'''|.
#[track_caller]
pub fn finite_differences(name: &str, f: impl Fn(&[Vec<f64>]) -> f64, inputs: &[Vec<f64>], gradients: &[Vec<f64>]) {
    assert_eq!(inputs.len(), gradients.len(), "{name}: one gradient per input");
    assert!(inputs.iter().any(|x| !x.is_empty()), "{name}: there is no input to vary");
    let h = 1e-4;
    let mut inputs = inputs.to_vec();
    for k in 0..inputs.len() {
        assert_eq!(inputs[k].len(), gradients[k].len(), "{name}: gradient {k} has another length than its input");
        let largest = gradients[k].iter().fold(0.0, |m: f64, g| m.max(g.abs()));
        for i in 0..inputs[k].len() {
            let x = inputs[k][i];
            inputs[k][i] = x + h;
            let above = f(&inputs);
            inputs[k][i] = x - h;
            let below = f(&inputs);
            inputs[k][i] = x;
            let (quotient, derived) = ((above - below) / (2.0 * h), gradients[k][i]);
            let terms = inputs.iter().map(Vec::len).sum::<usize>() as f64;
            let budget = 100.0 * h * h / 6.0 * largest.max(1.0) + f64::EPSILON * above.abs().max(1.0) * terms / h;
            let error = (quotient - derived).abs();
            // An infinite function value makes both error and budget infinite.
            assert!(
                budget.is_finite() && error <= budget,
                "{name}: gradient {k}, element {i} is {derived:e}, differences say {quotient:e} \
                 (error {error:.2e}, budget {budget:.2e})"
            );
        }
    }
}

/// Deterministic numbers, roughly uniform on [-1, 1), different for every `seed`. From a linear congruential generator:
/// their quality does not matter, and the oracle must not share code with what is tested.
pub fn numbers(seed: u64, len: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(0x1234_5678_9ABC_DEF1);
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Rounded to f32, so that the oracle in f64 gets exactly the inputs of the implementation in f32.
        f64::from(((state >> 40) as f64 / (1u64 << 23) as f64 - 1.0) as f32)
    };
    (0..len).map(|_| next()).collect()
}

/// The same numbers in f32; exact for what [`numbers`] returns.
pub fn to_f32(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&v| v as f32).collect()
}

/// What `rank` returns for each of `ranks` ranks, each in a thread of its own.
pub fn each_rank<T: Send>(ranks: usize, rank: impl Fn(Exchange) -> T + Sync) -> Vec<T> {
    each_rank_of_machines(1, ranks, rank)
}

/// The same of ranks that exchange as those of so many machines.
pub fn each_rank_of_machines<T: Send>(machines: usize, ranks: usize, rank: impl Fn(Exchange) -> T + Sync) -> Vec<T> {
    let rank = &rank;
    std::thread::scope(|scope| {
        let exchanges = Exchange::threads_as_machines(machines, ranks).into_iter();
        let threads: Vec<_> = exchanges.map(|exchange| scope.spawn(move || rank(exchange))).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.collect::<std::thread::Result<_>>().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// One number per image, `(n, 1, 1, 1)` in f32: timesteps or classes for the network.
pub fn per_image(device: &Device, numbers: impl IntoIterator<Item = f32>) -> Tensor {
    let numbers: Vec<f32> = numbers.into_iter().collect();
    Tensor::from_slice(device, Shape::new(numbers.len(), 1, 1, 1), &numbers).expect("room for a few numbers")
}

/// The bits of an f64 as two f32, for comparisons bit by bit.
pub fn halves(v: f64) -> [f32; 2] {
    let bits = v.to_bits();
    [f32::from_bits(bits as u32), f32::from_bits((bits >> 32) as u32)]
}

/// A shape and numbers in it.
pub type Numbers = (Shape, Vec<f32>);

/// The results of [`through_tape`].
#[derive(Debug, PartialEq)]
pub struct Pass {
    /// The output.
    pub y: Vec<f32>,
    /// The gradient of each input.
    pub dx: Vec<Vec<f32>>,
    /// The gradient of each parameter.
    pub dw: Vec<Vec<f32>>,
}

impl Pass {
    /// Everything in one vector, for comparisons bit by bit.
    pub fn flat(&self) -> Vec<f32> {
        [&self.y].into_iter().chain(&self.dx).chain(&self.dw).flatten().copied().collect()
    }
}

/// [`through_tape_on`] a guarded CPU.
#[track_caller]
pub fn through_tape(
    inputs: &[Numbers],
    params: &[Numbers],
    dy: &[f32],
    passes: usize,
    op: impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Result<Var>,
) -> Pass {
    through_tape_on(&Device::cpu_guarded(), inputs, params, dy, passes, op)
}

/// Runs one operation forward and backward through its public function and the tape, on a guarded device. `inputs`,
/// rounded to the activation type, become leaves; `params` become parameters; `dy` is the gradient of the output. The
/// parameter gradients of `passes` passes accumulate. At the end all buffers but those held here must be back in the
/// pool.
#[track_caller]
pub fn through_tape_on(
    device: &Device,
    inputs: &[Numbers],
    params: &[Numbers],
    dy: &[f32],
    passes: usize,
    op: impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Result<Var>,
) -> Pass {
    let mut specs = Specs::default();
    let init = Init::Zeros;
    let handles: Vec<Param> = (params.iter().enumerate())
        .map(|(i, (shape, _))| specs.add(format!("p{i}"), *shape, Layout::Vector, init))
        .collect();
    let mut flat = vec![0.0; specs.flat_len()];
    for (&p, (_, values)) in handles.iter().zip(params) {
        flat[specs.range(p)].copy_from_slice(values);
    }
    let weights = Params::from_host(device, specs, &flat).expect("room for the parameters");
    let mut dw = ParamGrads::new(device, weights.specs()).expect("room for their gradients");
    // Values left by earlier steps are stale: they must be overwritten, not added to.
    let stale = vec![f32::NAN; weights.specs().flat_len()];
    dw.finish(weights.specs()).and_then(|g| g.write(&stale)).expect("gradients can be written");
    dw.reset();

    let idle = device.pool_stats().in_use;
    let mut last = None;
    for _ in 0..passes {
        let tensor = |shape, values| {
            Tensor::from_slice_as(device, device.activations(), shape, values).expect("room for a tensor")
        };
        let mut tape = Tape::recording(device, &weights);
        let x: Vec<Var> = inputs.iter().map(|(shape, values)| tape.leaf(tensor(*shape, values))).collect();
        let y = op(&mut tape, &x, &handles).expect("the operation itself");
        let mut leaves = tape.backward(&y, tensor(y.shape(), dy), &mut dw).expect("its backward pass");
        let numbers = |x: &Tensor| x.to_vec().expect("every kernel did what it should");
        let dx = x.iter().map(|x| numbers(&leaves.take(x).expect("a gradient for every input"))).collect();
        last = Some((numbers(y.value()), dx));
    }
    assert_eq!(device.pool_stats().in_use, idle, "bytes still held after the backward pass");
    let (y, dx) = last.expect("at least one pass");
    let flat = dw.finish(weights.specs()).and_then(|g| g.to_vec()).expect("every kernel did what it should");
    let dw = handles.iter().map(|&p| flat[weights.specs().range(p)].to_vec()).collect();
    Pass { y, dx, dw }
}

/// Asserts that on a GPU an operation has the bits of the CPU path on inputs rounded to the activation type, with y and
/// dx rounded to that type. Holds for operations whose results are copies, or single roundings of what the CPU computes
/// in f32. Parameter gradients are f32 in either case.
#[track_caller]
pub fn same_as_the_cpu(
    name: &str,
    inputs: &[Numbers],
    params: &[Numbers],
    dy: &[f32],
    passes: usize,
    op: impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Result<Var>,
) {
    let on_the_cpu = [DType::F32, DType::Bf16].map(|dtype| {
        let rounded = |x: &[f32]| gpu::rounded_f32(dtype, x);
        let inputs: Vec<Numbers> = inputs.iter().map(|(shape, x)| (*shape, rounded(x))).collect();
        let Pass { y, dx, dw } = through_tape(&inputs, params, &rounded(dy), passes, &op);
        Pass { y: rounded(&y), dx: dx.iter().map(|dx| rounded(dx)).collect(), dw }
    });
    gpu::each(name, |device| {
        let want = &on_the_cpu[usize::from(device.activations() == DType::Bf16)];
        let got = through_tape_on(device, inputs, params, dy, passes, &op);
        same_bits(&format!("y of {name}"), &got.y, &want.y);
        for (what, got, want) in [("dx", &got.dx, &want.dx), ("dw", &got.dw, &want.dw)] {
            assert_eq!(got.len(), want.len(), "{what} of {name}");
            got.iter().zip(want).for_each(|(got, want)| same_bits(&format!("{what} of {name}"), got, want));
        }
        got.flat()
    });
}

/// Runs `f` with 1, 2, 3 and 5 threads and fails unless all runs return the same bits.
#[track_caller]
pub fn same_bits_at_any_number_of_threads(name: &str, f: impl Fn() -> Vec<f32> + Sync) {
    let at = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        pool.install(&f)
    };
    let one = at(1);
    for threads in [2, 3, 5] {
        same_bits(&format!("{name} with {threads} threads"), &at(threads), &one);
    }
}
