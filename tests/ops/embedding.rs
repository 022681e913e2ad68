use ddpm_cuda::ops::embedding::{embedding, reference};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{
    Pass, close, finite_differences, numbers, same_bits, same_bits_at_any_number_of_threads, through_tape, to_f32,
};

/// Classes, channels, labels: one of each; classes that nobody has, one that three have.
const CASES: [(usize, usize, &[u32]); 3] = [(1, 1, &[0]), (5, 7, &[3, 0, 3, 4, 3]), (10, 130, &[9, 1, 9])];

fn pass((classes, c, labels): (usize, usize, &[u32]), passes: usize) -> (Pass, [Vec<f64>; 3]) {
    let (table, x, dy) = (numbers(1, classes * c), numbers(2, labels.len() * c), numbers(3, labels.len() * c));
    let inputs = [(Shape::new(labels.len(), 1, 1, c), to_f32(&x))];
    let params = [(Shape::new(classes, 1, 1, c), to_f32(&table))];
    let classes_of: Vec<f32> = labels.iter().map(|&label| label as f32).collect();
    let op = |tape: &mut Tape<'_>, x: &[_], p: &[_]| {
        let labels = Tensor::from_slice(tape.device(), Shape::new(labels.len(), 1, 1, 1), &classes_of)?;
        embedding(tape, p[0], &labels, &x[0])
    };
    (through_tape(&inputs, &params, &to_f32(&dy), passes, op), [table, x, dy])
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
        // Two passes are one pass over every image twice.
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
