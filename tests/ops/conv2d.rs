use std::cell::LazyCell;

use ddpm_cuda::device::cpu::simd::Isa;
use ddpm_cuda::device::{Device, Precision};
use ddpm_cuda::kernels::tile_mma::BackwardBlocks;
use ddpm_cuda::ops::concat::Joined;
use ddpm_cuda::ops::conv2d::reference::{self, Inputs};
use ddpm_cuda::ops::conv2d::{Algorithm, Geometry, Input, Method, Pad, Plus, Shortcut, conv2d, conv2d_by};
use ddpm_cuda::ops::{concat, upsample};
use ddpm_cuda::params::{Init, Layout, Param, ParamGrads, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use num_traits::Float;

use crate::support::{
    F32_ROUNDING, close, close_as_but_for, finite_differences, gpu, numbers, plant, same_bits, through_tape_on, to_f32,
    winograd, worst,
};

/// One convolution: `x` (n, h, w, c_in), `w` (c_out, kh, kw, c_in).
#[derive(Clone, Copy, Debug)]
struct Case {
    x: Shape,
    w: Shape,
    geometry: Geometry,
}

const fn case(x: [usize; 4], w: [usize; 3], geometry: Geometry) -> Case {
    Case { x: Shape::new(x[0], x[1], x[2], x[3]), w: Shape::new(w[0], w[1], w[2], x[3]), geometry }
}

const SAME: Geometry = Geometry::SAME_3X3;
const HALVE: Geometry = Geometry::HALVE_3X3;

/// Sizes of one, primes, one over the AVX-512 register tile (32 columns, 14 rows), one over a block, not square, every
/// kind of padding.
const CASES: [Case; 22] = [
    case([1, 1, 1, 1], [1, 1, 1], Geometry::POINTWISE),
    case([1, 1, 1, 1], [1, 3, 3], SAME),
    case([2, 5, 7, 3], [5, 3, 3], SAME),
    case([2, 6, 5, 17], [33, 3, 3], SAME),
    case([3, 7, 3, 32], [1, 3, 3], SAME),
    case([2, 9, 11, 1], [32, 3, 3], SAME),
    case([2, 8, 8, 16], [48, 3, 3], SAME),
    case([1, 13, 10, 32], [16, 3, 3], SAME),
    case([1, 3, 19, 5], [7, 1, 1], Geometry::POINTWISE),
    case([2, 6, 8, 19], [34, 3, 3], HALVE),
    case([1, 7, 5, 4], [3, 3, 3], HALVE),
    case([1, 9, 7, 3], [4, 3, 3], Geometry { stride: 2, pad: Pad::all(1) }),
    case([1, 11, 10, 2], [3, 5, 2], Geometry { stride: 3, pad: Pad { top: 2, left: 0, bottom: 1, right: 3 } }),
    case([2, 5, 6, 3], [2, 1, 1], Geometry { stride: 2, pad: Pad::all(0) }),
    case([1, 4, 9, 2], [2, 4, 7], Geometry { stride: 1, pad: Pad { top: 3, left: 6, bottom: 0, right: 1 } }),
    case([1, 6, 6, 3], [3, 3, 3], Geometry { stride: 1, pad: Pad::all(0) }),
    case([1, 4, 4, 2], [3, 3, 3], Geometry { stride: 1, pad: Pad::all(4) }),
    case([3, 16, 16, 64], [65, 3, 3], SAME),
    // 180 and 288 Winograd tiles: tasks by panel of output channels, and by block of 64 tiles; weight gradients over
    // several chunks of tiles.
    case([5, 23, 22, 33], [40, 3, 3], SAME),
    case([8, 23, 22, 65], [33, 3, 3], SAME),
    // More input channels than Winograd transforms at a time.
    case([2, 5, 4, 270], [35, 3, 3], SAME),
    // 68 pixels for each thread that sums them for the bias: more than are summed in f32.
    case([1, 27, 20, 3], [20, 1, 1], Geometry::POINTWISE),
];

/// More for the products on tensor cores, in bf16: channels that chunks of 16 bytes divide and others; several slabs of
/// 64 channels, the last one full or not; images of one pixel, of odd sizes, with fewer pixels than a slab of dw; both
/// paddings of a stride of two; sums in segments; and few columns.
const BF16_CASES: [Case; 13] = [
    // A weight of whole 128x128 tiles, but fewer pixels than a slab, and more than one.
    case([3, 5, 7, 128], [128, 1, 1], Geometry::POINTWISE),
    case([2, 4, 4, 136], [72, 3, 3], SAME),
    case([1, 9, 7, 24], [20, 3, 3], HALVE),
    case([3, 6, 8, 20], [24, 3, 3], HALVE),
    case([2, 7, 6, 8], [24, 3, 3], Geometry { stride: 2, pad: Pad::all(1) }),
    case([2, 8, 10, 40], [16, 3, 3], HALVE),
    case([1, 1, 1, 64], [8, 3, 3], SAME),
    case([2, 5, 7, 16], [3, 3, 3], SAME),
    case([1, 6, 5, 67], [24, 3, 3], SAME),
    case([3, 6, 9, 35], [20, 3, 3], SAME),
    case([1, 20, 13, 8], [72, 3, 3], SAME),
    case([1, 11, 10, 8], [16, 5, 2], Geometry { stride: 3, pad: Pad { top: 2, left: 0, bottom: 1, right: 3 } }),
    case([1, 17, 5, 128], [136, 1, 1], Geometry::POINTWISE),
];

/// Enough tiles of 128x128 for the large kernels of the forward pass and of dw, of dx, and of both gradients. Nothing
/// is symmetric. dw has 200 and 196 slabs: were it a multiple of three, the last slab would be in the slot of the ring
/// that no result is written to, and nothing would depend on the barrier at its end.
const LARGE_CASES: [Case; 3] = [
    case([4, 64, 50, 64], [128, 2, 2], Geometry { stride: 1, pad: Pad { top: 1, left: 0, bottom: 0, right: 1 } }),
    case([2, 48, 128, 128], [64, 2, 1], Geometry { stride: 1, pad: Pad { top: 0, left: 0, bottom: 1, right: 0 } }),
    case([1, 64, 196, 128], [128, 1, 2], Geometry { stride: 1, pad: Pad { top: 0, left: 1, bottom: 0, right: 0 } }),
];

/// A convolution that reads its input where it is: two tensors side by side, or each pixel repeated in a 2x2 square;
/// and a residual whose pixels are repeated.
#[derive(Clone, Copy, Debug)]
struct InPlace {
    /// What is convolved but for the repetition, and the weight.
    case: Case,
    /// Channels of the second tensor; 0: there is one.
    second: usize,
    doubled: bool,
    halved: bool,
}

const fn joined(case: Case, second: usize) -> InPlace {
    InPlace { case, second, doubled: false, halved: false }
}

const fn doubled(case: Case, second: usize) -> InPlace {
    InPlace { case, second, doubled: true, halved: false }
}

/// One row of zeros.
const ABOVE: Geometry = Geometry { stride: 1, pad: Pad { top: 1, left: 0, bottom: 0, right: 0 } };
const BELOW: Geometry = Geometry { stride: 1, pad: Pad { top: 0, left: 0, bottom: 1, right: 0 } };

/// Seams that divide by 64, 8, 4 and nothing; images of one pixel; a stride; kernels of even and of different sides.
const IN_PLACE: [InPlace; 16] = [
    joined(case([2, 3, 5, 24], [24, 1, 1], Geometry::POINTWISE), 8),
    joined(case([1, 5, 4, 208], [16, 3, 3], SAME), 136),
    joined(case([1, 3, 3, 192], [8, 1, 1], Geometry::POINTWISE), 64),
    joined(case([2, 1, 1, 8], [7, 3, 3], SAME), 3),
    joined(case([1, 3, 4, 72], [9, 3, 3], SAME), 5),
    joined(case([2, 3, 3, 16], [8, 1, 1], Geometry::POINTWISE), 12),
    joined(case([1, 6, 5, 24], [8, 3, 3], HALVE), 16),
    doubled(case([2, 2, 3, 16], [24, 3, 3], SAME), 0),
    doubled(case([1, 1, 1, 3], [5, 3, 3], SAME), 0),
    doubled(case([1, 3, 2, 12], [6, 3, 3], SAME), 7),
    doubled(case([2, 2, 5, 32], [16, 3, 3], SAME), 8),
    doubled(case([1, 3, 3, 8], [8, 2, 1], ABOVE), 0),
    // Odd sides of y, so that the pixels of the first class are more than a quarter: of these 1.6 tiles.
    doubled(case([16, 3, 2, 8], [24, 2, 2], Geometry { stride: 1, pad: Pad::all(0) }), 0),
    doubled(case([1, 4, 3, 8], [8, 5, 4], Geometry { stride: 1, pad: Pad { left: 1, ..Pad::all(2) } }), 0),
    InPlace { halved: true, ..joined(case([2, 4, 6, 16], [8, 3, 3], SAME), 0) },
    InPlace { halved: true, ..doubled(case([2, 2, 3, 16], [8, 3, 3], SAME), 0) },
];

/// Enough tiles of 128x128 for the large kernels of bf16.
const LARGE_IN_PLACE: [InPlace; 2] = [
    joined(case([3, 64, 64, 128], [128, 1, 1], Geometry::POINTWISE), 64),
    doubled(case([3, 64, 64, 128], [64, 2, 1], ABOVE), 0),
];

impl InPlace {
    /// The case whose input is made.
    fn made(self) -> Case {
        let Shape { h, w, .. } = self.case.x;
        let x = if self.doubled { Shape { h: 2 * h, w: 2 * w, ..self.case.x } } else { self.case.x };
        Case { x, ..self.case }
    }

    /// The shapes of the input and of the residual.
    fn shapes(self) -> (Shape, Shape) {
        let made = self.made();
        let y = made.geometry.output(made.x, made.w);
        (self.case.x, if self.halved { Shape { h: y.h / 2, w: y.w / 2, ..y } } else { y })
    }

    fn data(self, dtype: DType) -> Data<f64> {
        let (x, residual) = self.shapes();
        let data = Data::new(self.made());
        Data { x: numbers(1, x.len()), residual: numbers(5, residual.len()), ..data }.rounded(dtype)
    }

    /// The terms of y, dx and dw.
    fn depths(self) -> [usize; 3] {
        let made = self.made();
        let ([of_y, of_dx, of_dw], copies) = (made.depths(), if self.doubled { 4 } else { 1 });
        [of_y, copies * of_dx, of_dw]
    }

    fn by_reference<T: Float>(self, data: &Data<T>) -> Results<T> {
        let (x, residual) = self.shapes();
        let (of_x, of_residual) = (
            if self.doubled { upsample::reference::forward(&data.x, x) } else { data.x.clone() },
            if self.halved { upsample::reference::forward(&data.residual, residual) } else { data.residual.clone() },
        );
        let inputs = Inputs { x: &of_x, residual: Some(&of_residual), ..data.inputs(self.made()) };
        let d = reference::backward(&inputs, &data.dy);
        let dx = if self.doubled { upsample::reference::backward(&d.x, x) } else { d.x };
        let dy = &data.dy;
        let dresidual = if self.halved { upsample::reference::backward(dy, residual) } else { dy.clone() };
        [reference::forward(&inputs), dx, d.weight, d.bias, d.shift, dresidual]
    }

    fn by_tape(self, device: &Device, data: &Data<f32>) -> Results<f32> {
        let (x, residual) = self.shapes();
        let (c, seam, y) = (x.c, x.c - self.second, self.made().geometry.output(self.made().x, self.case.w));
        let part = |range| concat::reference::backward(&data.x, c, range);
        let mut inputs = vec![(x.with_c(seam), part(0..seam))];
        if self.second > 0 {
            inputs.push((x.with_c(self.second), part(seam..c)));
        }
        inputs.push((Shape::new(y.n, 1, 1, y.c), data.shift.clone()));
        inputs.push((residual, data.residual.clone()));
        let params = [(self.case.w, data.w.clone()), (Shape::vector(y.c), data.b.clone())];
        let pass = through_tape_on(device, &inputs, &params, &data.dy, 1, |tape, v, p| {
            let (x, plus) = v.split_at(v.len() - 2);
            let x = if let [a, b] = x { Joined::from([a, b]) } else { Joined::from(&x[0]) };
            let x = if self.doubled { Input::doubled(x) } else { Input::from(x) };
            let plus = Plus { shift: Some(&plus[0]), residual: Some(&plus[1]), ..Plus::default() };
            conv2d_by(tape, x, p[0], p[1], self.case.geometry, plus, direct(Isa::best()))
        });
        let mut dx = pass.dx;
        let (dresidual, dshift) = (dx.pop().expect("the last"), dx.pop().expect("the last but one"));
        let dx = if let [a, b] = &dx[..] { concat::reference::forward(a, b, seam, self.second) } else { dx.remove(0) };
        let [dw, db] = pass.dw.try_into().expect("two parameters");
        [pass.y, dx, dw, db, dshift, dresidual]
    }
}

#[test]
fn inputs_in_place_agree_with_the_reference() {
    for case in IN_PLACE {
        let data = case.data(DType::F32);
        let (oracle, yardstick) = (case.by_reference(&data), case.by_reference(&data.to_f32()));
        let got = case.by_tape(&Device::cpu_guarded(), &data.to_f32());
        for i in 0..6 {
            close(&format!("{} of {case:?}", NAMES[i]), &got[i], &oracle[i], &yardstick[i]);
        }
    }
}

/// Compares on a GPU, in these precisions and all schedules.
fn gpu_agrees_in_place(case: InPlace, precisions: &[Precision]) {
    let expected = Precision::ALL.map(|precision| {
        LazyCell::new(move || {
            let data = case.data(precision.activations());
            let oracle = in_precision(precision, &data, |data| case.by_reference(data));
            let yardstick = in_precision(precision, &data, |data| case.by_reference(&data.to_f32()));
            (oracle, yardstick, data.to_f32())
        })
    });
    gpu::each_of(&format!("{case:?}"), precisions, |device| {
        let precision = device.precision();
        let (oracle, yardstick, data) = &*expected[precision as usize];
        let got = case.by_tape(device, data);
        for i in 0..6 {
            let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { precision.activations() };
            let name = format!("{} on {device}, {precision}, of {case:?}", NAMES[i]);
            // dx of a repeated pixel is one sum of four times as many terms as each of the four that the reference
            // adds, and errs up to four times as much.
            let own = yardstick[i].iter().zip(&oracle[i]).map(|(y, o)| (f64::from(*y) - o).abs()).fold(0.0, f64::max);
            let longer = if case.doubled && i == 1 { 2.0 * 3.0 * own } else { 0.0 };
            let of_tensor_cores = case.depths().get(i).filter(|_| precision == Precision::Tf32).copied();
            let cut = of_tensor_cores.map_or(0.0, gpu::cut);
            close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], longer + cut);
        }
        got.concat()
    });
}

