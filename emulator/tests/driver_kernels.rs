//! Five kernels in CUDA C++, compiled by nvcc: each agrees with a CPU computation under all checks and several
//! schedules, and each is refused, with the reason, once a bug is planted in it.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a kernel or a call the arguments that it declares, or wrong ones on purpose"
)]

mod support;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg};
use half::bf16;
use support::{code, configure, device, kernel, last_message};

const SEEDS: [&str; 4] = ["none", "1", "2", "3"];

fn load() {
    support::load(&[("CUDA_EMU_CHECKS", "all"), ("CUDA_EMU_MEMORY", "256M")]);
}

fn shape(x: u32, y: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// Numbers between -1 and 1 that a linear congruential generator gives.
fn noise(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(step).collect()
}

/// Asserts |got - want| <= bound for every element; a NaN fails.
fn assert_close(got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len());
    for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= bound(at), "element {at}: {got} is {error:e} from {want}, allowed is {:e}", bound(at));
    }
}

/// One buffer in, one buffer out, whole numbers behind them: the shape of every kernel here but the products.
fn run<I: DeviceRepr, O: DeviceRepr>(
    ptx: &str,
    name: &str,
    config: LaunchConfig,
    input: &[I],
    output: Option<&[O]>,
    outputs: usize,
    number: i32,
) -> Result<Vec<O>, (CUresult, String)> {
    let (context, stream) = device(0);
    let function = kernel(&context, ptx, name);
    let x = stream.clone_htod(input).unwrap();
    // Without contents to start from, the output is memory that nothing has written.
    let mut y: CudaSlice<O> = match output {
        Some(start) => stream.clone_htod(start).unwrap(),
        None => unsafe { stream.alloc(outputs) }.unwrap(),
    };
    let mut launch = stream.launch_builder(&function);
    launch.arg(&x).arg(&mut y).arg(&number);
    match code(unsafe { launch.launch(config) }) {
        CUresult::CUDA_SUCCESS => Ok(stream.clone_dtoh(&y).unwrap()),
        refused => {
            let message = last_message();
            // After a fault nothing of the context can be freed.
            std::mem::forget(x);
            std::mem::forget(y);
            Err((refused, message))
        }
    }
}

/// Asserts that every seed refuses the launch with this code and these words.
fn assert_refused<T: std::fmt::Debug>(
    launch: impl Fn() -> Result<Vec<T>, (CUresult, String)>,
    expected: CUresult,
    words: &[&str],
) {
    for seed in SEEDS {
        configure("seed", seed);
        let (refused, message) = launch().err().unwrap_or_else(|| panic!("not refused with seed {seed}: {words:?}"));
        assert_eq!(refused, expected, "seed {seed}: {message}");
        for word in words {
            assert!(message.contains(word), "seed {seed}: `{word}` is not in: {message}");
        }
    }
}

mod sgemm {
    use super::*;

    const PTX: &str = include_str!("kernels/sgemm.ptx");
    /// Not multiples of the tile of 64x64x8.
    const M: usize = 70;
    const N: usize = 99;
    const K: usize = 37;

    fn launch(name: &str) -> Result<Vec<f32>, (CUresult, String)> {
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, name);
        let a = stream.clone_htod(&noise(M * K, 1)).unwrap();
        let b = stream.clone_htod(&noise(K * N, 2)).unwrap();
        let mut c: CudaSlice<f32> = unsafe { stream.alloc(M * N) }.unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&a).arg(&b).arg(&mut c);
        launch.arg(&(M as i32)).arg(&(N as i32)).arg(&(K as i32));
        match code(unsafe { launch.launch(shape(2, 2, 256)) }) {
            CUresult::CUDA_SUCCESS => Ok(stream.clone_dtoh(&c).unwrap()),
            refused => {
                let message = last_message();
                std::mem::forget(a);
                std::mem::forget(b);
                std::mem::forget(c);
                Err((refused, message))
            }
        }
    }

    #[test]
    fn agrees_with_the_cpu() {
        load();
        let (a, b) = (noise(M * K, 1), noise(K * N, 2));
        let product = |at: usize, k: usize| f64::from(a[at / N * K + k]) * f64::from(b[k * N + at % N]);
        let want: Vec<f64> = (0..M * N).map(|at| (0..K).map(|k| product(at, k)).sum()).collect();
        // A sum of K fused products: K roundings of at most half an ulp of the sum of magnitudes.
        let bound = |at: usize| K as f64 * 2f64.powi(-24) * (0..K).map(|k| product(at, k).abs()).sum::<f64>();
        for seed in SEEDS {
            configure("seed", seed);
            assert_close(&launch("sgemm").unwrap_or_else(|(_, why)| panic!("{why}")), &want, bound);
        }
    }

    #[test]
    fn bugs_are_refused() {
        load();
        assert_refused(
            || launch("sgemm_dropped_barrier"),
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            &["sgemm_dropped_barrier", "shared", "no barrier between"],
        );
        assert_refused(
            || launch("sgemm_off_by_one"),
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            &["sgemm_off_by_one", "ld.global"],
        );
        assert_refused(
            || launch("sgemm_uninitialised"),
            CUresult::CUDA_ERROR_LAUNCH_FAILED,
            &["sgemm_uninitialised", "nothing has written", "shared"],
        );
    }
}

