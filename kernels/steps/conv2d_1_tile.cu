// Rung 1 of the convolution: a tile in shared memory.
//
// computes   y[n, i, j, o] = sum over (u, v, c) of x[n, i + u - 1, j + v - 1, c] weight[o, u, v, c], zero outside x
// layout     x (n, h, w, c_in), weight (c_out, 3, 3, c_in), y (n, h, w, c_out), bf16
// mapping    block = 64 pixels x 64 output channels; thread = 8 rows x 4 neighbouring columns
// shared     a (BK, BM) and b (BK, BN) in f32, 8 KiB: written by all threads, read after the first barrier, free after
//            the second
// bound by   issue: two fifths of the instructions are FMAs; then the FMAs, then shared memory, 12 words for 32 FMAs
// host       n h w <= 2^22, 9 c_in c_out < 2^30
// numerics   one f32 FMA per (u, v, c), in that order; a tail of channels adds zeros. So the bits are those of rung 0
#include "../include/dtype.cuh"

constexpr int BM = 64, BN = 64, BK = 16, TM = 8, TN = 4;
constexpr int THREADS = BM / TM * (BN / TN);

// Thread t of 128 has rows 8 (t / 16) to + 7 and columns 4 (t % 16) to + 3.
__device__ __forceinline__ int row_of(int i) { return threadIdx.x / (BN / TN) * TM + i; }
__device__ __forceinline__ int col_of(int j) { return threadIdx.x % (BN / TN) * TN + j; }

extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_1_tile(bf16* y, const bf16* x, const bf16* weight, int n, int h, int w, int c_in, int c_out) {
    __shared__ __align__(16) float a[BK][BM], b[BK][BN];
    const int m0 = blockIdx.x * BM, o0 = blockIdx.y * BN, pixels = n * h * w;
    float acc[TM][TN] = {};  // (TM, TN)
    for (int tap = 0; tap < 9; ++tap)
        for (int c0 = 0; c0 < c_in; c0 += BK) {
            const int u = tap / 3 - 1, v = tap % 3 - 1;
            for (int e = threadIdx.x; e < BM * BK; e += THREADS) {
                const int row = e % BM, k = e / BM, m = m0 + row, i = m / w % h + u, j = m % w + v;
                const bool inside = m < pixels && i >= 0 && i < h && j >= 0 && j < w && c0 + k < c_in;
                a[k][row] = inside ? load(x + (size_t)(m + u * w + v) * c_in + c0 + k) : 0.0f;
            }
            for (int e = threadIdx.x; e < BN * BK; e += THREADS) {
                const int col = e % BN, k = e / BN, o = o0 + col;
                const bool inside = o < c_out && c0 + k < c_in;
                b[k][col] = inside ? load(weight + (size_t)(o * 9 + tap) * c_in + c0 + k) : 0.0f;
            }
            __syncthreads();  // a and b are there for all
#pragma unroll
            for (int k = 0; k < BK; ++k) {
                float left[TM], right[TN];  // (TM), (TN)
#pragma unroll
                for (int i = 0; i < TM; ++i) left[i] = a[k][row_of(i)];
#pragma unroll
                for (int j = 0; j < TN; ++j) right[j] = b[k][col_of(j)];
#pragma unroll
                for (int i = 0; i < TM; ++i)
#pragma unroll
                    for (int j = 0; j < TN; ++j) acc[i][j] = fmaf(left[i], right[j], acc[i][j]);
            }
            __syncthreads();  // all have read a and b, which are written next
        }
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; ++j) {
            const int m = m0 + row_of(i), o = o0 + col_of(j);
            if (m < pixels && o < c_out) store(y + (size_t)m * c_out + o, acc[i][j]);
        }
}