#[test]
fn gpu_inputs_in_place_agree_with_the_reference() {
    let cases = IN_PLACE.into_iter().filter(|_| gpu::available());
    cases.for_each(|case| gpu_agrees_in_place(case, &Precision::ALL));
}

#[test]
fn gpu_large_tiles_agree_in_place() {
    let cases = LARGE_IN_PLACE.into_iter().filter(|_| gpu::available());
    cases.for_each(|case| gpu_agrees_in_place(case, &[Precision::Bf16]));
}

/// In bf16, whole tiles of dw with one tap, over pixels that come back to the same columns from slab to slab: several
/// images in a slab, a slab of less than an image, more slabs than an image has, a stride, repeated pixels, and two
/// tensors.
const STEADY: [InPlace; 6] = [
    joined(case([8, 4, 4, 128], [128, 3, 3], SAME), 0),
    joined(case([1, 16, 32, 128], [128, 2, 3], Geometry { stride: 1, pad: Pad { bottom: 0, ..Pad::all(1) } }), 0),
    joined(
        case([9, 16, 16, 128], [128, 3, 1], Geometry { stride: 1, pad: Pad { left: 0, right: 0, ..Pad::all(1) } }),
        0,
    ),
    joined(case([2, 16, 32, 128], [128, 3, 3], HALVE), 0),
    doubled(case([2, 4, 8, 128], [128, 3, 3], SAME), 0),
    joined(case([2, 8, 8, 256], [128, 3, 3], SAME), 128),
];