mod reduction {
    use super::*;

    const PTX: &str = include_str!("kernels/reduce.ptx");
    const BLOCKS: u32 = 5;
    const COUNT: usize = 3000;

    fn launch(name: &str) -> Result<Vec<f32>, (CUresult, String)> {
        run(PTX, name, shape(BLOCKS, 1, 256), &noise(COUNT, 3), None, BLOCKS as usize, COUNT as i32)
    }

    #[test]
    fn agrees_with_the_cpu() {
        load();
        let x = noise(COUNT, 3);
        let share = |block: usize| (0..COUNT).filter(move |i| i / 256 % BLOCKS as usize == block);
        let want: Vec<f64> = (0..BLOCKS as usize).map(|block| share(block).map(|i| f64::from(x[i])).sum()).collect();
        // At most 3 additions per thread, then two butterflies of 5: 13 roundings of the sum of magnitudes.
        let bound = |block: usize| 13.0 * 2f64.powi(-24) * share(block).map(|i| f64::from(x[i].abs())).sum::<f64>();
        for seed in SEEDS {
            configure("seed", seed);
            assert_close(&launch("reduce_sum").unwrap_or_else(|(_, why)| panic!("{why}")), &want, bound);
        }
    }

    #[test]
    fn bugs_are_refused() {
        load();
        let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        assert_refused(
            || launch("reduce_off_by_one"),
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            &["reduce_off_by_one", "ld.global", "12000 bytes"],
        );
        assert_refused(
            || launch("reduce_uninitialised"),
            failed,
            &["reduce_uninitialised", "nothing has written", "shared"],
        );
        assert_refused(|| launch("reduce_inactive_lane"), failed, &["reduce_inactive_lane", "shfl"]);
        assert_refused(|| launch("reduce_global_race"), failed, &["reduce_global_race", "race"]);
        // Without the barrier a warp reads partials that another has written, or has not yet, depending on the
        // schedule.
        for seed in SEEDS {
            configure("seed", seed);
            let (refused, message) = launch("reduce_dropped_barrier").expect_err("refused");
            assert_eq!(refused, failed);
            assert!(message.contains("no barrier between") || message.contains("nothing has written"), "{message}");
        }
    }
}

mod softmax {
    use super::*;

    const PTX: &str = include_str!("kernels/softmax.ptx");
    const ROWS: usize = 4;
    const COLS: usize = 200;

    fn launch(name: &str) -> Result<Vec<f32>, (CUresult, String)> {
        run(PTX, name, shape(ROWS as u32, 1, 128), &noise(ROWS * COLS, 4), None, ROWS * COLS, COLS as i32)
    }

    #[test]
    fn agrees_with_the_cpu() {
        load();
        let x = noise(ROWS * COLS, 4);
        let mut want = Vec::new();
        for row in x.chunks(COLS) {
            let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
            want.extend(row.iter().map(|&v| f64::from(v).exp() / sum));
        }
        // expf is within 2 ulp, its argument within half; the sum has 2 + 7 roundings, the division one: below 16
        // half-ulps.
        let bound = |at: usize| 16.0 * 2f64.powi(-24) * want[at];
        for seed in SEEDS {
            configure("seed", seed);
            assert_close(&launch("softmax_rows").unwrap_or_else(|(_, why)| panic!("{why}")), &want, bound);
        }
    }

    #[test]
    fn bugs_are_refused() {
        load();
        let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        assert_refused(
            || launch("softmax_dropped_barrier"),
            failed,
            &["softmax_dropped_barrier", "shared", "no barrier between"],
        );
        // The last row's extra column is outside the input.
        assert_refused(
            || launch("softmax_off_by_one"),
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            &["softmax_off_by_one", "ld.global"],
        );
        assert_refused(|| launch("softmax_uninitialised"), failed, &["softmax_uninitialised", "nothing has written"]);
        // The same bug is also a race, and the schedule decides which is found first: only barriers are checked here.
        configure("checks", "bounds,uninitialised,barrier_divergence");
        assert_refused(
            || launch("softmax_divergent_barrier"),
            failed,
            &["softmax_divergent_barrier", "barrier divergence"],
        );
    }
}

mod mma_gemm {
    use super::*;

    const PTX: &str = include_str!("kernels/mma_gemm.ptx");
    const M: usize = 128;
    const N: usize = 64;
    const K: usize = 96;

    fn halves(count: usize, seed: u64) -> Vec<bf16> {
        noise(count, seed).into_iter().map(bf16::from_f32).collect()
    }

