//! Ordinary kernels in the style of public CUDA code, compiled by nvcc, against computations on the host: mathematical
//! functions with and without --use_fast_math, layers, halves, warp intrinsics and cooperative groups, atomics,
//! language features, wmma, CUB, hand-written instruction forms, barriers in shared memory.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a kernel or a call the arguments that it declares, or wrong ones on purpose"
)]

mod support;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg};
use half::{bf16, f16};
use std::sync::Arc;
use support::{code, configure, device, kernel, last_message, module};

fn load() {
    support::load(&[("CUDA_EMU_CHECKS", "all"), ("CUDA_EMU_MEMORY", "256M")]);
}

fn shape(grid: (u32, u32), block: (u32, u32), shared: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (grid.0, grid.1, 1), block_dim: (block.0, block.1, 1), shared_mem_bytes: shared }
}

fn line(blocks: u32, threads: u32) -> LaunchConfig {
    shape((blocks, 1), (threads, 1), 0)
}

/// Launches with the arguments given, and panics with the driver's sentence if it is refused.
macro_rules! run {
    ($stream:expr, $function:expr, $config:expr, $($arg:expr),* $(,)?) => {{
        let mut launch = $stream.launch_builder(&$function);
        // SAFETY: the kernel's parameters are those listed; the emulator checks what it does with them.
        if unsafe { launch$(.arg($arg))*.launch($config) }.is_err() {
            panic!("{}", last_message());
        }
    }};
}

/// Numbers between -1 and 1 from a linear congruential generator.
fn noise(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 23) as f64 - 1.0
    };
    (0..count).map(step).collect()
}

fn assert_close(what: &str, got: f64, want: f64, bound: f64) {
    let error = (got - want).abs();
    assert!(error <= bound, "{what}: {got} is {error:e} from {want}, allowed is {bound:e}");
}

mod math {
    use super::*;

    const PRECISE: &str = include_str!("kernels/math.ptx");
    const FAST: &str = include_str!("kernels/math_fast.ptx");
    const COUNT: usize = 400;

    fn apply<T: DeviceRepr + Default + Clone>(
        stream: &Arc<CudaStream>,
        function: &CudaFunction,
        input: &[T],
    ) -> Vec<T> {
        let x = stream.clone_htod(input).unwrap();
        let mut y = unsafe { stream.alloc::<T>(input.len()) }.unwrap();
        run!(stream, *function, line(4, 128), &x, &mut y, &(input.len() as i32));
        stream.clone_dtoh(&y).unwrap()
    }

    /// One unit in the last place of an f32 near `v`, from above.
    fn ulp(v: f64) -> f64 {
        v.abs() * 2f64.powi(-23)
    }

