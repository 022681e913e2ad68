//! The whole network against another implementation: outputs and every gradient that PyTorch computed in float64 for
//! diffusers' `UNet2DModel` with random parameters, to 2e-5 of each tensor's largest element.

mod support;

use std::path::{Path, PathBuf};

use ddpm_cuda::checkpoint;
use ddpm_cuda::device::Device;
use ddpm_cuda::layout;
use ddpm_cuda::params::{Layout, ParamGrads};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{Shape, Tensor};
use ddpm_cuda::unet::UNet;
use safetensors::SafeTensors;

use support::{close_to_largest, same_bits, worst};

/// What an implementation in f32 can be held to: the fixtures' own sines are f32, and sums of some thousand products
/// in f32 differ by about 1e-6 of the largest element, which a network of thirty layers carries on.
const FIXTURE_TOLERANCE: f64 = 2e-5;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Inputs and expected numbers of a fixture.
struct Golden(Vec<u8>);

impl Golden {
    fn read(name: &str) -> Self {
        Golden(std::fs::read(fixture(name).join("io.safetensors")).unwrap())
    }

    fn f32(&self, key: &str) -> Vec<f32> {
        bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&self.0).unwrap().tensor(key).unwrap().data())
    }

    fn i32(&self, key: &str) -> Vec<i32> {
        bytemuck::pod_collect_to_vec(SafeTensors::deserialize(&self.0).unwrap().tensor(key).unwrap().data())
    }

    fn has(&self, key: &str) -> bool {
        SafeTensors::deserialize(&self.0).unwrap().tensor(key).is_ok()
    }

    /// A stack of images, from (n, c, h, w) to (n, h, w, c).
    fn images(&self, key: &str) -> (Shape, Vec<f32>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let [n, c, h, w] = tensors.tensor(key).unwrap().shape().try_into().unwrap();
        (Shape::new(n, h, w, c), layout::to_channels_last(&self.f32(key), c, h * w))
    }

    fn labels(&self) -> Option<Vec<u32>> {
        self.has("labels").then(|| self.i32("labels").iter().map(|&l| l as u32).collect())
    }
}

fn agrees_with_pytorch(name: &str) {
    let device = Device::cpu_guarded();
    let golden = Golden::read(name);
    let model = checkpoint::load(&device, &fixture(name)).unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let specs = model.params.specs();
    let (shape, x) = golden.images("x");
    let (_, target) = golden.images("target");
    let t: Vec<f32> = golden.i32("t").iter().map(|&t| t as f32).collect();

    let mut tape = Tape::recording(&device, &model.params);
    let x = tape.leaf(Tensor::from_slice(&device, shape, &x));
    let y = unet.forward(&mut tape, &x, &t, golden.labels().as_deref(), None).unwrap();
    let mut shares =
        vec![("out".to_string(), close_to_largest("out", y.data(), &golden.images("out").1, FIXTURE_TOLERANCE))];

    let dy: Vec<f32> = y.data().iter().zip(&target).map(|(y, t)| 2.0 * (y - t) / shape.len() as f32).collect();
    let mut grads = ParamGrads::new(&device, specs);
    let mut leaves = tape.backward(&y, Tensor::from_slice(&device, shape, &dy), &mut grads).unwrap();
    let dx = leaves.take(&x).unwrap();
    shares.push(("dx".into(), close_to_largest("dx", dx.data(), &golden.images("grad_x").1, FIXTURE_TOLERANCE)));
    let flat = grads.finish(specs);
    let largest = |x: &[f32]| x.iter().fold(0.0, |m: f64, v| m.max(f64::from(v.abs())));
    let block = |name: &str| name.split('.').take(4).collect::<Vec<_>>().join(".");
    let mut of_block = std::collections::HashMap::new();
    for (_, spec) in specs.iter() {
        let scale: &mut f64 = of_block.entry(block(&spec.name)).or_default();
        *scale = scale.max(largest(&golden.f32(&format!("grad.{}", spec.name))));
    }
    for (p, spec) in specs.iter() {
        let mut want = golden.f32(&format!("grad.{}", spec.name));
        if spec.layout == Layout::Conv {
            want = layout::to_channels_last(&want, spec.shape.c, spec.shape.pixels());
        }
        let got = &flat[specs.range(p)];
        // Some true gradients are zero: softmax does not see the keys' bias, and a group norm of one channel a group sees
        // no shift of a channel. What either implementation has there is the rounding of sums that cancel, so its scale
        // is that of the other gradients of the block.
        let scale = of_block[&block(&spec.name)];
        let share = if largest(&want) > 1e-9 * scale {
            close_to_largest(&spec.name, got, &want, FIXTURE_TOLERANCE)
        } else {
            worst(&spec.name, got, &vec![0.0; got.len()], |_| FIXTURE_TOLERANCE * scale)
        };
        shares.push((spec.name.clone(), share));
    }
    let (name_of_worst, share) = shares.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    println!("{name}: {} tensors, the worst is {name_of_worst} with {share:.3} of the tolerance", shares.len());
}

