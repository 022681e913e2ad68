//! The ladder, `kernels/steps`: each rung computes the convolution, under all of the emulator's checks; rungs that only
//! move data have the bits of the one before; the pictures and the table in `kernels/steps/README.md` are true.

#[path = "../emulator/tests/machine/mod.rs"]
mod machine;
#[path = "support/rungs.rs"]
mod rungs;

use cuda_emu::exec::{Counters, Fault};
use half::bf16;
use machine::{Arg, Device};
use rungs::{ATTENTION, BK, D, RUNGS, Tensors};
use std::fmt::Write;

/// n, h, w, c_in, c_out: no image is square, and extents lie on both sides of tiles and slabs.
const SIZES: [[usize; 5]; 5] =
    [[1, 1, 1, 8, 1], [1, 3, 4, 8, 5], [2, 5, 7, 40, 72], [1, 9, 8, 64, 65], [3, 2, 11, 24, 64]];

#[derive(Clone)]
struct Case {
    size: [usize; 5],
    /// From rung 8 on: slabs of a segment of k, and whether each has blocks of its own.
    segment: usize,
    own_blocks: bool,
    /// Rung 9: channels of the first tensor. From there on they are those of the second.
    c_first: usize,
    x: Vec<bf16>,
    weight: Vec<bf16>,
    bias: Vec<f32>,
    shift: Vec<f32>,
    residual: Vec<bf16>,
}