#[test]
fn gpu_steady_pixels_agree_with_the_reference() {
    STEADY.into_iter().filter(|_| gpu::available()).for_each(|case| gpu_agrees_in_place(case, &[Precision::Bf16]));
}

/// The mask of pixels turned the other way, in one of three slabs; oh for ow; slabs that are read before they have
/// arrived, and results that are written over the last one; a lost block.
#[test]
fn bugs_planted_over_steady_pixels_are_noticed() {
    const TEST: &str = "conv2d::gpu_steady_pixels_agree_with_the_reference";
    const LARGE: &str = "conv2d::gpu_large_shortcuts_agree_with_the_reference";
    plant::notices(TEST, "conv2d_bwd_mma_64x64_128x128", "shf.r.wrap.b32", "shf.l.wrap.b32");
    plant::notices(LARGE, "conv2d_bwd_mma_128x128", "shf.r.wrap.b32", "shf.l.wrap.b32");
    plant::notices_wrong_parameter(TEST, "conv2d_bwd_mma_64x64_128x128", "16+20", "16+16");
    plant::notices_lost_barrier(TEST, "conv2d_bwd_mma_64x64_128x128", 1);
    plant::notices_lost_barrier(LARGE, "conv2d_bwd_mma_128x128", 2);
    plant::notices_lost_barrier(LARGE, "conv2d_bwd_mma_128x128", 4);
    plant::notices_lost_block(TEST, "conv2d_bwd_mma_64x64_128x128");
}

/// An image's y and dx do not depend on its batch, and two tensors side by side give the bits of their concatenation
/// where blocks of 64 channels do not straddle the seam.
#[test]
fn gpu_images_in_place_stand_alone() {
    for precision in Precision::ALL {
        let dtype = precision.activations();
        let Some(gpu) = gpu::gpu(precision) else { return };
        let device = Device::Cuda(gpu);
        for case in IN_PLACE {
            let data = case.data(dtype).to_f32();
            let all = case.by_tape(&device, &data);
            let n = case.case.x.n;
            for image in 0..if n > 1 { n } else { 0 } {
                let part = |v: &[f32]| v[image * v.len() / n..][..v.len() / n].to_vec();
                let [x, shift, residual, dy] = [&data.x, &data.shift, &data.residual, &data.dy].map(|v| part(v));
                let alone = Data { x, w: data.w.clone(), b: data.b.clone(), shift, residual, dy };
                let single = InPlace { case: Case { x: Shape { n: 1, ..case.case.x }, ..case.case }, ..case };
                let alone = single.by_tape(&device, &alone);
                same_bits(&format!("y of image {image} alone, {case:?}"), &alone[0], &part(&all[0]));
                same_bits(&format!("dx of image {image} alone, {case:?}"), &alone[1], &part(&all[1]));
            }
            if !case.doubled && (dtype == DType::F32 || (case.case.x.c - case.second).is_multiple_of(64)) {
                let whole = InPlace { second: 0, ..case }.by_tape(&device, &data);
                for i in 0..6 {
                    same_bits(&format!("{} of one tensor, {precision}, {case:?}", NAMES[i]), &all[i], &whole[i]);
                }
            }
        }
    }
}

/// Whether pixels are repeated, and the channels of the first tensor, read from another parameter.
#[test]
fn bugs_planted_in_place_are_noticed() {
    const TEST: &str = "conv2d::gpu_inputs_in_place_agree_with_the_reference";
    for (part, is, reads) in [
        ("fwd_64x64_f32", "8+52", "8+36"),
        ("dgrad_64x64_f32", "4+48", "4+12"),
        ("wgrad_64x64_f32", "4+52", "4+36"),
        ("fwd_64x64_tf32", "8+52", "8+36"),
        ("dgrad_64x64_tf32", "4+48", "4+12"),
        ("wgrad_64x64_tf32", "4+52", "4+36"),
        ("fwd_mma_64x64", "13+48", "13+12"),
        ("fwd_mma_64x64_any", "12+52", "12+36"),
        ("bwd_mma_64x64", "16+52", "16+36"),
        ("bwd_mma_64x64", "16+48", "16+12"),
        ("dgrad_mma_64x64_any", "4+48", "4+12"),
        ("wgrad_mma_64x64_any", "4+48", "4+12"),
        ("join_segments", "10", "11"),
    ] {
        plant::notices_wrong_parameter(TEST, &format!("conv2d_{part}"), is, reads);
    }
}

/// A convolution with a shortcut whose input has so many channels in its first tensor and in its second.
type WithShortcut = (Case, [usize; 2]);

/// Channels that blocks of 64 divide and others, one tensor and two, images of one pixel; channels of the convolution
/// that 8 does not divide, or of the shortcut alone, and a stride, with which the shortcut is a product of its own. All
/// pixels of a batch in one slab of dw, and in several segments.
const SHORTCUTS: [WithShortcut; 9] = [
    (case([2, 4, 4, 72], [24, 3, 3], SAME), [40, 0]),
    (case([1, 5, 3, 16], [24, 3, 3], SAME), [72, 136]),
    (case([1, 5, 3, 16], [16, 3, 3], SAME), [72, 136]),
    (case([2, 1, 1, 5], [7, 3, 3], SAME), [3, 4]),
    (case([1, 3, 4, 8], [9, 3, 3], SAME), [67, 5]),
    (case([1, 9, 7, 24], [20, 3, 3], HALVE), [8, 0]),
    (case([1, 3, 4, 8], [16, 3, 3], SAME), [12, 0]),
    (case([3, 20, 21, 8], [8, 3, 3], SAME), [16, 8]),
    (case([2, 4, 4, 128], [128, 3, 3], SAME), [8, 64]),
];

/// Enough tiles for the large kernels of bf16 forward, and backward, there over steady pixels in 208 slabs, no multiple
/// of three as above.
const LARGE_SHORTCUTS: [WithShortcut; 2] = [
    (case([3, 64, 64, 64], [128, 1, 1], Geometry::POINTWISE), [64, 128]),
    (case([13, 32, 32, 128], [128, 2, 1], BELOW), [128, 128]),
];

/// The shortcut alone.
fn shortcut_of((case, [a, b]): WithShortcut) -> Case {
    let x = case.geometry.output(case.x, case.w).with_c(a + b);
    Case { x, w: Shape::new(case.w.n, 1, 1, a + b), geometry: Geometry::POINTWISE }
}

/// `y`, `dx`, `dw`, `db`, `ds`, `dw` and `db` of the shortcut.
fn shortcut_by_reference<T: Float>(case: WithShortcut, data: &Data<T>, s: &Data<T>) -> [Vec<T>; 7] {
    let inputs = Inputs { shift: None, residual: None, ..data.inputs(case.0) };
    let shortcut = Inputs { shift: None, residual: None, ..s.inputs(shortcut_of(case)) };
    let y = reference::forward(&inputs).iter().zip(reference::forward(&shortcut)).map(|(a, b)| *a + b).collect();
    let (d, e) = (reference::backward(&inputs, &data.dy), reference::backward(&shortcut, &data.dy));
    [y, d.x, d.weight, d.bias, e.x, e.weight, e.bias]
}

