//! Runs of several processes with the program itself: whatever their number, how they are started and how often they
//! are stopped, killed and resumed, they write the checkpoint of one. `tests/ranks.rs` has ranks as threads,
//! `tests/launch.rs` the launcher.
#![cfg(target_os = "linux")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{gpu, places};

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(120);
/// The most that ranks may live on after another has failed.
const SOON: Duration = Duration::from_secs(10);

/// The program in `folder`, of which no variable of a launcher reaches it.
fn program(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(places::program());
    command.current_dir(folder).args(arguments).env("RAYON_NUM_THREADS", "1").stdin(Stdio::null());
    for name in ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DDPM_KERNELS", "DDPM_JOIN_TOKEN"] {
        command.env_remove(name);
    }
    support::hear_signals(&mut command);
    command
}

/// Arguments of a run in `RUN`, of so many micro-batches.
fn new_run(steps: &str) -> Vec<&str> {
    let settings = [
        "--set",
        "accumulate=4",
        "--set",
        "sample_every=0",
        "--set",
        "checkpoint_every=2",
        "--set",
        "log_every=1",
        "--set",
        "validate_every=3",
    ];
    [
        &["train", "--device", "cpu", "--out", "RUN", "--batch", "8", "--steps", steps],
        &support::TINY[..],
        &support::PLAIN,
    ]
    .concat()
    .into_iter()
    .chain(settings)
    .collect()
}

