//! Every form of cvt: between integers, between floats, across, with rounding, saturation, flushing, relu, pairs, tf32.

use super::harness::{Case, Check, run, width};
use super::reference::{Format, arithmetic, convert, from_integer, integer, integral, range};

const INTEGERS: [&str; 8] = ["u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"];
const FLOATS: [&str; 4] = ["f16", "bf16", "f32", "f64"];

/// What a register of the type's own width, or of 16 bits for bytes, holds.
fn held(ty: &str, x: i128) -> u64 {
    x as u64 & (u64::MAX >> (64 - width(ty).max(16)))
}

/// The low bits of an integer as the type reads them.
fn wrapped(ty: &str, x: i128) -> i128 {
    integer(ty, x as u64)
}

#[test]
fn between_integers() {
    let mut cases = Vec::new();
    for to in INTEGERS {
        for from in INTEGERS {
            cases.push(Case::new(format!("cvt.{to}.{from}"), &[to], &[from], move |x| {
                vec![held(to, wrapped(to, integer(from, x[0])))]
            }));
            cases.push(Case::new(format!("cvt.sat.{to}.{from}"), &[to], &[from], move |x| {
                let (min, max) = range(to);
                vec![held(to, integer(from, x[0]).clamp(min, max))]
            }));
        }
    }
    run(cases);
}

#[test]
fn from_floats_to_integers() {
    let mut cases = Vec::new();
    for from in FLOATS {
        for to in INTEGERS {
            for by in ["rni", "rzi", "rmi", "rpi"] {
                for modifier in ["", ".ftz", ".sat", ".ftz.sat"] {
                    if modifier.contains("ftz") && from != "f32" {
                        continue;
                    }
                    let format = Format::of(from);
                    let mut case = Case::new(format!("cvt.{by}{modifier}.{to}.{from}"), &[to], &[from], move |x| {
                        let x = if modifier.contains("ftz") { format.flush(x[0]) } else { x[0] };
                        if format.is_nan(x & format.mask()) {
                            // The manual: zero, unless one of the two has 64 bits; then 1 << (bits - 1).
                            let high = from == "f64" || width(to) == 64;
                            return vec![if high { held(to, wrapped(to, 1 << (width(to) - 1))) } else { 0 }];
                        }
                        let (min, max) = range(to);
                        // `as` on f64 truncates what is integral already, and limits to i128.
                        vec![held(to, (integral(format, x, by) as i128).clamp(min, max))]
                    });
                    case.inputs = 6000;
                    cases.push(case);
                }
            }
        }
    }
    run(cases);
}

#[test]
fn from_integers_to_floats() {
    let mut cases = Vec::new();
    for to in FLOATS {
        for from in INTEGERS {
            for by in ["rn", "rz", "rm", "rp"] {
                for sat in ["", ".sat"] {
                    let format = Format::of(to);
                    cases.push(Case::new(format!("cvt.{by}{sat}.{to}.{from}"), &[to], &[from], move |x| {
                        let r = from_integer(format, integer(from, x[0]), by);
                        vec![if sat.is_empty() { r } else { format.saturate(r) }]
                    }));
                }
            }
        }
    }
    run(cases);
}

#[test]
fn between_floats() {
    let mut cases = Vec::new();
    for to in FLOATS {
        for from in FLOATS {
            let (target, source) = (Format::of(to), Format::of(from));
            let lossy =
                target.bits() < source.bits() || (target.bits() == 16 && target != source && source.bits() == 16);
            let rounds: &[&str] = match (lossy, to == from) {
                (true, _) => &["rn", "rz", "rm", "rp"],
                (false, true) => &["", "rni", "rzi", "rmi", "rpi"],
                (false, false) => &[""],
            };
            for by in rounds {
                for modifier in ["", ".ftz", ".sat", ".ftz.sat"] {
                    if modifier.contains("ftz") && to != "f32" && from != "f32" {
                        continue;
                    }
                    let dot = if by.is_empty() { "" } else { "." };
                    let mut case = Case::new(format!("cvt{dot}{by}{modifier}.{to}.{from}"), &[to], &[from], move |x| {
                        let ftz = modifier.contains("ftz");
                        let x = if ftz && from == "f32" { source.flush(x[0]) } else { x[0] };
                        let r = match *by {
                            "" => convert(source, target, x, "rn"),
                            by if by.ends_with('i') => arithmetic(source, "integral", x, 0, 0, by),
                            by => convert(source, target, x, by),
                        };
                        let r = if ftz && to == "f32" { target.flush(r) } else { r };
                        vec![if modifier.contains("sat") { target.saturate(r) } else { r }]
                    });
                    case.inputs = if matches!((to, from), ("f16" | "bf16", "f32")) { 40_000 } else { 4000 };
                    case.check = if to == "f64" { Check::AnyNan(target) } else { Check::Exact };
                    if matches!(from, "f32" | "f64") {
                        case.extra = ties(target, source);
                    }
                    cases.push(case);
                }
            }
        }
    }
    run(cases);
}