fn shortcut_by_tape(case: WithShortcut, device: &Device, data: &Data<f32>, s: &Data<f32>) -> [Vec<f32>; 7] {
    let (of, [seam, second]) = (shortcut_of(case), case.1);
    let part = |range| concat::reference::backward(&s.x, seam + second, range);
    let mut inputs = vec![(case.0.x, data.x.clone()), (of.x.with_c(seam), part(0..seam))];
    if second > 0 {
        inputs.push((of.x.with_c(second), part(seam..seam + second)));
    }
    let vector = Shape::vector(case.0.w.n);
    let params = [(case.0.w, data.w.clone()), (vector, data.b.clone()), (of.w, s.w.clone()), (vector, s.b.clone())];
    let pass = through_tape_on(device, &inputs, &params, &data.dy, 1, |tape, v, p| {
        let x = if let [_, a, b] = v { Joined::from([a, b]) } else { Joined::from(&v[1]) };
        let shortcut = Shortcut { x, weight: p[2], bias: p[3] };
        let plus = Plus { shortcut: Some(&shortcut), ..Plus::default() };
        conv2d_by(tape, &v[0], p[0], p[1], case.0.geometry, plus, direct(Isa::best()))
    });
    let ds = match &pass.dx[1..] {
        [a, b] => concat::reference::forward(a, b, seam, second),
        rest => rest[0].clone(),
    };
    let [dw, db, s_dw, s_db] = pass.dw.try_into().expect("four parameters");
    [pass.y, pass.dx[0].clone(), dw, db, ds, s_dw, s_db]
}

fn shortcut_data(case: WithShortcut, dtype: DType) -> [Data<f64>; 2] {
    let s = Data::new(shortcut_of(case));
    // Not the numbers of the convolution.
    let s = Data { w: s.w.iter().map(|w| -w).collect(), b: s.b.iter().map(|b| 0.5 - b).collect(), ..s };
    [Data::new(case.0).rounded(dtype), s.rounded(dtype)]
}

fn shortcut_agrees(case: WithShortcut, on: impl Fn(&dyn Fn(&Device) -> Vec<f32>)) {
    let expected = |precision: Precision| {
        let [data, s] = shortcut_data(case, precision.activations());
        let [of_products, of_s] = [&data, &s].map(|data| data.multiplied(precision));
        let mut oracle = shortcut_by_reference(case, &of_products, &of_s);
        let mut yardstick = shortcut_by_reference(case, &of_products.to_f32(), &of_s.to_f32());
        let (data32, s32) = (data.to_f32(), s.to_f32());
        if precision == Precision::Tf32 {
            // The gradients of both biases are sums of dy as it is.
            let [.., db, _, _, s_db] = shortcut_by_reference(case, &data, &s);
            (oracle[3], oracle[6]) = (db, s_db);
            let [.., db, _, _, s_db] = shortcut_by_reference(case, &data32, &s32);
            (yardstick[3], yardstick[6]) = (db, s_db);
        }
        (oracle, yardstick, data32, s32)
    };
    let expected = Precision::ALL.map(|precision| LazyCell::new(move || expected(precision)));
    let [of_y, of_dx, of_dw] = case.0.depths();
    let [of_shortcut, of_ds, _] = shortcut_of(case).depths();
    let depths = [of_y + of_shortcut, of_dx, of_dw, 0, of_ds, of_dw, 0];
    on(&|device| {
        let (precision, dtype) = (device.precision(), device.activations());
        let (oracle, yardstick, data, s) = &*expected[precision as usize];
        let got = shortcut_by_tape(case, device, data, s);
        for (i, name) in ["y", "dx", "dw", "db", "ds", "dw of s", "db of s"].into_iter().enumerate() {
            let dtype = if ["y", "dx", "ds"].contains(&name) { dtype } else { DType::F32 };
            let name = format!("{name} on {device}, {precision}, of {case:?}");
            // A shortcut apart is rounded once more; its products are below one, its bias below 1.5.
            let apart = case.0.geometry.stride > 1 && i == 0;
            let most = (case.1[0] + case.1[1]) as f64 + 1.5;
            let rounding = if apart { gpu::rounding(dtype) * most } else { 0.0 };
            let cut = if precision == Precision::Tf32 { gpu::cut(depths[i]) } else { 0.0 };
            close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], rounding + cut);
        }
        got.concat()
    });
}

#[test]
fn shortcuts_agree_with_the_reference() {
    SHORTCUTS.into_iter().for_each(|case| shortcut_agrees(case, |f| _ = f(&Device::cpu_guarded())));
}

#[test]
fn gpu_shortcuts_agree_with_the_reference() {
    let cases = SHORTCUTS.into_iter().filter(|_| gpu::available());
    cases.for_each(|case| shortcut_agrees(case, |f| gpu::each_precision(&format!("{case:?}"), f)));
}

#[test]
fn gpu_large_shortcuts_agree_with_the_reference() {
    let cases = LARGE_SHORTCUTS.into_iter().filter(|_| gpu::available());
    cases.for_each(|case| shortcut_agrees(case, |f| gpu::each_of(&format!("{case:?}"), &[Precision::Bf16], f)));
}

/// The kernels of a backward pass: one for all gradients, with the sums for the biases, wherever the channels and the
/// shortcut's pixels allow it; otherwise one for each gradient, or for what can be in one.
#[test]
fn gpu_gradients_of_a_shortcut_are_one_launch() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu.clone());
    let [any_dw, any_dx] = ["wgrad_mma_64x64_any", "dgrad_mma_64x64_any"];
    for (case, expected) in [
        (SHORTCUTS[0], &["bwd_mma_64x64", "join_segments"][..]),
        (SHORTCUTS[7], &["bwd_mma_64x64"]),
        (SHORTCUTS[8], &["bwd_mma_64x64_128x128", "join_segments"]),
        // dw has 64 columns.
        (LARGE_SHORTCUTS[0], &["bwd_mma_64x64"]),
        (LARGE_SHORTCUTS[1], &["bwd_mma_128x128"]),
        // Of the stride and of 20 channels, of 9, of 12.
        (SHORTCUTS[5], &["wgrad_mma_64x64_any_y", any_dx, "wgrad_mma_64x64_any_y", any_dx]),
        (SHORTCUTS[4], &["wgrad_mma_64x64_any_y", any_dx, any_dw, any_dx]),
        (SHORTCUTS[6], &["bwd_mma_64x64", "join_segments", "wgrad_mma_64x64_any_x", any_dx]),
    ] {
        let [data, s] = shortcut_data(case, DType::Bf16).map(|data| data.to_f32());
        gpu.record_launches();
        shortcut_by_tape(case, &device, &data, &s);
        let launched = gpu.recorded_launches();
        let backward = launched.iter().filter_map(|l| l.kernel.strip_prefix("conv2d_"));
        let backward: Vec<&str> =
            backward.skip_while(|part| !part.contains("grad_") && !part.contains("bwd_")).collect();
        assert_eq!(backward, expected, "{case:?}");
        let sums = launched.iter().filter(|l| l.kernel == "add_parts").count();
        assert_eq!(sums, 1, "launches for the sums of {case:?}");
    }
}

/// The channels of the shortcut, and those of its first tensor, from other parameters; its bias left out. Backward also
/// the convolution's weight or input in place of the shortcut's, and a lost block, one of its dx.
#[test]
fn bugs_planted_in_shortcuts_are_noticed() {
    const TEST: &str = "conv2d::gpu_shortcuts_agree_with_the_reference";
    const LARGE: &str = "conv2d::gpu_large_shortcuts_agree_with_the_reference";
    for (test, part, is, reads) in [
        (TEST, "fwd_mma_64x64", "13+60", "13+56"),
        (TEST, "fwd_mma_64x64_any", "12+56", "12+12"),
        (LARGE, "fwd_mma_128x128", "12+60", "12+56"),
        (TEST, "join_segments", "7", "3"),
        (TEST, "bwd_mma_64x64", "16+60", "16+56"),
        (TEST, "bwd_mma_64x64", "13", "12"),
        (TEST, "bwd_mma_64x64_128x128", "16+60", "16+56"),
        (LARGE, "bwd_mma_128x128", "9", "7"),
        (LARGE, "bwd_mma_128x128", "16+56", "16+12"),
    ] {
        plant::notices_wrong_parameter(test, &format!("conv2d_{part}"), is, reads);
    }
    for (test, part) in [(TEST, "bwd_mma_64x64"), (TEST, "bwd_mma_64x64_128x128"), (LARGE, "bwd_mma_128x128")] {
        plant::notices_lost_block(test, &format!("conv2d_{part}"));
    }
}

