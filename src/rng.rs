//! Counter-based random numbers: Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! Every random value is a pure function of `(seed, purpose, step, stream, block)`: the key is the seed, the counter the
//! rest. So noise can be made again instead of stored, a sample does not depend on the batch it is computed in, and a
//! resumed run draws what the uninterrupted one would have drawn. The integers are the same bits on every device.

/// What a stream of random numbers is for; part of the counter, so that streams never meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial weights; stream = index of the parameter.
    Init = 0,
    /// Order of the training images; stream = epoch.
    Shuffle = 1,
    /// Timestep of each image of a training step; stream = position in the step's batch.
    Timestep = 2,
    /// Horizontal flip of each image of a training step.
    Flip = 3,
    /// Noise eps of the forward process in training.
    TrainNoise = 4,
    /// Dropout masks; stream = layer.
    Dropout = 5,
    /// Noise of the validation loss.
    Validation = 6,
    /// x_T of a sample; stream = index of the sample.
    SampleStart = 7,
    /// Noise added at each reverse step; step = timestep, stream = index of the sample.
    SampleNoise = 8,
}

/// The place of a stream: everything but the position in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// What the numbers are for.
    pub purpose: Purpose,
    /// Training step, or timestep of the reverse process.
    pub step: u32,
    /// Image, layer or parameter, as [`Purpose`] says.
    pub stream: u32,
}

impl Stream {
    /// The four 32-bit words of block `block`: elements `4*block ..= 4*block + 3` of the stream.
    #[inline]
    pub fn block(&self, block: u32) -> [u32; 4] {
        philox([block, self.stream, self.step, self.purpose as u32], [self.seed as u32, (self.seed >> 32) as u32])
    }
}

/// Ten rounds of Philox 4x32.
#[inline(always)]
pub fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(c[0]) * 0xD251_1F53;
        let p1 = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(p1 >> 32) as u32 ^ c[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}
