//! The ladder, `kernels/steps`: each rung computes the convolution, under all of the emulator's checks; rungs that only
//! move data have the bits of the one before; the pictures and the table in `kernels/steps/README.md` are true.

#[path = "../emulator/tests/machine/mod.rs"]
mod machine;

use cuda_emu::exec::{Counters, Fault};
use half::bf16;
use machine::{Arg, Device};
use std::fmt::Write;

/// Name, threads, and pixels and channels of a block's tile.
const RUNGS: [(&str, u32, usize, usize); 7] = [
    ("conv2d_0_naive", 128, 4, 32),
    ("conv2d_1_tile", 128, 64, 64),
    ("conv2d_2_registers", 64, 64, 64),
    ("conv2d_3_mma", 128, 64, 64),
    ("conv2d_4_swizzle", 128, 64, 64),
    ("conv2d_5_cp_async", 128, 64, 64),
    ("conv2d_6_epilogue", 128, 64, 64),
];

/// n, h, w, c_in, c_out: no image is square, and extents lie on both sides of tiles and slabs.
const SIZES: [[usize; 5]; 5] =
    [[1, 1, 1, 8, 1], [1, 3, 4, 8, 5], [2, 5, 7, 40, 72], [1, 9, 8, 64, 65], [3, 2, 11, 24, 64]];

struct Case {
    size: [usize; 5],
    x: Vec<bf16>,
    weight: Vec<bf16>,
    bias: Vec<f32>,
    shift: Vec<f32>,
    residual: Vec<bf16>,
}

impl Case {
    /// With zeros for what rung 6 adds unless `epilogue`.
    fn new(size: [usize; 5], epilogue: bool) -> Case {
        let [n, h, w, c_in, c_out] = size;
        let mut state = 1u32;
        let mut noise = |count: usize, scale: f32| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                scale * ((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
            };
            (0..count).map(|_| next()).collect()
        };
        let rounded = |values: Vec<f32>| values.into_iter().map(bf16::from_f32).collect();
        let scale = if epilogue { 1.0 } else { 0.0 };
        Case {
            size,
            x: rounded(noise(n * h * w * c_in, 1.0)),
            weight: rounded(noise(c_out * 9 * c_in, 1.0)),
            bias: noise(c_out, scale),
            shift: noise(n * c_out, scale),
            residual: rounded(noise(n * h * w * c_out, scale)),
        }
    }

    fn run(&self, rung: usize, ptx: &str) -> Result<(Vec<bf16>, Counters), Fault> {
        let [n, h, w, c_in, c_out] = self.size;
        let (name, threads, bm, bn) = RUNGS[rung];
        let device = Device::new(ptx);
        let y = device.memory.alloc((n * h * w * c_out * 2) as u64).expect("memory for y");
        let mut args = vec![Arg::U64(y), Arg::U64(device.upload(&self.x)), Arg::U64(device.upload(&self.weight))];
        args.extend(self.size.map(|extent| Arg::U32(extent as u32)));
        if rung == 6 {
            args.extend([device.upload(&self.bias), device.upload(&self.shift)].map(Arg::U64));
            args.push(Arg::U64(device.upload(&self.residual)));
        }
        let grid = [(n * h * w).div_ceil(bm) as u32, c_out.div_ceil(bn) as u32, 1];
        let counters = device.run(name, grid, [threads, 1, 1], 0, &args)?;
        assert_eq!(c_in % 8, 0, "what the rungs' headers demand");
        Ok((device.download(y, n * h * w * c_out), counters))
    }

