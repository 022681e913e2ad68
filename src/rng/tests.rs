//! Known answers, accuracy of the normals, and statistics with bounds of five standard deviations; the seeds are fixed,
//! so what passes once passes always.

use rand::seq::SliceRandom;
use rand::{Rng, TryRng};

use super::*;

const STREAM: Stream = Stream { seed: 0x0123_4567_89AB_CDEF, purpose: Purpose::TrainNoise, step: 17, stream: 3 };

/// The three published vectors of philox4x32 with ten rounds (Random123, tests/kat_vectors).
#[test]
fn philox_gives_the_published_answers() {
    let zero = philox([0; 4], [0; 2]);
    assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    let ones = philox([u32::MAX; 4], [u32::MAX; 2]);
    assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let pi = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
    assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
}

#[test]
fn every_part_of_the_place_changes_every_word() {
    let others = [
        Stream { seed: STREAM.seed ^ 1, ..STREAM },
        Stream { seed: STREAM.seed ^ (1 << 63), ..STREAM },
        Stream { purpose: Purpose::Validation, ..STREAM },
        Stream { step: 18, ..STREAM },
        Stream { stream: 4, ..STREAM },
    ];
    for other in others {
        assert!((0..4).all(|k| other.block(5)[k] != STREAM.block(5)[k]), "{other:?} and {STREAM:?}");
    }
}

#[test]
fn the_logarithm_keeps_its_digits() {
    // Every 997th word (997 is prime, as is the larger step for Miri) and both ends; the words' uniforms are all that
    // `ln` is called with.
    let step = if cfg!(miri) { 10_000_019 } else { 997 };
    let mut worst = 0.0f64;
    for word in (0..=u32::MAX).step_by(step).chain([1, 2, 3, u32::MAX - 128, u32::MAX - 127, u32::MAX]) {
        let u = open_uniform(word);
        let (got, want) = (f64::from(ln(u)), f64::from(u).ln());
        if want == 0.0 {
            assert_eq!(got, 0.0, "ln 1");
        } else {
            let ulp = f64::from(f32::EPSILON) * want.abs().log2().floor().exp2();
            worst = worst.max((got - want).abs() / ulp);
        }
    }
    println!("ln: {worst:.2} ulp");
    assert!(worst <= 2.0, "ln errs by {worst} ulp");
}

/// Error of a normal of magnitude r: the logarithm's 2 ulp count half under the root, whose own rounding is half an
/// ulp: 1.5 ulp of r. The angle's two roundings and those of the polynomial's last sum and of the product: at most 2
/// units of 2^-23.
fn allowed(r: f64) -> f64 {
    3.5 * f64::from(f32::EPSILON) * r
}

#[test]
#[cfg_attr(miri, ignore = "threads, and a million numbers")]
fn normals_are_what_box_and_muller_define() {
    let count = 1 << 20;
    let mut got = vec![f32::NAN; count];
    STREAM.normals(&mut got);
    let want = reference::normals::<f64>(&STREAM, 0, count);
    let (mut worst, mut share) = (0.0f64, 0.0f64);
    for i in (0..count).step_by(2) {
        let r = want[i].hypot(want[i + 1]);
        for k in [i, i + 1] {
            let error = (f64::from(got[k]) - want[k]).abs();
            assert!(error <= allowed(r), "normal {k} is {}, expected {}: error {error:e}", got[k], want[k]);
            worst = worst.max(error);
            share = share.max(error / allowed(r));
        }
    }
    println!("largest error {worst:.2e}, {share:.2} of its bound");
    assert!(worst <= 1e-6, "largest error {worst:e}");
}

#[test]
fn the_outermost_words_make_finite_normals() {
    for magnitude in [0, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX - 1, u32::MAX] {
        for angle in [0, 1, 0x1fff_ffff, 0x2000_0000, 0x3fff_ffff, 0x4000_0000, 0x8000_0000, 0xc000_0000, u32::MAX] {
            let (a, b) = box_muller(magnitude, angle);
            let u = f64::from(open_uniform(magnitude));
            let r = (-2.0 * u.ln()).sqrt();
            assert!(r <= 6.77, "{r}");
            let quarters = f64::from(angle >> 30) + f64::from(offset(angle)) / f64::from(1 << 25);
            let (sin, cos) = (quarters * std::f64::consts::FRAC_PI_2).sin_cos();
            for (got, want) in [(a, r * cos), (b, r * sin)] {
                assert!(
                    (f64::from(got) - want).abs() <= allowed(r),
                    "{magnitude:#x} {angle:#x}: {got}, expected {want}"
                );
            }
        }
    }
}

