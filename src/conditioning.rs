//! What the network is conditioned on besides x_t and t.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::{Shape, Tensor};

/// A class per image, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Conditioning {
    labels: Option<Tensor>,
}

impl Conditioning {
    /// For an unconditional network.
    pub const NONE: Conditioning = Conditioning { labels: None };

    /// On classes: `labels` (n, 1, 1, 1), f32, class numbers from 0.
    pub fn on_labels(labels: Tensor) -> Self {
        let shape = labels.shape();
        assert_eq!(shape, Shape::new(shape.n, 1, 1, 1), "labels are one number an image");
        Conditioning { labels: Some(labels) }
    }

    /// The same from class numbers on the host; [`NONE`](Self::NONE) for `None`.
    ///
    /// # Errors
    /// A GPU without enough memory.
    pub fn from_labels(device: &Device, labels: Option<&[u32]>) -> Result<Self> {
        let Some(labels) = labels else { return Ok(Conditioning::NONE) };
        let numbers: Vec<f32> = labels.iter().map(|&label| label as f32).collect();
        Ok(Conditioning::on_labels(Tensor::from_slice(device, Shape::new(labels.len(), 1, 1, 1), &numbers)?))
    }

    /// The classes, (n, 1, 1, 1), f32, if there are any.
    pub fn labels(&self) -> Option<&Tensor> {
        self.labels.as_ref()
    }
}
