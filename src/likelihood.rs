//! The exact likelihood of images by the probability-flow ODE (Song et al. 2021, section 4.3 and appendix D.2).
//!
//! With y = x_t / sqrt(alpha_bar_t) and sigma = sqrt((1 - alpha_bar_t) / alpha_bar_t), the flow of any network that
//! predicts the noise is `dy/dsigma = eps(x_t, t)`, from the image at sigma = 0 to noise at the last timestep, and
//! `log p(y_0) = log p(y_T) + integral of the divergence of eps by y dsigma`, where p(y_T) is N(0, 1 + sigma_T^2). The
//! divergence is estimated as `z . (d eps / dy) z` with random signs z, one vector-Jacobian product of the tape for
//! each evaluation of the network (Hutchinson); z stays the same along the whole way, so that the right-hand side is a
//! smooth function.
//!
//! The solver is that of Dormand and Prince, of order 5(4), in f64, with a step size for each image, so that no image
//! depends on its batch. Up to the first timestep's sigma the variable is sigma and the timestep stays 0; beyond, the
//! variable is ln sigma and the timestep is interpolated in it, never rounded.
//!
//! Bytes become numbers by uniform dequantisation, `x = (byte + u - 1/2) / 127.5 - 1` with u uniform in [0, 1). So bits
//! per dimension are `-log2 p(x) / d + log2 127.5`, a bound on those of the bytes that is exact on average over u. They
//! do not compare with the variational bound, whose decoder is discrete.
//!
//! Deliberately absent: variational dequantisation, other solvers, networks that predict mu, whose factors have no
//! meaning between timesteps.

use std::f64::consts::{LN_2, PI};

use crate::conditioning::Conditioning;
use crate::device::Device;
use crate::diffusion::timesteps::timestep_of;
use crate::diffusion::{Prediction, Schedule};
use crate::error::{Error, Result};
use crate::params::Params;
use crate::rng::{Purpose, Stream};
use crate::tape::Tape;
use crate::tensor::{Shape, Tensor};
use crate::unet::UNet;
use crate::usage;

/// Where the integral begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// At the image itself, sigma = 0: the density of what the flow makes of noise.
    Image,
    /// At the first timestep, of whose x_t the image is taken to be one, as in score_sde's code: the density of x_t.
    FirstTimestep,
}

/// How the likelihood is computed.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Largest error of a step of the solver: root mean square of x_t, and nats per dimension of log p.
    pub tolerance: f64,
    /// Probes z for each image, each with noise u of its own.
    pub probes: usize,
    /// Seed of u and z.
    pub seed: u64,
    /// Where the integral begins.
    pub from: From,
}

/// The likelihood of one image with one probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// log p of the numbers, in nats.
    pub log_p: f64,
    /// Evaluations of the network.
    pub evaluations: usize,
}

/// `-log2 p / d + log2 127.5`, for the d numbers of an image with `log_p`.
pub fn bits_per_dim(log_p: f64, d: usize) -> f64 {
    -log_p / (d as f64 * LN_2) + 127.5f64.log2()
}

/// Where a solution stands: how much noise, and the timestep of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// sqrt((1 - alpha_bar) / alpha_bar).
    pub sigma: f64,
    /// The timestep, fractional; 0 below the first timestep's sigma.
    pub t: f64,
}

/// The levels of noise that a flow passes: ln sigma of every timestep.
pub struct Levels {
    log_sigma: Vec<f64>,
}

impl Levels {
    /// Those of a schedule. A last timestep with nothing left of the image, whose sigma is infinite, is left out.
    pub fn new(schedule: &Schedule) -> Self {
        let last = schedule.len() - usize::from(schedule.has_zero_terminal_snr());
        Levels { log_sigma: (0..last).map(|t| schedule.log_sigma(t)).collect() }
    }

    fn first(&self) -> f64 {
        self.log_sigma[0].exp()
    }

    fn last(&self) -> f64 {
        self.log_sigma[self.log_sigma.len() - 1].exp()
    }

    /// The level of `sigma`, its timestep interpolated linearly in ln sigma.
    pub fn at(&self, sigma: f64) -> Level {
        Level { sigma, t: timestep_of(&self.log_sigma, sigma.ln()) }
    }
}

/// What the flow asks of a network, for several images at once: of each image's `x` = x_t (d numbers), level and probe
/// `z`, the noise eps and `z . d eps / dx`.
pub struct Query<'a> {
    /// Index of each image with its probe, as given to [`integrate`].
    pub items: &'a [usize],
    /// x_t of each.
    pub x: &'a [Vec<f64>],
    /// Level of each.
    pub levels: &'a [Level],
    /// Probe of each.
    pub z: &'a [&'a [f64]],
}

