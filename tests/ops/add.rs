use ddpm_cuda::device::Device;
use ddpm_cuda::ops::add::{add, reference};
use ddpm_cuda::params::{ParamGrads, Params, Specs};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{numbers, same_bits, to_f32};

const SHAPES: [Shape; 4] =
    [Shape::new(1, 1, 1, 1), Shape::new(2, 3, 5, 7), Shape::new(1, 1, 1, 17), Shape::new(3, 32, 32, 11)];

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
