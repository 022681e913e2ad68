use std::ops::Range;

use ddpm_cuda::device::Device;
use ddpm_cuda::ops::add::add;
use ddpm_cuda::ops::concat;
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};
use ddpm_cuda::ops::dropout::dropout;
use ddpm_cuda::ops::group_norm::Activation::{self, Identity, Silu};
use ddpm_cuda::ops::group_norm::{Then, group_norm, reference, scale_shift_group_norm};
use ddpm_cuda::ops::silu::{self, silu};
use ddpm_cuda::rng::{Purpose, Streams};
use ddpm_cuda::tensor::{DType, Shape};

use crate::support::{
    F32_ROUNDING, Pass, close_as_but_for, close_as_but_for_each, close_to_largest, finite_differences, gpu, numbers,
    plant, same_bits, same_bits_at_any_number_of_threads, through_tape_on, to_f32, worst, worst_at,
};

/// Shape, groups. One element (its variance is 0, so y = beta); a group per channel; one group; primes; channels in
/// every vector width (64, 32, 16, 4 and 1); strips of 64 pixels with a short last one; many channels on few pixels;
/// not square. From [`IN_SLABS`] on, groups of fours of channels on images that fit into a GPU's shared memory: a pixel
/// alone; groups of 12 channels, six columns of bf16; more pixels than a thread holds; groups of 20, whose pixels are
/// no whole sectors; a narrower last slab; a group of all channels.
const CASES: [(Shape, usize); 16] = [
    (Shape::new(1, 1, 1, 1), 1),
    (Shape::new(2, 3, 5, 7), 7),
    (Shape::new(2, 3, 5, 7), 1),
    (Shape::new(3, 1, 1, 6), 2),
    (Shape::new(1, 13, 11, 32), 8),
    (Shape::new(2, 5, 13, 87), 3),
    (Shape::new(1, 9, 15, 130), 2),
    (Shape::new(2, 4, 4, 512), 32),
    (Shape::new(2, 32, 32, 96), 32),
    (Shape::new(1, 64, 66, 16), 4),
    (Shape::new(3, 1, 1, 16), 4),
    (Shape::new(2, 6, 7, 48), 4),
    (Shape::new(1, 32, 32, 96), 8),
    (Shape::new(2, 8, 8, 40), 2),
    (Shape::new(2, 8, 16, 48), 12),
    (Shape::new(1, 5, 7, 256), 1),
];

/// The first of [`CASES`] of which all go by slabs.
const IN_SLABS: usize = 10;

/// Whether a GPU takes one of [`CASES`] by slabs.
fn in_slabs(shape: Shape, groups: usize) -> bool {
    (shape.c / groups).is_multiple_of(4) && shape.c.is_multiple_of(8) && shape.pixels() <= 1024
}

/// The tensors of a case, in f64 but exact in f32.
struct Case {
    shape: Shape,
    groups: usize,
    activation: Activation,
    x: Vec<f64>,
    gamma: Vec<f64>,
    beta: Vec<f64>,
    /// Scales and shifts of each image, if there are any.
    scale_shift: Option<Vec<f64>>,
    dy: Vec<f64>,
}

const EPS: f32 = 1e-5;

impl Case {
    /// With `x` uniform between `mean - scale` and `mean + scale`.
    fn new((shape, groups): (Shape, usize), activation: Activation, mean: f64, scale: f64) -> Self {
        let x = numbers(1, shape.len()).iter().map(|x| f64::from((mean + scale * x) as f32)).collect();
        let gamma = numbers(2, shape.c).iter().map(|v| f64::from((1.0 + 0.5 * v) as f32)).collect();
        let (beta, dy) = (numbers(3, shape.c), numbers(4, shape.len()));
        Case { shape, groups, activation, x, gamma, beta, scale_shift: None, dy }
    }

    /// With scales and shifts.
    fn scaled(self) -> Self {
        Case { scale_shift: Some(numbers(5, 2 * self.shape.n * self.shape.c)), ..self }
    }

    /// The same with `x` and `dy` rounded to `dtype`.
    fn rounded(self, dtype: DType) -> Self {
        let scale_shift = self.scale_shift.as_ref().map(|s| gpu::rounded(dtype, s));
        Case { x: gpu::rounded(dtype, &self.x), dy: gpu::rounded(dtype, &self.dy), scale_shift, ..self }
    }