/// Three uses of one value: two convolutions with the same weight, of which the second also adds the value, as a
/// residual, to what it makes; dy of the second is `data.residual`. The last gradient that reaches the value is that of
/// the first convolution, which adds those that wait where it stores its own. Returns dx, and dw with db.
fn used_thrice(device: &Device, case: Case, data: &Data<f32>) -> [Vec<f32>; 2] {
    let ys = case.geometry.output(case.x, case.w);
    let vector = Shape::vector(case.w.n);
    let params = [(case.w, data.w.clone()), (vector, data.b.clone())];
    let dy = concat::reference::forward(&data.dy, &data.residual, ys.c, ys.c);
    let pass = through_tape_on(device, &[(case.x, data.x.clone())], &params, &dy, 1, |tape, v, p| {
        let conv = |tape: &mut Tape<'_>, plus: Plus<'_>| {
            conv2d_by(tape, &v[0], p[0], p[1], case.geometry, plus, direct(Isa::best()))
        };
        let first = conv(tape, Plus::default())?;
        let second = conv(tape, Plus { residual: Some(&v[0]), ..Plus::default() })?;
        concat::concat(tape, &first, &second)
    });
    [pass.dx.into_iter().flatten().collect(), pass.dw.into_iter().flatten().collect()]
}

/// As wide at the end as at the beginning, in tiles of 64x64 and of 128x128, so that the value can be a residual too.
const THRICE: [Case; 2] = [
    case([2, 9, 8, 24], [24, 3, 3], SAME),
    case([3, 64, 64, 128], [128, 1, 2], Geometry { stride: 1, pad: Pad { top: 0, left: 1, bottom: 0, right: 0 } }),
];

/// `dx`, and `dw` and `db` side by side, of both uses as a convolution; `dx` of the second.
fn used_thrice_by_reference<T: Float>(case: Case, data: &Data<T>) -> [Vec<T>; 3] {
    let [a, b] = [&data.dy, &data.residual].map(|dy| reference::backward(&data.inputs(case), dy));
    let sum = |a: &[T], b: &[T]| a.iter().zip(b).map(|(a, b)| *a + *b).collect::<Vec<T>>();
    let dw = [sum(&a.weight, &b.weight), sum(&a.bias, &b.bias)].concat();
    [sum(&sum(&b.x, &data.residual), &a.x), dw, b.x]
}

/// dx is (dx of the second + its dy) + dx of the first. Besides the whole the first term is rounded. On the way no
/// kernel adds two tensors.
#[test]
fn gpu_gradients_that_wait_are_added_where_dx_is_stored() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu.clone());
    for case in THRICE {
        let data = Data::new(case).rounded(DType::Bf16);
        let oracle = used_thrice_by_reference(case, &data);
        let yardstick = used_thrice_by_reference(case, &data.to_f32());
        let first_term = oracle[2].iter().fold(0.0, |most: f64, v| most.max(v.abs())) * gpu::rounding(DType::Bf16);
        let mut first: Option<Vec<f32>> = None;
        for schedule in gpu::SCHEDULES {
            gpu::configure("seed", schedule);
            gpu.record_launches();
            let got = used_thrice(&device, case, &data.to_f32());
            let adds = gpu.recorded_launches().iter().filter(|l| l.kernel == "add_fwd_bf16").count();
            assert_eq!(adds, 0, "additions of two tensors, {case:?}");
            let of_dx = first_term + 2.0 * gpu::cut(case.w.h * case.w.w * case.w.n);
            close_as_but_for(DType::Bf16, &format!("dx of {case:?}"), &got[0], &oracle[0], &yardstick[0], of_dx);
            let of_dw = 2.0 * gpu::cut(case.x.rows());
            close_as_but_for(DType::F32, &format!("dw of {case:?}"), &got[1], &oracle[1], &yardstick[1], of_dw);
            let got = got.concat();
            same_bits(&format!("{case:?}, schedule {schedule}"), &got, first.get_or_insert_with(|| got.clone()));
        }
        gpu::configure("seed", "none");
    }
}

/// The first of two that wait taken for both, and none added: x is read in the place of the first.
#[test]
fn bugs_planted_where_gradients_wait_are_noticed() {
    const TEST: &str = "conv2d::gpu_gradients_that_wait_are_added_where_dx_is_stored";
    for (part, is, reads) in
        [("bwd_mma_64x64", "15", "14"), ("bwd_mma_64x64", "14", "7"), ("bwd_mma_128x128", "15", "14")]
    {
        plant::notices_wrong_parameter(TEST, &format!("conv2d_{part}"), is, reads);
    }
}

/// The tensors of a case.
struct Data<T> {
    x: Vec<T>,
    w: Vec<T>,
    b: Vec<T>,
    shift: Vec<T>,
    residual: Vec<T>,
    dy: Vec<T>,
}

impl Data<f64> {
    fn new(case: Case) -> Self {
        let y = case.geometry.output(case.x, case.w);
        Data {
            x: numbers(1, case.x.len()),
            w: numbers(2, case.w.len()),
            b: numbers(3, y.c),
            shift: numbers(4, y.n * y.c),
            residual: numbers(5, y.len()),
            dy: numbers(6, y.len()),
        }
    }

    fn to_f32(&self) -> Data<f32> {
        let Data { x, w, b, shift, residual, dy } = self;
        let [x, w, b, shift, residual, dy] = [x, w, b, shift, residual, dy].map(|v| to_f32(v));
        Data { x, w, b, shift, residual, dy }
    }
}

impl Data<f64> {
    /// Rounded as on a GPU with this activation type; the bias stays f32.
    fn rounded(self, dtype: DType) -> Self {
        let Data { x, w, b, shift, residual, dy } = self;
        let [x, w, shift, residual, dy] = [x, w, shift, residual, dy].map(|v| gpu::rounded(dtype, &v));
        Data { x, w, b, shift, residual, dy }
    }

    /// As the products take it.
    fn multiplied(&self, precision: Precision) -> Self {
        let Data { x, w, b, shift, residual, dy } = self;
        let [x, w, dy] = [x, w, dy].map(|v| gpu::multiplied(precision, v));
        Data { x, w, b: b.clone(), shift: shift.clone(), residual: residual.clone(), dy }
    }
}

/// The results that `by` has where the products take their operands in a precision; what are no products take dy as it
/// is.
fn in_precision<T: Clone>(precision: Precision, data: &Data<f64>, by: impl Fn(&Data<f64>) -> Results<T>) -> Results<T> {
    let mut results = by(&data.multiplied(precision));
    if precision == Precision::Tf32 {
        let [.., db, dshift, dresidual] = by(data);
        results[3..].clone_from_slice(&[db, dshift, dresidual]);
    }
    results
}

impl<T: Float> Data<T> {
    fn inputs(&self, case: Case) -> Inputs<'_, T> {
        Inputs {
            x: &self.x,
            x_shape: case.x,
            weight: &self.w,
            weight_shape: case.w,
            bias: &self.b,
            shift: Some(&self.shift),
            residual: Some(&self.residual),
            geometry: case.geometry,
        }
    }
}

/// `y`, `dx`, `dw`, `db`, `dshift`, `dresidual`.
type Results<T> = [Vec<T>; 6];

const NAMES: [&str; 6] = ["y", "dx", "dw", "db", "dshift", "dresidual"];

impl Case {
    /// The terms of y, dx and dw.
    fn depths(self) -> [usize; 3] {
        let (y, taps) = (self.geometry.output(self.x, self.w), self.w.h * self.w.w);
        [taps * self.x.c, taps * y.c, y.rows()]
    }
}

fn by_reference<T: Float>(case: Case, data: &Data<T>) -> Results<T> {
    let inputs = data.inputs(case);
    let d = reference::backward(&inputs, &data.dy);
    [reference::forward(&inputs), d.x, d.weight, d.bias, d.shift, data.dy.clone()]
}

