//! Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, [arXiv 2006.11239]) from scratch.
//!
//! # Bird's eye view
//!
//! A network eps_theta(x_t, t) learns to predict the noise in a noisy image:
//!
//! - forward process (eq. 4): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
//! - training (eq. 14): minimise |eps - eps_theta(x_t, t)|^2 over images, t and eps
//! - sampling (algorithm 2): from x_T ~ N(0, 1), step x_t -> x_{t-1} until x_0
//!
//! # Modules
//!
//! From the top down; a module imports only from lines below its own, which `tests/layers.rs` checks.
//!
//! ```text modules
//! main - the program
//! commands - one file per command: arguments, checks, what is printed
//! profile - what a step asks of a GPU, kernel by kernel, and how long it would take
//! quality - how like the data samples are, and whether they are copies
//! evaluate - the variational bound of images, term by term
//! train - the training loop; one step (algorithm 1 of the paper); the run's folder and log
//! report - one page of a run's curves, samples and settings, or of several runs
//! history - what a run folder tells of its run
//! sample likelihood - the reverse process (algorithm 2), and drawing images with it in batches; exact likelihoods
//! recipe - settings that suit data of one's own
//! classifier - a trained classifier of noised images, for guidance
//! checkpoint - what is saved, in diffusers' formats
//! memory - how much memory a run needs
//! unet data - the network, with a shape at the end of each line; data sets in
//! output - images and arrays out
//! config - presets and settings: everything needed to repeat a run
//! ops - one file per operation: formula, public function, backward pass, reference, CPU path, launches
//! tape - reverse-mode differentiation
//! params clock - parameters in one flat buffer; what changes from one training step to the next
//! meter - what a step measures, kept on the device that computes it
//! images conditioning - bytes that become x_0; network inputs besides x_t and t
//! exchange - what the ranks of a run on several devices give each other
//! tensor - NHWC arrays
//! measures - distances between sets of images, in f64
//! diffusion - schedules and sampler steps in f64, with the papers' equation numbers
//! rng - counter-based random numbers
//! device - the CPU, GPUs (the only place that names cudarc), and a device of shapes alone
//! kernels - the table of compiled CUDA kernels, `kernels/*.cu`
//! pickle - Python's pickles, read and never executed
//! distributed - processes that train together: their ranks, how they meet, watch each other and end
//! classes - which classes have the same name
//! shape layout names text - shapes and element types; channels first and last; names of choices; readable numbers
//! error - what can go wrong, as one sentence
//! ```
//!
//! From the command line to a loop over numbers takes five files: `commands/train.rs -> train/mod.rs ->
//! train/trainer.rs -> unet.rs -> ops/conv2d.rs`, and on a GPU one more, `kernels/conv2d.cu`.
//!
//! # Invariants
//!
//! - Everything about an operation has one stem: `src/ops/S.rs`, `kernels/S.cu`, `tests/ops/S.rs`, `benches/ops/S.rs`,
//!   kernel symbols `S_*`; a test enforces it.
//! - Nothing outside [`device::cuda`] knows a device address: launches take tensors and views. A training step on a GPU
//!   waits for nothing, and if the data set fits there uploads only its [`clock`], 44 bytes; its launches are one CUDA
//!   graph. What it measured is read when the log asks.
//! - Tensors are contiguous and channels-last. Other layouts exist only in [`checkpoint`], [`commands::predict`] and
//!   [`data`], which read and write files of other tools.
//! - A result has the same bits for any number of threads: work is split by its size, never by the number of threads,
//!   and partial sums are joined in a fixed order.
//! - A random number is a pure function of seed, purpose, step, image and element ([`rng`]). So a sample depends only
//!   on its seed, index and class, and a resumed run continues with the same bits.
//! - A run on several devices has the bits of one on one device. Ranks give each other bytes ([`exchange`]); what comes
//!   from several is added in an order that knows no ranks ([`ops::tree_sum`]); nothing is drawn by rank, and nothing
//!   but the writing of files asks which rank it is.
//! - Files that must survive a crash are written under a temporary name beside the final one, synced and renamed.
//! - Weights cannot change while a tape refers to them: the tape borrows [`params::Params`].
//!
//! # Letters
//!
//! n images, h x w pixels, c channels; x_0 image in [-1, 1], x_t noisy image, t timestep in 0..T (0 is one diffusion
//! step), eps noise, beta, alpha, alpha_bar, sigma as in the paper; y = op(x), and dy and dx are the gradients of the
//! loss with respect to y and x.
//!
//! [arXiv 2006.11239]: https://arxiv.org/abs/2006.11239

pub mod checkpoint;
pub mod classes;
pub mod classifier;
pub mod clock;
#[cfg(feature = "cli")]
pub mod commands;
pub mod conditioning;
pub mod config;
pub mod data;
pub mod device;
pub mod diffusion;
pub mod distributed;
pub mod error;
pub mod evaluate;
pub mod exchange;
pub mod history;
pub mod images;
pub mod kernels;
pub mod layout;
pub mod likelihood;
pub mod measures;
pub mod memory;
pub mod meter;
mod names;
pub mod ops;
pub mod output;
pub mod params;
mod pickle;
pub mod profile;
pub mod quality;
pub mod recipe;
pub mod report;
pub mod rng;
pub mod sample;
pub mod shape;
pub mod tape;
pub mod tensor;
mod text;
pub mod train;
pub mod unet;
