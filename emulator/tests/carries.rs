//! The carry flag: chains of additions, subtractions and products of many words, and what one kind of instruction reads
//! of another's, against sums and products of longer integers; nvcc's 128-bit arithmetic, whose division depends on all
//! of it.

mod machine;

use machine::{Arg, Device};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// 256 bits, the lowest first.
type Wide = [u64; 4];

/// The low 256 bits of a sum, and its carry.
fn sum(a: Wide, b: Wide) -> (Wide, u64) {
    let mut carry = 0;
    let words = std::array::from_fn(|i| {
        let sum = u128::from(a[i]) + u128::from(b[i]) + carry;
        carry = sum >> 64;
        sum as u64
    });
    (words, carry as u64)
}

/// The same of a difference, and whether it borrowed.
fn difference(a: Wide, b: Wide) -> (Wide, u64) {
    let mut borrow = 0;
    let words = std::array::from_fn(|i| {
        let difference = i128::from(a[i]) - i128::from(b[i]) - borrow;
        borrow = i128::from(difference < 0);
        difference as u64
    });
    (words, borrow as u64)
}

/// All 256 bits of a product.
fn product(a: u128, b: u128) -> Wide {
    let half = |x: u128, i: u32| u128::from((x >> (64 * i)) as u64);
    let place = |x: u128, at: usize| {
        let mut words = [0; 4];
        words[at] = x as u64;
        words[at + 1] = (x >> 64) as u64;
        words
    };
    let high = sum(place(half(a, 0) * half(b, 0), 0), place(half(a, 1) * half(b, 1), 2)).0;
    let crossed = sum(place(half(a, 0) * half(b, 1), 1), place(half(a, 1) * half(b, 0), 1)).0;
    sum(high, crossed).0
}

/// Values of all magnitudes: runs of zeros and ones, powers of two and their neighbours, random bits.
fn values(count: usize, seed: u64) -> Vec<u128> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut values = vec![0, 1, 2, 3, u128::MAX, u128::MAX - 1, i128::MAX as u128, i128::MIN as u128];
    for bits in [31, 32, 33, 63, 64, 65, 95, 96, 97] {
        values.extend([(1 << bits) - 1, 1 << bits, (1 << bits) + 1, u128::MAX << bits]);
    }
    while values.len() < count {
        let any: u128 = random.random();
        let shift = random.random_range(0..128);
        values.push(match random.random_range(0..5) {
            0 => any,
            1 => any >> shift,
            2 => any << shift,
            // Long runs.
            3 => (u128::MAX >> shift) ^ (any >> random.random_range(0..128)),
            // Words that are all ones or all zeros.
            _ => (0..4).map(|i| if any >> i & 1 != 0 { 0xffff_ffff << (32 * i) } else { 0 }).sum(),
        });
    }
    values
}

fn pairs(count: usize, seed: u64) -> Vec<(Wide, Wide)> {
    let all = values(4 * count, seed);
    let mut random = StdRng::seed_from_u64(seed + 1);
    let mut pick = || {
        let (low, high) = (all[random.random_range(0..all.len())], all[random.random_range(0..all.len())]);
        [low as u64, (low >> 64) as u64, high as u64, (high >> 64) as u64]
    };
    let mut pairs: Vec<_> = (0..count).map(|_| (pick(), pick())).collect();
    // Carries and borrows that run through all words.
    pairs.extend([([!0; 4], [1, 0, 0, 0]), ([0; 4], [1, 0, 0, 0]), ([!0; 4], [!0; 4]), ([0; 4], [!0; 4])]);
    pairs
}

