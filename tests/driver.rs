//! What surrounds the kernels on a GPU (emulated unless DDPM_TEST_DEVICE says otherwise): guard words, copies of
//! nothing, and what `DDPM_TRACE` and `DDPM_KERNELS` do.

mod support;

use std::path::Path;
use std::process::Command;

use ddpm_cuda::device::cuda::Gpu;
use ddpm_cuda::kernels;
use ddpm_cuda::tensor::{DType, Shape};

use support::{gpu, places};

/// A GPU with guard words; `None` if kernels cannot be tested.
fn guarded() -> Option<Gpu> {
    gpu::available().then(|| Gpu::open_with_guard_words(0, DType::F32).unwrap())
}

#[test]
fn buffers_of_every_size_lie_between_guards() {
    let Some(gpu) = guarded() else { return };
    for bytes in (0..=9).chain([254, 255, 256, 257, 1023]) {
        let buffer = gpu.alloc(bytes).unwrap();
        let mut content = vec![0u8; bytes];
        gpu.download(&mut content, &buffer).unwrap();
        assert!(content.iter().all(|&byte| byte == 0xff), "{bytes} bytes are {content:?}, which is not NaN");
    }
}

/// What a kernel does that writes one element too many, or one too early.
#[test]
fn a_write_beside_a_buffer_is_noticed() {
    let Some(gpu) = guarded() else { return };
    // 12 bytes hold five bf16 and one more: the kernel is told of eight elements, and writes all eight.
    for (bytes, elements) in [(10, 6), (6, 4), (15, 8), (8, 5)] {
        let mut x = gpu.alloc(2 * elements).unwrap();
        gpu.upload(&mut x, &vec![0u8; 2 * elements]).unwrap();
        let mut y = gpu.alloc(bytes).unwrap();
        let shape = Shape::new(1, 1, 1, elements);
        // SAFETY: reads inside x; what it writes beyond y is y's guard.
        let launch = unsafe { gpu.launch_any(&kernels::silu::FWD.bf16, [1, 1, 1], 256) };
        let from = ddpm_cuda::device::cuda::Array { buffer: &x, shape, dtype: DType::Bf16 };
        launch.array_mut(&mut y, shape, DType::Bf16).array(from).u64(elements).run().unwrap();
        let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(y)));
        let said = *dropped.expect_err("the write is noticed").downcast::<String>().unwrap();
        assert_eq!(said, format!("a kernel wrote past the end of a buffer of {bytes} bytes"));
    }
}

#[test]
fn nothing_can_be_copied_and_filled() {
    let Some(device) = gpu::gpu(DType::F32) else { return };
    let (mut a, mut b) = (device.alloc(0).unwrap(), device.alloc(0).unwrap());
    device.upload::<u8>(&mut a, &[]).unwrap();
    device.fill(&mut a, 0, 0, 7).unwrap();
    device.copy(&mut b, 0, &a).unwrap();
    device.download::<u8>(&mut [], &b).unwrap();
}

/// The program in a folder, on a GPU.
fn program(folder: &Path) -> Command {
    let mut command = Command::new(places::program());
    command.current_dir(folder).env("CUDA_EMU_LOG", "none").args(["train", "--device", "cuda", "--out", "run"]);
    if !gpu::is_real() {
        command.env("DDPM_CUDA_DRIVER", places::emulator());
    }
    command.args(support::TINY).args(support::PLAIN).args(["--steps", "2", "--batch", "2", "--set", "sample_every=0"]);
    command.args(["--set", "validate_every=0"]);
    command
}