/// eps and the product of the probe with its Jacobian, for each image of a [`Query`].
pub type Answer = Vec<(Vec<f64>, Vec<f64>)>;

/// The tableau of Dormand and Prince (1980): nodes, weights of the stages, and the difference of both orders.
const NODES: [f64; 7] = [0.0, 0.2, 0.3, 0.8, 8.0 / 9.0, 1.0, 1.0];
const STAGES: [&[f64]; 7] = [
    &[],
    &[0.2],
    &[3.0 / 40.0, 9.0 / 40.0],
    &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
    &[19372.0 / 6561.0, -25360.0 / 2187.0, 64448.0 / 6561.0, -212.0 / 729.0],
    &[9017.0 / 3168.0, -355.0 / 33.0, 46732.0 / 5247.0, 49.0 / 176.0, -5103.0 / 18656.0],
    &[35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0],
];
const ERROR: [f64; 7] =
    [71.0 / 57600.0, 0.0, -71.0 / 16695.0, 71.0 / 1920.0, -17253.0 / 339200.0, 22.0 / 525.0, -1.0 / 40.0];

/// Steps after which an image is given up: a smooth network needs some dozens.
const MOST_STEPS: usize = 10_000;

/// The longest step, in ln sigma: over a longer one the network can turn twice without the error showing it. On
/// Gaussian data a tolerance of 1e-3 gave an error of 0.06 without this bound, and 2e-5 with it.
const LONGEST_STEP: f64 = 1.0;

/// A solution on its way: y and, as its last number, log p less that of the prior: the integral of the divergence, and
/// before it the change of variables from x to y.
struct Solution {
    item: usize,
    state: Vec<f64>,
    /// sigma in the first segment, ln sigma in the second.
    s: f64,
    end: f64,
    logarithmic: bool,
    h: f64,
    /// Derivatives of the step's stages; the first may be the last of the step before.
    k: Vec<Vec<f64>>,
    steps: usize,
    evaluations: usize,
}

impl Solution {
    fn sigma(&self, s: f64) -> f64 {
        if self.logarithmic { s.exp() } else { s }
    }

    /// Where stage `stage` of the step is evaluated.
    fn stage(&self, stage: usize) -> (f64, Vec<f64>) {
        let mut state = self.state.clone();
        for (weight, k) in STAGES[stage].iter().zip(&self.k) {
            state.iter_mut().zip(k).for_each(|(state, k)| *state += self.h * weight * k);
        }
        (self.s + self.h * NODES[stage], state)
    }
}

