//! Parameters: how they are initialised, and how their gradients share one buffer.

use ddpm_cuda::device::Device;
use ddpm_cuda::params::{Init, Layout, ParamGrads, Params, Specs};
use ddpm_cuda::tensor::Shape;

/// fan_in = 9 * 8, fan_out = 9 * 40: different, so that swapping them shows.
const CONV: Shape = Shape::new(40, 3, 3, 8);

fn specs() -> Specs {
    let mut specs = Specs::default();
    specs.add("conv".into(), CONV, Layout::Conv, Init::FanAvg { scale: 1.0 });
    specs.add("ones".into(), Shape::vector(7), Layout::Vector, Init::Ones);
    specs.add("twin".into(), CONV, Layout::Conv, Init::FanAvg { scale: 1.0 });
    specs.add("last".into(), CONV, Layout::Conv, Init::FanAvg { scale: 1e-10 });
    specs.add("zeros".into(), Shape::vector(5), Layout::Vector, Init::Zeros);
    specs.add("table".into(), Shape::new(100, 1, 1, 30), Layout::Matrix, Init::Normal);
    specs
}

fn values<'a>(params: &'a Params, name: &str) -> &'a [f32] {
    let (p, _) = params.specs().iter().find(|(_, spec)| spec.name == name).expect("a parameter of this name");
    params.get(p)
}

/// Uniform on [-b, b] with b = sqrt(6 scale / (fan_in + fan_out)), whose variance is b^2 / 3.
#[test]
fn weights_start_with_the_variance_of_both_fans() {
    let params = Params::init(&Device::cpu_guarded(), specs(), 3).unwrap();
    for (name, scale) in [("conv", 1.0), ("twin", 1.0), ("last", 1e-10)] {
        let (w, bound) = (values(&params, name), (6.0 * scale / (9.0 * 48.0f64)).sqrt());
        let largest = w.iter().fold(0.0, |m: f64, v| m.max(f64::from(v.abs())));
        // The bound itself is rounded to f32. The largest of 2,880 numbers is above 0.99 of it, except once in 3e12.
        assert!((0.99..1.0 + 1e-7).contains(&(largest / bound)), "{name}: largest {largest}, bound {bound}");
        // The variance of x^2 is 4 b^4 / 45; five standard deviations.
        let n = w.len() as f64;
        let squares = w.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
        let deviation = bound.powi(2) * (4.0 / 45.0 / n).sqrt();
        assert!((squares - bound.powi(2) / 3.0).abs() < 5.0 * deviation, "{name}: mean square {squares}");
        let mean = w.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        assert!(mean.abs() < 5.0 * bound / (3.0 * n).sqrt(), "{name}: mean {mean}");
    }
    let table = values(&params, "table");
    let n = table.len() as f64;
    let squares = table.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
    assert!((squares - 1.0).abs() < 5.0 * (2.0 / n).sqrt(), "table: mean square {squares}");
    assert!(values(&params, "ones").iter().all(|&v| v == 1.0) && values(&params, "zeros").iter().all(|&v| v == 0.0));
}

#[test]
fn every_parameter_has_its_own_stream() {
    let device = Device::cpu();
    let params = Params::init(&device, specs(), 3).unwrap();
    assert!(values(&params, "conv") != values(&params, "twin"), "two parameters of one shape start the same");
    assert!(values(&params, "conv") != values(&Params::init(&device, specs(), 4).unwrap(), "conv"), "another seed");
    let mut more = specs();
    more.add("more".into(), CONV, Layout::Conv, Init::FanAvg { scale: 1.0 });
    let more = Params::init(&device, more, 3).unwrap();
    let (flat, more) = (params.host().unwrap(), more.host().unwrap());
    assert!(*flat == more[..flat.len()], "a parameter at the end changes those before it");
}

#[test]
fn parameters_start_on_cache_lines_and_gaps_stay_zero() {
    let params = Params::init(&Device::cpu_guarded(), specs(), 3).unwrap();
    let flat = params.host().unwrap();
    let mut used = vec![false; flat.len()];
    for (p, spec) in params.specs().iter() {
        let range = params.specs().range(p);
        assert!(range.start.is_multiple_of(16) && range.len() == spec.shape.len(), "{}: {range:?}", spec.name);
        assert!(used[range.clone()].iter().all(|used| !used), "{} overlaps another", spec.name);
        used[range].fill(true);
    }
    assert!(used.iter().zip(&*flat).all(|(used, v)| *used || *v == 0.0), "a gap is not zero");
    assert_eq!(params.specs().count(), used.iter().filter(|used| **used).count());
}

/// The first contribution of a step overwrites, later ones add, and a gradient that nobody writes is zero.
#[test]
fn gradients_are_overwritten_then_added_to_and_zero_where_nobody_wrote() {
    let specs = specs();
    let mut grads = ParamGrads::new(&Device::cpu_guarded(), &specs).unwrap();
    let handles: Vec<_> = specs.iter().map(|(p, _)| p).collect();
    for step in 0..3 {
        grads.reset();
        let first = grads.slot(&specs, handles[step]);
        assert!(!first.accumulate, "step {step}: the first contribution is told to add");
        first.data.fill(1.0);
        let second = grads.slot(&specs, handles[step]);
        assert!(second.accumulate, "step {step}: the second contribution is told to overwrite");
        second.data.iter_mut().for_each(|g| *g += 1.0);
        let flat = grads.finish(&specs).unwrap().data();
        for (k, &p) in handles.iter().enumerate() {
            let want = if k == step { 2.0 } else { 0.0 };
            assert!(flat[specs.range(p)].iter().all(|&g| g == want), "step {step}: gradient of parameter {k}");
        }
    }
}
