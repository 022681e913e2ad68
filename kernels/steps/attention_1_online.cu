// Rung 1 of attention: tiles of k and v in shared memory, the softmax as they come; S is never stored.
//
// computes   S = q k^T / sqrt(D); P = softmax of the rows of S; o = P v, for one head
// layout     q, k, v, o (n, D) bf16, D = 64
// mapping    block = BM rows, thread = one of them, with its q and its sums in registers
// shared     keys (BN, D), values (BN, D) in f32, 16 KiB: written by all, read after the first barrier, free after the
//            second. All lanes read the same address
// bound by   FMA, and registers: 128 floats a thread
// host       n <= 16,384
// numerics   m and l as in rung 0 but of the columns seen so far; where a column raises m, what was summed under the
//            old one is scaled by exp(old - new). So the bits differ from rung 0's
#include "../include/dtype.cuh"

constexpr int D = 64, BM = 64, BN = 32;

extern "C" __global__ void __launch_bounds__(BM)
attention_1_online(bf16* o, const bf16* q, const bf16* k, const bf16* v, int n) {
    __shared__ __align__(16) float keys[BN][D], values[BN][D];
    const int row = blockIdx.x * BM + threadIdx.x;
    float query[D], acc[D] = {};  // (D), (D)
    float m = -INFINITY, l = 0.0f;
#pragma unroll
    for (int d = 0; d < D; ++d) query[d] = row < n ? load(q + row * D + d) : 0.0f;
    for (int first = 0; first < n; first += BN) {
        for (int e = threadIdx.x; e < BN * D; e += BM) {
            const int col = first + e / D, d = e % D;
            keys[e / D][d] = col < n ? load(k + col * D + d) : 0.0f;
            values[e / D][d] = col < n ? load(v + col * D + d) : 0.0f;
        }
        __syncthreads();  // the tile is there for all
        for (int j = 0; j < BN && first + j < n; ++j) {
            float s = 0.0f;
#pragma unroll
            for (int d = 0; d < D; ++d) s = fmaf(query[d], keys[j][d], s);
            s *= 0.125f;  // 1 / sqrt(D)
            const float old = m;
            m = fmaxf(m, s);
            const float scale = expf(old - m), p = expf(s - m);
            l = l * scale + p;
#pragma unroll
            for (int d = 0; d < D; ++d) acc[d] = fmaf(p, values[j][d], acc[d] * scale);
        }
        __syncthreads();  // all have read the tile, which is written next
    }
    if (row >= n) return;
#pragma unroll
    for (int d = 0; d < D; ++d) store(o + row * D + d, acc[d] / l);
}
