//! GPUs for tests: by default the emulator ([`places::emulator`]) with all its checks; with `DDPM_TEST_DEVICE=cuda` a
//! real one.
//!
//! [`each`] runs a test with both activation types, [`each_precision`] in tf32 too, in several orders of blocks and
//! warps. `plant` tests that the tests notice bugs.

use std::ffi::{CString, c_char, c_int};
use std::io::Write;
use std::sync::OnceLock;

use ddpm_cuda::device::cpu::simd::{Isa, Level};
use ddpm_cuda::device::cuda::{self, Gpu};
use ddpm_cuda::device::{Device, Precision};
use ddpm_cuda::kernels;
use ddpm_cuda::tensor::DType;

use super::{places, plant, same_bits};

/// Unit of relative rounding of a bf16, which has 8 significant bits: half a unit in the last place.
pub const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// Orders in which the emulator runs blocks and warps: ascending, and three random ones.
pub const SCHEDULES: [&str; 4] = ["none", "1", "2", "3"];

/// The value of `DDPM_TEST_DEVICE` that asks for a real GPU.
const REAL: &str = "cuda";

/// Reports what is not tested, bypassing the test harness, which hides what `eprintln!` writes in a passing test.
pub fn skip(what: &str) {
    // In one call, so that lines of concurrent tests do not mix. A closed stderr is no reason to fail.
    let _ = std::io::stderr().write_all(format!("\n*** SKIPPED: {what} ***\n").as_bytes());
}

/// True on the emulator, for tests of what only it can simulate: a small or an old GPU, a bug in a kernel. On a real
/// GPU reports `what` as skipped.
pub fn emulated(what: &str) -> bool {
    let real = is_real();
    if real {
        skip(&format!("{what}: only on the emulator, not with DDPM_TEST_DEVICE={REAL}"));
    }
    available() && !real
}

/// True if the tests run on a real GPU.
pub fn is_real() -> bool {
    std::env::var("DDPM_TEST_DEVICE").is_ok_and(|device| device == REAL)
}

/// True if kernels can be tested; reports it if they cannot.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let skipped = |why: &str| {
            skip(&format!("no kernel is tested, since {why}"));
            false
        };
        if kernels::COMPILER.is_none() {
            return skipped("none was compiled; build with DDPM_CUDA_TOOLCHAIN=fetch");
        }
        match std::env::var("DDPM_TEST_DEVICE").as_deref() {
            Ok(REAL) => {}
            Ok("emulated") | Err(_) if cfg!(not(target_os = "linux")) => {
                return skipped("the emulator runs on Linux; test a GPU with DDPM_TEST_DEVICE=cuda");
            }
            // SAFETY: the emulator is a CUDA driver.
            Ok("emulated") | Err(_) => unsafe { cuda::open_driver(&places::emulator()) }.expect("the emulator opens"),
            Ok(other) => panic!("DDPM_TEST_DEVICE is {other}: use emulated or cuda"),
        }
        true
    })
}

/// Set to have guard words on the emulator too, as on a real GPU: to test the guards, not the kernels.
const GUARD_WORDS: &str = "DDPM_TEST_GUARD_WORDS";

/// A guarded GPU for a precision, or for that of a type of activations, with the planted bug if there is one; `None` if
/// kernels cannot be tested.
pub fn gpu(precision: impl Into<Precision>) -> Option<Gpu> {
    let precision = precision.into();
    available().then(|| {
        let open = match std::env::var_os(GUARD_WORDS) {
            Some(_) => Gpu::open_with_guard_words(0, precision),
            None => Gpu::open(0, precision, true),
        };
        let gpu = open.expect("the GPU opens");
        if let Some((stem, ptx)) = plant::planted() {
            // SAFETY: entries and parameters are the stem's, and the emulator checks every access.
            unsafe { gpu.replace_kernels(stem, ptx) };
        }
        gpu
    })
}

/// Sets how the emulator runs this thread's launches. A real GPU has no such settings. Fails on an emulator without
/// them, since the tests would then claim schedules that never ran.
pub fn configure(name: &str, value: &str) {
    if is_real() || !available() {
        return;
    }
    // SAFETY: reopens the library that is already open, by the name that cudarc finds it under, and calls the function
    // that include/cuda_emu.h declares, with two zero-terminated strings that live until the call returns.
    unsafe {
        let driver = libloading::Library::new("libcuda.so").expect("the emulator is open under the name of the driver");
        let function = driver.get::<unsafe extern "C" fn(*const c_char, *const c_char) -> c_int>(b"emu_configure\0");
        let function = function.expect("the driver that answers to libcuda.so is the emulator");
        let [name, value] = [name, value].map(|s| CString::new(s).expect("no zero bytes"));
        assert_eq!(function(name.as_ptr(), value.as_ptr()), 0, "emu_configure({name:?}, {value:?})");
    }
}

