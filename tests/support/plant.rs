//! Plants bugs in the PTX of a kernel and checks that a test notices them.
//!
//! Each bug runs in a process of its own, since a kernel fault breaks the context for everyone: the test is started
//! again by name, with the bug in an environment variable, and must fail. The bug is first planted here, so that one
//! that cannot be planted (no such entry, no such text) does not count as noticed.
//!
//! Barriers, parameters and the last block are found in any compiler's PTX. Other bugs replace instructions and are
//! written for the compiler that build.rs fetches; if another compiler's PTX lacks the text, they are skipped, reported
//! and counted. On a real GPU nothing is planted: a lost barrier may go unnoticed there.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, Once};

use ddpm_cuda::kernels::{self, Kernel};

use super::gpu;

/// The compiler for whose PTX the text replacements are written: the one that build.rs fetches.
const WRITTEN_FOR: &str = "13.5";

/// Environment variable that plants a bug in every GPU of the process.
const VARIABLE: &str = "DDPM_TEST_BUG";

/// A change to an entry.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug<'a> {
    /// The last `from` becomes `to`.
    Text { from: &'a str, to: &'a str },
    /// Every load of parameter `is` loads parameter `reads` instead.
    Parameter { is: &'a str, reads: &'a str },
    /// The n-th barrier, counted from 0, is removed; `None`: the last one.
    Barrier(Option<usize>),
    /// The last block along x does nothing, as if the grid were too small.
    LastBlock,
}

/// Asserts that `test` of this executable fails if the last `from` in a kernel's PTX becomes `to`.
#[track_caller]
pub fn notices(test: &str, entry: &str, from: &str, to: &str) {
    check(test, entry, Bug::Text { from, to });
}

/// [`notices`] for a kernel whose loads of parameter `is` load parameter `reads` instead. Parameters are counted
/// from 0; "3+8" is the field at byte 8 of the struct that is parameter 3.
#[track_caller]
pub fn notices_wrong_parameter(test: &str, entry: &str, is: impl Display, reads: impl Display) {
    let [is, reads] = [is.to_string(), reads.to_string()];
    check(test, entry, Bug::Parameter { is: &is, reads: &reads });
}

/// [`notices`] for a kernel without its `n`-th barrier, counted from 0 in its PTX.
#[track_caller]
pub fn notices_lost_barrier(test: &str, entry: &str, n: usize) {
    check(test, entry, Bug::Barrier(Some(n)));
}

/// [`notices`] for a kernel without the last barrier of its PTX.
#[track_caller]
pub fn notices_lost_last_barrier(test: &str, entry: &str) {
    check(test, entry, Bug::Barrier(None));
}

/// [`notices`] for a kernel whose last block (along x) does nothing, as if the grid were too small.
#[track_caller]
pub fn notices_lost_block(test: &str, entry: &str) {
    check(test, entry, Bug::LastBlock);
}

#[track_caller]
fn check(test: &str, entry: &str, bug: Bug<'_>) {
    static ON_A_GPU: Once = Once::new();
    if !gpu::available() || gpu::is_real() {
        ON_A_GPU.call_once(|| _ = gpu::emulated("that the tests notice bugs planted in kernels"));
        return;
    }
    let kernel = kernel(entry);
    if bug.plant(kernel).is_none() {
        let other_compiler = matches!(bug, Bug::Text { .. }) && kernels::COMPILER != Some(WRITTEN_FOR);
        assert!(other_compiler, "{entry} has no place for {bug:?}");
        static LEFT_OUT: AtomicUsize = AtomicUsize::new(0);
        let count = 1 + LEFT_OUT.fetch_add(1, Ordering::Relaxed);
        let compiler = kernels::COMPILER.unwrap_or("none");
        gpu::skip(&format!(
            "{count} planted bugs so far: {entry} has no place for {bug:?}, written for the PTX of CUDA {WRITTEN_FOR}, \
             as CUDA {compiler} compiles it"
        ));
        return;
    }
    // A test that fails by itself notices nothing.
    static SOUND: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SOUND.lock().expect("no test panics while it holds the lock").insert(test.into()) {
        let (passes, text) = run(test, None);
        assert!(passes, "{test} fails without a bug: {text}");
    }
    let (passes, text) = run(test, Some(bug.encode(entry)));
    // The entry that is launched first loads the file.
    let loading = format!("loading {}_", kernel.module.stem);
    assert!(!text.contains(&loading), "{entry} is no kernel any more with {bug:?}: {text}");
    assert!(!passes, "{test} passes with {bug:?} in {entry}: {text}");
}

