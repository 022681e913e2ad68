//! The whole network against another implementation: the output and every gradient that PyTorch computed in float64 for
//! diffusers' `UNet2DModel` with random parameters, within the tolerance of [`support::network`] relative to each
//! tensor's largest element.

mod support;

use ddpm_cuda::checkpoint;
use ddpm_cuda::conditioning::Conditioning;
use ddpm_cuda::config::{ClassEmbedding, Config, MiddleAttention, Model, Preset, Resampling, Size};
use ddpm_cuda::device::Device;
use ddpm_cuda::layout;
use ddpm_cuda::params::{Init, Layout, ParamGrads, Params};
use ddpm_cuda::tape::{Tape, Var};
use ddpm_cuda::tensor::{DType, Shape, Tensor};
use ddpm_cuda::unet::{DropoutSeed, UNet};
use safetensors::SafeTensors;

use support::places::fixture;
use support::{close_to_largest, network, per_image, same_bits, worst};

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

    /// A batch of images, from (n, c, h, w) to (n, h, w, c).
    fn images(&self, key: &str) -> (Shape, Vec<f32>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let [n, c, h, w] = tensors.tensor(key).unwrap().shape().try_into().unwrap();
        (Shape::new(n, h, w, c), layout::to_channels_last(&self.f32(key), c, h * w))
    }

    /// One integer per image.
    fn per_image(&self, device: &Device, key: &str) -> Tensor {
        per_image(device, self.i32(key).into_iter().map(|v| v as f32))
    }

    fn conditioning(&self, device: &Device) -> Conditioning {
        if !self.has("labels") {
            return Conditioning::NONE;
        }
        Conditioning::on_labels(self.per_image(device, "labels"))
    }
}

fn agrees_with_pytorch(name: &str, device: &Device) {
    let golden = Golden::read(name);
    let model = checkpoint::load(device, &fixture(name)).unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let specs = model.params.specs();
    let (shape, x) = golden.images("x");
    let (_, target) = golden.images("target");
    let t = golden.per_image(device, "t");

    let mut tape = Tape::recording(device, &model.params);
    let dtype = device.activations();
    let x = tape.leaf(Tensor::from_slice_as(device, dtype, shape, &x).unwrap());
    let y = unet.forward(&mut tape, &x, &t, &golden.conditioning(device), None).unwrap();
    // In the fixtures' scale-shift norms |1 + scale| is up to 2.2, which multiplies the errors of single channels; the
    // norm that follows a block takes only their mean out again.
    let scaled = dtype == DType::Bf16 && model.config.model.scale_shift_norm;
    let tolerance = network::tolerance(dtype, tape.saved().len()) * if scaled { 2.2 } else { 1.0 };
    let out = y.value().host().unwrap();
    let mut shares = vec![("out".to_string(), close_to_largest("out", &out, &golden.images("out").1, tolerance))];

    let dy: Vec<f32> = out.iter().zip(&target).map(|(y, t)| 2.0 * (y - t) / out.len() as f32).collect();
    let mut grads = ParamGrads::new(device, specs).unwrap();
    let dy = Tensor::from_slice_as(device, dtype, y.shape(), &dy).unwrap();
    let mut leaves = tape.backward(&y, dy, &mut grads).unwrap();
    let dx = leaves.take(&x).unwrap();
    shares.push(("dx".into(), close_to_largest("dx", &dx.host().unwrap(), &golden.images("grad_x").1, tolerance)));
    let flat = grads.finish(specs).unwrap().host().unwrap();
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
        // Some true gradients are zero: softmax is invariant to the bias of the keys, and a group norm with one channel
        // per group to a shift of the channel. Either implementation then has rounding errors of sums that cancel, so
        // the scale is that of the other gradients of the block.
        let scale = of_block[&block(&spec.name)];
        let share = if largest(&want) > 1e-9 * scale {
            close_to_largest(&spec.name, got, &want, tolerance)
        } else {
            worst(&spec.name, got, &vec![0.0; got.len()], |_| tolerance * scale)
        };
        shares.push((spec.name.clone(), share));
    }
    let (name_of_worst, share) = shares.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let derived = network::derived(specs, shape.n * shape.pixels());
    println!(
        "{name}: {} tensors, the worst is {name_of_worst} with {share:.3} of {tolerance:.2e}; for f32 {derived:.2e} is derived",
        shares.len()
    );
    assert!(network::F32 <= derived, "{name}: more is allowed than the derived {derived:e}");
}