fn specs(case: Case) -> (Specs, Param, Param) {
    let mut specs = Specs::default();
    let w = specs.add("w".into(), case.w, Layout::Conv, Init::Zeros);
    let b = specs.add("b".into(), Shape::vector(case.w.n), Layout::Vector, Init::Zeros);
    (specs, w, b)
}

fn parameters(device: &Device, case: Case, data: &Data<f32>) -> (Params, Param, Param) {
    let (specs, w, b) = specs(case);
    let mut params = Params::zeros(device, specs).unwrap();
    params.get_mut(w).copy_from_slice(&data.w);
    params.get_mut(b).copy_from_slice(&data.b);
    (params, w, b)
}

/// Runs a case through the public function and the tape, in guarded memory filled with NaN. The parameter gradients of
/// `passes` passes accumulate.
fn by_tape_on(device: &Device, case: Case, data: &Data<f32>, method: Method, passes: usize) -> Results<f32> {
    let ys = case.geometry.output(case.x, case.w);
    let inputs = [(case.x, &data.x), (Shape::new(ys.n, 1, 1, ys.c), &data.shift), (ys, &data.residual)];
    let params = [(case.w, &data.w), (Shape::vector(ys.c), &data.b)];
    let [inputs, params] =
        [&inputs[..], &params].map(|all| all.iter().map(|&(s, v)| (s, v.clone())).collect::<Vec<_>>());
    let pass = through_tape_on(device, &inputs, &params, &data.dy, passes, |tape, v, p| {
        let plus = Plus { shift: Some(&v[1]), residual: Some(&v[2]), ..Plus::default() };
        conv2d_by(tape, &v[0], p[0], p[1], case.geometry, plus, method)
    });
    let [dx, dshift, dresidual] = pass.dx.try_into().expect("three inputs");
    let [dw, db] = pass.dw.try_into().expect("two parameters");
    [pass.y, dx, dw, db, dshift, dresidual]
}

fn by_tape(case: Case, data: &Data<f32>, method: Method, passes: usize) -> Results<f32> {
    by_tape_on(&Device::cpu_guarded(), case, data, method, passes)
}

/// Every case with every algorithm that supports it.
fn cases_by_method() -> Vec<(Case, Method)> {
    let by = |algorithm: Algorithm| {
        let able = CASES.into_iter().filter(move |c| algorithm.can(c.w, c.geometry));
        able.map(move |c| (c, Method::all(algorithm, Isa::best())))
    };
    by(Algorithm::Direct).chain(by(Algorithm::Winograd)).collect()
}

fn direct(isa: Isa) -> Method {
    Method::all(Algorithm::Direct, isa)
}

#[test]
fn the_derived_gradient_agrees_with_differences() {
    for case in CASES.into_iter().filter(|c| c.x.len() + c.w.len() < 1000) {
        let data = Data::new(case);
        let inputs = [&data.x, &data.w, &data.b, &data.shift, &data.residual].map(Clone::clone);
        let f = |v: &[Vec<f64>]| {
            let [x, w, b, shift, residual] = std::array::from_fn(|i| v[i].clone());
            let y = reference::forward(&Data { x, w, b, shift, residual, dy: vec![] }.inputs(case));
            y.iter().zip(&data.dy).map(|(y, dy)| y * dy).sum()
        };
        let d = reference::backward(&data.inputs(case), &data.dy);
        let gradients = [d.x, d.weight, d.bias, d.shift, data.dy.clone()];
        finite_differences(&format!("{case:?}"), f, &inputs, &gradients);
    }
}

#[test]
fn direct_agrees_with_the_reference() {
    for case in CASES {
        let data = Data::new(case);
        let (oracle, yardstick) = (by_reference(case, &data), by_reference(case, &data.to_f32()));
        for isa in Isa::available() {
            let got = by_tape(case, &data.to_f32(), direct(isa), 1);
            for i in 0..6 {
                close(
                    &format!("{} by direct {:?} of {case:?}", NAMES[i], isa.level()),
                    &got[i],
                    &oracle[i],
                    &yardstick[i],
                );
            }
        }
    }
}

#[test]
fn gpu_agrees_with_the_reference() {
    if !gpu::available() {
        return;
    }
    for case in CASES {
        let expected = Precision::ALL.map(|precision| {
            LazyCell::new(move || {
                let data = Data::new(case).rounded(precision.activations());
                let oracle = in_precision(precision, &data, |data| by_reference(case, data));
                let yardstick = in_precision(precision, &data, |data| by_reference(case, &data.to_f32()));
                (oracle, yardstick, data.to_f32())
            })
        });
        gpu::each_precision(&format!("{case:?}"), |device| {
            let precision = device.precision();
            let (oracle, yardstick, data) = &*expected[precision as usize];
            let got = by_tape_on(device, case, data, direct(Isa::best()), 1);
            for i in 0..6 {
                // Gradients of parameters are f32 in either case.
                let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { precision.activations() };
                let name = format!("{} on {device}, {precision}, of {case:?}", NAMES[i]);
                let of_tensor_cores = case.depths().get(i).filter(|_| precision == Precision::Tf32).copied();
                let cut = of_tensor_cores.map_or(0.0, gpu::cut);
                close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], cut);
            }
            got.concat()
        });
    }
}

/// Compares a case in bf16.
fn bf16_agrees_with_the_reference(case: Case) {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let data = Data::new(case).rounded(DType::Bf16);
    let (oracle, yardstick) = (by_reference(case, &data), by_reference(case, &data.to_f32()));
    let device = Device::Cuda(gpu);
    let mut first: Option<Vec<f32>> = None;
    for schedule in gpu::SCHEDULES {
        gpu::configure("seed", schedule);
        let got = by_tape_on(&device, case, &data.to_f32(), direct(Isa::best()), 1);
        for i in 0..6 {
            let dtype = if ["dw", "db"].contains(&NAMES[i]) { DType::F32 } else { DType::Bf16 };
            let cut = case.depths().get(i).copied().map_or(0.0, gpu::cut);
            let name = format!("{} on {device}, {dtype:?}, of {case:?}", NAMES[i]);
            close_as_but_for(dtype, &name, &got[i], &oracle[i], &yardstick[i], cut);
        }
        let got = got.concat();
        same_bits(&format!("{case:?}, schedule {schedule}"), &got, first.get_or_insert_with(|| got.clone()));
    }
    gpu::configure("seed", "none");
}

#[test]
fn gpu_agrees_with_the_reference_in_bf16() {
    BF16_CASES.into_iter().for_each(bf16_agrees_with_the_reference);
}

#[test]
fn gpu_large_tiles_agree_with_the_reference() {
    LARGE_CASES.into_iter().for_each(bf16_agrees_with_the_reference);
}

/// 96 images of 64 pixels fill a GPU, so that a block goes through all segments of k; for one image each segment has
/// blocks of its own.
#[test]
fn gpu_segments_give_the_same_bits_split_or_not() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu.clone());
    let case = case([96, 8, 8, 72], [72, 3, 3], SAME);
    let data = Data::new(case).to_f32();
    gpu.record_launches();
    let [y, dx, ..] = by_tape_on(&device, case, &data, direct(Isa::best()), 1);
    let blocks = |part: &str| -> [usize; 2] {
        let all = gpu.recorded_launches();
        gpu.record_launches();
        let of = |stem: &str| {
            let kernel = format!("conv2d_{stem}_mma_64x64");
            all.iter().find(|l| l.kernel == kernel).unwrap_or_else(|| panic!("{part}: no {stem} by 64x64"))
        };
        let bytes = of("bwd").arguments.iter().find(|(name, _)| *name == "blocks").map(|(_, bytes)| bytes);
        let blocks: BackwardBlocks =
            bytemuck::pod_read_unaligned(bytes.expect("it says how its blocks are shared out"));
        [of("fwd").grid[2], blocks.dx_segments as usize]
    };
    assert_eq!(blocks("all images"), [1, 1]);
    let single = Case { x: Shape { n: 1, ..case.x }, ..case };
    for image in [0, 95] {
        let part = |v: &[f32]| v[image * v.len() / case.x.n..][..v.len() / case.x.n].to_vec();
        let [x, shift, residual, dy] = [&data.x, &data.shift, &data.residual, &data.dy].map(|v| part(v));
        let alone = Data { x, w: data.w.clone(), b: data.b.clone(), shift, residual, dy };
        let alone = by_tape_on(&device, single, &alone, direct(Isa::best()), 1);
        // Two slabs of channels and nine taps: 18 slabs, at least four in a segment.
        assert_eq!(blocks("one image"), [4, 4]);
        same_bits(&format!("y of image {image} alone"), &alone[0], &part(&y));
        same_bits(&format!("dx of image {image} alone"), &alone[1], &part(&dx));
    }
}

