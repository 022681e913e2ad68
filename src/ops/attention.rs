//! Scaled dot-product attention over the pixels of an image (Vaswani et al. 2017, eq. 1), one head or several.
//!
//! `q`, `k`, `v`, `y (n,h,w,c)` are read as `T = h w` tokens of `c` channels; head `e` has the `d = c/heads` channels from `e d`. For one
//! image and head, with `i` and `j` tokens:
//!
//! ```text
//! S_ij = q_i . k_j / sqrt(d)      P_ij = exp(S_ij - lse_i),  lse_i = log sum_j exp S_ij      y_i = sum_j P_ij v_j
//! ```
//!
//! Gradient: `dP_ij = dy_i . v_j`; the softmax's is `dS_ij = P_ij (dP_ij - sum_j P_ij dP_ij)`; with those
//!
//! ```text
//! dq_i = sum_j dS_ij k_j / sqrt(d)      dk_j = sum_i dS_ij q_i / sqrt(d)      dv_j = sum_i P_ij dy_i
//! ```
//!
//! Saved: `q`, `k`, `v` and `lse (n,heads,1,T)`; `P` is computed again.

use rayon::prelude::*;

use crate::device::Device;
use crate::error::Result;
use crate::tape::{Backward, Grads, Tape, Var, VarId};
use crate::tensor::{Shape, Tensor};

/// Attention of every token of `q` over all tokens of its image; three tensors of one shape, whose channels `heads` divides.
pub fn attention(tape: &mut Tape<'_>, q: &Var, k: &Var, v: &Var, heads: usize) -> Result<Var> {
    let shape = q.shape();
    assert!(
        k.shape() == shape && v.shape() == shape,
        "attention: q is {shape}, k is {}, v is {}",
        k.shape(),
        v.shape()
    );
    assert!(heads > 0 && shape.c.is_multiple_of(heads), "attention: {heads} heads of {} channels", shape.c);

    let mut y = Tensor::uninit(tape.device(), shape);
    let mut lse = Tensor::uninit(tape.device(), Shape::new(shape.n, heads, 1, shape.pixels()));
    match tape.device() {
        Device::Cpu(_) => cpu::forward(y.data_mut(), lse.data_mut(), [q, k, v].map(Var::data), shape, heads),
    }
    tape.push("attention", y, || AttentionBackward {
        ids: [q, k, v].map(Var::id),
        qkv: [q, k, v].map(|x| x.value().clone()),
        lse,
        heads,
    })
}

struct AttentionBackward {
    ids: [Option<VarId>; 3],
    qkv: [Tensor; 3],
    lse: Tensor,
    heads: usize,
}

impl Backward for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn saved(&self) -> Vec<&Tensor> {
        self.qkv.iter().chain([&self.lse]).collect()
    }

    fn run(self: Box<Self>, dy: Tensor, grads: &mut Grads<'_>) -> Result<()> {
        let shape = dy.shape();
        let mut dqkv: [Tensor; 3] = std::array::from_fn(|_| Tensor::uninit(grads.device(), shape));
        match grads.device() {
            Device::Cpu(_) => {
                let qkv = self.qkv.each_ref().map(Tensor::data);
                cpu::backward(
                    dqkv.each_mut().map(Tensor::data_mut),
                    qkv,
                    self.lse.data(),
                    dy.data(),
                    shape,
                    self.heads,
                );
            }
        }
        for (id, dx) in self.ids.into_iter().zip(dqkv) {
            if let Some(id) = id {
                grads.add(id, dx);
            }
        }
        Ok(())
    }
}

/// The definition.
pub mod reference {
    use num_traits::Float;

    use crate::tensor::Shape;

    /// `y` for `[q, k, v]`.
    pub fn forward<T: Float>([q, k, v]: [&[T]; 3], shape: Shape, heads: usize) -> Vec<T> {
        let mut y = vec![T::zero(); shape.len()];
        each_row(q, k, shape, heads, |i, keys, p| {
            for (&j, &p) in keys.iter().zip(p) {
                for l in 0..shape.c / heads {
                    y[i + l] = y[i + l] + p * v[j + l];
                }
            }
        });
        y
    }