#[test]
fn grey_network_agrees_with_pytorch() {
    agrees_with_pytorch("unet_gray16", &Device::cpu_guarded());
}

#[test]
fn class_conditional_network_with_heads_agrees_with_pytorch() {
    agrees_with_pytorch("unet_rgb16", &Device::cpu_guarded());
}

/// Scale-shift norm, residual up- and downsampling, other groups in the middle, classes as timesteps, an output for the
/// variance.
#[test]
fn network_of_dhariwal_and_nichol_agrees_with_pytorch() {
    agrees_with_pytorch("unet_adm", &Device::cpu_guarded());
}

#[test]
fn network_without_a_norm_before_the_middles_attention_agrees_with_pytorch() {
    agrees_with_pytorch("unet_bare", &Device::cpu_guarded());
}

#[test]
fn network_without_attention_agrees_with_pytorch() {
    agrees_with_pytorch("unet_no_attention", &Device::cpu_guarded());
}

/// All networks on a GPU.
fn agrees_with_pytorch_on_a_gpu(dtype: DType) {
    let Some(gpu) = support::gpu::gpu(dtype) else { return };
    let device = Device::Cuda(gpu);
    agrees_with_pytorch("unet_gray16", &device);
    agrees_with_pytorch("unet_rgb16", &device);
    agrees_with_pytorch("unet_adm", &device);
    agrees_with_pytorch("unet_bare", &device);
}

#[test]
fn the_kernels_agree_with_pytorch() {
    agrees_with_pytorch_on_a_gpu(DType::F32);
}

#[test]
fn the_kernels_agree_with_pytorch_in_bf16() {
    agrees_with_pytorch_on_a_gpu(DType::Bf16);
}

/// A checkpoint that `ddpm-cuda train` wrote (non-square images, classes, heads) gives the output that diffusers'
/// `DDPMPipeline` computed with it. The second half checks that today's program writes the same files, so that
/// diffusers still opens them.
#[test]
fn diffusers_opens_our_checkpoints_and_computes_the_same() {
    let device = Device::cpu_guarded();
    let folder = fixture("written_here");
    let golden = Golden::read("written_here");
    let model = checkpoint::load(&device, &folder).unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let (shape, x) = golden.images("x");
    let t = golden.per_image(&device, "t");
    let mut tape = Tape::inference(&device, &model.params);
    let x = Var::constant(Tensor::from_slice(&device, shape, &x).unwrap());
    let y = unet.forward(&mut tape, &x, &t, &golden.conditioning(&device), None).unwrap();
    close_to_largest("out", y.data(), &golden.images("out").1, network::F32);
    support::assert_written_alike(&model, &folder);
}

/// A sample must not depend on its batch, so the network's output for an image must not either.
#[test]
fn an_image_has_the_same_bits_in_any_batch() {
    let device = Device::cpu();
    let golden = Golden::read("unet_rgb16");
    let model = checkpoint::load(&device, &fixture("unet_rgb16")).unwrap();
    let (unet, _) = UNet::new(&model.config.model).unwrap();
    let (shape, x) = golden.images("x");
    let (image, labels) = (shape.len() / shape.n, golden.i32("labels"));
    let forward = |images: &[usize]| {
        let x: Vec<f32> = images.iter().flat_map(|&i| x[i * image..][..image].to_vec()).collect();
        let t = per_image(&device, images.iter().map(|&i| 100.0 * i as f32 + 3.0));
        let labels = per_image(&device, images.iter().map(|&i| labels[i] as f32));
        let x = Var::constant(Tensor::from_slice(&device, Shape { n: images.len(), ..shape }, &x).unwrap());
        let mut tape = Tape::inference(&device, &model.params);
        unet.forward(&mut tape, &x, &t, &Conditioning::on_labels(labels), None).unwrap().data().to_vec()
    };
    let alone = forward(&[1]);
    for batch in [vec![1, 0], vec![0, 1], vec![0, 1, 0, 0, 1, 0, 0]] {
        let together = forward(&batch);
        for place in batch.iter().enumerate().filter(|(_, i)| **i == 1).map(|(place, _)| place) {
            same_bits(&format!("{batch:?}"), &together[place * image..][..image], &alone);
        }
    }
}

