//! Kernels compiled by nvcc, run by the interpreter without a driver.

mod machine;

use cuda_emu::exec::FaultKind;
use machine::{Arg, Device};

/// Numbers that look random and are the same everywhere.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn sgemm(name: &str, m: usize, n: usize, k: usize) -> Result<(), cuda_emu::exec::Fault> {
    let device = Device::new(include_str!("kernels/sgemm.ptx"));
    let (a, b) = (noise(m * k, 1), noise(k * n, 2));
    let (a_at, b_at) = (device.upload(&a), device.upload(&b));
    let c_at = device.memory.alloc((m * n * 4) as u64).unwrap();
    let grid = [n.div_ceil(64) as u32, m.div_ceil(64) as u32, 1];
    let args =
        [Arg::U64(a_at), Arg::U64(b_at), Arg::U64(c_at), Arg::U32(m as u32), Arg::U32(n as u32), Arg::U32(k as u32)];
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

const CONTROL: &str = include_str!("kernels/control.ptx");

#[test]
fn calls_pass_structures_by_value_and_reference() {
    let device = Device::new(CONTROL);
    let n = 70;
    let x = noise(n, 3);
    let at = device.upload(&x);
    let kernel = device.module.module.kernels.iter().find(|kernel| kernel.name == "calls").unwrap();
    let mut params = vec![0u8; kernel.param_bytes as usize];
    let big: Vec<u8> = [10i32, 20, 30, 40, 50, 0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .chain(2.5f64.to_le_bytes())
        .chain([7; 8])
        .collect();
    params[..8].copy_from_slice(&at.to_le_bytes());
    params[kernel.params[1].offset as usize..][..40].copy_from_slice(&big);
    params[kernel.params[2].offset as usize..][..4].copy_from_slice(&(n as i32).to_le_bytes());
    device.launch_raw("calls", [3, 1, 1], [32, 1, 1], 0, &params).unwrap_or_else(|fault| panic!("{fault}"));
    let out: Vec<f32> = device.download(at, n);
    for i in 0..n {
        let helped = (f64::from(x[i] * 30.0) + i as f64) as f32;
        let want = helped + [1.0, 2.0, 4.0, 8.0][i & 3] + (i * (i % 5)) as f32 + [10.0, 20.0, 30.0, 40.0, 50.0][i % 5];
        assert_eq!(out[i], want, "element {i}");
    }
}

#[test]
fn divergent_loops_agree() {
    let reference = |i: i32| {
        let mut sum: i32 = 0;
        for k in 0..i {
            if k % 7 == 3 {
                continue;
            }
            if sum > 300 {
                break;
            }
            match (i + k) % 9 {
                0 => sum += 3,
                1 => sum = sum * 5 % 101,
                2 => sum ^= 3,
                3 => sum += k,
                4 => sum -= i,
                5 => sum += k / (i + 1),
                6 => sum |= 4,
                _ => sum += 1,
            }
        }
        sum
    };
    let device = Device::new(CONTROL);
    let at = device.upload(&[0i32; 64]);
    let n = 61;
    let counters = device
        .run("diverge", [1, 1, 1], [64, 1, 1], 0, &[Arg::U64(at), Arg::U32(n)])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let out: Vec<i32> = device.download(at, 64);
    for warp in 0..2 {
        let lanes = warp * 32..(warp * 32 + 32).min(n as i32);
        let total: i32 = lanes.clone().map(reference).sum();
        for i in lanes {
            assert_eq!(
                out[i as usize],
                reference(i) * 1000 + total % 1000,
                "thread {i}: lanes that left the loop wait for the others"
            );
        }
    }
    assert_eq!(out[61..], [0; 3]);
    assert!(counters.divergent_branches > 0);
}

#[test]
fn printf_comes_in_the_order_of_blocks() {
    let mut device = Device::new(CONTROL);
    let text = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let sink = text.clone();
    device.settings.output =
        Some(std::sync::Arc::new(move |bytes| sink.lock().unwrap().push_str(std::str::from_utf8(bytes).unwrap())));
    device.run("say", [1, 1, 1], [32, 1, 1], 0, &[Arg::U32(2)]).unwrap_or_else(|fault| panic!("{fault}"));
    let want = "thread 0 is even, half is 0.00,     0|0   |123456789ab\n\
                thread 1 is odd, half is 0.50,     1|-1  |123456789ac\n";
    assert_eq!(*text.lock().unwrap(), want);
}

#[test]
fn a_failed_assert_says_where() {
    let device = Device::new(CONTROL);
    let at = device.upload(&[1i32, 2, 0, 4]);
    let fault = device.run("asserting", [1, 1, 1], [4, 1, 1], 0, &[Arg::U64(at)]).unwrap_err();
    assert_eq!((fault.kind, fault.thread, fault.code()), (FaultKind::Assert, [2, 0, 0], 710), "{fault}");
    assert!(fault.detail.contains("control.cu") && fault.detail.contains("x[threadIdx.x] > 0"), "{fault}");
}

#[test]
fn warp_functions_agree() {
    let device = Device::new(CONTROL);
    let at = device.upload(&[0u32; 32 * 16]);
    device.run("warp_functions", [1, 1, 1], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap_or_else(|fault| panic!("{fault}"));
    let out: Vec<u32> = device.download(at, 32 * 16);
    for i in 0..32u32 {
        let o = &out[i as usize * 16..][..16];
        let matching = (0..32).filter(|k| k / 5 == i / 5).fold(0u32, |set, k| set | 1 << k);
        let low_half = i < 16;
        let tile_any = u32::from(i / 8 == 1);
        let tile_shifted = if i % 8 + 2 < 8 { i + 2 } else { i };
        let want = [
            0xaaaa_aaaa,
            3,
            matching,
            !0,
            1,
            496 + 31 + 64,
            (i + 1) % 32 * 3,
            if i >= 2 { (i - 2) * 3 } else { i * 3 },
            if i % 8 + 3 < 8 { (i + 3) * 3 } else { i * 3 },
            (i ^ 5) * 3,
            11,
            1,
            if low_half { 0xcccc } else { 0xf0f0_0000 },
            tile_shifted + tile_any,
            3200 + i,
            32,
        ];
        assert_eq!(o, want, "lane {i}");
    }
}

#[test]
fn warps_pass_data_through_named_barriers() {
    for seed in [None, Some(1), Some(2)] {
        let mut device = Device::new(CONTROL);
        device.settings.schedule_seed = seed;
        let at = device.upload(&[0i32; 96]);
        device
            .run("producer_consumer", [1, 1, 1], [64, 1, 1], 0, &[Arg::U64(at)])
            .unwrap_or_else(|fault| panic!("{fault}"));
        let out: Vec<i32> = device.download(at, 96);
        let want: Vec<i32> = (0..96).map(|i| (31 - i % 32) * 10 + i / 32).collect();
        assert_eq!(out, want);
    }
}

#[test]
fn lanes_that_spin_on_a_lock_make_progress() {
    let mut device = Device::new(CONTROL);
    device.settings.instruction_limit = 100_000_000;
    let (lock, value) = (device.upload(&[0i32]), device.upload(&[0i32]));
    device
        .run("spin_lock", [2, 1, 1], [64, 1, 1], 0, &[Arg::U64(lock), Arg::U64(value)])
        .unwrap_or_else(|fault| panic!("{fault}"));
    assert_eq!(device.download::<i32>(value, 1), [128]);
}

#[test]
fn blocks_that_wait_for_each_other_all_run() {
    grid_barriers(1, 6);
    grid_barriers(2, 6);
}

#[test]
fn so_do_many_on_one_worker() {
    grid_barriers(1, 3 * 108);
}

fn grid_barriers(threads: usize, blocks: usize) {
    let mut device = Device::new(CONTROL);
    device.settings.threads = threads;
    device.settings.instruction_limit = 20_000_000;
    let arrived = device.upload(&[0u32; 2]);
    let out = device.upload(&vec![0i32; blocks * 3]);
    device
        .run("grid_barrier", [blocks as u32, 1, 1], [64, 1, 1], 0, &[Arg::U64(arrived), Arg::U64(out)])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let out: Vec<i32> = device.download(out, blocks * 3);
    // In each round every warp of block b adds b to out[b], all lanes at once: at least one addition a round counts, at
    // most both warps'. A block then reads its neighbour's sum, which has the additions of this round and of no later
    // one.
    for b in 0..blocks {
        let (own, next) = (b as i32, ((b + 1) % blocks) as i32);
        let (first, second) = (out[blocks + b * 2], out[blocks + b * 2 + 1]);
        assert!((2 * own..=4 * own).contains(&out[b]), "block {b}: {out:?}");
        assert!((next..=2 * next).contains(&first) && (2 * next..=4 * next).contains(&second), "block {b}: {out:?}");
    }
}

#[test]
fn what_is_waited_for_past_the_l1_cache_has_been_handed_over() {
    for (threads, seed) in [(1, None), (2, None), (2, Some(3))] {
        let mut device = Device::new(CONTROL);
        (device.settings.threads, device.settings.schedule_seed) = (threads, seed);
        let blocks = 40;
        let (done, value) = (device.upload(&[0u32]), device.memory.alloc(64 * 4).unwrap());
        let out = device.memory.alloc(blocks as u64 * 64 * 4).unwrap();
        let args = [Arg::U64(done), Arg::U64(value), Arg::U64(out)];
        let counters = device
            .run("handed_over_past_l1", [blocks + 1, 1, 1], [64, 1, 1], 0, &args)
            .unwrap_or_else(|fault| panic!("{fault}"));
        let out: Vec<i32> = device.download(out, blocks as usize * 64);
        assert!((0..out.len()).all(|i| out[i] == 3 * (i % 64) as i32), "{out:?}");
        // In order, each block is put aside after some dozens of polls; otherwise it would cost a hundred thousand
        // rounds.
        if (threads, seed) == (1, None) {
            assert!(counters.control < 40_000, "{counters:?}");
        }
    }
}

#[test]
fn the_last_block_may_read_what_others_fenced() {
    let n = 4 * 64;
    let x = noise(n, 4);
    let run = |name: &str, seed: Option<u64>| {
        let mut device = Device::new(CONTROL);
        device.settings.schedule_seed = seed;
        let partial = device.memory.alloc(n as u64 * 4).unwrap();
        let (arrived, out, x) = (device.upload(&[0u32]), device.upload(&[0f32]), device.upload(&x));
        device.run(
            name,
            [4, 1, 1],
            [64, 1, 1],
            0,
            &[Arg::U64(partial), Arg::U64(arrived), Arg::U64(out), Arg::U64(x)],
        )?;
        Ok::<f32, cuda_emu::exec::Fault>(device.download::<f32>(out, 1)[0])
    };
    let want: f64 = x.iter().map(|&x| 2.0 * f64::from(x)).sum();
    for seed in [None, Some(7), Some(8)] {
        let got = run("last_block_sums", seed).unwrap_or_else(|fault| panic!("{fault}"));
        // Four partial sums per thread and 64 atomic additions of values below 8: 68 roundings of at most 2^-22 each.
        assert!((f64::from(got) - want).abs() < 68.0 * 2f64.powi(-18), "{got} for {want}");
    }
    let fault = run("last_block_without_fence", None).expect_err("nothing orders the partial sums");
    assert_eq!(fault.kind, FaultKind::GlobalRace, "{fault}");
}

#[test]
fn copies_arrive_when_they_are_waited_for() {
    let device = Device::new(CONTROL);
    let input: Vec<i32> = (0..256).collect();
    let at = device.upload(&input);
    let out = device.memory.alloc(1024).unwrap();
    device
        .run("async_copies", [1, 1, 1], [32, 1, 1], 0, &[Arg::U64(out), Arg::U64(at)])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let got: Vec<i32> = device.download(out, 256);
    for (i, &word) in got.iter().enumerate() {
        let (half, quad, part) = (i / 128, i % 128 / 4, i % 4);
        assert_eq!(word, (half * 128 + (31 - quad) * 4 + part) as i32);
    }
    for pick in 0..3 {
        let mut device = Device::new(CONTROL);
        device.settings.checks.shared_races = pick == 0;
        device.settings.checks.uninitialised = pick == 1;
        let at = device.upload(&input);
        let out = device.memory.alloc(1024).unwrap();
        let result = device.run("async_too_early", [1, 1, 1], [32, 1, 1], 0, &[Arg::U64(out), Arg::U64(at)]);
        match pick {
            0 => assert_eq!(result.unwrap_err().kind, FaultKind::SharedRace),
            1 => assert_eq!(result.unwrap_err().kind, FaultKind::Uninitialised),
            _ => {
                result.unwrap();
                assert_ne!(device.download::<i32>(out, 256), got, "data that is not waited for must not be there");
            }
        }
    }
}

/// Lanes part between a commit and a wait: a group more, of no copies, makes `wait_group 1` wait for the copies before
/// it, so that even lanes have theirs and odd ones not; and lanes may wait apart from each other.
#[test]
fn commit_groups_are_each_lanes_own() {
    let start = "and.b32 %r0, %t, 1; setp.eq.u32 %c0, %r0, 0;\n\
                 mov.u32 %r9, s; shl.b32 %r1, %t, 4; add.u32 %r9, %r9, %r1;\n\
                 cvt.u64.u32 %q1, %r1; add.u64 %q0, %p, %q1;\n\
                 cp.async.cg.shared.global [%r9], [%q0], 16;\ncp.async.commit_group;\n";
    let end = "ld.shared.u32 %r2, [%r9];\nst.global.u32 [%q0+512], %r2;\n";
    let more = "@!%c0 bra ODD;\ncp.async.commit_group;\nODD:\n";
    let apart = "@%c0 bra EVEN;\ncp.async.wait_group 0;\nbra BOTH;\nEVEN:\ncp.async.wait_group 1;\nBOTH:\n";
    for (middle, odd_have_theirs) in
        [(format!("{more}cp.async.wait_group 1;\n"), false), (format!("{more}{apart}"), true), (apart.into(), true)]
    {
        // Without a group more, even lanes wait for none: `apart` alone.
        let even_have_theirs = middle.contains("ODD");
        let text = module(&format!("{start}{middle}{end}"));
        let input: Vec<u32> = (0..256).map(|i| i + 1).collect();
        let mut device = Device::new(&text);
        let at = device.upload(&input);
        let checked = device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(at)]);
        let all = even_have_theirs && odd_have_theirs;
        assert_eq!(checked.is_ok(), all, "{middle}: {:?}", checked.err().map(|fault| fault.to_string()));
        device.settings.checks = cuda_emu::exec::Checks::NONE;
        let at = device.upload(&input);
        device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap_or_else(|fault| panic!("{middle}: {fault}"));
        let got: Vec<u32> = device.download(at, 256);
        for lane in 0..32 {
            let has = if lane % 2 == 0 { even_have_theirs } else { odd_have_theirs };
            assert_eq!(got[128 + 4 * lane] == input[4 * lane], has, "lane {lane} of {middle}");
        }
    }
}

