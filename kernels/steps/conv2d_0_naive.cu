// Rung 0 of the convolution: a thread per result, everything from global memory.
//
// computes   y[n, i, j, o] = sum over (u, v, c) of x[n, i + u - 1, j + v - 1, c] weight[o, u, v, c], zero outside x
// layout     x (n, h, w, c_in), weight (c_out, 3, 3, c_in), y (n, h, w, c_out), bf16
// mapping    block = 4 pixels x 32 output channels; a warp has one pixel, so its reads of x are the same address
// bound by   loads: each FMA fetches both operands, and lanes read rows of the weight that lie 18 c_in bytes apart
// host       n h w <= 2^22, 9 c_in c_out < 2^30
// numerics   one f32 FMA per (u, v, c), in that order
#include "../include/dtype.cuh"

constexpr int BM = 4, BN = 32;

extern "C" __global__ void __launch_bounds__(BM * BN)
conv2d_0_naive(bf16* y, const bf16* x, const bf16* weight, int n, int h, int w, int c_in, int c_out) {
    const int m = blockIdx.x * BM + threadIdx.x / BN, o = blockIdx.y * BN + threadIdx.x % BN;
    if (m >= n * h * w || o >= c_out) return;
    const int i = m / w % h, j = m % w;
    float acc = 0.0f;
    for (int u = 0; u < 3; ++u)
        for (int v = 0; v < 3; ++v) {
            if (i + u < 1 || i + u > h || j + v < 1 || j + v > w) continue;
            const bf16* pixel = x + (size_t)(m + (u - 1) * w + v - 1) * c_in;  // (c_in)
            const bf16* row = weight + (size_t)((o * 3 + u) * 3 + v) * c_in;   // (c_in)
            for (int c = 0; c < c_in; ++c) acc = fmaf(load(pixel + c), load(row + c), acc);
        }
    store(y + (size_t)m * c_out + o, acc);
}
