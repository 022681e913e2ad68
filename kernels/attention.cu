// attention: scaled dot-product attention within each image, one head or several, and its gradients. No tokens x tokens
// matrix is stored. bf16 runs on tensor cores: attention_mma.cuh has its mapping, shared, bound by and numerics. f32
// runs on FMAs, as said here.
//
// computes   S_ij = q_i . k_j / sqrt(d), m_i = max_j S_ij, l_i = sum_j exp(S_ij - m_i), P_ij = exp(S_ij - m_i) / l_i,
//            y_i = sum_j P_ij v_j;
//            dP_ij = dy_i . v_j, delta_i = sum_j P_ij dP_ij = dy_i . y_i, dS_ij = P_ij (dP_ij - delta_i) / sqrt(d),
//            dq_i = sum_j dS_ij k_j, dk_j = sum_i dS_ij q_i, dv_j = sum_i P_ij dy_i.
//            The letters are FlashAttention's (Dao et al. 2022); its O is y here and its D is delta. In bf16 fwd can
//            go on with the linear layer that follows a single head.
//            Three passes: fwd; bwd_q, which writes dq and delta; then bwd_kv. Both backward passes compute S and dP:
//            seven products of tokens x tokens x d, where a stored matrix or atomics would need five
// layout     q, k, v, y and their gradients (n, tokens, c), f32 or bf16; head e has the channels e d .. e d + d.
//            lost (n, tokens, c), bf16 only: what rounding took from y. stats (n, heads, 2, tokens), f32: m log2 e,
//            then 1 / l (r in src/ops/attention.rs). delta (n, heads, tokens), f32
// mapping    block = one (image, head) and B_R tokens as rows; it loops over all tokens as columns, B_C at a time.
//            warp w = rows 8 w .. 8 w + 8 of the block (D > 256: 4 w .. 4 w + 4).
//            lane, in S and dP = 4 rows and every 16th column (D > 256: every 32nd), 4 (2) in all; in the sums over
//            columns = the same 4 rows and D/16 (D/32) channels. So a row's statistics stay in its 16 (32) lanes, and
//            warps exchange no results. Compiled for d up to D = 32, 64, 128, 256, 512
// shared     34 KiB at most: `operands` 18 KiB, `p_or_ds` 16 KiB; see Shared
// bound by   f32 arithmetic, in S and dP also shared memory. A 16-byte read of a warp takes four cycles of the
//            multiprocessor's shared memory, or two where all lanes share their addresses with a neighbour (i ^ 1 or
//            i ^ 2). For four warps, one on each scheduler, and 128 FMAs a cycle (A100: 64, twice the FMA cycles):
//                                          FMAs a lane    reads    cycles of shared memory    of FMAs
//            S, dP, D <= 256                        64        8          4 (8 x 2) = 64            64
//            S, dP, D = 512                         32        6    4 (4 x 2 + 2 x 4) = 64            32
//            sums, D = 256                          64        5          4 (5 x 2) = 40            64
//            sums, D = 512                          64        5      4 (2 + 4 x 4) = 72            64
//            With lane / 16 for the rows, 0..15 side by side, only the reads of rows took two cycles: 96 and 72 for
//            D <= 256
// host       heads d = c; grid.x = n heads ceil(tokens / B_R); scale = 1 / sqrt(d), scale_log2 = log2 e / sqrt(d); vec
//            only if 4 divides d; tensors start on 256-byte boundaries; stats, delta and lost come from the earlier
//            passes over the same tensors. bf16: as attention_mma.cuh says
// numerics   f32 sums over the channels, and over the columns in order. The row's largest score so far is subtracted
//            before each exponential, and the sums are rescaled when it grows (Milakov and Gimelshein 2018). 2^x is the
//            hardware's, accurate to 2 ulp. m and 1 / l are stored separately: the log-sum-exp m + log l, as one f32,
//            would lose digits of l when m is large. In bf16, delta from y alone would carry y's rounding error, the
//            same for all columns of a row, into sums whose terms nearly cancel (an error of 100 output roundings was
//            seen in dq): hence lost. The same bits at every repetition and for any batch
//
// One block (D <= 256)                             S of a warp: the lane of each row and column
//
//               columns 0..63      64..127         columns     0  1 .. 15 | 16 17 .. 31 | 32 33 .. 47 | 48 49 .. 63
//   rows 0..7   [  warp 0  ]  -->  [  warp 0  ]    rows 0..3   0  2 .. 30 |  0  2 .. 30 |  0  2 .. 30 |  0  2 .. 30
//   rows 8..15  [  warp 1  ]  -->  [  warp 1  ]    rows 4..7   1  3 .. 31 |  1  3 .. 31 |  1  3 .. 31 |  1  3 .. 31
//     ...
//   rows 56..63 [  warp 7  ]  -->  [  warp 7  ]    y of a warp: the same rows, 4 neighbouring channels per lane
//
//   fwd and bwd_q: rows are queries, columns keys. bwd_kv: rows are keys, columns queries
#include "attention_mma.cuh"
#include "dtype.cuh"

