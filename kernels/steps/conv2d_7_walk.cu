// Rung 7 of the convolution: the main loop walks from slab to slab and no longer divides.
//
// computes   y[n, i, j, o] = sum over (u, v, c) of x[n, i + u - 1, j + v - 1, c] weight[o, u, v, c], zero outside x
//            + bias[o] + shift[n, o] + residual[n, i, j, o]
// layout     x (n, h, w, c_in), weight (c_out, 3, 3, c_in), y (n, h, w, c_out), bf16; bias (c_out), shift (n, c_out),
//            f32; residual as y
// mapping    block = 64 pixels x 64 output channels; warp = 32x32 of them in fragments of mma.m16n8k16
//            from the one before: Tap, Walk in place of bring(), further(), kept()
// shared     memory (STAGES, BM + BN, 4) chunks, 32 KiB: cp.async writes, ldmatrix reads, free after the next
//            barrier. Slab k is in slot k % STAGES:
//
//                k            prologue              0         1         2
//                wait                             slab 0    slab 1    slab 2    it has arrived, for this thread
//                barrier                            b0        b1        b2      ... for all; all have read slab k - 1
//                bring        0>s0, 1>s1, 2>s2    3>s3      4>s0      5>s1      the slot of slab k - 1
//                multiply                           s0        s1        s2
//
//            taps (9): written by nine threads, read after the barrier before the prologue
// bound by   shared memory: a warp's 32x32 results take an ldmatrix for every two mma; tile_mma.cuh has 64x64
// host       c_in a multiple of 8; n h w <= 2^22, 9 c_in c_out < 2^30, (w + 2) c_in < 2^28; buffers aligned to 16
//            bytes
// numerics   the products and the order of rung 6, so its bits
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

// Found once: otherwise the compiler computes it again in the main loop, to save a register.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
    asm volatile("" : "+r"(v));
    return v;
}
__device__ __forceinline__ const char* kept(const void* p) {
    asm volatile("" : "+l"(p));
    return reinterpret_cast<const char*>(p);
}

// How many bytes further on than tap (0, 0) a tap is in x, and in a row of the weight.
struct __align__(8) Tap {
    int x, weight;
};

// Before the walk. The caller must follow with a barrier.
__device__ __forceinline__ void find_taps(Tap (&taps)[9], int w, int c_in) {
    const int tap = threadIdx.x;
    if (tap < 9) taps[tap] = {(tap / 3 * w + tap % 3) * c_in * 2, tap * c_in * 2};
}

// A thread's part of every slab: chunk t % 4 of rows t / 4 and t / 4 + 32 of either operand. Where they are is found
// once; from slab to slab one offset is added, that of the tap.
struct Walk {
    const char *pixel[2], *row[2];  // the chunk of tap (0, 0) and slab 0: in x, or outside it, and in the weight
    unsigned inside[2];             // bit 3 u + v: tap (u, v) of the pixel is in the image
    uint32_t to;                    // the chunk in a slot, in bytes
    int tap, at, end;               // of the next slab; how many bytes its channels are further on, and all channels

    __device__ Walk(const bf16* x, const bf16* weight, int pixels, int h, int w, int c_in, int c_out)
        : to(kept(16 * slot(threadIdx.x / 4, threadIdx.x % 4))), tap(0), at(0), end(2 * c_in - 16 * (threadIdx.x % 4)) {
        const int chunk = 8 * (threadIdx.x % 4);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const int m = blockIdx.x * BM + 32 * p + threadIdx.x / 4, i = m / w % h, j = m % w;
            // Columns v - 1 and rows u - 1 that exist, three bits each.
            const unsigned cols = (j > 0) | 2 | (j + 1 < w) << 2;
            inside[p] = m < pixels ? (i > 0 ? cols : 0) | cols << 3 | (i + 1 < h ? cols << 6 : 0) : 0;
            pixel[p] = kept(x + (long long)(m - w - 1) * c_in + chunk);
            // Rows beyond the last repeat it: they are multiplied but not stored, which costs no test.
            const int o = min(blockIdx.y * BN + 32 * p + threadIdx.x / 4, c_out - 1);
            row[p] = kept(weight + o * 9 * c_in + chunk);
        }
    }

    // Brings the next slab: channels outside, taps inside.
    __device__ __forceinline__ void bring(uint32_t ab, const Tap (&taps)[9]) {
        const Tap by = taps[tap];
        const bool exists = at < end;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            copy_async(ab + to + 64 * 32 * p, pixel[p] + (at + by.x), exists && inside[p] >> tap & 1);
            copy_async(ab + to + 64 * (BM + 32 * p), row[p] + (at + by.weight), exists);
        }
        if (++tap == 9) tap = 0, at += 2 * BK;
    }
};

