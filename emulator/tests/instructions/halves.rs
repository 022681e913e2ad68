//! f16, bf16 and their pairs: one rounding, exact against a soft-float library.

use super::floats::min_max;
use super::harness::{Case, Check, run};
use super::reference::{Format, arithmetic};

/// Applies `f` to the halves of pairs, or to single values.
fn halves(ty: &str, x: &[u64], f: impl Fn(&[u64]) -> u64) -> Vec<u64> {
    let low: Vec<u64> = x.iter().map(|x| x & 0xffff).collect();
    if ty.ends_with("x2") {
        let high: Vec<u64> = x.iter().map(|x| x >> 16 & 0xffff).collect();
        vec![f(&low) | f(&high) << 16]
    } else {
        vec![f(&low)]
    }
}

#[test]
fn arithmetic_of_halves() {
    let mut cases = Vec::new();
    for ty in ["f16", "f16x2", "bf16", "bf16x2"] {
        let format = Format::of(ty);
        for operation in ["add", "sub", "mul", "fma"] {
            let modifiers: &[&str] = match (format, operation) {
                (Format::F16, "fma") => &["", ".ftz", ".sat", ".ftz.sat", ".relu", ".ftz.relu"],
                (Format::F16, _) => &["", ".ftz", ".sat", ".ftz.sat"],
                (_, "fma") => &["", ".relu"],
                _ => &[""],
            };
            for modifier in modifiers {
                for mode in ["", ".rn"] {
                    if operation == "fma" && mode.is_empty() {
                        continue;
                    }
                    let sources = if operation == "fma" { 3 } else { 2 };
                    let meaning = move |x: &[u64]| {
                        halves(ty, x, |x| {
                            let flush = |x: u64| {
                                if modifier.contains("ftz") { format.flush(x) } else { x }
                            };
                            let r = arithmetic(
                                format,
                                operation,
                                flush(x[0]),
                                flush(x[1]),
                                x.get(2).map_or(0, |x| flush(*x)),
                                "rn",
                            );
                            let r = flush(r);
                            if modifier.contains("sat") {
                                format.saturate(r)
                            } else if modifier.contains("relu") {
                                format.relu(r)
                            } else {
                                r
                            }
                        })
                    };
                    let mut case =
                        Case::new(format!("{operation}{mode}{modifier}.{ty}"), &[ty], &[ty; 3][..sources], meaning);
                    case.inputs = if modifier.is_empty() { 40_000 } else { 5000 };
                    cases.push(case);
                }
            }
        }
        for (operation, max) in [("min", false), ("max", true)] {
            for modifiers in
                ["", ".ftz", ".NaN", ".ftz.NaN", ".xorsign.abs", ".NaN.xorsign.abs", ".ftz.NaN.xorsign.abs"]
            {
                if format == Format::Bf16 && modifiers.contains("ftz") {
                    continue;
                }
                let meaning = move |x: &[u64]| halves(ty, x, |x| min_max(format, max, modifiers, x[0], x[1]));
                cases.push(Case::new(format!("{operation}{modifiers}.{ty}"), &[ty], &[ty; 2], meaning));
            }
        }
        let modifiers: &[&str] = if format == Format::F16 { &["", ".ftz"] } else { &[""] };
        for modifier in modifiers {
            for operation in ["neg", "abs"] {
                let meaning = move |x: &[u64]| {
                    halves(ty, x, |x| {
                        let x = if modifier.is_empty() { x[0] } else { format.flush(x[0]) };
                        if operation == "neg" { x ^ 0x8000 } else { x & 0x7fff }
                    })
                };
                cases.push(Case::new(format!("{operation}{modifier}.{ty}"), &[ty], &[ty], meaning));
            }
        }
    }
    run(cases);
}

/// Half-precision approximations, against the manual's bounds; all 65536 inputs.
#[test]
fn approximations_of_halves() {
    fn close(format: Format, found: u64, exact: f64, relative: f64, absolute: f64) -> bool {
        if exact.is_nan() {
            return found == format.nan();
        }
        let found = format.value(found);
        // Rounding to the format itself: half a unit, or half the smallest subnormal.
        let limit = exact.abs() * relative + absolute;
        found == exact
            || (found - exact).abs() <= limit
            || (found.is_infinite() && exact.abs() > if format == Format::F16 { 65519.0 } else { 3.39e38 })
    }
    fn ex2_f16(x: &[u64], _: u64, found: u64) -> bool {
        // 2^-9.9 and an ulp of the smallest subnormals.
        close(Format::F16, found, Format::F16.value(x[0]).exp2(), 2f64.powf(-9.9), 2f64.powi(-24))
    }
    fn ex2_bf16(x: &[u64], _: u64, found: u64) -> bool {
        // Flushed: what is below the smallest normal number may be zero.
        let exact = Format::Bf16.value(Format::Bf16.flush(x[0])).exp2();
        close(Format::Bf16, found, exact, 2f64.powi(-7), if exact < 2f64.powi(-126) { 2f64.powi(-126) } else { 0.0 })
    }
    fn tanh_f16(x: &[u64], _: u64, found: u64) -> bool {
        close(Format::F16, found, Format::F16.value(x[0]).tanh(), 0.0, 2f64.powf(-10.987))
    }
    fn tanh_bf16(x: &[u64], _: u64, found: u64) -> bool {
        close(Format::Bf16, found, Format::Bf16.value(x[0]).tanh(), 2f64.powi(-8), 0.0)
    }
    let case =
        |name: &str, ty: &'static str, accept| Case::new(name, &[ty], &[ty], |_| vec![0]).check(Check::Accept(accept));
    run(vec![
        case("ex2.approx.f16", "f16", ex2_f16),
        case("ex2.approx.ftz.bf16", "bf16", ex2_bf16),
        case("tanh.approx.f16", "f16", tanh_f16),
        case("tanh.approx.bf16", "bf16", tanh_bf16),
    ]);
    fn pair(x: &[u64], found: u64, accept: fn(&[u64], u64, u64) -> bool) -> bool {
        accept(&[x[0] & 0xffff], 0, found & 0xffff) && accept(&[x[0] >> 16], 0, found >> 16)
    }
    run(vec![
        case("ex2.approx.f16x2", "f16x2", |x, _, found| pair(x, found, ex2_f16)),
        case("ex2.approx.ftz.bf16x2", "bf16x2", |x, _, found| pair(x, found, ex2_bf16)),
        case("tanh.approx.f16x2", "f16x2", |x, _, found| pair(x, found, tanh_f16)),
        case("tanh.approx.bf16x2", "bf16x2", |x, _, found| pair(x, found, tanh_bf16)),
    ]);
}