    fn erf(x: f64) -> f64 {
        // The Maclaurin series converges to the last digits for |x| <= 4.
        let (mut term, mut sum) = (x, x);
        for n in 1..120 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    fn gelu(x: f64) -> f64 {
        0.5 * x * (1.0 + (0.797_884_6_f32 as f64 * (x + 0.044715f32 as f64 * x * x * x)).tanh())
    }

    type Row = (&'static str, fn(f64) -> f64, fn(f64, f64) -> f64, fn(f64, f64) -> f64);

    /// Name, meaning, and the error allowed at (x, want) for precise and for fast code: the maxima of the CUDA
    /// programming guide's tables (in ulp, or absolute for __sinf, __cosf and __logf), and sums of those for the
    /// composed functions.
    const ROWS: &[Row] = &[
        ("f32_exp", |x| x.exp(), |_, v| 2.0 * ulp(v), |x, v| (2.0 + (1.173 * x).abs().floor()) * ulp(v)),
        ("f32_log", |x| x.abs().ln(), |_, v| ulp(v) + 1e-45, |_, v| 2f64.powf(-21.41).max(3.0 * ulp(v))),
        ("f32_sin", |x| x.sin(), |_, v| 2.0 * ulp(v), |_, _| 2f64.powf(-21.41) * 2.0),
        ("f32_cos", |x| x.cos(), |_, v| 2.0 * ulp(v), |_, _| 2f64.powf(-21.19) * 2.0),
        ("f32_tanh", |x| x.tanh(), |_, v| 2.0 * ulp(v), |_, v| v.abs() * 2f64.powf(-10.987)),
        ("f32_erf", erf, |_, v| 2.0 * ulp(v) + 1e-13, |_, v| 2.0 * ulp(v) + 1e-13),
        ("f32_sqrt", |x| x.abs().sqrt(), |_, v| 0.5 * ulp(v), |_, v| 3.0 * ulp(v)),
        ("f32_rsqrt", |x| 1.0 / x.abs().sqrt(), |_, v| 2.0 * ulp(v), |_, v| 2.0 * ulp(v)),
        ("f32_reciprocal", |x| 1.0 / x, |_, v| 0.5 * ulp(v), |_, v| 2.0 * ulp(v)),
        (
            "f32_power",
            |x| x.abs().powf(1.7f32 as f64),
            |_, v| 4.0 * ulp(v),
            |x, v| {
                // exp2(1.7 log2 x): the error of log2 (2^-22.6 absolute, or 2^-22 relative) and of the product, times
                // 1.7 ln 2, then exp2.
                let log = x.abs().log2().abs();
                (1.7 * 0.7 * (2f64.powi(-22) + 2.0 * log * 2f64.powi(-22)) + 2f64.powi(-21)) * v
            },
        ),
        ("f32_sigmoid", |x| 1.0 / (1.0 + (-x).exp()), |_, v| 4.0 * ulp(v), |x, v| (5.0 + x.abs() * 1.2) * ulp(v)),
        // 1 + tanh cancels where x is negative: absolute in x, with tanh's error.
        ("f32_gelu", gelu, |x, v| 4.0 * ulp(v) + 6.0 * ulp(x), |x, v| 4.0 * ulp(v) + x.abs() * 2f64.powf(-11.0)),
        ("f32_floor", |x| x.floor() + x.ceil() + x.round_ties_even() + x.trunc(), |_, _| 0.0, |_, _| 0.0),
    ];

    #[test]
    fn f32_functions_are_within_their_documented_error() {
        load();
        let input: Vec<f32> = noise(COUNT, 1).iter().map(|v| (v * 3.1) as f32).collect();
        for (ptx, fast) in [(PRECISE, false), (FAST, true)] {
            let (context, stream) = device(0);
            let functions = module(&context, ptx);
            for (name, meaning, precise_bound, fast_bound) in ROWS {
                let function = functions.load_function(name).unwrap();
                for (x, y) in input.iter().zip(apply(&stream, &function, &input)) {
                    let (x, want) = (f64::from(*x), meaning(f64::from(*x)));
                    let bound = if fast { fast_bound(x, want) } else { precise_bound(x, want) };
                    assert_close(&format!("{name}({x}), fast: {fast}"), f64::from(y), want, bound);
                }
            }
        }
    }

    #[test]
    fn large_arguments_of_sine_and_cosine_are_reduced_exactly() {
        load();
        let (context, stream) = device(0);
        let functions = module(&context, PRECISE);
        let input: Vec<f32> = noise(COUNT, 2).iter().map(|v| (v * 1e7) as f32).collect();
        for (name, meaning) in [("f32_sin", f64::sin as fn(f64) -> f64), ("f32_cos", f64::cos)] {
            let function = functions.load_function(name).unwrap();
            for (x, y) in input.iter().zip(apply(&stream, &function, &input)) {
                let want = meaning(f64::from(*x));
                assert_close(&format!("{name}({x})"), f64::from(y), want, 2.0 * ulp(want));
            }
        }
    }

    #[test]
    fn f64_functions_are_within_their_documented_error() {
        load();
        let input: Vec<f64> = noise(COUNT, 3).iter().map(|v| v * 20.0).collect();
        let (context, stream) = device(0);
        let functions = module(&context, PRECISE);
        type Row = (&'static str, fn(f64) -> f64, f64);
        let rows: [Row; 6] = [
            ("f64_exp", |x| x.exp(), 1.0),
            ("f64_log", |x| x.abs().ln(), 1.0),
            ("f64_sin", |x| x.sin(), 2.0),
            ("f64_sqrt", |x| x.abs().sqrt(), 0.0),
            ("f64_reciprocal", |x| 1.0 / x, 0.0),
            ("f64_through_f32", |x| f64::from(x as f32), 0.0),
        ];
        for (name, meaning, ulps) in rows {
            let function = functions.load_function(name).unwrap();
            for (&x, y) in input.iter().zip(apply(&stream, &function, &input)) {
                let want = meaning(x);
                // The host's own function is allowed half an ulp as well.
                let bound = if ulps == 0.0 { 0.0 } else { (ulps + 0.5) * want.abs() * 2f64.powi(-52) };
                assert_close(&format!("{name}({x})"), y, want, bound);
            }
        }
    }
}

mod layers {
    use super::*;

    const PTX: &str = include_str!("kernels/layers.ptx");

    #[test]
    fn layer_norm() {
        load();
        let (rows, cols) = (3usize, 77usize);
        // A large mean with a small variance shows a one-pass variance.
        let x: Vec<f32> = noise(rows * cols, 4).iter().map(|v| (v + 100.0) as f32).collect();
        let gamma: Vec<f32> = noise(cols, 5).iter().map(|&v| v as f32).collect();
        let beta: Vec<f32> = noise(cols, 6).iter().map(|&v| v as f32).collect();
        for seed in ["none", "5"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "layer_norm");
            let [dx, dg, db] = [&x, &gamma, &beta].map(|host| stream.clone_htod(host).unwrap());
            let mut y = unsafe { stream.alloc::<f32>(rows * cols) }.unwrap();
            run!(stream, function, shape((rows as u32, 1), (64, 1), 8), &dx, &dg, &db, &mut y, &(cols as i32));
            let y = stream.clone_dtoh(&y).unwrap();
            for row in 0..rows {
                let values: Vec<f64> = x[row * cols..][..cols].iter().map(|&v| f64::from(v)).collect();
                let mean = values.iter().sum::<f64>() / cols as f64;
                let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / cols as f64;
                for (col, v) in values.iter().enumerate() {
                    let unit = (v - mean) / (var + 1e-5).sqrt();
                    let want = unit * f64::from(gamma[col]) + f64::from(beta[col]);
                    // The mean of 100 values carries some 10 roundings of 2^-24 each, multiplied by the scale
                    // 1/sqrt(1/3).
                    let bound = 100.0 * 10.0 * 2f64.powi(-24) * 2.0 * f64::from(gamma[col]).abs()
                        + 16.0 * 2f64.powi(-24) * (unit.abs() + 1.0);
                    assert_close("layer_norm", f64::from(y[row * cols + col]), want, bound);
                }
            }
        }
    }

    #[test]
    fn transpose() {
        load();
        let (rows, cols) = (50usize, 37usize);
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "transpose");
        let x: Vec<f32> = (0..rows * cols).map(|v| v as f32).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut y = unsafe { stream.alloc::<f32>(rows * cols) }.unwrap();
        run!(stream, function, shape((2, 2), (32, 8), 0), &dx, &mut y, &(rows as i32), &(cols as i32));
        let y = stream.clone_dtoh(&y).unwrap();
        assert!((0..rows * cols).all(|at| y[at] == x[at % rows * cols + at / rows]));
        // The column of padding keeps the banks apart.
        let counters = support::last_launch();
        assert_eq!(counters["shared_wavefronts"], counters["shared_ideal"], "{counters:#}");
    }

    #[test]
    fn scan() {
        load();
        for seed in ["none", "1", "2"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "scan");
            let x: Vec<i32> = (0..300).map(|v| v * 37 % 101 - 50).collect();
            let dx = stream.clone_htod(&x).unwrap();
            let mut y = unsafe { stream.alloc::<i32>(300) }.unwrap();
            run!(stream, function, line(1, 320), &dx, &mut y, &300i32);
            let sums: Vec<i32> = x
                .iter()
                .scan(0, |sum, v| {
                    *sum += v;
                    Some(*sum)
                })
                .collect();
            assert_eq!(stream.clone_dtoh(&y).unwrap(), sums);
        }
    }