/// A network of one level and width 8 on 4x4 pixels, with attention only in the middle. [`masks_of`] sets its
/// parameters.
fn plain() -> Model {
    let mut model = Config::preset(Preset::Mnist).model;
    (model.image_size, model.widths, model.attention_resolutions) = (Size::square(4), vec![8], Vec::new());
    (model.blocks_per_level, model.groups, model.dropout) = (1, 4, 0.5);
    model
}

/// The output of [`plain`] with parameters such that residual block `plus` adds its dropout mask to its input, block
/// `minus` subtracts its own, and all other blocks pass their input on. Constant without masks, or if both masks are
/// the same.
fn masks_of(plus: usize, minus: usize, masks: Option<DropoutSeed>) -> Vec<f32> {
    let device = Device::cpu();
    let (unet, specs) = UNet::new(&plain()).unwrap();
    let mut params = Params::zeros(&device, specs.clone()).unwrap();
    let mut set = |name: &str, value: &dyn Fn(usize) -> f32| {
        let (p, _) = specs.iter().find(|(_, spec)| spec.name == name).unwrap_or_else(|| panic!("no {name}"));
        params.get_mut(p).iter_mut().enumerate().for_each(|(i, v)| *v = value(i));
    };
    let blocks = [
        "down_blocks.0.resnets.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.resnets.1",
    ];
    // The identity: the centre tap of a 3x3 kernel over 8 channels, from each channel to itself.
    let identity = |i: usize| if i / 8 % 9 == 4 && i / 72 == i % 8 { 1.0 } else { 0.0 };
    for (block, sign) in [(blocks[plus], 1.0), (blocks[minus], -1.0)] {
        // The convolution gets silu(1) everywhere, except where it is dropped.
        set(&format!("{block}.norm2.bias"), &|_| 1.0);
        set(&format!("{block}.conv2.weight"), &|i| sign * identity(i));
    }
    // Blocks on the way up take [h, skip]: pass h on.
    for block in &blocks[3..] {
        set(&format!("{block}.conv_shortcut.weight"), &|i| if i / 16 == i % 16 { 1.0 } else { 0.0 });
    }
    set("conv_norm_out.weight", &|_| 1.0);
    set("conv_out.weight", &|i| if i / 8 == 4 { 1.0 + i as f32 } else { 0.0 });
    let x = Var::constant(Tensor::zeros(&device, Shape::new(1, 4, 4, 1)).unwrap());
    let mut tape = Tape::recording(&device, &params);
    unet.forward(&mut tape, &x, &per_image(&device, [7.0]), &Conditioning::NONE, masks).unwrap().data().to_vec()
}

#[test]
fn every_block_and_step_has_its_own_masks_and_none_without_a_seed() {
    let masks = Some(DropoutSeed { seed: 5, step: 3, first: 2 });
    for plus in 0..5 {
        for minus in plus + 1..5 {
            let y = masks_of(plus, minus, masks);
            assert!(y.iter().any(|v| *v != y[0]), "blocks {plus} and {minus} have the same masks, or none");
            for other in [
                DropoutSeed { seed: 6, step: 3, first: 2 },
                DropoutSeed { seed: 5, step: 4, first: 2 },
                DropoutSeed { seed: 5, step: 3, first: 1 },
            ] {
                assert_ne!(masks_of(plus, minus, Some(other)), y, "{other:?} has the masks of {masks:?}");
            }
            assert!(masks_of(plus, minus, None).iter().all(|v| *v == 0.0), "dropout without being asked");
        }
    }
}