impl Case {
    /// With zeros for what rung 6 adds unless `epilogue`. A segment of k is a block of channels; the first tensor has
    /// half of the channels or, if there are but eight, all.
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
            segment: 9,
            own_blocks: true,
            c_first: 8 * (c_in / 8).div_ceil(2),
            x: rounded(noise(n * h * w * c_in, 1.0)),
            weight: rounded(noise(c_out * 9 * c_in, 1.0)),
            bias: noise(c_out, scale),
            shift: noise(n * c_out, scale),
            residual: rounded(noise(n * h * w * c_out, scale)),
        }
    }

    fn run(&self, rung: usize, ptx: &str) -> Result<(Vec<bf16>, Counters), Fault> {
        let (y, [mut counters, join]) = self.launches(rung, ptx)?;
        counters.add(&join);
        Ok((y, counters))
    }

    /// With the counters of the launch, and of that which adds up segments, if there is one.
    fn launches(&self, rung: usize, ptx: &str) -> Result<(Vec<bf16>, [Counters; 2]), Fault> {
        let [n, h, w, c_in, c_out] = self.size;
        let (name, threads, ..) = RUNGS[rung];
        let device = Device::new(ptx);
        let (first, second): (Vec<_>, Vec<_>) = if rung < 9 {
            (self.x.clone(), Vec::new())
        } else {
            let of_pixels = || self.x.chunks(c_in).map(|pixel| pixel.split_at(self.c_first));
            (
                of_pixels().flat_map(|pixel| pixel.0).copied().collect(),
                of_pixels().flat_map(|pixel| pixel.1).copied().collect(),
            )
        };
        let upload = |x: &[bf16]| Arg::U64(if x.is_empty() { 0 } else { device.upload(x) });
        let (pixels, results) = (n * h * w, n * h * w * c_out);
        let segments = if rung >= 8 && self.own_blocks { self.slabs(rung).div_ceil(self.segment) } else { 1 };
        let y = device.memory.alloc((results * 2) as u64).expect("memory for y");
        let parts = device.memory.alloc((segments * results * 4) as u64).expect("memory for the segments");
        let number = |extent: usize| Arg::U32(extent as u32);
        let tensors = Tensors {
            y: Arg::U64(y),
            x: upload(&first),
            weight: upload(&self.weight),
            added: [device.upload(&self.bias), device.upload(&self.shift), device.upload(&self.residual)].map(Arg::U64),
            parts: Arg::U64(parts),
            segment: number(self.segment),
            second: upload(&second),
            c_first: number(self.c_first),
        };
        let args = tensors.args(rung, self.size.map(number));
        let grid = rungs::grid(rung, pixels, c_out, segments);
        let mut counters = [device.run(name, grid, [threads, 1, 1], 0, &args)?, Counters::default()];
        if segments > 1 {
            let args = tensors.join_args([segments, n, h, w, c_out].map(number));
            let threads = [rungs::JOIN_THREADS, 1, 1];
            counters[1] = device.run(&rungs::join_name(rung), rungs::join_grid(pixels, c_out), threads, 0, &args)?;
        }
        assert_eq!((c_in % 8, self.c_first % 8), (0, 0), "what the rungs' headers demand");
        Ok((device.download(y, results), counters))
    }

    /// Of k, from rung 3 on.
    fn slabs(&self, rung: usize) -> usize {
        rungs::slabs(if rung == 9 { self.c_first } else { self.size[3] }, self.size[3])
    }

    fn bits(&self, rung: usize) -> Vec<u16> {
        let (y, _) = self.run(rung, &ptx(rung)).unwrap_or_else(|fault| panic!("{}: {fault}", RUNGS[rung].0));
        y.into_iter().map(bf16::to_bits).collect()
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
            if rung >= 6 {
                for more in [self.bias[o].into(), self.shift[image * c_out + o].into(), self.residual[at].to_f64()] {
                    (sum, size) = (sum + more, size + more.abs());
                }
            }
            let summed = (9 * c_in + 3 + self.slabs(rung).div_ceil(self.segment)) as f64 * 2f64.powi(-23) * size;
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

/// Registers of the entry that a file is named after on sm_80, of which none of its entries spills any.
fn registers(name: &str) -> String {
    let path = format!("{}/{name}.sm_80.said", env!("DDPM_CUDA_STEPS"));
    let said = std::fs::read_to_string(&path).unwrap_or_else(|why| panic!("{path}: {why}"));
    let entries: Vec<&str> = said.split("Function properties for ").skip(1).collect();
    for entry in &entries {
        assert!(entry.contains("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"), "{name}: {said}");
    }
    let of_name = entries.iter().find(|entry| entry.starts_with(name)).expect("the entry");
    of_name.split_once("Used ").and_then(|(_, rest)| rest.split(' ').next()).expect("registers").into()
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
        let mut case = Case::new(size, false);
        // One segment for rungs 8 and 9, and for 9 whole slabs of the first tensor.
        (case.segment, case.c_first) = (usize::from(u16::MAX), size[3].min(BK));
        let y: Vec<Vec<u16>> = (0..RUNGS.len()).map(|rung| case.bits(rung)).collect();
        for (before, rung) in [(0, 1), (1, 2), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)] {
            assert_eq!(y[before], y[rung], "{} and {} of {size:?}", RUNGS[before].0, RUNGS[rung].0);
        }
        // With a residual that takes away what y has shown so far, y shows the bits that rounding took.
        case.residual = y[5].iter().map(|&y| -bf16::from_bits(y)).collect();
        let [six, seven, eight, nine] = [6, 7, 8, 9].map(|rung| case.bits(rung));
        assert!(six == seven && seven == eight && eight == nine, "the lower bits of {size:?}");
        case.segment = 9;
        assert!(case.bits(8) == case.bits(9), "segments of {size:?}");
    }
}