/// Accesses whose last byte, address plus offset, or row is beyond the address space, by every path an access can take.
#[test]
fn addresses_that_wrap_are_out_of_bounds() {
    use cuda_emu::exec::{Checks, Isa, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW};
    // Every path: the exact checks, the fast ones with and without counters, and those of each instruction set.
    let settings = [
        (Checks::ALL, true, Isa::Avx512),
        (Checks::FAST, false, Isa::Avx512),
        (Checks::FAST, false, Isa::Avx2),
        (Checks::FAST, false, Isa::Portable),
        (Checks::NONE, true, Isa::Portable),
        (Checks::NONE, false, Isa::Avx512),
    ];
    let refused = |base: u64, instruction: &str, threads: u32| {
        // The instruction's address is in %q0 and its low half in %r8; %r9 is a shared address that is good.
        let text = module(&format!(
            "mov.u64 %q0, {base};\ncvt.u32.u64 %r8, %q0;\nmov.u32 %r9, s;\nmov.u32 %r10, 3;\nmov.u32 %r11, -1;\n\
             {instruction}\ncp.async.wait_all;"
        ));
        for (checks, counters, isa) in settings {
            let mut device = Device::new(&text);
            (device.settings.checks, device.settings.counters, device.settings.isa) = (checks, counters, Some(isa));
            let at = device.upload(&[0u64; 64]);
            let fault = device.run("k", [1; 3], [threads, 1, 1], 0, &[Arg::U64(at)]).map(|_| ());
            let fault = fault.expect_err(&format!("{instruction} at {base:#x} with {threads} threads, {checks:?}"));
            assert_eq!(fault.kind, FaultKind::OutOfBounds, "{base:#x}: {fault}");
        }
    };
    let back = |bytes: u64| bytes.wrapping_neg();
    for threads in [1, 32] {
        for bytes in [4, 8, 16] {
            let (vector, registers) = match bytes {
                4 => ("u32", "%r0"),
                8 => ("v2.u32", "{%r0, %r1}"),
                _ => ("v4.u32", "{%r0, %r1, %r2, %r3}"),
            };
            for space in [".global", "", ".local", ".shared"] {
                let load = format!("ld{space}.{vector} {registers}, ");
                // The end is 2^64; the address is, by an offset, just below 2^64 or just above.
                refused(back(bytes), &format!("{load}[%q0];"), threads);
                refused(bytes, &format!("{load}[%q0+-{}];", 2 * bytes), threads);
                refused(back(bytes), &format!("{load}[%q0+{bytes}];").replace(".shared", ".global"), threads);
                refused(back(bytes), &format!("st{space}.{vector} [%q0], {registers};"), threads);
            }
            // 32-bit addresses, and a vector of which only the end is outside.
            refused(back(bytes), &format!("ld.shared.{vector} {registers}, [%r8];"), threads);
            refused(back(bytes), &format!("st.shared.{vector} [%r8], {registers};"), threads);
            refused(1024, &format!("st.shared.{vector} [%r8], {registers};"), threads);
            refused(back(bytes), &format!("ld.param.{vector} {registers}, [%q0];"), threads);
            refused(back(bytes), &format!("cp.async.ca.shared.global [%r9], [%q0], {bytes};"), threads);
            refused(back(bytes), &format!("cp.async.ca.shared.global [%r8], [%p], {bytes};"), threads);
            refused(back(bytes), &format!("cp.async.ca.shared.global [%q0], [%p], {bytes};"), threads);
            // Only the first three bytes of the source are read, or none.
            refused(back(bytes), &format!("cp.async.ca.shared.global [%r9], [%q0], {bytes}, %r10;"), threads);
            refused(back(16), &format!("cp.async.ca.shared.global [%r9+-32], [%p], {bytes}, 0;"), threads);
            // Generic addresses that run into a window, or out of it.
            for window in [SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW] {
                refused(window - bytes, &format!("ld.{vector} {registers}, [%q0];"), threads);
                refused(window + (1 << 56) - bytes, &format!("ld.{vector} {registers}, [%q0];"), threads);
            }
            refused(SHARED_WINDOW + 1024, &format!("st.{vector} [%q0], {registers};"), threads);
        }
        for space in [".global", "", ".shared"] {
            refused(back(4), &format!("atom{space}.add.u32 %r0, [%q0], 1;"), threads);
            refused(back(8), &format!("red{space}.add.u64 [%q0], 1;"), threads);
        }
        refused(back(4), "atom.shared.cas.b32 %r0, [%r8], 0, 1;", threads);
        refused(back(8), "mbarrier.init.shared.b64 [%r8], 1;", threads);
        refused(back(8), "mbarrier.init.b64 [%q0], 1;", threads);
    }
    for (number, registers) in [("x1", "%r0"), ("x2", "%r0, %r1"), ("x4", "%r0, %r1, %r2, %r3")] {
        let load = format!("ldmatrix.sync.aligned.m8n8.{number}.shared.b16 {{{registers}}}, ");
        refused(back(16), &format!("{load}[%r8];"), 32);
        refused(back(16), &format!("{load}[%q0];"), 32);
        refused(16, &format!("{load}[%r8+-32];"), 32);
    }
    // Rows of 2^32 - 1 elements: the last one is beyond 2^64, of 32-bit addresses far beyond 2^32.
    let wmma = "wmma.load.c.sync.aligned.row.m16n16k16";
    let registers = "{%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}";
    refused(back(32), &format!("{wmma}.global.f32 {registers}, [%q0], %r11;"), 32);
    refused(back(1 << 34), &format!("{wmma}.f32 {registers}, [%q0], %r11;"), 32);
    refused(0, &format!("{wmma}.shared.f32 {registers}, [%r8], %r11;"), 32);
}

