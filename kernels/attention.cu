// attention: every token over all tokens of its image, one head or several, without a token x token matrix in memory, and its gradients.
//
// computes   S_ij = q_i . k_j / sqrt(d), m_i = max_j S_ij, r_i = 1 / sum_j exp(S_ij - m_i), P_ij = exp(S_ij - m_i) r_i, y_i = sum_j P_ij v_j;
//            dP_ij = dy_i . v_j, delta_i = sum_j P_ij dP_ij = dy_i . y_i, dS_ij = P_ij (dP_ij - delta_i) / sqrt(d);
//            dq_i = sum_j dS_ij k_j, dk_j = sum_i dS_ij q_i, dv_j = sum_i P_ij dy_i
//            in passes: fwd; bwd_q, which leaves delta, then bwd_kv. Both compute S and dP: 7 products of tokens x tokens x d where 5 would do with
//            a matrix in memory or atomics
// layout     q, k, v, y and gradients (n, tokens, c), head e at channels e d .. e d + d: f32 or bf16. lost, like y, in bf16 only: what rounding took from
//            y. rows (n, heads, 2, tokens) f32: m log2 e, then r. delta (n, heads, tokens) f32
// mapping    block = one (image, head) and 64 tokens as rows (32 if d > 256), 8 warps; warp = 8 rows (4). It walks over all tokens as columns, 64 at a time.
//            Products: a lane has 4 rows and every 16th (32nd) column, 4 (2) in all. Sums over columns: the same 4 rows and d/16 (d/32) channels in
//            vectors of 4. So a row's statistics stay with its 16 (32) lanes, and no result passes from warp to warp
//            compiled for d up to 32, 64, 128, 256, 512
// shared     at most 34 KiB. factors (18 KiB): 32 channels of the rows and of the columns, in rows of 36 floats, so that 8 lanes reading 16 bytes each of
//            neighbouring rows meet no bank twice; or some columns in full. weights (16 KiB): P or dS of each warp, by column
// bound by   f32 arithmetic: in the products 64 (32) FMAs for 8 (6) 16-byte reads of shared memory, in the sums 64 for 5 where d = 256
// host       heads d = c; grid n heads ceil(tokens / rows); scale = 1 / sqrt(d), scale_log2 = log2 e / sqrt(d); vec only if 4 divides d; tensors start on
//            256-byte boundaries; rows, delta and lost come from the earlier passes over the same tensors
// numerics   f32 sums over the channels, and over the columns in order. The row's largest score so far is taken off before each exponential, and what
//            has been summed is scaled down when it grows (Milakov and Gimelshein 2018; Dao et al. 2022). 2^x is the hardware's, good to 2 ulp.
//            m and r are two numbers: the log-sum-exp m - log r would lose digits of r when m is large. delta from y alone would carry y's bf16
//            rounding, one for all columns of a row, into sums whose terms nearly cancel (100 output roundings seen in dq): hence lost, with which delta errs by
//            2^-18. The same bits at every repetition, for any batch
#include "dtype.cuh"
#include "reduce.cuh"

constexpr unsigned THREADS = 256;
constexpr unsigned COLUMNS = 64;      // tokens that a block takes at a time as columns
constexpr unsigned DEPTH = 32;        // channels of a product in shared memory at a time
constexpr unsigned PITCH = DEPTH + 4; // floats from row to row there

// How a block of head size up to D is cut up.
template <unsigned D>
struct Cut {
    static constexpr unsigned WARP_ROWS = D <= 256 ? 8 : 4;
    static constexpr unsigned ROWS = 8 * WARP_ROWS;
    static constexpr unsigned LANES = 128 / WARP_ROWS;      // lanes side by side on the columns of a row: 16 or 32
    static constexpr unsigned EACH = COLUMNS / LANES;       // columns of a lane
    static constexpr unsigned WIDTH = D / LANES;            // channels of a lane
    static constexpr unsigned VEC = WIDTH < 4 ? WIDTH : 4;  // of them neighbours
    static constexpr unsigned TOGETHER = 4096 / D < COLUMNS ? 4096 / D : COLUMNS; // columns in full in shared memory
    static constexpr unsigned FACTORS = (ROWS + COLUMNS) * PITCH > TOGETHER * D ? (ROWS + COLUMNS) * PITCH : TOGETHER * D;
};