/// The vectorised fill and the scalar function agree to the bit: no level of vector instructions fuses anything. From
/// any block on and for any length.
#[test]
fn fills_are_the_scalar_function() {
    let mut all = Vec::new();
    for block in 0..600 {
        let words = STREAM.block(block);
        let ((a, b), (c, d)) = (box_muller(words[0], words[1]), box_muller(words[2], words[3]));
        all.extend([a, b, c, d].map(f32::to_bits));
    }
    for first in [0, 4, 64, 1000] {
        for len in [0, 1, 3, 4, 5, 63, 64, 65, 200, 1024] {
            let mut out = vec![f32::NAN; len];
            normals_from(&STREAM, first, &mut out);
            let bits: Vec<u32> = out.iter().map(|v| v.to_bits()).collect();
            assert!(bits == all[first..first + len], "{len} normals from {first}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "four pools of threads")]
fn fills_have_the_same_bits_at_any_number_of_threads() {
    let fill = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        let mut out = vec![f32::NAN; 3 * CHUNK + 17];
        pool.install(|| STREAM.normals(&mut out));
        let mut uniforms = vec![f32::NAN; 3 * CHUNK + 17];
        pool.install(|| STREAM.uniforms(&mut uniforms));
        out.into_iter().chain(uniforms).map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = fill(1);
    for threads in [2, 3, 5] {
        assert!(fill(threads) == one, "{threads} threads");
    }
}

/// Sums over the N = 2^22 normals of one stream. Under N(0, 1): the mean has deviation 1/sqrt(N), the variance
/// sqrt(2/N), the third moment sqrt(15/N), the fourth sqrt(96/N), products of neighbours 1/sqrt(N), the number beyond k
/// is binomial.
#[test]
#[cfg_attr(miri, ignore = "statistics of millions of numbers")]
fn normals_have_the_moments_tails_and_independence_of_normals() {
    const N: usize = 1 << 22;
    let mut z = vec![0.0; N];
    STREAM.normals(&mut z);
    let z: Vec<f64> = z.into_iter().map(f64::from).collect();
    let n = N as f64;
    let mean = |f: &dyn Fn(f64) -> f64| z.iter().map(|&z| f(z)).sum::<f64>() / n;
    let within = |name: &str, got: f64, want: f64, deviation: f64| {
        assert!((got - want).abs() <= 5.0 * deviation, "{name} is {got}, expected {want} +- {}", 5.0 * deviation);
    };
    within("the mean", mean(&|z| z), 0.0, (1.0 / n).sqrt());
    within("the variance", mean(&|z| z * z), 1.0, (2.0 / n).sqrt());
    within("the third moment", mean(&|z| z.powi(3)), 0.0, (15.0 / n).sqrt());
    within("the fourth moment", mean(&|z| z.powi(4)), 3.0, (96.0 / n).sqrt());
    // P(z > k) from tables of the normal distribution.
    for (k, p) in [(0.0, 0.5), (1.0, 0.158_655_254), (2.0, 0.022_750_132), (3.0, 1.349_898e-3), (4.0, 3.167_124e-5)] {
        let deviation = (p * (1.0 - p) / n).sqrt();
        within("the share above", mean(&|z| f64::from(u8::from(z > k))), p, deviation);
        within("the share below", mean(&|z| f64::from(u8::from(z < -k))), p, deviation);
    }
    // Lag 1 is inside pairs and across them, 4 from block to block, 64 from group to group.
    for lag in [1, 2, 3, 4, 8, 64] {
        let product = z.iter().zip(&z[lag..]).map(|(a, b)| a * b).sum::<f64>() / (N - lag) as f64;
        within("the correlation with later ones", product, 0.0, (1.0 / n).sqrt());
        // Squares too: sine and cosine of one pair share their magnitude in a faulty generator.
        let squares =
            z.iter().zip(&z[lag..]).map(|(a, b)| (a * a - 1.0) * (b * b - 1.0)).sum::<f64>() / (N - lag) as f64;
        within("the correlation of squares", squares, 0.0, (4.0 / n).sqrt());
    }
    let neighbours = [Stream { stream: 4, ..STREAM }, Stream { step: 18, ..STREAM }, Stream { seed: 1, ..STREAM }];
    for other in neighbours {
        let mut w = vec![0.0; N];
        other.normals(&mut w);
        let product = z.iter().zip(&w).map(|(a, &b)| a * f64::from(b)).sum::<f64>() / n;
        within("the correlation of streams", product, 0.0, (1.0 / n).sqrt());
    }
}

/// Over 256 bins the sum of squared deviations is chi-squared with 255 degrees of freedom: 255 +- 22.6.
#[test]
#[cfg_attr(miri, ignore = "statistics of a million numbers")]
fn uniforms_fill_the_unit_interval_evenly() {
    const N: usize = 1 << 20;
    let mut u = vec![f32::NAN; N];
    STREAM.uniforms(&mut u);
    assert!(u.iter().all(|u| (0.0..1.0).contains(u)));
    let words: Vec<u32> = (0..N as u32 / 4).flat_map(|block| STREAM.block(block)).collect();
    assert!(u.iter().zip(&words).all(|(&u, word)| f64::from(u) == f64::from(word >> 8) / 16_777_216.0));
    let mut bins = [0.0f64; 256];
    u.iter().for_each(|u| bins[(u * 256.0) as usize] += 1.0);
    let expected = N as f64 / 256.0;
    let chi2: f64 = bins.iter().map(|b| (b - expected).powi(2) / expected).sum();
    assert!((chi2 - 255.0).abs() <= 5.0 * 510f64.sqrt(), "chi-squared is {chi2}");
}

#[test]
#[cfg_attr(miri, ignore = "statistics of a million numbers")]
fn integers_below_n_have_no_bias() {
    let draw = |n: u32, i: u32| Stream { stream: i, ..STREAM }.below(n);
    const N: u32 = 1 << 18;
    // A multiply-and-shift that refuses no word gives a third of the numbers below 3 * 2^30 twice the weight of the
    // others: of the 2^32 words, two go to each multiple of 3. With refusals the three residues are equally likely.
    for (n, residues) in [(10, 10), (1000, 1000), (3 << 30, 3), (2, 2)] {
        let mut counts = vec![0.0f64; residues as usize];
        for i in 0..N {
            let k = draw(n, i);
            assert!(k < n);
            counts[(k % residues) as usize] += 1.0;
        }
        let expected = f64::from(N) / f64::from(residues);
        let freedom = f64::from(residues - 1);
        let chi2: f64 = counts.iter().map(|c| (c - expected).powi(2) / expected).sum();
        assert!(
            (chi2 - freedom).abs() <= 5.0 * (2.0 * freedom).sqrt(),
            "below {n}: chi-squared is {chi2} of {freedom}"
        );
    }
    assert!((0..100).all(|i| draw(1, i) == 0));
}

#[test]
fn the_generator_walks_the_stream() {
    let words: Vec<u32> = (0..3).flat_map(|block| STREAM.block(block)).collect();
    let mut generator = STREAM.generator();
    assert_eq!((0..5).map(|_| generator.next_u32()).collect::<Vec<_>>(), words[..5]);
    assert_eq!(generator.next_u64(), u64::from(words[5]) | u64::from(words[6]) << 32);
    let mut bytes = [0; 7];
    generator.try_fill_bytes(&mut bytes).expect("cannot fail");
    assert_eq!(bytes[..4], words[7].to_le_bytes());
    assert_eq!(bytes[4..], words[8].to_le_bytes()[..3]);

    let shuffled = |stream: Stream| {
        let mut order: Vec<usize> = (0..1000).collect();
        order.shuffle(&mut stream.generator());
        order
    };
    assert_eq!(shuffled(STREAM), shuffled(STREAM));
    assert_ne!(shuffled(STREAM), shuffled(Stream { stream: 4, ..STREAM }));
    let mut sorted = shuffled(STREAM);
    sorted.sort_unstable();
    assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
}