/// A kernel `k` that reads a and b of 256 bits per thread as words `%a0`, ... and `%b0`, ..., and stores `%r0`, ... and
/// the 32-bit registers `%f0` to `%f3`.
fn kernel(bits: usize, body: &str) -> String {
    let count = 256 / bits;
    let mut text = format!(
        ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out)\n{{\n\
         .reg .b{bits} %a<{count}>, %b<{count}>, %r<{count}>;\n.reg .b32 %f<4>, %t;\n.reg .pred %p, %q;\n\
         .reg .b64 %in, %out;\nmov.u32 %t, %ctaid.x;\nmov.u32 %f0, %ntid.x;\nmov.u32 %f1, %tid.x;\n\
         mad.lo.u32 %t, %t, %f0, %f1;\nld.param.u64 %in, [in];\nld.param.u64 %out, [out];\n\
         mad.wide.u32 %in, %t, 64, %in;\nmad.wide.u32 %out, %t, 48, %out;\n"
    );
    for i in 0..count {
        let at = i * bits / 8;
        text += &format!(
            "ld.global.b{bits} %a{i}, [%in+{at}];\nld.global.b{bits} %b{i}, [%in+{}];\nmov.b{bits} %r{i}, 0;\n",
            at + 32
        );
    }
    text += "mov.u32 %f0, 0;\nmov.u32 %f1, 0;\nmov.u32 %f2, 0;\nmov.u32 %f3, 0;\n";
    text += body;
    for i in 0..count {
        text += &format!("st.global.b{bits} [%out+{}], %r{i};\n", i * bits / 8);
    }
    text += "st.global.v4.b32 [%out+32], {%f0, %f1, %f2, %f3};\nret;\n}\n";
    text
}

/// What every pair gives: the words, and the four registers.
fn run(text: &str, pairs: &[(Wide, Wide)]) -> Vec<(Wide, [u32; 4])> {
    let device = Device::new(text);
    let mut given = pairs.to_vec();
    given.resize(pairs.len().next_multiple_of(64), ([0; 4], [0; 4]));
    let words: Vec<u64> = given.iter().flat_map(|(a, b)| a.iter().chain(b).copied()).collect();
    let input = device.upload(&words);
    let output = device.upload(&vec![0u64; given.len() * 6]);
    device
        .run("k", [given.len() as u32 / 64, 1, 1], [64, 1, 1], 0, &[Arg::U64(input), Arg::U64(output)])
        .unwrap_or_else(|fault| panic!("{fault}"));
    let found: Vec<u64> = device.download(output, given.len() * 6);
    let row = |row: &[u64]| {
        let flags = [row[4] as u32, (row[4] >> 32) as u32, row[5] as u32, (row[5] >> 32) as u32];
        ([row[0], row[1], row[2], row[3]], flags)
    };
    found.chunks(6).map(row).take(pairs.len()).collect()
}

/// Reads the flag in every way that does not change it: as 1 or 0, as 0 or -1, and on top of 7 and of 2^32 - 1.
const READ: &str = "addc.u32 %f0, 0, 0;\nsubc.s32 %f1, 0, 0;\nmadc.lo.s32 %f2, %t, 0, 7;\nmadc.hi.u32 %f3, 0, 0, -1;\n";

/// What that gives if the flag is set or not.
fn read(flag: bool) -> [u32; 4] {
    let flag = u32::from(flag);
    [flag, flag.wrapping_sub(1), 7 + flag, flag.wrapping_sub(1)]
}

#[test]
fn sums_and_differences_of_256_bits() {
    let pairs = pairs(3000, 5);
    for ty in ["u32", "s32", "u64", "s64"] {
        let bits: usize = ty[1..].parse().expect("a width");
        let count = 256 / bits;
        for op in ["add", "sub"] {
            let mut body: String = (0..count)
                .map(|i| format!("{op}{}.cc.{ty} %r{i}, %a{i}, %b{i};\n", if i == 0 { "" } else { "c" }))
                .collect();
            body += READ;
            for (found, (a, b)) in run(&kernel(bits, &body), &pairs).into_iter().zip(&pairs) {
                let (words, carry) = if op == "add" { sum(*a, *b) } else { difference(*a, *b) };
                // After a subtraction the flag says that nothing was borrowed.
                let want = (words, read((carry == 1) == (op == "add")));
                assert_eq!(found, want, "{op} of {ty}: {a:x?}, {b:x?}");
            }
        }
    }
}

/// a times b, of 128 bits each, into `%r0`, ...: row by row, the low halves of the products, then the high ones.
fn rows(bits: usize, ty: &str) -> String {
    let count = 128 / bits;
    let mut body = String::new();
    for i in 0..count {
        for (half, shift) in [("lo", 0), ("hi", 1)] {
            for j in 0..count {
                let at = i + j + shift;
                let (carry, keeps) = (if j == 0 { "" } else { "c" }, half == "lo" || j + 1 < count);
                let cc = if keeps { ".cc" } else { "" };
                body += &format!("mad{carry}.{half}{cc}.{ty} %r{at}, %a{i}, %b{j}, %r{at};\n");
            }
            if half == "lo" {
                body += &format!("addc.{ty} %r{0}, %r{0}, 0;\n", i + count);
            }
        }
    }
    body
}

#[test]
fn products_of_256_bits() {
    let pairs = pairs(3000, 6);
    for ty in ["u32", "u64"] {
        let bits: usize = ty[1..].parse().expect("a width");
        for (found, (a, b)) in run(&kernel(bits, &rows(bits, ty)), &pairs).into_iter().zip(&pairs) {
            let low = |x: &Wide| u128::from(x[0]) | u128::from(x[1]) << 64;
            assert_eq!(found.0, product(low(a), low(b)), "{ty}: {a:x?}, {b:x?}");
        }
    }
}

#[test]
fn what_one_kind_leaves_another_reads() {
    let pairs = pairs(2000, 7);
    type Setter = (&'static str, fn(u32, u32) -> bool);
    let setters: [Setter; 6] = [
        ("add.cc.u32", |a, b| a.checked_add(b).is_none()),
        ("add.cc.s32", |a, b| a.checked_add(b).is_none()),
        ("sub.cc.u32", |a, b| a >= b),
        ("sub.cc.s32", |a, b| a >= b),
        // a b + b, low and high: the third operand is added to a word of the product.
        ("mad.lo.cc.u32", |a, b| a.wrapping_mul(b).checked_add(b).is_none()),
        ("mad.hi.cc.s32", |a, b| {
            let high = (i64::from(a as i32) * i64::from(b as i32)) >> 32;
            (high as u32).checked_add(b).is_none()
        }),
    ];
    for (setter, flag) in setters {
        let third = if setter.starts_with("mad") { ", %b0" } else { "" };
        let body = format!("{setter} %r0, %a0, %b0{third};\n{READ}");
        for (found, (a, b)) in run(&kernel(32, &body), &pairs).into_iter().zip(&pairs) {
            let (a, b) = (a[0] as u32, b[0] as u32);
            assert_eq!(found.1, read(flag(a, b)), "{setter}: {a:x}, {b:x}");
        }
    }
}

#[test]
fn every_lane_has_its_own_flag() {
    let pairs = pairs(2000, 8);
    // Odd threads add, even ones subtract, in two branches; of those, every third then adds -1 to b under a predicate.
    let body = format!(
        "and.b32 %f0, %t, 1;\nsetp.eq.u32 %p, %f0, 1;\nrem.u32 %f0, %t, 3;\nsetp.eq.u32 %q, %f0, 0;\n@%p bra odd;\n\
         sub.cc.u32 %r0, %a0, %b0;\nbra both;\nodd:\nadd.cc.u32 %r0, %a0, %b0;\nboth:\n\
         @%q add.cc.u32 %r1, %b0, -1;\n{READ}"
    );
    for (t, (found, (a, b))) in run(&kernel(32, &body), &pairs).into_iter().zip(&pairs).enumerate() {
        let (a, b) = (a[0] as u32, b[0] as u32);
        let flag = match (t % 3 == 0, t % 2 == 1) {
            (true, _) => b != 0,
            (_, true) => a.checked_add(b).is_none(),
            (_, false) => a >= b,
        };
        assert_eq!(found.1, read(flag), "thread {t}: {a:x}, {b:x}");
    }
}

/// Numerators and denominators: all magnitudes, and quotients whose digits are hard to guess.
fn fractions(count: usize) -> (Vec<u128>, Vec<u128>) {
    let (tops, bottoms) = (values(count, 9), values(count, 10));
    let mut random = StdRng::seed_from_u64(11);
    let mut fractions: Vec<(u128, u128)> = tops.into_iter().zip(bottoms).collect();
    let edges = values(44, 12);
    fractions.extend(edges.iter().flat_map(|&top| edges.iter().map(move |&bottom| (top, bottom))));
    for _ in 0..count {
        // Just at, below and above a multiple, with a denominator of any length.
        let bottom = (random.random::<u128>() >> random.random_range(0..127)).max(1);
        let multiple = bottom * ((u128::MAX / bottom) >> random.random_range(0..128));
        fractions.push((multiple.wrapping_add(random.random_range(0..3)).wrapping_sub(1), bottom));
        // A quotient with words of ones.
        let quotient = (u128::MAX / bottom) & (0xffff_ffff << (32 * random.random_range(0..4)));
        fractions.push((bottom.wrapping_mul(quotient).wrapping_add(bottom - 1), bottom));
    }
    fractions.retain(|&(_, bottom)| bottom != 0);
    fractions.into_iter().unzip()
}

#[test]
fn compiled_division_of_128_bits() {
    let device = Device::new(include_str!("kernels/wide.ptx"));
    let (a, b) = fractions(6000);
    let n = a.len();
    let grid = [n.div_ceil(128) as u32, 1, 1];
    let run = |name: &str, a: &[u128], b: &[u128]| -> Vec<u128> {
        let out = device.memory.alloc(n as u64 * 96).expect("memory");
        let args = [Arg::U64(out), Arg::U64(device.upload(a)), Arg::U64(device.upload(b)), Arg::U32(n as u32)];
        device.run(name, grid, [128, 1, 1], 0, &args).unwrap_or_else(|fault| panic!("{fault}"));
        device.download(out, 6 * n)
    };
    for (i, found) in run("unsigned_128", &a, &b).chunks(6).enumerate() {
        let (a, b) = (a[i], b[i]);
        let want = [a / b, a % b, a.wrapping_mul(b), a.wrapping_add(b), a.wrapping_sub(b), a >> (b & 127)];
        assert_eq!(found, want, "{a:#x} and {b:#x}");
    }
    for (i, found) in run("signed_128", &a, &b).chunks(6).enumerate() {
        let (a, b) = (a[i] as i128, b[i] as i128);
        if (a, b) == (i128::MIN, -1) {
            continue;
        }
        let want = [a / b, a % b, a.wrapping_mul(b), a.wrapping_add(b), a.wrapping_sub(b), a >> (b & 127)];
        assert_eq!(found, want.map(|x| x as u128), "{a:#x} and {b:#x}");
    }
}