#[test]
fn addresses_of_other_spaces_do_not_become_shared_ones() {
    let array = "mov.u64 %q0, s;\ncvta.shared.u64 %q0, %q0;\n";
    // A pointer in front of its array, as loops that count up first have.
    let before = format!("{array}sub.u64 %q0, %q0, 16;");
    // The low halves of the others are good offsets.
    for (address, good) in [
        (array, true),
        (before.as_str(), true),
        ("and.b64 %q0, %p, -4294967296;", false),
        ("mov.u64 %q0, 0;", false),
        ("mov.u64 %q0, 0x200000000000000;", false),
    ] {
        let device = Device::new(&module(&format!(
            "mov.u32 %r9, s;\n{address}\ncvta.to.shared.u64 %q1, %q0;\ncvt.u32.u64 %r8, %q1;\n\
             st.shared.u32 [%r8+16], %t;"
        )));
        let at = device.upload(&[0u32; 64]);
        let result = device.run("k", [1; 3], [1; 3], 0, &[Arg::U64(at)]).map(|_| ()).map_err(|fault| fault.kind);
        assert_eq!(result, if good { Ok(()) } else { Err(FaultKind::OutOfBounds) }, "{address}");
    }
}

#[test]
fn asynchronous_copies_to_the_end_of_the_address_space_are_refused() {
    // Of the first, address plus size is 2^64.
    for address in [-8i64, -16, 1024, 1 << 32] {
        for checks in [cuda_emu::exec::Checks::ALL, cuda_emu::exec::Checks::FAST] {
            let mut device =
                Device::new(&module(&format!("mov.u64 %q0, {address};\ncp.async.ca.shared.global [%q0], [%p], 8;")));
            device.settings.checks = checks;
            let at = device.upload(&[0u64]);
            let fault = device.run("k", [1; 3], [1; 3], 0, &[Arg::U64(at)]).expect_err("outside");
            assert_eq!(fault.kind, FaultKind::OutOfBounds, "{address}: {fault}");
        }
    }
}

