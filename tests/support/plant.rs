//! Bugs planted in the PTX of a kernel, to see that the tests would notice them.

use std::process::Command;

use ddpm_cuda::device::Device;
use ddpm_cuda::kernels;
use ddpm_cuda::tensor::DType;

use super::gpu;

/// One change to one kernel.
pub struct Bug {
    kernel: String,
    change: Change,
}

#[derive(Clone, Copy, Debug)]
enum Change {
    /// Its n-th barrier is gone. Noticed by the emulator's checks; on a GPU the schedule may hide it.
    NoBarrier(usize),
    /// Its last block (along x) does nothing, as if the grid were too small.
    NoLastBlock,
}

/// `kernel` without its `barrier`-th barrier, counted from 0 in its PTX.
pub fn without_barrier(kernel: &str, barrier: usize) -> Bug {
    Bug { kernel: kernel.into(), change: Change::NoBarrier(barrier) }
}

/// `kernel` on a grid that is one block short.
pub fn without_last_block(kernel: &str) -> Bug {
    Bug { kernel: kernel.into(), change: Change::NoLastBlock }
}

impl Bug {
    /// The stem and its PTX with the bug in it.
    pub fn plant(&self) -> (&'static str, String) {
        let kernel = kernels::ALL.iter().find(|k| k.name == self.kernel).expect("a kernel of that name");
        let (stem, ptx) = (kernel.module.stem, kernel.module.ptx);
        let (before, entry) = ptx.split_once(&format!(".entry {}(", self.kernel)).expect("an entry of that name");
        let entry = match self.change {
            Change::NoBarrier(n) => {
                let mut seen = 0..;
                let mut is_it = |line: &&str| line.trim_start().starts_with("bar.sync") && seen.next() == Some(n);
                let at = entry.lines().position(|line| is_it(&line)).expect("as many barriers as that");
                let lines: Vec<&str> =
                    entry.lines().enumerate().filter(|(i, _)| *i != at).map(|(_, line)| line).collect();
                lines.join("\n")
            }
            Change::NoLastBlock => entry.replacen(
                '{',
                "{ .reg .pred %planted; .reg .b32 %block; .reg .b32 %last;\n\
                 mov.u32 %block, %ctaid.x; mov.u32 %last, %nctaid.x; sub.u32 %last, %last, 1;\n\
                 setp.eq.u32 %planted, %block, %last; @%planted ret;\n",
                1,
            ),
        };
        (stem, format!("{before}.entry {}({entry}", self.kernel))
    }
}

/// Runs `check` with each of the bugs on a GPU with f32 activations and fails unless it fails; without a bug it must pass.
///
/// Every run is a process of its own, since a kernel that faults takes its context with it: this very test, named by its module's path and its name, with
/// the bug's number in a variable.
#[track_caller]
pub fn noticed(module: &str, test: &str, bugs: &[Bug], check: impl Fn(&Device)) {
    const PLANTED: &str = "DDPM_TEST_PLANTED";
    if !gpu::available() {
        return;
    }
    if let Ok(number) = std::env::var(PLANTED) {
        let gpu = gpu::gpu(DType::F32).expect("kernels can be tested");
        if let Ok(number) = number.parse::<usize>() {
            let (stem, ptx) = bugs[number].plant();
            gpu.replace_kernels(stem, ptx);
        }
        return check(&Device::Cuda(gpu));
    }
    // The first part of a module's path is the crate.
    let module = module.split_once("::").expect("a module of a test crate").1;
    let run = |planted: String| {
        let mut command = Command::new(std::env::current_exe().expect("a test knows its own path"));
        command.args(["--exact", &format!("{module}::{test}"), "--nocapture"]).env(PLANTED, planted);
        command.output().expect("the test starts again")
    };
    let control = run("none".into());
    let text = String::from_utf8_lossy(&control.stdout);
    assert!(control.status.success() && text.contains("1 passed"), "without a bug: {control:?}");
    let emulated = gpu::gpu(DType::F32).is_some_and(|gpu| gpu.is_emulated());
    for (number, bug) in bugs.iter().enumerate() {
        if emulated || matches!(bug.change, Change::NoLastBlock) {
            let outcome = run(number.to_string());
            assert!(!outcome.status.success(), "nobody notices {:?} in {}", bug.change, bug.kernel);
        }
    }
}