    /// The first result outside its bound. A sum of k products in f32, each step rounded or cut off, is wrong by at
    /// most k 2^-23 of the sum of magnitudes, and bf16, of 8 digits, rounds by 2^-8. Written so that NaN is outside.
    fn wrong(&self, rung: usize, y: &[bf16]) -> Option<String> {
        let [_, h, w, c_in, c_out] = self.size;
        for (at, result) in y.iter().enumerate() {
            let (m, o) = (at / c_out, at % c_out);
            let (image, i, j) = (m / (h * w), m / w % h, m % w);
            let (mut sum, mut size) = (0.0f64, 0.0f64);
            for (u, v) in (0..9).map(|tap| (tap / 3, tap % 3)) {
                if i + u < 1 || i + u > h || j + v < 1 || j + v > w {
                    continue;
                }
                let pixel = ((image * h + i + u - 1) * w + j + v - 1) * c_in;
                for c in 0..c_in {
                    let product = self.x[pixel + c].to_f64() * self.weight[((o * 3 + u) * 3 + v) * c_in + c].to_f64();
                    (sum, size) = (sum + product, size + product.abs());
                }
            }
            if rung == 6 {
                for more in [self.bias[o].into(), self.shift[image * c_out + o].into(), self.residual[at].to_f64()] {
                    (sum, size) = (sum + more, size + more.abs());
                }
            }
            let summed = (9 * c_in + 3) as f64 * 2f64.powi(-23) * size;
            let bound = summed + 2f64.powi(-8) * (sum.abs() + summed);
            let within = (result.to_f64() - sum).abs() <= bound;
            if !within {
                return Some(format!("y[{m}, {o}] of {:?} is {result}, not {sum} within {bound}", self.size));
            }
        }
        None
    }
}

fn ptx(rung: usize) -> String {
    ptx_of(RUNGS[rung].0)
}

fn ptx_of(name: &str) -> String {
    let path = format!("{}/{name}.ptx", env!("DDPM_CUDA_STEPS"));
    std::fs::read_to_string(&path).unwrap_or_else(|why| panic!("{path}: {why}"))
}

/// Registers of an entry on sm_80, of which none are spilled.
fn registers(name: &str) -> String {
    let path = format!("{}/{name}.sm_80.said", env!("DDPM_CUDA_STEPS"));
    let said = std::fs::read_to_string(&path).unwrap_or_else(|why| panic!("{path}: {why}"));
    assert!(said.contains("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"), "{name}: {said}");
    said.split_once("Used ").and_then(|(_, rest)| rest.split(' ').next()).expect("registers").into()
}

