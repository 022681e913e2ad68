//! What a network costs, part by part. Parameters and FLOP are counted from its layers: two FLOP per multiply-add of
//! convolutions, linear layers and attention products in one forward pass (a training step takes three times as many).
//! Norms, activations and resampling without weights are not counted. The bytes that a training step keeps come from
//! the tape, by a forward pass over shapes alone.

use super::{Affine, Attention, Classes, DropoutSeed, Head, Level, Norm, Pool, Resample, Resnet, UNet};
use crate::conditioning::Conditioning;
use crate::device::Device;
use crate::error::Result;
use crate::params::{Param, Params, Specs};
use crate::tape::{Kept, Recompute, Tape, Var};
use crate::tensor::{DType, Shape, Tensor};

/// The cost of one part of the network, for one image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// The part, by the common prefix of its parameters' names.
    pub place: String,
    /// Trainable numbers.
    pub params: usize,
    /// FLOP of one forward pass over one image.
    pub flops: u64,
    /// Bytes kept from the forward pass of one image for its backward pass. A tensor kept by several parts counts for
    /// the first.
    pub saved: u64,
}

impl Cost {
    fn new(place: &str) -> Self {
        Cost { place: place.into(), ..Cost::default() }
    }

    fn norm(&mut self, specs: &Specs, norm: &Norm) {
        self.params += len(specs, norm.gamma) + len(specs, norm.beta);
    }

    /// A convolution or linear layer with `outputs` output pixels, each of which costs one product with the whole
    /// weight.
    fn affine(&mut self, specs: &Specs, affine: &Affine, outputs: usize) {
        self.params += len(specs, affine.weight) + len(specs, affine.bias);
        self.add_flops(&[2, outputs, len(specs, affine.weight)]);
    }

    /// Adds a product. A configuration may describe a network that is too large for any machine.
    fn add_flops(&mut self, factors: &[usize]) {
        let flops = factors.iter().fold(1u64, |product, &factor| product.saturating_mul(factor as u64));
        self.flops = self.flops.saturating_add(flops);
    }
}

fn len(specs: &Specs, p: Param) -> usize {
    specs.spec(p).shape.len()
}

impl Resnet {
    /// With `pixels` output pixels.
    fn cost(&self, specs: &Specs, pixels: usize) -> Cost {
        let mut cost = Cost::new(&self.place);
        cost.norm(specs, &self.norm1);
        cost.affine(specs, &self.conv1, pixels);
        cost.affine(specs, &self.time_emb_proj, 1);
        cost.norm(specs, &self.norm2);
        cost.affine(specs, &self.conv2, pixels);
        if let Some(shortcut) = &self.conv_shortcut {
            cost.affine(specs, shortcut, pixels);
        }
        cost
    }
}

impl Attention {
    fn cost(&self, specs: &Specs, pixels: usize) -> Cost {
        let mut cost = Cost::new(&self.place);
        if let Some(group_norm) = &self.group_norm {
            cost.norm(specs, group_norm);
        }
        for affine in [&self.to_q, &self.to_k, &self.to_v, &self.to_out] {
            cost.affine(specs, affine, pixels);
        }
        let c = len(specs, self.to_q.bias);
        cost.add_flops(&[2, 2, pixels, pixels, c]);
        cost
    }
}

impl Pool {
    /// Adds the pooling of images of `pixels` pixels.
    fn add_to(&self, cost: &mut Cost, specs: &Specs, pixels: usize) {
        let tokens = pixels + 1;
        cost.params += len(specs, self.positional_embedding);
        for affine in [&self.to_q, &self.to_k, &self.to_v] {
            cost.affine(specs, affine, tokens);
        }
        cost.add_flops(&[2, 2, tokens, tokens, specs.spec(self.to_q.weight).shape.c]);
        cost.affine(specs, &self.to_classes, 1);
    }
}

impl Level {
    /// Its blocks at `pixels` pixels, then what leads to the next level, with `resampled` output pixels.
    fn costs(&self, specs: &Specs, pixels: usize, resampled: usize) -> Vec<Cost> {
        let mut costs = Vec::new();
        for (resnet, attention) in &self.blocks {
            costs.push(resnet.cost(specs, pixels));
            costs.extend(attention.as_ref().map(|a| a.cost(specs, pixels)));
        }
        match &self.resample {
            Some(Resample::Conv { place, conv }) => {
                let mut cost = Cost::new(place);
                cost.affine(specs, conv, resampled);
                costs.push(cost);
            }
            Some(Resample::Resnet(resnet)) => costs.push(resnet.cost(specs, resampled)),
            None => {}
        }
        costs
    }
}

