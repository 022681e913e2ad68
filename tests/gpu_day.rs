//! The folder that benches/gpu/pack.sh makes for a machine with a GPU, used as there: moved to another place, without
//! cargo and without this process's environment, on the emulator. And that tests which were carried along find what
//! they need.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use ddpm_cuda::kernels;
use ddpm_cuda::ops::add::add;
use ddpm_cuda::tensor::Shape;
use serde_json::{Value, json};

use support::places::{self, fixture};
use support::{gpu, numbers, same_as_the_cpu, to_f32};

/// Everything that a test asks [`places`] for, and a kernel. Also runs in the packed folder.
#[test]
fn what_a_carried_test_needs_is_found() {
    if !gpu::available() {
        return;
    }
    assert!(fs::read_to_string(fixture("unet_gray16/config.json")).unwrap().contains("UNet2DModel"));
    let said = Command::new(places::program()).arg("info").output().unwrap();
    assert!(String::from_utf8_lossy(&said.stdout).contains("compiled by CUDA"), "{said:?}");
    let shape = Shape::new(2, 3, 5, 7);
    let [a, b, dy] = [1, 2, 3].map(|seed| to_f32(&numbers(seed, shape.len())));
    same_as_the_cpu("add", &[(shape, a), (shape, b)], &[], &dy, 1, |tape, x, _| add(tape, &x[0], &x[1]));
}

/// A setting is obeyed, and one that leads nowhere is said with its name.
#[test]
fn a_place_that_does_not_exist_is_named() {
    if !gpu::emulated("that a wrong place is named") {
        return;
    }
    for variable in [places::ROOT, places::PROGRAM, places::EMULATOR] {
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args(["--exact", "what_a_carried_test_needs_is_found"]).env(variable, "no/such/place");
        let out = test.output().unwrap();
        let said = text(&out);
        assert!(!out.status.success() && said.contains("no/such/place") && said.contains(variable), "{said}");
    }
}

fn text(out: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

/// The Python that `day.sh` shall use; `None` if there is none.
fn python() -> Option<String> {
    let found = Command::new("python3").args(["-c", "import sys, lzma; print(sys.executable)"]).output().ok()?;
    found.status.success().then(|| String::from_utf8_lossy(&found.stdout).trim().to_string())
}

/// The compiler of the kernels, if it is still there.
fn nvcc() -> Option<PathBuf> {
    Some(Path::new(kernels::PTXAS?).with_file_name("nvcc")).filter(|nvcc| nvcc.is_file())
}

/// Runs `day.sh` in `folder` as somebody does who has nothing else, and returns what it said and the record.
fn day(folder: &Path, python: &str, args: &[&str]) -> (Output, Value) {
    let mut day = Command::new("sh");
    day.arg(folder.join("day.sh")).args(args).current_dir("/").env_clear();
    day.envs([("PATH", "/usr/bin:/bin"), ("PYTHON", python), ("DDPM_TRACE", "1")])
        .envs(nvcc().map(|nvcc| ("NVCC", nvcc)));
    let out = day.output().unwrap();
    let record = fs::read(folder.join("record.json")).unwrap_or_else(|e| panic!("{e}: {}", text(&out)));
    (out, serde_json::from_slice(&record).unwrap())
}

#[test]
fn a_day_runs_in_a_folder_that_was_packed_and_moved() {
    if std::env::var_os(places::ROOT).is_some() {
        return gpu::skip("a day on the emulator: the tests were carried, and what packs them was not");
    }
    if !gpu::emulated("a day on the emulator") {
        return;
    }
    let Some(python) = python() else {
        return gpu::skip("a day on the emulator: there is no python3 with lzma");
    };
    let folder = tempfile::tempdir().unwrap();
    let (packed, moved) = (folder.path().join("packed"), folder.path().join("moved to another place"));
    let mut pack = Command::new("bash");
    pack.arg(places::root().join("benches/gpu/pack.sh")).arg("--program").arg(places::program());
    pack.arg("--emulator").arg(places::emulator()).args(["--kernels", env!("OUT_DIR"), "--test"]);
    pack.arg(format!("gpu_day={}", std::env::current_exe().unwrap().display())).arg(&packed);
    let out = pack.output().unwrap();
    assert!(out.status.success(), "{}", text(&out));
    fs::rename(&packed, &moved).unwrap();

    let (out, record) = day(&moved, &python, &["--emulated", "all"]);
    let said = text(&out);
    assert!(out.status.success(), "{said}");
    assert_eq!((&record["emulated"], &record["format"]), (&json!(true), &json!(1)));
    assert!(record["compiler"].as_str().is_some_and(|c| c.starts_with("CUDA ")), "{}", record["compiler"]);
    assert!(record["commit"].as_str().is_some_and(|c| c == "unknown" || c.len() == 40), "{}", record["commit"]);
    assert_eq!(record["card"]["capability"], "8.0");
    let names: Vec<&String> = record["stages"].as_object().unwrap().keys().collect();
    let stages =
        ["card", "start", "tests", "predict", "sanitizer", "speed", "kernels", "ncu", "variants", "twin", "host"];
    assert_eq!(names, stages);
    let stage = |name: &str| &record["stages"][name];
    let measured: [(&str, &[&str]); 7] = [
        ("card", &[]),
        ("start", &["cold_process", "cold_step", "warm_process", "warm_step", "memory_needed"]),
        ("tests", &["passed"]),
        (
            "predict",
            &["unet_gray16_f32_error", "unet_gray16_tf32_error", "unet_gray16_bf16_error", "unet_rgb16_f32_error"],
        ),
        ("speed", &["f32_2", "tf32_2", "bf16_2"]),
        ("kernels", &["events_f32_step", "events_tf32_step", "events_bf16_step"]),
        ("host", &["launches_of_a_step", "steps", "processor_time_of_a_step", "processor_time_of_a_launch"]),
    ];
    for (name, figures) in measured {
        assert_eq!(stage(name)["state"], "done", "{name}: {said}");
        for figure in figures {
            let figure = &stage(name)["figures"][figure];
            let [least, median, most] = ["min", "median", "max"].map(|key| figure[key].as_f64().unwrap_or(-1.0));
            assert!(0.0 < least && least <= median && median <= most, "{name}: {figure} in {said}");
        }
    }
    assert_eq!(stage("tests")["figures"]["failed_alone"]["median"], 0, "{said}");
    let skipped = stage("tests")["facts"]["skipped"].as_array().unwrap();
    assert!(skipped.iter().any(|what| what.as_str().unwrap().contains("the tests were carried")), "{skipped:?}");
    for name in ["sanitizer", "ncu"] {
        assert_eq!(stage(name)["state"], "absent", "{name}: {said}");
        assert!(stage(name)["why"].as_str().unwrap().contains("needs a GPU"), "{name}: {said}");
    }
    // Rebuilt kernels are trained with, if there is something to rebuild them with.
    let rebuilt = ["built_in_bf16_2", "control_bf16_2", "eight_blocks_bf16_2"];
    match nvcc() {
        None => assert_eq!(stage("variants")["why"], "there is no nvcc to rebuild kernels with", "{said}"),
        Some(_) => rebuilt.iter().for_each(|figure| {
            assert!(stage("variants")["figures"][figure]["median"].as_f64() > Some(0.0), "{figure}: {said}");
        }),
    }
    // Where this Python has PyTorch the twin is measured, otherwise the record says why not.
    let twin = [("done", "figures"), ("absent", "absent")]
        .iter()
        .any(|(state, has)| stage("twin")["state"] == *state && !stage("twin")[has].as_object().unwrap().is_empty());
    assert!(twin, "{said}");

    the_limits_fit_into_calls(&moved, &python);
    failures_are_run_alone(&moved, &python);
    a_stage_ends_at_its_limit(&moved, &python);
}

/// Less than 28 minutes in all, and in the three calls of the README less than ten each.
fn the_limits_fit_into_calls(folder: &Path, python: &str) {
    let out = Command::new("sh").arg(folder.join("day.sh")).arg("--limits").env("PYTHON", python).output().unwrap();
    let said = text(&out);
    let limits: Vec<u32> = said.lines().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(limits.len(), 11, "{said}");
    assert!(limits.iter().sum::<u32>() < 28 * 60, "{said}");
    let readme = fs::read_to_string(folder.join("README.md")).unwrap();
    for call in [&limits[..4], &limits[4..8], &limits[8..], &limits[..]] {
        let seconds: u32 = call.iter().sum();
        assert!(call.len() > 4 || seconds < 600, "{said}");
        let most = format!("at most {} minutes {} seconds", seconds / 60, seconds % 60);
        assert!(readme.contains(&most), "README.md does not say `{most}`");
    }
}

/// A test binary whose second test fails, and its third only because the second did.
const FAILING: &str = r#"#!/bin/sh
case "$*" in
*--list*) printf 'good: test\nfaulty: test\npoisoned: test\n' ;;
*--exact*poisoned*) printf 'test poisoned ... ok\n' ;;
*--exact*) printf 'test faulty ... launching add_fwd_f32 failed with %s\nFAILED\n' "$DDPM_TRACE"; exit 101 ;;
*) printf 'test good ... ok\ntest faulty ... FAILED\ntest poisoned ... FAILED\n'; exit 101 ;;
esac
"#;

