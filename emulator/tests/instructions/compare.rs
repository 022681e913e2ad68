//! setp and set with every operator, Boolean operator and type; selp and slct.

use super::harness::{Case, run, width};
use super::reference::{Format, integer};
use std::cmp::Ordering;

/// Whether the operator holds; `ordering` is None for NaN.
fn holds(operator: &str, ordering: Option<Ordering>) -> bool {
    use Ordering::*;
    let Some(ordering) = ordering else {
        return matches!(operator, "equ" | "neu" | "ltu" | "leu" | "gtu" | "geu" | "nan");
    };
    match operator {
        "eq" | "equ" => ordering == Equal,
        "ne" | "neu" => ordering != Equal,
        "lt" | "ltu" | "lo" => ordering == Less,
        "le" | "leu" | "ls" => ordering != Greater,
        "gt" | "gtu" | "hi" => ordering == Greater,
        "ge" | "geu" | "hs" => ordering != Less,
        "num" => true,
        "nan" => false,
        _ => panic!("no operator {operator}"),
    }
}

fn is_float(ty: &str) -> bool {
    ty.contains('f')
}

fn ordering(ty: &str, ftz: bool, a: u64, b: u64) -> Option<Ordering> {
    if is_float(ty) {
        let format = Format::of(ty);
        let flush = |x: u64| {
            if ftz { format.flush(x & format.mask()) } else { x }
        };
        format.value(flush(a)).partial_cmp(&format.value(flush(b)))
    } else {
        let as_int = match ty.strip_prefix('b') {
            Some(bits) => format!("u{bits}"),
            None => ty.to_string(),
        };
        Some(integer(&as_int, a).cmp(&integer(&as_int, b)))
    }
}

fn operators(ty: &str) -> Vec<&'static str> {
    match ty.chars().next() {
        _ if is_float(ty) => {
            vec!["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
        }
        Some('b') => vec!["eq", "ne"],
        Some('u') => vec!["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"],
        _ => vec!["eq", "ne", "lt", "le", "gt", "ge"],
    }
}

fn combine(operator: &str, t: bool, c: u64) -> bool {
    match operator {
        "" => t,
        ".and" => t & (c == 1),
        ".or" => t | (c == 1),
        _ => t ^ (c == 1),
    }
}

const TYPES: [&str; 13] = ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64", "f16", "bf16", "f32", "f64"];

#[test]
fn set_predicates() {
    let mut cases = Vec::new();
    for ty in TYPES.into_iter().chain(["f16x2", "bf16x2"]) {
        let pair = ty.ends_with("x2");
        for operator in operators(ty) {
            for boolean in ["", ".and", ".or", ".xor"] {
                for ftz in ["", ".ftz"] {
                    if !ftz.is_empty() && !matches!(ty, "f32" | "f16" | "f16x2") {
                        continue;
                    }
                    let src = [ty, ty, "pred"];
                    let src = &src[..if boolean.is_empty() { 2 } else { 3 }];
                    let one = format!("setp.{operator}{boolean}{ftz}.{ty}");
                    let meaning = move |x: &[u64]| {
                        let c = x.get(2).copied().unwrap_or(0);
                        let t =
                            |shift: u32| holds(operator, ordering(ty, !ftz.is_empty(), x[0] >> shift, x[1] >> shift));
                        if pair {
                            vec![combine(boolean, t(0), c) as u64, combine(boolean, t(16), c) as u64]
                        } else {
                            vec![combine(boolean, t(0), c) as u64, combine(boolean, !t(0), c) as u64]
                        }
                    };
                    let mut both = Case::new(one.clone(), &["pred", "pred"], src, meaning);
                    both.inputs = 600;
                    cases.push(both);
                    if !pair {
                        let mut first = Case::new(one, &["pred"], src, move |x| meaning(x)[..1].to_vec());
                        first.inputs = 600;
                        cases.push(first);
                    }
                }
            }
        }
    }
    run(cases);
}

#[test]
fn set_values() {
    let mut cases = Vec::new();
    let mut push = |to: &'static str, ty: &'static str| {
        let pair = ty.ends_with("x2");
        let yes: u64 = match to {
            "f32" => 0x3f80_0000,
            "f16" | "f16x2" => 0x3c00,
            "bf16" | "bf16x2" => 0x3f80,
            "u16" | "s16" => 0xffff,
            _ if pair => 0xffff,
            _ => 0xffff_ffff,
        };
        for operator in operators(ty) {
            for boolean in ["", ".and", ".xor"] {
                for ftz in ["", ".ftz"] {
                    if !ftz.is_empty() && !matches!(ty, "f32" | "f16" | "f16x2") {
                        continue;
                    }
                    let src = [ty, ty, "pred"];
                    let src = &src[..if boolean.is_empty() { 2 } else { 3 }];
                    let mut case = Case::new(format!("set.{operator}{boolean}{ftz}.{to}.{ty}"), &[to], src, move |x| {
                        let c = x.get(2).copied().unwrap_or(0);
                        let t = |shift: u32| {
                            let t = holds(operator, ordering(ty, !ftz.is_empty(), x[0] >> shift, x[1] >> shift));
                            if combine(boolean, t, c) { yes } else { 0 }
                        };
                        vec![if pair { t(0) | t(16) << 16 } else { t(0) }]
                    });
                    case.inputs = 400;
                    cases.push(case);
                }
            }
        }
    };
    for ty in TYPES {
        push("u32", ty);
        push("s32", ty);
        if !matches!(ty, "f16" | "bf16") {
            push("f32", ty);
        }
    }
    for (to, ty) in [
        ("f16", "f16"),
        ("u16", "f16"),
        ("s16", "f16"),
        ("bf16", "bf16"),
        ("u16", "bf16"),
        ("s16", "bf16"),
        ("f16x2", "f16x2"),
        ("u32", "f16x2"),
        ("bf16x2", "bf16x2"),
        ("u32", "bf16x2"),
    ] {
        push(to, ty);
    }
    run(cases);
}

#[test]
fn selections() {
    let mut cases = Vec::new();
    for ty in ["b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "f32", "f64"] {
        cases.push(Case::new(format!("selp.{ty}"), &[ty], &[ty, ty, "pred"], |x| vec![x[(1 - x[2]) as usize]]));
        cases.push(Case::new(format!("slct.{ty}.s32"), &[ty], &[ty, ty, "s32"], |x| {
            vec![x[(integer("s32", x[2]) < 0) as usize]]
        }));
        for ftz in ["", ".ftz"] {
            cases.push(Case::new(format!("slct{ftz}.{ty}.f32"), &[ty], &[ty, ty, "f32"], move |x| {
                // A flushed negative subnormal is -0, which is not below zero.
                let c = if ftz.is_empty() { x[2] } else { Format::F32.flush(x[2]) };
                let first = Format::F32.value(c).partial_cmp(&0.0).is_some_and(|o| o != Ordering::Less);
                vec![x[!first as usize]]
            }));
        }
        assert!(width(ty) >= 16);
    }
    run(cases);
}