    fn pass(&self, passes: usize) -> Pass {
        self.pass_on(&Device::cpu_guarded(), passes)
    }

    fn pass_on(&self, device: &Device, passes: usize) -> Pass {
        let vector = |v: &[f64]| (Shape::vector(self.shape.c), to_f32(v));
        let params = [vector(&self.gamma), vector(&self.beta)];
        let mut inputs = vec![(self.shape, to_f32(&self.x))];
        let Shape { n, c, .. } = self.shape;
        inputs.extend(self.scale_shift.as_ref().map(|s| (Shape::new(n, 1, 1, 2 * c), to_f32(s))));
        through_tape_on(device, &inputs, &params, &to_f32(&self.dy), passes, |tape, x, p| match x {
            [x, s] => scale_shift_group_norm(tape, x, s, p[0], p[1], self.groups, EPS, self.activation),
            _ => group_norm(tape, &x[0], p[0], p[1], self.groups, EPS, self.activation),
        })
    }

    /// A pass over two tensors, of the first `seam` channels and of the others. The gradients of both side by side.
    fn pass_in_two(&self, device: &Device, seam: usize) -> Pass {
        let vector = |v: &[f64]| (Shape::vector(self.shape.c), to_f32(v));
        let (params, x, c) = ([vector(&self.gamma), vector(&self.beta)], to_f32(&self.x), self.shape.c);
        let part = |part: Range<usize>| (self.shape.with_c(part.len()), concat::reference::backward(&x, c, part));
        let mut inputs = vec![part(0..seam), part(seam..c)];
        inputs.extend(self.scale_shift.as_ref().map(|s| (Shape::new(self.shape.n, 1, 1, 2 * c), to_f32(s))));
        let mut pass = through_tape_on(device, &inputs, &params, &to_f32(&self.dy), 1, |tape, x, p| match x {
            [a, b, s] => scale_shift_group_norm(tape, [a, b], s, p[0], p[1], self.groups, EPS, self.activation),
            _ => group_norm(tape, [&x[0], &x[1]], p[0], p[1], self.groups, EPS, self.activation),
        });
        let both = concat::reference::forward(&pass.dx[0], &pass.dx[1], seam, c - seam);
        pass.dx.splice(0..2, [both]);
        pass
    }

    /// `y, dx, dgamma, dbeta, dscale_shift` of the reference in f64 and in f32.
    fn oracle(&self) -> ([Vec<f64>; 5], [Vec<f32>; 5]) {
        let (shape, groups, activation) = (self.shape, self.groups, self.activation);
        let inputs = reference::Inputs {
            x: &self.x,
            shape,
            gamma: &self.gamma,
            beta: &self.beta,
            scale_shift: self.scale_shift.as_deref(),
            groups,
            eps: f64::from(EPS),
            activation,
        };
        let [dx, dgamma, dbeta, dscale_shift] = reference::backward(&inputs, &self.dy);
        let exact = [reference::forward(&inputs), dx, dgamma, dbeta, dscale_shift];
        let [x, gamma, beta] = [&self.x, &self.gamma, &self.beta].map(|v| to_f32(v));
        let scale_shift = self.scale_shift.as_ref().map(|s| to_f32(s));
        let inputs = reference::Inputs {
            x: &x,
            shape,
            gamma: &gamma,
            beta: &beta,
            scale_shift: scale_shift.as_deref(),
            groups,
            eps: EPS,
            activation,
        };
        let [dx, dgamma, dbeta, dscale_shift] = reference::backward(&inputs, &to_f32(&self.dy));
        (exact, [reference::forward(&inputs), dx, dgamma, dbeta, dscale_shift])
    }