    #[test]
    fn convolve() {
        load();
        let (h, w) = (21i32, 35i32);
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "convolve");
        let x: Vec<f32> = (0..h * w).map(|v| (v % 13) as f32).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut y = unsafe { stream.alloc::<f32>((h * w) as usize) }.unwrap();
        run!(stream, function, shape((3, 2), (16, 16), 0), &dx, &mut y, &h, &w);
        let weights = [[1.0, 2.0, 1.0], [0.0, 0.5, 0.0], [-1.0, -2.0, -1.0f32]];
        let at = |y: i32, x_at: i32| match (0..h).contains(&y) && (0..w).contains(&x_at) {
            true => x[(y * w + x_at) as usize],
            false => 0.0,
        };
        let want: Vec<f32> = (0..h * w)
            .map(|p| {
                (0..9).map(|k| weights[k as usize / 3][k as usize % 3] * at(p / w + k / 3 - 1, p % w + k % 3 - 1)).sum()
            })
            .collect();
        // Small multiples of one half: every sum is exact.
        assert_eq!(stream.clone_dtoh(&y).unwrap(), want);
    }

    #[test]
    fn vector_loads() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "scale_4");
        let x: Vec<f32> = (0..4 * 76).map(|v| v as f32).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut y = unsafe { stream.alloc::<f32>(x.len()) }.unwrap();
        run!(stream, function, line(1, 32), &dx, &mut y, &3.0f32, &76i32);
        assert_eq!(stream.clone_dtoh(&y).unwrap(), x.iter().map(|v| v * 3.0).collect::<Vec<_>>());
        let ratio = support::last_launch()["sector_bytes_per_byte"].as_f64();
        assert_eq!(ratio, Some(1.0), "whole sectors");
    }
}

mod halves {
    use super::*;

    const PTX: &str = include_str!("kernels/halves.ptx");

    fn f16s(count: usize, seed: u64) -> Vec<f16> {
        noise(count, seed).iter().map(|v| f16::from_f64(v * 2.0)).collect()
    }