template <unsigned D>
struct Shared {
    // Two uses, a barrier before each: rows and columns of `DEPTH` channels, pitch PITCH; or TOGETHER columns of D channels.
    float factors[Cut<D>::FACTORS];
    // [warp][column][row]: written by a warp and, after the barrier that follows the next `factors`, read by it alone.
    float weights[8][COLUMNS][Cut<D>::WARP_ROWS];
};

// One (image, head): how its matrices (tokens, d) lie in a tensor.
struct Pair {
    size_t at;       // element index of the first token's first channel
    size_t of_row;   // index of the first token in delta; twice that in rows
    unsigned tokens, d;
    unsigned stride; // from token to token
    unsigned vec;    // 16-byte (bf16: 8-byte) accesses
};

__device__ __forceinline__ Pair pair_of(unsigned pair, unsigned tokens, unsigned c, unsigned heads, unsigned vec) {
    const unsigned d = c / heads, image = pair / heads, head = pair % heads;
    return Pair{size_t(image) * tokens * c + size_t(head) * d, size_t(pair) * tokens, tokens, d, c, vec};
}

// Tokens first .. first + COUNT, channels from .. from + WIDE of x to rows of PITCH_OUT floats in shared memory, zero where there are none.
template <unsigned COUNT, unsigned WIDE, unsigned PITCH_OUT, class T>
__device__ __forceinline__ void stage(float* to, const T* x, const Pair& pair, unsigned first, unsigned from) {
    x += pair.at + size_t(first) * pair.stride + from;
    // How many of them there are.
    const unsigned rows = first < pair.tokens ? min(pair.tokens - first, COUNT) : 0, channels = min(pair.d - from, WIDE);
    if (pair.vec) {
        // A thread has the same 4 channels in every row of its own.
        constexpr unsigned STEP = THREADS / (WIDE / 4);
        const unsigned row = threadIdx.x / (WIDE / 4), channel = threadIdx.x % (WIDE / 4) * 4, mine = channel < channels ? rows : 0;
        x += size_t(row) * pair.stride + channel;
        to += row * PITCH_OUT + channel;
#pragma unroll
        for (unsigned i = 0; i < COUNT / STEP; ++i)
            store4(to + i * STEP * PITCH_OUT, row + i * STEP < mine ? load4(x + i * STEP * size_t(pair.stride)) : make_float4(0, 0, 0, 0));
    } else {
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < COUNT * WIDE; i += THREADS) {
            const unsigned row = i / WIDE, channel = i % WIDE;
            const bool live = row < rows && channel < channels;
            to[row * PITCH_OUT + channel] = live ? load(x + size_t(row) * pair.stride + channel) : 0;
        }
    }
}