#[test]
fn grey_network_agrees_with_pytorch() {
    agrees_with_pytorch("unet_gray16");
}

#[test]
fn class_conditional_network_with_heads_agrees_with_pytorch() {
    agrees_with_pytorch("unet_rgb16");
}

/// A checkpoint that `ddpm-cuda train` wrote (non-square images, classes, heads) and what diffusers' `DDPMPipeline` computes with
/// it. That today's program would write the same files, and so that diffusers would open them, is the second half.
#[test]
fn diffusers_opens_our_checkpoints_and_computes_the_same() {
    let device = Device::cpu_guarded();
    let folder = fixture("written_here");
    let golden = Golden::read("written_here");
    let model = checkpoint::load(&device, &folder).unwrap();
    let (unet, specs) = UNet::new(&model.config.model).unwrap();
    let (shape, x) = golden.images("x");
    let t: Vec<f32> = golden.i32("t").iter().map(|&t| t as f32).collect();
    let mut tape = Tape::inference(&device, &model.params);
    let x = Var::constant(Tensor::from_slice(&device, shape, &x));
    let y = unet.forward(&mut tape, &x, &t, golden.labels().as_deref(), None).unwrap();
    close_to_largest("out", y.data(), &golden.images("out").1, FIXTURE_TOLERANCE);

    let run = tempfile::tempdir().unwrap();
    let zeros = vec![0.0; specs.flat_len()];
    let state = checkpoint::State { step: 3, params: &model.params, ema: &model.params, m: &zeros, v: &zeros };
    let written = checkpoint::save(run.path(), &model.config, state).unwrap();
    for file in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ] {
        assert!(
            std::fs::read(written.join(file)).unwrap() == std::fs::read(folder.join(file)).unwrap(),
            "{file} has changed"
        );
    }
}

/// A sample must not depend on the batch it is computed in, so the network's output for an image may not either.
#[test]
fn an_image_has_the_same_bits_in_any_batch() {
    let device = Device::cpu();
    let golden = Golden::read("unet_rgb16");
    let model = checkpoint::load(&device, &fixture("unet_rgb16")).unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let (shape, x) = golden.images("x");
    let (image, labels) = (shape.len() / shape.n, golden.labels().unwrap());
    let forward = |images: &[usize]| {
        let x: Vec<f32> = images.iter().flat_map(|&i| x[i * image..][..image].to_vec()).collect();
        let t: Vec<f32> = images.iter().map(|&i| 100.0 * i as f32 + 3.0).collect();
        let labels: Vec<u32> = images.iter().map(|&i| labels[i]).collect();
        let x = Var::constant(Tensor::from_slice(&device, Shape { n: images.len(), ..shape }, &x));
        let mut tape = Tape::inference(&device, &model.params);
        unet.forward(&mut tape, &x, &t, Some(&labels), None).unwrap().data().to_vec()
    };
    let alone = forward(&[1]);
    for batch in [vec![1, 0], vec![0, 1], vec![0, 1, 0, 0, 1, 0, 0]] {
        let together = forward(&batch);
        for place in batch.iter().enumerate().filter(|(_, i)| **i == 1).map(|(place, _)| place) {
            same_bits(&format!("{batch:?}"), &together[place * image..][..image], &alone);
        }
    }
}
