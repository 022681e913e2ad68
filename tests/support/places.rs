//! Where a test finds what it does not bring along: where cargo has built it, or, for test binaries that were carried
//! to another machine, where the environment says. Every test asks here; CONTRIBUTING.md lists the settings.

#![allow(dead_code, reason = "each test target uses its own part of this module")]

use std::path::{Path, PathBuf};

/// The folder that holds `tests/fixtures`, `src`, `kernels` and so on: by default the crate's.
pub const ROOT: &str = "DDPM_TEST_ROOT";
/// The program under test: by default the one that cargo has built with the tests.
pub const PROGRAM: &str = "DDPM_TEST_PROGRAM";
/// The emulator's library: by default the one beside the test binary.
pub const EMULATOR: &str = "DDPM_TEST_EMULATOR";
/// The stand-in for NCCL: by default the one beside the test binary.
pub const NCCL: &str = "DDPM_TEST_NCCL";

/// The path that a variable names, absolute, since tests start programs in other folders.
fn named(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).filter(|path| !path.is_empty())?;
    Some(std::path::absolute(&path).unwrap_or_else(|e| panic!("{variable} is {}: {e}", Path::new(&path).display())))
}

/// The folder of the sources.
pub fn root() -> PathBuf {
    named(ROOT).unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into())
}

/// A file or folder of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    let path = root().join("tests/fixtures").join(name);
    assert!(path.exists(), "{} does not exist; {ROOT} is the folder that holds tests/fixtures", path.display());
    path
}

/// The program.
pub fn program() -> PathBuf {
    let built = || option_env!("CARGO_BIN_EXE_ddpm-cuda").map(PathBuf::from);
    let path = named(PROGRAM).or_else(built).expect("a test that starts the program needs the feature cli");
    assert!(path.is_file(), "{} does not exist; {PROGRAM} is the path of ddpm-cuda", path.display());
    path
}

/// The emulator's shared library.
pub fn emulator() -> PathBuf {
    library(EMULATOR, "libcuda_emu.so")
}

/// The shared library that stands in for NCCL.
pub fn nccl() -> PathBuf {
    library(NCCL, "libnccl_emu.so")
}

/// A shared library of the workspace, which cargo puts beside the test executables.
fn library(variable: &str, name: &str) -> PathBuf {
    let beside = || {
        let executable = std::env::current_exe().expect("a test knows its own path");
        executable.parent().expect("an executable is in a folder").join(name)
    };
    let path = named(variable).unwrap_or_else(beside);
    assert!(path.is_file(), "{} does not exist; {variable} is the path of {name}", path.display());
    path
}