// s = rows . columns over all channels: a of tokens first_row .., b of tokens first_column ... All threads call it; `active`: does the warp have rows?
template <unsigned D, class T>
__device__ __forceinline__ void product(float (&s)[4][Cut<D>::EACH], Shared<D>& shared, const T* a, const T* b, const Pair& pair, unsigned first_row,
                                        unsigned first_column, bool active) {
    using C = Cut<D>;
    float* columns = shared.factors + C::ROWS * PITCH;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const float* my_rows = shared.factors + (warp * C::WARP_ROWS + lane / C::LANES * 4) * PITCH;
    const float* my_columns = columns + lane % C::LANES * PITCH;
#pragma unroll
    for (unsigned r = 0; r < 4; ++r)
#pragma unroll
        for (unsigned j = 0; j < C::EACH; ++j) s[r][j] = 0;
    for (unsigned from = 0; from < pair.d; from += DEPTH) {
        stage<C::ROWS, DEPTH, PITCH>(shared.factors, a, pair, first_row, from);
        stage<COLUMNS, DEPTH, PITCH>(columns, b, pair, first_column, from);
        __syncthreads(); // the channels staged above are read below
        if (active) {
            // Channels beyond d are zero, up to a multiple of 4.
            const unsigned depth = min(pair.d - from, DEPTH);
#pragma unroll 1
            for (unsigned l = 0; l < depth; l += 4) {
                float4 x[4], z[C::EACH];
#pragma unroll
                for (unsigned r = 0; r < 4; ++r) x[r] = load4(my_rows + r * PITCH + l);
#pragma unroll
                for (unsigned j = 0; j < C::EACH; ++j) z[j] = load4(my_columns + j * C::LANES * PITCH + l);
#pragma unroll
                for (unsigned r = 0; r < 4; ++r)
#pragma unroll
                    for (unsigned j = 0; j < C::EACH; ++j) {
                        s[r][j] = fmaf(x[r].x, z[j].x, s[r][j]);
                        s[r][j] = fmaf(x[r].y, z[j].y, s[r][j]);
                        s[r][j] = fmaf(x[r].z, z[j].z, s[r][j]);
                        s[r][j] = fmaf(x[r].w, z[j].w, s[r][j]);
                    }
            }
        }
        __syncthreads(); // all have read before the factors are written again
    }
}

// acc += weights . x over the columns first_column .. first_column + COLUMNS of x. All threads call it; the warp's weights are w.
template <unsigned D, class T>
__device__ __forceinline__ void accumulate(float (&acc)[4][Cut<D>::WIDTH], Shared<D>& shared, const float (&w)[4][Cut<D>::EACH], const T* x,
                                           const Pair& pair, unsigned first_column, bool active) {
    using C = Cut<D>;
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* mine = &shared.weights[warp][0][lane / C::LANES * 4];
    // A warp's weights are its own; it last read them before the barrier at the end of the previous call.
#pragma unroll
    for (unsigned j = 0; j < C::EACH; ++j)
        store4(mine + (j * C::LANES + lane % C::LANES) * C::WARP_ROWS, make_float4(w[0][j], w[1][j], w[2][j], w[3][j]));
    const unsigned count = min(pair.tokens - first_column, COLUMNS);
    for (unsigned from = 0; from < count; from += C::TOGETHER) {
        stage<C::TOGETHER, D, D>(shared.factors, x, pair, first_column + from, 0);
        __syncthreads(); // the columns staged above, and the weights, are read below
        if (active) {
            const float* row = shared.factors + C::VEC * (lane % C::LANES);
            const float* weight = mine + from * C::WARP_ROWS;
            const unsigned together = min(count - from, C::TOGETHER);
#pragma unroll 2
            for (unsigned j = 0; j < together; ++j, row += D, weight += C::WARP_ROWS) {
                const float4 p = load4(weight);
#pragma unroll
                for (unsigned u = 0; u < C::WIDTH; u += C::VEC) {
                    float z[C::VEC];
                    if constexpr (C::VEC == 4) {
                        const float4 v = load4(row + u * C::LANES);
                        z[0] = v.x, z[1] = v.y, z[2] = v.z, z[3] = v.w;
                    } else {
                        static_assert(C::VEC == 2, "channels in vectors of 2 or 4");
                        const float2 v = *reinterpret_cast<const float2*>(row + u * C::LANES);
                        z[0] = v.x, z[1] = v.y;
                    }
#pragma unroll
                    for (unsigned l = 0; l < C::VEC; ++l) {
                        acc[0][u + l] = fmaf(p.x, z[l], acc[0][u + l]);
                        acc[1][u + l] = fmaf(p.y, z[l], acc[1][u + l]);
                        acc[2][u + l] = fmaf(p.z, z[l], acc[2][u + l]);
                        acc[3][u + l] = fmaf(p.w, z[l], acc[3][u + l]);
                    }
                }
            }
        }
        __syncthreads(); // all have read before the factors and the weights are written again
    }
}

