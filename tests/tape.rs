//! The tape: what it saves, when that is released, how the gradients of one value are summed.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::device::Device;
use ddpm_cuda::error::Result;
use ddpm_cuda::ops::add::add;
use ddpm_cuda::ops::attention::attention;
use ddpm_cuda::ops::concat::concat;
use ddpm_cuda::ops::dropout::dropout;
use ddpm_cuda::ops::embedding::embedding;
use ddpm_cuda::ops::group_norm::{Activation, group_norm};
use ddpm_cuda::ops::linear::linear;
use ddpm_cuda::ops::silu::{self, silu};
use ddpm_cuda::ops::time_embedding::{Sinusoid, time_embedding};
use ddpm_cuda::ops::upsample::upsample;
use ddpm_cuda::params::{Init, Layout, Param, ParamGrads, Params, Specs};
use ddpm_cuda::rng::{Purpose, Streams};
use ddpm_cuda::tape::{Backward, Grads, Tape, Var, VarId};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::UNet;

use support::{gpu, numbers, per_image, same_bits, to_f32};

const SHAPE: Shape = Shape::new(2, 6, 5, 8);
const CLASSES: usize = 3;
const GROUPS: usize = 4;

/// Parameters for [`chain`].
struct Weights {
    gamma: Param,
    beta: Param,
    table: Param,
    linear: Param,
}

fn weights(device: &Device) -> (Weights, Params) {
    let mut specs = Specs::default();
    let mut add = |shape| specs.add("p".into(), shape, Layout::Vector, Init::Zeros);
    let vector = Shape::vector(SHAPE.c);
    let weights = Weights {
        gamma: add(vector),
        beta: add(vector),
        table: add(Shape::new(CLASSES, 1, 1, SHAPE.c)),
        linear: add(Shape::new(SHAPE.c, 1, 1, 2 * SHAPE.c)),
    };
    let mut params = Params::zeros(device, specs).unwrap();
    for p in [weights.gamma, weights.beta, weights.table, weights.linear] {
        let values = to_f32(&numbers(7, params.shape(p).len()));
        params.get_mut(p).copy_from_slice(&values);
    }
    (weights, params)
}

/// A chain of operations in which values are used twice and three times. Returns an image and a vector.
fn chain(tape: &mut Tape<'_>, w: &Weights, x: &Var) -> [Var; 2] {
    tape.at("first");
    let h = group_norm(tape, x, w.gamma, w.beta, GROUPS, 1e-6, Activation::Silu).unwrap();
    let streams = Streams { seed: 1, purpose: Purpose::Dropout, step: 0, first: 0 };
    let h = dropout(tape, &h, 0.1, streams).unwrap();
    let h = attention(tape, &h, &h, &h, 2).unwrap();
    tape.at("second");
    let h = concat(tape, &h, x).unwrap();
    let h = linear(tape, &h, w.linear, None, Some(x)).unwrap();
    let h = add(tape, &h, x).unwrap();
    let y = upsample(tape, &h).unwrap();
    let [t, labels] = [[3.0, 500.0], [2.0, 0.0]].map(|numbers| per_image(tape.device(), numbers));
    let t = Var::constant(time_embedding(tape.device(), &t, SHAPE.c, Sinusoid::default()).unwrap());
    let t = embedding(tape, w.table, &labels, &t).unwrap();
    [y, silu(tape, &t).unwrap()]
}

/// One training step: forward, backward from the image. Returns the gradient of `x`.
fn step(device: &Device, w: &Weights, params: &Params, grads: &mut ParamGrads) -> Vec<f32> {
    let mut tape = Tape::recording(device, params);
    let x = tape.leaf(Tensor::from_slice(device, SHAPE, &to_f32(&numbers(1, SHAPE.len()))).unwrap());
    let [y, _] = chain(&mut tape, w, &x);
    let dy = Tensor::from_slice(device, y.shape(), &to_f32(&numbers(2, y.shape().len()))).unwrap();
    tape.backward(&y, dy, grads).unwrap().take(&x).expect("the gradient of x").data().to_vec()
}

#[test]
fn saved_bytes_are_listed_by_operation_and_place() {
    let device = Device::cpu_guarded();
    let (w, params) = weights(&device);
    let mut tape = Tape::recording(&device, &params);
    let x = tape.leaf(Tensor::zeros(&device, SHAPE).unwrap());
    chain(&mut tape, &w, &x);
    let listed: Vec<_> = tape.saved().into_iter().map(|s| (s.place, s.name, s.bytes)).collect();
    let (tensor, n, heads) = (4 * SHAPE.len(), SHAPE.n, 2);
    let expected = [
        // x; for each image and group the mean as two f32 and rstd.
        ("first", "group_norm", tensor + 4 * n * GROUPS * 3),
        ("first", "dropout", 0),
        // q, k and v, one tensor here; for each row of scores its maximum and the reciprocal sum of exponentials.
        ("first", "attention", tensor + 4 * n * heads * 2 * SHAPE.pixels()),
        ("second", "concat", 0),
        ("second", "linear", 2 * tensor),
        ("second", "add", 0),
        ("second", "upsample", 0),
        // Labels.
        ("second", "embedding", 4 * n),
        ("second", "silu", 4 * n * SHAPE.c),
    ];
    assert_eq!(listed, expected.map(|(place, name, bytes)| (place.to_string(), name, bytes)));
}

