//! The kernels as the compiler made them: every GPU's assembler takes them and spills nothing, old drivers know their PTX, and a launch that does
//! not fit a kernel's parameters is refused before it reaches the driver.

mod support;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use ddpm_cuda::device::Device;
use ddpm_cuda::kernels::{self, Kernel, Kind, Module};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use rayon::prelude::*;

use support::gpu;

/// Compute capabilities of what kernels run on, A100, RTX 30, RTX 40, H100, B200, RTX 50, and the first CUDA version whose assembler knows them.
const ARCHITECTURES: [(&str, [u32; 2]); 6] = [
    ("sm_80", [12, 0]),
    ("sm_86", [12, 0]),
    ("sm_89", [12, 0]),
    ("sm_90", [12, 0]),
    ("sm_100", [12, 8]),
    ("sm_120", [12, 8]),
];

/// Entries that may use local memory, with the reason.
const LOCAL_MEMORY: [(&str, &str); 0] = [];

/// Every stem's PTX once.
fn modules() -> Vec<&'static Module> {
    let by_stem: BTreeMap<&str, &Module> = kernels::ALL.iter().map(|k| (k.module.stem, k.module)).collect();
    by_stem.into_values().collect()
}

/// `(entry, bytes of stack, of spill stores, of spill loads)` for each entry, as `ptxas -v` says:
///
/// ```text
/// ptxas info    : Function properties for add_fwd_f32
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ```
fn usage(said: &str) -> Vec<(String, Vec<u64>)> {
    let of_entry = |part: &str| {
        let (name, rest) = part.split_once('\n').expect("a line of numbers follows");
        let numbers = rest.lines().next().expect("the same").split(',');
        let bytes =
            numbers.map(|n| n.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number of bytes"));
        (name.trim().to_string(), bytes.collect())
    };
    said.split("Function properties for ").skip(1).map(of_entry).collect()
}

#[test]
fn every_entry_assembles_for_every_architecture_without_local_memory() {
    let (Some(ptxas), true) = (kernels::PTXAS, gpu::available()) else { return };
    let folder = tempfile::tempdir().unwrap();
    let modules = modules();
    for module in &modules {
        std::fs::write(folder.path().join(module.stem), module.ptx).unwrap();
    }
    let version = kernels::COMPILER.expect("an assembler comes with a compiler");
    let version: Vec<u32> = version.split('.').map(|part| part.parse().expect("a number")).collect();
    let known = ARCHITECTURES.iter().filter(|(_, since)| version[..] >= since[..]);
    let all: Vec<(&Module, &str)> = known.flat_map(|(arch, _)| modules.iter().map(move |m| (*m, *arch))).collect();
    let check = |&(module, arch): &(&Module, &str)| -> Option<String> {
        let mut command = Command::new(ptxas);
        command.args(["-v", "-o", "/dev/null"]).arg(format!("-arch={arch}")).arg(folder.path().join(module.stem));
        let output = command.output().expect("the assembler runs");
        let said = [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
        if !output.status.success() {
            return Some(format!("{} for {arch}: {said}", module.stem));
        }
        let usage = usage(&said);
        let mut found: Vec<&str> = usage.iter().map(|(name, _)| name.as_str()).collect();
        let mut wanted: Vec<&str> =
            kernels::ALL.iter().filter(|k| k.module.stem == module.stem).map(|k| k.name).collect();
        found.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(found, wanted, "entries of {} for {arch}; the assembler said\n{said}", module.stem);
        let allowed = |name: &str| LOCAL_MEMORY.iter().any(|(entry, _)| *entry == name);
        let bad = usage.into_iter().filter(|(name, bytes)| *bytes != [0, 0, 0] && !allowed(name));
        let bad: Vec<String> = bad
            .map(|(name, bytes)| format!("{name} for {arch}: stack, spill stores and loads of {bytes:?} bytes"))
            .collect();
        (!bad.is_empty()).then(|| bad.join("\n"))
    };
    let bad: Vec<String> = all.par_iter().filter_map(check).collect();
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn the_assemblers_words_are_understood() {
    let said = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'a_fwd' for 'sm_80'\nptxas info    : Function properties for a_fwd\n    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\nptxas info    : Used 24 registers\n";
    assert_eq!(usage(said), [("a_fwd".to_string(), vec![8, 4, 12])]);
}

/// A driver of CUDA 12.0 knows PTX up to 8.0; every GPU since compute capability 8.0 runs what is compiled for it.
#[test]
fn drivers_since_cuda_12_know_the_ptx() {
    if !gpu::available() {
        return;
    }
    for module in modules() {
        let line =
            |start: &str| module.ptx.lines().find_map(|l| l.strip_prefix(start)).unwrap_or_default().trim().to_string();
        let (version, target) = (line(".version "), line(".target "));
        let (major, minor) = version.split_once('.').unwrap_or_default();
        let version: (u32, u32) = (major.parse().unwrap(), minor.parse().unwrap());
        assert!(((7, 0)..=(8, 0)).contains(&version), "{}: PTX {version:?}", module.stem);
        assert_eq!(target, "sm_80", "{}", module.stem);
    }
}

/// What `f` panics with.
fn refusal(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("was not refused");
    *panic.downcast::<String>().expect("a message with numbers in it")
}

#[test]
fn a_launch_that_does_not_fit_the_kernel_is_refused_with_both_sides_named() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu.clone());
    let kernel: &'static Kernel = kernels::add::FWD.of(DType::F32);
    let kinds: Vec<Kind> = kernel.params.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(
        kinds,
        [Kind::Pointer, Kind::Pointer, Kind::Pointer, Kind::U64],
        "the kernel that this test is made for"
    );
    let x = Tensor::full(&device, Shape::vector(4), 1.0).unwrap();
    let y = || Tensor::full(&device, Shape::vector(4), 7.0).unwrap();
    let start = || gpu.launch(kernel, [1, 1, 1], 256);
    let mut untouched = y();
    let messages = [
        refusal(|| start().write(&mut untouched).read(&x).read(&x).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).read(&x).u32(4).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).read(&x).f64(4.0).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).u64(4).read(&x).run().unwrap()),
        refusal(|| start().write(&mut y()).read(&x).read(&x).u64(4).u64(4).run().unwrap()),
    ];
    for message in &messages {
        for part in ["add_fwd_f32 takes", "(Pointer, \"y\")", "(U64, \"len\")", "but was launched with", "1x1x1x4"] {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
    }
    assert!(messages[1].contains("(U32, \"4\")"), "{}", messages[1]);
    assert!(
        refusal(|| drop(gpu.launch(kernel, [1, 1, 1], 257)))
            .contains("add_fwd_f32: blocks of 257 threads, its bound is 256")
    );
    assert!(refusal(|| drop(gpu.launch(kernel, [1, 1, 1], [16, 17, 1]))).contains("272 threads"));
    let tall =
        refusal(|| gpu.launch(kernel, [1, 65_536, 1], 1).write(&mut y()).read(&x).read(&x).u64(4).run().unwrap());
    assert!(tall.contains("add_fwd_f32: a grid of 1 x 65536 x 1 blocks"), "{tall}");
    // Nothing has reached the driver, which is as well as before.
    assert_eq!(untouched.to_vec().unwrap(), [7.0; 4]);
    start().write(&mut untouched).read(&x).read(&x).u64(4).run().unwrap();
    assert_eq!(untouched.to_vec().unwrap(), [2.0; 4]);
}
