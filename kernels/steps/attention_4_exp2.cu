// Rung 4 of attention: fewer instructions between the two products.
//
// computes   S = q k^T / sqrt(D); P = softmax of the rows of S; o = P v, for one head
// layout     q, k, v, o (n, D) bf16, D = 64
// mapping    block = BM rows; warp = 16 of them, in fragments of mma.m16n8k16: its rows of q, BN columns of S, and all
//            channels of o. A lane has the rows g and g + 8 of each (g = lane / 4, t = lane % 4), so that a row's
//            maximum and sum are over four lanes. What it has of S it needs of P, whose k are the columns of S:
//
//                S, tiles 2k and 2k + 1    c0 c1 (row g)    c2 c3 (row g + 8)    c0 c1 (row g)    c2 c3 (row g + 8)
//                P, columns 16k .. + 16    a0               a1                   a2               a3
//            from the one before: softmax(), sum_of_row() behind the loop, further()
// shared     memory (STAGES, 2, BN, 8) chunks, keys and values, 32 KiB: cp.async writes, ldmatrix reads, free after the
//            next barrier. Tile i is in slot i % STAGES:
//
//                tile         prologue      0         1         2
//                wait                     tile 0    tile 1    tile 2    it has arrived, for this thread
//                barrier                    b0        b1        b2      ... for all; all have read tile i - 1
//                bring          0>s0      1>s1      2>s0      3>s1      the slot of tile i - 1
//                multiply                   s0        s1        s0
// bound by   shared memory: 640 cycles for a tile, beside 512 of an A100's tensor cores, or 256 of an H100's
// host       n <= 16,384; buffers aligned to 16 bytes
// numerics   as rung 2, but exp(S - m) is 2^(q k^T log2 e / sqrt(D) - m), m in these units, by a fused multiply-add and
//            an instruction good to 2 ulp; l is summed by each lane, over the four lanes at the end: other bits than
//            rung 3's
#include "../include/ptx.cuh"

constexpr float SCALE = 0.125f * 1.44269504f;  // log2 e / sqrt(D)
constexpr int D = 64, BM = 64, BN = 64, THREADS = 128, STAGES = 2;

// The 16-byte chunk (8 channels) of a row of D, in units of chunks. r.c = row r, chunk c; [ ] = a matrix of ldmatrix:
//
// bank    0-3    4-7    8-11  12-15  16-19  20-23  24-27  28-31
// row 0  [0.0]   0.1    0.2    0.3    0.4    0.5    0.6    0.7      every row of a matrix has four banks of its
// row 1   1.1   [1.0]   1.3    1.2    1.5    1.4    1.7    1.6      own: one pass
// row 2   2.2    2.3   [2.0]   2.1    2.6    2.7    2.4    2.5
// row 3   3.3    3.2    3.1   [3.0]   3.7    3.6    3.5    3.4
// row 4   4.4    4.5    4.6    4.7   [4.0]   4.1    4.2    4.3
// row 5   5.5    5.4    5.7    5.6    5.1   [5.0]   5.3    5.2
// row 6   6.6    6.7    6.4    6.5    6.2    6.3   [6.0]   6.1
// row 7   7.7    7.6    7.5    7.4    7.3    7.2    7.1   [7.0]
__device__ __forceinline__ int slot(int row, int chunk) { return 8 * row + (chunk ^ row % 8); }

// The address of slot(row + 16 i, chunk + 2 c), if `first` is that of slot(row, chunk) and chunk is 0 or 1: one
// register has them all.
__device__ __forceinline__ uint32_t further(uint32_t first, int i, int c) { return (first ^ 32 * c) + 2048 * i; }

// Tokens first .. + BN of k or v; zeros beyond the last. Each thread brings four chunks.
__device__ __forceinline__ void bring(uint32_t to, const bf16* x, int first, int n) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const int row = p * 16 + threadIdx.x / 8, chunk = threadIdx.x % 8, token = first + row;
        copy_async(to + 16 * slot(row, chunk), token < n ? x + token * D + 8 * chunk : x, token < n);
    }
}