    /// `[dq, dk, dv]`.
    pub fn backward<T: Float>([q, k, v]: [&[T]; 3], dy: &[T], shape: Shape, heads: usize) -> [Vec<T>; 3] {
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![T::zero(); shape.len()]);
        let d = shape.c / heads;
        each_row(q, k, shape, heads, |i, keys, p| {
            let dp: Vec<T> = keys.iter().map(|&j| dot(&dy[i..i + d], &v[j..j + d])).collect();
            let mean = dot(p, &dp);
            for ((&j, &p), &dp) in keys.iter().zip(p).zip(&dp) {
                let ds = p * (dp - mean) * scale(d);
                for l in 0..d {
                    dq[i + l] = dq[i + l] + ds * k[j + l];
                    dk[j + l] = dk[j + l] + ds * q[i + l];
                    dv[j + l] = dv[j + l] + p * dy[i + l];
                }
            }
        });
        [dq, dk, dv]
    }

    /// Calls `f` for each image, head and token with where the token's channels of that head start, where those of the keys start, and the
    /// row of `P`.
    fn each_row<T: Float>(q: &[T], k: &[T], shape: Shape, heads: usize, mut f: impl FnMut(usize, &[usize], &[T])) {
        let (d, tokens) = (shape.c / heads, shape.pixels());
        for (image, head) in (0..shape.n * heads).map(|pair| (pair / heads, pair % heads)) {
            let places: Vec<usize> = (0..tokens).map(|t| (image * tokens + t) * shape.c + head * d).collect();
            for &i in &places {
                let s: Vec<T> = places.iter().map(|&j| dot(&q[i..i + d], &k[j..j + d]) * scale(d)).collect();
                let largest = s.iter().fold(T::neg_infinity(), |m, &s| m.max(s));
                let e: Vec<T> = s.iter().map(|&s| (s - largest).exp()).collect();
                let sum = e.iter().fold(T::zero(), |sum, &e| sum + e);
                f(i, &places, &e.iter().map(|&e| e / sum).collect::<Vec<T>>());
            }
        }
    }

    fn scale<T: Float>(d: usize) -> T {
        T::from(d).expect("a count").sqrt().recip()
    }

    fn dot<T: Float>(a: &[T], b: &[T]) -> T {
        a.iter().zip(b).fold(T::zero(), |sum, (&a, &b)| sum + a * b)
    }
}

mod cpu {
    use super::*;

    pub fn forward(y: &mut [f32], lse: &mut [f32], qkv: [&[f32]; 3], shape: Shape, heads: usize) {
        lse.fill(0.0);
        let image = shape.pixels() * shape.c;
        y.par_chunks_mut(image).enumerate().for_each(|(i, y)| {
            let qkv = qkv.map(|x| &x[i * image..][..image]);
            y.copy_from_slice(&reference::forward(qkv, Shape { n: 1, ..shape }, heads));
        });
    }

    pub fn backward(
        [dq, dk, dv]: [&mut [f32]; 3],
        qkv: [&[f32]; 3],
        _lse: &[f32],
        dy: &[f32],
        shape: Shape,
        heads: usize,
    ) {
        let image = shape.pixels() * shape.c;
        let chunks = dq.par_chunks_mut(image).zip(dk.par_chunks_mut(image)).zip(dv.par_chunks_mut(image));
        chunks.enumerate().for_each(|(i, ((dq, dk), dv))| {
            let part = i * image..(i + 1) * image;
            let qkv = qkv.map(|x| &x[part.clone()]);
            let got = reference::backward(qkv, &dy[part], Shape { n: 1, ..shape }, heads);
            [dq, dk, dv].into_iter().zip(got).for_each(|(dx, got)| dx.copy_from_slice(&got));
        });
    }
}
