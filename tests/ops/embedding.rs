use ddpm_cuda::error::Result;
use ddpm_cuda::ops::embedding::{embedding, reference};
use ddpm_cuda::params::Param;
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::Shape;

use crate::support::{
    Pass, close, finite_differences, numbers, per_image, plant, same_as_the_cpu, same_bits,
    same_bits_at_any_number_of_threads, through_tape, to_f32,
};

/// Classes, channels, labels. One of each; classes with no image and one with three; one element beyond a block of 256;
/// several blocks.
const CASES: [(usize, usize, &[u32]); 5] = [
    (1, 1, &[0]),
    (5, 7, &[3, 0, 3, 4, 3]),
    (10, 130, &[9, 1, 9]),
    (1, 257, &[0, 0]),
    (3, 512, &[2, 0, 1, 1, 2, 2, 2]),
];

/// `x + table[labels]`.
fn op(labels: &[u32]) -> impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Result<Var> {
    |tape, x, p| embedding(tape, p[0], &per_image(tape.device(), labels.iter().map(|&label| label as f32)), &x[0])
}

/// Table, `add_to` and `dy` of a case.
fn data((classes, c, labels): (usize, usize, &[u32])) -> [(Shape, Vec<f64>); 3] {
    let (table, x) = (Shape::new(classes, 1, 1, c), Shape::new(labels.len(), 1, 1, c));
    [(table, 1), (x, 2), (x, 3)].map(|(shape, seed)| (shape, numbers(seed, shape.len())))
}

fn pass(case: (usize, usize, &[u32]), passes: usize) -> (Pass, [Vec<f64>; 3]) {
    let data = data(case);
    let [table, x, dy] = data.each_ref().map(|(shape, x)| (*shape, to_f32(x)));
    (through_tape(&[x], &[table], &dy.1, passes, op(case.2)), data.map(|(_, x)| x))
}

#[test]
fn the_cpu_path_agrees_with_the_reference() {
    for case in CASES {
        let (classes, c, labels) = case;
        let (got, [table, x, dy]) = pass(case, 1);
        same_bits("y", &got.y, &reference::forward(&to_f32(&table), labels, &to_f32(&x), c));
        same_bits("d add_to", &got.dx[0], &to_f32(&dy));
        let yardstick = reference::backward(labels, &to_f32(&dy), classes, c);
        close("d table", &got.dw[0], &reference::backward(labels, &dy, classes, c), &yardstick);
        for (class, row) in got.dw[0].chunks_exact(c).enumerate() {
            let used = labels.contains(&(class as u32));
            assert!(used || row.iter().all(|&v| v == 0.0), "class {class}, which no image has, got a gradient");
        }
    }
}

#[test]
fn the_table_gradient_accumulates() {
    for case in CASES {
        let (_, c, labels) = case;
        let (twice, [_, _, dy]) = pass(case, 2);
        // Two passes equal one pass over every image twice.
        let (labels, dy) = ([labels, labels].concat(), [&dy[..], &dy[..]].concat());
        let yardstick = reference::backward(&labels, &to_f32(&dy), case.0, c);
        close("d table", &twice.dw[0], &reference::backward(&labels, &dy, case.0, c), &yardstick);
    }
}

#[test]
fn the_reference_agrees_with_finite_differences() {
    let (classes, c, labels) = CASES[1];
    let dy = numbers(3, labels.len() * c);
    let f = |x: &[Vec<f64>]| reference::forward(&x[0], labels, &x[1], c).iter().zip(&dy).map(|(y, dy)| y * dy).sum();
    let gradients = [reference::backward(labels, &dy, classes, c), dy.clone()];
    finite_differences("embedding", f, &[numbers(1, classes * c), numbers(2, labels.len() * c)], &gradients);
}

#[test]
#[should_panic(expected = "label 3 with a table of 3 classes")]
fn a_label_beyond_the_table_is_refused() {
    pass((3, 2, &[0, 3]), 1);
}

#[test]
fn the_same_bits_at_any_number_of_threads() {
    same_bits_at_any_number_of_threads("embedding", || pass(CASES[1], 2).0.flat());
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for case in CASES {
        let [table, x, dy] = data(case).map(|(shape, x)| (shape, to_f32(&x)));
        for passes in [1, 2] {
            let name = format!("embedding, {case:?}, {passes} passes");
            same_as_the_cpu(&name, std::slice::from_ref(&x), std::slice::from_ref(&table), &dy.1, passes, op(case.2));
        }
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "embedding::gpu_has_the_bits_of_the_cpu";
    plant::notices(test, "embedding_fwd_f32", "add.f32", "sub.f32");
    // Adds to stale values: the number of channels in place of the flag.
    plant::notices_wrong_parameter(test, "embedding_bwd_f32", 6, 5);
    plant::notices(test, "embedding_bwd_bf16", "add.f32", "sub.f32");
    plant::notices_lost_block(test, "embedding_fwd_bf16");
    plant::notices_lost_block(test, "embedding_bwd_f32");
}