fn failures_are_run_alone(folder: &Path, python: &str) {
    let binary = folder.join("bin/tests/failing");
    fs::copy(folder.join("day.sh"), &binary).unwrap(); // with its permission to be run
    fs::write(&binary, FAILING).unwrap();
    let packed = folder.join("pack.json");
    let changed = fs::read_to_string(&packed).unwrap().replace("\"gpu_day\"", "\"failing\"");
    fs::write(&packed, changed).unwrap();
    let (out, record) = day(folder, python, &["--emulated", "tests"]);
    let tests = &record["stages"]["tests"];
    assert_eq!((out.status.code(), &tests["state"]), (Some(1), &json!("failed")), "{}", text(&out));
    assert_eq!(tests["figures"]["passed"]["median"], 1);
    let want = json!({"failing faulty": "FAILED", "failing poisoned": "FAILED"});
    assert_eq!(tests["facts"]["failed"], want);
    let want = json!({
        "failing faulty": "test faulty ... launching add_fwd_f32 failed with sync",
        "failing poisoned": "ok",
    });
    assert_eq!(tests["facts"]["failed_alone"], want);
    // The other stages are still there.
    assert_eq!(record["stages"]["speed"]["state"], "done");
}

fn a_stage_ends_at_its_limit(folder: &Path, python: &str) {
    let program = folder.join("bin/ddpm-cuda");
    fs::remove_file(&program).unwrap();
    fs::copy(folder.join("day.sh"), &program).unwrap();
    fs::write(&program, "#!/bin/sh\nsleep 300 &\nsleep 300\n").unwrap();
    let started = Instant::now();
    let (out, record) = day(folder, python, &["--emulated", "--limit", "1", "card", "host"]);
    assert_eq!(out.status.code(), Some(1), "{}", text(&out));
    for stage in ["card", "host"] {
        assert_eq!(record["stages"][stage]["state"], "timed out", "{}", text(&out));
        assert_eq!(record["stages"][stage]["why"], "1 s were not enough");
    }
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
}
