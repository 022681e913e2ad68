//! The likelihood by the probability-flow ODE on data whose density is known: every pixel N(0.1, 0.5^2), for which the
//! exact network is known too. The numbers were computed once in float64 with another solver.

use ddpm_cuda::diffusion::{Kind, Prediction, Schedule};
use ddpm_cuda::likelihood::{Answer, From, Level, Levels, Query, bits_per_dim, integrate};

const MEAN: f64 = 0.1;
const STANDARD_DEVIATION: f64 = 0.5;

/// eps* = sqrt(1 - A) (x - sqrt(A) m) / V(A), V(A) = A s^2 + 1 - A, and its product with the probe.
fn exact(query: &Query<'_>) -> Answer {
    let one = |(x, (level, z)): (&Vec<f64>, (&Level, &&[f64]))| {
        let alpha_bar = 1.0 / (1.0 + level.sigma * level.sigma);
        let slope = (1.0 - alpha_bar).sqrt() / (alpha_bar * STANDARD_DEVIATION.powi(2) + 1.0 - alpha_bar);
        let eps = x.iter().map(|x| slope * (x - alpha_bar.sqrt() * MEAN)).collect();
        (eps, z.iter().map(|z| slope * z).collect())
    };
    query.x.iter().zip(query.levels.iter().zip(query.z)).map(one).collect()
}

fn linear() -> Levels {
    Levels::new(&Schedule::new(Kind::Linear, 1000).unwrap())
}

#[test]
fn the_density_of_a_gaussian() {
    let levels = linear();
    let image = vec![(vec![0.3], vec![1.0])];
    // Errors of some twenty steps, whose signs differ. The prior at T is not exactly that of the data, so the limit differs from the true -0.3057913526.
    for (tolerance, budget) in [(1e-3, 1e-3), (1e-5, 1e-5), (1e-8, 1e-8)] {
        let got = integrate(&levels, From::Image, tolerance, &image, |query| Ok(exact(query))).unwrap()[0];
        assert!((got.log_p - -0.3060583766).abs() <= budget, "{got:?} at {tolerance}");
        println!("tolerance {tolerance}: {got:?}");
        assert!(got.evaluations < 500, "{got:?}");
    }
    // From the first timestep on, the value is that of the density of x_0 there, by the same flow.
    let cut = integrate(&levels, From::FirstTimestep, 1e-10, &image, |query| Ok(exact(query))).unwrap()[0].log_p;
    assert!((cut - -0.3060583766).abs() < 1e-3 && cut != -0.3060583766, "{cut}");
}

#[test]
fn an_image_does_not_depend_on_its_batch_and_probes_of_a_diagonal_are_exact() {
    let levels = linear();
    let far = |seed: u64| -> (Vec<f64>, Vec<f64>) {
        let sign = |k: u64| if (seed + k).is_multiple_of(2) { 1.0 } else { -1.0 };
        ((0..5).map(|k| 0.3 * (seed as f64) * sign(k) - 0.2).collect(), (0..5).map(sign).collect())
    };
    let images: Vec<_> = (0..4).map(far).collect();
    let solve = |images: &[(Vec<f64>, Vec<f64>)]| {
        integrate(&levels, From::Image, 1e-6, images, |query| Ok(exact(query))).unwrap()
    };
    let together = solve(&images);
    for (k, image) in images.iter().enumerate() {
        assert_eq!(solve(std::slice::from_ref(image))[0], together[k], "image {k}");
        // A diagonal Jacobian: any signs give its trace.
        let other = (image.0.clone(), image.1.iter().map(|z| -z).collect());
        assert_eq!(solve(&[other])[0].log_p, together[k].log_p);
        // log p of independent pixels is a sum.
        let alone = |x: f64| solve(&[(vec![x], vec![1.0])])[0].log_p;
        let sum: f64 = image.0.iter().map(|&x| alone(x)).sum();
        assert!((sum - together[k].log_p).abs() < 5e-5, "{sum} {:?}", together[k]);
    }
}

#[test]
fn a_flow_that_cannot_be_followed_is_an_error() {
    let image = vec![(vec![0.3], vec![1.0])];
    let nowhere = |query: &Query<'_>| Ok(query.x.iter().map(|_| (vec![f64::NAN], vec![0.0])).collect());
    let error = integrate(&linear(), From::Image, 1e-3, &image, nowhere).unwrap_err().to_string();
    assert!(error.contains("the flow of image 0 cannot be followed beyond sigma = 0.0000"), "{error}");
}

#[test]
fn timesteps_are_interpolated_in_the_logarithm_of_sigma() {
    let cosine = Levels::new(&Schedule::new(Kind::Cosine, 1000).unwrap());
    let wanted = [(0.19, 54.31, 111.75), (1.02, 261.86, 501.40), (5.42, 578.80, 881.93), (80.0, 929.62, 990.98)];
    for (sigma, of_linear, of_cosine) in wanted {
        let (a, b) = (linear().at(sigma).t, cosine.at(sigma).t);
        assert!((a - of_linear).abs() < 0.006 && (b - of_cosine).abs() < 0.006, "{sigma}: {a} {b}");
    }
    assert_eq!(linear().at(1e-3).t, 0.0);
    assert_eq!(linear().at(1e9).t, 999.0);
    // Without the last timestep, where nothing is left of the image.
    let zero = Levels::new(&Schedule::new(Kind::Linear, 1000).unwrap().with_zero_terminal_snr());
    assert_eq!(zero.at(1e9).t, 998.0);
}

#[test]
fn bits_of_a_uniform_density_are_eight() {
    // A density of 1/2 on [-1, 1] and a step of 2/255 a byte: log2 255, and 256 half-steps wider.
    assert!((bits_per_dim(3.0 * 0.5f64.ln(), 3) - 255f64.log2()).abs() < 1e-12);
}

#[test]
fn eps_between_timesteps_is_that_at_timesteps() {
    let schedule = Schedule::new(Kind::Cosine, 100).unwrap();
    for prediction in [Prediction::Eps, Prediction::X0, Prediction::V] {
        for t in 0..100 {
            let sigma = ((1.0 - schedule.alpha_bar(t)) / schedule.alpha_bar(t)).sqrt();
            let (a, b) = (prediction.eps(&schedule, t), prediction.eps_at(sigma));
            let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs();
            assert!(near(a.xt, b.xt) && near(a.output, b.output), "{prediction} at {t}: {a:?} {b:?}");
        }
    }
}
