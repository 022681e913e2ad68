//! Integer, bit and predicate instructions, by i128 and by the manual's pseudocode bit for bit.

use super::harness::{Case, run, width};
use super::reference::{integer, range};

/// What an instruction computes from its sources and a carry or borrow, with more bits than any of them.
type Meaning = Box<dyn Fn(&[u64], i128) -> i128>;

fn truncate(bits: u32, x: i128) -> u64 {
    x as u64 & (u64::MAX >> (64 - bits))
}

const TYPES: [&str; 6] = ["u16", "s16", "u32", "s32", "u64", "s64"];

fn wide(ty: &str) -> &'static str {
    match ty {
        "u16" => "u32",
        "s16" => "s32",
        "u32" => "u64",
        _ => "s64",
    }
}

#[test]
fn arithmetic() {
    let mut cases = Vec::new();
    for ty in TYPES {
        let w = width(ty);
        let two = |name: String, f: fn(i128, i128, u32) -> i128| {
            Case::new(name, &[ty], &[ty; 2], move |x| vec![truncate(w, f(integer(ty, x[0]), integer(ty, x[1]), w))])
        };
        let three = |name: String, f: fn(i128, i128, i128, u32) -> i128| {
            Case::new(name, &[ty], &[ty; 3], move |x| {
                vec![truncate(w, f(integer(ty, x[0]), integer(ty, x[1]), integer(ty, x[2]), w))]
            })
        };
        cases.push(two(format!("add.{ty}"), |a, b, _| a + b));
        cases.push(two(format!("sub.{ty}"), |a, b, _| a - b));
        cases.push(two(format!("mul.lo.{ty}"), |a, b, _| a.wrapping_mul(b)));
        // Of two 64-bit unsigned factors the product has 128 bits: as u128 it is right, and the shift is of u128.
        let high = move |a: u64, b: u64| {
            if ty.starts_with('s') {
                ((integer(ty, a) * integer(ty, b)) >> w) as u64
            } else {
                ((integer(ty, a) as u128 * integer(ty, b) as u128) >> w) as u64
            }
        };
        cases.push(Case::new(format!("mul.hi.{ty}"), &[ty], &[ty; 2], move |x| {
            vec![truncate(w, high(x[0], x[1]) as i128)]
        }));
        cases.push(Case::new(format!("mad.hi.{ty}"), &[ty], &[ty; 3], move |x| {
            vec![truncate(w, high(x[0], x[1]).wrapping_add(x[2]) as i128)]
        }));
        cases.push(three(format!("mad.lo.{ty}"), |a, b, c, _| a.wrapping_mul(b).wrapping_add(c)));
        cases.push(three(format!("sad.{ty}"), |a, b, c, _| c + (a - b).abs()));
        cases.push(two(format!("min.{ty}"), |a, b, _| a.min(b)));
        cases.push(two(format!("max.{ty}"), |a, b, _| a.max(b)));
        cases.push(two(format!("div.{ty}"), |a, b, _| if b == 0 { -1 } else { a / b }));
        cases.push(two(format!("rem.{ty}"), |a, b, _| if b == 0 { -1 } else { a % b }));
        if w < 64 {
            let to = wide(ty);
            cases.push(Case::new(format!("mul.wide.{ty}"), &[to], &[ty; 2], move |x| {
                vec![truncate(2 * w, integer(ty, x[0]) * integer(ty, x[1]))]
            }));
            cases.push(Case::new(format!("mad.wide.{ty}"), &[to], &[ty, ty, to], move |x| {
                vec![truncate(2 * w, integer(ty, x[0]) * integer(ty, x[1]) + integer(to, x[2]))]
            }));
        }
        if ty.starts_with('s') {
            cases.push(Case::new(format!("abs.{ty}"), &[ty], &[ty], move |x| {
                vec![truncate(w, integer(ty, x[0]).abs())]
            }));
            cases.push(Case::new(format!("neg.{ty}"), &[ty], &[ty], move |x| vec![truncate(w, -integer(ty, x[0]))]));
        }
    }
    let clamp = |x: i128| {
        let (min, max) = range("s32");
        vec![truncate(32, x.clamp(min, max))]
    };
    let s = |x: u64| integer("s32", x);
    cases.push(Case::new("add.sat.s32", &["s32"], &["s32"; 2], move |x| clamp(s(x[0]) + s(x[1]))));
    cases.push(Case::new("sub.sat.s32", &["s32"], &["s32"; 2], move |x| clamp(s(x[0]) - s(x[1]))));
    cases.push(Case::new("mad.hi.sat.s32", &["s32"], &["s32"; 3], move |x| {
        clamp(((s(x[0]) * s(x[1])) >> 32) + s(x[2]))
    }));
    cases.push(Case::new("min.relu.s32", &["s32"], &["s32"; 2], move |x| clamp(s(x[0]).min(s(x[1])).max(0))));
    cases.push(Case::new("max.relu.s32", &["s32"], &["s32"; 2], move |x| clamp(s(x[0]).max(s(x[1])).max(0))));
    for ty in ["u32", "s32"] {
        let low24 = move |x: u64| {
            let x = (x & 0xff_ffff) as i128;
            if ty == "s32" && x >> 23 == 1 { x - (1 << 24) } else { x }
        };
        for (mode, shift) in [("lo", 0), ("hi", 16)] {
            let product = move |x: &[u64]| (low24(x[0]) * low24(x[1])) >> shift;
            cases.push(Case::new(format!("mul24.{mode}.{ty}"), &[ty], &[ty; 2], move |x| {
                vec![truncate(32, product(x))]
            }));
            cases.push(Case::new(format!("mad24.{mode}.{ty}"), &[ty], &[ty; 3], move |x| {
                vec![truncate(32, product(x) + x[2] as i128)]
            }));
            if mode == "hi" && ty == "s32" {
                cases.push(Case::new("mad24.hi.sat.s32", &[ty], &[ty; 3], move |x| {
                    clamp(s(truncate(32, product(x))) + s(x[2]))
                }));
            }
        }
    }
    for ty in ["u16x2", "s16x2"] {
        let one = if ty == "u16x2" { "u16" } else { "s16" };
        let each = move |x: &[u64], f: &dyn Fn(i128, i128) -> i128| {
            let half = |shift: u32| truncate(16, f(integer(one, x[0] >> shift), integer(one, x[1] >> shift)));
            vec![half(0) | half(16) << 16]
        };
        cases.push(Case::new(format!("add.{ty}"), &[ty], &[ty; 2], move |x| each(x, &|a, b| a + b)));
        cases.push(Case::new(format!("min.{ty}"), &[ty], &[ty; 2], move |x| each(x, &|a, b| a.min(b))));
        cases.push(Case::new(format!("max.{ty}"), &[ty], &[ty; 2], move |x| each(x, &|a, b| a.max(b))));
        if ty == "s16x2" {
            cases.push(Case::new("min.relu.s16x2", &[ty], &[ty; 2], move |x| each(x, &|a, b| a.min(b).max(0))));
            cases.push(Case::new("max.relu.s16x2", &[ty], &[ty; 2], move |x| each(x, &|a, b| a.max(b).max(0))));
        }
    }
    run(cases);
}