// Host twin: threads per block, 8 warps. A multiprocessor holds two blocks of up to 128 registers per thread, which
// suffices for heads of up to 64 channels (forward 128); of larger heads it holds one.
constexpr unsigned THREADS = 256;
// Host twin: rows per block, 8 per warp.
constexpr unsigned B_R = 64;
// Host twin: rows per block for heads of more than 256 channels, 4 per warp: a lane's sums stay in 64 registers.
constexpr unsigned B_R_D512 = 32;
constexpr unsigned B_C = 64;  // columns at a time
constexpr unsigned WARPS = THREADS / 32;
constexpr unsigned DEPTH = 32;         // channels of both operands of S (or dP) in shared memory at a time
constexpr unsigned PITCH = DEPTH + 4;  // floats from row to row there: 8 lanes that each read 16 bytes of neighbouring
                                       // rows hit each bank once

// The tiling of a block for heads of up to D channels.
template <unsigned D>
struct Tile {
    static constexpr unsigned ROWS = D <= 256 ? B_R : B_R_D512;
    static constexpr unsigned WARP_ROWS = ROWS / WARPS;
    static constexpr unsigned LANES = 128 / WARP_ROWS;  // lanes side by side along the columns of a row: 16 or 32
    static constexpr unsigned GROUPS = WARP_ROWS / 4;   // of four rows in a warp: 2 or 1
    static constexpr unsigned COLS = B_C / LANES;       // columns per lane
    static constexpr unsigned CHANNELS = D / LANES;     // channels per lane
    static constexpr unsigned VEC = CHANNELS < 4 ? CHANNELS : 4;  // neighbouring ones among them
    static constexpr unsigned STRIP = 4096 / D < B_C ? 4096 / D : B_C;  // whole tokens in shared memory at a time
    static constexpr unsigned OPERANDS = (ROWS + B_C) * PITCH > STRIP * D ? (ROWS + B_C) * PITCH : STRIP * D;
    // The first of the lane's four rows among its warp's, and its place along the columns. Lanes i and i ^ 1 share
    // columns, i and i ^ 2 rows: see `bound by`.
    __device__ static unsigned row() { return threadIdx.x % GROUPS * 4; }
    __device__ static unsigned col() { return threadIdx.x % 32 / GROUPS; }
};

template <unsigned D>
struct Shared {
    // 18 KiB (d <= 256). For S and dP: rows, then columns, of DEPTH channels, pitch PITCH. For the sums over columns:
    // STRIP tokens of D channels. Written and read by all threads, with a barrier after each.
    float operands[Tile<D>::OPERANDS];
    // 16 KiB (d <= 256), (warp, column, row): P or dS. Written by a warp and read by that warp alone, after the barrier
    // that follows the next write to `operands`.
    float p_or_ds[WARPS][B_C][Tile<D>::WARP_ROWS];
};