// The lane's channels of its 4 rows, times `factor`, to x.
template <unsigned D, class T>
__device__ __forceinline__ void store_rows(T* x, const float (&acc)[4][Cut<D>::WIDTH], const float (&factor)[4], const Pair& pair, unsigned row) {
    using C = Cut<D>;
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        if (row + r >= pair.tokens) return;
        T* to = x + pair.at + size_t(row + r) * pair.stride;
#pragma unroll
        for (unsigned u = 0; u < C::WIDTH; u += C::VEC) {
            const unsigned channel = u * C::LANES + C::VEC * (lane % C::LANES);
            if (C::VEC == 4 && pair.vec) {
                if (channel < pair.d)
                    store4(to + channel, make_float4(acc[r][u] * factor[r], acc[r][u + 1] * factor[r], acc[r][u + 2] * factor[r],
                                                     acc[r][u + 3] * factor[r]));
            } else {
#pragma unroll
                for (unsigned l = 0; l < C::VEC; ++l)
                    if (channel + l < pair.d) store(to + channel + l, acc[r][u + l] * factor[r]);
            }
        }
    }
}

// 2^x to 2 ulp, 0 below the normal numbers.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// exp(S - m) of a score before its scale. Fused: the product is as exact as m, whose rounding cancels between P and r.
__device__ __forceinline__ float exponential(float s, float scale_log2, float m_log2) { return exp2_fast(fmaf(s, scale_log2, -m_log2)); }