#[test]
fn bugs_are_refused_by_kind() {
    let run = |name: &str, grid: u32, block: u32| {
        let mut device = Device::new(CONTROL);
        device.settings.instruction_limit = 1_000_000;
        let at = device.upload(&vec![0i32; 4096]);
        device.run(name, [grid, 1, 1], [block, 1, 1], 0, &[Arg::U64(at)])
    };
    for (name, grid, block, kind) in [
        ("divergent_barrier", 1, 64, FaultKind::Barrier),
        ("two_barriers", 1, 64, FaultKind::Barrier),
        ("inactive_shuffle", 1, 32, FaultKind::InactiveShuffle),
        ("missing_lane", 1, 32, FaultKind::InactiveShuffle),
        ("block_race", 2, 32, FaultKind::GlobalRace),
        ("neighbour_race", 2, 32, FaultKind::GlobalRace),
        ("warp_race", 1, 32, FaultKind::SharedRace),
        ("endless", 1, 32, FaultKind::Timeout),
    ] {
        let fault = run(name, grid, block).expect_err(name);
        assert_eq!(fault.kind, kind, "{name}: {fault}");
        assert!(fault.line > 0 && !fault.instruction.is_empty() && fault.kernel == name, "{name}: {fault}");
    }
    for (name, grid, block) in
        [("warp_synchronised", 1, 32), ("half_words", 3, 33), ("one_atomic", 5, 96), ("block_race", 1, 32)]
    {
        run(name, grid, block).unwrap_or_else(|fault| panic!("{fault}"));
    }
}

#[test]
fn the_first_fault_in_order_is_reported_at_any_number_of_threads() {
    let fault = |threads: usize| {
        let mut device = Device::new(CONTROL);
        device.settings.threads = threads;
        let at = device.upload(&[0i32; 64]);
        device.run("neighbour_race", [1, 1, 1], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap();
        device.settings.checks.global_races = false;
        device.run("neighbour_race", [20, 1, 1], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap_err()
    };
    let first = fault(1);
    assert_eq!((first.kind, first.block), (FaultKind::OutOfBounds, [1, 0, 0]), "{first}");
    for _ in 0..10 {
        let other = fault(4);
        assert_eq!((other.block, other.thread, other.line), (first.block, first.thread, first.line));
    }
}

const FAULTS: &str = include_str!("kernels/faults.ptx");

#[test]
fn a_fault_ends_blocks_that_wait_for_the_one_that_had_it() {
    let fault = |name: &'static str, threads: usize, seed: Option<u64>, cooperative: bool| {
        let (to, from) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut device = Device::new(FAULTS);
            (device.settings.threads, device.settings.schedule_seed) = (threads, seed);
            device.cooperative = cooperative;
            // Nothing but the fault ends this launch.
            device.settings.instruction_limit = 0;
            let at = device.upload(&[0i32]);
            // Nobody listens any more when it took too long.
            let _ = to.send(device.run(name, [9, 1, 1], [64, 1, 1], 0, &[Arg::U64(at)]));
        });
        // It takes a fraction of a second; machines may be busy.
        let told = from.recv_timeout(std::time::Duration::from_secs(60));
        told.unwrap_or_else(|_| panic!("{name} with {threads} threads still runs")).expect_err(name)
    };
    for name in ["waits_by_reading", "waits_past_l1", "waits_by_atomics", "waits_at_barrier"] {
        for (threads, seed, cooperative) in
            [(1, None, false), (2, None, false), (3, Some(5), false), (1, None, true), (2, None, true)]
        {
            let fault = fault(name, threads, seed, cooperative);
            assert_eq!((fault.kind, fault.block), (FaultKind::OutOfBounds, [8, 0, 0]), "{name}: {fault}");
        }
    }
}

#[test]
fn an_earlier_block_that_does_not_wait_has_time_for_its_own_fault() {
    for _ in 0..3 {
        let device = Device::new(FAULTS);
        let at = device.upload(&[0i32]);
        // Some hundred turns after block 1 has faulted on the other thread.
        let args = [Arg::U64(at), Arg::U32(2_000_000)];
        let fault = device.run("first_block_is_late", [40, 1, 1], [32, 1, 1], 0, &args).expect_err("all blocks fault");
        assert_eq!((fault.kind, fault.block), (FaultKind::OutOfBounds, [0, 0, 0]), "{fault}");
    }
}

