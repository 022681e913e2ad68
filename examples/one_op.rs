//! One operation by hand: a convolution, forward and backward on a tape, compared with its definition.
//!
//! `cargo run --release --example one_op`

use ddpm_cuda::device::Device;
use ddpm_cuda::error::Result;
use ddpm_cuda::ops::conv2d::reference::{self, Inputs};
use ddpm_cuda::ops::conv2d::{Geometry, Plus, conv2d};
use ddpm_cuda::params::{Init, Layout, ParamGrads, Params, Specs};
use ddpm_cuda::tape::Tape;
use ddpm_cuda::tensor::{Shape, Tensor};

fn main() -> Result<()> {
    let device = Device::cpu();

    // Parameters: a weight (c_out, kh, kw, c_in) and a bias in one flat buffer, drawn from a seed.
    let (c_in, c_out) = (3, 8);
    let mut specs = Specs::default();
    let weight = specs.add("w".into(), Shape::new(c_out, 3, 3, c_in), Layout::Conv, Init::FanAvg { scale: 1.0 });
    let bias = specs.add("b".into(), Shape::vector(c_out), Layout::Vector, Init::Zeros);
    let params = Params::init(&device, specs, 1)?;

    // x: two images of 4 x 5 pixels. Its gradient is wanted, so it is a leaf.
    let shape = Shape::new(2, 4, 5, c_in);
    let numbers: Vec<f32> = (0..shape.len()).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut tape = Tape::recording(&device, &params);
    let x = tape.leaf(Tensor::from_slice(&device, shape, &numbers)?);
    let y = conv2d(&mut tape, &x, weight, bias, Geometry::SAME_3X3, Plus::default())?;
    println!("y is {}, the tape keeps {} bytes for the way back", y.shape(), tape.saved()[0].bytes);

    // Backward from dy = 1, which gives the gradient of the sum of y.
    let dy = vec![1.0; y.shape().len()];
    let mut grads = ParamGrads::new(&device, params.specs())?;
    let mut leaves = tape.backward(&y, Tensor::from_slice(&device, y.shape(), &dy)?, &mut grads)?;
    let dx = leaves.take(&x).expect("x is a leaf");
    let flat = grads.finish(params.specs())?.to_vec()?;

    // The definition: plain loops over any float type, here f32.
    let inputs = Inputs {
        x: &numbers[..],
        x_shape: shape,
        weight: params.get(weight),
        weight_shape: params.shape(weight),
        bias: params.get(bias),
        shift: None,
        residual: None,
        geometry: Geometry::SAME_3X3,
    };
    let want = reference::backward(&inputs, &dy);
    let farthest = |got: &[f32], want: &[f32]| got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("y  is within {:.1e} of its definition", farthest(y.data(), &reference::forward(&inputs)));
    println!("dx is within {:.1e}", farthest(dx.data(), &want.x));
    println!("dw is within {:.1e}", farthest(&flat[params.specs().range(weight)], &want.weight));
    println!("db is within {:.1e}", farthest(&flat[params.specs().range(bias)], &want.bias));
    Ok(())
}