// One (image, head), and where this thread works in it.
struct Position {
    size_t offset;       // element index of the head's first channel of the image's first token
    size_t first_token;  // index of the image's first token in delta; twice that in stats
    unsigned tokens, d;
    unsigned stride;     // elements from token to token
    unsigned vec;        // 16-byte (bf16: 8-byte) accesses
    unsigned first;      // the block's first row
    unsigned row;        // the first of the thread's 4 rows
    unsigned col;        // the first of its columns, which are every LANES-th: its index among the lanes of its rows
    bool active;         // the warp has rows
};

template <unsigned D>
__device__ __forceinline__ Position position_of(unsigned tokens, unsigned c, unsigned heads, unsigned vec) {
    using C = Tile<D>;
    const unsigned blocks = (tokens - 1) / C::ROWS + 1, image_head = blockIdx.x / blocks;
    const unsigned d = c / heads, image = image_head / heads, head = image_head % heads;
    Position pos;
    pos.offset = size_t(image) * tokens * c + size_t(head) * d;
    pos.first_token = size_t(image_head) * tokens;
    pos.tokens = tokens;
    pos.d = d;
    pos.stride = c;
    pos.vec = vec;
    const unsigned first = blockIdx.x % blocks * C::ROWS, warp = threadIdx.x / 32;
    pos.first = first;
    pos.row = first + warp * C::WARP_ROWS + C::row();
    pos.col = C::col();
    pos.active = first + warp * C::WARP_ROWS < tokens;
    return pos;
}

// Copies tokens first .. first + COUNT, channels from .. from + WIDTH of x to rows PITCH_OUT floats apart in shared
// memory; what does not exist becomes zero.
template <unsigned COUNT, unsigned WIDTH, unsigned PITCH_OUT>
__device__ __forceinline__ void copy_to_shared(float* to, const float* x, const Position& pos, unsigned first,
                                               unsigned from) {
    x += pos.offset + size_t(first) * pos.stride + from;
    // How many of them exist.
    const unsigned count = first < pos.tokens ? min(pos.tokens - first, COUNT) : 0, channels = min(pos.d - from, WIDTH);
    if (pos.vec) {
        // A thread has the same 4 channels of every STEP-th token.
        constexpr unsigned STEP = THREADS / (WIDTH / 4);
        const unsigned token = threadIdx.x / (WIDTH / 4), channel = threadIdx.x % (WIDTH / 4) * 4;
        const unsigned end = channel < channels ? count : 0;
        x += size_t(token) * pos.stride + channel;
        to += token * PITCH_OUT + channel;
#pragma unroll
        for (unsigned i = 0; i < COUNT / STEP; ++i) {
            const bool live = token + i * STEP < end;
            const float4 v = live ? load4(x + i * STEP * size_t(pos.stride)) : make_float4(0, 0, 0, 0);
            store4(to + i * STEP * PITCH_OUT, v);
        }
    } else {
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < COUNT * WIDTH; i += THREADS) {
            const unsigned token = i / WIDTH, channel = i % WIDTH;
            const bool live = token < count && channel < channels;
            to[token * PITCH_OUT + channel] = live ? x[size_t(token) * pos.stride + channel] : 0;
        }
    }
}