#[test]
fn counters_do_not_depend_on_threads_or_order() {
    let count = |threads: usize, seed: Option<u64>| {
        let mut device = Device::new(include_str!("kernels/sgemm.ptx"));
        (device.settings.threads, device.settings.schedule_seed) = (threads, seed);
        let (a, b) = (device.upload(&noise(100 * 40, 1)), device.upload(&noise(40 * 130, 2)));
        let c = device.memory.alloc(100 * 130 * 4).unwrap();
        let args = [Arg::U64(a), Arg::U64(b), Arg::U64(c), Arg::U32(100), Arg::U32(130), Arg::U32(40)];
        device.run("sgemm", [3, 2, 1], [256, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"))
    };
    let first = count(1, None);
    assert_eq!(first, count(4, None));
    assert_eq!(first, count(3, Some(5)));
    // 6 blocks of 8 warps, 5 steps of 8 along k, 16 fma each.
    assert_eq!((first.fma, first.flops_f32), (6 * 8 * 40 * 16, 6 * 256 * 40 * 16 * 2));
    assert_eq!(first.global_store_bytes, 100 * 130 * 4);
    assert_eq!(first.blocks, 6);
    // What is read and written once, in whole sectors.
    let distinct = (100u64 * 40 * 4).div_ceil(32) + (40u64 * 130 * 4).div_ceil(32) + (100u64 * 130 * 4).div_ceil(32);
    assert_eq!(first.distinct_bytes, distinct * 32);
    assert_eq!(first.distinct_read_bytes, (distinct - (100u64 * 130 * 4).div_ceil(32)) * 32);
    assert_eq!(first.distinct_written_bytes, (100u64 * 130 * 4).div_ceil(32) * 32);
    assert!(first.shared_wavefronts >= first.shared_ideal && first.shared_ideal > 0);
}

/// So many blocks of the grid and no others, each once, whatever the order and the number of threads; all of them if
/// there are no more.
#[test]
fn a_sample_of_the_blocks_is_counted() {
    let count = |blocks: u64, threads: usize, seed: Option<u64>| {
        let mut device = Device::new(include_str!("kernels/sgemm.ptx"));
        device.settings.blocks = blocks;
        (device.settings.threads, device.settings.schedule_seed) = (threads, seed);
        let (m, n, k) = (64 * 5, 64 * 4, 32);
        let (a, b) = (device.upload(&noise(m * k, 1)), device.upload(&noise(k * n, 2)));
        let c = device.upload(&vec![-1e9f32; m * n]);
        let args = [Arg::U64(a), Arg::U64(b), Arg::U64(c), Arg::U32(m as u32), Arg::U32(n as u32), Arg::U32(k as u32)];
        let grid = [(n / 64) as u32, (m / 64) as u32, 1];
        let counters = device.run("sgemm", grid, [256, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
        let written = device.download::<f32>(c, m * n).into_iter().filter(|&v| v != -1e9).count() as u64;
        (counters, written)
    };
    let (all, written) = count(0, 1, None);
    assert_eq!((all.blocks, written), (20, 20 * 64 * 64));
    for (blocks, threads, seed) in [(7, 1, None), (7, 3, Some(9)), (1, 2, None), (20, 2, None), (1000, 2, None)] {
        let (some, written) = count(blocks, threads, seed);
        let run = blocks.min(20);
        assert_eq!((some.blocks, written), (run, run * 64 * 64), "{blocks} blocks on {threads} threads");
        // All tiles of this product are whole, so each block does a twentieth.
        assert_eq!((some.fma * 20, some.global_sectors * 20), (all.fma * run, all.global_sectors * run));
    }
}

/// Of a grid whose first three blocks do far more than the other fifty, a sample of all would have none or one of them.
/// A sample of each kind is what an average of all is; a sample of a grid of another size knows no kinds.
#[test]
fn a_sample_has_blocks_of_every_kind() {
    let text = module(
        "mov.u32 %r0, %ctaid.x;\nsetp.lt.u32 %c0, %r0, 3;\nselp.u32 %r1, 500, 20, %c0;\nmov.f32 %f0, 0f3F800000;\n\
         again:\nfma.rn.f32 %f0, %f0, %f0, %f0;\nsub.u32 %r1, %r1, 1;\nsetp.ne.u32 %c1, %r1, 0;\n@%c1 bra again;\n\
         mad.wide.u32 %q0, %r0, 128, %p;\nmad.wide.u32 %q0, %t, 4, %q0;\nst.global.f32 [%q0], %f0;",
    );
    let count = |most: u64, kinds: &[u64], threads: usize| {
        let mut device = Device::new(&text);
        (device.settings.blocks, device.settings.kinds, device.settings.threads) = (most, kinds.to_vec(), threads);
        let at = device.upload(&[0f32; 53 * 32]);
        device.run("k", [53, 1, 1], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap_or_else(|fault| panic!("{fault}"))
    };
    let all = count(0, &[3, 50], 1);
    assert_eq!((all.blocks, all.fma, all.distinct_written_bytes), (53, 3 * 500 + 50 * 20, 53 * 128));
    // As many of each kind, but for a kind that has fewer; one of each at least.
    for (most, run) in [(8, 8), (4, 4), (1, 2)] {
        let some = count(most, &[3, 50], 2);
        let nearest = |whole: u64| (whole as f64 * run as f64 / 53.0).round();
        assert_eq!(some.blocks, run);
        for (got, whole) in [(some.fma, all.fma), (some.distinct_written_bytes, all.distinct_written_bytes)] {
            // Each kind's share is rounded.
            assert!((got as f64 - nearest(whole)).abs() <= 1.0, "{got} of {whole} in {run} blocks");
        }
    }
    assert_eq!(count(0, &[3, 50], 1), count(1000, &[3, 50], 2));
    assert_eq!(count(8, &[3, 50, 0], 1), count(8, &[3, 50], 1));
    let alike = count(8, &[], 1);
    assert!(alike.blocks == 8 && alike == count(8, &[3, 49], 1) && alike.fma % 20 == 0, "{alike:?}");
    assert_ne!(alike.fma, count(8, &[3, 50], 1).fma);
}

/// The cost of wide accesses is that of the hardware, whether the shape of the addresses is known already or not.
#[test]
fn loads_and_stores_of_shared_memory_are_counted_in_cycles() {
    // Ten rounds: a store of 16 bytes lane after lane, loads by which neighbours share or do not, and an atomic.
    let rounds = 10;
    let text = module(&format!(
        "mov.u32 %r8, s;\nmad.lo.u32 %r9, %t, 16, %r8;\nshr.u32 %r10, %t, 1;\nmad.lo.u32 %r10, %r10, 16, %r8;\n\
         and.b32 %r11, %t, 7;\nmad.lo.u32 %r11, %r11, 16, %r8;\nmov.u32 %r12, 0;\nagain:\n\
         st.shared.v4.u32 [%r9], {{%t, %t, %t, %t}};\nbar.warp.sync -1;\n\
         ld.shared.v4.u32 {{%r0, %r1, %r2, %r3}}, [%r10];\nld.shared.v4.u32 {{%r0, %r1, %r2, %r3}}, [%r11];\n\
         ld.shared.v2.u32 {{%r0, %r1}}, [%r10];\n\
         ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r0, %r1, %r2, %r3}}, [%r10];\n\
         bar.warp.sync -1;\natom.shared.add.u32 %r0, [s], 1;\nbar.warp.sync -1;\n\
         add.u32 %r12, %r12, 1;\nsetp.lt.u32 %c0, %r12, {rounds};\n@%c0 bra again;"
    ));
    for checks in [cuda_emu::exec::Checks::ALL, cuda_emu::exec::Checks::FAST] {
        let mut device = Device::new(&text);
        device.settings.checks = checks;
        let at = device.upload(&[0u32]);
        let counters =
            device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap_or_else(|fault| panic!("{fault}"));
        // Loads: 2 for 256 bytes, 4 for 128, 2 for 128 (every other 8 bytes, so two of each pair of banks), and 4 for
        // the matrices, whose 256 bytes are 16 rows.
        let (loads, least) = (2 + 4 + 2 + 4, 2 + 1 + 1 + 2);
        assert_eq!((counters.shared_load_cycles, counters.shared_load_ideal), (rounds * loads, rounds * least));
        assert_eq!((counters.shared_store_cycles, counters.shared_store_ideal), (rounds * 4, rounds * 4));
        assert_eq!(counters.shared_wavefronts, rounds * (loads + 4 + 1), "with one pass of the atomic");
        // Only the load of 8 bytes has a bank conflict.
        assert_eq!(counters.shared_ideal, rounds * (loads + 4), "{counters:?}");
        assert_eq!(counters.shared, rounds * 6);
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    use cuda_emu::exec::Isa;
    let run = |isa: Isa| {
        let mut device = Device::new(CONTROL);
        device.settings.isa = Some(isa);
        let at = device.upload(&[0u32; 32 * 16]);
        device.run("warp_functions", [1, 1, 1], [32, 1, 1], 0, &[Arg::U64(at)]).unwrap();
        device.download::<u32>(at, 32 * 16)
    };
    assert_eq!(run(Isa::Portable), run(Isa::Avx2));
    assert_eq!(run(Isa::Portable), run(Isa::Avx512));
}

/// A module of one kernel `k` with a pointer as parameter, in `%p`, and the thread's number in `%t`.
fn module(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 a)\n{{\n\
         .reg .b32 %r<20>;\n.reg .b32 %t;\n\
         .reg .b16 %h<8>;\n.reg .b64 %p;\n.reg .b64 %q<8>;\n.reg .f32 %f<8>;\n.reg .f64 %d<4>;\n.reg .pred %c<8>;\n\
         .shared .align 16 .b8 s[1024];\nld.param.u64 %p, [a];\nmov.u32 %t, %tid.x;\n{body}\nret;\n}}\n"
    )
}

#[test]
fn qualifiers_may_stand_in_any_order() {
    let both = [
        ("vote.sync.ballot.b32 %r0, %c0, -1;", "vote.ballot.sync.b32 %r0, %c0, -1;"),
        (
            "vote.sync.any.pred %c1, %c0, -1; selp.b32 %r0, 5, 6, %c1;",
            "vote.any.sync.pred %c1, %c0, -1; selp.b32 %r0, 5, 6, %c1;",
        ),
        ("shfl.sync.up.b32 %r0, %t, 3, 0, -1;", "shfl.up.sync.b32 %r0, %t, 3, 0, -1;"),
        ("match.any.sync.b32 %r0, %r9, -1;", "match.sync.any.b32 %r0, %r9, -1;"),
        ("redux.sync.max.u32 %r0, %t, -1;", "redux.max.sync.u32 %r0, %t, -1;"),
        (
            "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r0, %r1}, [%r8];",
            "ldmatrix.sync.aligned.x2.trans.m8n8.shared.b16 {%r0, %r1}, [%r8];",
        ),
        ("movmatrix.sync.aligned.m8n8.trans.b16 %r0, %t;", "movmatrix.sync.aligned.trans.m8n8.b16 %r0, %t;"),
    ];
    for (usual, other) in both {
        let results = [usual, other].map(|instruction| {
            let device = Device::new(&module(&format!(
                "and.b32 %r9, %t, 5;\nsetp.eq.u32 %c0, %r9, 4;\nmov.u32 %r8, s;\nmad.lo.u32 %r8, %t, 16, %r8;\n\
                 st.shared.v4.u32 [%r8], {{%t, %r9, %r8, %t}};\nbar.sync 0;\n{instruction}\n\
                 mad.wide.u32 %p, %t, 4, %p;\nst.global.u32 [%p], %r0;"
            )));
            let out = device.upload(&[0u32; 32]);
            device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(out)]).unwrap_or_else(|fault| panic!("{fault}"));
            device.download::<u32>(out, 32)
        });
        assert_eq!(results[0], results[1], "{other}");
        assert!(results[0].iter().any(|&value| value != 0), "{other}");
    }
}

#[test]
fn a_lock_is_handed_on_soon_in_any_order() {
    let text = module(
        "again:\natom.global.cas.b32 %r0, [%p], 0, 1;\nsetp.ne.u32 %c0, %r0, 0;\n@%c0 bra again;\nmembar.gl;\n\
         ld.global.u32 %r1, [%p+4];\nadd.u32 %r1, %r1, 1;\nst.global.u32 [%p+4], %r1;\nmembar.gl;\n\
         atom.global.exch.b32 %r2, [%p], 0;",
    );
    for seed in [None, Some(1), Some(2), Some(3)] {
        let mut device = Device::new(&text);
        device.settings.schedule_seed = seed;
        device.settings.threads = 1;
        // 256 threads hold the lock one after the other; each may cost a waiting warp some turns of a few hundred
        // instructions.
        device.settings.instruction_limit = 256 * 16 * 512;
        let at = device.upload(&[0u32; 2]);
        device.run("k", [4, 1, 1], [64, 1, 1], 0, &[Arg::U64(at)]).unwrap_or_else(|fault| panic!("{seed:?}: {fault}"));
        assert_eq!(device.download::<u32>(at, 2), [0, 256], "{seed:?}");
    }
}

#[test]
fn structures_are_copied_with_their_padding() {
    // 16 bytes a thread: a double, a byte, and 7 bytes that nobody writes; in global and in shared memory.
    let fill = "mad.wide.u32 %q0, %t, 16, %p;\nmov.f64 %d0, 0d3FF8000000000000;\n\
                mov.u32 %r8, s;\nmad.lo.u32 %r8, %t, 16, %r8;\n\
                st.global.f64 [%q0], %d0;\nst.global.u8 [%q0+8], %t;\n\
                st.shared.f64 [%r8], %d0;\nst.shared.u8 [%r8+8], %t;\nbar.sync 0;\n";
    let run = |load: &str| {
        let device = Device::new(&module(&format!("{fill}{load}")));
        let at = device.memory.alloc(16 * 32).expect("memory");
        device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(at)]).map(|_| ()).map_err(|fault| fault.kind)
    };
    for copied in
        ["v2.u64 {%q1, %q2}, [%q0]", "u32 %r0, [%q0+8]", "v4.u8 {%h0, %h1, %h2, %h3}, [%q0+12]", "u8 %h0, [%q0+9]"]
    {
        assert_eq!(run(&format!("ld.global.{copied};")), Ok(()), "{copied}");
        let shared = copied.replace("%q0", "%r8");
        assert_eq!(run(&format!("ld.shared.{shared};")), Ok(()), "{shared}");
    }
    for wrong in ["f64 %d1, [%q0+8]", "f32 %f0, [%q0+8]", "u32 %r0, [%q0+12]", "v4.u32 {%r0, %r1, %r2, %r3}, [%q0]"] {
        assert_eq!(run(&format!("ld.global.{wrong};")), Err(FaultKind::Uninitialised), "{wrong}");
        let shared = wrong.replace("%q0", "%r8");
        let used = format!("ld.shared.{shared};\nst.global.u32 [%q0], %r0;");
        assert_eq!(run(&used), Err(FaultKind::Uninitialised), "{shared}");
    }
}

