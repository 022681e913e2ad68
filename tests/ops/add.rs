use ddpm_cuda::device::Device;
use ddpm_cuda::error::Result;
use ddpm_cuda::ops::add::{add, reference};
use ddpm_cuda::params::{Param, ParamGrads, Params, Specs};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{Shape, Tensor};

use ddpm_cuda::ops::concat::concat;
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};

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

/// The parameters' gradients of 40 layers are 80 sums, which take two launches: f32 parts of weights, f64 parts of
/// biases, more than eight of each, of up to 33 channels, and the second time added to the first. Weights of zero and
/// whole numbers everywhere else make every sum exact in any order.
#[test]
fn gpu_adds_up_parts() {
    const LAYERS: usize = 40;
    let xs = Shape::new(20, 13, 5, 3);
    let width = |layer: usize| if layer == 7 { 33 } else { 1 + layer % 3 };
    let whole = |seed, len| numbers(seed, len).iter().map(|v| (3.0 * v).round() as f32).collect::<Vec<f32>>();
    let zeros = |shape: Shape| (shape, vec![0.0; shape.len()]);
    let params: Vec<_> = (0..LAYERS)
        .flat_map(|layer| [Shape::new(width(layer), 1, 1, xs.c), Shape::vector(width(layer))].map(zeros))
        .collect();
    let columns: usize = (0..LAYERS).map(width).sum();
    let (x, dy) = (whole(1, xs.len()), whole(2, xs.rows() * columns));
    same_as_the_cpu("sums of parts", &[(xs, x)], &params, &dy, 2, |tape, x, p| {
        let layer = |p: &[Param]| conv2d(tape, &x[0], p[0], p[1], Geometry::POINTWISE, Plus::default());
        let mut ys = p.chunks(2).map(layer).collect::<Result<Vec<_>>>()?;
        while ys.len() > 1 {
            let mut join = |ys: &[Var]| if let [a, b] = ys { concat(tape, a, b) } else { Ok(ys[0].clone()) };
            ys = ys.chunks(2).map(&mut join).collect::<Result<_>>()?;
        }
        Ok(ys.remove(0))
    });
}

#[test]
fn planted_bugs_are_noticed() {
    plant::notices("add::gpu_has_the_bits_of_the_cpu", "add_fwd_f32", "add.f32", "sub.f32");
    plant::notices("add::gpu_adds_gradients_in_place", "add_fwd_bf16", "add.f32", "mul.f32");
    plant::notices_lost_block("add::gpu_has_the_bits_of_the_cpu", "add_fwd_f32");
    plant::notices_lost_block("add::gpu_adds_gradients_in_place", "add_fwd_bf16");
    let parts = "add::gpu_adds_up_parts";
    plant::notices_lost_barrier(parts, "add_parts", 0);
    plant::notices_lost_last_barrier(parts, "add_parts");
    plant::notices_lost_block(parts, "add_parts");
    // Every sum is added to what is there: it takes the count for the flag. Parts of f64 read as f32.
    plant::notices(parts, "add_parts", "[%rd2+16]", "[%rd2+8]");
    plant::notices(parts, "add_parts", "[%rd46+44]", "[%rd46+40]");
}
