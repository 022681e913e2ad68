//! Inpainting with a process that knows nothing of it (RePaint, Lugmayr et al. 2022, algorithm 1): at every level the
//! known pixels are those of the image, noised afresh, and the others are the reverse process's, which goes back and
//! forth until both agree.

use super::finite;
use crate::device::Device;
use crate::diffusion::{Sampler, Schedule};
use crate::error::Result;
use crate::ops::sample_step::{Given, Noise, State, Wanted, advance, diffuse, start_from};
use crate::rng::{Purpose, Streams};
use crate::tensor::Tensor;
use crate::usage;

/// A move of the process between neighbouring levels of the kept chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// A reverse step from the level of this index, to the image from 0.
    Down(usize),
    /// A step of noise to the level of this index.
    Up(usize),
}

/// The moves over a chain of `levels`: down, and at every multiple of `jump` below `levels - jump`, `times - 1` times
/// up by `jump` and down again.
///
/// # Errors
/// `Error::Usage` for a `times` or a `jump` of 0, and for a `jump` over all levels, of which none would be repeated.
pub fn moves(levels: usize, jump: usize, times: u32) -> Result<Vec<Move>> {
    if times == 0 {
        usage!("--resample 0: every level is visited at least once, so give 1 or more");
    }
    if jump == 0 {
        usage!("--jump 0: give how many levels to go back, 1 or more");
    }
    if times > 1 && jump >= levels {
        let less = if levels > 1 { format!("a --jump below {levels}, or ") } else { String::new() };
        usage!("--jump {jump}: with --steps {levels} no level is gone through again, so give {less}--resample 1");
    }
    let mut again = vec![0; levels];
    (0..levels.saturating_sub(jump)).step_by(jump).for_each(|level| again[level] = times - 1);
    let (mut level, mut moves) = (levels - 1, Vec::new());
    loop {
        if again[level] > 0 {
            again[level] -= 1;
            moves.extend((1..=jump).map(|by| Move::Up(level + by)));
            level += jump;
            continue;
        }
        moves.push(Move::Down(level));
        if level == 0 {
            return Ok(moves);
        }
        level -= 1;
    }
}

/// What is painted.
pub struct Painting<'a> {
    /// The device to compute on.
    pub device: &'a Device,
    /// The chain that the sampler's steps are of.
    pub chain: &'a Schedule,
    /// The steps, without guidance, of which none reads what is before.
    pub sampler: &'a Sampler,
    /// From [`moves`].
    pub moves: &'a [Move],
    /// Seed of all noise.
    pub seed: u64,
    /// The index of the first image.
    pub first: u32,
    /// The images in [-1, 1], f32 (n, h, w, c).
    pub known: &'a Tensor,
    /// 0 where a pixel is known, f32 (n, h, w, c).
    pub mask: &'a Tensor,
}

impl Painting<'_> {
    /// The images, (n, h, w, c): those given where they are known. `network(x_t, t)` is asked at every move down, and
    /// `each` is called after it.
    ///
    /// # Errors
    /// Those of `network` and `each`, which end the loop; a number that is not finite; a GPU that fails.
    pub fn paint(
        &self,
        mut network: impl FnMut(&Tensor, f32) -> Result<Tensor>,
        mut each: impl FnMut() -> Result<()>,
    ) -> Result<Vec<f32>> {
        let (device, steps) = (self.device, self.sampler.steps());
        // Every draw has a number of its own: a level is visited several times.
        let mut drawn = 0;
        let mut noise = || {
            drawn += 1;
            let streams = Streams { seed: self.seed, purpose: Purpose::Inpaint, step: drawn, first: self.first };
            Noise::own(streams)
        };
        let mut state = start_from(device, self.known.shape(), noise(), 1)?;
        state = self.paste(&state, self.chain.q_sample_coefficients(self.chain.len() - 1), noise())?;
        for step in self.moves {
            let level = match *step {
                Move::Down(level) => {
                    let step = &steps[steps.len() - 1 - level];
                    let output = network(&state.input, step.time as f32)?;
                    let given = Given {
                        x: &state.x,
                        output: &output,
                        before: None,
                        gradient: None,
                        guidance: None,
                        noise: noise(),
                    };
                    state = advance(device, &given, step, Wanted { copies: 1, x_0: false })?.0;
                    each()?;
                    level.checked_sub(1)
                }
                Move::Up(level) => {
                    let beta = self.chain.betas()[level];
                    state = diffuse(device, &state.x, None, ((1.0 - beta).sqrt(), beta.sqrt()), noise(), 1)?;
                    Some(level)
                }
            };
            // The last of all is the image itself, without noise.
            let coefficients = level.map_or((1.0, 0.0), |level| self.chain.q_sample_coefficients(level));
            state = self.paste(&state, coefficients, noise())?;
        }
        finite(state.x.to_vec()?)
    }

    /// The state with the known pixels at its level.
    fn paste(&self, state: &State, coefficients: (f64, f64), noise: Noise) -> Result<State> {
        diffuse(self.device, self.known, Some((self.mask, &state.x)), coefficients, noise, 1)
    }
}
