//! Bugs planted in the PTX of a kernel, to see that a test notices them.
//!
//! Each runs in a process of its own, since a kernel's fault breaks the context for all: the test is started again by its name, with the bug in a variable,
//! and must fail. On a real GPU nothing is planted: a lost barrier may go unnoticed there.

use std::process::Command;

use ddpm_cuda::kernels;

use super::gpu::available;

/// The compiler whose PTX the bugs are written for: the one that build.rs fetches. Where another one writes it otherwise, a bug is left out.
const WRITTEN_FOR: &str = "13.5";

/// Variable that plants a bug in every GPU of the process: `ENTRY|FROM|TO`.
const BUG: &str = "DDPM_TEST_BUG";

/// Stands for the text to be replaced where it is a barrier, counted from 0.
const BARRIER: &str = "the barrier";

/// Stands for the text to be replaced where the last block is to do nothing.
const LAST_BLOCK: &str = "the last block";

/// Asserts that `test` of this executable fails once the last `from` of a kernel's PTX reads `to`.
#[track_caller]
pub fn notices(test: &str, entry: &str, from: &str, to: &str) {
    if !available() || std::env::var("DDPM_TEST_DEVICE").is_ok_and(|device| device == "cuda") {
        return;
    }
    let mut command = Command::new(std::env::current_exe().expect("a test knows its own path"));
    let output = command.args(["--exact", test]).env(BUG, format!("{entry}|{from}|{to}")).output();
    let output = output.expect("a test runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "there is no test {test}: {text}");
    if text.contains("has no `") && kernels::COMPILER != Some(WRITTEN_FOR) {
        return;
    }
    assert!(!text.contains("has no `"), "{text}");
    assert!(
        !text.contains(&format!("loading {entry}")),
        "{entry} is no kernel any more with `{to}` for `{from}`: {text}"
    );
    assert!(!output.status.success(), "{test} passes with `{from}` of {entry} replaced by `{to}`: {text}");
}

/// [`notices`] for a kernel without its `n`-th barrier, counted from 0 in its PTX.
#[track_caller]
pub fn notices_lost_barrier(test: &str, entry: &str, n: usize) {
    notices(test, entry, BARRIER, &n.to_string());
}

/// [`notices`] for a kernel whose last block (along x) does nothing, as if the grid were too small.
#[track_caller]
pub fn notices_lost_block(test: &str, entry: &str) {
    notices(test, entry, LAST_BLOCK, "");
}

/// The stem and the PTX with the bug that this process is to have, if any.
pub fn planted() -> Option<(&'static str, String)> {
    let bug = std::env::var(BUG).ok()?;
    let [entry, from, to] = bug.split('|').collect::<Vec<_>>().try_into().expect("a bug in three parts");
    let kernel = kernels::ALL.iter().find(|k| k.name == entry).unwrap_or_else(|| panic!("no kernel {entry}"));
    let (stem, ptx) = (kernel.module.stem, kernel.module.ptx());
    let start = ptx.find(&format!(".entry {entry}(")).expect("the PTX of a kernel has its entry");
    let end = ptx[start + 1..].find(".entry ").map_or(ptx.len(), |next| start + 1 + next);
    let text = &ptx[start..end];
    let mutated = match from {
        BARRIER => without_barrier(text, to.parse().expect("a number")),
        LAST_BLOCK => without_last_block(text),
        _ => text.rfind(from).map(|at| format!("{}{to}{}", &text[..at], &text[at + from.len()..])),
    };
    let mutated = mutated.unwrap_or_else(|| panic!("{entry} has no `{from}` {to}"));
    Some((stem, format!("{}{mutated}{}", &ptx[..start], &ptx[end..])))
}

fn without_barrier(entry: &str, n: usize) -> Option<String> {
    let barriers = entry.match_indices("bar.sync").map(|(at, _)| at);
    let at = barriers.clone().nth(n)?;
    let end = at + entry[at..].find(';')? + 1;
    Some(format!("{}{}", &entry[..at], &entry[end..]))
}

fn without_last_block(entry: &str) -> Option<String> {
    let body = entry.find('{')? + 1;
    let leave = "\n.reg .pred %planted; .reg .b32 %block; .reg .b32 %last;\n\
        mov.u32 %block, %ctaid.x; mov.u32 %last, %nctaid.x; sub.u32 %last, %last, 1;\n\
        setp.eq.u32 %planted, %block, %last; @%planted ret;\n";
    Some(format!("{}{leave}{}", &entry[..body], &entry[body..]))
}