#[test]
fn carries() {
    let mut cases = Vec::new();
    for ty in ["u32", "s32", "u64", "s64"] {
        let w = width(ty);
        let modulus = 1i128 << w;
        // Patterns as unsigned numbers: carries do not know signs.
        let low = move |x: u64| truncate(w, x as i128) as i128;
        let mut push = |name: String, sources: usize, carry: (bool, bool), full: Meaning| {
            let subtracts = name.starts_with("sub");
            let meaning = move |x: &[u64]| {
                // The flag says that a sum carried, or that a difference did not borrow.
                let flag = if carry.0 { x[sources] as i128 } else { i128::from(subtracts) };
                let r = full(x, if subtracts { 1 - flag } else { flag });
                let mut results = vec![truncate(w, r)];
                if carry.1 {
                    results.push(u64::from(if subtracts { r >= 0 } else { r >= modulus }));
                }
                results
            };
            let mut case = Case::new(name, &[ty], &[ty; 3][..sources], meaning);
            case.carry = carry;
            cases.push(case);
        };
        let part = move |x: &[u64], hi: bool| -> i128 {
            if !hi {
                return low((x[0] as u128).wrapping_mul(x[1] as u128) as u64);
            }
            let product = if ty.starts_with('s') {
                (integer(ty, x[0]) * integer(ty, x[1])) >> w
            } else {
                ((low(x[0]) as u128 * low(x[1]) as u128) >> w) as i128
            };
            low(product as u64)
        };
        push(format!("add.cc.{ty}"), 2, (false, true), Box::new(move |x, _| low(x[0]) + low(x[1])));
        push(format!("addc.{ty}"), 2, (true, false), Box::new(move |x, c| low(x[0]) + low(x[1]) + c));
        push(format!("addc.cc.{ty}"), 2, (true, true), Box::new(move |x, c| low(x[0]) + low(x[1]) + c));
        push(format!("sub.cc.{ty}"), 2, (false, true), Box::new(move |x, _| low(x[0]) - low(x[1])));
        push(format!("subc.{ty}"), 2, (true, false), Box::new(move |x, borrow| low(x[0]) - low(x[1]) - borrow));
        push(format!("subc.cc.{ty}"), 2, (true, true), Box::new(move |x, borrow| low(x[0]) - low(x[1]) - borrow));
        for (mode, hi) in [("lo", false), ("hi", true)] {
            push(format!("mad.{mode}.cc.{ty}"), 3, (false, true), Box::new(move |x, _| part(x, hi) + low(x[2])));
            push(format!("madc.{mode}.{ty}"), 3, (true, false), Box::new(move |x, c| part(x, hi) + low(x[2]) + c));
            push(format!("madc.{mode}.cc.{ty}"), 3, (true, true), Box::new(move |x, c| part(x, hi) + low(x[2]) + c));
        }
    }
    run(cases);
}

