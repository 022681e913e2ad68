//! What a pass of the network is conditioned on besides x_t and t.

use crate::device::Device;
use crate::error::Result;
use crate::tensor::{Shape, Tensor};

/// Classes, one an image, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Conditioning {
    labels: Option<Tensor>,
}

impl Conditioning {
    /// For an unconditional network.
    pub const NONE: Conditioning = Conditioning { labels: None };

    /// On classes: `labels` (n, 1, 1, 1), class numbers as f32.
    pub fn on_labels(labels: Tensor) -> Self {
        let shape = labels.shape();
        assert_eq!(shape, Shape::new(shape.n, 1, 1, 1), "labels are one number an image");
        Conditioning { labels: Some(labels) }
    }

    /// The same from class numbers on the host; [`NONE`](Self::NONE) without any.
    ///
    /// # Errors
    /// A GPU without enough memory.
    pub fn from_labels(device: &Device, labels: Option<&[u32]>) -> Result<Self> {
        let Some(labels) = labels else { return Ok(Conditioning::NONE) };
        let numbers: Vec<f32> = labels.iter().map(|&label| label as f32).collect();
        Ok(Conditioning::on_labels(Tensor::from_slice(device, Shape::new(labels.len(), 1, 1, 1), &numbers)?))
    }

    /// Classes, (n, 1, 1, 1), f32.
    pub fn labels(&self) -> Option<&Tensor> {
        self.labels.as_ref()
    }
}
