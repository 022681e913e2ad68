// Rung 9 of the convolution: two tensors instead of their concatenation.
//
// computes   y[n, i, j, o] = sum over (u, v, c) of x[n, i + u - 1, j + v - 1, c] weight[o, u, v, c], zero outside x
//            + bias[o] + shift[n, o] + residual[n, i, j, o]
// layout     x (n, h, w, c_in) in two tensors, x (n, h, w, c_first) and second (n, h, w, c_in - c_first); weight
//            (c_out, 3, 3, c_in), y (n, h, w, c_out), bf16; bias (c_out), shift (n, c_out), f32; residual as y; parts
//            (segments, n, h, w, c_out) f32
// mapping    block = 64 pixels x 64 output channels, and segment blockIdx.z of k, or all of them if gridDim.z is 1;
//            warp = 32x32 of them in fragments of mma.m16n8k16
//            from the one before: Inputs, and what the Walk does with them
// shared     memory (STAGES, BM + BN, 4) chunks, 32 KiB: cp.async writes, ldmatrix reads, free after the next
//            barrier. Slab k is in slot k % STAGES:
//
//                k            prologue              0         1         2
//                wait                             slab 0    slab 1    slab 2    it has arrived, for this thread
//                barrier                            b0        b1        b2      ... for all; all have read slab k - 1
//                bring        0>s0, 1>s1, 2>s2    3>s3      4>s0      5>s1      the slot of slab k - 1
//                multiply                           s0        s1        s2
//
//            taps (18): written by as many threads, read after the barrier before the prologue
// bound by   as rung 8; at the second tensor a thread finds two addresses anew
// host       c_in and c_first multiples of 8, c_first > 0; n h w <= 2^22, 9 c_in c_out < 2^30, (w + 2) c_in < 2^28;
//            buffers aligned to 16 bytes. segment: slabs of each, of the 9 that a tensor has for each 32 of its
//            channels, by the shape of one image alone; gridDim.z = segments, and then conv2d_9_join, or 1
// numerics   as rung 8; if 32 divides c_first, or the second tensor has no channels, the bits of rung 8 for the
//            concatenation, otherwise the blocks of channels are others
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

// How many bytes further on than tap (0, 0) a tap is in a tensor, and in a row of the weight.
struct __align__(8) Tap {
    int x, weight;
};

// The two tensors: x has the first c_first channels, the second the others. Both have taps of their own.
struct Inputs {
    const bf16 *x, *second;
    int c_first, c_in;
};

// Before the walk. The caller must follow with a barrier.
__device__ __forceinline__ void find_taps(Tap (&taps)[18], int w, const Inputs& from) {
    const int tap = threadIdx.x % 9, channels = threadIdx.x < 9 ? from.c_first : from.c_in - from.c_first;
    if (threadIdx.x < 18) taps[threadIdx.x] = {(tap / 3 * w + tap % 3) * channels * 2, tap * from.c_in * 2};
}

// A thread's part of every slab: chunk t % 4 of rows t / 4 and t / 4 + 32 of either operand. Where they are is found
// once for each tensor; from slab to slab one offset is added, that of the tap.
struct Walk {
    const Inputs& from;
    const char *pixel[2], *row[2];  // the chunk of tap (0, 0) and channel 0: in a tensor, or outside, and in the weight
    int patch[2];                   // the pixel of tap (0, 0)
    unsigned inside[2];             // bit 3 u + v: tap (u, v) of the pixel is in the image
    uint32_t to;                    // the chunk in a slot, in bytes
    int tap, at, end;               // of the next slab; how many bytes its channels are further on, and the tensor's
    int turn;                       // the tensor's first tap: 0, or 9

    // From slab k on.
    __device__ Walk(const Inputs& from_, const bf16* weight, int k, int pixels, int h, int w, int c_out)
        : from(from_), to(kept(16 * slot(threadIdx.x / 4, threadIdx.x % 4))), tap(k % 9), at(k / 9 * BK * 2) {
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            const int m = blockIdx.x * BM + 32 * p + threadIdx.x / 4, i = m / w % h, j = m % w;
            // Columns v - 1 and rows u - 1 that exist, three bits each.
            const unsigned cols = (j > 0) | 2 | (j + 1 < w) << 2;
            inside[p] = m < pixels ? (i > 0 ? cols : 0) | cols << 3 | (i + 1 < h ? cols << 6 : 0) : 0;
            patch[p] = m - w - 1;
            // Rows beyond the last repeat it: they are multiplied but not stored, which costs no test.
            const int o = min(blockIdx.y * BN + 32 * p + threadIdx.x / 4, c_out - 1);
            row[p] = kept(weight + o * 9 * from.c_in + 8 * (threadIdx.x % 4));
        }
        const int first = (from.c_first + BK - 1) / BK;  // blocks of channels
        open(from.x, 0, from.c_first, 0);
        if (k >= 9 * first) open_second(k / 9 - first);
    }

    // `channels` of a tensor, which in a row of the weight come behind `before` others.
    __device__ __forceinline__ void open(const bf16* x, int before, int channels, int turn_) {
        const int chunk = 8 * (threadIdx.x % 4);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            pixel[p] = kept(x + (long long)patch[p] * channels + chunk - before);
        }
        end = 2 * (before + channels - chunk);
        turn = turn_;
    }
    __device__ __forceinline__ void open_second(int block) {
        at = 2 * (from.c_first + block * BK);
        open(from.second, from.c_first, from.c_in - from.c_first, 9);
    }

    // Brings the next slab: tensors outside, in them channels, taps inside.
    __device__ __forceinline__ void bring(uint32_t ab, const Tap (&taps)[18]) {
        const Tap by = taps[turn + tap];
        const bool exists = at < end;
#pragma unroll
        for (int p = 0; p < 2; ++p) {
            copy_async(ab + to + 64 * 32 * p, pixel[p] + (at + by.x), exists && inside[p] >> tap & 1);
            copy_async(ab + to + 64 * (BM + 32 * p), row[p] + (at + by.weight), exists);
        }
        if (++tap == 9) {
            tap = 0, at += 2 * BK;
            if (turn == 0 && at >= 2 * from.c_first) open_second(0);
        }
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

// sum += acc, the sum of a segment, and acc becomes that of the next.
__device__ __forceinline__ void take(float (&sum)[WM / 16][WN / 8][4], float (&acc)[WM / 16][WN / 8][4]) {
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sum[i][j][e] += acc[i][j][e];
                acc[i][j][e] = 0.0f;
            }
}