#[test]
fn logic_and_shifts() {
    let mut cases = Vec::new();
    for ty in ["b16", "b32", "b64", "pred"] {
        let w = width(ty);
        cases.push(Case::new(format!("and.{ty}"), &[ty], &[ty; 2], |x| vec![x[0] & x[1]]));
        cases.push(Case::new(format!("or.{ty}"), &[ty], &[ty; 2], |x| vec![x[0] | x[1]]));
        cases.push(Case::new(format!("xor.{ty}"), &[ty], &[ty; 2], |x| vec![x[0] ^ x[1]]));
        cases.push(Case::new(format!("not.{ty}"), &[ty], &[ty], move |x| vec![truncate(w, !x[0] as i128)]));
        if ty != "pred" {
            cases.push(Case::new(format!("cnot.{ty}"), &[ty], &[ty], |x| vec![(x[0] == 0) as u64]));
            cases.push(Case::new(format!("shl.{ty}"), &[ty], &[ty, "u32"], move |x| {
                vec![if x[1] >= w as u64 { 0 } else { truncate(w, (x[0] as i128) << x[1]) }]
            }));
        }
    }
    for ty in ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64"] {
        let w = width(ty);
        cases.push(Case::new(format!("shr.{ty}"), &[ty], &[ty, "u32"], move |x| {
            vec![truncate(w, integer(ty, x[0]) >> x[1].min(100))]
        }));
    }
    for (mode, wrap) in [("wrap", true), ("clamp", false)] {
        let amount = move |c: u64| if wrap { c & 31 } else { c.min(32) };
        cases.push(Case::new(format!("shf.l.{mode}.b32"), &["b32"], &["b32", "b32", "u32"], move |x| {
            vec![((((x[1] as u128) << 32 | x[0] as u128) << amount(x[2])) >> 32) as u64 & 0xffff_ffff]
        }));
        cases.push(Case::new(format!("shf.r.{mode}.b32"), &["b32"], &["b32", "b32", "u32"], move |x| {
            vec![(((x[1] as u128) << 32 | x[0] as u128) >> amount(x[2])) as u64 & 0xffff_ffff]
        }));
    }
    run(cases);
}

#[test]
fn three_input_logic() {
    fn by_table(x: &[u64], table: u32) -> u64 {
        (0..32)
            .map(|i| {
                let index = (x[0] >> i & 1) << 2 | (x[1] >> i & 1) << 1 | (x[2] >> i & 1);
                (table as u64 >> index & 1) << i
            })
            .sum()
    }
    let mut cases = Vec::new();
    for table in 0..256u32 {
        let mut case = Case::new("lop3.b32", &["b32"], &["b32", "b32", "b32", &format!("b32={table}")], move |x| {
            vec![by_table(x, table)]
        });
        case.inputs = 64;
        cases.push(case);
    }
    for table in [0u32, 0x80, 0x96, 0xe8, 0xfe, 0xca] {
        for operator in ["and", "or"] {
            let src = ["b32", "b32", "b32", &format!("b32={table}"), "pred"];
            cases.push(Case::new(format!("lop3.{operator}.b32"), &["b32", "pred"], &src, move |x| {
                let d = by_table(x, table);
                let t = (d != 0) as u64;
                vec![d, if operator == "and" { t & x[4] } else { t | x[4] }]
            }));
        }
    }
    run(cases);
}

