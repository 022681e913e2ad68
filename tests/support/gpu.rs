//! GPUs for tests: by default the emulator, which cargo builds beside the tests, with all its checks; with `DDPM_TEST_DEVICE=cuda` the real one.
//!
//! [`each`] runs a test in both types of activations and in several orders of blocks and warps. That the tests would see a bug is itself
//! tested: [`notices`] and [`notices_lost_block`] plant one in a kernel, `plant` several.

use std::ffi::{CString, c_char, c_int};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use ddpm_cuda::device::Device;
use ddpm_cuda::device::cpu::simd::{self, Level};
use ddpm_cuda::device::cuda::{self, Gpu};
use ddpm_cuda::kernels;
use ddpm_cuda::tensor::DType;

use super::{plant, same_bits};

/// Unit of relative rounding of a bf16, which has 8 significant bits: half a unit in the last place.
pub const BF16_ROUNDING: f64 = 1.0 / 256.0;

/// Orders in which the emulator runs blocks and warps: as they come, and three drawn at random.
pub const SCHEDULES: [&str; 4] = ["none", "1", "2", "3"];

/// The emulator's shared library: cargo puts it beside the tests' own executables.
pub fn emulator() -> PathBuf {
    let executable = std::env::current_exe().expect("a test knows its own path");
    let path = executable.parent().expect("an executable is in a folder").join("libcuda_emu.so");
    assert!(path.is_file(), "{} is not built", path.display());
    path
}

/// True if kernels can be tested; says so loudly if they cannot.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if kernels::COMPILER.is_none() {
            // Not by `eprintln!`, which the test harness keeps to itself.
            let said = "\n*** SKIPPED: no kernel is tested, since none was compiled; build with DDPM_CUDA_TOOLCHAIN=fetch ***\n";
            let _ = std::io::stderr().write_all(said.as_bytes());
            return false;
        }
        match std::env::var("DDPM_TEST_DEVICE").as_deref() {
            Ok("cuda") => {}
            Ok("emulated") | Err(_) => cuda::open_driver(&emulator()).expect("the emulator opens"),
            Ok(other) => panic!("DDPM_TEST_DEVICE is {other}: use emulated or cuda"),
        }
        true
    })
}

/// A guarded GPU with activations of type `dtype`; `None` if kernels cannot be tested.
pub fn gpu(dtype: DType) -> Option<Gpu> {
    available().then(|| {
        let gpu = Gpu::open(0, dtype, true).expect("the GPU opens");
        if let Ok(bug) = std::env::var(BUG) {
            let [entry, from, to]: [&str; 3] = bug.split('|').collect::<Vec<_>>().try_into().expect("ENTRY|FROM|TO");
            let kernel = kernels::ALL.iter().find(|k| k.name == entry).unwrap_or_else(|| panic!("no kernel {entry}"));
            let (stem, ptx) = match from {
                LAST_BLOCK => plant::without_last_block(entry).plant(),
                BARRIER => plant::without_barrier(entry, to.parse().expect("a number")).plant(),
                _ => (kernel.module.stem, mutated(kernel.module.ptx, entry, from, to)),
            };
            gpu.replace_kernels(stem, ptx);
        }
        gpu
    })
}

/// Variable that plants a bug in every GPU of the process: `ENTRY|FROM|TO`.
const BUG: &str = "DDPM_TEST_BUG";

/// Stands for the text to be replaced where it is a barrier, counted from 0.
const BARRIER: &str = "the barrier";

/// [`notices`] for a kernel without its `n`-th barrier, counted from 0 in its PTX.
#[track_caller]
pub fn notices_lost_barrier(test: &str, entry: &str, n: usize) {
    notices(test, entry, BARRIER, &n.to_string());
}

/// Stands for the text to be replaced where the last block is to do nothing.
const LAST_BLOCK: &str = "the last block";

/// [`notices`] for a kernel whose last block (along x) does nothing, as if the grid were too small.
#[track_caller]
pub fn notices_lost_block(test: &str, entry: &str) {
    notices(test, entry, LAST_BLOCK, "");
}