// s = A B^T over all channels: A = the block's rows of a, B = tokens column .. column + B_C of b. All threads call it.
template <unsigned D>
__device__ __forceinline__ void multiply_abt(float (&s)[4][Tile<D>::COLS],  // (4 rows, every LANES-th column)
                                             Shared<D>& shared,
                                             const float* a, const float* b,  // (n, tokens, c)
                                             const Position& pos, unsigned column) {
    using C = Tile<D>;
    const unsigned warp = threadIdx.x / 32;
    float* const b_shared = shared.operands + C::ROWS * PITCH;                                         // (B_C, DEPTH)
    const float* const my_a = shared.operands + (warp * C::WARP_ROWS + C::row()) * PITCH;              // (4, DEPTH)
    const float* const my_b = b_shared + C::col() * PITCH;  // (COLS, DEPTH), every LANES-th row of B
#pragma unroll
    for (unsigned r = 0; r < 4; ++r)
#pragma unroll
        for (unsigned j = 0; j < C::COLS; ++j) s[r][j] = 0;
    for (unsigned from = 0; from < pos.d; from += DEPTH) {
        copy_to_shared<C::ROWS, DEPTH, PITCH>(shared.operands, a, pos, pos.first, from);
        copy_to_shared<B_C, DEPTH, PITCH>(b_shared, b, pos, column, from);
        __syncthreads();  // the operands written above are read below
        if (pos.active) {
            // Channels beyond d are zero, up to a multiple of 4.
            const unsigned depth = min(pos.d - from, DEPTH);
#pragma unroll 1
            for (unsigned k = 0; k < depth; k += 4) {
                float4 x[4], z[C::COLS];
#pragma unroll
                for (unsigned r = 0; r < 4; ++r) x[r] = load4(my_a + r * PITCH + k);
#pragma unroll
                for (unsigned j = 0; j < C::COLS; ++j) z[j] = load4(my_b + j * C::LANES * PITCH + k);
#pragma unroll
                for (unsigned r = 0; r < 4; ++r)
#pragma unroll
                    for (unsigned j = 0; j < C::COLS; ++j) {
                        s[r][j] = fmaf(x[r].x, z[j].x, s[r][j]);
                        s[r][j] = fmaf(x[r].y, z[j].y, s[r][j]);
                        s[r][j] = fmaf(x[r].z, z[j].z, s[r][j]);
                        s[r][j] = fmaf(x[r].w, z[j].w, s[r][j]);
                    }
            }
        }
        __syncthreads();  // all have read before the operands are written again
    }
}

// sum += P X, where X is tokens column .. column + B_C of x and P is p (or dS) of the warp's rows. All threads call it.
template <unsigned D>
__device__ __forceinline__ void accumulate_px(float (&sum)[4][Tile<D>::CHANNELS],  // (4 rows, channels of the lane)
                                              Shared<D>& shared,
                                              const float (&p)[4][Tile<D>::COLS],  // (4 rows, every LANES-th column)
                                              const float* x,                      // (n, tokens, c)
                                              const Position& pos, unsigned column) {
    using C = Tile<D>;
    float* const my_p = &shared.p_or_ds[threadIdx.x / 32][0][C::row()];  // (B_C, 4 rows)
    // A warp's P is its own; the warp last read it before the barrier at the end of the previous call.
#pragma unroll
    for (unsigned j = 0; j < C::COLS; ++j)
        store4(my_p + (j * C::LANES + C::col()) * C::WARP_ROWS, make_float4(p[0][j], p[1][j], p[2][j], p[3][j]));
    const unsigned count = min(pos.tokens - column, B_C);
    for (unsigned from = 0; from < count; from += C::STRIP) {
        copy_to_shared<C::STRIP, D, D>(shared.operands, x, pos, column + from, 0);
        __syncthreads();  // the tokens and the P written above are read below
        if (pos.active) {
            const float* token = shared.operands + C::VEC * C::col();
            const float* p_token = my_p + from * C::WARP_ROWS;
            const unsigned strip = min(count - from, C::STRIP);
#pragma unroll 2
            for (unsigned j = 0; j < strip; ++j, token += D, p_token += C::WARP_ROWS) {
                const float4 p4 = load4(p_token);
#pragma unroll
                for (unsigned u = 0; u < C::CHANNELS; u += C::VEC) {
                    float z[C::VEC];
                    if constexpr (C::VEC == 4) {
                        const float4 v = load4(token + u * C::LANES);
                        z[0] = v.x, z[1] = v.y, z[2] = v.z, z[3] = v.w;
                    } else {
                        static_assert(C::VEC == 2, "channels in vectors of 2 or 4");
                        const float2 v = *reinterpret_cast<const float2*>(token + u * C::LANES);
                        z[0] = v.x, z[1] = v.y;
                    }
#pragma unroll
                    for (unsigned i = 0; i < C::VEC; ++i) {
                        sum[0][u + i] = fmaf(p4.x, z[i], sum[0][u + i]);
                        sum[1][u + i] = fmaf(p4.y, z[i], sum[1][u + i]);
                        sum[2][u + i] = fmaf(p4.z, z[i], sum[2][u + i]);
                        sum[3][u + i] = fmaf(p4.w, z[i], sum[3][u + i]);
                    }
                }
            }
        }
        __syncthreads();  // all have read before the operands and P are written again
    }
}