#[test]
fn a_block_that_says_what_it_has_read_may_be_written_over() {
    // Block 0 reads word 1 and sets word 0; block 1 waits for word 0, or does not, and then writes word 1.
    let body = |wait: &str, access: &str| {
        module(&format!(
            "mov.u32 %r0, %ctaid.x;\nsetp.ne.u32 %c0, %r0, 0;\n@%c0 bra second;\n{access} \
             membar.cta;\nst.relaxed.gpu.global.u32 [%p], 1;\nret;\nsecond:\n{wait}\nst.global.u32 [%p+4], 9;"
        ))
    };
    let run = |text: String| {
        let mut device = Device::new(&text);
        device.settings.threads = 1;
        let at = device.upload(&[0u32, 5]);
        device.run("k", [2, 1, 1], [1; 3], 0, &[Arg::U64(at)]).map(|_| ()).map_err(|fault| fault.kind)
    };
    let wait = "ld.relaxed.gpu.global.u32 %r1, [%p];\nsetp.eq.u32 %c1, %r1, 0;\n@%c1 bra second;";
    let (read, write) = ("ld.global.u32 %r2, [%p+4];", "st.global.u32 [%p+4], 7;");
    assert_eq!(run(body(wait, read)), Ok(()));
    assert_eq!(run(body("", read)), Err(FaultKind::GlobalRace));
    // What it has written needs a fence of the device's scope.
    assert_eq!(run(body(wait, write)), Err(FaultKind::GlobalRace));
}

