//! The approximate functions of f32 and f64 against the manual's error bounds, on a stride through all bit patterns.

use super::harness::{Case, Check, available, run};
use super::reference::Format;
use cuda_emu::num;

fn value(bits: u64) -> f64 {
    f32::from_bits(bits as u32) as f64
}

/// Whether `found` is within `relative` and `absolute` of `exact`, allowing for f32's own limits: half a subnormal's
/// unit, and infinity beyond the largest finite value.
fn close(found: u64, exact: f64, relative: f64, absolute: f64, ftz: bool) -> bool {
    if exact.is_nan() {
        return found == 0x7fff_ffff;
    }
    let f = value(found);
    if f == exact {
        return exact != 0.0 || f.is_sign_negative() == exact.is_sign_negative();
    }
    if ftz && exact.abs() < 1.1754944e-38 && f == 0.0 {
        return true;
    }
    if ftz && Format::F32.is_subnormal(found) {
        return false;
    }
    if f.is_infinite() {
        return exact.abs() > f32::MAX as f64 && f.is_sign_negative() == exact.is_sign_negative();
    }
    (f - exact).abs() <= exact.abs() * relative + absolute + 2f64.powi(-150)
}

fn flushed(ftz: bool, x: u64) -> f64 {
    value(if ftz { Format::F32.flush(x) } else { x })
}

fn ex2(ftz: bool, x: u64, found: u64) -> bool {
    close(found, flushed(ftz, x).exp2(), 2f64.powi(-22), 0.0, ftz)
}

fn lg2(ftz: bool, x: u64, found: u64) -> bool {
    let v = flushed(ftz, x);
    // The logarithm of what is near 1 is judged by its absolute error.
    if v > 0.5 && v < 2.0 {
        close(found, v.log2(), 0.0, 2f64.powi(-22), ftz)
    } else {
        close(found, v.log2(), 2f64.powi(-22), 0.0, ftz)
    }
}

fn sin(ftz: bool, x: u64, found: u64) -> bool {
    let v = flushed(ftz, x);
    close(found, v.sin(), 0.0, 2f64.powf(-20.5), false) && (v != 0.0 || found == v.to_bits() >> 32)
}

fn cos(ftz: bool, x: u64, found: u64) -> bool {
    close(found, flushed(ftz, x).cos(), 0.0, 2f64.powf(-20.5), false)
}

fn tanh(_: bool, x: u64, found: u64) -> bool {
    close(found, value(x).tanh(), 2f64.powi(-11), 0.0, false)
}

fn rcp(ftz: bool, x: u64, found: u64) -> bool {
    close(found, 1.0 / flushed(ftz, x), 2f64.powi(-23), 0.0, ftz)
}

fn sqrt(ftz: bool, x: u64, found: u64) -> bool {
    close(found, flushed(ftz, x).sqrt(), 2f64.powi(-23), 0.0, ftz)
}

fn rsqrt(ftz: bool, x: u64, found: u64) -> bool {
    close(found, 1.0 / flushed(ftz, x).sqrt(), 2f64.powf(-22.9), 0.0, ftz)
}

