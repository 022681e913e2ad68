// Rung 5 of the convolution: slabs come while others are multiplied.
//
// computes   y[n, i, j, o] = sum over (u, v, c) of x[n, i + u - 1, j + v - 1, c] weight[o, u, v, c], zero outside x
// layout     x (n, h, w, c_in), weight (c_out, 3, 3, c_in), y (n, h, w, c_out), bf16
// mapping    block = 64 pixels x 64 output channels; warp = 32x32 of them in fragments of mma.m16n8k16
//            from the one before: copy_async in bring(), the loop over slabs
// shared     memory (STAGES, BM + BN, 4) chunks, 32 KiB: cp.async writes, ldmatrix reads, free after the next
//            barrier. Slab k is in slot k % STAGES:
//
//                k            prologue              0         1         2
//                wait                             slab 0    slab 1    slab 2    it has arrived, for this thread
//                barrier                            b0        b1        b2      ... for all; all have read slab k - 1
//                bring        0>s0, 1>s1, 2>s2    3>s3      4>s0      5>s1      the slot of slab k - 1
//                multiply                           s0        s1        s2
// bound by   addresses: bring() divides by w, h and 9 for every slab; rung 7 walks instead
// host       c_in a multiple of 8; n h w <= 2^22, 9 c_in c_out < 2^30; buffers aligned to 16 bytes
// numerics   the products and the order of rung 4, so its bits
#include "../include/ptx.cuh"

constexpr int BM = 64, BN = 64, BK = 32, WM = 32, WN = 32, THREADS = 128, STAGES = 4;

// The 16-byte chunk (8 k) of a row of BK k, in units of chunks. r.c = row r, chunk c; [ ] = a matrix of ldmatrix:
//
// bank        0-3    4-7    8-11  12-15  16-19  20-23  24-27  28-31
// rows 0, 1  [0.0]   0.1    0.2    0.3   [1.0]   1.1    1.2    1.3     every row of a matrix has four banks of its
// rows 2, 3   2.1   [2.0]   2.3    2.2    3.1   [3.0]   3.3    3.2     own: one pass
// rows 4, 5   4.2    4.3   [4.0]   4.1    5.2    5.3   [5.0]   5.1
// rows 6, 7   6.3    6.2    6.1   [6.0]   7.3    7.2    7.1   [7.0]
__device__ __forceinline__ int slot(int row, int chunk) { return 4 * row + (chunk ^ row / 2 % 4); }

// Slab k has the channels from k / 9 BK on of tap k % 9: channels outside, taps inside. Each thread brings four chunks.
__device__ __forceinline__ void bring(uint32_t ab, const bf16* x, const bf16* weight, int k, int pixels, int h, int w,
                                      int c_in, int c_out) {
    const int u = k % 9 / 3 - 1, v = k % 3 - 1;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const int row = p * 32 + threadIdx.x / 4, chunk = threadIdx.x % 4, c = k / 9 * BK + 8 * chunk;
        const bf16* from = x;
        bool inside = c < c_in;
        if (p < 2) {
            const int m = blockIdx.x * BM + row, i = m / w % h + u, j = m % w + v;
            inside = inside && m < pixels && i >= 0 && i < h && j >= 0 && j < w;
            if (inside) from = x + (size_t)(m + u * w + v) * c_in + c;
        } else {
            const int o = blockIdx.y * BN + row - BM;
            inside = inside && o < c_out;
            if (inside) from = weight + (size_t)(o * 9 + k % 9) * c_in + c;
        }
        copy_async(ab + 16 * slot(row, chunk), from, inside);
    }
}

// acc += the product of a slab.
__device__ __forceinline__ void multiply(float (&acc)[WM / 16][WN / 8][4], uint32_t ab, int row0, int col0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < BK / 16; ++s) {
        uint32_t a[WM / 16][4], b[WN / 16][4];  // (WM, 16), (WN, 16) of a warp
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
            load_matrices<false>(a[i], ab + 16 * slot(row0 + 16 * i + lane % 16, 2 * s + lane / 16));
#pragma unroll
        for (int j = 0; j < WN / 16; ++j) {
            const int col = col0 + 16 * j + lane / 16 * 8 + lane % 8;
            load_matrices<false>(b[j], ab + 16 * slot(BM + col, 2 * s + lane / 8 % 2));
        }
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int j = 0; j < WN / 8; ++j)
                multiply_add(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_5_cp_async(bf16* y, const bf16* x, const bf16* weight, int n, int h, int w, int c_in, int c_out) {
    __shared__ __align__(128) uint4 memory[STAGES * (BM + BN) * 4];
    const int pixels = n * h * w, slabs = (c_in + BK - 1) / BK * 9, warp = threadIdx.x / 32;
    const int row0 = warp / 2 * WM, col0 = warp % 2 * WN;
    const uint32_t ab = shared_address(memory);
    float acc[WM / 16][WN / 8][4] = {};  // (WM, WN) of a warp
    constexpr int SLOT = (BM + BN) * 4 * 16;
    for (int k = 0; k < STAGES - 1; ++k) {
        if (k < slabs) bring(ab + k * SLOT, x, weight, k, pixels, h, w, c_in, c_out);
        commit_group();
    }
    for (int k = 0; k < slabs; ++k) {
        wait_group<STAGES - 2>();
        __syncthreads();  // slab k is there for all, and all have read slab k - 1, whose slot is written next
        const int next = k + STAGES - 1;
        if (next < slabs) bring(ab + next % STAGES * SLOT, x, weight, next, pixels, h, w, c_in, c_out);
        commit_group();  // even an empty one, so that the count holds
        multiply(acc, ab + k % STAGES * SLOT, row0, col0);
    }
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int m = blockIdx.x * BM + row0 + 16 * i + lane / 4 + e / 2 * 8;
                const int o = blockIdx.y * BN + col0 + 8 * j + lane % 4 * 2 + e % 2;
                if (m >= pixels || o >= c_out) continue;
                store(y + (size_t)m * c_out + o, acc[i][j][e]);
            }
}
