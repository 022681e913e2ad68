//! Kernels compiled by nvcc, run by the interpreter without a driver.

mod machine;

use cuda_emu::exec::FaultKind;
use machine::{Arg, Device, noise};

fn sgemm(name: &str, m: usize, n: usize, k: usize) -> Result<(), cuda_emu::exec::Fault> {
    let device = Device::new(include_str!("kernels/sgemm.ptx"));
    let (a, b) = (noise(m * k, 1), noise(k * n, 2));
    let (a_at, b_at) = (device.upload(&a), device.upload(&b));
    let c_at = device.memory.alloc((m * n * 4) as u64).unwrap();
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
    let args = [
        Arg::U64(a_at),
        Arg::U64(b_at),
        Arg::U64(c_at),
        Arg::U32(m as u32),
        Arg::U32(n as u32),
        Arg::U32(k as u32),
    ];
    device.run(name, grid, [256, 1, 1], 0, &args)?;
    let c: Vec<f32> = device.download(c_at, m * n);
    for i in 0..m {
        for j in 0..n {
            // nvcc contracts to fma in order of k, so the same chain gives the same bits.
            let want = (0..k).fold(0.0f32, |sum, l| a[i * k + l].mul_add(b[l * n + j], sum));
            assert_eq!(c[i * n + j].to_bits(), want.to_bits(), "c[{i}][{j}] of {m}x{n}x{k}");
        }
    }
    Ok(())
}

#[test]
fn sgemm_agrees_bit_for_bit() {
    for (m, n, k) in [(1, 1, 1), (64, 64, 8), (65, 67, 13), (130, 70, 40)] {
        sgemm("sgemm", m, n, k).unwrap_or_else(|fault| panic!("{fault}"));
    }
}

#[test]
fn sgemm_bugs_are_refused() {
    let refused = |name: &str, kind: FaultKind| {
        let fault = sgemm(name, 70, 70, 33).expect_err("the bug is there");
        assert_eq!(fault.kind, kind, "{fault}");
    };
    refused("sgemm_dropped_barrier", FaultKind::SharedRace);
    refused("sgemm_uninitialised", FaultKind::Uninitialised);
    refused("sgemm_off_by_one", FaultKind::OutOfBounds);
}