// Stores the thread's channels of its 4 rows, times the row's `factor`, to x (n, tokens, c).
template <unsigned D>
__device__ __forceinline__ void store_rows(float* x, const float (&sum)[4][Tile<D>::CHANNELS], const float (&factor)[4],
                                           const Position& pos) {
    using C = Tile<D>;
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        if (pos.row + r >= pos.tokens) return;
        float* to = x + pos.offset + size_t(pos.row + r) * pos.stride;
        const float f = factor[r];
#pragma unroll
        for (unsigned u = 0; u < C::CHANNELS; u += C::VEC) {
            const unsigned channel = u * C::LANES + C::VEC * pos.col;
            const float* from = &sum[r][u];
            if (C::VEC == 4 && pos.vec) {
                if (channel < pos.d)
                    store4(to + channel, make_float4(from[0] * f, from[1] * f, from[2] * f, from[3] * f));
            } else {
#pragma unroll
                for (unsigned i = 0; i < C::VEC; ++i)
                    if (channel + i < pos.d) to[channel + i] = from[i] * f;
            }
        }
    }
}

// Sum over the lanes that share rows, every GROUPS-th; each of them gets it.
template <unsigned GROUPS>
__device__ __forceinline__ float sum_row(float v) {
#pragma unroll
    for (unsigned offset = 16; offset >= GROUPS; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

template <unsigned GROUPS>
__device__ __forceinline__ float max_row(float v) {
#pragma unroll
    for (unsigned offset = 16; offset >= GROUPS; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

template <unsigned D>
__device__ __forceinline__ void fwd(float* y,                                        // (n, tokens, c)
                                    float* stats,                                    // (n, heads, 2, tokens)
                                    const float* q, const float* k, const float* v,  // (n, tokens, c)
                                    unsigned tokens, unsigned c, unsigned heads, float scale_log2, unsigned vec) {
    using C = Tile<D>;
    __shared__ alignas(16) Shared<D> shared;
    const Position pos = position_of<D>(tokens, c, heads, vec);

    float o[4][C::CHANNELS];  // (4 rows, channels of the lane): y times l
    float m[4];               // (4 rows): the largest score so far, times log2 e
    float l[4];               // (4 rows): sum of exp(S - m) over this lane's columns so far
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        m[r] = -INFINITY, l[r] = 0;
#pragma unroll
        for (unsigned u = 0; u < C::CHANNELS; ++u) o[r][u] = 0;
    }
    for (unsigned column = 0; column < tokens; column += B_C) {
        float s[4][C::COLS];         // (4 rows, columns of the lane): unscaled S
        float (&p)[4][C::COLS] = s;  // in the same registers: P times l
        multiply_abt<D>(s, shared, q, k, pos, column);
        if (pos.active) {
            if (column + B_C > tokens) {
                // A column beyond the last has probability 0.
#pragma unroll
                for (unsigned j = 0; j < C::COLS; ++j)
                    if (column + j * C::LANES + pos.col >= tokens) s[0][j] = s[1][j] = s[2][j] = s[3][j] = -INFINITY;
            }
#pragma unroll
            for (unsigned r = 0; r < 4; ++r) {
                float largest = s[r][0];
#pragma unroll
                for (unsigned j = 1; j < C::COLS; ++j) largest = fmaxf(largest, s[r][j]);
                // The scale is positive, so the largest stays the largest.
                const float before = m[r];
                m[r] = fmaxf(before, max_row<C::GROUPS>(largest) * scale_log2);
                const float shrink = exp2_fast(before - m[r]);
                l[r] *= shrink;
#pragma unroll
                for (unsigned u = 0; u < C::CHANNELS; ++u) o[r][u] *= shrink;
#pragma unroll
                for (unsigned j = 0; j < C::COLS; ++j) {
                    p[r][j] = exp_score(s[r][j], scale_log2, m[r]);
                    l[r] += p[r][j];
                }
            }
        }
        accumulate_px<D>(o, shared, p, v, pos, column);
    }
    if (!pos.active) return;
    float inv_l[4];  // (4 rows)
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        inv_l[r] = 1 / sum_row<C::GROUPS>(l[r]);
        if (pos.col == 0 && pos.row + r < tokens) {
            stats[2 * pos.first_token + pos.row + r] = m[r];
            stats[2 * pos.first_token + tokens + pos.row + r] = inv_l[r];
        }
    }
    store_rows<D>(y, o, inv_l, pos);
}

// Rows are queries. Also writes delta.
template <unsigned D>
__device__ __forceinline__ void bwd_q(float* dq,                                       // (n, tokens, c)
                                      float* delta,                                    // (n, heads, tokens)
                                      const float* q, const float* k, const float* v,  // (n, tokens, c)
                                      const float* y, const float* dy,                 // (n, tokens, c)
                                      const float* stats,                              // (n, heads, 2, tokens)
                                      unsigned tokens, unsigned c, unsigned heads, float scale, float scale_log2,
                                      unsigned vec) {
    using C = Tile<D>;
    __shared__ alignas(16) Shared<D> shared;
    const Position pos = position_of<D>(tokens, c, heads, vec);

    float sum[4][C::CHANNELS];  // (4 rows, channels of the lane): of dq
    float m[4];                 // (4 rows): times log2 e
    float scale_over_l[4];      // (4 rows)
    float my_delta[4];          // (4 rows)
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        m[r] = scale_over_l[r] = my_delta[r] = 0;
        if (pos.row + r < tokens) {
            m[r] = stats[2 * pos.first_token + pos.row + r];
            scale_over_l[r] = stats[2 * pos.first_token + tokens + pos.row + r] * scale;
            const size_t i = pos.offset + size_t(pos.row + r) * c;
            for (unsigned u = pos.col; u < pos.d; u += C::LANES)
                my_delta[r] = fmaf(dy[i + u], y[i + u], my_delta[r]);
        }
#pragma unroll
        for (unsigned u = 0; u < C::CHANNELS; ++u) sum[r][u] = 0;
    }
    if (pos.active)
#pragma unroll
        for (unsigned r = 0; r < 4; ++r) {
            my_delta[r] = sum_row<C::GROUPS>(my_delta[r]);
            if (pos.col == 0 && pos.row + r < tokens) delta[pos.first_token + pos.row + r] = my_delta[r];
        }

    for (unsigned column = 0; column < tokens; column += B_C) {
        float s[4][C::COLS], dp[4][C::COLS];  // (4 rows, columns of the lane); S is unscaled
        float (&ds)[4][C::COLS] = dp;         // in dP's registers
        multiply_abt<D>(s, shared, q, k, pos, column);
        multiply_abt<D>(dp, shared, dy, v, pos, column);
        // Rows beyond the last token are computed but not stored; columns beyond it are not summed.
#pragma unroll
        for (unsigned r = 0; r < 4; ++r)
#pragma unroll
            for (unsigned j = 0; j < C::COLS; ++j)
                ds[r][j] = exp_score(s[r][j], scale_log2, m[r]) * scale_over_l[r] * (dp[r][j] - my_delta[r]);
        accumulate_px<D>(sum, shared, ds, k, pos, column);
    }
    if (!pos.active) return;
    const float one[4] = {1, 1, 1, 1};
    store_rows<D>(dq, sum, one, pos);
}

// Rows are keys, columns queries: S, P, dP and dS transposed.
template <unsigned D>
__device__ __forceinline__ void bwd_kv(float* dk, float* dv,                            // (n, tokens, c)
                                       const float* q, const float* k, const float* v,  // (n, tokens, c)
                                       const float* dy,                                 // (n, tokens, c)
                                       const float* stats,                              // (n, heads, 2, tokens)
                                       const float* delta,                              // (n, heads, tokens)
                                       unsigned tokens, unsigned c, unsigned heads, float scale, float scale_log2,
                                       unsigned vec) {
    using C = Tile<D>;
    __shared__ alignas(16) Shared<D> shared;
    const Position pos = position_of<D>(tokens, c, heads, vec);

    float sum_k[4][C::CHANNELS];  // (4 rows, channels of the lane): of dk, unscaled
    float sum_v[4][C::CHANNELS];  // (4 rows, channels of the lane): of dv
#pragma unroll
    for (unsigned r = 0; r < 4; ++r)
#pragma unroll
        for (unsigned u = 0; u < C::CHANNELS; ++u) sum_k[r][u] = sum_v[r][u] = 0;

    for (unsigned column = 0; column < tokens; column += B_C) {
        float s[4][C::COLS], dp[4][C::COLS];                 // (4 rows, columns of the lane); S is unscaled
        float (&p)[4][C::COLS] = s, (&ds)[4][C::COLS] = dp;  // in the same registers; dS is unscaled
        multiply_abt<D>(s, shared, k, q, pos, column);
        multiply_abt<D>(dp, shared, v, dy, pos, column);
#pragma unroll
        for (unsigned j = 0; j < C::COLS; ++j) {
            const unsigned query = column + j * C::LANES + pos.col;
            // Rows beyond the last token are computed but not stored; columns beyond it are not summed.
            const bool live = query < tokens;
            const float m = live ? stats[2 * pos.first_token + query] : 0;
            const float inv_l = live ? stats[2 * pos.first_token + tokens + query] : 0;
            const float delta_j = live ? delta[pos.first_token + query] : 0;
#pragma unroll
            for (unsigned r = 0; r < 4; ++r) {
                p[r][j] = exp_score(s[r][j], scale_log2, m) * inv_l;
                ds[r][j] = p[r][j] * (dp[r][j] - delta_j);
            }
        }
        accumulate_px<D>(sum_v, shared, p, dy, pos, column);
        accumulate_px<D>(sum_k, shared, ds, q, pos, column);
    }
    if (!pos.active) return;
    const float one[4] = {1, 1, 1, 1}, scales[4] = {scale, scale, scale, scale};
    store_rows<D>(dv, sum_v, one, pos);
    store_rows<D>(dk, sum_k, scales, pos);
}

// Entries in f32, on FMAs, for heads of up to D channels.
#define ON_FMA(D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_fwd_d##D##_f32(                                 \
        float* y, float* stats, const float* q, const float* k, const float* v, unsigned tokens, unsigned c,        \
        unsigned heads, float scale_log2, unsigned vec) {                                                           \
        fwd<D>(y, stats, q, k, v, tokens, c, heads, scale_log2, vec);                                               \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd_q_d##D##_f32(                               \
        float* dq, float* delta, const float* q, const float* k, const float* v, const float* y, const float* dy,   \
        const float* stats, unsigned tokens, unsigned c, unsigned heads, float scale, float scale_log2,             \
        unsigned vec) {                                                                                             \
        bwd_q<D>(dq, delta, q, k, v, y, dy, stats, tokens, c, heads, scale, scale_log2, vec);                       \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_bwd_kv_d##D##_f32(                              \
        float* dk, float* dv, const float* q, const float* k, const float* v, const float* dy, const float* stats,  \
        const float* delta, unsigned tokens, unsigned c, unsigned heads, float scale, float scale_log2,             \
        unsigned vec) {                                                                                             \
        bwd_kv<D>(dk, dv, q, k, v, dy, stats, delta, tokens, c, heads, scale, scale_log2, vec);                     \
    }