#[test]
fn nothing_is_saved_without_recording() {
    let device = Device::cpu_guarded();
    let (w, params) = weights(&device);
    let mut tape = Tape::inference(&device, &params);
    let x = tape.leaf(Tensor::zeros(&device, SHAPE).unwrap());
    let idle = device.pool_stats().in_use;
    let outputs = chain(&mut tape, &w, &x);
    assert!(tape.saved().is_empty() && outputs.iter().all(|y| y.id().is_none()));
    // Buffers are whole lines of 64 bytes between two guard lines, rounded up by at most an eighth.
    let held: u64 = outputs.iter().map(|y| y.value().bytes().next_multiple_of(64) as u64 + 128).sum();
    let in_use = device.pool_stats().in_use - idle;
    assert!((held..=held + held / 8).contains(&in_use), "{in_use} bytes are held, the outputs are {held}");
}

#[test]
fn nothing_saved_remains_after_backward() {
    let device = Device::cpu_guarded();
    let (w, params) = weights(&device);
    let mut grads = ParamGrads::new(&device, params.specs()).unwrap();
    let idle = device.pool_stats().in_use;
    step(&device, &w, &params, &mut grads);
    assert_eq!(device.pool_stats().in_use, idle);
}

/// A tape dropped without a backward pass (an abandoned step) also releases what it saved.
#[test]
fn nothing_saved_remains_after_a_step_given_up() {
    let device = Device::cpu_guarded();
    let (w, params) = weights(&device);
    let idle = device.pool_stats().in_use;
    let mut tape = Tape::recording(&device, &params);
    let x = tape.leaf(Tensor::zeros(&device, SHAPE).unwrap());
    drop((chain(&mut tape, &w, &x), x, tape));
    assert_eq!(device.pool_stats().in_use, idle);
}

/// An identity whose backward pass records how many bytes of the pool are in use.
struct Probe {
    x: VarId,
    device: Device,
    in_use: Arc<AtomicU64>,
}

impl Backward for Probe {
    fn name(&self) -> &'static str {
        "probe"
    }

    fn saved(&self) -> Vec<&Tensor> {
        Vec::new()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        self.in_use.store(self.device.pool_stats().in_use, Ordering::Relaxed);
        grads.add(self.x, dy)
    }
}

/// When the backward pass reaches the start of a chain, everything the chain saved has been released.
#[test]
fn activations_are_given_back_as_soon_as_their_gradient_is_done() {
    let device = Device::cpu();
    let params = Params::zeros(&device, Specs::default()).unwrap();
    let mut grads = ParamGrads::new(&device, params.specs()).unwrap();
    let in_use = Arc::new(AtomicU64::new(0));
    let mut tape = Tape::recording(&device, &params);
    let x = tape.leaf(Tensor::zeros(&device, SHAPE).unwrap());
    let save = || Probe { x: x.id().unwrap(), device: device.clone(), in_use: in_use.clone() };
    let mut y = tape.push("probe", x.value().clone(), save).unwrap();
    for _ in 0..40 {
        y = silu(&mut tape, &y).unwrap();
    }
    let tensor = 4 * SHAPE.len() as u64;
    assert!(device.pool_stats().in_use >= 41 * tensor, "the chain saves less than this test thinks");
    let dy = Tensor::zeros(&device, SHAPE).unwrap();
    drop(tape.backward(&y, dy, &mut grads).unwrap());
    // x, y and the current gradient, each in whole lines of 64 bytes.
    assert_eq!(in_use.load(Ordering::Relaxed), 3 * tensor.next_multiple_of(64));
}

#[test]
fn the_pool_allocates_nothing_from_the_second_step_on() {
    let device = Device::cpu_guarded();
    let (w, params) = weights(&device);
    let mut grads = ParamGrads::new(&device, params.specs()).unwrap();
    let first = step(&device, &w, &params, &mut grads);
    let misses = device.pool_stats().misses;
    for _ in 0..3 {
        grads.reset();
        same_bits("dx of a later step", &step(&device, &w, &params, &mut grads), &first);
        assert_eq!(device.pool_stats().misses, misses);
    }
}