/// Missing barriers, missing blocks, one parameter in place of another.
#[test]
fn planted_bugs_are_noticed() {
    const TEST: &str = "conv2d::gpu_agrees_with_the_reference";
    for part in ["fwd_64x64_f32", "dgrad_128x32_f32", "wgrad_32x128_f32", "bwd_shift_f32"] {
        plant::notices_lost_last_barrier(TEST, &format!("conv2d_{part}"));
    }
    for part in ["fwd_128x32_f32", "dgrad_64x64_f32", "wgrad_64x64_f32", "bwd_shift_bf16"] {
        plant::notices_lost_block(TEST, &format!("conv2d_{part}"));
    }
    // The left padding for the top one, oh for ow, the height of the kernel for its width.
    for (part, is, reads) in
        [("fwd_64x64_f32", "8+44", "8+40"), ("dgrad_128x32_f32", "4+20", "4+16"), ("wgrad_64x64_f32", "4+32", "4+28")]
    {
        let entry = format!("conv2d_{part}");
        plant::notices_wrong_parameter(TEST, &entry, is, reads);
    }
}

/// The same in tf32, and operands that are cut instead of rounded, or not those of their place.
#[test]
fn bugs_planted_in_tf32_kernels_are_noticed() {
    const TEST: &str = "conv2d::gpu_agrees_with_the_reference";
    for part in ["fwd_64x64", "dgrad_128x32", "wgrad_32x128"] {
        plant::notices_lost_last_barrier(TEST, &format!("conv2d_{part}_tf32"));
    }
    for part in ["fwd_128x32", "dgrad_64x64", "wgrad_64x64"] {
        plant::notices_lost_block(TEST, &format!("conv2d_{part}_tf32"));
    }
    for part in ["fwd_64x64", "fwd_128x32", "dgrad_64x64", "dgrad_128x32", "wgrad_64x64", "wgrad_32x128"] {
        plant::notices(TEST, &format!("conv2d_{part}_tf32"), "cvt.rna.tf32.f32", "mov.b32");
    }
    // The second step of the second 32 rows or columns is that of the first.
    for (part, from, to) in
        [("fwd_64x64", "+400];", "+272];"), ("dgrad_128x32", "+656];", "+528];"), ("wgrad_32x128", "+656];", "+528];")]
    {
        plant::notices(TEST, &format!("conv2d_{part}_tf32"), from, to);
    }
}

/// The same, and slabs that are read before they have arrived, for the products on tensor cores.
#[test]
fn bugs_planted_in_tensor_core_kernels_are_noticed() {
    const TEST: &str = "conv2d::gpu_agrees_with_the_reference_in_bf16";
    const LARGE: &str = "conv2d::gpu_large_tiles_agree_with_the_reference";
    // The barriers in the order of the text: pixels, a slab, the end of the ring, results. Where tiles of dw are whole,
    // the first five are of the loop over steady pixels.
    for (test, part, n) in [
        (TEST, "fwd_mma_64x64", 0),
        (TEST, "fwd_mma_128x16", 1),
        (TEST, "bwd_mma_64x64", 0),
        (TEST, "bwd_mma_64x64", 1),
        (TEST, "wgrad_mma_64x64_any", 1),
        (TEST, "wgrad_mma_64x64_any_x", 1),
        (TEST, "wgrad_mma_64x64_any_y", 0),
        (LARGE, "fwd_mma_128x128", 2),
        (LARGE, "bwd_mma_128x128", 7),
        (LARGE, "bwd_mma_128x128", 17),
        (LARGE, "bwd_mma_64x64_128x128", 5),
        (LARGE, "bwd_mma_64x64_128x128", 14),
    ] {
        plant::notices_lost_barrier(test, &format!("conv2d_{part}"), n);
    }
    for part in ["fwd_mma_64x64_any", "dgrad_mma_64x64_any", "join_segments", "bwd_mma_64x64"] {
        plant::notices_lost_block(TEST, &format!("conv2d_{part}"));
    }
    for (test, part) in [(TEST, "bwd_mma_64x64"), (LARGE, "bwd_mma_128x128")] {
        plant::notices_lost_last_barrier(test, &format!("conv2d_{part}"));
    }
    for (test, part) in [(TEST, "fwd_mma_64x64"), (LARGE, "fwd_mma_128x128"), (LARGE, "bwd_mma_128x128")] {
        plant::notices(test, &format!("conv2d_{part}"), "cp.async.wait_group 1;", "cp.async.wait_group 2;");
    }
    // The width of an image for its height, ow for oh; tiles for segments of dw, tiles of dx for those of dw; the
    // channels for the pixels of an image.
    for (part, is, reads) in [
        ("fwd_mma_64x64", "13+8", "13+4"),
        ("bwd_mma_64x64", "16+20", "16+16"),
        ("bwd_mma_64x64", "17+4", "17"),
        ("bwd_mma_64x64", "17", "17+12"),
        ("dgrad_mma_64x64_any", "4+20", "4+16"),
        ("wgrad_mma_64x64_any", "4+8", "4+4"),
        ("wgrad_mma_64x64_any_x", "4+8", "4+4"),
        ("wgrad_mma_64x64_any_y", "4+8", "4+4"),
        ("join_segments", "12", "11"),
    ] {
        plant::notices_wrong_parameter(TEST, &format!("conv2d_{part}"), is, reads);
    }
}

#[test]
fn winograd_agrees_with_the_reference() {
    let rms = |x: &[f64]| (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64).sqrt();
    for case in CASES.into_iter().filter(|c| Algorithm::Winograd.can(c.w, c.geometry)) {
        let data = Data::new(case);
        let (oracle, yardstick) = (by_reference(case, &data), by_reference(case, &data.to_f32()));
        let ys = case.geometry.output(case.x, case.w);
        let tiles = ys.n * ys.h.div_ceil(4) * ys.w.div_ceil(4);
        let budgets = [
            winograd::budget(winograd::Result::Output, case.w.c, [rms(&data.x), rms(&data.w)]),
            winograd::budget(winograd::Result::Output, case.w.n, [rms(&data.dy), rms(&data.w)]),
            winograd::budget(winograd::Result::Weight, tiles, [rms(&data.x), rms(&data.dy)]),
        ];
        for isa in Isa::available() {
            let got = by_tape(case, &data.to_f32(), Method::all(Algorithm::Winograd, isa), 1);
            for i in 0..6 {
                let name = format!("{} by Winograd {:?} of {case:?}", NAMES[i], isa.level());
                let share = match budgets.get(i) {
                    // Bias, shift and residual add three roundings.
                    Some(budget) => worst(&name, &got[i], &oracle[i], |w| budget + 3.0 * F32_ROUNDING * w.abs()),
                    None => close(&name, &got[i], &oracle[i], &yardstick[i]),
                };
                println!("{share:.2} of the budget: {name}");
            }
        }
    }
}

#[test]
fn parameter_gradients_accumulate() {
    for (case, method) in cases_by_method() {
        let data = Data::new(case).to_f32();
        let (once, twice) = (by_tape(case, &data, method, 1), by_tape(case, &data, method, 2));
        for i in 2..4 {
            let sum: Vec<f32> = once[i].iter().map(|v| v + v).collect();
            same_bits(&format!("{} twice, {case:?}", NAMES[i]), &twice[i], &sum);
        }
    }
}

