//! f32 and f64: add, sub, mul, fma, div, rcp, sqrt in all rounding modes, min, max, neg, abs, copysign, testp.

use super::harness::{Case, Check, run};
use super::reference::{Format, arithmetic, sqrt};

const ROUNDS: [&str; 4] = ["rn", "rz", "rm", "rp"];

fn check(format: Format) -> Check {
    if format == Format::F64 { Check::AnyNan(format) } else { Check::Exact }
}

/// Inputs of fused operations whose product and addend nearly cancel, or meet at a distance.
fn near(format: Format) -> Vec<Vec<u64>> {
    let mut tuples = Vec::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    for i in 0..3000u64 {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed ^ seed >> 29
        };
        let middle = format.one() & format.exponent_mask();
        let fraction = (1u64 << format.fraction()) - 1;
        let spread = (next() % 60) << format.fraction();
        let a = (middle + spread - (30 << format.fraction()).min(middle)) & (format.sign() - 1) | next() & fraction;
        let b = middle | next() & fraction & !((1 << (next() % 12)) - 1);
        let product = arithmetic(format, "mul", a, b, 0, "rn");
        let shift = (next() % (2 * format.fraction() as u64 + 4)) << format.fraction();
        let c = match i % 3 {
            0 => product ^ format.sign(),
            1 => (product ^ format.sign()).wrapping_add(next() % 3).wrapping_sub(1),
            _ => product.wrapping_sub(shift) ^ (next() & format.sign()),
        };
        tuples.push(vec![a & format.mask(), b & format.mask(), c & format.mask()]);
    }
    tuples
}

#[test]
fn arithmetic_in_all_modes() {
    let mut cases = Vec::new();
    for ty in ["f32", "f64"] {
        let format = Format::of(ty);
        let modifiers: &[&str] = if ty == "f32" { &["", ".ftz", ".sat", ".ftz.sat"] } else { &[""] };
        for operation in ["add", "sub", "mul", "fma", "mad", "div", "rcp"] {
            for mode in ["", "rn", "rz", "rm", "rp"] {
                for modifier in modifiers {
                    let sat = modifier.contains("sat");
                    let ftz = modifier.contains("ftz");
                    let optional = matches!(operation, "add" | "sub" | "mul");
                    if (mode.is_empty() && !optional) || (sat && matches!(operation, "div" | "rcp")) {
                        continue;
                    }
                    let dot = if mode.is_empty() { "" } else { "." };
                    let sources = match operation {
                        "rcp" => 1,
                        "fma" | "mad" => 3,
                        _ => 2,
                    };
                    let mode = if mode.is_empty() { "rn" } else { mode };
                    let name = format!("{operation}{dot}{}{modifier}.{ty}", if dot.is_empty() { "" } else { mode });
                    let meaning = move |x: &[u64]| {
                        let x: Vec<u64> = x.iter().map(|x| if ftz { format.flush(*x) } else { *x }).collect();
                        let r = match operation {
                            "rcp" => arithmetic(format, "div", format.one(), x[0], 0, mode),
                            "fma" | "mad" => arithmetic(format, "fma", x[0], x[1], x[2], mode),
                            _ => arithmetic(format, operation, x[0], x[1], 0, mode),
                        };
                        let r = if ftz { format.flush(r) } else { r };
                        vec![if sat { format.saturate(r) } else { r }]
                    };
                    let extra = if sources == 3 {
                        near(format)
                    } else {
                        near(format).iter().map(|t| t[if sources == 1 { 0 } else { 1 }..][..sources].to_vec()).collect()
                    };
                    cases.push(Case::new(name, &[ty], &[ty; 3][..sources], meaning).check(check(format)).extra(extra));
                }
            }
        }
    }
    run(cases);
}

#[test]
fn square_roots() {
    let mut cases = Vec::new();
    for mode in ROUNDS {
        for (ftz, modifier) in [(false, ""), (true, ".ftz")] {
            cases.push(Case::new(format!("sqrt.{mode}{modifier}.f32"), &["f32"], &["f32"], move |x| {
                let f = Format::F32;
                vec![sqrt(f, if ftz { f.flush(x[0]) } else { x[0] }, mode)]
            }));
        }
        let f64_root = move |x: &[u64]| vec![sqrt(Format::F64, x[0], mode)];
        cases.push(Case::new(format!("sqrt.{mode}.f64"), &["f64"], &["f64"], f64_root).check(check(Format::F64)));
    }
    run(cases);
}