/// Counted by hand for [`plain`] with attention at its only level (the middle always has it), width 8, 16 pixels, 32
/// time features.
#[test]
fn costs_are_those_counted_by_hand() {
    let model = Model { attention_resolutions: vec![4], ..plain() };
    let (unet, specs) = UNet::new(&model).unwrap();
    let costs = unet.costs(&specs, 4, 4);
    let cost = |place: &str| costs.iter().find(|c| c.place == place).unwrap_or_else(|| panic!("no cost of {place}"));
    let of = |place: &str| (cost(place).params, cost(place).flops, cost(place).saved);
    // Weights; two FLOP per weight and pixel; elements kept, four bytes each.
    let conv = |c_in: usize, c_out: usize, k: usize| k * k * c_in * c_out;
    let flops = |weights: usize, pixels: usize| 2 * (weights * pixels) as u64;
    assert_eq!(of("conv_in"), (conv(1, 8, 3) + 8, flops(72, 16), 4 * 16));
    let linear = 8 * 32 + 32 * 32;
    assert_eq!(of("time_embedding"), (linear + 32 + 32, flops(linear, 1), 4 * (8 + 4 * 32)));
    // norm1, conv1, time projection, norm2, conv2. Kept: input, activation, and both again after conv1, and three
    // statistics for each group of both norms. The time embedding is kept where all blocks' projections are computed.
    let block = |c_in: usize| {
        (
            2 * c_in + conv(c_in, 8, 3) + 8 + 32 * 8 + 8 + 16 + conv(8, 8, 3) + 8,
            flops(conv(c_in, 8, 3) + conv(8, 8, 3), 16) + flops(256, 1),
        )
    };
    assert_eq!(of("down_blocks.0.resnets.0"), (block(8).0, block(8).1, 4 * (16 * 32 + 24)));
    // The concatenation of 16 channels needs a shortcut. It is read as two tensors, of which one, the output of
    // conv_in, is kept by its first reader.
    let (params, operations) = (block(16).0 + conv(16, 8, 1) + 8, block(16).1 + flops(128, 16));
    assert_eq!(of("up_blocks.0.resnets.1"), (params, operations, 4 * (16 * 40 + 24)));
    // Norm, q, k, v, projection; two products of 16 x 16 scores with 8 channels. Kept: input, norm, q, k, v, y, the
    // statistics of the norm, and two numbers for each row of scores.
    let attention = (16 + 4 * 72, flops(4 * 64, 16) + 2 * flops(16 * 16 * 8, 1), 4 * (16 * 48 + 12 + 32));
    assert_eq!(of("mid_block.attentions.0"), attention);
    assert_eq!(of("down_blocks.0.attentions.0"), attention);
    assert_eq!(of("conv_out"), (16 + 72 + 1, flops(72, 16), 4 * (16 * 16 + 12)));
    assert_eq!(costs.iter().map(|c| c.params).sum::<usize>(), specs.count(), "parameters in no part's cost");
}

/// Of [`plain`] with two levels between which residual blocks halve and double the image, and with scale and shift.
#[test]
fn costs_of_residual_resampling_are_those_of_its_output() {
    let model = Model {
        widths: vec![8, 8],
        scale_shift_norm: true,
        downsample_type: Resampling::Resnet,
        upsample_type: Resampling::Resnet,
        ..plain()
    };
    let (unet, specs) = UNet::new(&model).unwrap();
    let costs = unet.costs(&specs, 4, 4);
    let cost = |place: &str| costs.iter().find(|c| c.place == place).unwrap_or_else(|| panic!("no cost of {place}"));
    // Two norms, two convolutions over 8 channels, the projection of 32 time features to 16.
    let (params, weights) = (16 + 584 + 32 * 16 + 16 + 16 + 584, 2 * 576);
    for (place, pixels) in [("down_blocks.0.downsamplers.0", 4), ("up_blocks.0.upsamplers.0", 16)] {
        assert_eq!(
            (cost(place).params, cost(place).flops),
            (params, 2 * (weights * pixels + 32 * 16) as u64),
            "{place}"
        );
    }
    assert_eq!(costs.iter().map(|c| c.params).sum::<usize>(), specs.count(), "parameters in no part's cost");
}

/// The paper initialises the last layer of each residual branch and of the network to almost zero.
#[test]
fn the_last_layers_start_at_almost_zero_and_no_others() {
    let (_, specs) = UNet::new(&Config::preset(Preset::Cifar10).model).unwrap();
    let mut seen = [0, 0];
    for (_, spec) in specs.iter() {
        if let Init::FanAvg { scale } = spec.init {
            let last = [".conv2.weight", ".to_out.0.weight", "conv_out.weight"].iter().any(|n| spec.name.ends_with(n));
            assert_eq!(scale, if last { 1e-10 } else { 1.0 }, "{}", spec.name);
            seen[usize::from(last)] += 1;
        }
    }
    // 22 residual blocks, 6 attention blocks, the output.
    assert_eq!(seen[1], 22 + 6 + 1);
    assert!(seen[0] > 22);
}

