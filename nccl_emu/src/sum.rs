//! Reductions. NCCL promises no order of addition, and its orders depend on sizes, topology and version. Here the order
//! is drawn anew for every block of elements, from a seed, the call and the block: a program whose results depend on it
//! has other bits with another seed. All ranks get the same bits, as from NCCL.

use std::convert::identity;

use half::{bf16, f16};

use crate::call::{Op, Type};

/// Elements that are added in one order.
const BLOCK: usize = 64;

/// The bytes of the ranks' elements `parts`, all equally many, joined by `op`. `draw` stands for the seed and the call.
pub fn reduce(parts: &[&[u8]], dtype: Type, op: Op, draw: u64) -> Vec<u8> {
    match dtype {
        Type::I8 => join::<i8, 1>(parts, op, draw),
        Type::U8 => join::<u8, 1>(parts, op, draw),
        Type::I32 => join::<i32, 4>(parts, op, draw),
        Type::U32 => join::<u32, 4>(parts, op, draw),
        Type::I64 => join::<i64, 8>(parts, op, draw),
        Type::U64 => join::<u64, 8>(parts, op, draw),
        Type::F16 => join::<f16, 2>(parts, op, draw),
        Type::F32 => join::<f32, 4>(parts, op, draw),
        Type::F64 => join::<f64, 8>(parts, op, draw),
        Type::Bf16 => join::<bf16, 2>(parts, op, draw),
    }
}

/// An element of `N` bytes. Each operation rounds to the type.
trait Element<const N: usize>: Copy {
    fn read(bytes: [u8; N]) -> Self;
    fn write(self) -> [u8; N];
    fn plus(self, other: Self) -> Self;
    fn times(self, other: Self) -> Self;
    /// The larger, and NaN if one is NaN.
    fn larger(self, other: Self) -> Self;
    fn smaller(self, other: Self) -> Self;
    fn over(self, count: usize) -> Self;
}