#[test]
fn atomics_release_and_acquire_by_themselves() {
    // Block 0 writes word 1 and adds to word 0; block 1 waits for word 0 and reads word 1.
    let run = |add: &str, wait: &str| {
        let mut device = Device::new(&module(&format!(
            "mov.u32 %r0, %ctaid.x;\nsetp.ne.u32 %c0, %r0, 0;\n@%c0 bra second;\n\
             st.global.u32 [%p+4], 7;\n{add}\nret;\n\
             second:\n{wait}\nsetp.eq.u32 %c1, %r1, 0;\n@%c1 bra second;\n\
             ld.global.u32 %r2, [%p+4];\nst.global.u32 [%p+8], %r2;"
        )));
        device.settings.threads = 1;
        let at = device.upload(&[0u32, 5, 0]);
        device.run("k", [2, 1, 1], [1; 3], 0, &[Arg::U64(at)]).map_err(|fault| fault.kind)?;
        Ok(device.download::<u32>(at, 3)[2])
    };
    for wait in ["ld.acquire.gpu.global.u32 %r1, [%p];", "atom.acquire.gpu.global.or.b32 %r1, [%p], 0;"] {
        for add in ["atom.add.release.gpu.u32 %r3, [%p], 1;", "red.release.gpu.global.add.u32 [%p], 1;"] {
            assert_eq!(run(add, wait), Ok(7), "{add} {wait}");
        }
        assert_eq!(run("atom.acq_rel.gpu.global.exch.b32 %r3, [%p], 1;", wait), Ok(7), "{wait}");
        assert_eq!(run("atom.relaxed.gpu.global.add.u32 %r3, [%p], 1;", wait), Err(FaultKind::GlobalRace), "{wait}");
        assert_eq!(run("atom.add.release.cta.u32 %r3, [%p], 1;", wait), Err(FaultKind::GlobalRace), "{wait}");
    }
}