/// Runs a test of this executable in a process of its own, with a bug: whether it passes, and what it says.
fn run(test: &str, bug: Option<String>) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().expect("a test knows its own path"));
    command.args(["--exact", test]).env_remove(VARIABLE).envs(bug.map(|bug| (VARIABLE, bug)));
    let output = command.output().expect("a test runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("running 1 test"), "there is no test {test}: {text}");
    (output.status.success(), text)
}

/// The stem and the PTX with the bug of this process, if it has one.
pub fn planted() -> Option<(&'static str, String)> {
    let text = std::env::var(VARIABLE).ok()?;
    let (entry, bug) = Bug::decode(&text);
    let kernel = kernel(entry);
    let ptx = bug.plant(kernel).unwrap_or_else(|| panic!("{entry} has no place for {bug:?}"));
    Some((kernel.module.stem, ptx))
}

fn kernel(entry: &str) -> &'static Kernel {
    kernels::ALL.iter().find(|k| k.name == entry).unwrap_or_else(|| panic!("there is no kernel {entry}"))
}

impl<'a> Bug<'a> {
    /// The value of the variable: `ENTRY|KIND|WHAT|BY WHAT`.
    fn encode(self, entry: &str) -> String {
        match self {
            Bug::Text { from, to } => format!("{entry}|text|{from}|{to}"),
            Bug::Parameter { is, reads } => format!("{entry}|parameter|{is}|{reads}"),
            Bug::Barrier(Some(n)) => format!("{entry}|barrier|{n}|"),
            Bug::Barrier(None) => format!("{entry}|last barrier||"),
            Bug::LastBlock => format!("{entry}|last block||"),
        }
    }

    fn decode(text: &'a str) -> (&'a str, Self) {
        let [entry, kind, a, b] = text.split('|').collect::<Vec<_>>().try_into().expect("a bug in four parts");
        let number = |text: &str| text.parse().expect("a number");
        let bug = match kind {
            "text" => Bug::Text { from: a, to: b },
            "parameter" => Bug::Parameter { is: a, reads: b },
            "barrier" => Bug::Barrier(Some(number(a))),
            "last barrier" => Bug::Barrier(None),
            "last block" => Bug::LastBlock,
            _ => panic!("{VARIABLE} is {text}"),
        };
        (entry, bug)
    }

    /// The PTX of a kernel's file with this bug in the kernel; `None` if it cannot be planted.
    fn plant(self, kernel: &Kernel) -> Option<String> {
        self.plant_in(kernel.module.ptx(), kernel.name)
    }

