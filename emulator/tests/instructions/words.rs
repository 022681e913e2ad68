//! Loads and stores of words in shared memory by whole warps with only bounds checked: the fast path of tiled kernels.

use super::harness::available;
use cuda_emu::exec::{Checks, FaultKind, Isa, Launch, LoadedModule, Settings};
use cuda_emu::memory::Memory;
use std::sync::Arc;

/// Thread t stores words 4t to 4t + 3 (values 1000 + index) to shared memory, then loads from the byte address it is
/// given: four words, two words, one word.
const KERNEL: &str = ".version 7.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 in, .param .u64 out)
{
    .shared .align 16 .b8 words[512];
    .reg .b32 %t, %own, %at, %a<4>, %b<4>, %c<2>, %d;
    .reg .b64 %p, %q;
    mov.u32 %t, %tid.x;
    ld.param.u64 %p, [in];
    ld.param.u64 %q, [out];
    mad.wide.u32 %p, %t, 4, %p;
    mad.wide.u32 %q, %t, 28, %q;
    ld.global.u32 %at, [%p];
    shl.b32 %a0, %t, 2;
    add.u32 %a0, %a0, 1000;
    add.u32 %a1, %a0, 1;
    add.u32 %a2, %a0, 2;
    add.u32 %a3, %a0, 3;
    mov.u32 %own, words;
    mad.lo.s32 %own, %t, 16, %own;
    st.shared.v4.u32 [%own], {%a0, %a1, %a2, %a3};
    bar.sync 0;
    ld.shared.v4.u32 {%b0, %b1, %b2, %b3}, [%at];
    ld.shared.v2.u32 {%c0, %c1}, [%at+8];
    ld.shared.u32 %d, [%at+12];
    st.global.u32 [%q], %b0;
    st.global.u32 [%q+4], %b1;
    st.global.u32 [%q+8], %b2;
    st.global.u32 [%q+12], %b3;
    st.global.u32 [%q+16], %c0;
    st.global.u32 [%q+20], %c1;
    st.global.u32 [%q+24], %d;
    ret;
}
";

/// The seven words that each thread loads, or the fault.
fn run(isa: Isa, addresses: [u32; 32]) -> Result<Vec<u32>, FaultKind> {
    let module = cuda_emu::ptx::parse(KERNEL).expect("the kernel above");
    let memory = Memory::new(1 << 20);
    let loaded = LoadedModule::load(&memory, Arc::new(module)).expect("memory for the module");
    let (input, output) = (memory.alloc(128).expect("memory"), memory.alloc(32 * 28).expect("memory"));
    let bytes: Vec<u8> = addresses.iter().flat_map(|a| a.to_le_bytes()).collect();
    memory.copy_in(input, &bytes).expect("a buffer just allocated");
    let kernel = loaded.module.kernels[0].clone();
    let params = [input.to_le_bytes(), output.to_le_bytes()].concat();
    let launch = Launch {
        kernel: &kernel,
        module: &loaded,
        grid: [1; 3],
        block: [32, 1, 1],
        dynamic_shared: 0,
        params: &params,
        multiprocessors: 1,
        cooperative: false,
    };
    let settings =
        Settings { checks: Checks::FAST, counters: false, threads: 1, isa: Some(isa), ..Settings::default() };
    cuda_emu::exec::launch(&memory, &launch, &settings).map_err(|fault| fault.kind)?;
    let mut found = vec![0; 32 * 28];
    memory.copy_out(output, &mut found).expect("a buffer of this size");
    Ok(found.chunks(4).map(|w| u32::from_le_bytes(w.try_into().expect("4 bytes"))).collect())
}

#[test]
fn any_pattern_of_addresses() {
    let patterns: [fn(u32) -> u32; 5] = [|t| t, |t| 31 - t, |_| 17, |t| t / 16 * 3, |t| t * 7 % 32];
    for (_, isa) in available() {
        for pattern in patterns {
            let addresses = std::array::from_fn(|t| 16 * pattern(t as u32));
            let found = run(isa, addresses).expect("inside and aligned");
            for (t, words) in found.chunks(7).enumerate() {
                let first = 1000 + 4 * pattern(t as u32);
                assert_eq!(words, [0, 1, 2, 3, 2, 3, 3].map(|i| first + i), "{isa:?}, thread {t}");
            }
        }
    }
}

#[test]
fn one_lane_outside_or_misaligned() {
    for (_, isa) in available() {
        for lane in [0, 5, 13, 31] {
            for (wrong, kind) in
                [(512, FaultKind::OutOfBounds), (u32::MAX - 15, FaultKind::OutOfBounds), (4, FaultKind::Misaligned)]
            {
                let addresses = std::array::from_fn(|t| if t == lane { wrong } else { 16 * t as u32 });
                assert_eq!(run(isa, addresses).err(), Some(kind), "{isa:?}, lane {lane} at {wrong}");
            }
        }
    }
}
