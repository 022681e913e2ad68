//! What a network costs: parameters, floating-point operations and the bytes of activations a training step keeps, by
//! block. Operations are two per multiply-add of convolutions, linear layers and attention products in one forward
//! pass (a training step does three times as many); norms, activations and resampling are not counted.

use super::{Affine, Attention, Level, Norm, Resnet, UNet, time_features};
use crate::params::{Param, Specs};

/// The cost of one part of the network, for one image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Where it stands, by the common prefix of its parameters' names.
    pub place: String,
    /// Trainable numbers.
    pub params: usize,
    /// Operations of one forward pass over one image.
    pub flops: u64,
    /// Bytes of activations kept from the forward pass of one image for its backward pass.
    pub saved: u64,
}

impl Cost {
    fn new(place: &str) -> Self {
        Cost { place: place.into(), ..Cost::default() }
    }

    fn norm(&mut self, specs: &Specs, norm: &Norm) {
        self.params += len(specs, norm.gamma) + len(specs, norm.beta);
    }

    /// A convolution or linear layer with `outputs` output positions: each costs one product with the whole weight.
    fn affine(&mut self, specs: &Specs, affine: &Affine, outputs: usize) {
        self.params += len(specs, affine.weight) + len(specs, affine.bias);
        self.flops += 2 * (outputs * len(specs, affine.weight)) as u64;
    }

    /// Keeps a tensor of so many numbers.
    fn save(&mut self, numbers: usize) {
        self.saved += (numbers * size_of::<f32>()) as u64;
    }
}

fn len(specs: &Specs, p: Param) -> usize {
    specs.spec(p).shape.len()
}

impl Resnet {
    /// Keeps its input, both activations and what stands between them; a mask is made again, never kept.
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
        let (c_in, c) = (len(specs, self.norm1.gamma), len(specs, self.norm2.gamma));
        cost.save(pixels * (2 * c_in + 2 * c));
        cost
    }
}

impl Attention {
    /// Keeps its input, the norm's output, q, k, v and the attention's output.
    fn cost(&self, specs: &Specs, pixels: usize) -> Cost {
        let mut cost = Cost::new(&self.place);
        cost.norm(specs, &self.group_norm);
        for affine in [&self.to_q, &self.to_k, &self.to_v, &self.to_out] {
            cost.affine(specs, affine, pixels);
        }
        let c = len(specs, self.group_norm.gamma);
        cost.flops += 2 * 2 * (pixels * pixels * c) as u64;
        cost.save(pixels * 6 * c);
        cost
    }
}

impl Level {
    /// Its blocks at `pixels`, then the convolution that leaves it, at `outputs` pixels with `inputs` saved.
    fn costs(&self, specs: &Specs, pixels: usize, resampled: usize, resample_input: usize) -> Vec<Cost> {
        let mut costs = Vec::new();
        for (resnet, attention) in &self.blocks {
            costs.push(resnet.cost(specs, pixels));
            costs.extend(attention.as_ref().map(|a| a.cost(specs, pixels)));
        }
        if let Some(resample) = &self.resample {
            let mut cost = Cost::new(&format!("{}.resample", self.place));
            cost.affine(specs, resample, resampled);
            cost.save(resample_input * specs.spec(resample.weight).shape.c);
            costs.push(cost);
        }
        costs
    }
}

impl UNet {
    /// The cost of each part for one `height` x `width` image, in the order of the forward pass.
    pub fn costs(&self, specs: &Specs, height: usize, width: usize) -> Vec<Cost> {
        let pixels = |level: usize| (height >> level) * (width >> level);
        let mut time = Cost::new("time_embedding");
        time.affine(specs, &self.time_linear_1, 1);
        time.affine(specs, &self.time_linear_2, 1);
        time.save(self.model.widths[0] + 4 * time_features(&self.model));
        let mut costs = vec![time];
        if let Some(table) = self.class_embedding {
            costs.push(Cost { params: len(specs, table), ..Cost::new("class_embedding") });
        }
        let mut conv_in = Cost::new("conv_in");
        conv_in.affine(specs, &self.conv_in, pixels(0));
        conv_in.save(pixels(0) * self.model.channels);
        costs.push(conv_in);

        for (i, level) in self.down.iter().enumerate() {
            costs.extend(level.costs(specs, pixels(i), pixels(i + 1), pixels(i)));
        }
        let lowest = pixels(self.down.len() - 1);
        costs.push(self.middle.0.cost(specs, lowest));
        costs.push(self.middle.1.cost(specs, lowest));
        costs.push(self.middle.2.cost(specs, lowest));
        for (i, level) in self.up.iter().enumerate() {
            let here = self.up.len() - 1 - i;
            let above = pixels(here.saturating_sub(1));
            costs.extend(level.costs(specs, pixels(here), above, above));
        }

        let mut out = Cost::new("conv_out");
        out.norm(specs, &self.conv_norm_out);
        out.affine(specs, &self.conv_out, pixels(0));
        out.save(pixels(0) * 2 * self.model.widths[0]);
        costs.push(out);
        costs
    }
}