/// Segments of slabs that end within the block of channels, at its end, behind it.
#[test]
fn who_sums_a_segment_changes_no_bits() {
    for (rung, segment) in [(8, 4), (8, 9), (8, 11), (9, 4), (9, 9), (9, 11)] {
        let mut case = Case { segment, ..Case::new([2, 5, 7, 40, 72], false) };
        // As above: y shows the lower bits.
        case.residual = case.bits(rung).into_iter().map(|y| -bf16::from_bits(y)).collect();
        let own = case.bits(rung);
        case.own_blocks = false;
        assert!(own == case.bits(rung), "{} by segments of {segment}", RUNGS[rung].0);
        // The first image alone.
        let image = own.len() / 2;
        case.size[0] = 1;
        assert!(own[..image] == case.bits(rung), "{} by segments of {segment}, one image", RUNGS[rung].0);
        // A sum in one piece has other bits, so that the above says something.
        (case.size[0], case.segment) = (2, 18);
        assert!(own != case.bits(rung), "{} by segments of {segment} and in one piece", RUNGS[rung].0);
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let differs = |rung: usize, what: &str, bad: &str| {
        let (good, case) = (ptx(rung), Case::new(SIZES[2], true));
        assert!(good != bad, "{} has no {what}", RUNGS[rung].0);
        let unchanged = case.run(rung, &good).map(|(y, _)| case.wrong(rung, &y));
        assert!(matches!(unchanged, Ok(None)), "{} as it is: {unchanged:?}", RUNGS[rung].0);
        let seen = case.run(rung, bad).map(|(y, _)| case.wrong(rung, &y));
        assert!(!matches!(seen, Ok(None)), "{} with another {what} is not noticed", RUNGS[rung].0);
    };
    let noticed = |rung: usize, from: &str, to: &str| differs(rung, from, &ptx(rung).replacen(from, to, 1));
    // In all instructions of a kind.
    let everywhere = |rung: usize, kind: &str, from: &str, to: &str| {
        let line = |line: &str| if line.contains(kind) { line.replace(from, to) } else { line.into() };
        differs(rung, kind, &ptx(rung).split('\n').map(line).collect::<Vec<_>>().join("\n"));
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
    for rung in 5..RUNGS.len() {
        noticed(rung, "cp.async.wait_group 2", "cp.async.wait_group 3");
    }
    // A walk that leaves out the last tap.
    everywhere(7, "setp.eq.s32", ", 9;", ", 8;");
    everywhere(8, "setp.eq.s32", ", 9;", ", 8;");
    everywhere(9, "setp.ne.s32", ", 9;", ", 8;");
    // The second tensor with the taps of the first.
    everywhere(9, "mov.u32", ", 9;", ", 0;");
}

/// The drawing above `slot` has chunk `r.c` where `slot(r, c)` says.
#[test]
fn pictures_are_what_slot_computes() {
    let check = |name: &str, code: &str, chunks: usize, slot: &dyn Fn(usize, usize) -> usize| {
        let text = source(&format!("{name}.cu"));
        assert!(text.contains(&format!("int slot(int row, int chunk) {{ return {code}; }}")), "{name}");
        let lines = text.lines().filter(|line| line.starts_with("// row ") || line.starts_with("// rows "));
        let cells: Vec<String> = lines
            .flat_map(|line| line.split_whitespace().filter(|word| word.contains('.')).take(8))
            .map(|cell| cell.trim_matches(['[', ']']).to_string())
            .collect();
        assert_eq!(cells.len(), 8 * chunks, "{name}");
        for (row, chunk) in (0..8 * chunks).map(|at| (at / chunks, at % chunks)) {
            assert_eq!(cells[slot(row, chunk)], format!("{row}.{chunk}"), "{name}");
        }
    };
    check(RUNGS[3].0, "4 * row + chunk", 4, &|row, chunk| 4 * row + chunk);
    for (name, ..) in &RUNGS[4..] {
        check(name, "4 * row + (chunk ^ row / 2 % 4)", 4, &|row, chunk| 4 * row + (chunk ^ (row / 2 % 4)));
    }
    check(ATTENTION[2].0, "8 * row + chunk", 8, &|row, chunk| 8 * row + chunk);
    for (name, ..) in &ATTENTION[3..] {
        check(name, "8 * row + (chunk ^ row % 8)", 8, &|row, chunk| 8 * row + (chunk ^ (row % 8)));
    }
}

/// Warp instructions of all kinds.
fn all(c: &Counters) -> u64 {
    c.mma + c.fma + c.arithmetic + c.special + c.global + c.shared + c.local + c.control
}

/// The table in kernels/steps/README.md; run with `--nocapture` to see it.
#[test]
fn the_table_is_what_the_emulator_counts() {
    // A layer of so many pixels has one segment.
    let case = Case { segment: 18, ..Case::new([1, 16, 16, 64, 64], true) };
    let mut table = String::from(
        "| rung | HMMA | FMA | all warp instructions | shared cycles / ideal | MB asked | sectors / asked | \
         registers |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for (rung, (name, ..)) in RUNGS.iter().enumerate() {
        let (_, c) = case.run(rung, &ptx(rung)).unwrap_or_else(|fault| panic!("{fault}"));
        let cycles = c.shared_load_cycles + c.shared_store_cycles;
        let ideal = c.shared_load_ideal + c.shared_store_ideal;
        let shared = if ideal == 0 { "none".into() } else { format!("{cycles} / {ideal}") };
        let asked = c.global_load_bytes + c.global_store_bytes;
        writeln!(
            table,
            "| {name} | {} | {} | {} | {shared} | {:.2} | {:.2} | {} |",
            c.mma,
            c.fma,
            all(&c),
            asked as f64 / 1e6,
            32.0 * c.global_sectors as f64 / asked as f64,
            registers(name),
        )
        .expect("text grows");
    }
    println!("{table}");
    assert!(source("README.md").contains(&table), "kernels/steps/README.md should have this table:\n{table}");
}

/// The table of a layer of few pixels in kernels/steps/README.md.
#[test]
fn the_table_of_few_pixels_is_what_the_emulator_counts() {
    let case = Case::new([1, 4, 4, 256, 256], true);
    let mut table = String::from(
        "| rung | blocks | slabs of a block | warp instructions of a block | of one of the join | MB asked |\n\
         |---|---|---|---|---|---|\n",
    );
    for (rung, own_blocks) in [(6, false), (7, false), (8, false), (8, true)] {
        let name = format!("{}{}", RUNGS[rung].0, if own_blocks { ", blocks of their own" } else { "" });
        let case = Case { own_blocks, ..case.clone() };
        let (_, [c, join]) = case.launches(rung, &ptx(rung)).unwrap_or_else(|fault| panic!("{fault}"));
        let slabs = case.slabs(rung);
        let segments = if own_blocks { slabs.div_ceil(case.segment) } else { 1 };
        let blocks = 256 / 64 * segments;
        let asked = [&c, &join].iter().map(|c| c.global_load_bytes + c.global_store_bytes).sum::<u64>();
        writeln!(
            table,
            "| {name} | {blocks} | {} | {} | {} | {:.2} |",
            slabs / segments,
            all(&c) / blocks as u64,
            all(&join) / (16 / 4 * 256 / 64),
            asked as f64 / 1e6,
        )
        .expect("text grows");
    }
    println!("{table}");
    assert!(source("README.md").contains(&table), "kernels/steps/README.md should have this table:\n{table}");
}

struct Attended {
    o: Vec<bf16>,
    /// The first result outside its bound.
    wrong: Option<String>,
    counters: Counters,
}

/// Runs a rung of attention over n tokens.
fn attend(rung: usize, n: usize, ptx: &str) -> Result<Attended, Fault> {
    let (name, threads, _) = ATTENTION[rung];
    let case = Case::new([3, n, 1, D, 1], true);
    let (q, rest) = case.x.split_at(n * D);
    let (k, v) = rest.split_at(n * D);
    let device = Device::new(ptx);
    let o = device.memory.alloc((n * D * 2) as u64).expect("memory for o");
    let scores = (rung == 0).then(|| Arg::U64(device.memory.alloc((n * n * 4) as u64).expect("memory for S")));
    let upload = |tensor| Arg::U64(device.upload(tensor));
    let args = rungs::attention_args(Arg::U64(o), [q, k, v].map(upload), scores, Arg::U32(n as u32));
    let counters = device.run(name, rungs::attention_grid(rung, n), [threads, 1, 1], 0, &args)?;
    let o: Vec<bf16> = device.download(o, n * D);
    for row in 0..n {
        let products = |col: usize| (0..D).map(move |d| q[row * D + d].to_f64() * k[col * D + d].to_f64());
        let scores: Vec<f64> = (0..n).map(|col| products(col).sum::<f64>() / 8.0).collect();
        let size = (0..n).map(|col| products(col).map(f64::abs).sum::<f64>() / 8.0).fold(0.0, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| s.exp()).collect();
        let l: f64 = weights.iter().sum();
        // An error of S is a relative one of exp(S), above and below the line; on tensor cores each step of S may be
        // cut off. Each of n columns scales and adds in f32 and takes up to two exponentials, each to 2^-22. From rung
        // 2 on P is rounded to bf16, above the line alone.
        let (step, rounded) = if rung < 2 { (-24, 0.0) } else { (-23, 2f64.powi(-8)) };
        let relative = 2.0 * ((D + 2) as f64 * 2f64.powi(step) * size + n as f64 * 2f64.powi(-20)) + rounded;
        for d in 0..D {
            let terms = || (0..n).map(|col| weights[col] / l * v[col * D + d].to_f64());
            let (sum, summed) = (terms().sum::<f64>(), relative * terms().map(f64::abs).sum::<f64>());
            let bound = summed + 2f64.powi(-8) * (sum.abs() + summed);
            let within = (o[row * D + d].to_f64() - sum).abs() <= bound;
            if !within {
                let wrong = format!("o[{row}, {d}] of {n} is {}, not {sum} within {bound}", o[row * D + d]);
                return Ok(Attended { o, wrong: Some(wrong), counters });
            }
        }
    }
    Ok(Attended { o, wrong: None, counters })
}

const TOKENS: [usize; 5] = [1, 31, 64, 97, 130];

#[test]
fn every_rung_computes_attention() {
    for (rung, (name, ..)) in ATTENTION.iter().enumerate() {
        for n in TOKENS {
            let attended = attend(rung, n, &ptx_of(name)).unwrap_or_else(|fault| panic!("{name}: {fault}"));
            assert_eq!(attended.wrong, None, "{name}");
        }
    }
}

#[test]
fn the_rung_of_attention_that_moves_data_keeps_the_bits() {
    for n in TOKENS {
        let [before, after] = [2, 3].map(|rung| {
            let attended = attend(rung, n, &ptx_of(ATTENTION[rung].0)).unwrap_or_else(|fault| panic!("{fault}"));
            attended.o.into_iter().map(bf16::to_bits).collect::<Vec<_>>()
        });
        assert_eq!(before, after, "{n} tokens");
    }
}

#[test]
fn planted_bugs_in_attention_are_noticed() {
    let noticed = |rung: usize, from: &str, to: &str| {
        let (name, good) = (ATTENTION[rung].0, ptx_of(ATTENTION[rung].0));
        assert!(good.contains(from), "{name} has no {from}");
        let seen = attend(rung, 97, &good.replacen(from, to, 1));
        assert!(!matches!(seen, Ok(Attended { wrong: None, .. })), "{name} with {to:?} for {from:?} is not noticed");
    };
    for rung in 0..ATTENTION.len() {
        noticed(rung, "bar.sync", "//");
        noticed(rung, "st.global", "//");
    }
    noticed(1, "max.f32", "min.f32");
    for rung in 2..ATTENTION.len() {
        let [plain, across] = ["x4.shared", "x4.trans.shared"].map(|kind| format!("ldmatrix.sync.aligned.m8n8.{kind}"));
        noticed(rung, &plain, &across);
        noticed(rung, &across, &plain);
        // A row's maximum without half of its lanes.
        noticed(rung, "shfl.sync.bfly.b32", "shfl.sync.idx.b32");
    }
    // A tile is read before it has arrived.
    noticed(3, "cp.async.wait_group 0", "cp.async.wait_group 1");
    noticed(4, "cp.async.wait_group 0", "cp.async.wait_group 1");
    // Where only some rows have a larger score, nothing is scaled.
    noticed(4, "vote.sync.any", "vote.sync.all");
}

/// The table of attention in kernels/steps/README.md.
#[test]
fn the_table_of_attention_is_what_the_emulator_counts() {
    let mut table = String::from(
        "| rung | HMMA | FMA | special | all warp instructions | shared cycles / ideal | MB asked | sectors / asked | \
         registers |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for (rung, (name, ..)) in ATTENTION.iter().enumerate() {
        let c = attend(rung, 256, &ptx_of(name)).unwrap_or_else(|fault| panic!("{fault}")).counters;
        let asked = c.global_load_bytes + c.global_store_bytes;
        writeln!(
            table,
            "| {name} | {} | {} | {} | {} | {} / {} | {:.2} | {:.2} | {} |",
            c.mma,
            c.fma,
            c.special,
            all(&c),
            c.shared_load_cycles + c.shared_store_cycles,
            c.shared_load_ideal + c.shared_store_ideal,
            asked as f64 / 1e6,
            32.0 * c.global_sectors as f64 / asked as f64,
            registers(name),
        )
        .expect("text grows");
    }
    println!("{table}");
    assert!(source("README.md").contains(&table), "kernels/steps/README.md should have this table:\n{table}");
}