/// Values at, and one step beside, the middle between neighbours of the target format.
fn ties(target: Format, source: Format) -> Vec<Vec<u64>> {
    let mut values = Vec::new();
    if source.bits() <= target.bits() {
        return values;
    }
    for i in 0..4000u64 {
        let low = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (65 - target.bits());
        let (a, b) = (target.value(low), target.value(low + 1));
        if a.is_finite() && b.is_finite() {
            let middle = convert(Format::F64, source, ((a + b) / 2.0).to_bits(), "rn");
            for step in [0, 1, u64::MAX] {
                values.push(vec![(middle.wrapping_add(step) & source.mask()) | ((i & 1) * source.sign())]);
            }
        }
    }
    values
}

#[test]
fn narrowing_with_relu_and_satfinite() {
    let mut cases = Vec::new();
    for to in ["f16", "bf16"] {
        let format = Format::of(to);
        for by in ["rn", "rz"] {
            for modifier in ["", ".relu", ".satfinite", ".relu.satfinite"] {
                let one = move |x: u64| {
                    let r = convert(Format::F32, format, x, by);
                    let infinite = r & 0x7fff == format.exponent_mask();
                    let r = if modifier.contains("satfinite") && infinite { r - 1 } else { r };
                    if modifier.contains("relu") { format.relu(r) } else { r }
                };
                cases
                    .push(Case::new(format!("cvt.{by}{modifier}.{to}.f32"), &[to], &["f32"], move |x| vec![one(x[0])]));
                let pair = if to == "f16" { "f16x2" } else { "bf16x2" };
                cases.push(Case::new(format!("cvt.{by}{modifier}.{pair}.f32"), &[pair], &["f32"; 2], move |x| {
                    vec![one(x[0]) << 16 | one(x[1])]
                }));
            }
        }
    }
    for by in ["rna", "rn", "rz"] {
        for modifier in ["", ".relu", ".satfinite"] {
            if by == "rna" && modifier == ".relu" {
                continue;
            }
            cases.push(
                Case::new(format!("cvt.{by}{modifier}.tf32.f32"), &["b32"], &["f32"], move |x| {
                    if Format::F32.is_nan(x[0]) {
                        return vec![0x7fff_ffff];
                    }
                    // 13 bits of the pattern go, infinity stays: patterns are ordered as magnitudes are.
                    let (kept, rest) = (x[0] >> 13 & 0x3_ffff, x[0] & 0x1fff);
                    let up = match by {
                        "rna" => rest >= 0x1000,
                        "rn" => rest > 0x1000 || (rest == 0x1000 && kept & 1 == 1),
                        _ => false,
                    };
                    let magnitude = (kept + up as u64) << 13;
                    let magnitude =
                        if modifier == ".satfinite" && magnitude == 0x7f80_0000 { 0x7f7f_e000 } else { magnitude };
                    let negative = x[0] >> 31 == 1;
                    vec![if modifier == ".relu" && negative { 0 } else { magnitude | (negative as u64) << 31 }]
                })
                .extra(
                    (0..2000u64).map(|i| vec![(i.wrapping_mul(0x9e37_79b9) & 0xffff_e000) + 0xfff + i % 3]).collect(),
                ),
            );
        }
    }
    run(cases);
}