// Sum over the lanes that have the same rows; each of them gets it.
template <unsigned LANES>
__device__ __forceinline__ float sum_row(float v) {
#pragma unroll
    for (unsigned offset = LANES / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
    return v;
}

template <unsigned LANES>
__device__ __forceinline__ float max_row(float v) {
#pragma unroll
    for (unsigned offset = LANES / 2; offset > 0; offset /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

// v as T holds it.
template <class T>
__device__ __forceinline__ float rounded(float v) {
    T there;
    store(&there, v);
    return load(&there);
}

// `lost` takes what rounding to bf16 takes from y; null where nobody wants it, and in f32.
template <unsigned D, class T>
__device__ __forceinline__ void fwd(T* y, T* lost, float* rows, const T* q, const T* k, const T* v, unsigned tokens, unsigned c, unsigned heads,
                                    float scale_log2, unsigned vec) {
    using C = Cut<D>;
    __shared__ alignas(16) Shared<D> shared;
    const unsigned blocks = (tokens - 1) / C::ROWS + 1;
    const Pair pair = pair_of(blockIdx.x / blocks, tokens, c, heads, vec);
    const unsigned first = blockIdx.x % blocks * C::ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned row = first + warp * C::WARP_ROWS + lane / C::LANES * 4; // the first of this lane's 4
    const bool active = first + warp * C::WARP_ROWS < tokens;

    float acc[4][C::WIDTH], m[4], l[4];
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        m[r] = -INFINITY, l[r] = 0;
#pragma unroll
        for (unsigned u = 0; u < C::WIDTH; ++u) acc[r][u] = 0;
    }
    for (unsigned column = 0; column < tokens; column += COLUMNS) {
        float p[4][C::EACH];
        product<D>(p, shared, q, k, pair, first, column, active);
        if (active) {
            if (column + COLUMNS > tokens) {
                // A column beyond the last has probability 0.
#pragma unroll
                for (unsigned j = 0; j < C::EACH; ++j)
                    if (column + j * C::LANES + lane % C::LANES >= tokens) p[0][j] = p[1][j] = p[2][j] = p[3][j] = -INFINITY;
            }
#pragma unroll
            for (unsigned r = 0; r < 4; ++r) {
                float largest = p[r][0];
#pragma unroll
                for (unsigned j = 1; j < C::EACH; ++j) largest = fmaxf(largest, p[r][j]);
                // The scale is positive, so the largest stays the largest.
                const float before = m[r];
                m[r] = fmaxf(before, max_row<C::LANES>(largest) * scale_log2);
                const float shrink = exp2_fast(before - m[r]);
                l[r] *= shrink;
#pragma unroll
                for (unsigned u = 0; u < C::WIDTH; ++u) acc[r][u] *= shrink;
#pragma unroll
                for (unsigned j = 0; j < C::EACH; ++j) {
                    p[r][j] = exponential(p[r][j], scale_log2, m[r]);
                    l[r] += p[r][j];
                }
            }
        }
        accumulate<D>(acc, shared, p, v, pair, column, active);
    }
    if (!active) return;
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        l[r] = 1 / sum_row<C::LANES>(l[r]);
        if (lane % C::LANES == 0 && row + r < tokens) {
            rows[2 * pair.of_row + row + r] = m[r];
            rows[2 * pair.of_row + tokens + row + r] = l[r];
        }
    }
    store_rows<D>(y, acc, l, pair, row);
    if (sizeof(T) < sizeof(float) && lost) {
        const float one[4] = {1, 1, 1, 1};
#pragma unroll
        for (unsigned r = 0; r < 4; ++r)
#pragma unroll
            for (unsigned u = 0; u < C::WIDTH; ++u) acc[r][u] = acc[r][u] * l[r] - rounded<T>(acc[r][u] * l[r]);
        store_rows<D>(lost, acc, one, pair, row);
    }
}

// Rows are queries. Leaves delta too.
template <unsigned D, class T>
__device__ __forceinline__ void bwd_q(T* dq, float* delta, const T* q, const T* k, const T* v, const T* y, const T* lost, const T* dy,
                                      const float* rows, unsigned tokens, unsigned c, unsigned heads, float scale, float scale_log2, unsigned vec) {
    using C = Cut<D>;
    __shared__ alignas(16) Shared<D> shared;
    const unsigned blocks = (tokens - 1) / C::ROWS + 1;
    const Pair pair = pair_of(blockIdx.x / blocks, tokens, c, heads, vec);
    const unsigned first = blockIdx.x % blocks * C::ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned row = first + warp * C::WARP_ROWS + lane / C::LANES * 4; // the first of this lane's 4
    const bool active = first + warp * C::WARP_ROWS < tokens;

    float acc[4][C::WIDTH], m[4], r_scaled[4], mean[4];
#pragma unroll
    for (unsigned r = 0; r < 4; ++r) {
        m[r] = r_scaled[r] = mean[r] = 0;
        if (row + r < tokens) {
            m[r] = rows[2 * pair.of_row + row + r];
            r_scaled[r] = rows[2 * pair.of_row + tokens + row + r] * scale;
            const size_t at = pair.at + size_t(row + r) * c;
            for (unsigned u = lane % C::LANES; u < pair.d; u += C::LANES)
                mean[r] = fmaf(load(dy + at + u), load(y + at + u) + (lost ? load(lost + at + u) : 0), mean[r]);
        }
#pragma unroll
        for (unsigned u = 0; u < C::WIDTH; ++u) acc[r][u] = 0;
    }
    if (active)
#pragma unroll
        for (unsigned r = 0; r < 4; ++r) {
            mean[r] = sum_row<C::LANES>(mean[r]);
            if (lane % C::LANES == 0 && row + r < tokens) delta[pair.of_row + row + r] = mean[r];
        }

    for (unsigned column = 0; column < tokens; column += COLUMNS) {
        float p[4][C::EACH], ds[4][C::EACH];
        product<D>(p, shared, q, k, pair, first, column, active);
        product<D>(ds, shared, dy, v, pair, first, column, active);
        // Of rows and columns beyond the last, the former are not stored and the latter not summed.
#pragma unroll
        for (unsigned r = 0; r < 4; ++r)
#pragma unroll
            for (unsigned j = 0; j < C::EACH; ++j)
                ds[r][j] = exponential(p[r][j], scale_log2, m[r]) * r_scaled[r] * (ds[r][j] - mean[r]);
        accumulate<D>(acc, shared, ds, k, pair, column, active);
    }
    if (!active) return;
    const float one[4] = {1, 1, 1, 1};
    store_rows<D>(dq, acc, one, pair, row);
}

// Rows are keys, columns queries: P and dS transposed.
template <unsigned D, class T>
__device__ __forceinline__ void bwd_kv(T* dk, T* dv, const T* q, const T* k, const T* v, const T* dy, const float* rows, const float* delta,
                                       unsigned tokens, unsigned c, unsigned heads, float scale, float scale_log2, unsigned vec) {
    using C = Cut<D>;
    __shared__ alignas(16) Shared<D> shared;
    const unsigned blocks = (tokens - 1) / C::ROWS + 1;
    const Pair pair = pair_of(blockIdx.x / blocks, tokens, c, heads, vec);
    const unsigned first = blockIdx.x % blocks * C::ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned row = first + warp * C::WARP_ROWS + lane / C::LANES * 4; // the first of this lane's 4
    const bool active = first + warp * C::WARP_ROWS < tokens;

    float acc_k[4][C::WIDTH], acc_v[4][C::WIDTH];
#pragma unroll
    for (unsigned r = 0; r < 4; ++r)
#pragma unroll
        for (unsigned u = 0; u < C::WIDTH; ++u) acc_k[r][u] = acc_v[r][u] = 0;

    for (unsigned column = 0; column < tokens; column += COLUMNS) {
        float p[4][C::EACH], ds[4][C::EACH];
        product<D>(p, shared, k, q, pair, first, column, active);
        product<D>(ds, shared, v, dy, pair, first, column, active);
#pragma unroll
        for (unsigned j = 0; j < C::EACH; ++j) {
            const unsigned query = column + j * C::LANES + lane % C::LANES;
            // Of rows and columns beyond the last, the former are not stored and the latter not summed.
            const bool live = query < tokens;
            const float m = live ? rows[2 * pair.of_row + query] : 0, r_query = live ? rows[2 * pair.of_row + tokens + query] : 0;
            const float mean = live ? delta[pair.of_row + query] : 0;
#pragma unroll
            for (unsigned r = 0; r < 4; ++r) {
                p[r][j] = exponential(p[r][j], scale_log2, m) * r_query;
                ds[r][j] = p[r][j] * (ds[r][j] - mean);
            }
        }
        accumulate<D>(acc_v, shared, p, dy, pair, column, active);
        accumulate<D>(acc_k, shared, ds, q, pair, column, active);
    }
    if (!active) return;
    const float one[4] = {1, 1, 1, 1}, scales[4] = {scale, scale, scale, scale};
    store_rows<D>(dv, acc_v, one, pair, row);
    store_rows<D>(dk, acc_k, scales, pair, row);
}

// The entries for heads of up to D channels.
#define OF_SIZE(D, suffix, T)                                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) attention_fwd_d##D##_##suffix(                                                                     \
        T* y, T* lost, float* rows, const T* q, const T* k, const T* v, unsigned tokens, unsigned c, unsigned heads, float scale_log2, unsigned vec) {   \
        fwd<D>(y, lost, rows, q, k, v, tokens, c, heads, scale_log2, vec);                                                                               \
    }                                                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) attention_bwd_q_d##D##_##suffix(                                                                   \
        T* dq, float* delta, const T* q, const T* k, const T* v, const T* y, const T* lost, const T* dy, const float* rows, unsigned tokens,             \
        unsigned c, unsigned heads, float scale, float scale_log2, unsigned vec) {                                                                       \
        bwd_q<D>(dq, delta, q, k, v, y, lost, dy, rows, tokens, c, heads, scale, scale_log2, vec);                                                       \
    }                                                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) attention_bwd_kv_d##D##_##suffix(                                                                  \
        T* dk, T* dv, const T* q, const T* k, const T* v, const T* dy, const float* rows, const float* delta, unsigned tokens, unsigned c,               \
        unsigned heads, float scale, float scale_log2, unsigned vec) {                                                                                   \
        bwd_kv<D>(dk, dv, q, k, v, dy, rows, delta, tokens, c, heads, scale, scale_log2, vec);                                                           \
    }
#define ENTRY(suffix, T) OF_SIZE(32, suffix, T) OF_SIZE(64, suffix, T) OF_SIZE(128, suffix, T) OF_SIZE(256, suffix, T) OF_SIZE(512, suffix, T)
F32_AND_BF16(ENTRY)
#undef ENTRY
#undef OF_SIZE