// s = q k^T, unscaled.
__device__ __forceinline__ void score(float (&s)[BN / 8][4], const uint32_t (&query)[D / 16][4], uint32_t keys) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = keys + 16 * slot(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < BN / 16; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) s[2 * j + e / 4][e % 4] = 0.0f;
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
            uint32_t b[4];  // (16 channels, 16 columns), in memory column by column
            load_matrices<false>(b, further(first, j, c));
            multiply_add(s[2 * j], query[c], b[0], b[1]);
            multiply_add(s[2 * j + 1], query[c], b[2], b[3]);
        }
    }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float max_of_row(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float sum_of_row(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// 2^x to 2 ulp; 0 instead of a subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// s becomes 2^(s SCALE - m), of `count` columns; where these raise m, l and acc are scaled by 2^(old - new).
__device__ __forceinline__ void softmax(float (&s)[BN / 8][4], float (&acc)[D / 8][4], float (&m)[2], float (&l)[2],
                                        int count) {
    if (count < BN) {
#pragma unroll
        for (int e = 0; e < BN / 2; ++e)
            if (e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2 >= count) s[e / 4][e % 4] = -INFINITY;
    }
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < BN / 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        const float old = m[half];
        m[half] = fmaxf(old, max_of_row(largest) * SCALE);  // the scale is positive: the largest stays the largest
        shrink[half] = exp2_fast(old - m[half]);
        l[half] *= shrink[half];
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                s[j][e] = exp2_fast(fmaf(s[j][e], SCALE, -m[half]));
                l[half] += s[j][e];
            }
    }
    // Most tiles have no larger score than those before, and a factor of 1 changes no bits.
    if (!__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[j][e] *= shrink[e / 2];
}

// Two neighbours as a register of a fragment.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
}

// acc += P v. The same rows of memory as for S, read across: v is not transposed.
__device__ __forceinline__ void add(float (&acc)[D / 8][4], const float (&p)[BN / 8][4], uint32_t values) {
    const int lane = threadIdx.x % 32;
    const uint32_t first = values + 16 * slot(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < BN / 16; ++k) {
        const uint32_t a[4] = {pack(p[2 * k][0], p[2 * k][1]), pack(p[2 * k][2], p[2 * k][3]),
                               pack(p[2 * k + 1][0], p[2 * k + 1][1]), pack(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t b[4];  // (16 columns of S, 16 channels)
            load_matrices<true>(b, further(first, k, j));
            multiply_add(acc[2 * j], a, b[0], b[1]);
            multiply_add(acc[2 * j + 1], a, b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_4_exp2(bf16* o, const bf16* q, const bf16* k, const bf16* v, int n) {
    __shared__ __align__(128) uint4 memory[STAGES * 2 * BN * 8];
    const int lane = threadIdx.x % 32, row = blockIdx.x * BM + threadIdx.x / 32 * 16 + lane / 4;
    const uint32_t ring = shared_address(memory);
    constexpr int HALF = BN * 8 * 16, SLOT = 2 * HALF;  // bytes of the keys, and of a tile
    bring(ring, k, 0, n);
    bring(ring + HALF, v, 0, n);
    commit_group();
    uint32_t query[D / 16][4];  // (16 rows, D) of a warp; rows beyond the last repeat it
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at = min(row + e % 2 * 8, n - 1) * D + 16 * c + lane % 4 * 2 + e / 2 * 8;
            query[c][e] = *reinterpret_cast<const uint32_t*>(q + at);
        }
    float acc[D / 8][4] = {};             // (16 rows, D) of a warp: o times l
    float m[2] = {-INFINITY, -INFINITY};  // (2 rows): in units of log2
    float l[2] = {};                      // (2 rows): of this lane's columns
    for (int first = 0, at = 0; first < n; first += BN, at ^= SLOT) {
        wait_group<0>();
        __syncthreads();  // the tile is there for all, and all have read the one before, whose slot is written next
        if (first + BN < n) {
            bring(ring + (at ^ SLOT), k, first + BN, n);
            bring(ring + (at ^ SLOT) + HALF, v, first + BN, n);
        }
        commit_group();
        float s[BN / 8][4];  // (16 rows, BN columns) of a warp: S, then P times l
        score(s, query, ring + at);
        softmax(s, acc, m, l, n - first);
        add(acc, s, ring + at + HALF);
    }
    for (float& sum : l) sum = sum_of_row(sum);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t* to = reinterpret_cast<uint32_t*>(o + (row + 8 * half) * D + 8 * j + lane % 4 * 2);
            if (row + 8 * half < n) *to = pack(acc[j][2 * half] / l[half], acc[j][2 * half + 1] / l[half]);
        }
}