/// log p of each image `x` (d numbers each, on the scale of x_0) with its probe `z`, along the flow of `network`.
///
/// # Errors
/// Those of `network`; `Error::Failed` for a flow that the solver cannot follow.
pub fn integrate(
    levels: &Levels,
    from: From,
    tolerance: f64,
    images: &[(Vec<f64>, Vec<f64>)],
    mut network: impl FnMut(&Query<'_>) -> Result<Answer>,
) -> Result<Vec<Likelihood>> {
    let begin = |(item, (x, _)): (usize, &(Vec<f64>, Vec<f64>))| {
        let first = levels.first();
        let (s, end, logarithmic, scale) = match from {
            From::Image => (0.0, first, false, 1.0),
            From::FirstTimestep => (first.ln(), levels.last().ln(), true, (1.0 + first * first).sqrt()),
        };
        // log p is asked for by x, and the flow's density is by y = x * scale.
        let log_p = x.len() as f64 * scale.ln();
        let state = x.iter().map(|x| x * scale).chain([log_p]).collect();
        let h = (end - s) / if logarithmic { 50.0 } else { 2.0 };
        Solution { item, state, s, end, logarithmic, h, k: Vec::new(), steps: 0, evaluations: 0 }
    };
    let mut running: Vec<Solution> = images.iter().enumerate().map(begin).collect();
    let mut done = vec![Likelihood { log_p: f64::NAN, evaluations: 0 }; images.len()];
    while !running.is_empty() {
        // All solutions take one attempt of a step, stage by stage; those with a first derivative already skip it.
        for stage in 0..7 {
            let (which, at): (Vec<usize>, Vec<(f64, Vec<f64>)>) = running
                .iter()
                .enumerate()
                .filter(|(_, solution)| solution.k.len() == stage)
                .map(|(i, solution)| (i, solution.stage(stage)))
                .unzip();
            if which.is_empty() {
                continue;
            }
            let sigma: Vec<f64> = which.iter().zip(&at).map(|(&i, (s, _))| running[i].sigma(*s)).collect();
            let scale = |sigma: f64| (1.0 + sigma * sigma).sqrt();
            let x: Vec<Vec<f64>> = at
                .iter()
                .zip(&sigma)
                .map(|((_, state), &sigma)| state[..state.len() - 1].iter().map(|y| y / scale(sigma)).collect())
                .collect();
            let items: Vec<usize> = which.iter().map(|&i| running[i].item).collect();
            let levels: Vec<Level> = sigma.iter().map(|&sigma| levels.at(sigma)).collect();
            let z: Vec<&[f64]> = items.iter().map(|&item| &images[item].1[..]).collect();
            let answers = network(&Query { items: &items, x: &x, levels: &levels, z: &z })?;
            for ((&i, (eps, product)), &sigma) in which.iter().zip(answers).zip(&sigma) {
                let solution = &mut running[i];
                // By sigma, and by ln sigma sigma times as much; d eps / dy is d eps / dx over the scale.
                let by = if solution.logarithmic { sigma } else { 1.0 };
                let divergence: f64 = product.iter().zip(&images[solution.item].1).map(|(p, z)| p * z).sum();
                let derivative = eps.iter().map(|eps| by * eps).chain([by * divergence / scale(sigma)]).collect();
                solution.k.push(derivative);
                solution.evaluations += 1;
            }
        }
        for solution in &mut running {
            advance(solution, tolerance)?;
        }
        running.retain_mut(|solution| {
            if solution.s < solution.end {
                return true;
            }
            if !solution.logarithmic {
                // On to the second segment; the derivative there is another.
                (solution.s, solution.end, solution.logarithmic) = (levels.first().ln(), levels.last().ln(), true);
                solution.h = (solution.end - solution.s) / 50.0;
                solution.k.clear();
                if solution.s < solution.end {
                    return true;
                }
            }
            let (y, log_p) = solution.state.split_at(solution.state.len() - 1);
            let variance = 1.0 + levels.last().powi(2);
            let squares: f64 = y.iter().map(|y| y * y).sum();
            let prior = -0.5 * (squares / variance + y.len() as f64 * (2.0 * PI * variance).ln());
            done[solution.item] = Likelihood { log_p: prior + log_p[0], evaluations: solution.evaluations };
            false
        });
    }
    Ok(done)
}

/// Takes the step whose stages are evaluated if its error is within the tolerance, and chooses the next step's size.
fn advance(solution: &mut Solution, tolerance: f64) -> Result<()> {
    let (s, next) = (solution.s + solution.h, solution.stage(6).1);
    let (d, sigma) = (next.len() - 1, solution.sigma(s));
    let error_of = |i: usize| solution.h * ERROR.iter().zip(&solution.k).map(|(weight, k)| weight * k[i]).sum::<f64>();
    // Of x_t the root mean square, and of log p what it is by dimension: among the d numbers it would not count. A sum,
    // which stays NaN.
    let squares: f64 = (0..d).map(|i| error_of(i).powi(2) / (1.0 + sigma * sigma)).sum();
    let error = ((squares / d as f64).sqrt() + error_of(d).abs() / d as f64) / tolerance;
    solution.steps += 1;
    if !error.is_finite() || solution.steps > MOST_STEPS {
        return Err(Error::Failed(format!(
            "the flow of image {} cannot be followed beyond sigma = {:.4}: the error of a step is {error}; a larger --tolerance may do, if the network is sound",
            solution.item,
            solution.sigma(solution.s)
        )));
    }
    if error <= 1.0 {
        solution.state = next;
        // A last step that rounding leaves short of the end.
        let ended = solution.end - s <= 1e-12 * solution.end.abs().max(1.0);
        solution.s = if ended { solution.end } else { s };
        let last = solution.k.pop().expect("a step has seven stages");
        solution.k = vec![last];
    } else {
        solution.k.truncate(1);
    }
    // The error is of order h^5; a fifth of safety, and no leaps.
    let factor = (0.9 * error.max(1e-10).powf(-0.2)).clamp(0.2, 5.0);
    solution.h = (solution.h * factor).min(LONGEST_STEP).min(solution.end - solution.s);
    Ok(())
}

/// A model whose likelihood is asked for.
pub struct Model<'a> {
    /// The device to compute on.
    pub device: &'a Device,
    /// The network.
    pub unet: &'a UNet,
    /// Its weights.
    pub params: &'a Params,
    /// Its schedule.
    pub schedule: &'a Schedule,
    /// What it predicts.
    pub prediction: Prediction,
}

