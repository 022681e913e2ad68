//! One file of tests per operation, named after the operation.

#[path = "../support/mod.rs"]
mod support;

mod adam;
mod add;
mod attention;
mod avg_pool;
mod concat;
mod conv2d;
mod cross_entropy;
mod dropout;
mod embedding;
mod grad_norm;
mod group_norm;
mod linear;
mod loss;
mod pool;
mod q_sample;
mod sample_step;
mod silu;
mod time_embedding;
mod tree_sum;
mod upsample;

use std::collections::BTreeSet;
use std::process::Command;

use ddpm_cuda::kernels;

use support::gpu;

/// The tests of an operation whose names begin with `gpu`, `the_gpu` or `on_the_gpu` launch each of its kernels. They
/// run once more, in a process per operation that writes its launches to stderr.
#[test]
fn every_kernel_is_launched_by_its_operations_tests() {
    if !gpu::available() {
        return;
    }
    let stems: BTreeSet<&str> = kernels::ALL.iter().map(|k| k.module.stem).collect();
    let mut launched = BTreeSet::new();
    for stem in stems {
        let mut tests = Command::new(std::env::current_exe().expect("a test knows its own path"));
        tests.args(["gpu", "the_gpu", "on_the_gpu"].map(|start| format!("{stem}::{start}"))).arg("--nocapture");
        tests.env("DDPM_TRACE", "1").env(gpu::ONE_SCHEDULE, "1");
        let output = tests.output().expect("the tests run");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tests of {stem} fail:\n{said}");
        let names = said.lines().filter_map(|line| Some(line.split_once(" on ")?.0.to_string()));
        launched.extend(names.filter(|name| name.starts_with(stem)));
    }
    let missing: Vec<&str> = kernels::ALL.iter().map(|k| k.name).filter(|name| !launched.contains(*name)).collect();
    assert!(missing.is_empty(), "launched by no test of their operation: {missing:?}");
}