    fn launch(name: &str) -> Result<Vec<f32>, (CUresult, String)> {
        let (context, stream) = device(0);
        let function = kernel(&context, PTX, name);
        let a = stream.clone_htod(&halves(M * K, 5)).unwrap();
        let b = stream.clone_htod(&halves(N * K, 6)).unwrap();
        let mut c: CudaSlice<f32> = unsafe { stream.alloc(M * N) }.unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&a).arg(&b).arg(&mut c).arg(&(N as i32)).arg(&(K as i32));
        match code(unsafe { launch.launch(shape(N as u32 / 64, M as u32 / 64, 128)) }) {
            CUresult::CUDA_SUCCESS => Ok(stream.clone_dtoh(&c).unwrap()),
            refused => {
                let message = last_message();
                std::mem::forget(a);
                std::mem::forget(b);
                std::mem::forget(c);
                Err((refused, message))
            }
        }
    }

    #[test]
    fn agrees_with_the_cpu() {
        load();
        let (a, b) = (halves(M * K, 5), halves(N * K, 6));
        let product = |at: usize, k: usize| a[at / N * K + k].to_f64() * b[at % N * K + k].to_f64();
        let want: Vec<f64> = (0..M * N).map(|at| (0..K).map(|k| product(at, k)).sum()).collect();
        // Products of bf16 are exact in f32; at most K additions, each to within one ulp (tensor cores may truncate).
        let bound = |at: usize| K as f64 * 2f64.powi(-23) * (0..K).map(|k| product(at, k).abs()).sum::<f64>();
        for seed in SEEDS {
            configure("seed", seed);
            assert_close(&launch("mma_gemm").unwrap_or_else(|(_, why)| panic!("{why}")), &want, bound);
        }
    }

    #[test]
    fn bugs_are_refused() {
        load();
        let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        assert_refused(
            || launch("mma_gemm_dropped_barrier"),
            failed,
            &["mma_gemm_dropped_barrier", "no barrier between"],
        );
        assert_refused(
            || launch("mma_gemm_off_by_one"),
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            &["mma_gemm_off_by_one", "cp.async"],
        );
        // What cp.async copies is late when nothing waits for it: the first tiles have not arrived.
        assert_refused(|| launch("mma_gemm_dropped_wait"), failed, &["mma_gemm_dropped_wait", "ldmatrix"]);
    }
}

mod histogram {
    use super::*;

    const PTX: &str = include_str!("kernels/histogram.ptx");
    const COUNT: usize = 5000;

    fn bytes() -> Vec<u8> {
        noise(COUNT, 7).into_iter().map(|v| ((v + 1.0) * 128.0) as u8).collect()
    }

    fn launch(name: &str, bins: Option<&[u32]>) -> Result<Vec<u32>, (CUresult, String)> {
        run(PTX, name, shape(3, 1, 256), &bytes(), bins, 256, COUNT as i32)
    }

    #[test]
    fn agrees_with_the_cpu() {
        load();
        let mut want = vec![10u32; 256];
        bytes().into_iter().for_each(|v| want[usize::from(v)] += 1);
        for seed in SEEDS {
            configure("seed", seed);
            let got = launch("histogram", Some(&[10; 256])).unwrap_or_else(|(_, why)| panic!("{why}"));
            assert_eq!(got, want);
        }
    }

    #[test]
    fn bugs_are_refused() {
        load();
        let failed = CUresult::CUDA_ERROR_LAUNCH_FAILED;
        let zeros = Some([0u32; 256].as_slice());
        assert_refused(
            || launch("histogram_not_atomic", zeros),
            failed,
            &["histogram_not_atomic", "shared", "no barrier between"],
        );
        assert_refused(
            || launch("histogram_uninitialised", zeros),
            failed,
            &["histogram_uninitialised", "nothing has written", "shared"],
        );
        assert_refused(
            || launch("histogram_off_by_one", zeros),
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
            &["histogram_off_by_one", "shared"],
        );
        // Bins that the host forgot to zero.
        assert_refused(|| launch("histogram", None), failed, &["histogram", "nothing has written"]);
        for seed in SEEDS {
            configure("seed", seed);
            let (refused, message) = launch("histogram_dropped_barrier", zeros).expect_err("refused");
            assert_eq!(refused, failed);
            assert!(message.contains("no barrier between") || message.contains("nothing has written"), "{message}");
        }
    }
}

#[test]
fn every_order_gives_the_same_bits() {
    load();
    // Reductions here have a fixed order, so schedules must not show.
    let launch = |seed: &str| {
        configure("seed", seed);
        let x = noise(3000, 8);
        run::<f32, f32>(include_str!("kernels/reduce.ptx"), "reduce_sum", shape(5, 1, 256), &x, None, 5, 3000)
            .expect("runs")
    };
    let first = launch("none");
    for seed in SEEDS {
        let bits = |sums: &[f32]| sums.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&launch(seed)), bits(&first));
    }
}