/// A function: opcode, whether it has `.ftz`, judgement of (ftz, input, result).
type Judged = (&'static str, bool, fn(bool, u64, u64) -> bool);

const FUNCTIONS: [Judged; 8] = [
    ("ex2", true, ex2),
    ("lg2", true, lg2),
    ("sin", true, sin),
    ("cos", true, cos),
    ("tanh", false, tanh),
    ("rcp", true, rcp),
    ("sqrt", true, sqrt),
    ("rsqrt", true, rsqrt),
];

/// Every 1021st pattern (the stride is prime, so that all low bits occur), on every instruction set, which must agree
/// bit for bit. `EMULATOR_EXHAUSTIVE=1` tries all 2^32.
#[test]
fn functions_of_one_operand() {
    let stride = if std::env::var_os("EMULATOR_EXHAUSTIVE").is_some() { 1 } else { 1021 };
    let mut failures = Vec::new();
    for (name, has_ftz, accept) in FUNCTIONS {
        for ftz in [false, true] {
            if ftz && !has_ftz {
                continue;
            }
            let full = format!("{name}.approx{}.f32", if ftz { ".ftz" } else { "" });
            let Some(form) = num::form(&full, 1, 1) else {
                failures.push(format!("{full}: there is no such form"));
                continue;
            };
            #[repr(align(64))]
            struct File([[u32; 32]; 2]);
            let mut file = File([[0; 32]; 2]);
            let mut first = 0u64;
            'all: while first < 1 << 32 {
                for lane in 0..32 {
                    file.0[1][lane] = (first + lane as u64 * stride).min(0xffff_ffff) as u32;
                }
                let inputs = file.0[1];
                let mut results = Vec::new();
                for (set, _) in available() {
                    // SAFETY: two aligned slots of 32-bit lanes for a form with one source; `available` lists supported
                    // sets.
                    unsafe { (form.run[set])(form, file.0.as_mut_ptr().cast(), [0, 128].as_ptr(), 1, u32::MAX) };
                    results.push(file.0[0]);
                }
                for lane in 0..32 {
                    let found = results[0][lane];
                    if results.iter().any(|r| r[lane] != found) || !accept(ftz, inputs[lane] as u64, found as u64) {
                        failures.push(format!(
                            "{full}: {:#x} gives {:x?}",
                            inputs[lane],
                            results.iter().map(|r| r[lane]).collect::<Vec<_>>()
                        ));
                        break 'all;
                    }
                }
                first += 32 * stride;
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn from_ptx() {
    let mut cases = Vec::new();
    for (name, has_ftz, _) in FUNCTIONS {
        for ftz in ["", ".ftz"] {
            if !ftz.is_empty() && !has_ftz {
                continue;
            }
            // Judged by name again: a closure could not be a plain function.
            let accept: fn(&[u64], u64, u64) -> bool = match (name, ftz) {
                ("ex2", "") => |x, _, found| ex2(false, x[0], found),
                ("ex2", _) => |x, _, found| ex2(true, x[0], found),
                ("lg2", "") => |x, _, found| lg2(false, x[0], found),
                ("lg2", _) => |x, _, found| lg2(true, x[0], found),
                ("sin", "") => |x, _, found| sin(false, x[0], found),
                ("sin", _) => |x, _, found| sin(true, x[0], found),
                ("cos", "") => |x, _, found| cos(false, x[0], found),
                ("cos", _) => |x, _, found| cos(true, x[0], found),
                ("rcp", "") => |x, _, found| rcp(false, x[0], found),
                ("rcp", _) => |x, _, found| rcp(true, x[0], found),
                ("sqrt", "") => |x, _, found| sqrt(false, x[0], found),
                ("sqrt", _) => |x, _, found| sqrt(true, x[0], found),
                ("rsqrt", "") => |x, _, found| rsqrt(false, x[0], found),
                ("rsqrt", _) => |x, _, found| rsqrt(true, x[0], found),
                _ => |x, _, found| tanh(false, x[0], found),
            };
            cases.push(
                Case::new(format!("{name}.approx{ftz}.f32"), &["f32"], &["f32"], |_| vec![0])
                    .check(Check::Accept(accept)),
            );
        }
    }
    run(cases);
}

#[test]
fn division() {
    fn quotient(ftz: bool, full: bool, x: &[u64], found: u64) -> bool {
        let (a, b) = (flushed(ftz, x[0]), flushed(ftz, x[1]));
        let far = b.abs() > 2f64.powi(126) && b.is_finite();
        if far && !full {
            return if a.is_infinite() || a.is_nan() { found == 0x7fff_ffff } else { value(found) == 0.0 };
        }
        // 2 ulp; a subnormal quotient by 2 units of subnormals.
        close(found, a / b, 2f64.powi(-22), 2f64.powi(-148), ftz)
    }
    let case = |name, accept| Case::new(name, &["f32"], &["f32"; 2], |_| vec![0]).check(Check::Accept(accept));
    run(vec![
        case("div.approx.f32", |x, _, found| quotient(false, false, x, found)),
        case("div.approx.ftz.f32", |x, _, found| quotient(true, false, x, found)),
        case("div.full.f32", |x, _, found| quotient(false, true, x, found)),
        case("div.full.ftz.f32", |x, _, found| quotient(true, true, x, found)),
    ]);
}

#[test]
fn functions_of_f64() {
    fn upper(x: u64) -> f64 {
        f64::from_bits(Format::F64.flush(x & !0xffff_ffff))
    }
    fn judge(found: u64, exact: f64, relative: f64, whole: bool) -> bool {
        let f = f64::from_bits(found);
        if !whole && found & 0xffff_ffff != 0 {
            return false;
        }
        if exact.is_nan() || f.is_nan() {
            return exact.is_nan() && f.is_nan();
        }
        f == exact || (f - exact).abs() <= exact.abs() * relative || (exact.abs() < f64::MIN_POSITIVE && f == 0.0)
    }
    let case = |name, accept| Case::new(name, &["f64"], &["f64"], |_| vec![0]).check(Check::Accept(accept));
    run(vec![
        // 20 bits of the mantissa.
        case("rcp.approx.ftz.f64", |x, _, found| judge(found, 1.0 / upper(x[0]), 2f64.powi(-20), false)),
        case("rsqrt.approx.ftz.f64", |x, _, found| judge(found, 1.0 / upper(x[0]).sqrt(), 2f64.powi(-20), false)),
        case("rsqrt.approx.f64", |x, _, found| judge(found, 1.0 / f64::from_bits(x[0]).sqrt(), 2f64.powi(-51), true)),
    ]);
}