impl UNet {
    /// The cost of each part for one `height` x `width` image, in the order of the forward pass; with what the CPU
    /// keeps, in f32, if nothing is computed again.
    pub fn costs(&self, specs: &Specs, height: usize, width: usize) -> Vec<Cost> {
        self.costs_on(&Device::cpu(), Recompute::None, specs, height, width)
    }

    /// The same with what `device` keeps of a step that computes again what `recompute` says.
    pub fn costs_on(
        &self,
        device: &Device,
        recompute: Recompute,
        specs: &Specs,
        height: usize,
        width: usize,
    ) -> Vec<Cost> {
        let pixels = |level: usize| (height >> level) * (width >> level);
        let mut time = Cost::new("time_embedding");
        time.affine(specs, &self.time_linear_1, 1);
        time.affine(specs, &self.time_linear_2, 1);
        let mut costs = vec![time];
        match &self.class_embedding {
            Some(Classes::Table(table)) => {
                costs.push(Cost { params: len(specs, *table), ..Cost::new("class_embedding") });
            }
            Some(Classes::Timestep(linear_1, linear_2)) => {
                let mut cost = Cost::new("class_embedding");
                cost.affine(specs, linear_1, 1);
                cost.affine(specs, linear_2, 1);
                costs.push(cost);
            }
            None => {}
        }
        let mut conv_in = Cost::new("conv_in");
        conv_in.affine(specs, &self.conv_in, pixels(0));
        costs.push(conv_in);

        for (i, level) in self.down.iter().enumerate() {
            costs.extend(level.costs(specs, pixels(i), pixels(i + 1)));
        }
        let lowest = pixels(self.down.len() - 1);
        costs.push(self.middle.0.cost(specs, lowest));
        costs.extend(self.middle.1.as_ref().map(|attention| attention.cost(specs, lowest)));
        costs.push(self.middle.2.cost(specs, lowest));
        for (i, level) in self.up.iter().enumerate() {
            let here = self.up.len() - 1 - i;
            costs.extend(level.costs(specs, pixels(here), pixels(here.saturating_sub(1))));
        }

        let mut out = Cost::new(self.head.place());
        out.norm(specs, &self.conv_norm_out);
        match &self.head {
            Head::Noise(conv_out) => out.affine(specs, conv_out, pixels(0)),
            Head::Classes(pool) => pool.add_to(&mut out, specs, lowest),
        }
        costs.push(out);
        let image = Shape::new(1, height, width, self.model.channels);
        for Kept { place, bytes, .. } in self.tape_plan(device, recompute, specs, image).expect("shapes need no memory")
        {
            let part = costs.iter_mut().find(|cost| cost.place == place);
            part.unwrap_or_else(|| panic!("{place} keeps {bytes} bytes and has no cost")).saved += bytes as u64;
        }
        costs
    }

    /// The tape plan: every tensor that a training step over images of `shape`, (n, h, w, c), keeps on `device` from
    /// its forward pass for its backward pass, in the order of the forward pass, if it computes again what `recompute`
    /// says. By a step over shapes alone.
    ///
    /// # Errors
    /// None; shapes need no memory.
    pub fn tape_plan(&self, device: &Device, recompute: Recompute, specs: &Specs, shape: Shape) -> Result<Vec<Kept>> {
        let device = device.meta();
        let params = Params::zeros(&device, specs.clone())?;
        let mut tape = Tape::recording(&device, &params).recomputing(recompute);
        let x = Tensor::uninit(&device, device.activations(), shape)?;
        let per_image = || Tensor::uninit(&device, DType::F32, Shape::new(shape.n, 1, 1, 1));
        let (t, labels) = (per_image()?, per_image()?);
        let conditioning =
            if self.model.is_conditional() { Conditioning::on_labels(labels) } else { Conditioning::NONE };
        let masks = Some(DropoutSeed { seed: 0, step: 0, first: 0 });
        self.forward(&mut tape, &Var::constant(x), &t, &conditioning, masks)?;
        Ok(tape.plan())
    }
}