// The address of slot(row + 16 i, chunk + 2 s), if `first` is that of slot(row, chunk) and chunk is 0 or 1.
__device__ __forceinline__ uint32_t further(uint32_t first, int i, int s) { return (first ^ 32 * s) + 1024 * i; }

// acc += the product of a slab; the lane's row of the first matrices is at a_first and b_first.
__device__ __forceinline__ void multiply(float (&acc)[WM / 16][WN / 8][4], uint32_t a_first, uint32_t b_first) {
#pragma unroll
    for (int s = 0; s < BK / 16; ++s) {
        uint32_t a[WM / 16][4], b[WN / 16][4];  // (WM, 16), (WN, 16) of a warp
#pragma unroll
        for (int i = 0; i < WM / 16; ++i) load_matrices<false>(a[i], further(a_first, i, s));
#pragma unroll
        for (int j = 0; j < WN / 16; ++j) load_matrices<false>(b[j], further(b_first, j, s));
#pragma unroll
        for (int i = 0; i < WM / 16; ++i)
#pragma unroll
            for (int j = 0; j < WN / 8; ++j)
                multiply_add(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_7_walk(bf16* y, const bf16* x, const bf16* weight, int n, int h, int w, int c_in, int c_out, const float* bias,
              const float* shift, const bf16* residual) {
    __shared__ __align__(128) uint4 memory[STAGES * (BM + BN) * 4];
    __shared__ Tap taps[9];
    const int pixels = n * h * w, slabs = (c_in + BK - 1) / BK * 9, warp = threadIdx.x / 32;
    const int row0 = warp / 2 * WM, col0 = warp % 2 * WN;
    const int lane = threadIdx.x % 32;
    const uint32_t ab = shared_address(memory);
    const uint32_t a_first = kept(ab + 16 * slot(row0 + lane % 16, lane / 16));
    const uint32_t b_first = kept(ab + 16 * slot(BM + col0 + lane / 16 * 8 + lane % 8, lane / 8 % 2));
    float acc[WM / 16][WN / 8][4] = {};  // (WM, WN) of a warp
    constexpr int SLOT = (BM + BN) * 4 * 16;
    find_taps(taps, w, c_in);
    Walk walk(x, weight, pixels, h, w, c_in, c_out);
    __syncthreads();  // the taps are there for all
    for (int k = 0; k < STAGES - 1; ++k) {
        if (k < slabs) walk.bring(ab + k * SLOT, taps);
        commit_group();
    }
    for (int k = 0; k < slabs; ++k) {
        wait_group<STAGES - 2>();
        __syncthreads();  // slab k is there for all, and all have read slab k - 1, whose slot is written next
        const int next = k + STAGES - 1;
        if (next < slabs) walk.bring(ab + next % STAGES * SLOT, taps);
        commit_group();  // even an empty one, so that the count holds
        multiply(acc, a_first + k % STAGES * SLOT, b_first + k % STAGES * SLOT);
    }
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int m = blockIdx.x * BM + row0 + 16 * i + lane / 4 + e / 2 * 8;
                const int o = blockIdx.y * BN + col0 + 8 * j + lane % 4 * 2 + e % 2;
                if (m >= pixels || o >= c_out) continue;
                const float more = bias[o] + shift[m / (h * w) * c_out + o] + load(residual + (size_t)m * c_out + o);
                store(y + (size_t)m * c_out + o, acc[i][j][e] + more);
            }
}