#[test]
fn bit_fields() {
    let mut cases = Vec::new();
    for ty in ["u32", "s32", "u64", "s64"] {
        let msb = width(ty) as u64 - 1;
        let signed = ty.starts_with('s');
        cases.push(Case::new(format!("bfe.{ty}"), &[ty], &[ty, "u32", "u32"], move |x| {
            let (a, position, length) = (x[0], x[1] & 0xff, x[2] & 0xff);
            let sign = if !signed || length == 0 { 0 } else { a >> (position + length - 1).min(msb) & 1 };
            vec![
                (0..=msb)
                    .map(|i| (if i < length && position + i <= msb { a >> (position + i) & 1 } else { sign }) << i)
                    .sum(),
            ]
        }));
        for (shift, name) in [(false, "bfind"), (true, "bfind.shiftamt")] {
            cases.push(Case::new(format!("{name}.{ty}"), &["u32"], &[ty], move |x| {
                let a = if signed && x[0] >> msb & 1 == 1 { !x[0] } else { x[0] };
                let found = (0..=msb).rev().find(|i| a >> i & 1 == 1);
                vec![found.map_or(0xffff_ffff, |i| if shift { msb - i } else { i })]
            }));
        }
    }
    for ty in ["b32", "b64"] {
        let msb = width(ty) as u64 - 1;
        cases.push(Case::new(format!("bfi.{ty}"), &[ty], &[ty, ty, "u32", "u32"], move |x| {
            let (a, position, length) = (x[0], x[2] & 0xff, x[3] & 0xff);
            let mut f = x[1];
            for i in (0..length).take_while(|i| position + i <= msb) {
                f = f & !(1 << (position + i)) | (a >> i & 1) << (position + i);
            }
            vec![f]
        }));
        cases.push(Case::new(format!("brev.{ty}"), &[ty], &[ty], move |x| {
            vec![(0..=msb).map(|i| (x[0] >> (msb - i) & 1) << i).sum()]
        }));
        cases.push(Case::new(format!("popc.{ty}"), &["u32"], &[ty], move |x| {
            vec![(0..=msb).map(|i| x[0] >> i & 1).sum()]
        }));
        cases.push(Case::new(format!("clz.{ty}"), &["u32"], &[ty], move |x| {
            vec![(0..=msb).rev().take_while(|i| x[0] >> i & 1 == 0).count() as u64]
        }));
    }
    for mode in ["wrap", "clamp"] {
        for ty in ["u32", "s32"] {
            cases.push(Case::new(format!("szext.{mode}.{ty}"), &[ty], &[ty, "u32"], move |x| {
                let n = if mode == "wrap" { x[1] & 31 } else { x[1].min(32) };
                let low = if n == 0 { 0 } else { x[0] & (0xffff_ffff >> (32 - n)) };
                let sign = n > 0 && ty == "s32" && low >> (n - 1) & 1 == 1;
                vec![if sign { truncate(32, low as i128 - (1i128 << n)) } else { low }]
            }));
        }
        cases.push(Case::new(format!("bmsk.{mode}.b32"), &["b32"], &["b32", "u32"], move |x| {
            let (a, b) = if mode == "wrap" { (x[0] & 31, x[1] & 31) } else { (x[0].min(32), x[1].min(32)) };
            vec![(0..32).filter(|i| *i >= a && *i < a + b).map(|i| 1 << i).sum()]
        }));
    }
    cases.push(
        Case::new("fns.b32", &["b32"], &["b32", "b32", "s32"], |x| {
            let (mask, base, offset) = (x[0], x[1] as i64, x[2] as u32 as i32);
            let set = |i: &i64| mask >> i & 1 == 1;
            let nth = offset.unsigned_abs() as usize;
            let found = match offset {
                0 => Some(base).filter(set),
                1.. => (base..32).filter(set).nth(nth - 1),
                _ => (0..=base).rev().filter(set).nth(nth - 1),
            };
            vec![found.map_or(0xffff_ffff, |i| i as u64)]
        })
        .extra(
            (0..200u64)
                .map(|i| vec![(0x9e37_79b9 * (i + 1)) & 0xffff_ffff, i % 32, (i % 9).wrapping_sub(4) & 0xffff_ffff])
                .collect(),
        )
        .defined(|x| x[1] < 32),
    );
    run(cases);
}