    /// The sigmoids of the CPU path and of the kernels err by up to 9 roundings, that of the C library by one. In
    /// dgamma and dbeta, a few sums of `n h w` terms of order one, these errors add up like a random walk; in `y` and
    /// `dx` the largest error of the reference covers them. dscale and dshift are such sums over one image, and the
    /// former has two of them; with scales each term of dgamma is up to twice as large.
    fn check(&self, got: &Pass, dtype: DType) {
        let walk = match self.activation {
            // In slabs the first sums are f32, of partial sums of order one, in an order of their own.
            Identity if in_slabs(self.shape, self.groups) => {
                F32_ROUNDING * ((self.shape.n * self.shape.pixels()) as f64).sqrt()
            }
            Identity => 0.0,
            Silu => 9.0 * F32_ROUNDING * ((self.shape.n * self.shape.pixels()) as f64).sqrt(),
        };
        let walk = walk * if self.scale_shift.is_some() { 2.0 } else { 1.0 };
        let (oracle, yardstick) = self.oracle();
        let (y, dx, dgamma, dbeta) = (&got.y, &got.dx[0], &got.dw[0], &got.dw[1]);
        let mut results = vec![
            ("y", y, dtype, 0.0),
            ("dx", dx, dtype, 0.0),
            ("dgamma", dgamma, DType::F32, walk),
            ("dbeta", dbeta, DType::F32, walk),
        ];
        if self.scale_shift.is_some() {
            results.push(("dscale_shift", &got.dx[1], dtype, walk));
        }
        for (i, (name, got, dtype, walk)) in results.into_iter().enumerate() {
            let name = format!("{name} of {} in {} groups, {:?}", self.shape, self.groups, self.activation);
            close_as_but_for(dtype, &name, got, &oracle[i], &yardstick[i], walk);
        }
    }
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for case in CASES {
        for activation in [Identity, Silu] {
            let case = Case::new(case, activation, 0.3, 2.0);
            case.check(&case.pass(1), DType::F32);
            let case = case.scaled();
            case.check(&case.pass(1), DType::F32);
        }
    }
}

/// A mean 10,000 times the deviation leaves `x - mean` 10 bits, all of which must survive.
#[test]
fn large_mean_small_variance_keeps_digits() {
    for case in CASES {
        for activation in [Identity, Silu] {
            let case = Case::new(case, activation, 100.0, 0.01);
            case.check(&case.pass(1), DType::F32);
        }
    }
}

/// With such a mean the f32 reference itself loses the digits, so its error is no yardstick. Derived: `x - mean` and
/// the differences within a strip are exact (numbers within a factor of two). A running sum of up to `chain`
/// differences errs by `chain` roundings of the largest, which is at most twice the deviation; mean and deviation are
/// off by as much. Eight roundings for the rest.
fn check_digits(case: &Case, y: &[f32], chain: usize) {
    let want = &case.oracle().0[0];
    assert_eq!(y.len(), want.len(), "{}", case.shape);
    for (i, (&want, &got)) in want.iter().zip(y).enumerate() {
        let (gamma, beta) = (case.gamma[i % case.shape.c], case.beta[i % case.shape.c]);
        let scaled = gamma.abs() + (want - beta).abs();
        let budget = (2 * chain + 8) as f64 * F32_ROUNDING * (2.0 * scaled + beta.abs());
        let error = (f64::from(got) - want).abs();
        assert!(error <= budget, "{}: element {i} is {got}, expected {want} +- {budget:e}", case.shape);
    }
}

