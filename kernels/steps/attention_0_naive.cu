// Rung 0 of attention: the whole matrix of scores in memory, three passes.
//
// computes   S = q k^T / sqrt(D); P = softmax of the rows of S; o = P v, for one head
// layout     q, k, v, o (n, D) bf16, D = 64; S (n, n) f32
// mapping    block = one row, 64 threads; thread = every 64th column of S, then one channel of o
// shared     partial (64) f32, the threads' maxima: written by all, read by all in the same order
// bound by   memory: S is written, read, written and read, 16 bytes for 4 D FLOP; k and v are fetched for every row
// host       n <= 16,384
// numerics   f32 throughout, o rounded once; m is the row's maximum, l the sum of exp(S - m)
#include "../include/dtype.cuh"

constexpr int D = 64;

extern "C" __global__ void __launch_bounds__(D)
attention_0_naive(bf16* o, const bf16* q, const bf16* k, const bf16* v, float* S, int n) {
    __shared__ float partial[D];
    const int row = blockIdx.x, t = threadIdx.x;
    float* s = S + (size_t)row * n;  // (n)
    float m = -INFINITY, l = 0.0f, acc = 0.0f;
    for (int col = t; col < n; col += D) {
        float sum = 0.0f;
        for (int d = 0; d < D; ++d) sum = fmaf(load(q + row * D + d), load(k + col * D + d), sum);
        s[col] = sum * 0.125f;  // 1 / sqrt(D)
        m = fmaxf(m, s[col]);
    }
    partial[t] = m;
    __syncthreads();  // the maxima are there
    for (int i = 0; i < D; ++i) m = fmaxf(m, partial[i]);
    for (int col = t; col < n; col += D) s[col] = expf(s[col] - m);
    __syncthreads();  // the row of exponentials is there, for all of the block
    for (int col = 0; col < n; ++col) {
        l += s[col];
        acc = fmaf(s[col], load(v + col * D + t), acc);
    }
    store(o + row * D + t, acc / l);
}