#[test]
fn what_is_read_ahead_and_thrown_away_is_no_fault() {
    // Threads write 16 words each of the first half. Those from 16 on read what nothing has written, into %r0 and, by
    // ldmatrix, into lanes of %r1.
    let run = |use_of_it: &str| {
        let device = Device::new(&module(&format!(
            "setp.lt.u32 %c0, %t, 16;\nmov.u32 %r8, s;\nmad.lo.u32 %r8, %t, 16, %r8;\n\
             @%c0 st.shared.v4.u32 [%r8], {{%t, %t, %t, %t}};\nbar.sync 0;\n\
             ld.shared.u32 %r0, [%r8];\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r8];\n\
             mad.wide.u32 %q0, %t, 4, %p;\nmov.u32 %r9, 1;\nmov.f32 %f0, 0f00000000;\n\
             mov.f32 %f1, %f0;\nmov.f32 %f2, %f0;\nmov.f32 %f3, %f0;\n{use_of_it}"
        )));
        let at = device.upload(&[0u32; 64]);
        device.run("k", [1; 3], [32, 1, 1], 0, &[Arg::U64(at)]).map(|_| ()).map_err(|fault| fault.kind)
    };
    let refused = Err(FaultKind::Uninitialised);
    // Of the four matrices the first two have been written. An m16n8k8 product's A is two of them, rows 0 to 7 and 8 to
    // 15.
    let product = |a: &str, b: &str, stored: &str| {
        format!(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 \
             {{%f0, %f1, %f2, %f3}}, {{{a}}}, {{{b}}}, {{%f0, %f1, %f2, %f3}};\n\
             st.global.f32 [%q0], {stored};"
        )
    };
    // Rows of A and columns of B from 8 on have not been written.
    let fragments = |stored: &str| {
        format!(
            "mov.u32 %r10, 16;\nwmma.load.a.sync.aligned.row.m16n16k16.shared.bf16 {{%r0, %r1, %r2, %r3}}, [s], %r10;\n\
             wmma.load.b.sync.aligned.col.m16n16k16.shared.bf16 {{%r4, %r5, %r6, %r7}}, [s], %r10;\n\
             wmma.mma.sync.aligned.row.col.m16n16k16.f32.bf16.bf16.f32 {{%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}}, \
             {{%r0, %r1, %r2, %r3}}, {{%r4, %r5, %r6, %r7}}, {{%f0, %f1, %f2, %f3, %f0, %f1, %f2, %f3}};\n\
             st.global.f32 [%q0], {stored};"
        )
    };
    for good in [
        "add.u32 %r1, %r0, 5;".to_string(),
        "@%c0 st.global.u32 [%q0], %r0;".into(),
        "selp.u32 %r1, %r0, %t, %c0; st.global.u32 [%q0], %r1;".into(),
        "setp.eq.u32 %c1, %r0, 3; and.pred %c1, %c1, %c0; @%c1 bra on; on:".into(),
        "setp.eq.and.u32 %c1, %r0, 3, %c0; @%c1 bra on; on:".into(),
        "st.shared.u32 [%r8], %r0;".into(),
        "shfl.sync.idx.b32 %r1, %r0, 16, 31, -1;".into(),
        "shfl.sync.idx.b32 %r1, %r0, 15, 31, -1; st.global.u32 [%q0], %r1;".into(),
        "shfl.sync.up.b32 %r1|%c1, %r0, 1, 0, -1; @%c0 st.global.u32 [%q0], %r1; @%c1 bra on; on:".into(),
        "shfl.sync.idx.b32 %r0, %t, 0, 31, -1; st.global.u32 [%q0], %r0;".into(),
        "ld.shared.u32 %r0, [s]; st.global.u32 [%q0], %r0;".into(),
        product("%r4, %r6", "%r5", "%f0"),
        product("%r4, %r6", "%r5", "%f1"),
        fragments("%f1"),
    ] {
        assert_eq!(run(&good), Ok(()), "{good}");
    }
    for wrong in [
        "st.global.u32 [%q0], %r0;".to_string(),
        "add.u32 %r1, %r0, 5; cvt.u64.u32 %q1, %r1; add.u64 %q1, %q1, %q0; st.global.u64 [%p], %q1;".into(),
        "selp.u32 %r1, %t, %r0, %c0; st.global.u32 [%q0], %r1;".into(),
        "setp.eq.u32 %c1, %r0, 3; or.pred %c1, %c1, %c0; @%c1 bra on; on:".into(),
        "ld.shared.u32 %r1, [%r0];".into(),
        "ld.shared.f32 %f4, [%r8];".into(),
        "shfl.sync.idx.b32 %r1, %r0, 16, 31, -1; st.global.u32 [%q0], %r1;".into(),
        "shfl.sync.up.b32 %r1|%c1, %r0, 1, 0, -1; @%c0 add.u32 %r0, %r1, 1; st.global.u32 [%q0], %r0;".into(),
        "shfl.sync.idx.b32 %r1, %t, %r0, 31, -1;".into(),
        "st.shared.u32 [%r8], %r0; ld.shared.u32 %r1, [%r8]; st.global.u32 [%q0], %r1;".into(),
        product("%r4, %r6", "%r5", "%f2"),
        product("%r4, %r4", "%r6", "%f0"),
        product("%r4, %r4", "%r6", "%f1"),
        product("%r6, %r4", "%r5", "%f0"),
        fragments("%f2"),
        fragments("%f4"),
    ] {
        assert_eq!(run(&wrong), refused, "{wrong}");
    }
}

const GROUPS: &str = include_str!("kernels/groups.ptx");

#[test]
fn groups_of_several_warps_meet() {
    let input: Vec<i32> = (0..256).map(|i| i * 37 % 101).collect();
    for seed in [None, Some(1), Some(2)] {
        let mut device = Device::new(GROUPS);
        device.settings.schedule_seed = seed;
        let (from, to) = (device.upload(&input), device.upload(&[0i32; 256]));
        let args = [Arg::U64(from), Arg::U64(to)];
        device.run("wide_tiles", [1, 1, 1], [256, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
        let want: Vec<i32> = (0..256).map(|i| input[i / 64 * 64..][..64].iter().sum()).collect();
        assert_eq!(device.download::<i32>(to, 256), want);
    }
}

#[test]
fn blocks_that_do_not_meet_race() {
    const BLOCKS: usize = 6;
    let run = |name: &str, threads: usize, seed: Option<u64>| {
        let mut device = Device::new(GROUPS);
        (device.settings.threads, device.settings.schedule_seed) = (threads, seed);
        device.cooperative = true;
        let (x, sums) = (device.upload(&[0i32; BLOCKS]), device.upload(&[0i32; BLOCKS * 64]));
        let args = [Arg::U64(x), Arg::U64(sums)];
        device.run(name, [BLOCKS as u32, 1, 1], [64, 1, 1], 0, &args)?;
        Ok::<_, cuda_emu::exec::Fault>(device.download::<i32>(sums, BLOCKS * 64))
    };
    for threads in [1, 2] {
        for seed in [None, Some(1), Some(2)] {
            let sums = run("rounds_meet", threads, seed).unwrap_or_else(|fault| panic!("{fault}"));
            let want = |t: usize| 1000 + 5 * ((t / 64 + 1) % BLOCKS) as i32;
            assert!((0..BLOCKS * 64).all(|t| sums[t] == want(t)), "{sums:?}");
            let sums = run("counted_after", threads, seed).unwrap_or_else(|fault| panic!("{fault}"));
            assert!(sums.iter().all(|&sum| sum == 7 + BLOCKS as i32), "{sums:?}");
            run("changed_after", threads, seed).unwrap_or_else(|fault| panic!("{fault}"));
            for name in ["rounds_early", "rounds_late", "counted_before"] {
                let fault = run(name, threads, seed).expect_err(name);
                assert_eq!(fault.kind, FaultKind::GlobalRace, "{name}, {threads} threads, seed {seed:?}: {fault}");
            }
        }
    }
    // Of several readers only the last is known: here the first block, which writes, reads nothing.
    let fault = run("changed_before", 1, None).expect_err("changed_before");
    assert_eq!(fault.kind, FaultKind::GlobalRace, "{fault}");
    assert!(fault.to_string().contains("several blocks have read"), "{fault}");
}

#[test]
fn what_shuffles_pass_to_lanes_that_nobody_asks_is_no_fault() {
    let values: Vec<i32> = (0..96).map(|i| i * 37 % 101).collect();
    let run = |name: &str| {
        let device = Device::new(GROUPS);
        let (from, to) = (device.upload(&values), device.upload(&[0i32; 96]));
        device.run(name, [1, 1, 1], [96, 1, 1], 0, &[Arg::U64(from), Arg::U64(to)])?;
        Ok::<_, cuda_emu::exec::Fault>(device.download::<i32>(to, 96))
    };
    let want: Vec<i32> = (1..=96).map(|n| values[..n].iter().sum()).collect();
    assert_eq!(run("scan_up").unwrap_or_else(|fault| panic!("{fault}")), want);
    let fault = run("scan_down").expect_err("scan_down");
    assert_eq!(fault.kind, FaultKind::Uninitialised, "{fault}");
}