    #[test]
    fn packed_f16() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "half2_math");
        let (a, b) = (f16s(64, 7), f16s(64, 8));
        let (da, db) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
        let mut out = unsafe { stream.alloc::<f16>(256) }.unwrap();
        run!(stream, function, line(1, 32), &da, &db, &mut out, &32i32);
        let out = stream.clone_dtoh(&out).unwrap();
        // A sum or product of two f16, and their fma with a third, is exact in f64: one rounding, as on the device.
        let round = f16::from_f64;
        for i in 0..64 {
            let (x, y) = (a[i].to_f64(), b[i].to_f64());
            let (sum, product) = (round(x + y), round(x * y));
            let low = round(a[i & !1].to_f64() * b[i & !1].to_f64());
            let at = |row: usize| out[i / 2 * 8 + row * 2 + i % 2];
            assert_eq!(at(0), round(x * y + sum.to_f64()), "fma of {x} and {y}");
            assert_eq!(at(1), if sum > product { sum } else { product }, "max for {x} and {y}");
            assert_eq!(at(2), round(sum.to_f64() - low.to_f64()), "difference for {x} and {y}");
            let base = round(x.abs() + 1.0).to_f64();
            assert_close("h2rcp", at(3).to_f64(), 1.0 / base, 2f64.powi(-10) / base);
        }
    }

    #[test]
    fn scalar_f16() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "half_scalar");
        let x: Vec<f32> = noise(50, 9).iter().map(|v| (v * 3.0) as f32).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<f16>(100) }.unwrap();
        run!(stream, function, line(1, 64), &dx, &mut out, &50i32);
        let out = stream.clone_dtoh(&out).unwrap();
        for (i, x) in x.iter().enumerate() {
            let h = f16::from_f32(*x);
            let want = f16::from_f64(h.to_f64().abs() * -0.25).to_f64().exp();
            assert_close("hexp", out[2 * i].to_f64(), want, 2f64.powi(-10) * want);
            assert_eq!(out[2 * i + 1].to_f64(), f16::from_f64(h.to_f64() * 8.0).to_f64().trunc());
        }
    }

    #[test]
    fn packed_bf16() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "bf16_math");
        let make = |seed| noise(64, seed).iter().map(|v| bf16::from_f64(v * 2.0)).collect::<Vec<_>>();
        let (a, b) = (make(10), make(11));
        let (da, db) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
        let mut out = unsafe { stream.alloc::<bf16>(192) }.unwrap();
        run!(stream, function, line(1, 32), &da, &db, &mut out, &32i32);
        let out = stream.clone_dtoh(&out).unwrap();
        for i in 0..64 {
            let (x, y) = (a[i].to_f64(), b[i].to_f64());
            let at = |row: usize| out[i / 2 * 6 + row * 2 + i % 2];
            assert_eq!(at(0), bf16::from_f64(x * y + x));
            assert_eq!(at(1), bf16::from_f64(x * y));
            let third = if i % 2 == 0 { a[i].to_f32() * 3.0 } else { a[i].to_f32() / 3.0 };
            assert_eq!(at(2), bf16::from_f32(third));
        }
    }

    #[test]
    fn atomic_f16_sum() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "half_sum");
        // Sums of small whole numbers are exact in any order.
        let x: Vec<f16> = (0..100).map(|v| f16::from_f64(f64::from(v % 7))).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut sum = stream.clone_htod(&[f16::ZERO, f16::ONE]).unwrap();
        run!(stream, function, line(1, 32), &dx, &mut sum, &100i32);
        let want = x.iter().map(|v| v.to_f64()).sum::<f64>();
        assert_eq!(stream.clone_dtoh(&sum).unwrap(), [f16::from_f64(want), f16::ONE]);
    }
}

mod warps {
    use super::*;

    const PTX: &str = include_str!("kernels/warps.ptx");

    #[test]
    fn votes_matches_shuffles() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "votes");
        let x: Vec<i32> = (0..64).map(|v| v * 29 % 47).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<u32>(640) }.unwrap();
        run!(stream, function, line(1, 64), &dx, &mut out);
        let out = stream.clone_dtoh(&out).unwrap();
        for (warp, lanes) in x.chunks(32).enumerate() {
            let mask = |which: &dyn Fn(i32) -> bool| {
                lanes.iter().enumerate().fold(0u32, |mask, (lane, &v)| mask | u32::from(which(v)) << lane)
            };
            let sum: i32 = lanes.iter().sum();
            let (most, least) = (*lanes.iter().max().unwrap(), *lanes.iter().min().unwrap());
            for (lane, &v) in lanes.iter().enumerate() {
                let u = v as u32;
                let up = if lane >= 3 { lanes[lane - 3] } else { v };
                let in_eight = lanes[lane / 8 * 8 + (lane + 5) % 32 % 8];
                let funnel = ((u64::from(u * 3) << 32 | u64::from(u)) << 5 >> 32) as u32;
                // prmt picks the bytes 5, 1, 7, 3 of (v, 7 v), lowest first.
                let bytes = (u64::from(u * 7) << 32 | u64::from(u)).to_le_bytes();
                let permuted = u32::from_le_bytes([bytes[5], bytes[1], bytes[7], bytes[3]]);
                let mut last = u.reverse_bits() ^ funnel ^ permuted;
                if v % 2 == 0 {
                    last = last.wrapping_add(mask(&|v| v % 2 == 0).count_ones());
                }
                let want = [
                    mask(&|v| v & 1 != 0),
                    u32::from(lanes.iter().any(|&v| v > 5)) + 2,
                    mask(&|other| other % 3 == v % 3),
                    // All values are below 100: every lane agrees on 0, so the mask is full and the predicate 1.
                    0xffff_ffffu32.wrapping_add(1),
                    sum as u32,
                    (most * 1000 + least) as u32,
                    lanes.iter().fold(0, |x, v| x ^ v) as u32,
                    (up + 1000 * in_eight) as u32,
                    (v * 77).count_ones()
                        + 100 * (u + 1).leading_zeros()
                        + 10_000 * if v == 0 { 0 } else { u.trailing_zeros() + 1 },
                    last,
                ];
                let at = (warp * 32 + lane) * 10;
                assert_eq!(out[at..at + 10], want, "warp {warp}, lane {lane}, value {v}");
            }
        }
    }

    #[test]
    fn cooperative_groups() {
        load();
        for seed in ["none", "1", "2"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "groups");
            let x: Vec<i32> = (0..64).map(|v| v * 31 % 53).collect();
            let dx = stream.clone_htod(&x).unwrap();
            let mut out = stream.alloc_zeros::<i32>(11).unwrap();
            run!(stream, function, line(1, 64), &dx, &mut out);
            let mut want: Vec<i32> = x.chunks(8).map(|tile| tile.iter().sum()).collect();
            want.push(x.iter().sum());
            want.extend(x.chunks(32).map(|warp| warp.iter().filter(|&v| v % 2 == 1).count() as i32));
            assert_eq!(stream.clone_dtoh(&out).unwrap(), want);
        }
    }

    #[test]
    fn grids_synchronise_when_they_are_launched_cooperatively() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "grid_sync");
        let mut counts = stream.alloc_zeros::<i32>(1).unwrap();
        let mut out = stream.alloc_zeros::<i32>(6).unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&mut counts).arg(&mut out);
        if unsafe { launch.launch_cooperative(line(6, 64)) }.is_err() {
            panic!("{}", last_message());
        }
        assert_eq!(stream.clone_dtoh(&out).unwrap(), [6; 6]);
        let mut launch = stream.launch_builder(&function);
        launch.arg(&mut counts).arg(&mut out);
        let too_large = code(unsafe { launch.launch_cooperative(line(100_000, 64)) });
        assert_eq!(too_large, CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
    }
}

