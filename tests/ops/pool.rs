use ddpm_cuda::error::Result;
use ddpm_cuda::ops::pool::{first, reference, tokens};
use ddpm_cuda::params::Param;
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    Pass, close, finite_differences, numbers, plant, same_as_the_cpu, same_bits, same_bits_at_any_number_of_threads,
    through_tape, to_f32,
};

/// Images of one pixel; primes; one channel beyond a block of 256; several blocks of images.
const SHAPES: [Shape; 5] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(3, 2, 5, 7),
    Shape::new(2, 3, 3, 257),
    Shape::new(5, 7, 7, 64),
    Shape::new(131, 1, 3, 2),
];

fn pool_tokens(tape: &mut Tape<'_>, x: &[Var], p: &[Param]) -> Result<Var> {
    tokens(tape, &x[0], p[0])
}

fn pool_first(tape: &mut Tape<'_>, x: &[Var], _: &[Param]) -> Result<Var> {
    first(tape, &x[0])
}

/// x, positions and dy of `tokens`.
fn data(xs: Shape) -> [(Shape, Vec<f64>); 3] {
    let (position, ys) = (Shape::new(xs.pixels() + 1, 1, 1, xs.c), Shape::new(xs.n, 1, xs.pixels() + 1, xs.c));
    [(xs, 1), (position, 2), (ys, 3)].map(|(shape, seed)| (shape, numbers(seed, shape.len())))
}

fn pass(xs: Shape, passes: usize) -> (Pass, [Vec<f64>; 3]) {
    let data = data(xs);
    let [x, position, dy] = data.each_ref().map(|(shape, x)| (*shape, to_f32(x)));
    (through_tape(&[x], &[position], &dy.1, passes, pool_tokens), data.map(|(_, x)| x))
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for xs in SHAPES {
        let (pixels, c) = (xs.pixels(), xs.c);
        let (got, [x, position, dy]) = pass(xs, 1);
        let forward = |x: &[f64], e: &[f64]| reference::tokens(x, e, pixels, c);
        let yardstick = reference::tokens(&to_f32(&x), &to_f32(&position), pixels, c);
        close("y", &got.y, &forward(&x, &position), &yardstick);
        let ([dx, de], [dx_f32, de_f32]) =
            (reference::tokens_backward(&dy, pixels, c), reference::tokens_backward(&to_f32(&dy), pixels, c));
        close("dx", &got.dx[0], &dx, &dx_f32);
        close("d position", &got.dw[0], &de, &de_f32);

        // The tokens' shape as the input of `first`, and the images' first pixels as its gradient.
        let (ys, dfirst) = (Shape::new(xs.n, 1, pixels + 1, c), numbers(4, xs.n * c));
        let got = through_tape(&[(ys, to_f32(&dy))], &[], &to_f32(&dfirst), 1, pool_first);
        same_bits("the first token", &got.y, &reference::first(&to_f32(&dy), pixels + 1, c));
        same_bits("its gradient", &got.dx[0], &reference::first_backward(&to_f32(&dfirst), pixels + 1, c));
    }
}

#[test]
fn the_gradient_of_the_positions_accumulates() {
    let (twice, [_, _, dy]) = pass(SHAPES[1], 2);
    // Two passes equal one pass over every image twice.
    let dy = [&dy[..], &dy[..]].concat();
    let ([_, want], [_, yardstick]) =
        (reference::tokens_backward(&dy, 10, 7), reference::tokens_backward(&to_f32(&dy), 10, 7));
    close("d position", &twice.dw[0], &want, &yardstick);
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let (n, pixels, c) = (2, 3, 4);
    let dy = numbers(3, n * (pixels + 1) * c);
    let dot = |y: Vec<f64>, dy: &[f64]| y.iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>();
    let f = |x: &[Vec<f64>]| dot(reference::tokens(&x[0], &x[1], pixels, c), &dy);
    let inputs = [numbers(1, n * pixels * c), numbers(2, (pixels + 1) * c)];
    finite_differences("tokens", f, &inputs, &reference::tokens_backward(&dy, pixels, c));
    let dfirst = numbers(5, n * c);
    let f = |x: &[Vec<f64>]| dot(reference::first(&x[0], pixels, c), &dfirst);
    finite_differences("first", f, &inputs[..1], &[reference::first_backward(&dfirst, pixels, c)]);
}

#[test]
#[should_panic(expected = "pool: positions 10x1x1x2 for images 1x3x4x2")]
fn images_of_another_size_are_refused() {
    let x = (Shape::new(1, 3, 4, 2), vec![0.0; 24]);
    through_tape(&[x], &[(Shape::new(10, 1, 1, 2), vec![0.0; 20])], &[0.0; 26], 1, pool_tokens);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("pool", || pass(SHAPES[1], 2).0.flat());
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for xs in SHAPES {
        let [x, position, dy] = data(xs).map(|(shape, x)| (shape, to_f32(&x)));
        for passes in [1, 2] {
            let (x, position) = (std::slice::from_ref(&x), std::slice::from_ref(&position));
            same_as_the_cpu(&format!("tokens of {xs}, {passes} passes"), x, position, &dy.1, passes, pool_tokens);
        }
        let dfirst = to_f32(&numbers(4, xs.n * xs.c));
        same_as_the_cpu(&format!("the first of {xs}"), std::slice::from_ref(&dy), &[], &dfirst, 1, pool_first);
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "pool::gpu_has_the_bits_of_the_cpu";
    // Pixels and channels change places; the positions' gradient is added to stale values.
    plant::notices_wrong_parameter(test, "pool_tokens_fwd_f32", 4, 5);
    plant::notices_wrong_parameter(test, "pool_tokens_bwd_dx_bf16", 3, 4);
    plant::notices_wrong_parameter(test, "pool_tokens_bwd_position_f32", 5, 4);
    plant::notices_lost_block(test, "pool_tokens_fwd_bf16");
    plant::notices_lost_block(test, "pool_tokens_bwd_dx_f32");
    plant::notices_lost_block(test, "pool_tokens_bwd_position_bf16");
    plant::notices_lost_block(test, "pool_first_fwd_f32");
    plant::notices_wrong_parameter(test, "pool_first_fwd_bf16", 3, 4);
    plant::notices_lost_block(test, "pool_first_bwd_bf16");
    plant::notices_wrong_parameter(test, "pool_first_bwd_f32", 3, 4);
}
