//! The comparator catches what it is there for.

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

#[test]
fn nan_is_never_close() {
    let caught = std::panic::catch_unwind(|| worst("nan", &[f32::NAN], &[0.0], |_| f64::INFINITY));
    assert!(caught.is_err(), "a NaN passed");
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