/// The emulator's counters of every launch of this process so far, summed per kernel.
pub fn counters() -> serde_json::Value {
    assert!(available() && !is_real(), "counters are the emulator's");
    // SAFETY: reopens the emulator as `configure` does, and calls the function that include/cuda_emu.h declares: first
    // without room for the text, to learn how many bytes it takes, which a launch meanwhile may raise.
    unsafe {
        let driver = libloading::Library::new("libcuda.so").expect("the emulator is open under the name of the driver");
        let function = driver.get::<unsafe extern "C" fn(*mut c_char, *mut usize) -> c_int>(b"emu_profile_json\0");
        let function = function.expect("the driver that answers to libcuda.so is the emulator");
        let mut text = Vec::<u8>::new();
        let mut bytes = 0;
        while function(text.as_mut_ptr().cast(), &mut bytes) != 0 || bytes > text.len() {
            text.resize(2 * bytes, 0);
            bytes = text.len();
        }
        let text = std::ffi::CStr::from_bytes_until_nul(&text).expect("a text that ends with a zero");
        serde_json::from_str(text.to_str().expect("UTF-8")).expect("JSON")
    }
}

/// Set when a test only has to show which kernels it launches: [`each`] then uses only the first schedule.
pub const ONE_SCHEDULE: &str = "DDPM_TEST_ONE_SCHEDULE";

/// Runs `f` on guarded GPUs with f32 and with bf16 activations, in every schedule. For each type, its result must have
/// the same bits in all schedules, and no buffer may stay in use.
#[track_caller]
pub fn each(name: &str, f: impl Fn(&Device) -> Vec<f32>) {
    each_of(name, &[Precision::F32, Precision::Bf16], f);
}

/// [`each`] in tf32 too, for operations that have products of their own there.
#[track_caller]
pub fn each_precision(name: &str, f: impl Fn(&Device) -> Vec<f32>) {
    each_of(name, &Precision::ALL, f);
}

/// [`each`] in these precisions.
#[track_caller]
pub fn each_of(name: &str, precisions: &[Precision], f: impl Fn(&Device) -> Vec<f32>) {
    for &precision in precisions {
        let Some(gpu) = gpu(precision) else { return };
        let device = Device::Cuda(gpu);
        let mut first: Option<Vec<f32>> = None;
        let schedules = if std::env::var_os(ONE_SCHEDULE).is_some() { 1 } else { SCHEDULES.len() };
        for schedule in &SCHEDULES[..schedules] {
            configure("seed", schedule);
            let got = f(&device);
            assert!(!got.is_empty(), "{name}: no numbers to compare between schedules");
            match &first {
                None => first = Some(got),
                Some(first) => same_bits(&format!("{name}, {precision}, schedule {schedule}"), &got, first),
            }
        }
        configure("seed", "none");
        assert_eq!(device.pool_stats().in_use, 0, "{name}: bytes still in use");
    }
}

/// Largest relative rounding error of a result of type `dtype`.
pub fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => super::F32_ROUNDING,
        DType::Bf16 => BF16_ROUNDING,
    }
}

/// `x` rounded to what a tensor of type `dtype` can hold.
pub fn rounded(dtype: DType, x: &[f64]) -> Vec<f64> {
    match dtype {
        DType::F32 => x.to_vec(),
        DType::Bf16 => x.iter().map(|&x| half::bf16::from_f32(x as f32).to_f64()).collect(),
    }
}

/// `x` as the products of convolutions and linear layers take it: in tf32 as `cvt.rna.tf32.f32` rounds finite numbers,
/// to 10 bits of fraction, to nearest, ties away from zero.
pub fn multiplied(precision: Precision, x: &[f64]) -> Vec<f64> {
    let tf32 = |x: f64| f64::from(f32::from_bits(((x as f32).to_bits() + 0x1000) & !0x1fff));
    match precision {
        Precision::Tf32 => x.iter().map(|&x| tf32(x)).collect(),
        Precision::F32 | Precision::Bf16 => x.to_vec(),
    }
}

/// What tensor cores may lose of a sum of `depth` products that are below one: on a GPU they may cut what an addition
/// cannot hold instead of rounding it, and add four to sixteen products at a time, at most an ulp, 2^-23 of a partial
/// sum, for each addition. The emulator rounds each to nearest, like the reference in f32.
pub fn cut(depth: usize) -> f64 {
    if is_real() { (depth * depth) as f64 / 4.0 * 2f64.powi(-23) } else { 0.0 }
}

/// [`rounded`] for f32.
pub fn rounded_f32(dtype: DType, x: &[f32]) -> Vec<f32> {
    match dtype {
        DType::F32 => x.to_vec(),
        DType::Bf16 => x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
    }
}

/// True if the CPU path uses fused multiply-adds, as every GPU does; without them it rounds once more.
pub fn cpu_fuses() -> bool {
    Isa::best().level() != Level::Portable || cfg!(target_arch = "aarch64")
}