/// z = silu(x) + x uses x twice, and y = z + z: the gradient of x is 2 dy silu'(x) + 2 dy.
#[test]
fn gradients_of_a_value_used_twice_are_added() {
    let device = Device::cpu_guarded();
    let params = Params::zeros(&device, Specs::default()).unwrap();
    let mut tape = Tape::recording(&device, &params);
    let exact = numbers(1, SHAPE.len());
    let x = tape.leaf(Tensor::from_slice(&device, SHAPE, &to_f32(&exact)).unwrap());
    let s = silu(&mut tape, &x).unwrap();
    let z = add(&mut tape, &s, &x).unwrap();
    let y = add(&mut tape, &z, &z).unwrap();
    let dy = numbers(2, SHAPE.len());
    let given = Tensor::from_slice(&device, SHAPE, &to_f32(&dy)).unwrap();
    let mut leaves = tape.backward(&y, given.clone(), &mut ParamGrads::new(&device, params.specs()).unwrap()).unwrap();
    let oracle: Vec<f64> =
        silu::reference::backward(&exact, &dy).iter().zip(&dy).map(|(a, b)| 2.0 * a + 2.0 * b).collect();
    // |silu'| < 1.1 errs by at most 11 roundings of its terms here (|x| <= 1), the sums by one each.
    support::worst("dx", leaves.take(&x).unwrap().data(), &oracle, |_| 2.0 * 16.0 * support::F32_ROUNDING);
    same_bits("the gradient that was given, which another handle still shares", given.data(), &to_f32(&dy));
}

#[test]
fn a_leaf_that_nothing_reaches_has_no_gradient() {
    let device = Device::cpu_guarded();
    let params = Params::zeros(&device, Specs::default()).unwrap();
    let mut tape = Tape::recording(&device, &params);
    let [used, unused] = [0, 1].map(|_| tape.leaf(Tensor::zeros(&device, SHAPE).unwrap()));
    let y = silu(&mut tape, &used).unwrap();
    silu(&mut tape, &unused).unwrap();
    let dy = Tensor::zeros(&device, SHAPE).unwrap();
    let mut leaves = tape.backward(&y, dy, &mut ParamGrads::new(&device, params.specs()).unwrap()).unwrap();
    assert!(leaves.take(&used).is_some() && leaves.take(&unused).is_none());
}

#[test]
fn the_first_output_that_is_not_finite_is_named() {
    let device = Device::cpu_guarded();
    let params = Params::zeros(&device, Specs::default()).unwrap();
    let mut tape = Tape::inspecting(&device, &params);
    let mut x = Tensor::zeros(&device, Shape::vector(5)).unwrap();
    x.data_mut()[3] = f32::INFINITY;
    let x = tape.leaf(x);
    tape.at("down_blocks.0");
    let message = silu(&mut tape, &x).unwrap_err().to_string();
    for part in ["output of silu", "down_blocks.0", "1x1x1x5", "element 3 is inf"] {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

/// A whole network, backwards for its input alone: the same bits of its gradient, and none of a parameter.
#[test]
fn a_leafs_gradient_does_not_depend_on_those_of_parameters() {
    let mut config = support::tiny(8, 8, 3);
    config.model.classes = CLASSES;
    let on = |device: &Device| {
        let (unet, specs) = UNet::new(&config.model).unwrap();
        let params = Params::init(device, specs.clone(), 2).unwrap();
        let shape = Shape::new(2, 8, 8, 3);
        let upload = |numbers: &[f32]| Tensor::from_slice_as(device, device.activations(), shape, numbers).unwrap();
        let x = to_f32(&numbers(1, shape.len()));
        let dy = to_f32(&numbers(2, shape.len()));
        let gradient = |grads: Option<&mut ParamGrads>| {
            let mut tape = Tape::recording(device, &params);
            let leaf = tape.leaf(upload(&x));
            let t = Tensor::full(device, Shape::new(2, 1, 1, 1), 3.0).unwrap();
            let labels = Conditioning::from_labels(device, Some(&[0, 2])).unwrap();
            let y = unet.forward(&mut tape, &leaf, &t, &labels, None).unwrap();
            let mut leaves = match grads {
                Some(grads) => tape.backward(&y, upload(&dy), grads).unwrap(),
                None => tape.backward_to_leaves(&y, upload(&dy)).unwrap(),
            };
            leaves.take(&leaf).expect("the input reaches the output").to_vec().unwrap()
        };
        let mut grads = ParamGrads::new(device, &specs).unwrap();
        let with = gradient(Some(&mut grads));
        assert!(with.iter().any(|dx| *dx != 0.0));
        same_bits("gradient of the input", &gradient(None), &with);
    };
    on(&Device::cpu());
    for dtype in [DType::F32, DType::Bf16] {
        let Some(gpu) = gpu::gpu(dtype) else { return };
        on(&Device::Cuda(gpu));
    }
}