/// Ranks that a launcher such as torchrun has started. All are killed with it.
struct Ranks(Vec<Child>);

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Ranks {
    /// `size` ranks, of which `change` may make one other than the rest.
    fn start(folder: &Path, size: usize, arguments: &[&str], change: impl Fn(usize, &mut Command)) -> Self {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let started = (0..size).map(|rank| {
            let mut command = program(folder, arguments);
            for (name, value) in
                [("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("MASTER_PORT", usize::from(port))]
            {
                command.env(name, value.to_string());
            }
            command.env("MASTER_ADDR", "127.0.0.1").stdout(Stdio::piped()).stderr(Stdio::piped());
            change(rank, &mut command);
            command.spawn().unwrap()
        });
        Ranks(started.collect())
    }

    /// How each of them has ended: exit code, and what it wrote to standard error.
    fn ended(mut self) -> Vec<(Option<i32>, String)> {
        let ended = std::mem::take(&mut self.0).into_iter().map(|child| {
            let Output { status, stderr, .. } = child.wait_with_output().unwrap();
            (status.code(), String::from_utf8_lossy(&stderr).into_owned())
        });
        ended.collect()
    }

    /// All have done their work.
    #[track_caller]
    fn succeed(self) {
        for (rank, (code, said)) in self.ended().into_iter().enumerate() {
            assert_eq!(code, Some(0), "rank {rank}: {said}");
        }
    }

    fn signal(&self, rank: usize, number: i32) {
        // SAFETY: the number of a child that has not been waited for, so that it is nobody else's.
        assert_eq!(unsafe { libc::kill(self.0[rank].id() as i32, number) }, 0);
    }
}

fn usual(_: usize, _: &mut Command) {}

/// One process.
#[track_caller]
fn alone(folder: &Path, arguments: &[&str]) -> String {
    let out = program(folder, arguments).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{arguments:?}: {said}");
    said
}

/// The files of a run's checkpoint that training goes on from, without the record of its settings.
fn checkpoint(folder: &Path, step: u32) -> BTreeMap<String, Vec<u8>> {
    let path = folder.join(format!("RUN/checkpoints/{step}"));
    let file = |name: &str| (name.to_string(), fs::read(path.join(name)).unwrap());
    ["unet/diffusion_pytorch_model.safetensors", "training_state.safetensors"].map(file).into()
}

/// Waits until the run has logged `step`.
fn wait_for_step(folder: &Path, step: u32) {
    let since = Instant::now();
    let line = format!("\"step\":{step},");
    while !fs::read_to_string(folder.join("RUN/metrics.jsonl")).is_ok_and(|lines| lines.contains(&line)) {
        assert!(since.elapsed() < LONG, "step {step} is not reached");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn processes_write_the_checkpoint_of_one_and_go_on_from_each_others() {
    let folders: Vec<_> = [1, 2, 4].map(|_| tempfile::tempdir().unwrap()).into();
    let [one, two, four] = [0, 1, 2].map(|k| folders[k].path());
    alone(one, &new_run("6"));
    let want = checkpoint(one, 6);
    Ranks::start(two, 2, &new_run("6"), usual).succeed();
    assert!(checkpoint(two, 6) == want, "two ranks");
    // Four of them, half of the way; then two; then one.
    Ranks::start(four, 4, &new_run("3"), usual).succeed();
    let resume = |steps| vec!["train", "--device", "cpu", "--resume", "RUN", "--steps", steps];
    Ranks::start(four, 2, &resume("5"), usual).succeed();
    alone(four, &resume("6"));
    assert!(checkpoint(four, 6) == want, "four ranks, then two, then one");
    // What the first rank alone writes is what one writes.
    let metrics = |folder: &Path| fs::read_to_string(folder.join("RUN/metrics.jsonl")).unwrap();
    let losses = |folder: &Path| {
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        let lines: Vec<_> = metrics(folder).lines().map(line).collect();
        lines
            .iter()
            .map(|line| [&line["step"], &line["loss"], &line["validation_loss"]].map(|v| v.to_string()))
            .collect()
    };
    let (got, want): (Vec<[String; 3]>, Vec<[String; 3]>) = (losses(two), losses(one));
    assert_eq!(got, want);
}

#[test]
fn a_signal_to_the_last_rank_stops_all_with_one_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let arguments = [&new_run("100000")[..], &["--set", "checkpoint_every=0"]].concat();
    let ranks = Ranks::start(folder, 4, &arguments, usual);
    wait_for_step(folder, 3);
    ranks.signal(3, libc::SIGINT);
    let since = Instant::now();
    for (rank, (code, said)) in ranks.ended().into_iter().enumerate() {
        assert_eq!(code, Some(130), "rank {rank}: {said}");
    }
    assert!(since.elapsed() < LONG, "{:?}", since.elapsed());
    let checkpoints: Vec<_> = fs::read_dir(folder.join("RUN/checkpoints")).unwrap().collect();
    assert_eq!(checkpoints.len(), 1, "{checkpoints:?}");
    let done: u32 = checkpoints[0].as_ref().unwrap().file_name().to_str().unwrap().parse().unwrap();
    let steps = (done + 1).to_string();
    alone(folder, &["train", "--device", "cpu", "--resume", "RUN", "--steps", &steps]);
}

#[test]
fn a_killed_rank_is_named_and_the_run_goes_on_to_the_same_bits() {
    let folders: Vec<_> = [1, 2].map(|_| tempfile::tempdir().unwrap()).into();
    let [undisturbed, killed] = [0, 1].map(|k| folders[k].path());
    alone(undisturbed, &new_run("8"));
    for (rank, size) in [(3, 4), (0, 2)] {
        let arguments =
            if rank == 3 { new_run("8") } else { vec!["train", "--device", "cpu", "--resume", "RUN", "--steps", "8"] };
        let ranks = Ranks::start(killed, size, &arguments, usual);
        wait_for_step(killed, if rank == 3 { 3 } else { 5 });
        ranks.signal(rank, libc::SIGKILL);
        let since = Instant::now();
        for (other, (code, said)) in ranks.ended().into_iter().enumerate().filter(|(other, _)| *other != rank) {
            // Who has done all its work before the other was killed has nothing to complain of.
            let named = said.contains(&format!("rank {rank} (")) && said.contains("as if it was killed");
            assert!(code == Some(1) && named, "rank {other} of {size}: {code:?}, {said}");
        }
        assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    }
    alone(killed, &["train", "--device", "cpu", "--resume", "RUN"]);
    assert!(checkpoint(killed, 8) == checkpoint(undisturbed, 8), "killed twice");
}

#[test]
fn ranks_that_differ_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let refused = |says: &[&str], change: &dyn Fn(usize, &mut Command)| {
        let ended = Ranks::start(folder, 2, &new_run("6"), change).ended();
        for (rank, (code, said)) in ended.iter().enumerate() {
            assert!(*code == Some(1) || *code == Some(2), "rank {rank}: {code:?}, {said}");
            for part in says {
                assert!(said.contains(part), "rank {rank}: {said:?} does not say {part:?}");
            }
            assert_eq!(said.trim_end().lines().count(), 1, "rank {rank}: {said}");
        }
        assert!(!folder.join("RUN").exists(), "a run was begun");
    };
    let sets = |setting: &'static str| {
        move |rank: usize, command: &mut Command| {
            if rank == 1 {
                command.args(["--set", setting]);
            }
        }
    };
    refused(&["rank 0 (", "rank 1 (", "setting learning_rate"], &sets("learning_rate=0.5"));
    // Another kernel build.
    fs::create_dir(folder.join("kernels")).unwrap();
    fs::write(folder.join("kernels/silu.ptx"), "// another one").unwrap();
    refused(&["rank 1 (", "the build's kernels"], &|rank, command| {
        if rank == 1 {
            command.env("DDPM_KERNELS", "kernels");
        }
    });
    // The same path, and other images there, as where each machine has a disk of its own.
    refused(&["rank 0", "rank 1", "data", "hash"], &|rank, command| {
        let place = folder.join(format!("machine-{rank}"));
        fs::create_dir_all(place.join("images")).unwrap();
        for k in 0..30 {
            let image = image::GrayImage::from_pixel(28, 28, image::Luma([100 * rank as u8 + k]));
            image.save(place.join(format!("images/{k}.png"))).unwrap();
        }
        command.args(["--data", "/proc/self/cwd/images"]).current_dir(place);
    });
    assert!(!folder.join("machine-0/RUN").exists(), "a run was begun");
}

#[test]
fn gpus_that_the_program_starts_ranks_for_write_the_checkpoint_of_one() {
    if !gpu::available() || !gpu::emulated("four GPUs of one machine") {
        return;
    }
    let on = |devices: &str, more: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let words = |word| match word {
            "cpu" => devices,
            // The emulator would take a minute for it.
            "validate_every=3" => "validate_every=0",
            word => word,
        };
        let arguments = new_run("2").into_iter().map(words);
        let mut command = program(folder.path(), &arguments.chain(more.iter().copied()).collect::<Vec<&str>>());
        command.env("DDPM_CUDA_DRIVER", places::emulator()).env("DDPM_NCCL", places::nccl());
        for (name, value) in
            [("CUDA_EMU_DEVICES", "4"), ("CUDA_EMU_MEMORY", "512M"), ("CUDA_EMU_LOG", "none"), ("NCCL_EMU_LOG", "none")]
        {
            command.env(name, value);
        }
        let out = command.output().unwrap();
        let [printed, said] = [&out.stdout, &out.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        assert!(out.status.success(), "{devices}: {said}");
        (checkpoint(folder.path(), 2), printed)
    };
    let (want, _) = on("cuda:0", &[]);
    assert!(on("cuda:0,2", &[]).0 == want, "two GPUs");
    assert!(on("cuda:0-3", &[]).0 == want, "four GPUs");
    // The sums of two terms are the same in any order, if the stand-in adds in f32; of more they need not be.
    let (_, printed) = on("cuda:0,2", &["--exchange", "nccl"]);
    assert!(printed.contains("NCCL adds the gradients up"), "{printed}");
}
