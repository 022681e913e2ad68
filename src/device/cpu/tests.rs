//! The pool, and the two convolutions against the definition, on shapes small enough for Miri. Operands are small
//! integers: their products and sums are exact in f32, so the direct convolution must equal the definition, and
//! Winograd's, whose transforms are not exact, must round to it.
//!
//! Accuracy, thread counts and all other shapes are tested through the operations, in `tests/ops`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::direct::{self, Axis, Patches, Plus, TapOf, Target, Towards, Weight};
use super::simd::Isa;
use super::vector::with_vector;
use super::winograd::{self, Tiles};
use super::{Pool, gemm, simd};
use crate::device::Device;

/// A 3x3 convolution of `n` images `h x w x c_in`, padded by one zero on every side.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    h: usize,
    w: usize,
    c_in: usize,
    c_out: usize,
}

/// A bit more than one register of channels, with tiles cut off on both sides; a bit more than one panel; enough tiles
/// for two blocks, so that Winograd's convolution takes its block-by-block path.
const CASES: [Case; 3] = [
    Case { n: 2, h: 5, w: 3, c_in: 5, c_out: 3 },
    Case { n: 1, h: 4, w: 6, c_in: 2, c_out: 37 },
    Case { n: 1, h: 33, w: 32, c_in: 1, c_out: 2 },
];

/// Integers from -3 to 3.
fn numbers(len: usize, step: usize) -> Vec<f32> {
    (0..len).map(|i| (i * step % 7) as f32 - 3.0).collect()
}

impl Case {
    /// Calls `f(y, x, w)` with the indices of every product.
    fn for_each_product(self, mut f: impl FnMut(usize, usize, usize)) {
        let Case { n, h, w, c_in, c_out } = self;
        for y in 0..n * h * w * c_out {
            let (image, i, j, o) = (y / c_out / w / h, y / c_out / w % h, y / c_out % w, y % c_out);
            for (tap, k) in (0..9 * c_in).map(|q| (q / c_in, q % c_in)) {
                let (p, q) = (i + tap / 3, j + tap % 3);
                if (1..=h).contains(&p) && (1..=w).contains(&q) {
                    f(y, ((image * h + p - 1) * w + q - 1) * c_in + k, (o * 9 + tap) * c_in + k);
                }
            }
        }
    }

    fn patches(self, c: usize) -> Patches {
        let axis = |len| Axis { out: len, len, taps: 3, stride: 1, first: -1 };
        Patches { n: self.n, rows: axis(self.h), cols: axis(self.w), c }
    }

    fn tiles(self, c: usize) -> Tiles {
        let Case { n, h, w, .. } = self;
        Tiles { n, h, w, c, out_h: h, out_w: w, top: 1, left: 1 }
    }
}

fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x.round()).collect()
}

#[test]
fn both_convolutions_are_the_definition() {
    // Miri sees what guards see, and is slow: it gets no filled scratch, nor the many tiles of the last case.
    let device = if cfg!(miri) { Device::cpu() } else { Device::cpu_guarded() };
    let cases = if cfg!(miri) { &CASES[..2] } else { &CASES[..] };
    for &case in cases {
        let Case { n, h, w, c_in, c_out } = case;
        let pixels = n * h * w;
        let (x, weight, dy) = (numbers(pixels * c_in, 3), numbers(c_out * 9 * c_in, 5), numbers(pixels * c_out, 4));
        let (bias, shift, residual) = (numbers(c_out, 2), numbers(n * c_out, 3), numbers(pixels * c_out, 6));
        let plus = Plus { bias: Some(&bias), shift: Some(&shift), residual: Some(&residual) };
        let added = |y: usize| bias[y % c_out] + shift[y / c_out / w / h * c_out + y % c_out] + residual[y];
        let mut want_y: Vec<f32> = (0..dy.len()).map(added).collect();
        let (mut want_dx, mut want_dw) = (vec![0.0; x.len()], numbers(weight.len(), 2));
        case.for_each_product(|iy, ix, iw| {
            want_y[iy] += x[ix] * weight[iw];
            want_dx[ix] += dy[iy] * weight[iw];
            want_dw[iw] += dy[iy] * x[ix];
        });
        let weight = Weight { data: &weight, c_out, kh: 3, kw: 3, c_in };
        for isa in Isa::available() {
            let what = format!("{case:?} on {:?}", isa.level());
            let [mut y, mut dx] = [dy.len(), x.len()].map(|len| vec![f32::NAN; len]);
            let mut dw = numbers(want_dw.len(), 2);
            with_vector!(isa, V, token => {
                let (forth, back) = (TapOf { first: 0, step: 1 }, TapOf { first: 2, step: -1 });
                let to = |c, plus| Target { h, w, c, step: 1, row: 0, col: 0, plus };
                let (patches, target) = (case.patches(c_in), to(c_out, plus));
                direct::outputs::<V>(token, &device, &x, patches, weight, Towards::Output, [forth; 2], &mut y, target);
                let (patches, target) = (case.patches(c_out), to(c_in, Plus::default()));
                direct::outputs::<V>(token, &device, &dy, patches, weight, Towards::Input, [back; 2], &mut dx, target);
                direct::weight_gradient::<V>(token, &device, &x, case.patches(c_in), &dy, c_out, &mut dw, true);
            });
            assert_eq!((&y, &dx, &dw), (&want_y, &want_dx, &want_dw), "direct, {what}");

            let [mut y, mut dx] = [dy.len(), x.len()].map(|len| vec![f32::NAN; len]);
            let mut dw = numbers(want_dw.len(), 2);
            with_vector!(isa, V, token => {
                let (forth, back) = (case.tiles(c_in), case.tiles(c_out));
                winograd::outputs::<V>(token, &device, &x, forth, weight, Towards::Output, &mut y, plus);
                winograd::outputs::<V>(token, &device, &dy, back, weight, Towards::Input, &mut dx, Plus::default());
                winograd::weight_gradient::<V>(token, &device, &x, forth, &dy, c_out, &mut dw, true);
            });
            let got = [&y, &dx, &dw].map(|x| rounded(x));
            assert_eq!((&got[0], &got[1], &got[2]), (&want_y, &want_dx, &want_dw), "Winograd, {what}");
        }
    }
}