/// `ptx` with the last `from` of an entry's text replaced by `to`.
fn mutated(ptx: &str, entry: &str, from: &str, to: &str) -> String {
    let start = ptx.find(&format!(".entry {entry}(")).unwrap_or_else(|| panic!("no entry {entry}"));
    let end = ptx[start + 1..].find(".entry ").map_or(ptx.len(), |next| start + 1 + next);
    let at = ptx[start..end].rfind(from).unwrap_or_else(|| panic!("{entry} has no `{from}`"));
    format!("{}{to}{}", &ptx[..start + at], &ptx[start + at + from.len()..])
}

/// Asserts that `test` of this executable fails once the last `from` of a kernel's PTX reads `to`. It runs in a process of its own, since a kernel's fault
/// breaks the context for all; on a real GPU not at all, since there a lost barrier may go unnoticed.
#[track_caller]
pub fn notices(test: &str, entry: &str, from: &str, to: &str) {
    if !available() || std::env::var("DDPM_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        return;
    }
    let run = |bug: &str| {
        let mut command = Command::new(std::env::current_exe().expect("a test knows its own path"));
        command.args(["--exact", test]).env(BUG, bug).output().expect("a test runs")
    };
    let output = run(&format!("{entry}|{from}|{to}"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "there is no test {test}: {text}");
    assert!(!text.contains("has no `"), "{text}");
    assert!(
        !text.contains(&format!("loading {entry}")),
        "{entry} is no kernel any more with `{to}` for `{from}`: {text}"
    );
    assert!(!output.status.success(), "{test} passes with `{from}` of {entry} replaced by `{to}`: {text}");
}

/// Sets how the emulator runs this thread's launches; nothing on a real GPU.
pub fn configure(name: &str, value: &str) {
    // SAFETY: opens what is open already, by the name that cudarc finds it under, and calls what include/cuda_emu.h declares.
    unsafe {
        let Ok(driver) = libloading::Library::new("libcuda.so") else { return };
        let Ok(function) =
            driver.get::<unsafe extern "C" fn(*const c_char, *const c_char) -> c_int>(b"emu_configure\0")
        else {
            return;
        };
        let [name, value] = [name, value].map(|s| CString::new(s).expect("no zero bytes"));
        assert_eq!(function(name.as_ptr(), value.as_ptr()), 0, "emu_configure({name:?}, {value:?})");
    }
}

/// Set where it is only asked which kernels a test launches: [`each`] then takes the first schedule alone.
pub const ONE_SCHEDULE: &str = "DDPM_TEST_ONE_SCHEDULE";

/// Runs `f` on a guarded GPU with f32 and one with bf16 activations, in every schedule; whatever it returns must have the same bits in each.
#[track_caller]
pub fn each(name: &str, f: impl Fn(&Device) -> Vec<f32>) {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu(dtype) else { return };
        let device = Device::Cuda(gpu);
        let mut first: Option<Vec<f32>> = None;
        let schedules = if std::env::var_os(ONE_SCHEDULE).is_some() { 1 } else { SCHEDULES.len() };
        for schedule in &SCHEDULES[..schedules] {
            configure("seed", schedule);
            let got = f(&device);
            match &first {
                None => first = Some(got),
                Some(first) => same_bits(&format!("{name}, {dtype:?}, schedule {schedule}"), &got, first),
            }
        }
        configure("seed", "none");
        assert_eq!(device.pool_stats().in_use, 0, "{name}: bytes still in use");
    }
}

/// One rounding of a result of type `dtype`, relative.
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

/// The same for f32.
pub fn rounded_f32(dtype: DType, x: &[f32]) -> Vec<f32> {
    match dtype {
        DType::F32 => x.to_vec(),
        DType::Bf16 => x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect(),
    }
}

/// True if the CPU path has fused multiply-adds, as every GPU has; without them it rounds once more.
pub fn cpu_fuses() -> bool {
    simd::level() != Level::Portable || cfg!(target_arch = "aarch64")
}