#[test]
fn gpu_parameter_gradients_accumulate() {
    // One with a single split-K segment (its pixels are the k of dw) and one with several.
    for case in [CASES[3], CASES[18]] {
        let data = Data::new(case).to_f32();
        gpu::each_precision(&format!("{case:?}"), |device| {
            let by_tape = |passes| by_tape_on(device, case, &data, direct(Isa::best()), passes);
            let (once, twice) = (by_tape(1), by_tape(2));
            for i in 2..4 {
                let sum: Vec<f32> = once[i].iter().map(|v| v + v).collect();
                same_bits(&format!("{} twice, {case:?}", NAMES[i]), &twice[i], &sum);
            }
            twice.concat()
        });
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    for (case, method) in cases_by_method() {
        let data = Data::new(case).to_f32();
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| by_tape(case, &data, method, 1))
        };
        let one = on(1);
        for threads in [2, 3, 5] {
            for (name, (a, b)) in NAMES.iter().zip(one.iter().zip(on(threads))) {
                same_bits(&format!("{name} on {threads} threads, {case:?}"), &b, a);
            }
        }
    }
}

/// Asserts that each image of a case has the same `y` and `dx` when computed alone.
fn images_stand_alone(device: &Device, case: Case, method: Method) {
    let data = Data::new(case).to_f32();
    let [y, dx, ..] = by_tape_on(device, case, &data, method, 1);
    let single = Case { x: Shape { n: 1, ..case.x }, ..case };
    for image in 0..case.x.n {
        let part = |v: &[f32]| v[image * v.len() / case.x.n..][..v.len() / case.x.n].to_vec();
        let data = Data {
            x: part(&data.x),
            w: data.w.clone(),
            b: data.b.clone(),
            shift: part(&data.shift),
            residual: part(&data.residual),
            dy: part(&data.dy),
        };
        let alone = by_tape_on(device, single, &data, method, 1);
        same_bits(&format!("y of image {image} alone, {case:?}"), &alone[0], &part(&y));
        same_bits(&format!("dx of image {image} alone, {case:?}"), &alone[1], &part(&dx));
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for (case, method) in cases_by_method().into_iter().filter(|(c, _)| c.x.n > 1) {
        let chosen = |n| Method::choose(Shape { n, ..case.x }, case.w, case.geometry);
        let (one, all) = (chosen(1), chosen(case.x.n));
        assert_eq!((one.forward, one.dgrad), (all.forward, all.dgrad), "the batch decides the method of {case:?}");
        images_stand_alone(&Device::cpu_guarded(), case, method);
    }
}

#[test]
fn gpu_image_does_not_depend_on_its_batch() {
    for precision in Precision::ALL {
        let Some(gpu) = gpu::gpu(precision) else { return };
        let device = Device::Cuda(gpu);
        // Some of these split a single image into other tiles than the batch.
        let more = BF16_CASES.into_iter().filter(|_| precision == Precision::Bf16);
        for case in CASES.into_iter().chain(more).filter(|c| c.x.n > 1 && c.x.len() * c.w.n < 1 << 20) {
            images_stand_alone(&device, case, direct(Isa::best()));
        }
        // An image alone has too few tiles for the large kernels.
        if precision == Precision::Bf16 {
            LARGE_CASES.into_iter().for_each(|case| images_stand_alone(&device, case, direct(Isa::best())));
        }
    }
}

#[test]
fn nothing_is_added_and_no_gradient_made_unless_asked() {
    let case = CASES[3];
    let data = Data::new(case).to_f32();
    let device = Device::cpu_guarded();
    let (params, w, b) = parameters(&device, case, &data);
    let mut tape = Tape::recording(&device, &params);
    let x = Var::constant(Tensor::from_slice(&device, case.x, &data.x).unwrap());
    let y = conv2d(&mut tape, &x, w, b, case.geometry, Plus::default()).unwrap();
    let oracle = Data::new(case);
    let plain = |a: Inputs<'_, f64>| reference::forward(&Inputs { shift: None, residual: None, ..a });
    let yardstick = reference::forward(&Inputs { shift: None, residual: None, ..data.inputs(case) });
    close("y", y.data(), &plain(oracle.inputs(case)), &yardstick);
    assert_eq!(tape.saved()[0].bytes, case.x.len() * 4, "only x is saved");
    // Nor is memory spent on gradients that nobody asked for.
    gradients_are_made_only_if_asked(&Device::cpu_guarded());
}

#[test]
fn gpu_makes_no_gradient_unless_asked() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        gradients_are_made_only_if_asked(&Device::Cuda(gpu));
    }
}

/// Counts the buffers that the pool hands out during a backward pass, with x, shift and residual as leaves or
/// constants.
fn gradients_are_made_only_if_asked(device: &Device) {
    let case = CASES[3];
    let data = Data::new(case).to_f32();
    let ys = case.geometry.output(case.x, case.w);
    let (specs, w, b) = specs(case);
    let flat = vec![0.5; specs.flat_len()];
    let params = Params::from_host(device, specs, &flat).unwrap();
    let mut grads = ParamGrads::new(device, params.specs()).unwrap();
    let handed_out = || {
        let stats = device.pool_stats();
        stats.hits + stats.misses
    };
    let mut buffers = |wanted: [bool; 3]| {
        grads.reset();
        let mut tape = Tape::recording(device, &params);
        let inputs = [(case.x, &data.x), (Shape::new(ys.n, 1, 1, ys.c), &data.shift), (ys, &data.residual)];
        let inputs = std::array::from_fn::<Var, 3, _>(|i| {
            let (shape, values) = inputs[i];
            let value = Tensor::from_slice_as(device, device.activations(), shape, values).unwrap();
            if wanted[i] { tape.leaf(value) } else { Var::constant(value) }
        });
        let plus = Plus { shift: Some(&inputs[1]), residual: Some(&inputs[2]), ..Plus::default() };
        let y = conv2d(&mut tape, &inputs[0], w, b, case.geometry, plus).unwrap();
        let dy = Tensor::from_slice_as(device, device.activations(), ys, &data.dy).unwrap();
        let before = handed_out();
        let mut leaves = tape.backward(&y, dy, &mut grads).unwrap();
        let made = inputs.each_ref().map(|input| leaves.take(input).is_some());
        assert_eq!(made, wanted, "gradients of x, shift and residual");
        handed_out() - before
    };
    let none = buffers([false; 3]);
    let dx = buffers([true, false, false]);
    assert!(dx > none, "{device}: {none} buffers without dx, {dx} with it: it is made unasked");
    // On the CPU the bias gradient is the sum of dshift, which is therefore always computed.
    let dshift = buffers([false, true, false]);
    let more = u64::from(matches!(device, Device::Cuda(_)));
    assert_eq!(dshift, none + more, "{device}: buffers with dshift, {none} without");
    assert_eq!(buffers([false, false, true]), none, "{device}: dresidual is dy handed on");
    assert_eq!(buffers([true; 3]), dx + dshift - none, "{device}: all of them");
}

#[test]
fn warm_steps_allocate_nothing() {
    let case = CASES[17];
    let data = Data::new(case).to_f32();
    let device = Device::cpu();
    let (params, w, b) = parameters(&device, case, &data);
    let mut param_grads = ParamGrads::new(&device, params.specs()).unwrap();
    let mut misses = Vec::new();
    for _ in 0..4 {
        let mut tape = Tape::recording(&device, &params);
        let x = tape.leaf(Tensor::from_slice(&device, case.x, &data.x).unwrap());
        let y = conv2d(&mut tape, &x, w, b, case.geometry, Plus::default()).unwrap();
        let dy = Tensor::from_slice(&device, y.shape(), &data.dy).unwrap();
        tape.backward(&y, dy, &mut param_grads).unwrap();
        misses.push(device.pool_stats().misses);
    }
    assert!(misses[1..].iter().all(|m| *m == misses[0]), "misses after each step: {misses:?}");
}