#[test]
fn a_large_mean_costs_no_more_than_the_sums_of_a_strip() {
    for case in CASES {
        let case = Case::new(case, Identity, 100.0, 0.01);
        let strip = (4096 / case.shape.c).max(64).min(case.shape.pixels());
        check_digits(&case, &case.pass(1).y, strip);
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    for (((shape, groups), activation), scaled) in [
        ((Shape::new(2, 2, 3, 6), 2), Identity),
        ((Shape::new(2, 2, 3, 6), 3), Silu),
        ((Shape::new(1, 3, 1, 2), 2), Silu),
        ((Shape::new(2, 2, 3, 6), 3), Silu),
        ((Shape::new(2, 3, 1, 4), 2), Identity),
    ]
    .into_iter()
    .zip([false, false, false, true, true])
    {
        let case = Case::new((shape, groups), activation, 0.3, 2.0);
        let case = if scaled { case.scaled() } else { case };
        let f = |v: &[Vec<f64>]| {
            let inputs = reference::Inputs {
                x: &v[0],
                shape,
                gamma: &v[1],
                beta: &v[2],
                scale_shift: v.get(3).map(Vec::as_slice),
                groups,
                eps: f64::from(EPS),
                activation,
            };
            reference::forward(&inputs).iter().zip(&case.dy).map(|(y, dy)| y * dy).sum()
        };
        let [_, dx, dgamma, dbeta, dscale_shift] = case.oracle().0;
        let mut inputs = vec![case.x.clone(), case.gamma.clone(), case.beta.clone()];
        let mut gradients = vec![dx, dgamma, dbeta];
        if let Some(scale_shift) = &case.scale_shift {
            inputs.push(scale_shift.clone());
            gradients.push(dscale_shift);
        }
        finite_differences("group_norm", f, &inputs, &gradients);
    }
}

#[test]
fn parameter_gradients_accumulate() {
    let case = Case::new(CASES[5], Silu, 0.3, 2.0).scaled();
    let (once, twice) = (case.pass(1), case.pass(2));
    for (once, twice) in once.dw.iter().zip(&twice.dw) {
        let sum: Vec<f32> = once.iter().map(|v| v + v).collect();
        same_bits("after two passes", twice, &sum);
    }
}

#[test]
fn an_image_does_not_depend_on_its_batch() {
    for (shape, groups) in [CASES[5], CASES[7], CASES[8]] {
        let batch = Case::new((shape, groups), Silu, 0.3, 2.0);
        let together = batch.pass(1);
        let image = shape.len() / shape.n;
        for i in 0..shape.n {
            let mut alone = Case::new((Shape { n: 1, ..shape }, groups), Silu, 0.3, 2.0);
            alone.x = batch.x[i * image..][..image].to_vec();
            alone.dy = batch.dy[i * image..][..image].to_vec();
            let alone = alone.pass(1);
            same_bits("y", &alone.y, &together.y[i * image..][..image]);
            same_bits("dx", &alone.dx[0], &together.dx[0][i * image..][..image]);
        }
    }
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    for case in [CASES[5], CASES[8], CASES[9]] {
        let case = Case::new(case, Silu, 0.3, 2.0).scaled();
        same_bits_at_any_number_of_threads("group_norm", || case.pass(2).flat());
    }
}

#[test]
fn the_gpu_agrees_with_the_reference() {
    for case in CASES {
        for activation in [Identity, Silu] {
            gpu::each("group_norm", |device| {
                let dtype = device.activations();
                let case = Case::new(case, activation, 0.3, 2.0).rounded(dtype);
                let got = case.pass_on(device, 1);
                case.check(&got, dtype);
                got.flat()
            });
        }
    }
}

#[test]
fn the_gpu_agrees_with_the_reference_with_scales_and_shifts() {
    for case in CASES {
        gpu::each("group_norm", |device| {
            let dtype = device.activations();
            let case = Case::new(case, Silu, 0.3, 2.0).scaled().rounded(dtype);
            let got = case.pass_on(device, 1);
            case.check(&got, dtype);
            got.flat()
        });
    }
}

/// Small enough to be run often.
#[test]
fn gpu_scales_and_shifts_each_image() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let case = Case::new((Shape::new(3, 5, 4, 130), 2), Silu, 0.3, 2.0).scaled();
    case.check(&case.pass_on(&Device::Cuda(gpu), 1), DType::F32);
}

/// On the GPU sums are shorter: 8 pixels per thread, 5 halvings in a warp, 8 warps; in slabs up to 25 pixels per
/// thread, 2 halvings of its four channels, up to 16 threads, and the rest in f64.
#[test]
fn on_the_gpu_a_large_mean_costs_no_more_than_the_sums_of_a_thread_and_a_block() {
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        for case in CASES {
            let case = Case::new(case, Identity, 100.0, 0.01).rounded(dtype);
            let got = case.pass_on(&Device::Cuda(gpu.clone()), 1);
            case.check(&got, dtype);
            if dtype == DType::F32 {
                let chain = if in_slabs(case.shape, case.groups) { 25 + 2 + 16 } else { 8 + 5 + 8 };
                check_digits(&case, &got.y, chain);
            }
        }
    }
}

#[test]
fn on_the_gpu_parameter_gradients_accumulate() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu);
    for case in [CASES[5], CASES[IN_SLABS + 4]] {
        let case = Case::new(case, Silu, 0.3, 2.0);
        let (once, twice) = (case.pass_on(&device, 1), case.pass_on(&device, 2));
        for (once, twice) in once.dw.iter().zip(&twice.dw) {
            let sum: Vec<f32> = once.iter().map(|v| v + v).collect();
            same_bits("after two passes", twice, &sum);
        }
    }
}

