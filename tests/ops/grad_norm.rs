use ddpm_cuda::device::Device;
use ddpm_cuda::diffusion::Batch;
use ddpm_cuda::meter::{Measured, Meter};
use ddpm_cuda::ops::grad_norm::{CHUNK, clip_factor, grad_norm, join, reference, squares, squares_shape};
use ddpm_cuda::ops::loss::loss;
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{gpu, halves, numbers, per_image, plant, same_bits_at_any_number_of_threads, to_f32};

/// 65,536 is one task of the CPU path.
const LENGTHS: [usize; 9] = [0, 1, 17, 31, 33, 1009, 65_536, 65_537, 300_007];

fn measure(device: &Device, g: &[f32], max_norm: f64) -> Measured {
    let g = Tensor::from_slice(device, Shape::vector(g.len()), g).unwrap();
    let mut meter = Meter::new(device).unwrap();
    meter.begin();
    grad_norm(device, &g, max_norm, &mut meter).unwrap();
    meter.read().unwrap()[0]
}

fn norm(g: &[f32]) -> f64 {
    measure(&Device::cpu_guarded(), g, 0.0).grad_norm
}

/// The squares of f32 numbers are exact in f64. n additions in any order err by at most n 2^-53 of the sum; the square
/// root halves that and adds a rounding. Both sides err.
#[test]
fn the_norm_is_the_root_of_the_sum_of_squares() {
    for len in LENGTHS {
        // A few large values among small ones: f32 sums would lose the small ones.
        let mut g = numbers(4, len);
        g.iter_mut().step_by(1000).for_each(|g| *g *= 4096.0);
        let (got, want) = (norm(&to_f32(&g)), reference::forward(&g));
        let budget = (len + 2) as f64 * f64::EPSILON / 2.0 * want;
        assert!((got - want).abs() <= budget, "norm of {len} is {got}, expected {want} +- {budget:e}");
    }
}

#[test]
fn the_norm_is_finite_if_and_only_if_every_gradient_is() {
    let mut g = to_f32(&numbers(5, 100_003));
    g.iter_mut().for_each(|g| *g *= f32::MAX);
    assert!(norm(&g).is_finite(), "the largest numbers overflow");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 65_535, 65_536, 100_002] {
            let kept = std::mem::replace(&mut g[place], bad);
            assert!(!norm(&g).is_finite(), "{bad} at {place} went unseen");
            g[place] = kept;
        }
    }
}

#[test]
fn the_clip_factor_is_pytorchs() {
    assert_eq!(clip_factor(0.5, 1.0), 1.0);
    assert_eq!(clip_factor(0.0, 1.0), 1.0);
    assert_eq!(clip_factor(4.0, 1.0), 1.0 / 4.000_001);
    assert_eq!(clip_factor(f64::INFINITY, 1.0), 0.0);
    assert!(clip_factor(f64::NAN, 1.0).is_nan());
}

#[test]
fn the_meter_gets_norm_and_clip_factor() {
    let device = Device::cpu_guarded();
    let g = [3.0, 0.0, 4.0];
    for (max_norm, clip) in [(0.0, 1.0), (2.5, clip_factor(5.0, 2.5)), (7.0, 1.0)] {
        let measured = measure(&device, &g, max_norm);
        assert_eq!((measured.grad_norm, measured.clip), (5.0, clip), "clipped to {max_norm}");
    }
}

/// What the meter of a step gets whose gradient `ranks` ranks share, of which rank 1, if there is one, has a loss in
/// its second micro-batch.
fn measure_shards(device: &Device, g: &[f32], ranks: usize, max_norm: f64, of_rank_1: f32) -> Measured {
    let shard = g.len().div_ceil(ranks).next_multiple_of(CHUNK);
    let mut sums = Tensor::zeros(device, squares_shape(device, ranks, shard)).unwrap();
    let mut meter = Meter::of_micro_batches(device, 2).unwrap();
    for rank in 0..ranks {
        meter.begin();
        if rank == 1 {
            meter.micro_batch(1);
            let y = Tensor::from_slice_as(device, device.activations(), Shape::new(1, 1, 1, 3), &[of_rank_1; 3]);
            let batch = Batch::train(0, 0, 0, vec![0], false, 10);
            let t = per_image(device, [batch.t()[0] as f32]);
            loss(device, &y.unwrap(), &batch, &t, Some(1), &mut meter).unwrap();
        }
        let [start, end] = [rank, rank + 1].map(|rank| (rank * shard).min(g.len()));
        let mut own = g[start..end].to_vec();
        own.resize(shard, 0.0);
        let own = Tensor::from_slice(device, Shape::vector(shard), &own).unwrap();
        squares(device, &own, end - start, &mut sums, rank, &mut meter).unwrap();
    }
    meter.begin();
    join(device, &sums, max_norm, &mut meter).unwrap();
    *meter.read().unwrap().last().unwrap()
}

