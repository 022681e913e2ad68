//! Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, [arXiv 2006.11239]) from scratch.
//!
//! # Bird's eye view
//!
//! A network eps_theta(x_t, t) learns to name the noise in a noisy image:
//!
//! - forward process (eq. 4): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
//! - training (eq. 14): minimise |eps - eps_theta(x_t, t)|^2 over images, t and eps
//! - sampling (algorithm 2): from x_T ~ N(0, 1), step x_t -> x_{t-1} until x_0
//!
//! From the command line to a loop over numbers it is four files:
//! `main.rs -> train.rs -> unet.rs -> ops/conv2d.rs`, and on a GPU one more, `kernels/conv2d.cu`.
//!
//! # Code map
//!
//! | where | what |
//! |---|---|
//! | [`train`], [`sample`], [`predict`], [`info`] | one file per command, read from top to bottom |
//! | [`config`] | presets and settings; everything that has to be known to repeat a run |
//! | [`unet`] | the network: calls [`ops`] directly, shapes trail each line |
//! | [`diffusion`] | schedules, variances, samplers, with the paper's equation numbers |
//! | [`ops`] | one file per operation: formula, public function, backward pass, reference, CPU path, launches |
//! | [`tape`], [`params`], [`tensor`], [`shape`] | reverse-mode differentiation, parameters in one flat buffer, NHWC arrays |
//! | [`device`] | the CPU (buffer pool, vector instructions) and GPUs (pool, launches; the only place that names cudarc) |
//! | [`kernels`] | the table of compiled CUDA kernels, `kernels/*.cu` |
//! | [`meter`], [`clock`] | what a step measures, kept where it is computed; what changes from step to step |
//! | [`rng`] | counter-based random numbers |
//! | [`data`], [`output`], [`checkpoint`] | everything that touches files |
//!
//! # Invariants
//!
//! - Everything about an operation has one stem: `src/ops/S.rs`, `kernels/S.cu`, `tests/ops/S.rs`, `benches/ops/S.rs`, kernel symbols `S_*`; a test
//!   enforces it.
//! - Outside [`device::cuda`] nothing knows an address: kernels get tensors and views. A training step on a GPU waits for nothing and
//!   copies nothing but its [`clock`], some words; what it measured is read when the log asks.
//! - Tensors are contiguous and channels-last. Other layouts exist only in [`checkpoint`], [`predict`] and [`data`], where files of
//!   other tools are read and written.
//! - A result has the same bits at any number of threads: work is split by its size, never by the number of threads, and
//!   sums are taken in a fixed order.
//! - A random number is a pure function of seed, purpose, step, image and element ([`rng`]). So a sample depends on its
//!   seed and index alone, and a resumed run continues with the same bits.
//! - A file that matters is written beside its final name, synced and renamed.
//! - Weights cannot change while a tape refers to them: the tape borrows [`params::Params`].
//!
//! # Letters
//!
//! n images, h x w pixels, c channels; x_0 image in [-1, 1], x_t noisy image, t timestep in 0..T (0 is one diffusion step), eps
//! noise, beta, alpha, alpha_bar, sigma as in the paper; y = op(x), dy and dx the loss's gradients for y and x.
//!
//! [arXiv 2006.11239]: https://arxiv.org/abs/2006.11239

pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod error;
pub mod info;
pub mod kernels;
pub mod layout;
pub mod meter;
pub mod ops;
pub mod output;
pub mod params;
pub mod predict;
pub mod rng;
pub mod sample;
pub mod shape;
pub mod tape;
pub mod tensor;
pub mod train;
pub mod unet;
