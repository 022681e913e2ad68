//! Fewer points and fewer pictures, chosen so that a long run shows what a short one would.

use crate::history::{Point, Samples};

/// At most `most` points of a curve, four or more: the first, the last, and of each of equally long stretches of steps
/// the lowest and the highest. A spike stays, however many points there are.
pub fn curve(points: &[Point], most: usize) -> Vec<Point> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    if points.len() <= most {
        return points.to_vec();
    }
    let stretches = ((most - 2) / 2) as u64;
    let length = u64::from(last.step - first.step) + 1;
    let stretch = |point: &Point| u64::from(point.step - first.step) * stretches / length;
    let mut thinned = vec![*first];
    for of_stretch in points.chunk_by(|a, b| stretch(a) == stretch(b)) {
        let by_value = |a: &(usize, &Point), b: &(usize, &Point)| a.1.value.total_cmp(&b.1.value);
        let lowest = of_stretch.iter().enumerate().min_by(by_value).map_or(0, |(at, _)| at);
        let highest = of_stretch.iter().enumerate().max_by(by_value).map_or(0, |(at, _)| at);
        thinned.push(of_stretch[lowest.min(highest)]);
        thinned.push(of_stretch[lowest.max(highest)]);
    }
    thinned.push(*last);
    thinned.dedup_by_key(|point| point.step);
    thinned
}

/// At most `most` files of samples, of at most `bytes` bytes in all: evenly chosen, the first and the last among them;
/// none if the last alone is larger.
pub fn grids(samples: &[Samples], most: usize, bytes: u64) -> Vec<&Samples> {
    let mut count = samples.len().min(most);
    while count > 0 {
        let last = samples.len() - 1;
        let chosen: Vec<&Samples> = match count {
            1 => vec![&samples[last]],
            _ => (0..count).map(|i| &samples[i * last / (count - 1)]).collect(),
        };
        if chosen.iter().map(|samples| samples.bytes).fold(0, u64::saturating_add) <= bytes {
            return chosen;
        }
        count -= 1;
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(step: u32, value: f64) -> Point {
        Point { step, seconds: 0.0, value }
    }

    #[test]
    fn spikes_stay_and_the_number_of_points_is_bounded() {
        for count in [0, 1, 3, 10, 11, 1000, 5432] {
            let mut points: Vec<Point> = (1..=count).map(|step| point(step * 50, 1.0 / f64::from(step))).collect();
            let spikes = if count < 10 { Vec::new() } else { vec![(count / 3, 7.0), (count / 2, -3.0)] };
            for (at, value) in &spikes {
                points[*at as usize].value = *value;
            }
            let thinned = curve(&points, 10);
            assert!(thinned.len() <= 10, "{} points of {count}", thinned.len());
            assert!(thinned.is_sorted_by(|a, b| a.step < b.step), "{thinned:?}");
            assert_eq!((thinned.first(), thinned.last()), (points.first(), points.last()));
            for (at, value) in spikes {
                assert!(thinned.iter().any(|point| point.value == value), "the spike at {at} of {count} is gone");
            }
            if count <= 10 {
                assert_eq!(thinned, points);
            }
        }
    }

    #[test]
    fn grids_are_chosen_evenly_within_their_bytes() {
        let samples: Vec<Samples> =
            (0..101).map(|step| Samples { step, path: "".into(), bytes: 10, written: None }).collect();
        let steps = |most, bytes| grids(&samples, most, bytes).iter().map(|s| s.step).collect::<Vec<_>>();
        assert_eq!(steps(5, 1000), [0, 25, 50, 75, 100]);
        assert_eq!(steps(5, 39), [0, 50, 100]);
        assert_eq!(steps(5, 19), [100]);
        assert_eq!(steps(5, 9), [0u32; 0]);
        assert_eq!(steps(1000, 100_000).len(), 101);
        assert!(grids(&[], 5, 100).is_empty());
    }
}
