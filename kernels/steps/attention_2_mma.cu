// Rung 2 of attention: tensor cores, S and P in registers, rows of shared memory as they come.
//
// computes   S = q k^T / sqrt(D); P = softmax of the rows of S; o = P v, for one head
// layout     q, k, v, o (n, D) bf16, D = 64
// mapping    block = BM rows; warp = 16 of them, in fragments of mma.m16n8k16: its rows of q, BN columns of S, and all
//            channels of o. A lane has the rows g and g + 8 of each (g = lane / 4, t = lane % 4), so that a row's
//            maximum and sum are over four lanes. What it has of S it needs of P, whose k are the columns of S:
//
//                S, tiles 2k and 2k + 1    c0 c1 (row g)    c2 c3 (row g + 8)    c0 c1 (row g)    c2 c3 (row g + 8)
//                P, columns 16k .. + 16    a0               a1                   a2               a3
// shared     memory: keys (BN, 8) and values (BN, 8) chunks, 16 KiB: all threads write, ldmatrix reads after the first
//            barrier, free after the second
// bound by   shared memory: ldmatrix takes eight passes where one would do, see slot()
// host       n <= 16,384; buffers aligned to 16 bytes
// numerics   S and o in f32, 16 products at a time; m and l as in rung 1 but BN columns at a time; P is rounded to
//            bf16, by 2^-8 of itself, where it becomes an operand; l is the sum of what was not rounded. So the bits
//            differ from rung 1's
#include "../include/ptx.cuh"

constexpr int D = 64, BM = 64, BN = 64, THREADS = 128;

// The 16-byte chunk (8 channels) of a row of D, in units of chunks. r.c = row r, chunk c; [ ] = a matrix of ldmatrix:
//
// bank    0-3    4-7    8-11  12-15  16-19  20-23  24-27  28-31
// row 0  [0.0]   0.1    0.2    0.3    0.4    0.5    0.6    0.7     all rows of a matrix meet in four banks: eight
// row 1  [1.0]   1.1    1.2    1.3    1.4    1.5    1.6    1.7     passes instead of one
// row 2  [2.0]   2.1    2.2    2.3    2.4    2.5    2.6    2.7
// row 3  [3.0]   3.1    3.2    3.3    3.4    3.5    3.6    3.7
// row 4  [4.0]   4.1    4.2    4.3    4.4    4.5    4.6    4.7
// row 5  [5.0]   5.1    5.2    5.3    5.4    5.5    5.6    5.7
// row 6  [6.0]   6.1    6.2    6.3    6.4    6.5    6.6    6.7
// row 7  [7.0]   7.1    7.2    7.3    7.4    7.5    7.6    7.7
__device__ __forceinline__ int slot(int row, int chunk) { return 8 * row + chunk; }

// Tokens first .. + BN of k or v; zeros beyond the last. Each thread brings four chunks.
__device__ __forceinline__ void bring(uint32_t to, const bf16* x, int first, int n) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        const int row = p * 16 + threadIdx.x / 8, chunk = threadIdx.x % 8, token = first + row;
        const uint4 zero = make_uint4(0, 0, 0, 0);
        store_shared(to + 16 * slot(row, chunk), token < n ? *wide(x + token * D + 8 * chunk) : zero);
    }
}

// s = q k^T, unscaled.
__device__ __forceinline__ void score(float (&s)[BN / 8][4], const uint32_t (&query)[D / 16][4], uint32_t keys) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < BN / 16; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) s[2 * j + e / 4][e % 4] = 0.0f;
#pragma unroll
        for (int c = 0; c < D / 16; ++c) {
            uint32_t b[4];  // (16 channels, 16 columns), in memory column by column
            load_matrices<false>(b, keys + 16 * slot(16 * j + lane / 16 * 8 + lane % 8, 2 * c + lane / 8 % 2));
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

// s becomes exp(S - m), of `count` columns; where these raise m, l and acc are scaled by exp(old - new).
__device__ __forceinline__ void softmax(float (&s)[BN / 8][4], float (&acc)[D / 8][4], float (&m)[2], float (&l)[2],
                                        int count) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float old = m[half];
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                const bool exists = 8 * j + threadIdx.x % 4 * 2 + e % 2 < count;
                s[j][e] = exists ? s[j][e] * 0.125f : -INFINITY;  // 1 / sqrt(D)
                m[half] = fmaxf(m[half], s[j][e]);
            }
        m[half] = max_of_row(m[half]);
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                s[j][e] = expf(s[j][e] - m[half]);
                sum += s[j][e];
            }
        const float scale = expf(old - m[half]);
        l[half] = l[half] * scale + sum_of_row(sum);
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) acc[j][e] *= scale;
    }
}

// Two neighbours as a register of a fragment.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
}

// acc += P v. The same rows of memory as for S, read across: v is not transposed.
__device__ __forceinline__ void add(float (&acc)[D / 8][4], const float (&p)[BN / 8][4], uint32_t values) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < BN / 16; ++k) {
        const uint32_t a[4] = {pack(p[2 * k][0], p[2 * k][1]), pack(p[2 * k][2], p[2 * k][3]),
                               pack(p[2 * k + 1][0], p[2 * k + 1][1]), pack(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
        for (int j = 0; j < D / 16; ++j) {
            uint32_t b[4];  // (16 columns of S, 16 channels)
            load_matrices<true>(b, values + 16 * slot(16 * k + lane % 16, 2 * j + lane / 16));
            multiply_add(acc[2 * j], a, b[0], b[1]);
            multiply_add(acc[2 * j + 1], a, b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_2_mma(bf16* o, const bf16* q, const bf16* k, const bf16* v, int n) {
    __shared__ __align__(128) uint4 memory[2 * BN * 8];
    const int lane = threadIdx.x % 32, row = blockIdx.x * BM + threadIdx.x / 32 * 16 + lane / 4;
    const uint32_t keys = shared_address(memory), values = keys + 16 * 8 * BN;
    uint32_t query[D / 16][4];  // (16 rows, D) of a warp; rows beyond the last repeat it
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at = min(row + e % 2 * 8, n - 1) * D + 16 * c + lane % 4 * 2 + e / 2 * 8;
            query[c][e] = *reinterpret_cast<const uint32_t*>(q + at);
        }
    float acc[D / 8][4] = {};             // (16 rows, D) of a warp: o times l
    float m[2] = {-INFINITY, -INFINITY};  // (2 rows)
    float l[2] = {};                      // (2 rows)
    for (int first = 0; first < n; first += BN) {
        bring(keys, k, first, n);
        bring(values, v, first, n);
        __syncthreads();     // the tile is there for all
        float s[BN / 8][4];  // (16 rows, BN columns) of a warp: S, then P times l
        score(s, query, keys);
        softmax(s, acc, m, l, n - first);
        add(acc, s, values);
        __syncthreads();  // all have read the tile, which is written next
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t* to = reinterpret_cast<uint32_t*>(o + (row + 8 * half) * D + 8 * j + lane % 4 * 2);
            if (row + 8 * half < n) *to = pack(acc[j][2 * half] / l[half], acc[j][2 * half + 1] / l[half]);
        }
}