#[test]
fn column_sums_are_sums_of_columns() {
    let device = Device::cpu_guarded();
    for (groups, rows, c) in [(1, 1, 1), (2, 9, 5), (1, 67, 17)] {
        let x = numbers(groups * rows * c, 3);
        let want: Vec<f32> =
            (0..groups * c).map(|i| (0..rows).map(|r| x[(i / c * rows + r) * c + i % c]).sum()).collect();
        for isa in Isa::available() {
            let mut sums = vec![f32::NAN; groups * c];
            with_vector!(isa, V, token => gemm::column_sums::<V>(token, &device, &x, groups, c, &mut sums));
            assert_eq!(sums, want, "{groups} groups of {rows} rows of {c} on {:?}", isa.level());
        }
    }
}

/// A safe function must refuse arguments that would make its unsafe parts unsound.
#[test]
#[should_panic(expected = "taps [0, 3] of a kernel of 3")]
fn a_tap_outside_the_kernel_is_refused() {
    let case = CASES[0];
    let (x, weight) = (numbers(2 * 5 * 3 * 5, 3), numbers(3 * 9 * 5, 5));
    let mut patches = case.patches(5);
    patches.rows.taps = 4;
    let target = Target { h: 5, w: 3, c: 3, step: 1, row: 0, col: 0, plus: Plus::default() };
    let weight = Weight { data: &weight, c_out: 3, kh: 3, kw: 3, c_in: 5 };
    let (mut y, taps) = (vec![0.0; 2 * 5 * 3 * 3], [TapOf { first: 0, step: 1 }; 2]);
    direct::outputs::<super::vector::Four>(
        simd::Portable,
        &Device::cpu(),
        &x,
        patches,
        weight,
        Towards::Output,
        taps,
        &mut y,
        target,
    );
}

/// The panic message when a buffer of `len` floats comes back after float `at`, counted from the first guard word, was
/// written; empty without a panic.
fn complaint(len: usize, at: usize) -> String {
    let mut buffer = Pool::alloc(&Pool::new(true), len);
    bytemuck::cast_slice_mut(&mut buffer.data)[at] = 0.0f32;
    let caught = catch_unwind(AssertUnwindSafe(|| drop(buffer)));
    caught.err().and_then(|what| what.downcast::<String>().ok()).map(|text| *text).unwrap_or_default()
}

#[test]
#[cfg_attr(miri, ignore = "two dozen caught panics; safe code alone")]
fn writes_beside_a_guarded_buffer_are_noticed_to_the_float() {
    for len in [0, 1, 15, 16, 17, 400] {
        for at in [0, 15] {
            assert!(complaint(len, at).contains("before the start"), "{len} numbers, float {at}");
        }
        for at in [16 + len, 16 + len + 15] {
            assert!(complaint(len, at).contains("past the end"), "{len} numbers, float {at}");
        }
        for at in [16, 16 + len - 1].into_iter().filter(|_| len > 0) {
            assert_eq!(complaint(len, at), "", "{len} numbers, float {at}");
        }
    }
}

#[test]
fn buffers_are_aligned_and_come_back() {
    let pool = Pool::new(false);
    let buffer = Pool::alloc(&pool, 17);
    assert_eq!((buffer.as_slice().len(), buffer.as_slice().as_ptr().addr() % 64), (17, 0));
    drop(buffer);
    let again = Pool::alloc(&pool, 30);
    let stats = pool.stats();
    assert_eq!((stats.hits, stats.misses, stats.in_use, stats.held), (1, 1, 128, 128));
    drop(again);
    assert_eq!((pool.stats().in_use, pool.stats().peak), (0, 128));
}