ON_FMA(32)
ON_FMA(64)
ON_FMA(128)
ON_FMA(256)
ON_FMA(512)
#undef ON_FMA

// Entries in bf16, on tensor cores, for heads of up to D channels that 8 divides, in blocks of GROUPS x 16 rows; as far
// as registers decide, a multiprocessor holds BLOCKS at least.
#define LARGE(D, GROUPS, BLOCKS)                                                                                    \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, GROUPS), BLOCKS) attention_fwd_mma_d##D##_large(   \
        bf16* y, bf16* lost, float* stats, const bf16* q, const bf16* k, const bf16* v, Sizes sizes, bf16* z,       \
        const bf16* weight, const float* bias, const bf16* residual) {                                              \
        mma::fwd<mma::Pass<D, GROUPS, 1, 1>, mma::Unit::CHUNK>(                                                     \
            y, lost, stats, q, k, v, sizes, {z, weight, bias, residual});                                           \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, GROUPS), BLOCKS) attention_bwd_q_mma_d##D##_large( \
        bf16* dq, float* delta, const bf16* q, const bf16* k, const bf16* v, const bf16* y, const bf16* lost,       \
        const bf16* dy, const float* stats, Sizes sizes) {                                                          \
        mma::bwd_q<mma::Pass<D, GROUPS, 2, 1>, mma::Unit::CHUNK>(dq, delta, q, k, v, y, lost, dy, stats, sizes);    \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, GROUPS), BLOCKS) attention_bwd_kv_mma_d##D##_large(\
        bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats,        \
        const float* delta, Sizes sizes) {                                                                          \
        mma::bwd_kv<D, GROUPS, mma::Unit::CHUNK>(dk, dv, q, k, v, dy, stats, delta, sizes);                         \
    }