#[test]
fn on_the_gpu_an_image_does_not_depend_on_its_batch() {
    let Some(gpu) = gpu::gpu(DType::Bf16) else { return };
    let device = Device::Cuda(gpu);
    for (shape, groups) in [CASES[5], CASES[7], CASES[8], CASES[IN_SLABS + 4]] {
        let batch = Case::new((shape, groups), Silu, 0.3, 2.0);
        let together = batch.pass_on(&device, 1);
        let image = shape.len() / shape.n;
        for i in 0..shape.n {
            let mut alone = Case::new((Shape { n: 1, ..shape }, groups), Silu, 0.3, 2.0);
            alone.x = batch.x[i * image..][..image].to_vec();
            alone.dy = batch.dy[i * image..][..image].to_vec();
            let alone = alone.pass_on(&device, 1);
            same_bits("y", &alone.y, &together.y[i * image..][..image]);
            same_bits("dx", &alone.dx[0], &together.dx[0][i * image..][..image]);
        }
    }
}

/// Several warps along the pixels and several strips, the last one short; in the joins several warps, and twice as many
/// channels as lanes.
#[test]
fn gpu_agrees_where_every_barrier_matters() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let case = Case::new((Shape::new(2, 47, 47, 64), 1), Silu, 0.3, 2.0);
    case.check(&case.pass_on(&Device::Cuda(gpu), 1), DType::F32);
}

/// Two slabs of 16 columns of f32 and their images' last, of four threads a column; also for scales.
#[test]
fn gpu_slabs_agree_where_every_barrier_matters() {
    let Some(gpu) = gpu::gpu(DType::F32) else { return };
    let device = Device::Cuda(gpu);
    let case = Case::new((Shape::new(2, 9, 33, 32), 4), Silu, 0.3, 2.0);
    case.check(&case.pass_on(&device, 1), DType::F32);
    let case = case.scaled();
    case.check(&case.pass_on(&device, 1), DType::F32);
}

const STREAMS: Streams = Streams { seed: 7, purpose: Purpose::Dropout, step: 3, first: 5 };

/// In f32 a norm with dropout has the bits of one that the operation `dropout` follows: the same products in the same
/// order, and the mask is a function of the stream.
fn drops_as_dropout_does(device: &Device, shape: Shape, groups: usize) -> Pass {
    let vector = |seed| (Shape::vector(shape.c), to_f32(&numbers(seed, shape.c)));
    let (params, inputs) = ([vector(2), vector(3)], [(shape, to_f32(&numbers(1, shape.len())))]);
    let pass = |within: bool| {
        through_tape_on(device, &inputs, &params, &to_f32(&numbers(4, shape.len())), 1, |tape, x, p| {
            let then = Then { activation: Silu, dropout: within.then_some((0.3, STREAMS)) };
            let y = group_norm(tape, &x[0], p[0], p[1], groups, EPS, then)?;
            if within { Ok(y) } else { dropout(tape, &y, 0.3, STREAMS) }
        })
    };
    let (within, apart) = (pass(true), pass(false));
    if device.activations() == DType::F32 {
        // Of zeros, whatever their sign.
        let numbers = |pass: &Pass| pass.flat().into_iter().map(|v| v + 0.0).collect::<Vec<f32>>();
        same_bits(&format!("{device}, {shape}"), &numbers(&within), &numbers(&apart));
    } else {
        // The one is rounded twice; the other once.
        let twice: Vec<f64> = apart.y.iter().map(|&y| y.into()).collect();
        worst("y with dropout", &within.y, &twice, |y| 2.01 * gpu::BF16_ROUNDING * y.abs());
        // Where dy is rounded once more, so are the three terms of dx, none above the largest.
        close_to_largest("dx with dropout", &within.dx[0], &apart.dx[0], 4.0 * gpu::BF16_ROUNDING);
    }
    let dropped = within.y.iter().filter(|y| **y == 0.0).count() as f64 / shape.len() as f64;
    // Five standard deviations.
    assert!((dropped - 0.3).abs() < 5.0 * (0.21 / shape.len() as f64).sqrt(), "{dropped} of {shape} are dropped");
    within
}

/// By slabs that a thread holds whole, that it does not, and by strips.
const DROPPED: [(Shape, usize); 3] =
    [(Shape::new(2, 5, 7, 32), 4), (Shape::new(1, 32, 32, 48), 4), (Shape::new(2, 5, 7, 9), 3)];

#[test]
fn dropout_within_is_dropout_after() {
    for (shape, groups) in DROPPED {
        drops_as_dropout_does(&Device::cpu_guarded(), shape, groups);
    }
}