mod atomics {
    use super::*;

    const PTX: &str = include_str!("kernels/atomics.ptx");

    #[test]
    fn every_operation() {
        load();
        for seed in ["none", "1", "2"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "atomics");
            let mut i = stream.clone_htod(&[0i32, 1000, -1, 5, -7]).unwrap();
            let mut u = stream.clone_htod(&[u32::MAX, 0, 0, 0, 0]).unwrap();
            let mut l = stream.alloc_zeros::<u64>(2).unwrap();
            let mut f = stream.alloc_zeros::<f32>(2).unwrap();
            let mut d = stream.alloc_zeros::<f64>(2).unwrap();
            run!(stream, function, line(4, 64), &mut i, &mut u, &mut l, &mut f, &mut d);
            let threads = 256;
            let i = stream.clone_dtoh(&i).unwrap();
            let max = (0..threads).map(|t| t * 7 % 101).max().unwrap();
            let min = (0..threads).map(|t| -(t * 5 % 103)).min().unwrap();
            assert_eq!(i[..4], [threads * (threads - 1) / 2, 1000 - threads, max, min]);
            assert!((0..threads).contains(&i[4]));
            // Up to 9 and back to 0: 256 steps modulo 10. Down from 0 to 6 and on: 256 steps modulo 7 from 0 backwards.
            assert_eq!(
                stream.clone_dtoh(&u).unwrap(),
                [!0xffu32, 0xffff, (0..256).fold(0, |x, t| x ^ t), 6, 7 - 256 % 7]
            );
            assert_eq!(stream.clone_dtoh(&l).unwrap(), [256u64 << 33, 255 << 20]);
            assert_eq!(stream.clone_dtoh(&f).unwrap(), [128.0, 96.0]);
            assert_eq!(stream.clone_dtoh(&d).unwrap(), [64.0, 32.0]);
        }
    }

    #[test]
    fn the_last_block_finishes() {
        load();
        for seed in ["none", "1", "2", "3"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "last_block");
            let x: Vec<i32> = (0..500).map(|v| v * 17 % 29).collect();
            let dx = stream.clone_htod(&x).unwrap();
            let mut partial = unsafe { stream.alloc::<i32>(8) }.unwrap();
            let mut total = stream.alloc_zeros::<i32>(1).unwrap();
            for _ in 0..2 {
                run!(stream, function, line(8, 64), &dx, &mut partial, &mut total, &500i32);
                assert_eq!(stream.clone_dtoh(&total).unwrap(), [x.iter().sum::<i32>()]);
            }
        }
    }
}

mod language {
    use super::*;

    const PTX: &str = include_str!("kernels/language.ptx");

    #[repr(C)]
    struct Box {
        low: [i32; 3],
        weight: f32,
        id: i64,
    }
    // SAFETY: plain data, laid out as in C.
    unsafe impl DeviceRepr for Box {}