LARGE(32, 4, 3)
LARGE(64, 4, 2)
LARGE(128, 4, 2)
LARGE(256, 4, 2)
LARGE(512, 2, 2)
#undef LARGE

// The same in blocks of 16 rows, where the others would be too few. Without a bound on the blocks ptxas squeezes fwd
// of 64 channels into 96 registers on sm_80 and sm_89, by spilling.
#define SMALL(D)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, 1), 1) attention_fwd_mma_d##D##_small(                \
        bf16* y, bf16* lost, float* stats, const bf16* q, const bf16* k, const bf16* v, Sizes sizes, bf16* z,       \
        const bf16* weight, const float* bias, const bf16* residual) {                                              \
        mma::fwd<mma::Pass<D, 1, 1, 1>, mma::Unit::CHUNK>(                                                          \
            y, lost, stats, q, k, v, sizes, {z, weight, bias, residual});                                           \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, 1)) attention_bwd_q_mma_d##D##_small(              \
        bf16* dq, float* delta, const bf16* q, const bf16* k, const bf16* v, const bf16* y, const bf16* lost,       \
        const bf16* dy, const float* stats, Sizes sizes) {                                                          \
        mma::bwd_q<mma::Pass<D, 1, 2, 1>, mma::Unit::CHUNK>(dq, delta, q, k, v, y, lost, dy, stats, sizes);         \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, 1)) attention_bwd_kv_mma_d##D##_small(             \
        bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats,        \
        const float* delta, Sizes sizes) {                                                                          \
        mma::bwd_kv<D, 1, mma::Unit::CHUNK>(dk, dv, q, k, v, dy, stats, delta, sizes);                              \
    }