/// With an epsilon that dwarfs every variance, normalised values all but vanish, and with them the gradients of gamma.
#[test]
fn every_norm_has_the_models_epsilon() {
    let device = Device::cpu_guarded();
    let golden = Golden::read("unet_rgb16");
    let loaded = checkpoint::load(&device, &fixture("unet_rgb16")).unwrap();
    let (unet, specs) = UNet::new(&Model { norm_eps: 1e12, ..loaded.config.model }).unwrap();
    let (shape, x) = golden.images("x");
    let t = per_image(&device, vec![7.0; shape.n]);
    let mut tape = Tape::recording(&device, &loaded.params);
    let x = tape.leaf(Tensor::from_slice(&device, shape, &x).unwrap());
    let y = unet.forward(&mut tape, &x, &t, &golden.conditioning(&device), None).unwrap();
    let mut grads = ParamGrads::new(&device, &specs).unwrap();
    tape.backward(&y, Tensor::from_slice(&device, shape, &vec![1.0; shape.len()]).unwrap(), &mut grads).unwrap();
    let flat = grads.finish(&specs).unwrap().data();
    let largest = |name: &str| {
        let (p, _) = specs.iter().find(|(_, spec)| spec.name == name).unwrap();
        let gradient = &flat[specs.range(p)];
        assert!(gradient.iter().all(|v| v.is_finite()), "{name}");
        gradient.iter().fold(0.0, |m: f32, v| m.max(v.abs()))
    };
    let is_norm = |name: &str| name.split('.').any(|part| part.contains("norm"));
    let names = specs.iter().filter_map(|(_, spec)| spec.name.strip_suffix(".weight").filter(|n| is_norm(n)));
    let mut norms = 0;
    for name in names {
        let (gamma, beta) = (largest(&format!("{name}.weight")), largest(&format!("{name}.bias")));
        // Values are at most about a thousand, a millionth of that after normalisation; the rest allows for sums that
        // cancel in beta's gradient.
        assert!(beta > 0.0 && gamma < 1e-2 * beta, "{name}: gamma's gradient {gamma:e} beside beta's {beta:e}");
        norms += 1;
    }
    assert!(norms > 20, "only {norms} norms found");
}

/// What each operation keeps of a forward pass on `device`: place, stem and bytes.
fn kept(model: &Model, device: &Device) -> Vec<(String, &'static str, usize)> {
    let (unet, specs) = UNet::new(model).unwrap();
    let params = Params::zeros(device, specs).unwrap();
    let Size { h, w } = model.image_size;
    let x = Tensor::from_slice_as(device, device.activations(), Shape::new(2, h, w, 3), &vec![0.5; 2 * h * w * 3]);
    let (t, labels) = (per_image(device, [3.0, 40.0]), per_image(device, [2.0, 0.0]));
    let mut tape = Tape::recording(device, &params);
    let masks = Some(DropoutSeed { seed: 1, step: 2, first: 0 });
    unet.forward(&mut tape, &Var::constant(x.unwrap()), &t, &Conditioning::on_labels(labels), masks).unwrap();
    let kept: Vec<_> = tape.saved().into_iter().map(|saved| (saved.place, saved.name, saved.bytes)).collect();
    assert!(kept.iter().any(|(_, name, bytes)| *name == "attention" && *bytes > 0), "nothing is kept: {kept:?}");
    kept
}

/// The tape on shapes alone foretells the tape on the device that they stand for, on a GPU in both types.
#[test]
fn shapes_alone_keep_what_a_device_keeps() {
    let mut model = support::tiny(6, 10, 3).model;
    (model.head_dim, model.classes) = (8, 3);
    let openai = Model {
        scale_shift_norm: true,
        downsample_type: Resampling::Resnet,
        upsample_type: Resampling::Resnet,
        class_embedding: ClassEmbedding::Timestep,
        middle_attention: MiddleAttention::Bare,
        ..model.clone()
    };
    let cpu = Device::cpu_guarded();
    for model in [model, openai] {
        assert_eq!(kept(&model, &cpu.meta()), kept(&model, &cpu));
        for dtype in [DType::F32, DType::Bf16] {
            let Some(gpu) = support::gpu::gpu(dtype) else { return };
            let gpu = Device::Cuda(gpu);
            assert_eq!(kept(&model, &gpu.meta()), kept(&model, &gpu), "{dtype:?}");
        }
    }
}