// What is added to a sum of result (m, o).
struct Plus {
    const float *bias, *shift;
    const bf16* residual;

    __device__ __forceinline__ float at(int m, int o, int h, int w, int c_out) const {
        return bias[o] + shift[m / (h * w) * c_out + o] + load(residual + (size_t)m * c_out + o);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
conv2d_9_two_inputs(bf16* y, const bf16* x, const bf16* weight, int n, int h, int w, int c_in, int c_out,
                    const float* bias, const float* shift, const bf16* residual, float* parts, unsigned segment,
                    const bf16* second, int c_first) {
    __shared__ __align__(128) uint4 memory[STAGES * (BM + BN) * 4];
    __shared__ Tap taps[18];
    const Plus plus{bias, shift, residual};
    const Inputs from{x, second, c_first, c_in};
    const int pixels = n * h * w, warp = threadIdx.x / 32;
    const int slabs = ((c_first + BK - 1) / BK + (c_in - c_first + BK - 1) / BK) * 9;
    const int row0 = warp / 2 * WM, col0 = warp % 2 * WN;
    const unsigned first = blockIdx.z * segment, count = gridDim.z > 1 ? min(segment, slabs - first) : slabs;
    const int lane = threadIdx.x % 32;
    const uint32_t ab = shared_address(memory);
    const uint32_t a_first = kept(ab + 16 * slot(row0 + lane % 16, lane / 16));
    const uint32_t b_first = kept(ab + 16 * slot(BM + col0 + lane / 16 * 8 + lane % 8, lane / 8 % 2));
    float acc[WM / 16][WN / 8][4] = {}, sum[WM / 16][WN / 8][4] = {};  // (WM, WN) of a warp: a segment, all so far
    constexpr int SLOT = (BM + BN) * 4 * 16;
    find_taps(taps, w, from);
    Walk walk(from, weight, first, pixels, h, w, c_out);
    __syncthreads();  // the taps are there for all
    for (unsigned k = 0; k < STAGES - 1; ++k) {
        if (k < count) walk.bring(ab + k * SLOT, taps);
        commit_group();
    }
    for (unsigned k = 0; k < count;) {
        for (const unsigned end = min(k + segment, count); k < end; ++k) {
            wait_group<STAGES - 2>();
            __syncthreads();  // slab k is there for all, and all have read slab k - 1, whose slot is written next
            const unsigned next = k + STAGES - 1;
            if (next < count) walk.bring(ab + next % STAGES * SLOT, taps);
            commit_group();  // even an empty one, so that the count holds
            multiply(acc, a_first + k % STAGES * SLOT, b_first + k % STAGES * SLOT);
        }
        take(sum, acc);
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
                if (gridDim.z > 1) {
                    parts[((size_t)blockIdx.z * pixels + m) * c_out + o] = sum[i][j][e];
                } else {
                    store(y + (size_t)m * c_out + o, sum[i][j][e] + plus.at(m, o, h, w, c_out));
                }
            }
}

// Adds up the segments in order: block = 4 pixels x 64 output channels.
extern "C" __global__ void __launch_bounds__(256)
conv2d_9_join(bf16* y, const float* parts, int segments, int n, int h, int w, int c_out, const float* bias,
              const float* shift, const bf16* residual) {
    const int m = blockIdx.x * 4 + threadIdx.x / 64, o = blockIdx.y * 64 + threadIdx.x % 64, pixels = n * h * w;
    if (m >= pixels || o >= c_out) return;
    float sum = 0.0f;
    for (int z = 0; z < segments; ++z) sum += parts[((size_t)z * pixels + m) * c_out + o];
    store(y + (size_t)m * c_out + o, sum + Plus{bias, shift, residual}.at(m, o, h, w, c_out));
}