#[test]
fn bytes() {
    let mut cases = Vec::new();
    fn byte(pair: u128, selector: u64) -> u64 {
        let byte = (pair >> (8 * (selector & 7))) as u64 & 0xff;
        if selector & 8 != 0 { if byte & 0x80 != 0 { 0xff } else { 0 } } else { byte }
    }
    // The manual's table of selectors, by the control value's two low bits.
    let tables: [(&str, [[u64; 4]; 4]); 6] = [
        ("f4e", [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]),
        ("b4e", [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]]),
        ("rc8", [[0; 4], [1; 4], [2; 4], [3; 4]]),
        ("ecl", [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]]),
        ("ecr", [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]]),
        ("rc16", [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]]),
    ];
    let pick = |x: &[u64], selectors: [u64; 4]| {
        let pair = (x[1] as u128) << 32 | x[0] as u128;
        vec![(0..4).map(|i| byte(pair, selectors[i]) << (8 * i)).sum()]
    };
    cases.push(Case::new("prmt.b32", &["b32"], &["b32"; 3], move |x| pick(x, [0, 4, 8, 12].map(|s| x[2] >> s & 15))));
    for (mode, table) in tables {
        cases.push(Case::new(format!("prmt.b32.{mode}"), &["b32"], &["b32"; 3], move |x| {
            pick(x, table[(x[2] & 3) as usize])
        }));
    }
    for a in ["u32", "s32"] {
        for b in ["u32", "s32"] {
            let to = if a == "u32" && b == "u32" { "u32" } else { "s32" };
            let (a8, b8, a16) = (
                if a == "u32" { "u8" } else { "s8" },
                if b == "u32" { "u8" } else { "s8" },
                if a == "u32" { "u16" } else { "s16" },
            );
            cases.push(Case::new(format!("dp4a.{a}.{b}"), &[to], &[a, b, to], move |x| {
                let dot: i128 = (0..4).map(|i| integer(a8, x[0] >> (8 * i)) * integer(b8, x[1] >> (8 * i))).sum();
                vec![truncate(32, dot + x[2] as i128)]
            }));
            for (mode, from) in [("lo", 0), ("hi", 16)] {
                cases.push(Case::new(format!("dp2a.{mode}.{a}.{b}"), &[to], &[a, b, to], move |x| {
                    let dot: i128 =
                        (0..2).map(|i| integer(a16, x[0] >> (16 * i)) * integer(b8, x[1] >> (from + 8 * i))).sum();
                    vec![truncate(32, dot + x[2] as i128)]
                }));
            }
        }
    }
    for (count, bits) in [("2", 16), ("4", 8)] {
        for [to, a, b] in [["u32"; 3], ["s32"; 3], ["u32", "s32", "u32"], ["s32", "u32", "s32"]] {
            let part = move |ty: &str, x: u64, i: u32| integer(&format!("{}{bits}", &ty[..1]), x >> (bits * i));
            for name in ["vadd", "vsub", "vavrg", "vabsdiff", "vmin", "vmax"] {
                let each = move |x: &[u64], i: u32| match (name, part(a, x[0], i), part(b, x[1], i)) {
                    ("vadd", x, y) => x + y,
                    ("vsub", x, y) => x - y,
                    ("vavrg", x, y) => (if x + y >= 0 { x + y + 1 } else { x + y }).div_euclid(2),
                    ("vabsdiff", x, y) => (x - y).abs(),
                    ("vmin", x, y) => x.min(y),
                    (_, x, y) => x.max(y),
                };
                let parts = 32 / bits;
                let name = format!("{name}{count}.{to}.{a}.{b}");
                cases.push(Case::new(&name, &[to], &[a, b, to], move |x| {
                    vec![(0..parts).fold(0, |d, i| d | truncate(bits, each(x, i)) << (bits * i))]
                }));
                cases.push(Case::new(format!("{name}.sat"), &[to], &[a, b, to], move |x| {
                    let (min, max) = range(&format!("{}{bits}", &to[..1]));
                    let limited = |i| truncate(bits, each(x, i).clamp(min, max));
                    vec![(0..parts).fold(0, |d, i| d | limited(i) << (bits * i))]
                }));
                cases.push(Case::new(format!("{name}.add"), &[to], &[a, b, to], move |x| {
                    vec![truncate(32, x[2] as i128 + (0..parts).map(|i| each(x, i)).sum::<i128>())]
                }));
            }
        }
    }
    for (to, bits) in [("u16", 16), ("s16", 16), ("u8", 8), ("s8", 8)] {
        let limit = move |x: u64| {
            let (min, max) = range(to);
            truncate(bits, integer("s32", x).clamp(min, max))
        };
        if bits == 16 {
            cases.push(Case::new(format!("cvt.pack.sat.{to}.s32"), &["b32"], &["s32"; 2], move |x| {
                vec![limit(x[0]) << 16 | limit(x[1])]
            }));
        } else {
            cases.push(Case::new(format!("cvt.pack.sat.{to}.s32.b32"), &["b32"], &["s32", "s32", "b32"], move |x| {
                vec![(x[2] & 0xffff) << 16 | limit(x[0]) << 8 | limit(x[1])]
            }));
        }
    }
    run(cases);
}
