//! DDIM inversion: from images to the noise that DDIM makes these images of (Song et al. 2021, section 4.3).
//!
//! Each step inverts the sampler's step between the same two timesteps exactly, if its equation is solved: it holds the
//! noise at the level it leads to, which is found by iteration from the image as it is. Too few rounds of it, and the
//! image comes back changed.

use super::finite;
use crate::device::Device;
use crate::diffusion::sampler::{Samples, Step};
use crate::error::Result;
use crate::ops::sample_step::{Given, Noise, Wanted, advance, diffuse};
use crate::tensor::Tensor;

/// What images were encoded to.
pub struct Encoded {
    /// x_T, f32 (n, h, w, c).
    pub x_t: Vec<f32>,
    /// The most that a round of iteration, the last of its step, still moved a number of x by, as seen from the level
    /// below (x has unit variance). An image comes back about as far off.
    pub moved: f32,
    /// The timestep of that step.
    pub at: u32,
}

/// x_T of the images `x_0`, both f32 (n, h, w, c), by the steps of [`inversion`](crate::diffusion::sampler::inversion),
/// with `rounds` rounds of iteration after a first guess. `network(x_t, t)` is asked for steps (rounds + 1) times, and
/// `each` is called after each.
///
/// # Errors
/// Those of `network` and `each`, which end the loop; a number that is not finite; a GPU that fails.
pub fn encode(
    device: &Device,
    steps: &[Step],
    rounds: u32,
    x_0: &Tensor,
    mut network: impl FnMut(&Tensor, f32) -> Result<Tensor>,
    mut each: impl FnMut() -> Result<()>,
) -> Result<Encoded> {
    // No noise is drawn.
    let noise = Noise::own(Samples { seed: 0, first: 0 }.start());
    let mut state = diffuse(device, x_0, None, (1.0, 0.0), noise, 1)?;
    let (mut moved, mut at) = (0.0f32, 0);
    for step in steps {
        let before = state.x.clone();
        let mut guess = before.clone();
        for _ in 0..=rounds {
            guess = state.x.clone();
            let output = network(&state.input, step.time as f32)?;
            let given =
                Given { x: &state.x, output: &output, before: Some(&before), gradient: None, guidance: None, noise };
            state = advance(device, &given, step, Wanted { copies: 1, x_0: false })?.0;
            each()?;
        }
        let (from, to) = (guess.host()?, state.x.host()?);
        let most = from.iter().zip(to.iter()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        let most = most / step.c_before as f32;
        if most > moved {
            (moved, at) = (most, step.t);
        }
    }
    Ok(Encoded { x_t: finite(state.x.to_vec()?)?, moved, at })
}