fn source(name: &str) -> String {
    let path = format!("{}/kernels/steps/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|why| panic!("{path}: {why}"))
}

#[test]
fn every_rung_computes_the_convolution() {
    for (rung, (name, ..)) in RUNGS.iter().enumerate() {
        for size in SIZES {
            let case = Case::new(size, true);
            let (y, _) = case.run(rung, &ptx(rung)).unwrap_or_else(|fault| panic!("{}: {fault}", name));
            assert_eq!(case.wrong(rung, &y), None, "{}", name);
        }
    }
}

#[test]
fn rungs_that_move_data_keep_the_bits() {
    for size in SIZES {
        let case = Case::new(size, false);
        let y: Vec<Vec<u16>> = (0..RUNGS.len())
            .map(|rung| case.run(rung, &ptx(rung)).unwrap_or_else(|fault| panic!("{fault}")).0)
            .map(|y| y.into_iter().map(bf16::to_bits).collect())
            .collect();
        for (before, rung) in [(0, 1), (1, 2), (3, 4), (4, 5), (5, 6)] {
            assert_eq!(y[before], y[rung], "{} and {} of {size:?}", RUNGS[before].0, RUNGS[rung].0);
        }
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let noticed = |rung: usize, from: &str, to: &str| {
        let (good, case) = (ptx(rung), Case::new(SIZES[2], true));
        assert!(good.contains(from), "{} has no {from}", RUNGS[rung].0);
        let unchanged = case.run(rung, &good).map(|(y, _)| case.wrong(rung, &y));
        assert!(matches!(unchanged, Ok(None)), "{} as it is: {unchanged:?}", RUNGS[rung].0);
        let seen = case.run(rung, &good.replacen(from, to, 1)).map(|(y, _)| case.wrong(rung, &y));
        assert!(!matches!(seen, Ok(None)), "{} with {to:?} for {from:?} is not noticed", RUNGS[rung].0);
    };
    noticed(0, "st.global", "//");
    for rung in 1..RUNGS.len() {
        noticed(rung, "bar.sync", "//");
        noticed(rung, "st.global", "//");
    }
    for rung in 3..RUNGS.len() {
        noticed(rung, "ldmatrix.sync.aligned.m8n8.x4.shared", "ldmatrix.sync.aligned.m8n8.x4.trans.shared");
    }
    // A slab is read before it has arrived.
    noticed(5, "cp.async.wait_group 2", "cp.async.wait_group 3");
    noticed(6, "cp.async.wait_group 2", "cp.async.wait_group 3");
}

/// The drawing above `slot` has chunk `r.c` where `slot(r, c)` says.
#[test]
fn pictures_are_what_slot_computes() {
    let plain = |row: usize, chunk: usize| 4 * row + chunk;
    let swizzled = |row: usize, chunk: usize| 4 * row + (chunk ^ (row / 2 % 4));
    let check = |rung: usize, code: &str, slot: &dyn Fn(usize, usize) -> usize| {
        let text = source(&format!("{}.cu", RUNGS[rung].0));
        assert!(text.contains(&format!("int slot(int row, int chunk) {{ return {code}; }}")), "{}", RUNGS[rung].0);
        let lines = text.lines().filter_map(|line| line.strip_prefix("// rows "));
        let cells: Vec<String> = lines
            .flat_map(|line| line[4..].split_whitespace().take(8))
            .map(|cell| cell.trim_matches(['[', ']']).to_string())
            .collect();
        assert_eq!(cells.len(), 32, "{}", RUNGS[rung].0);
        for (row, chunk) in (0..32).map(|at| (at / 4, at % 4)) {
            assert_eq!(cells[slot(row, chunk)], format!("{row}.{chunk}"), "{}", RUNGS[rung].0);
        }
    };
    check(3, "4 * row + chunk", &plain);
    for rung in 4..RUNGS.len() {
        check(rung, "4 * row + (chunk ^ row / 2 % 4)", &swizzled);
    }
}

/// The table in kernels/steps/README.md; run with `--nocapture` to see it.
#[test]
fn the_table_is_what_the_emulator_counts() {
    let case = Case::new([1, 16, 16, 64, 64], true);
    let mut table = String::from(
        "| rung | HMMA | FMA | all warp instructions | shared cycles / ideal | MB asked | sectors / asked | \
         registers |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for (rung, (name, ..)) in RUNGS.iter().enumerate() {
        let (_, c) = case.run(rung, &ptx(rung)).unwrap_or_else(|fault| panic!("{fault}"));
        let all = c.mma + c.fma + c.arithmetic + c.special + c.global + c.shared + c.local + c.control;
        let cycles = c.shared_load_cycles + c.shared_store_cycles;
        let ideal = c.shared_load_ideal + c.shared_store_ideal;
        let shared = if ideal == 0 { "none".into() } else { format!("{cycles} / {ideal}") };
        let asked = c.global_load_bytes + c.global_store_bytes;
        writeln!(
            table,
            "| {name} | {} | {} | {all} | {shared} | {:.2} | {:.2} | {} |",
            c.mma,
            c.fma,
            asked as f64 / 1e6,
            32.0 * c.global_sectors as f64 / asked as f64,
            registers(name),
        )
        .expect("text grows");
    }
    println!("{table}");
    assert!(source("README.md").contains(&table), "kernels/steps/README.md should have this table:\n{table}");
}

/// Channels of the attention's head.
const D: usize = 64;

const ATTENTION: [(&str, usize); 2] = [("attention_0_naive", 1), ("attention_1_online", 64)];

/// Runs a rung of attention over n tokens and says what is outside its bound.
fn attend((name, bm): (&str, usize), n: usize, ptx: &str) -> Result<(Option<String>, Counters), Fault> {
    let case = Case::new([3, n, 1, D, 1], true);
    let (q, rest) = case.x.split_at(n * D);
    let (k, v) = rest.split_at(n * D);
    let device = Device::new(ptx);
    let o = device.memory.alloc((n * D * 2) as u64).expect("memory for o");
    let mut args = vec![Arg::U64(o)];
    args.extend([q, k, v].map(|tensor| Arg::U64(device.upload(tensor))));
    if name == "attention_0_naive" {
        args.push(Arg::U64(device.memory.alloc((n * n * 4) as u64).expect("memory for S")));
    }
    args.push(Arg::U32(n as u32));
    let counters = device.run(name, [n.div_ceil(bm) as u32, 1, 1], [64, 1, 1], 0, &args)?;
    let o: Vec<bf16> = device.download(o, n * D);
    for row in 0..n {
        let products = |col: usize| (0..D).map(move |d| q[row * D + d].to_f64() * k[col * D + d].to_f64());
        let scores: Vec<f64> = (0..n).map(|col| products(col).sum::<f64>() / 8.0).collect();
        let size = (0..n).map(|col| products(col).map(f64::abs).sum::<f64>() / 8.0).fold(0.0, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| s.exp()).collect();
        let l: f64 = weights.iter().sum();
        // An error of S is a relative one of exp(S), above and below the line. Each of n columns scales and adds in f32
        // and takes up to two exponentials, each to 2^-22.
        let relative = 2.0 * ((D + 2) as f64 * 2f64.powi(-24) * size + n as f64 * 2f64.powi(-20));
        for d in 0..D {
            let terms = || (0..n).map(|col| weights[col] / l * v[col * D + d].to_f64());
            let (sum, summed) = (terms().sum::<f64>(), relative * terms().map(f64::abs).sum::<f64>());
            let bound = summed + 2f64.powi(-8) * (sum.abs() + summed);
            let within = (o[row * D + d].to_f64() - sum).abs() <= bound;
            if !within {
                let wrong = format!("o[{row}, {d}] of {n} is {}, not {sum} within {bound}", o[row * D + d]);
                return Ok((Some(wrong), counters));
            }
        }
    }
    Ok((None, counters))
}

#[test]
fn every_rung_computes_attention() {
    for rung in ATTENTION {
        for n in [1, 31, 64, 97, 130] {
            let (wrong, _) = attend(rung, n, &ptx_of(rung.0)).unwrap_or_else(|fault| panic!("{}: {fault}", rung.0));
            assert_eq!(wrong, None, "{}", rung.0);
        }
    }
}

#[test]
fn planted_bugs_in_attention_are_noticed() {
    let noticed = |rung: (&str, usize), from: &str, to: &str| {
        let good = ptx_of(rung.0);
        assert!(good.contains(from), "{} has no {from}", rung.0);
        let seen = attend(rung, 97, &good.replacen(from, to, 1));
        assert!(!matches!(seen, Ok((None, _))), "{} with {to:?} for {from:?} is not noticed", rung.0);
    };
    for rung in ATTENTION {
        noticed(rung, "bar.sync", "//");
        noticed(rung, "st.global", "//");
    }
    noticed(ATTENTION[1], "max.f32", "min.f32");
}

/// The second table in kernels/steps/README.md.
#[test]
fn the_table_of_attention_is_what_the_emulator_counts() {
    let mut table = String::from(
        "| rung | FMA | all warp instructions | shared cycles / ideal | MB asked | sectors / asked | registers |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for rung in ATTENTION {
        let (_, c) = attend(rung, 256, &ptx_of(rung.0)).unwrap_or_else(|fault| panic!("{fault}"));
        let all = c.mma + c.fma + c.arithmetic + c.special + c.global + c.shared + c.local + c.control;
        let asked = c.global_load_bytes + c.global_store_bytes;
        writeln!(
            table,
            "| {} | {} | {all} | {} / {} | {:.2} | {:.2} | {} |",
            rung.0,
            c.fma,
            c.shared_load_cycles + c.shared_store_cycles,
            c.shared_load_ideal + c.shared_store_ideal,
            asked as f64 / 1e6,
            32.0 * c.global_sectors as f64 / asked as f64,
            registers(rung.0),
        )
        .expect("text grows");
    }
    println!("{table}");
    assert!(source("README.md").contains(&table), "kernels/steps/README.md should have this table:\n{table}");
}