/// Exit code, stdout and stderr.
fn said(command: &mut Command) -> (Option<i32>, String, String) {
    let out = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn traces() {
    let folder = tempfile::tempdir().unwrap();
    if !gpu::available() {
        return;
    }
    let traced = |how: &str| {
        let _ = std::fs::remove_dir_all(folder.path().join("run"));
        said(program(folder.path()).env("DDPM_TRACE", how))
    };
    let (code, _, printed) = traced("1");
    let launches = printed.lines().filter(|line| line.contains(" blocks of ")).count();
    assert!(code == Some(0) && launches > 100, "{printed}");

    let (code, _, times) = traced("time");
    assert_eq!(code, Some(0), "{times}");
    let parsed: Vec<(&str, usize, f64, f64)> = times
        .lines()
        .map(|line| {
            let parts: Vec<&str> = line.strip_prefix("kernel time: ").expect(line).split(", ").collect();
            let number = |part: usize, unit: &str| parts[part].strip_suffix(unit).expect(line).parse::<f64>().unwrap();
            (parts[0], number(1, " launches") as usize, number(2, " ms"), number(3, " %"))
        })
        .collect();
    let (all, kernels) = parsed.split_first().expect("there are times");
    assert_eq!((all.0, all.1, all.3), ("all kernels", launches, 100.0), "{times}");
    assert_eq!(kernels.iter().map(|of| of.1).sum::<usize>(), launches, "{times}");
    let sum: f64 = kernels.iter().map(|of| of.2).sum();
    // Each is rounded to a thousandth.
    assert!((sum - all.2).abs() <= 0.0005 * (kernels.len() + 1) as f64 && sum > 0.0, "{times}");
    assert!(kernels.is_sorted_by(|a, b| a.2 >= b.2), "{times}");
    for (name, ..) in kernels {
        assert!(kernels::ALL.iter().any(|kernel| kernel.name == *name), "{name}");
    }

    let (code, _, waited) = traced("sync");
    assert_eq!((code, &waited[..]), (Some(0), ""));
    if !gpu::is_real() {
        // The emulator's log has a line for each call.
        let _ = std::fs::remove_dir_all(folder.path().join("run"));
        let (_, _, calls) = said(program(folder.path()).env("DDPM_TRACE", "sync").env("CUDA_EMU_LOG", "calls"));
        let count = |name: &str| calls.lines().filter(|line| line.contains(name)).count();
        assert_eq!(count("cuLaunchKernel"), launches);
        assert!(count("cuStreamSynchronize") >= launches, "{} waits", count("cuStreamSynchronize"));
    }
    let (code, _, error) = traced("fast");
    let want =
        "ddpm-cuda: DDPM_TRACE is fast: use 1 (print each launch), sync (wait for each) or time (sums by kernel)\n";
    assert_eq!((code, &error[..]), (Some(2), want));
}

/// Kernels of a folder replace the build's, and say so; a fault in them shows that they ran.
#[test]
fn kernels_of_a_folder_are_used() {
    let folder = tempfile::tempdir().unwrap();
    if !gpu::emulated("kernels with faults") {
        return;
    }
    let kernels = folder.path().join("kernels");
    std::fs::create_dir(&kernels).unwrap();
    let run = || {
        let _ = std::fs::remove_dir_all(folder.path().join("run"));
        said(program(folder.path()).env("DDPM_KERNELS", &kernels))
    };
    let (code, _, error) = run();
    assert_eq!(code, Some(1));
    assert!(error.contains("kernels: holds no kernels: DDPM_KERNELS names a folder of PTX files"), "{error}");

    let ptx = kernels::silu::FWD.f32.module.ptx();
    std::fs::write(kernels.join("silu.ptx"), ptx).unwrap();
    let (code, out, error) = run();
    assert_eq!((code, &error[..]), (Some(0), ""));
    assert!(out.contains("/kernels replace the build's: silu\n"), "{out}");

    std::fs::write(kernels.join("silu.ptx"), ptx.replace("\tret;", "\ttrap;\n\tret;")).unwrap();
    let (code, _, error) = run();
    assert!(code == Some(1) && error.contains("launching silu_fwd_f32 on "), "{error}");

    std::fs::write(kernels.join("silu.ptx"), ptx.replacen(".param .u64 ", ".param .u32 ", 1)).unwrap();
    let (code, _, error) = run();
    assert_eq!((code, error.lines().count()), (Some(1), 1), "{error}");
    assert!(error.contains("silu.ptx: silu_") && error.contains(" takes parameters of [4, 8"), "{error}");
    std::fs::write(kernels.join("silu.ptx"), ptx.replace("silu_fwd_f32", "silu_forward")).unwrap();
    let (code, _, error) = run();
    assert!(code == Some(1) && error.contains("silu.ptx: has no entry silu_fwd_f32; compile the whole of silu.cu"));
}
