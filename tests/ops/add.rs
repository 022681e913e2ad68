use ddpm_cuda::device::Device;
use ddpm_cuda::ops::add::{add, reference};
use ddpm_cuda::params::{ParamGrads, Params, Specs};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use ddpm_cuda::ops::concat::concat;

use crate::support::{numbers, plant, same_as_the_cpu, same_bits, to_f32};

/// One element; primes; a block of 1,024 elements and one beyond it; several tasks.
const SHAPES: [Shape; 6] = [
    Shape::new(1, 1, 1, 1),
    Shape::new(2, 3, 5, 7),
    Shape::new(1, 1, 1, 17),
    Shape::new(1, 1, 1, 1025),
    Shape::new(1, 4, 4, 64),
    Shape::new(3, 32, 32, 11),
];

#[test]
fn sums_and_hands_the_gradient_to_both() {
    for shape in SHAPES {
        let device = Device::cpu_guarded();
        let params = Params::zeros(&device, Specs::default()).unwrap();
        let (a, b, dy) = (numbers(1, shape.len()), numbers(2, shape.len()), numbers(3, shape.len()));
        let [a, b, dy] = [a, b, dy].map(|x| Tensor::from_slice(&device, shape, &to_f32(&x)).unwrap());
        let mut tape = Tape::recording(&device, &params);
        let (a, b) = (tape.leaf(a), tape.leaf(b));
        let y = add(&mut tape, &a, &b).unwrap();
        same_bits("y", y.data(), &reference::forward(a.data(), b.data()));
        // The same value twice: the tape adds the two gradients.
        let z = add(&mut tape, &y, &y).unwrap();
        let mut leaves = tape.backward(&z, dy.clone(), &mut ParamGrads::new(&device, params.specs()).unwrap()).unwrap();
        let twice: Vec<f32> = dy.data().iter().map(|v| 2.0 * v).collect();
        same_bits("da", leaves.take(&a).unwrap().data(), &twice);
        same_bits("db", leaves.take(&b).unwrap().data(), &twice);
    }
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for shape in SHAPES {
        let [a, b, dy] = [1, 2, 3].map(|seed| to_f32(&numbers(seed, shape.len())));
        let inputs = [(shape, a), (shape, b)];
        same_as_the_cpu(&format!("add, {shape}"), &inputs, &[], &dy, 1, |tape, x, _| add(tape, &x[0], &x[1]));
    }
}

/// The tape adds the second gradient of a value to the first, in place: here the two halves of `dy`.
#[test]
fn gpu_adds_gradients_in_place() {
    for shape in SHAPES {
        let [a, dy] = [(1, shape.len()), (3, 2 * shape.len())].map(|(seed, len)| to_f32(&numbers(seed, len)));
        let name = format!("gradients in place, {shape}");
        same_as_the_cpu(&name, &[(shape, a)], &[], &dy, 1, |tape, x, _| concat(tape, &x[0], &x[0]));
    }
}

#[test]
fn planted_bugs_are_noticed() {
    plant::notices("add::gpu_has_the_bits_of_the_cpu", "add_fwd_f32", "add.f32", "sub.f32");
    plant::notices("add::gpu_adds_gradients_in_place", "add_fwd_bf16", "add.f32", "mul.f32");
    plant::notices_lost_block("add::gpu_has_the_bits_of_the_cpu", "add_fwd_f32");
    plant::notices_lost_block("add::gpu_adds_gradients_in_place", "add_fwd_bf16");
}