    #[test]
    fn functions_switches_arrays_and_wide_integers() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "language");
        let x: Vec<i32> = (0..70).map(|v| v * 3 % 61).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<i64>(x.len() * 8) }.unwrap();
        let given = Box { low: [1, 20, 300], weight: 1.25, id: 77 };
        run!(stream, function, line(3, 32), &given, &dx, &mut out, &(x.len() as i32));
        let out = stream.clone_dtoh(&out).unwrap();
        let primes = [2, 3, 5, 7, 11, 13, 17, 19];
        for (i, &v) in x.iter().enumerate() {
            let (mut n, mut steps) = (v + 1, 0i64);
            while n != 1 && steps < 200 {
                n = if n % 2 != 0 { 3 * n + 1 } else { n / 2 };
                steps += 1;
            }
            let chosen = match v % 9 {
                0 => v + 1,
                1 => v * v,
                2 => -v,
                3 => v >> 1,
                4 => (v + 3) ^ 0x55,
                5 => v ^ 0x55,
                6 => v % 7,
                _ => 42,
            };
            let local = |k: i32| v * k + primes[(k as usize + i) % 8];
            let big = (i64::from(v) << 33) - 12_345_678_901;
            let wide = u128::from(big as u64);
            let mut sum = 0;
            for k in 0..100 {
                if k % 3 == v % 3 {
                    continue;
                }
                if sum > 500 + v {
                    break;
                }
                sum += k;
            }
            let high = |a: i32, b: i32| (i64::from(a) * i64::from(b)) >> 32;
            let want = [
                steps,
                i64::from(chosen),
                i64::from(local(v % 16) + local(v * 3 % 16)),
                77 * 1_000_003 + i64::from(v) + i64::from(20 + v) + 2,
                big / if v == 3 { 1 } else { i64::from(v - 3) } + big % 1_000_003,
                ((big as u64) / u64::from(v as u32 + 7)).wrapping_add(((wide * wide) >> 64) as u64) as i64,
                high(v * 123_457, v.wrapping_mul(7_654_321))
                    + ((u64::from(v as u32 * 99_991) * 0xdead_beef) >> 32) as i64,
                i64::from(sum),
            ];
            assert_eq!(out[i * 8..][..8], want, "value {v}");
        }
    }

    #[test]
    fn assert_stops_the_kernel() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "check");
        let good = stream.clone_htod(&[1i32; 32]).unwrap();
        run!(stream, function, line(1, 32), &good);
        let mut values = [1i32; 32];
        values[9] = 7;
        let bad = stream.clone_htod(&values).unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&bad);
        assert_eq!(code(unsafe { launch.launch(line(1, 32)) }), CUresult::CUDA_ERROR_ASSERT);
        let message = last_message();
        for word in ["check", "thread (9,0,0)", "in[threadIdx.x] != 7", "language.cu"] {
            assert!(message.contains(word), "`{word}` is not in: {message}");
        }
        std::mem::forget(good);
        std::mem::forget(bad);
    }

    #[test]
    fn printf_prints() {
        load();
        // In a process of its own, whose output is read here.
        if std::env::var_os("CUDA_EMU_TEST_PRINTS").is_some() {
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "print");
            run!(stream, function, line(1, 32), &5i32);
            let function = kernel(&context, PTX, "print_and_trap");
            let mut launch = stream.launch_builder(&function);
            launch.arg(&17i32);
            assert_eq!(code(unsafe { launch.launch(line(1, 1)) }), CUresult::CUDA_ERROR_LAUNCH_FAILED);
            // Nothing that Rust would do at the end, as in programs of other languages.
            unsafe { libc::_exit(0) };
        }
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "language::printf_prints", "--nocapture"])
            .env("CUDA_EMU_TEST_PRINTS", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&child.stdout);
        for thread in 0..2 {
            let want = format!("thread {thread} of block 0: 2.500 text 21474836480 x\n");
            assert!(text.contains(&want), "{want} is not in: {text}");
        }
        assert!(text.ends_with("no more than 17"), "{text}");
    }

    #[test]
    fn packed_and_odd_integers() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "integers");
        let x: Vec<u32> = (0..32u32).map(|v| v.wrapping_mul(2_654_435_769) ^ 0x0f0f).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<u32>(32) }.unwrap();
        run!(stream, function, line(1, 32), &dx, &mut out, &32i32);
        let out = stream.clone_dtoh(&out).unwrap();
        for i in 0..32 {
            let (a, b) = (x[i], x[(i + 1) % 32]);
            let (pa, pb) = (a.to_le_bytes(), b.to_le_bytes());
            let dot: i32 = (0..4).map(|k| i32::from(pa[k] as i8) * i32::from(pb[k] as i8)).sum::<i32>() + 5;
            let sums = u32::from_le_bytes(std::array::from_fn(|k| pa[k].wrapping_add(pb[k])));
            let sad = (a as i32).abs_diff(b as i32).wrapping_add(3);
            let half = ((i64::from(a as i32) + i64::from(b as i32)) >> 1) as u32;
            let product = i32::from((a >> 9) as u8) * i32::from(b as i8);
            let rotated = (a << (b & 31)) | (a >> ((32 - (b & 31)) % 32));
            let want = [dot as u32, sums, sad, a / (b % 1000 + 1), a % 12_345, a.min(b), half, product as u32, rotated];
            assert_eq!(out[i], want.iter().fold(0u32, |sum, v| sum.wrapping_add(*v)), "{a:#x}, {b:#x}");
        }
    }
}

mod library {
    use super::*;

    const PTX: &str = include_str!("kernels/library.ptx");

    fn numbers(count: usize, seed: u64, below: i32) -> Vec<i32> {
        noise(count, seed).iter().map(|v| (v.abs() * f64::from(below)) as i32).collect()
    }