/// Ranks with whole shards, with part of one and with nothing; the norm of the whole, to the bit.
fn shards_have_the_bits_of_the_whole(device: &Device) -> Vec<f32> {
    let mut all = Vec::new();
    for (len, ranks) in [(20, 3), (CHUNK, 2), (CHUNK + 4, 2), (300_008, 2), (300_008, 4)] {
        let g = to_f32(&numbers(4, len));
        let want = measure(device, &g, 1.0);
        let got = measure_shards(device, &g, ranks, 1.0, 0.0);
        assert_eq!((got.grad_norm, got.clip), (want.grad_norm, want.clip), "{len} gradients, {ranks} ranks");
        all.extend(halves(got.grad_norm));
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let (mut g, of_loss) = (vec![0.5; 2 * CHUNK], measure_shards(device, &[0.5; 20], 2, 1.0, bad));
        assert!(!of_loss.grad_norm.is_finite(), "a loss of {bad} on one rank went unseen");
        g[CHUNK + 7] = bad;
        assert!(!measure_shards(device, &g, 2, 1.0, 0.0).grad_norm.is_finite(), "{bad} on one rank went unseen");
    }
    all
}

#[test]
fn shards_have_the_norm_of_the_whole() {
    shards_have_the_bits_of_the_whole(&Device::cpu_guarded());
}

#[test]
fn gpu_shards_have_the_norm_of_the_whole() {
    gpu::each("shards", shards_have_the_bits_of_the_whole);
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let g = to_f32(&numbers(6, 300_007));
    same_bits_at_any_number_of_threads("norm", || halves(norm(&g)).to_vec());
}

/// Empty; the four elements of one thread; primes rounded up to multiples of four; a block of 16,384; one thread more;
/// several blocks.
const GPU_LENGTHS: [usize; 7] = [0, 4, 20, 1012, 16_384, 16_388, 300_008];

#[test]
fn gpu_agrees_with_the_reference() {
    for len in GPU_LENGTHS {
        let mut g = numbers(4, len);
        g.iter_mut().step_by(1000).for_each(|g| *g *= 4096.0);
        let want = reference::forward(&g);
        let budget = (len + 2) as f64 * f64::EPSILON / 2.0 * want;
        gpu::each(&format!("norm of {len}"), |device| {
            let mut all = Vec::new();
            for max_norm in [0.0, want / 2.0, 2.0 * want + 1.0] {
                let Measured { grad_norm: norm, clip, .. } = measure(device, &to_f32(&g), max_norm);
                assert!((norm - want).abs() <= budget, "norm of {len} is {norm}, expected {want} +- {budget:e}");
                let factor = if max_norm == 0.0 { 1.0 } else { clip_factor(norm, max_norm) };
                assert_eq!(clip, factor, "norm {norm} clipped to {max_norm}");
                all.extend([norm, clip].into_iter().flat_map(halves));
            }
            all
        });
    }
}

#[test]
fn gpu_norm_is_finite_if_and_only_if_every_gradient_is() {
    let mut g = to_f32(&numbers(5, 50_004));
    g.iter_mut().for_each(|g| *g *= f32::MAX);
    let Some(gpu) = gpu::gpu(ddpm_cuda::tensor::DType::F32) else { return };
    let device = Device::Cuda(gpu);
    assert!(measure(&device, &g, 1.0).grad_norm.is_finite(), "the largest numbers overflow");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 16_383, 16_384, 50_003] {
            let kept = std::mem::replace(&mut g[place], bad);
            assert!(!measure(&device, &g, 1.0).grad_norm.is_finite(), "{bad} at {place} went unseen");
            g[place] = kept;
        }
    }
}

/// As many steps as the meter of a GPU holds, read at once, twice.
#[test]
fn gpu_meter_keeps_a_row_a_step() {
    gpu::each("rows", |device| {
        let mut meter = Meter::new(device).unwrap();
        assert_eq!(meter.read().unwrap(), [], "no step, no row");
        let mut all = Vec::new();
        for round in [0.0, 1000.0] {
            for k in 0..256 {
                assert!(!meter.is_full(), "after {k} rows");
                meter.begin();
                let g = Tensor::from_slice(
                    device,
                    Shape::vector(4),
                    &[3.0 * (round + k as f32), 0.0, 0.0, 4.0 * (round + k as f32)],
                );
                grad_norm(device, &g.unwrap(), 10.0, &mut meter).unwrap();
            }
            assert!(meter.is_full());
            let rows = meter.read().unwrap();
            assert_eq!(rows.len(), 256);
            for (k, row) in rows.into_iter().enumerate() {
                let norm = 5.0 * (f64::from(round) + k as f64);
                assert_eq!((row.grad_norm, row.clip), (norm, clip_factor(norm, 10.0)), "row {k}");
                assert_eq!(row.quarters.mean(), None, "no loss was measured");
                all.extend(halves(row.clip));
            }
        }
        all
    });
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "grad_norm::gpu_agrees_with_the_reference";
    // All barriers except those after a sum, since another barrier comes before its scratch memory is used again; the
    // square root.
    [0, 2, 3].into_iter().for_each(|n| plant::notices_lost_barrier(test, "grad_norm_fwd", n));
    plant::notices(test, "grad_norm_fwd", "sqrt.rn.f64", "mov.f64");
    plant::notices_lost_block(test, "grad_norm_fwd");
    let test = "grad_norm::gpu_shards_have_the_norm_of_the_whole";
    plant::notices_lost_block(test, "grad_norm_squares");
    plant::notices_lost_barrier(test, "grad_norm_squares", 0);
    plant::notices_lost_barrier(test, "grad_norm_join", 0);
    plant::notices(test, "grad_norm_join", "sqrt.rn.f64", "mov.f64");
}