    fn plant_in(self, ptx: &str, name: &str) -> Option<String> {
        let start = ptx.find(&format!(".entry {name}(")).expect("the PTX of a kernel has its entry");
        let end = ptx[start + 1..].find(".entry ").map_or(ptx.len(), |next| start + 1 + next);
        let entry = &ptx[start..end];
        // The bytes to remove, and their replacement.
        let (gone, instead) = match self {
            Bug::Text { from, to } => (at_last(entry, from)?, to.to_string()),
            Bug::Parameter { is, reads } => {
                // As `[NAME_param_3]` or, in a struct, `[NAME_param_3+8]`. The compiler loads a parameter again where
                // it has no register for it.
                let loaded = format!("[{name}_param_{is}]");
                entry.find(&loaded)?;
                (0..entry.len(), entry.replace(&loaded, &format!("[{name}_param_{reads}]")))
            }
            Bug::Barrier(n) => {
                let barriers: Vec<usize> = entry.match_indices("bar.sync").map(|(at, _)| at).collect();
                let at = *n.map_or(barriers.last(), |n| barriers.get(n))?;
                (at..at + entry[at..].find(';')? + 1, String::new())
            }
            Bug::LastBlock => {
                let body = entry.find('{')? + 1;
                let leave = "\n.reg .pred %planted; .reg .b32 %block; .reg .b32 %last;\n\
                    mov.u32 %block, %ctaid.x; mov.u32 %last, %nctaid.x; sub.u32 %last, %last, 1;\n\
                    setp.eq.u32 %planted, %block, %last; @%planted ret;\n";
                (body..body, leave.to_string())
            }
        };
        let [before, after] = [&ptx[..start + gone.start], &ptx[start + gone.end..]];
        Some(format!("{before}{instead}{after}"))
    }
}

/// The last occurrence of `part` in `text`.
fn at_last(text: &str, part: &str) -> Option<std::ops::Range<usize>> {
    text.rfind(part).map(|at| at..at + part.len())
}

/// Ensures that no bug is skipped with the compiler of CI. The versions of the wheels begin with that of CUDA.
#[test]
fn the_bugs_are_written_for_the_compiler_that_is_fetched() {
    let (_, wheel) = include_str!("../../build.rs").split_once("name: \"nvidia-cuda-nvcc\",").expect("it is a wheel");
    let version = wheel.trim_start().strip_prefix("version: \"").expect("of a version");
    assert!(version.starts_with(&format!("{WRITTEN_FOR}.")), "build.rs fetches another compiler than {WRITTEN_FOR}");
    if std::env::var("DDPM_CUDA_TOOLCHAIN").is_ok_and(|wanted| wanted == "fetch") {
        assert_eq!(kernels::COMPILER, Some(WRITTEN_FOR), "kernels are not compiled by the fetched compiler");
    }
}

#[test]
fn a_bug_is_planted_in_its_entry_alone() {
    let ptx = ".entry a(\n) { ld.param.u32 %r1, [a_param_1]; bar.sync 0; ld.param.u32 %r2, [a_param_1+4]; ret; }\n\
               .entry b(\n) { ld.param.u32 %r1, [b_param_1]; bar.sync 0; bar.sync 1; ret; }\n";
    let planted = |entry: &str, bug: Bug<'_>| {
        assert_eq!(Bug::decode(&bug.encode(entry)), (entry, bug), "on the way through the variable");
        bug.plant_in(ptx, entry)
    };
    let swapped = |from: &str, to: &str| {
        assert_eq!(ptx.matches(from).count(), 1, "{from}");
        Some(ptx.replace(from, to))
    };
    assert_eq!(planted("a", Bug::Text { from: "ret", to: "exit" }), swapped("4]; ret", "4]; exit"));
    assert_eq!(planted("a", Bug::Parameter { is: "1", reads: "0" }), swapped("a_param_1]", "a_param_0]"));
    assert_eq!(planted("b", Bug::Parameter { is: "1", reads: "0" }), swapped("b_param_1]", "b_param_0]"));
    assert_eq!(planted("b", Bug::Barrier(Some(0))), swapped("[b_param_1]; bar.sync 0;", "[b_param_1]; "));
    assert_eq!(planted("b", Bug::Barrier(None)), swapped("bar.sync 1;", ""));
    let early = planted("b", Bug::LastBlock).expect("every entry has a body");
    assert!(early[ptx.find(".entry b").expect("an entry")..].contains("@%planted ret;"), "{early}");
    for bug in [Bug::Text { from: "b_param", to: "" }, Bug::Parameter { is: "0", reads: "1" }, Bug::Barrier(Some(1))] {
        assert_eq!(planted("a", bug), None);
    }
}