#[test]
fn gpu_drops_as_dropout_does() {
    for (shape, groups) in DROPPED {
        gpu::each("group_norm with dropout", |device| drops_as_dropout_does(device, shape, groups).flat());
    }
}

/// Two other gradients reach x before that of the norm, which by slabs adds them where it stores its own: in bf16 one
/// rounding of the sum, besides one of the slope's product, which another operation stored.
fn adds_what_waits(device: &Device, (shape, groups): (Shape, usize)) -> Vec<f32> {
    let dtype = device.activations();
    let case = Case::new((shape, groups), Silu, 0.3, 1.0).rounded(dtype);
    let vector = |v: &[f64]| (Shape::vector(shape.c), to_f32(v));
    let params = [vector(&case.gamma), vector(&case.beta)];
    let got = through_tape_on(device, &[(shape, to_f32(&case.x))], &params, &to_f32(&case.dy), 1, |tape, x, p| {
        let y = group_norm(tape, &x[0], p[0], p[1], groups, EPS, Silu)?;
        let other = silu(tape, &x[0])?;
        let y = add(tape, &y, &other)?;
        add(tape, &y, &x[0])
    });
    let (oracle, yardstick) = case.oracle();
    let slope = silu::reference::backward(&case.x, &case.dy);
    let want: Vec<f64> = oracle[1].iter().zip(&slope).zip(&case.dy).map(|((a, b), c)| a + b + c).collect();
    let slope_f32 = silu::reference::backward(&to_f32(&case.x), &to_f32(&case.dy));
    let others = yardstick[1].iter().zip(&slope_f32).zip(to_f32(&case.dy));
    let yardstick: Vec<f32> = others.map(|((a, b), c)| (c + b) + a).collect();
    // The sigmoid's own error, as in silu's tests: nine roundings of terms of order one.
    // By strips the norm's own is stored apart, and so is the sum of the other two.
    let apart = if device.is_gpu() && in_slabs(shape, groups) { 0.0 } else { gpu::rounding(dtype) };
    let own = |i: usize| {
        let stored = apart * (oracle[1][i].abs() + (slope[i] + case.dy[i]).abs());
        gpu::rounding(dtype) * slope[i].abs() + stored + 16.0 * F32_ROUNDING
    };
    close_as_but_for_each(dtype, "dx and what waited", &got.dx[0], &want, &yardstick, own);
    got.flat()
}

#[test]
fn gradients_that_wait_are_added() {
    for case in [CASES[5], CASES[IN_SLABS + 4]] {
        adds_what_waits(&Device::cpu_guarded(), case);
    }
}

#[test]
fn gpu_adds_gradients_that_wait_on_store() {
    for case in [CASES[5], CASES[IN_SLABS + 4]] {
        gpu::each("what waits", |device| adds_what_waits(device, case));
    }
}

/// The same for two tensors, of each of which one gradient waits.
#[test]
fn gpu_adds_gradients_that_wait_to_both_tensors() {
    let (shape, groups, seam) = (Shape::new(2, 4, 5, 48), 4, 16);
    let case = Case::new((shape, groups), Silu, 0.3, 1.0);
    gpu::each("what waits for two", |device| {
        let vector = |v: &[f64]| (Shape::vector(shape.c), to_f32(v));
        let (params, x) = ([vector(&case.gamma), vector(&case.beta)], to_f32(&case.x));
        let part = |part: Range<usize>| (shape.with_c(part.len()), concat::reference::backward(&x, shape.c, part));
        let inputs = [part(0..seam), part(seam..shape.c)];
        let pass = |waits: bool| {
            let mut pass = through_tape_on(device, &inputs, &params, &to_f32(&case.dy), 1, |tape, x, p| {
                let y = group_norm(tape, [&x[0], &x[1]], p[0], p[1], groups, EPS, Silu)?;
                let both = concat::concat(tape, &x[0], &x[1])?;
                if waits { add(tape, &y, &both) } else { Ok(y) }
            });
            let both = concat::reference::forward(&pass.dx[0], &pass.dx[1], seam, shape.c - seam);
            pass.dx.splice(0..2, [both]);
            pass
        };
        let (with, without) = (pass(true), pass(false));
        let dtype = device.activations();
        let dy = gpu::rounded(dtype, &case.dy);
        // What is stored without the other gradient is rounded once more.
        let want: Vec<f64> = without.dx[0].iter().zip(&dy).map(|(&dx, dy)| f64::from(dx) + dy).collect();
        let budget = |i: usize, w: f64| gpu::rounding(dtype) * 1.01 * (w.abs() + f64::from(without.dx[0][i]).abs());
        worst_at("dx", &with.dx[0], &want, budget);
        with.flat()
    });
}