    /// Under every schedule: what a kernel of one block of 128 threads makes of its input.
    fn for_all_schedules<I: DeviceRepr, O: DeviceRepr + Default + Clone>(
        name: &str,
        input: &[I],
        outputs: usize,
        check: impl Fn(Vec<O>),
    ) {
        load();
        for seed in ["none", "1", "2"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, name);
            let x = stream.clone_htod(input).unwrap();
            let mut y = unsafe { stream.alloc::<O>(outputs) }.unwrap();
            run!(stream, function, line(1, 128), &x, &mut y);
            check(stream.clone_dtoh(&y).unwrap());
        }
    }

    #[test]
    fn blocks_scan_reduce_sort_and_count() {
        let x = numbers(512, 40, 64);
        let before: Vec<i32> = (0..512).map(|i| x[..i].iter().sum()).collect();
        for_all_schedules("exclusive_scan", &x, 512, |got: Vec<i32>| assert_eq!(got, before));
        let f: Vec<f32> = x[..128].iter().map(|&v| v as f32).collect();
        let most = f.iter().copied().fold(0.0, f32::max);
        for_all_schedules("sum_and_maximum", &f, 2, |got: Vec<f32>| assert_eq!(got, [f.iter().sum(), most]));
        let keys: Vec<u32> = x.iter().map(|&v| (v as u32).wrapping_mul(2_654_435_769)).collect();
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        for_all_schedules("sort", &keys, 512, |got: Vec<u32>| assert_eq!(got, sorted));
        let bytes: Vec<u8> = x.iter().map(|&v| v as u8).collect();
        let counts: Vec<u32> = (0..64).map(|bin| x.iter().filter(|&&v| v == bin).count() as u32).collect();
        for_all_schedules("counts", &bytes, 64, |got: Vec<u32>| assert_eq!(got, counts));
    }

    #[test]
    fn warps_scan_and_split() {
        let x = numbers(128, 41, 100);
        let mut want = vec![];
        for warp in x.chunks(32) {
            for (lane, &v) in warp.iter().enumerate() {
                let upto: i32 = warp[..=lane].iter().sum();
                let alike: i32 = warp.iter().filter(|&&other| other % 2 == v % 2).sum();
                let labelled = warp.iter().filter(|&&other| other % 5 == v % 5).count() as i32;
                want.extend([if lane == 0 { warp.iter().sum() } else { 0 }, upto, upto, upto - v, alike, labelled]);
            }
        }
        for_all_schedules("warps", &x, 768, |got: Vec<i32>| assert_eq!(got, want));
    }

    #[test]
    fn lanes_that_stay_work_together() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "filter");
        let x = numbers(512, 42, 100);
        let dx = stream.clone_htod(&x).unwrap();
        let (mut count, mut out) = (stream.alloc_zeros::<i32>(1).unwrap(), stream.alloc_zeros::<i32>(512).unwrap());
        run!(stream, function, line(4, 128), &dx, &mut count, &mut out);
        let mut want: Vec<i32> = x.iter().copied().filter(|v| v % 3 == 0).collect();
        assert_eq!(stream.clone_dtoh(&count).unwrap(), [want.len() as i32]);
        let mut got = stream.clone_dtoh(&out).unwrap();
        got.truncate(want.len());
        want.sort_unstable();
        got.sort_unstable();
        assert_eq!(got, want);
    }
}

mod forms {
    use super::*;

    const PTX: &str = include_str!("kernels/forms.ptx");

    #[test]
    fn products_of_packed_integers() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "packed");
        let x: Vec<i32> = (0..33i32).map(|v| v.wrapping_mul(-1_640_531_527) ^ 0x1234_5678).collect();
        let (da, db) = (stream.clone_htod(&x[..32]).unwrap(), stream.clone_htod(&x[1..]).unwrap());
        let mut out = unsafe { stream.alloc::<i32>(160) }.unwrap();
        run!(stream, function, line(1, 32), &da, &db, &mut out);
        for (i, got) in stream.clone_dtoh(&out).unwrap().chunks(5).enumerate() {
            let (a, b) = (x[i].to_le_bytes(), x[i + 1].to_le_bytes());
            let signed = |byte: u8| i64::from(byte as i8);
            let unsigned = |byte: u8| i64::from(byte);
            let four = |f: &dyn Fn(u8) -> i64, g: &dyn Fn(u8) -> i64| (0..4).map(|k| f(a[k]) * g(b[k])).sum::<i64>();
            let half = |k: usize| i64::from(u16::from_le_bytes([a[2 * k], a[2 * k + 1]]));
            let signed_half = |k: usize| i64::from(half(k) as u16 as i16);
            let want = [
                four(&signed, &signed) + 7,
                four(&unsigned, &unsigned) + 7,
                signed_half(0) * signed(b[0]) + signed_half(1) * signed(b[1]) + 3,
                half(0) * unsigned(b[2]) + half(1) * unsigned(b[3]) + 3,
                four(&signed, &unsigned) + 1,
            ];
            assert_eq!(got, want.map(|v| v as i32), "{:#x}, {:#x}", x[i], x[i + 1]);
        }
    }

    #[test]
    fn asynchronous_copies_of_every_size() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "small_copies");
        let x: Vec<i32> = (1..=128i32).map(|v| v.wrapping_mul(0x0101_0101)).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<i32>(256) }.unwrap();
        run!(stream, function, line(1, 64), &dx, &mut out);
        let got = stream.clone_dtoh(&out).unwrap();
        let reversed: Vec<i32> = [&x[..64], &x[64..]].iter().flat_map(|half| half.iter().rev().copied()).collect();
        assert_eq!(got[..128], reversed);
        for (t, (got, from)) in got[128..].chunks(4).zip(x.chunks(4)).enumerate() {
            let bytes = |words: &[i32]| words.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
            let mut want = bytes(from);
            want[t % 17..].fill(0);
            assert_eq!(bytes(got), want, "{} bytes", t % 17);
        }
    }

    #[test]
    fn cache_hints_change_nothing() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "hints");
        let x: Vec<i32> = (0..128).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<i32>(384) }.unwrap();
        run!(stream, function, line(1, 32), &dx, &mut out);
        let got = stream.clone_dtoh(&out).unwrap();
        let first: Vec<i32> = x.iter().map(|&v| if v % 4 == 0 { 2 * v } else { v }).collect();
        assert_eq!(got, [first, x.clone(), x].concat());
    }

    #[test]
    fn reductions_without_results() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "reductions");
        let mut i = stream.alloc_zeros::<i32>(7).unwrap();
        let mut f = stream.alloc_zeros::<f32>(1).unwrap();
        let mut d = stream.alloc_zeros::<f64>(1).unwrap();
        let mut u = stream.clone_htod(&[0u64, 0, 0, 0, 0, 0, 0, u64::MAX]).unwrap();
        run!(stream, function, line(1, 64), &mut i, &mut f, &mut d, &mut u);
        assert_eq!(stream.clone_dtoh(&i).unwrap(), [2016, 63, -1, 64, 64, 1, 1]);
        assert_eq!(stream.clone_dtoh(&f).unwrap(), [1008.0]);
        assert_eq!(stream.clone_dtoh(&d).unwrap(), [1008.0]);
        // 64 in f16 and in bf16, twice each.
        let want = [2016, 77, 9, 0x5400_5400, 0x4280_4280, (-63i64) as u64, 63, 0];
        assert_eq!(stream.clone_dtoh(&u).unwrap(), want);
    }

    #[test]
    fn barriers_of_every_kind() {
        load();
        for seed in ["none", "1"] {
            configure("seed", seed);
            let (context, stream) = device(0);
            let function = kernel(&context, PTX, "barriers");
            let mut out = unsafe { stream.alloc::<i32>(64) }.unwrap();
            run!(stream, function, line(1, 64), &mut out);
            let count = (0..64).filter(|t| t % 3 != 0).count() as i32;
            assert_eq!(stream.clone_dtoh(&out).unwrap(), [count + 1000; 64]);
        }
    }

    #[test]
    fn jump_tables() {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, "cases");
        let x: Vec<i32> = noise(100, 50).iter().map(|v| (v * 1000.0) as i32).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<i32>(100) }.unwrap();
        run!(stream, function, line(1, 128), &dx, &mut out, &100i32);
        for (&v, got) in x.iter().zip(stream.clone_dtoh(&out).unwrap()) {
            let want = match v & 15 {
                0 => v * 3,
                1 => v ^ 7,
                2 => v << 2,
                3 => v / 3,
                4 => v % 5,
                5 => -v,
                6 => v * v,
                7 => v + 100,
                8 => !v,
                9 => v >> 1,
                10 => v * 11,
                11 => v - 9,
                12 => v.count_ones() as i32,
                13 => v.leading_zeros() as i32,
                14 => v.reverse_bits(),
                _ => 1,
            };
            assert_eq!(got, want, "{v}");
        }
    }
}