/// Minimum and maximum from the manual's pseudocode.
pub fn min_max(format: Format, max: bool, modifiers: &str, a: u64, b: u64) -> u64 {
    let has = |m: &str| modifiers.contains(m);
    let (a, b) = if has("ftz") { (format.flush(a), format.flush(b)) } else { (a, b) };
    let sign = (a ^ b) & format.sign();
    let (a, b) = if has("xorsign") { (a & !format.sign(), b & !format.sign()) } else { (a, b) };
    let r = match (format.is_nan(a), format.is_nan(b)) {
        (true, true) => return format.nan(),
        (true, false) | (false, true) if has("NaN") => return format.nan(),
        (true, false) => b,
        (false, true) => a,
        _ => {
            let (x, y) = (format.value(a), format.value(b));
            // -0 is below +0.
            let below = x < y || (x == y && x.is_sign_negative() && !y.is_sign_negative());
            if below != max { a } else { b }
        }
    };
    if has("xorsign") { r | sign } else { r }
}

#[test]
fn minimum_and_maximum() {
    let mut cases = Vec::new();
    for (name, max) in [("min", false), ("max", true)] {
        for modifiers in [
            "",
            ".ftz",
            ".NaN",
            ".ftz.NaN",
            ".xorsign.abs",
            ".NaN.xorsign.abs",
            ".ftz.NaN.xorsign.abs",
            ".ftz.xorsign.abs",
        ] {
            let meaning = move |x: &[u64]| vec![min_max(Format::F32, max, modifiers, x[0], x[1])];
            cases.push(Case::new(format!("{name}{modifiers}.f32"), &["f32"], &["f32"; 2], meaning));
        }
        let meaning = move |x: &[u64]| vec![min_max(Format::F64, max, "", x[0], x[1])];
        cases.push(Case::new(format!("{name}.f64"), &["f64"], &["f64"; 2], meaning).check(check(Format::F64)));
    }
    run(cases);
}

#[test]
fn signs_and_properties() {
    let mut cases = Vec::new();
    for ty in ["f32", "f64"] {
        let format = Format::of(ty);
        let modifiers: &[&str] = if ty == "f32" { &["", ".ftz"] } else { &[""] };
        for modifier in modifiers {
            let flush = move |x: u64| {
                if modifier.is_empty() { x } else { format.flush(x) }
            };
            let neg = move |x: &[u64]| vec![flush(x[0]) ^ format.sign()];
            let abs = move |x: &[u64]| vec![flush(x[0]) & !format.sign()];
            cases.push(Case::new(format!("neg{modifier}.{ty}"), &[ty], &[ty], neg).check(Check::AnyNan(format)));
            cases.push(Case::new(format!("abs{modifier}.{ty}"), &[ty], &[ty], abs).check(Check::AnyNan(format)));
        }
        let copysign = move |x: &[u64]| vec![x[1] & !format.sign() | x[0] & format.sign()];
        cases.push(Case::new(format!("copysign.{ty}"), &[ty], &[ty; 2], copysign));
        for test in ["finite", "infinite", "number", "notanumber", "normal", "subnormal"] {
            let meaning = move |x: &[u64]| {
                let v =
                    if ty == "f32" { f32::from_bits(x[0] as u32).classify() } else { f64::from_bits(x[0]).classify() };
                use std::num::FpCategory::*;
                vec![match test {
                    "finite" => !matches!(v, Nan | Infinite),
                    "infinite" => v == Infinite,
                    "number" => v != Nan,
                    "notanumber" => v == Nan,
                    "normal" => matches!(v, Normal | Zero),
                    _ => v == Subnormal,
                } as u64]
            };
            cases.push(Case::new(format!("testp.{test}.{ty}"), &["pred"], &[ty], meaning));
        }
    }
    run(cases);
}
