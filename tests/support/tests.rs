//! The comparisons catch what they should.

use super::*;

#[test]
fn one_wrong_corner_is_found() {
    let oracle = numbers(1, 1000);
    let mut got = to_f32(&oracle);
    close("untouched", &got, &oracle, &to_f32(&oracle));
    got[999] += 1e-6;
    let caught = std::panic::catch_unwind(|| close("corner", &got, &oracle, &to_f32(&oracle)));
    assert!(caught.is_err(), "an error of 1e-6 in one corner passed");
}

/// What `f` panics with; fails if it does not.
#[track_caller]
fn refusal(f: impl FnOnce() -> f64 + std::panic::UnwindSafe) -> String {
    let panic = std::panic::catch_unwind(f).expect_err("passed");
    *panic.downcast::<String>().expect("a message with numbers in it")
}

#[test]
fn nan_is_never_close() {
    for got in [f32::NAN, f32::INFINITY] {
        let said = refusal(move || worst("nan", &[got], &[0.0], |_| f64::MAX));
        assert!(said.contains("element 0 is"), "{said}");
    }
    for want in [f64::NAN, f64::NEG_INFINITY] {
        let said = refusal(move || worst("nan", &[0.0], &[want], |_| f64::MAX));
        assert!(said.contains("the oracle itself"), "{said}");
    }
}

/// Not even an exact result: a NaN budget comes from a mistake in the budget, and an infinite one allows anything.
#[test]
fn nothing_is_within_a_budget_that_is_no_number() {
    for (allowed, got) in [f64::NAN, f64::INFINITY, -1.0].into_iter().flat_map(|a| [(a, 0.0), (a, 1.0)]) {
        let said = refusal(move || worst("budget", &[got], &[0.0], |_| allowed));
        assert!(said.contains("has a budget of"), "{said}");
    }
    for used in [0.5, 1.0] {
        assert_eq!(worst("budget", &[1.0], &[0.0], |_| 1.0 / used), used);
    }
    // A budget of zero, of which nothing is used.
    assert_eq!(worst("exact", &[1.0], &[1.0], |_| 0.0), 0.0);
    let said = refusal(|| worst("inexact", &[1.5], &[1.0], |_| 0.0));
    assert!(said.contains("inf of its budget"), "{said}");
}

#[test]
fn a_yardstick_that_is_no_number_measures_nothing() {
    for bad in [f32::NAN, f32::INFINITY] {
        for compare in [close, |name: &str, got: &[f32], oracle: &[f64], yardstick: &[f32]| {
            close_as(DType::Bf16, name, got, oracle, yardstick)
        }] {
            let said = refusal(move || compare("yardstick", &[1.0, 2.0], &[1.0, 2.0], &[1.0, bad]));
            assert!(said.contains("at 1 the reference is"), "{said}");
        }
    }
}

#[test]
fn nothing_is_not_close_to_nothing() {
    let said = refusal(|| worst("empty", &[], &[], |_| 1.0));
    assert!(said.contains("nothing to compare"), "{said}");
}

#[test]
fn a_wrong_length_is_never_close() {
    let caught = std::panic::catch_unwind(|| worst("short", &[0.0], &[0.0, 0.0], |_| 1.0));
    assert!(caught.is_err(), "a short result passed");
}

#[test]
fn a_wrong_gradient_is_found() {
    let f = |x: &[Vec<f64>]| x[0].iter().map(|v| v * v * v).sum::<f64>();
    let x = numbers(2, 5);
    let right: Vec<f64> = x.iter().map(|v| 3.0 * v * v).collect();
    finite_differences("cube", f, std::slice::from_ref(&x), std::slice::from_ref(&right));
    let mut wrong = right;
    wrong[3] *= 1.001;
    let caught = std::panic::catch_unwind(|| finite_differences("cube", f, &[x], &[wrong]));
    assert!(caught.is_err(), "a gradient wrong by a thousandth passed");
}

#[test]
fn differences_of_what_is_not_finite_are_not_right() {
    for (bad, derived) in [f64::NAN, f64::INFINITY].into_iter().flat_map(|b| [(b, 0.0), (b, f64::NAN), (b, b)]) {
        // Finite up to 1 and not above.
        let f = move |x: &[Vec<f64>]| if x[0][0] > 1.0 { bad } else { x[0][0] };
        let caught = std::panic::catch_unwind(|| finite_differences("edge", f, &[vec![1.0]], &[vec![derived]]));
        assert!(caught.is_err(), "a difference of {bad} passed for the gradient {derived}");
    }
    let caught = std::panic::catch_unwind(|| finite_differences("constant", |_| 0.0, &[vec![1.0]], &[vec![f64::NAN]]));
    assert!(caught.is_err(), "a gradient of NaN passed");
    let caught = std::panic::catch_unwind(|| finite_differences("none", |_| 0.0, &[vec![]], &[vec![]]));
    assert!(caught.is_err(), "a gradient without elements passed");
}