/// A convolution takes the gradients of its bias and shift from the sums over the pixels that the norm behind it
/// leaves. One with the identity for a weight hands on the dx that was summed. Sums of up to 25 terms and 16 of those
/// in f32.
#[test]
fn gpu_leaves_the_sums_over_pixels_to_a_convolution() {
    let (shape, groups) = (Shape::new(3, 5, 29, 32), 4);
    let case = Case::new((shape, groups), Silu, 0.3, 2.0);
    gpu::each("sums over pixels", |device| {
        let (dtype, Shape { n, c, .. }) = (device.activations(), shape);
        let identity = (0..c * c).map(|i| if i % c == i / c { 1.0 } else { 0.0 }).collect();
        let vector = |v: &[f64]| (Shape::vector(c), to_f32(v));
        let weights = [(Shape::new(c, 1, 1, c), identity), vector(&case.beta), vector(&case.gamma), vector(&case.beta)];
        let inputs = [(shape, to_f32(&case.x)), (Shape::new(n, 1, 1, c), to_f32(&numbers(6, n * c)))];
        let got = through_tape_on(device, &inputs, &weights, &to_f32(&case.dy), 1, |tape, x, p| {
            let plus = Plus { shift: Some(&x[1]), ..Plus::default() };
            let y = conv2d(tape, &x[0], p[0], p[1], Geometry::POINTWISE, plus)?;
            group_norm(tape, &y, p[2], p[3], groups, EPS, Silu)
        });
        let (mut dshift, mut sizes) = (vec![0.0; n * c], vec![0.0; n * c]);
        for (i, dx) in got.dx[0].iter().enumerate() {
            let at = i / (shape.pixels() * c) * c + i % c;
            dshift[at] += f64::from(*dx);
            sizes[at] += f64::from(dx.abs());
        }
        let f32_sums = |i: usize| 41.0 * F32_ROUNDING * sizes[i];
        let budget = |i: usize, w: f64| f32_sums(i) + gpu::rounding(dtype) * (w.abs() + f32_sums(i));
        worst_at("dshift", &got.dx[1], &dshift, budget);
        let over_images = |v: &[f64]| -> Vec<f64> { (0..c).map(|i| v[i..].iter().step_by(c).sum()).collect() };
        let budgets = over_images(&(0..n * c).map(f32_sums).collect::<Vec<_>>());
        let (db, rounding) = (over_images(&dshift), 2.0 * F32_ROUNDING);
        worst_at("db", &got.dw[1], &db, |i, w| budgets[i] + rounding * (w.abs() + budgets[i]));
        got.flat()
    });
}

/// Seams between groups, within one, and within a quad of channels; with and without scales. The last two by slabs,
/// whose columns belong to one tensor: with a seam within one, a GPU takes strips, whose sums have another order.
const SEAMS: [(Shape, usize, usize); 7] = [
    (Shape::new(2, 5, 7, 12), 4, 4),
    (Shape::new(2, 1, 5, 8), 4, 3),
    (Shape::new(1, 7, 7, 15), 5, 6),
    (Shape::new(1, 15, 20, 4), 2, 1),
    (Shape::new(3, 4, 4, 8), 4, 7),
    (Shape::new(2, 4, 4, 384), 32, 256),
    (Shape::new(2, 4, 5, 48), 4, 16),
];

fn two_tensors_have_the_bits_of_one(device: &Device) {
    for (shape, groups, seam) in SEAMS {
        for scaled in [false, true] {
            let case = Case::new((shape, groups), Silu, 0.5, 1.0);
            let case = if scaled { case.scaled() } else { case };
            let name = format!("{device}, {shape}, {groups} groups, {seam} channels in the first, scaled: {scaled}");
            same_bits(&name, &case.pass_in_two(device, seam).flat(), &case.pass_on(device, 1).flat());
        }
    }
}

#[test]
fn two_tensors_have_the_bits_of_their_concatenation() {
    two_tensors_have_the_bits_of_one(&Device::cpu_guarded());
}