SMALL(64)
SMALL(128)
SMALL(256)
SMALL(512)
#undef SMALL

// For any number of channels, up to D.
#define ANY(D)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, 1)) attention_fwd_mma_d##D##_any(                  \
        bf16* y, bf16* lost, float* stats, const bf16* q, const bf16* k, const bf16* v, Sizes sizes) {              \
        mma::fwd<mma::Pass<D, 1, 1, 1>, mma::Unit::ELEMENT>(y, lost, stats, q, k, v, sizes, {});                    \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, 1)) attention_bwd_q_mma_d##D##_any(                \
        bf16* dq, float* delta, const bf16* q, const bf16* k, const bf16* v, const bf16* y, const bf16* lost,       \
        const bf16* dy, const float* stats, Sizes sizes) {                                                          \
        mma::bwd_q<mma::Pass<D, 1, 2, 1>, mma::Unit::ELEMENT>(dq, delta, q, k, v, y, lost, dy, stats, sizes);       \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(mma::threads(D, 1)) attention_bwd_kv_mma_d##D##_any(               \
        bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* dy, const float* stats,        \
        const float* delta, Sizes sizes) {                                                                          \
        mma::bwd_kv<D, 1, mma::Unit::ELEMENT>(dk, dv, q, k, v, dy, stats, delta, sizes);                            \
    }
ANY(64)
ANY(512)
#undef ANY