impl Model<'_> {
    /// The likelihoods of images of shape (h, w, c) in bytes, one for each image and probe, image by image; `labels`
    /// are those of a conditional network. `first` is the index of the first image, from which u and z follow.
    ///
    /// # Errors
    /// `Error::Usage` for a network that predicts mu; those of [`integrate`]; a GPU that fails.
    pub fn likelihoods(
        &self,
        images: &[&[u8]],
        labels: Option<&[u32]>,
        first: usize,
        options: Options,
    ) -> Result<Vec<Likelihood>> {
        if self.prediction == Prediction::Mu {
            usage!(
                "prediction = mu: its factors have no meaning between timesteps; the model's bound is known by eval"
            );
        }
        let draw = |purpose: Purpose, image: usize, probe: usize, d: usize| {
            let mut numbers = vec![0.0; d];
            let (step, stream) = (probe as u32, (first + image) as u32);
            Stream { seed: options.seed, purpose, step, stream }.uniforms(&mut numbers);
            numbers
        };
        let dequantised = |image: usize, probe: usize| {
            let (bytes, d) = (images[image], images[image].len());
            let u = draw(Purpose::Dequantise, image, probe, d);
            let x = bytes.iter().zip(u).map(|(&byte, u)| (f64::from(byte) + f64::from(u) - 0.5) / 127.5 - 1.0);
            let z = draw(Purpose::Probe, image, probe, d).into_iter().map(|u| if u < 0.5 { -1.0 } else { 1.0 });
            (x.collect(), z.collect())
        };
        let pairs = (0..images.len()).flat_map(|image| (0..options.probes).map(move |probe| (image, probe)));
        let items: Vec<(Vec<f64>, Vec<f64>)> = pairs.map(|(image, probe)| dequantised(image, probe)).collect();
        let levels = Levels::new(self.schedule);
        integrate(&levels, options.from, options.tolerance, &items, |query| {
            let of = |item: usize| labels.map(|labels| labels[item / options.probes]);
            let labels: Option<Vec<u32>> = query.items.iter().map(|&item| of(item)).collect();
            self.evaluate(query, labels.as_deref())
        })
    }

    /// eps and `z . d eps / dx` by one pass forward and one backward.
    fn evaluate(&self, query: &Query<'_>, labels: Option<&[u32]>) -> Result<Answer> {
        let m = self.unet.model();
        let shape = Shape::new(query.x.len(), m.image_size.h, m.image_size.w, m.channels);
        let (n, dtype) = (shape.n, self.device.activations());
        let x: Vec<f32> = query.x.iter().flatten().map(|&x| x as f32).collect();
        let t: Vec<f32> = query.levels.iter().map(|level| level.t as f32).collect();
        let t = Tensor::from_slice(self.device, Shape::new(n, 1, 1, 1), &t)?;
        let conditioning = Conditioning::from_labels(self.device, labels)?;
        let mut tape = Tape::recording(self.device, self.params);
        let leaf = tape.leaf(Tensor::from_slice_as(self.device, dtype, shape, &x)?); // (n, h, w, c)
        let y = self.unet.forward(&mut tape, &leaf, &t, &conditioning, None)?; // (n, h, w, out_channels)
        // The first `channels` of each pixel are the prediction.
        let (c, out) = (m.channels, m.out_channels());
        let output = y.value().host()?;
        let mut dy = vec![0.0; output.len()];
        for (i, z) in query.z.iter().enumerate() {
            for (pixel, z) in z.chunks(c).enumerate() {
                let place = (i * shape.pixels() + pixel) * out;
                dy[place..place + c].iter_mut().zip(z).for_each(|(dy, &z)| *dy = z as f32);
            }
        }
        let dy = Tensor::from_slice_as(self.device, dtype, y.shape(), &dy)?;
        let output = output.into_owned();
        let product = tape.backward_to_leaves(&y, dy)?.take(&leaf);
        let product = product.expect("the output depends on the input").to_vec()?; // (n, h, w, c)
        let d = shape.pixels() * c;
        let answer = |i: usize| {
            let sigma = query.levels[i].sigma;
            let signal = 1.0 / (1.0 + sigma * sigma).sqrt();
            let mix = self.prediction.at_level(signal, sigma * signal).expect("a prediction other than mu").eps;
            let prediction = output[i * shape.pixels() * out..(i + 1) * shape.pixels() * out].chunks(out);
            let prediction = prediction.flat_map(|pixel| &pixel[..c]);
            let eps = prediction.zip(&query.x[i]).map(|(&y, x)| mix.xt * x + mix.output * f64::from(y));
            let product = product[i * d..(i + 1) * d].iter().zip(query.z[i]);
            (eps.collect(), product.map(|(&p, z)| mix.xt * z + mix.output * f64::from(p)).collect())
        };
        Ok((0..n).map(answer).collect())
    }
}
