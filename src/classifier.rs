//! A trained classifier p(y given x_t) of noised images, for guidance (Dhariwal and Nichol 2021, section 4).
//!
//! Its network is the [`UNet`] of a model with `classifier`: the way down and the middle, then attention pooling.

use std::path::Path;

use crate::checkpoint;
use crate::classes;
use crate::conditioning::Conditioning;
use crate::config::Config;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::cross_entropy::log_probability_gradient;
use crate::params::Params;
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Shape, Tensor};
use crate::unet::UNet;

/// A classifier with its weights.
pub struct Classifier {
    config: Config,
    unet: UNet,
    params: Params,
    /// What to say of it.
    notes: Vec<String>,
}

impl Classifier {
    /// Opens a run of `train-classifier` (its newest checkpoint), a checkpoint of one, or a folder with `classifier/`.
    ///
    /// # Errors
    /// Those of [`checkpoint::load_classifier`].
    pub fn load(device: &Device, path: &Path) -> Result<Self> {
        let loaded = checkpoint::load_classifier(device, path)?;
        let (unet, _) = UNet::new(&loaded.config.model)?;
        Ok(Classifier { config: loaded.config, unet, params: loaded.params, notes: loaded.notes })
    }

    /// The same classifier on another device, with nothing to say of it.
    ///
    /// # Errors
    /// Those of [`Params::copy_to`].
    pub fn copy_to(&self, device: &Device) -> Result<Self> {
        let (unet, _) = UNet::new(&self.config.model)?;
        let params = self.params.copy_to(device)?;
        Ok(Classifier { config: self.config.clone(), unet, params, notes: Vec::new() })
    }

    /// Its settings: network, process, names of the classes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its weights.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Sentences for the user, as in [`checkpoint::Loaded`].
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Refuses a model that it cannot guide: of other images, of another process, or with other classes.
    ///
    /// # Errors
    /// `Error::Usage`, with both sides.
    pub fn check_guides(&self, model: &Config) -> Result<()> {
        let (own, theirs) = (&self.config, model);
        let refused = |what: &str, own: &dyn std::fmt::Display, theirs: &dyn std::fmt::Display| {
            let both = format!("the classifier has {what} {own} and the model {theirs}");
            Err(Error::Usage(format!("{both}; train a classifier on the model's data with the model's process")))
        };
        let (a, b) = (&own.model, &theirs.model);
        if (a.image_size, a.channels) != (b.image_size, b.channels) {
            let images = |m: &crate::config::Model| format!("{}x{}", m.image_size, m.channels);
            return refused("images of", &images(a), &images(b));
        }
        if b.classes > 0 && a.classes != b.classes {
            return refused("classes =", &a.classes, &b.classes);
        }
        if let Some(k) = classes::first_difference(&own.class_names, &theirs.class_names) {
            return refused(&format!("class {k} ="), &own.class_names[k], &theirs.class_names[k]);
        }
        let (a, b) = (own.diffusion.noise_schedule()?, theirs.diffusion.noise_schedule()?);
        if a.len() != b.len() {
            return refused("timesteps =", &a.len(), &b.len());
        }
        // Betas may have been rounded to f32 on the way through a file.
        let differ = |t: &usize| {
            let [(signal, noise), (their_signal, their_noise)] = [&a, &b].map(|s| s.q_sample_coefficients(*t));
            (signal - their_signal).abs() > 1e-4 || (noise - their_noise).abs() > 1e-4
        };
        if let Some(t) = (0..a.len()).find(differ) {
            let [own, theirs] = [&a, &b].map(|s| format!("{:.6}", s.q_sample_coefficients(t).0.powi(2)));
            return refused(&format!("alpha_bar at t = {t} of"), &own, &theirs);
        }
        Ok(())
    }

    /// grad with respect to x_t of sum_i log p(y_i given x_t_i), f32, shaped like `x_t`: (n, h, w, c), at timestep `t`
    /// of the whole chain (in 0..T, not always whole) for all images, with the class of each in `labels`. No image's
    /// gradient depends on the others. `x_t` is f32 or of the device's activation type.
    ///
    /// With bf16 activations the gradient goes through the host to become f32, and an f32 `x_t` to become bf16.
    ///
    /// # Errors
    /// A GPU that fails or has too little memory.
    pub fn gradient(&self, device: &Device, x_t: &Tensor, t: f32, labels: &[u32]) -> Result<Tensor> {
        let shape = x_t.shape();
        assert_eq!(labels.len(), shape.n, "labels for images {shape}");
        let classes = self.config.model.classes;
        assert!(labels.iter().all(|&y| (y as usize) < classes), "labels {labels:?} of {classes} classes");
        let mut tape = Tape::recording(device, &self.params);
        let x = tape.leaf(as_type(device, device.activations(), x_t)?); // (n, h, w, c)
        let t = Tensor::full(device, Shape::new(shape.n, 1, 1, 1), t)?;
        let logits = self.unet.forward(&mut tape, &x, &t, &Conditioning::NONE, None)?; // (n, 1, 1, classes)
        let labels: Vec<f32> = labels.iter().map(|&y| y as f32).collect();
        let labels = Tensor::from_slice(device, Shape::new(shape.n, 1, 1, 1), &labels)?;
        let dz = log_probability_gradient(device, logits.value(), &labels)?;
        let mut leaves = tape.backward_to_leaves(&logits, dz)?;
        let dx = leaves.take(&x).expect("every logit depends on x_t"); // (n, h, w, c)
        as_type(device, DType::F32, &dx)
    }

    /// Bytes of `device`'s memory that [`gradient`](Self::gradient) takes for images of `shape`, the weights not
    /// counted.
    ///
    /// # Errors
    /// None; shapes need no memory.
    pub fn memory(&self, device: &Device, shape: Shape) -> Result<u64> {
        let meta = device.meta();
        let params = Params::zeros(&meta, self.params.specs().clone())?;
        let weights = meta.pool_stats().held;
        let x_t = Tensor::uninit(&meta, meta.activations(), shape)?; // (n, h, w, c)
        let t = Tensor::uninit(&meta, DType::F32, Shape::new(shape.n, 1, 1, 1))?;
        let mut tape = Tape::recording(&meta, &params);
        let x = tape.leaf(x_t);
        let logits = self.unet.forward(&mut tape, &x, &t, &Conditioning::NONE, None)?; // (n, 1, 1, classes)
        let dz = Tensor::uninit(&meta, meta.activations(), logits.shape())?;
        tape.backward_to_leaves(&logits, dz)?;
        Ok(meta.pool_stats().held - weights)
    }

    /// For images `x` (n, h, w, c), of the device's activation type, at timestep `t`: what the last layer sees, (n, 1,
    /// 1, d) with d the width of the coarsest level, and the logits, (n, 1, 1, classes).
    ///
    /// # Errors
    /// A GPU that fails or has too little memory.
    pub fn features(&self, device: &Device, x: &Tensor, t: u32) -> Result<(Tensor, Tensor)> {
        let mut tape = Tape::inference(device, &self.params);
        let t = Tensor::full(device, Shape::new(x.shape().n, 1, 1, 1), t as f32)?;
        let (features, logits) = self.unet.features(&mut tape, &Var::constant(x.clone()), &t)?;
        Ok((features.into_value(), logits.into_value()))
    }
}

/// `x` itself if it has type `dtype`, else a copy that has.
fn as_type(device: &Device, dtype: DType, x: &Tensor) -> Result<Tensor> {
    if x.dtype() == dtype { Ok(x.clone()) } else { Tensor::from_slice_as(device, dtype, x.shape(), &x.host()?) }
}