macro_rules! whole_numbers {
    ($($ty:ty: $n:literal),*) => {$(
        impl Element<$n> for $ty {
            fn read(bytes: [u8; $n]) -> Self {
                <$ty>::from_le_bytes(bytes)
            }
            fn write(self) -> [u8; $n] {
                self.to_le_bytes()
            }
            fn plus(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            fn times(self, other: Self) -> Self {
                self.wrapping_mul(other)
            }
            fn larger(self, other: Self) -> Self {
                self.max(other)
            }
            fn smaller(self, other: Self) -> Self {
                self.min(other)
            }
            fn over(self, count: usize) -> Self {
                // Ranks are few; a sum that wrapped is not worth more.
                <$ty>::try_from(count).map_or(0, |count| self / count)
            }
        }
    )*};
}

/// Floats, with the type in which they are computed with, and the way there and back.
macro_rules! floats {
    ($($ty:ty: $n:literal, $computed:ty, $wide:expr, $narrow:expr;)*) => {$(
        impl Element<$n> for $ty {
            fn read(bytes: [u8; $n]) -> Self {
                <$ty>::from_le_bytes(bytes)
            }
            fn write(self) -> [u8; $n] {
                self.to_le_bytes()
            }
            fn plus(self, other: Self) -> Self {
                $narrow($wide(self) + $wide(other))
            }
            fn times(self, other: Self) -> Self {
                $narrow($wide(self) * $wide(other))
            }
            fn larger(self, other: Self) -> Self {
                if self > other || self.is_nan() { self } else { other }
            }
            fn smaller(self, other: Self) -> Self {
                if self < other || self.is_nan() { self } else { other }
            }
            fn over(self, count: usize) -> Self {
                $narrow($wide(self) / count as $computed)
            }
        }
    )*};
}

whole_numbers!(i8: 1, u8: 1, i32: 4, u32: 4, i64: 8, u64: 8);
floats! {
    f16: 2, f32, f16::to_f32, f16::from_f32;
    bf16: 2, f32, bf16::to_f32, bf16::from_f32;
    f32: 4, f32, identity, identity;
    f64: 8, f64, identity, identity;
}

fn join<T: Element<N>, const N: usize>(parts: &[&[u8]], op: Op, draw: u64) -> Vec<u8> {
    let step = match op {
        Op::Sum | Op::Avg => T::plus,
        Op::Prod => T::times,
        Op::Max => T::larger,
        Op::Min => T::smaller,
    };
    let elements: Vec<&[[u8; N]]> = parts.iter().map(|part| part.as_chunks().0).collect();
    let count = elements.first().map_or(0, |first| first.len());
    let mut order: Vec<usize> = (0..parts.len()).collect();
    let mut joined = Vec::with_capacity(count * N);
    for start in (0..count).step_by(BLOCK) {
        shuffle(&mut order, draw ^ start as u64);
        joined.extend((start..count.min(start + BLOCK)).flat_map(|at| {
            let all = order.iter().map(|&rank| T::read(elements[rank][at])).reduce(step);
            let all = all.expect("a communicator has a rank");
            if op == Op::Avg { all.over(parts.len()) } else { all }.write()
        }));
    }
    joined
}

/// A random order, the same for the same `draw` and the same order before.
fn shuffle(order: &mut [usize], draw: u64) {
    let mut state = draw;
    for at in (1..order.len()).rev() {
        // splitmix64; the bias of the remainder is of no consequence for a choice among a few ranks.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^= bits >> 31;
        order.swap(at, (bits % (at as u64 + 1)) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_f32(parts: &[&[f32]], op: Op, draw: u64) -> Vec<f32> {
        let bytes: Vec<Vec<u8>> =
            parts.iter().map(|part| part.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let slices: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        let joined = reduce(&slices, Type::F32, op, draw);
        joined.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    #[test]
    fn every_operation() {
        let parts: [&[f32]; 3] = [&[1.0, -8.0], &[2.0, 4.0], &[3.0, 1.0]];
        for (op, expected) in [
            (Op::Sum, [6.0, -3.0]),
            (Op::Prod, [6.0, -32.0]),
            (Op::Max, [3.0, 4.0]),
            (Op::Min, [1.0, -8.0]),
            (Op::Avg, [2.0, -1.0]),
        ] {
            assert_eq!(of_f32(&parts, op, 1), expected, "{op:?}");
        }
    }

    #[test]
    fn every_type() {
        let both = |dtype, a: &[u8], b: &[u8], op| reduce(&[a, b], dtype, op, 0);
        assert_eq!(both(Type::I8, &[0xff, 100], &[3, 100], Op::Sum), [2, 200]);
        assert_eq!(both(Type::U8, &[250, 7], &[2, 9], Op::Max), [250, 9]);
        let whole = |a: i64, b: i64| both(Type::I64, &a.to_le_bytes(), &b.to_le_bytes(), Op::Avg);
        assert_eq!(whole(-7, 3), (-2i64).to_le_bytes());
        let words = |a: u32, b: u32| both(Type::U32, &a.to_le_bytes(), &b.to_le_bytes(), Op::Prod);
        assert_eq!(words(1 << 20, 3), (3u32 << 20).to_le_bytes());
        assert_eq!(both(Type::I32, &(-5i32).to_le_bytes(), &4i32.to_le_bytes(), Op::Min), (-5i32).to_le_bytes());
        assert_eq!(both(Type::U64, &u64::MAX.to_le_bytes(), &2u64.to_le_bytes(), Op::Sum), 1u64.to_le_bytes());
        assert_eq!(both(Type::F64, &0.5f64.to_le_bytes(), &0.25f64.to_le_bytes(), Op::Sum), 0.75f64.to_le_bytes());
        // 1 + 2^-9 needs ten bits: bf16 has eight and rounds to 1, f16 has eleven.
        let small = 1.0 / 512.0;
        let of = |x: f32| (bf16::from_f32(x).to_le_bytes(), f16::from_f32(x).to_le_bytes());
        assert_eq!(both(Type::Bf16, &of(1.0).0, &of(small).0, Op::Sum), of(1.0).0);
        assert_eq!(both(Type::F16, &of(1.0).1, &of(small).1, Op::Sum), of(1.0 + small).1);
    }

    #[test]
    fn nan_is_not_lost() {
        for op in [Op::Sum, Op::Prod, Op::Max, Op::Min, Op::Avg] {
            for parts in [[&[f32::NAN][..], &[1.0]], [&[1.0], &[f32::NAN]]] {
                assert!(of_f32(&parts, op, 3)[0].is_nan(), "{op:?}");
            }
        }
    }

    /// Sums of three numbers that round differently in different orders.
    #[test]
    fn another_seed_adds_in_another_order() {
        let columns: [Vec<f32>; 3] = [vec![1e8; 1000], vec![-1e8; 1000], vec![1.0; 1000]];
        let parts = [&columns[0][..], &columns[1], &columns[2]];
        let sums = |draw| of_f32(&parts, Op::Sum, draw);
        assert_eq!(sums(1), sums(1));
        assert_ne!(sums(1), sums(2));
        // Within one call too: 0, where 1 was lost beside 1e8, and 1.
        let found = sums(1);
        assert!(found.contains(&0.0) && found.contains(&1.0), "{found:?}");
        assert!(found.chunks(BLOCK).all(|block| block.iter().all(|x| *x == block[0])));
    }
}
