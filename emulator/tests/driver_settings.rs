//! Settings that belong to a whole process. Each runs in a child process: this executable, with a variable that selects
//! the role.

#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "each passes a kernel or a call the arguments that it declares, or wrong ones on purpose"
)]

mod support;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaContext, LaunchConfig, PushKernelArg, result};
use std::process::{Command, Output};
use support::{code, device, kernel};

const BASIC: &str = include_str!("kernels/basic.ptx");
const ROLE: &str = "CUDA_EMU_TEST_ROLE";

/// Runs `role` in a process of its own under `settings`.
fn child(role: &str, settings: &[(&str, &str)]) -> Output {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "roles", "--nocapture"])
        .env_remove("CUDA_EMU_LOG")
        .env(ROLE, role)
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    assert!(output.status.success() && stdout(&output).contains("1 passed"), "{role}: {output:?}");
    output
}

/// What a child process does; in the parent, where no role is set, there is nothing to do.
#[test]
fn roles() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    match role.as_str() {
        "start" => {
            support::open();
            println!("cuInit says {:?}", code(result::init()));
        }
        "describe" => {
            support::load(&[]);
            let (context, _stream) = device(0);
            let (major, minor) = context.compute_capability().unwrap();
            println!(
                "devices {}, {major}.{minor}, {} bytes",
                CudaContext::device_count().unwrap(),
                context.total_mem().unwrap()
            );
        }
        "work" => {
            support::load(&[]);
            let (context, stream) = device(0);
            let fill = kernel(&context, BASIC, "fill");
            let mut x = stream.alloc_zeros::<f32>(100).unwrap();
            for _ in 0..3 {
                let mut launch = stream.launch_builder(&fill);
                launch.arg(&mut x).arg(&1.0f32).arg(&100i32);
                // SAFETY: the arguments are the kernel's.
                unsafe { launch.launch(LaunchConfig::for_num_elems(100)) }.unwrap();
            }
        }
        role => panic!("no role {role}"),
    }
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_machine_is_what_the_variables_say() {
    let settings = [("CUDA_EMU_DEVICES", "3"), ("CUDA_EMU_CC", "9.0"), ("CUDA_EMU_MEMORY", "128M")];
    let output = child("describe", &settings);
    let expected = format!("devices 3, 9.0, {} bytes", 128 << 20);
    assert!(stdout(&output).contains(&expected), "{output:?}");
}

#[test]
fn no_device_and_wrong_settings_make_cuinit_fail() {
    let none = child("start", &[("CUDA_EMU_DEVICES", "0")]);
    let expected = format!("{:?}", CUresult::CUDA_ERROR_NO_DEVICE);
    assert!(stdout(&none).contains(&expected), "{none:?}");
    let wrong = child("start", &[("CUDA_EMU_CHECKS", "bonds")]);
    let expected = format!("{:?}", CUresult::CUDA_ERROR_INVALID_VALUE);
    assert!(stdout(&wrong).contains(&expected), "{wrong:?}");
    let stderr = String::from_utf8_lossy(&wrong.stderr);
    assert!(stderr.contains("CUDA_EMU_CHECKS=bonds: there is no check `bonds`"), "{stderr}");
}

#[test]
fn the_profile_is_written_and_the_same_every_time() {
    let folder = std::env::temp_dir().join(format!("cuda_emu-profile-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let written = ["1", "2"].map(|run| {
        let path = folder.join(run);
        // A seed changes the order of blocks, not what they do.
        child("work", &[("CUDA_EMU_PROFILE", path.to_str().unwrap()), ("CUDA_EMU_SEED", run)]);
        std::fs::read_to_string(&path).unwrap()
    });
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!(written[0], written[1]);
    let profile: serde_json::Value = serde_json::from_str(&written[0]).unwrap();
    let kernels = profile["kernels"].as_array().unwrap();
    assert_eq!(kernels.len(), 1);
    assert_eq!(kernels[0]["name"], "fill");
    assert_eq!(kernels[0]["launches"], 3);
    assert_eq!(kernels[0]["global_store_bytes"], 3 * 400);
}

#[test]
fn calls_are_named_when_asked() {
    let output = child("work", &[("CUDA_EMU_LOG", "calls")]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("cuda_emu: cuLaunchKernel\n"), "{stderr}");
    let output = child("work", &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!stderr.contains("cuda_emu: cuLaunchKernel"), "{stderr}");
}