#[test]
fn gpu_two_tensors_have_the_bits_of_their_concatenation() {
    gpu::each("two tensors", |device| {
        two_tensors_have_the_bits_of_one(device);
        Case::new((SEAMS[1].0, 4), Silu, 0.5, 1.0).pass_in_two(device, 3).flat()
    });
}

/// The channels of both tensors for those of the first.
#[test]
fn bugs_planted_between_two_tensors_are_noticed() {
    let test = "group_norm::gpu_two_tensors_have_the_bits_of_their_concatenation";
    for (pass, is, reads) in
        [("fwd_moments_f32", 3, 5), ("fwd_apply_bf16", 3, 9), ("bwd_sums_bf16", 3, 10), ("bwd_dx_f32", 5, 12)]
    {
        plant::notices_wrong_parameter(test, &format!("group_norm_{pass}"), is, reads);
    }
    // The channels of both for the first's: fields of `Slab`.
    plant::notices_wrong_parameter(test, "group_norm_fwd_slab_bf16", "7+16", "7+8");
    // The first tensor again.
    plant::notices_wrong_parameter(test, "group_norm_bwd_slab_f32", 14, 13);
}

#[test]
fn bugs_planted_in_slabs_are_noticed() {
    let test = "group_norm::gpu_slabs_agree_where_every_barrier_matters";
    let sums = "group_norm::gpu_leaves_the_sums_over_pixels_to_a_convolution";
    let of = |entry: &str, test: &str, barriers: &[usize]| {
        barriers.iter().for_each(|n| plant::notices_lost_barrier(test, entry, *n));
    };
    of("group_norm_fwd_slab_f32", test, &[0, 1, 2, 3, 4, 5]);
    of("group_norm_bwd_slab_f32", test, &[0, 1, 2, 3, 4, 5]);
    of("group_norm_bwd_slab_f32", sums, &[6, 7]);
    for pass in ["fwd_slab_f32", "bwd_slab_f32"] {
        plant::notices_lost_block(test, &format!("group_norm_{pass}"));
    }
    // The images' shares for the sums over pixels.
    plant::notices_wrong_parameter(sums, "group_norm_bwd_slab_f32", 2, 6);
    // gamma where beta belongs.
    plant::notices_wrong_parameter(test, "group_norm_fwd_slab_f32", 5, 4);
    // The one that waits for the other; for the second tensor that of the first.
    let waits = "group_norm::gpu_adds_gradients_that_wait_on_store";
    plant::notices_wrong_parameter(waits, "group_norm_bwd_slab_f32", 11, 9);
    plant::notices_wrong_parameter(waits, "group_norm_bwd_slab_bf16", 9, 11);
    let both = "group_norm::gpu_adds_gradients_that_wait_to_both_tensors";
    plant::notices_wrong_parameter(both, "group_norm_bwd_slab_bf16", 10, 9);
    // A scale for the threshold, and the other way round.
    let drops = "group_norm::gpu_drops_as_dropout_does";
    plant::notices_wrong_parameter(drops, "group_norm_fwd_slab_bf16", 10, 11);
    plant::notices_wrong_parameter(drops, "group_norm_bwd_slab_f32", 21, 22);
    plant::notices_wrong_parameter(drops, "group_norm_bwd_slab_bf16", 22, 21);
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "group_norm::gpu_agrees_where_every_barrier_matters";
    // The last barrier of fwd_join is there for a third sum.
    let barriers = [("fwd_moments_f32", 1), ("fwd_join", 3), ("bwd_sums_f32", 1), ("bwd_join", 2)];
    for (pass, barriers) in barriers {
        let entry = format!("group_norm_{pass}");
        (0..barriers).for_each(|n| plant::notices_lost_barrier(test, &entry, n));
        plant::notices_lost_block(test, &entry);
    }
    for pass in ["fwd_apply_f32", "bwd_dx_f32"] {
        plant::notices_lost_block(test, &format!("group_norm_{pass}"));
    }
    let scaled = "group_norm::gpu_scales_and_shifts_each_image";
    for pass in ["fwd_scale_shift_f32", "bwd_scale_shift_f32"] {
        plant::notices_lost_block(scaled, &format!("group_norm_{pass}"));
    }
    // gamma where beta belongs; a sum where a product does.
    plant::notices_wrong_parameter(scaled, "group_norm_fwd_scale_shift_f32", 3, 2);
    plant::notices(scaled, "group_norm_bwd_scale_shift_f32", "mul.f32", "add.f32");
}