mod mbarriers {
    use super::*;

    const PTX: &str = include_str!("kernels/mbarriers.ptx");
    const SEEDS: [&str; 3] = ["none", "1", "2"];

    fn launch(name: &str, tiles: Option<i32>, outputs: usize) -> Result<Vec<i32>, String> {
        load();
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, name);
        let x: Vec<i32> = (0..128 * tiles.unwrap_or(1)).map(|v| v * 37 % 1001).collect();
        let dx = stream.clone_htod(&x).unwrap();
        let mut out = unsafe { stream.alloc::<i32>(outputs) }.unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&dx).arg(&mut out);
        if let Some(tiles) = &tiles {
            launch.arg(tiles);
        }
        if unsafe { launch.launch(line(1, 128)) }.is_err() {
            let message = last_message();
            std::mem::forget(dx);
            std::mem::forget(out);
            return Err(message);
        }
        Ok(stream.clone_dtoh(&out).unwrap())
    }

    #[test]
    fn threads_meet_and_copies_arrive() {
        load();
        let x = |i: i32| i * 37 % 1001;
        for seed in SEEDS {
            configure("seed", seed);
            let want: Vec<i32> = (0..384).map(|i| x(127 - i % 128) + i / 128).collect();
            assert_eq!(launch("met", None, 384).unwrap(), want);
            for name in ["copied", "copied_by_group"] {
                assert_eq!(launch(name, None, 128).unwrap(), want[..128]);
            }
            let sum = |t: i32| (0..5).map(|tile| x(tile * 128 + 127 - t) * (tile + 1)).sum::<i32>();
            assert_eq!(launch("pipeline", Some(5), 128).unwrap(), (0..128).map(sum).collect::<Vec<_>>());
        }
    }

    #[test]
    fn who_does_not_wait_races() {
        load();
        for seed in SEEDS {
            configure("seed", seed);
            for name in ["not_waited", "not_settled"] {
                let message = launch(name, None, 384).unwrap_err();
                assert!(message.contains("no barrier between") || message.contains("nothing has written"), "{message}");
            }
        }
    }
}

#[test]
fn wmma_multiplies() {
    load();
    let (context, stream) = device(0);
    let function = kernel(&context, include_str!("kernels/wmma.ptx"), "wmma_gemm");
    let (m, n, k) = (32usize, 48usize, 64usize);
    let make = |count, seed| noise(count, seed).iter().map(|&v| f16::from_f64(v)).collect::<Vec<_>>();
    let (a, b) = (make(m * k, 20), make(n * k, 21));
    let (da, db) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
    let mut c = unsafe { stream.alloc::<f32>(m * n) }.unwrap();
    run!(stream, function, shape((3, 2), (32, 1), 0), &da, &db, &mut c, &(n as i32), &(k as i32));
    for (at, got) in stream.clone_dtoh(&c).unwrap().iter().enumerate() {
        let product = |i: usize| a[at / n * k + i].to_f64() * b[at % n * k + i].to_f64();
        let want: f64 = (0..k).map(product).sum::<f64>() * 2.0;
        let magnitude: f64 = (0..k).map(|i| product(i).abs()).sum();
        // Exact products, at most k additions to within an ulp each, doubled.
        assert_close("wmma", f64::from(*got), want, 2.0 * k as f64 * 2f64.powi(-23) * magnitude);
    }
}
