use ddpm_cuda::device::Device;
use ddpm_cuda::ops::tree_sum::{fits, most_waiting, reference, rises, tree_sum, waiting};
use ddpm_cuda::tensor::{Shape, Tensor};

use crate::support::{
    F32_ROUNDING, gpu, numbers, plant, same_bits, same_bits_at_any_number_of_threads, to_f32, worst_at,
};

/// Terms and elements: one term; a whole tree; trees that lack a part on the right, at each height; elements of one
/// thread, one block of the kernel and a thread more, one task of the CPU path and more.
const CASES: [(usize, usize); 10] =
    [(1, 4), (2, 8), (3, 1024), (4, 1028), (5, 64), (6, 4096), (7, 4100), (8, 20_000), (11, 12), (255, 8)];

fn terms((n, len): (usize, usize)) -> Vec<f64> {
    // Of different sizes, so that each order of addition has bits of its own.
    let scale = |i: usize| [1.0, 1e-3, 30.0][i / len % 3];
    numbers(7, n * len).into_iter().enumerate().map(|(i, x)| f64::from((scale(i) * x) as f32)).collect()
}

fn sum(device: &Device, (n, len): (usize, usize), x: &[f32]) -> Vec<f32> {
    let x = Tensor::from_slice(device, Shape::new(n, 1, 1, len), x).unwrap();
    let mut y = Tensor::uninit(device, x.dtype(), Shape::vector(len)).unwrap();
    tree_sum(device, &mut y, &x).unwrap();
    y.to_vec().unwrap()
}

fn rows<T>(x: &[T], len: usize) -> Vec<&[T]> {
    x.chunks(len).collect()
}

#[test]
fn cpu_has_the_bits_of_the_reference() {
    for case in CASES.into_iter().chain([(3, 1), (6, 17), (2, 4097)]) {
        let x = terms(case);
        let got = sum(&Device::cpu_guarded(), case, &to_f32(&x));
        same_bits(&format!("{case:?}"), &got, &reference::forward(&rows(&to_f32(&x), case.1)));
    }
}

/// Each term is in as many additions as the tree is high, each with one rounding of a number that is no larger than the
/// sum of all terms' sizes, but for the roundings so far.
#[test]
fn the_error_grows_with_the_height_of_the_tree() {
    for (n, len) in CASES {
        let x = terms((n, len));
        let got = sum(&Device::cpu(), (n, len), &to_f32(&x));
        let (exact, sizes) = (reference::forward(&rows(&x, len)), x.iter().map(|x| x.abs()).collect::<Vec<f64>>());
        let sizes = reference::forward(&rows(&sizes, len));
        let height = f64::from(n.next_power_of_two().ilog2());
        worst_at("sum", &got, &exact, |i, _| height * F32_ROUNDING * (1.0 + 1e-6) * sizes[i]);
    }
}

/// Level by level: neighbours are added, and the last goes up alone if their number is odd. An independent form of the
/// same tree.
#[test]
fn the_tree_is_that_of_pairs_level_by_level() {
    for n in 1..70 {
        let x = to_f32(&terms((n, 3)));
        let mut level: Vec<Vec<f32>> = x.chunks(3).map(<[f32]>::to_vec).collect();
        while level.len() > 1 {
            let node = |pair: &[Vec<f32>]| match pair {
                [left, right] => left.iter().zip(right).map(|(left, right)| left + right).collect(),
                alone => alone.concat(),
            };
            level = level.chunks(2).map(node).collect();
        }
        same_bits(&format!("{n} terms"), &reference::forward(&rows(&x, 3)), &level[0]);
    }
}

/// What is added as it comes, by the counter.
fn as_they_come(terms: &[Vec<f32>]) -> Vec<f32> {
    let add = |nodes: &mut Vec<Vec<f32>>| {
        let right = nodes.pop().expect("a node");
        nodes.last_mut().expect("a node before it").iter_mut().zip(right).for_each(|(left, right)| *left += right);
    };
    let (mut nodes, mut most) = (Vec::new(), 0);
    for (done, term) in terms.iter().enumerate() {
        assert_eq!(nodes.len(), waiting(done), "nodes that wait after {done} terms");
        nodes.push(term.clone());
        most = most.max(nodes.len());
        (0..rises(done)).for_each(|_| add(&mut nodes));
    }
    assert_eq!(most, most_waiting(terms.len()), "nodes of {} terms", terms.len());
    while nodes.len() > 1 {
        add(&mut nodes);
    }
    nodes.remove(0)
}

#[test]
fn terms_that_come_one_after_the_other_have_the_same_bits() {
    for n in 1..70 {
        let x = to_f32(&terms((n, 3)));
        let terms: Vec<Vec<f32>> = x.chunks(3).map(<[f32]>::to_vec).collect();
        same_bits(&format!("{n} terms"), &as_they_come(&terms), &reference::forward(&rows(&x, 3)));
    }
}

/// Every number of ranks that fits has the bits of one rank, and for some that do not the bits differ.
#[test]
fn the_bits_are_those_of_one_rank_for_every_number_that_fits() {
    let mut others = 0;
    for n in 1..40 {
        let x = to_f32(&terms((n, 50)));
        let want = reference::forward(&rows(&x, 50));
        for ranks in (1..=n).filter(|ranks| n % ranks == 0) {
            let of_rank = |x: &[f32]| as_they_come(&x.chunks(50).map(<[f32]>::to_vec).collect::<Vec<_>>());
            let sums: Vec<Vec<f32>> = x.chunks(n / ranks * 50).map(of_rank).collect();
            let got = sum(&Device::cpu(), (ranks, 50), &sums.concat());
            match fits(n, ranks) {
                true => same_bits(&format!("{n} terms of {ranks} ranks"), &got, &want),
                false => others += usize::from(got != want),
            }
        }
    }
    assert!(others > 20, "only {others} other sums have other bits");
    let fitting = |n: usize| (1..=n + 1).filter(|&ranks| fits(n, ranks)).collect::<Vec<_>>();
    assert_eq!([fitting(1), fitting(4), fitting(6)], [vec![1], vec![1, 2, 4], vec![1, 3, 6]]);
    assert_eq!(fitting(12), [1, 3, 6, 12]);
    assert!(!fits(4, 0) && !fits(4, 8) && fits(9, 9) && !fits(9, 3));
}

#[test]
fn same_bits_with_any_number_of_threads() {
    let x = to_f32(&terms((6, 20_000)));
    same_bits_at_any_number_of_threads("tree_sum", || sum(&Device::cpu_guarded(), (6, 20_000), &x));
}

#[test]
fn gpu_has_the_bits_of_the_cpu() {
    for case in CASES {
        let x = to_f32(&terms(case));
        let want = sum(&Device::cpu(), case, &x);
        gpu::each(&format!("{case:?}"), |device| {
            let got = sum(device, case, &x);
            same_bits(&format!("{case:?}"), &got, &want);
            got
        });
    }
}

#[test]
fn planted_bugs_are_noticed() {
    let test = "tree_sum::gpu_has_the_bits_of_the_cpu";
    plant::notices(test, "tree_sum_fwd", "add.f32", "sub.f32");
    plant::notices_lost_block(test, "tree_sum_fwd");
}
