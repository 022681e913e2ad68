// Attention in bf16 on tensor cores: all products run on mma.m16n8k16, with f32 accumulators. A warp's 16 rows stay in
// shared memory while slabs of columns pass through it; S, P, dP and dS never leave the warp's registers.
//
// computes   as attention.cu says, in products of tokens x tokens x d: fwd S, y; bwd_q S, dP, dq; bwd_kv S, dv, dP, dk.
//            Heads of more than 128 channels have one more, S for dk and S for dv: a thread has no registers for both
//            sums, so each has blocks of its own. After fwd of a single head of up to 256 channels the layer that
//            follows, z = residual + y w^T + b: a warp has all channels of its rows of y, in the panels through which
//            they are stored, where they are an operand as the rows of q were, and the rows of w take the place of k
// layout     as attention.cu says. In shared memory everything is a panel of rows (tokens) of 64 channels, swizzled as
//            in tile_mma.cuh. S and dP read both operands along their rows, with the channels as k; the sums read the
//            same panels with the tokens as k, by ldmatrix.trans. So nothing is transposed in memory
// mapping    block = one (image, head) and 16 GROUPS tokens as rows, a warp for each 16; it loops over all tokens as
//            columns, BC = 64 at a time. blockIdx.y = dk, dv where they have blocks of their own. D = 512: two warps
//            for the same 16 rows, each with half of the channels of the sums and with all of S and dP: 3/2 of the
//            products in fwd, 5/3 in bwd_q. (To share S they would have to exchange P through shared memory.)
// shared     rows of q, or of k: D / 64 panels; as many of dy, or of v, for dP; a ring of two slots, one slab each (64
//            columns, 64 channels, 8 KiB); m log2 e, 1 / l and delta of 64 columns; 16 rows of 32 channels of z, f32,
//            for each warp. In large blocks 24 to 81 KiB. The slabs of 64 columns in fwd, d = 256; .c = channels
//            64 c .. 64 c + 64:
//
//                turn          0         1         2         3         4         5         6         7
//                wait         k.0       k.1       k.2       k.3       v.0       v.1       v.2       v.3    it is there
//                bring      k.1>s1    k.2>s0    k.3>s1    v.0>s0    v.1>s1    v.2>s0    v.3>s1    k.0>s0   the next k.0
//                multiply   S += s0   S += s1   S += s0   S += s1  y.0 += s0 y.1 += s1 y.2 += s0 y.3 += s1
//
//            Two slots suffice: a multiprocessor holds two blocks, of which one multiplies while the other waits
// registers  of a lane, for one of a warp's 16 x 8 tiles of S: rows g and g + 8, columns 2t and 2t + 1 (g = lane / 4,
//            t = lane % 4). The same lane needs just these of P, as the left operand of y, whose k are the columns:
//
//                S, tiles 2k and 2k + 1    c0 c1 (row g)    c2 c3 (row g + 8)    c0 c1 (row g)    c2 c3 (row g + 8)
//                P, columns 16k .. + 16    a0               a1                   a2               a3
//
// bound by   shared memory. For 64 columns and 64 channels a warp does 32 mma, 256 cycles of its scheduler on an A100,
//            and reads 512 bytes 20 times (S and dP: the rows, too) or 16 times, in 80 or 64 cycles of the
//            multiprocessor's; the slab is written in 64. For four warps, in cycles:
//                                      tensor cores of A100, H100    shared memory    tensor cores busy on A100, H100
//                S, dP, a slab                 256      128               384                0.67    0.33
//                sums, a slab                  256      128               320                0.80    0.40
//                fwd, d = 256                 2048     1024              2816                0.73    0.36
//                bwd_q, d = 256               3072     1536              4352                0.71    0.35
//            (Two tiles of rows per warp would halve the reads, but the sums of 32 x 256 channels take all registers.)
//            A slab comes from the L2 cache: 21 to 26 bytes a cycle, of the 47 (A100) and 38 (H100) of a
//            multiprocessor's share. 1,024 exponentials of a warp take 256 cycles of its scheduler, beside 704 (d = 64)
//            to 2816 of shared memory
// waves      128 images of 256 tokens, d = 256, are 512 blocks of 64 rows (bwd_kv: 1,024). A100 and H100 hold two per
//            multiprocessor, by registers: 2.4 waves of 216, 1.9 of 264. An RTX 4090 holds two in fwd and, by shared
//            memory, one in the others: 2 waves of 256, 4 of 128. One image is 16 blocks of 16 rows, a warp each
// host       8 divides d, or the entries that end in `any`; grids and shared memory as src/ops/attention.rs says;
//            n tokens c < 2^31; tensors on 16-byte boundaries
// numerics   f32 sums: over channels 16 at a time, over columns in order. Neither rows per block nor batch change bits.
//            P and dS are rounded to bf16, by 2^-8 of themselves, where they become operands; l is the sum of what was
//            not rounded. Between S and dS P is an f16, by 2^-11. lost carries on what rounding took from y, so that
//            delta errs by 2^-16 of dy . y and by what the rounding of P does to y, 2^-8 of sum_j P_ij |dP_ij|. z has
//            the bits that linear.cu makes of the rounded y
#pragma once
#include <cuda_fp16.h>

#include "tile_mma.cuh"

// 2^x to 2 ulp; 0 instead of a subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// exp(S - m) from an unscaled score s and from m log2 e. Fused, so that the product is not rounded; the rounding of m
// cancels between P and l.
__device__ __forceinline__ float exp_score(float s, float scale_log2, float m) {
    return exp2_fast(fmaf(s, scale_log2, -m));
}

// Host twin: the sizes of attention, and the factor of its scores.
struct Sizes {
    unsigned tokens, c, heads;
    float scale;       // 1 / sqrt(d)
    float scale_log2;  // log2 e / sqrt(d)
};

namespace mma {

// Host twin: columns (tokens) at a time: rows of a slab.
constexpr int BC = 64;

// Host twin: slots of the ring.
constexpr int SLOTS = 2;

// Host twin: channels of a warp's sums, at most: as many as its registers hold.
constexpr int MOST = 256;

// Host twin: channels of a head up to which a warp's registers hold the sums of both dk and dv.
constexpr int BOTH_SUMS = 128;

constexpr int SLAB = BC * BK * sizeof(bf16);  // bytes of 64 columns, 64 channels of them

// Threads per block of GROUPS x 16 rows: heads of more than MOST channels have two warps for the same rows.
constexpr int threads(int d, int groups) { return 32 * groups * (d > MOST ? d / MOST : 1); }

// A pass over heads of up to D channels, in blocks of GROUPS x 16 rows. SCORES: the products of rows and columns that
// it computes, S (1) or S and dP (2). SUMS: its sums over columns.
template <int D_, int GROUPS_, int SCORES_, int SUMS_>
struct Pass {
    static constexpr int D = D_, GROUPS = GROUPS_, SCORES = SCORES_, SUMS = SUMS_;
    static constexpr int W = D < MOST ? D : MOST;  // channels of a warp's sums
    static constexpr int PARTS = D / W;            // warps with the same rows
    static constexpr int THREADS = threads(D, GROUPS), BM = 16 * GROUPS;
    static constexpr int STEPS = D < BK ? D / 16 : BK / 16;  // of 16 channels in a slab
    static constexpr int SLABS = D < BK ? 1 : D / BK;        // of a token
    // Slabs that BC columns take, and where each product's begin: S, the second operand's sum, dP, the first one's sum.
    static constexpr bool SUM_OF_SECOND = SCORES == 1 || SUMS == 2;
    static constexpr int TURNS = (SCORES + SUMS) * SLABS;
    static constexpr int SECOND_SUM = SLABS, DP = SLABS * (SUM_OF_SECOND ? 2 : 1), FIRST_SUM = DP + SLABS;
    // Turns that are written out one after the other, of one block of columns or two: a turn's slot is then a constant.
    static constexpr int ROUND = TURNS % SLOTS == 0 ? TURNS : SLOTS * TURNS;
    static constexpr int PANEL = BM * BK * sizeof(bf16);  // bytes of 64 channels of the rows
    static constexpr int RING = SCORES * SLABS * PANEL;   // where the ring begins, behind the rows
    // A warp's first row among the block's, and the first channel of its sums.
    __device__ static unsigned row(unsigned thread) { return thread / 32 % GROUPS * 16; }
    __device__ static unsigned channel(unsigned thread) { return PARTS == 1 ? 0 : thread / 32 / GROUPS * W; }
};

// One (image, head), and what this block computes of it.
template <class P>
struct Head {
    unsigned offset;       // of the head's first channel of the image's first token, in elements
    unsigned first_token;  // of the image and head, in delta; twice that in stats
    unsigned tokens, d;
    unsigned pitch;        // elements from token to token
    unsigned row;          // the block's first

    __device__ explicit Head(const Sizes& s) : Head(s.tokens, s.c, s.heads, blockIdx.x) {}

    __device__ Head(unsigned tokens_, unsigned c, unsigned heads, unsigned block)
        : tokens(tokens_), d(c / heads), pitch(c) {
        const unsigned blocks = (tokens - 1) / P::BM + 1, pair = block / blocks;
        offset = pair / heads * tokens * c + pair % heads * d;
        first_token = pair * tokens;
        row = block % blocks * P::BM;
    }

    // The same, found once more after the main loop.
    __device__ __forceinline__ static Head again(const Sizes& s) {
        return Head(kept(s.tokens), kept(s.c), kept(s.heads), block_again());
    }

    // The rows of this lane's results, `half` 0 or 1.
    __device__ unsigned my_row(unsigned thread, int half) const {
        return row + P::row(thread) + thread % 32 / 4 + 8 * half;
    }
};

// The columns' slabs, in the order in which the pass multiplies them. BY_COLUMN: with the columns' stats and delta.
template <class P, Unit UNIT, bool BY_COLUMN>
struct Columns {
    using Slab = Panel<P::THREADS, BC, BK>;
    const Head<P>& head;
    const bf16* operand[2];  // of S; of dP, or of the sum if there is no dP
    const float *stats, *delta;
    uint32_t stats_shared;  // (3, BC): m log2 e, 1 / l, delta
    Places<Slab, BK> places;
    unsigned column;  // the first of those that are being multiplied
    unsigned place;   // of this thread's first chunk in the slabs that are being brought, in elements
    unsigned last;    // that in the last column, which takes the place of those beyond it

    __device__ Columns(uint32_t shared, const Head<P>& head_, const bf16* first, const bf16* second,
                       const float* stats_ = nullptr, const float* delta_ = nullptr)
        : head(head_),
          operand{first, second},
          stats(stats_),
          delta(delta_),
          stats_shared(shared + P::RING + SLOTS * SLAB),
          places(shared + P::RING),
          column(0),
          place(head.offset + Slab::row() * head.pitch + 8 * Slab::chunk()),
          last(head.offset + (head.tokens - 1) * head.pitch + 8 * Slab::chunk()) {
        bring(0, 0, 0);
        commit_group();
    }

    // Brings the slab of turn t of the columns from `from` on.
    __device__ __forceinline__ void bring(int t, unsigned from, uint32_t slot) const {
        const bool second = t >= P::SECOND_SUM && t < P::FIRST_SUM;
        const int at = t % P::SLABS * BK;
        const int count = (int)kept(head.d - 8 * Slab::chunk()) - at;
#pragma unroll(UNIT == Unit::ELEMENT ? 1 : 2)
        for (int i = 0; i < Slab::PASSES; ++i) {
            const bf16* x = operand[second] + min(last, kept(place) + i * Slab::STEP * head.pitch) + at;
#pragma unroll
            for (int j = 0; j < P::STEPS / 2; ++j) {
                copy<UNIT>(slot + places.at(i, j), x + 32 * j, true, count - 32 * j);
            }
        }
        if (BY_COLUMN && t == 0) bring_stats(from);
    }

    // What is beyond the last column gets probability 0, by its 1 / l.
    __device__ __forceinline__ void bring_stats(unsigned from) const {
        const unsigned first = kept(head.first_token);
#pragma unroll 1
        for (unsigned i = threadIdx.x; i < BC; i += P::THREADS) {
            const unsigned real = first + min(from + i, head.tokens - 1);
            copy_word_async(stats_shared + 4 * i, stats + first + real, true);
            copy_word_async(stats_shared + 4 * (BC + i), stats + first + head.tokens + real, from + i < head.tokens);
            if (P::SCORES == 2) copy_word_async(stats_shared + 4 * (2 * BC + i), delta + real, true);
        }
    }

    __device__ bool left() const { return column < head.tokens; }
    __device__ void next() { column += BC; }

    // Waits for the slab of turn t of a round, and brings the next. Returns its slot.
    __device__ __forceinline__ int turn(int t) {
        wait_group<0>();
        __syncthreads();  // slab t is there for all threads, and all have read slab t - 1, whose slot is written next
        const int after = (t + 1) % P::TURNS;
        const unsigned from = column + (after == 0 ? BC : 0);
        if (after == 0) place += BC * head.pitch;
        if (after != 0 || from < head.tokens) bring(after, from, (t + 1) % SLOTS * SLAB);
        commit_group();
        return t % SLOTS * SLAB;
    }
};

// Brings the block's rows of x to the panels from `to` on; they arrive with the first slab.
template <class P, Unit UNIT>
__device__ __forceinline__ void bring_rows(uint32_t to, const bf16* x, const Head<P>& head) {
    const AlongK<P::THREADS, P::BM, UNIT> rows(to, x + head.offset, head.row, head.tokens, head.pitch);
#pragma unroll
    for (int i = 0; i < P::SLABS; ++i) rows.bring(i * P::PANEL, i * BK, (int)head.d - i * BK);
}

// A warp's products: 16 rows with BC columns, and those with the columns' channels.
template <class P>
struct Products {
    const Fragments<P::BM, 1, true, true> rows;         // (16 rows, 16 channels) of a panel
    const Fragments<BC, 1, true, false> across;         // (16 channels, 16 columns) of a slab
    const Fragments<BK, P::STEPS, false, false> along;  // (16 columns, 16 channels) of a slab

    __device__ explicit Products(uint32_t shared)
        : rows(shared, P::row(threadIdx.x)), across(shared + P::RING, 0), along(shared + P::RING, 0) {}

    // s = the rows of operand `which` times the columns', over all channels, from turn t on.
    template <class C>
    __device__ __forceinline__ void score(float (&s)[BC / 8][4],  // (16 rows, BC columns) of a warp
                                          C& source, int which, int t) const {
#pragma unroll
        for (int j = 0; j < BC / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < P::SLABS; ++i) {
            const int slot = source.turn(t + i);
            if (i * BK >= source.head.d) continue;
#pragma unroll
            for (int k = 0; k < P::STEPS; ++k) {
                uint32_t a[4];
                rows.load(a, (which * P::SLABS + i) * P::PANEL, 0, k);
#pragma unroll
                for (int j = 0; j < BC / 16; ++j) {
                    uint32_t b[4];
                    across.load(b, slot, j, k);
                    multiply_add(s[2 * j], a, b[0], b[1]);
                    multiply_add(s[2 * j + 1], a, b[2], b[3]);
                }
            }
        }
    }

    // sum += p times the columns' operand, from turn t on.
    template <class C>
    __device__ __forceinline__ void add(float (&sum)[P::W / 8][4],        // (16 rows, W channels) of a warp
                                        const uint32_t (&p)[BC / 16][4],  // (16 rows, BC columns) of a warp
                                        C& source, int t) const {
#pragma unroll
        for (int i = 0; i < P::SLABS; ++i) {
            const int slot = source.turn(t + i);
            if (i * BK >= source.head.d || P::PARTS > 1 && i * BK / P::W * P::W != P::channel(threadIdx.x)) continue;
#pragma unroll
            for (int k = 0; k < BC / 16; ++k) {
#pragma unroll
                for (int j = 0; j < P::STEPS; ++j) {
                    uint32_t b[4];
                    along.load(b, slot, j, k);
                    const int tile = i * BK % P::W / 8 + 2 * j;
                    multiply_add(sum[tile], p[k], b[0], b[1]);
                    multiply_add(sum[tile + 1], p[k], b[2], b[3]);
                }
            }
        }
    }
};

// Two neighbours as a register of a fragment.
__device__ __forceinline__ uint32_t pack(float low, float high) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&two);
}

// P or dS, rounded, as the left operand of the sums: the lane of a result of the first product is that of the second's
// operand.
__device__ __forceinline__ void to_operand(uint32_t (&p)[BC / 16][4], const float (&s)[BC / 8][4]) {
#pragma unroll
    for (int k = 0; k < BC / 16; ++k) {
        p[k][0] = pack(s[2 * k][0], s[2 * k][1]);
        p[k][1] = pack(s[2 * k][2], s[2 * k][3]);
        p[k][2] = pack(s[2 * k + 1][0], s[2 * k + 1][1]);
        p[k][3] = pack(s[2 * k + 1][2], s[2 * k + 1][3]);
    }
}

// P between S and dS, for which f32 would take too many registers: as f16, at most 1 and so rounded by 2^-11 of itself
// or 2^-25.
struct Probabilities {
    uint32_t e[BC / 8][2];

    __device__ __forceinline__ explicit Probabilities(const float (&p)[BC / 8][4]) {
#pragma unroll
        for (int j = 0; j < BC / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const __half2 two = __floats2half2_rn(p[j][2 * half], p[j][2 * half + 1]);
                e[j][half] = *reinterpret_cast<const uint32_t*>(&two);
            }
    }

    // Of the columns from 8 j on, both of a row. Not unpacked earlier than it is called.
    __device__ __forceinline__ float2 at(int j, int half) const {
        const uint32_t two = kept(e[j][half]);
        return __half22float2(*reinterpret_cast<const __half2*>(&two));
    }
};

// Columns from `count` on become `v`.
__device__ __forceinline__ void leave_out(float (&s)[BC / 8][4], unsigned count, float v) {
    const int mine = (int)count - (int)(threadIdx.x % 4 * 2);
#pragma unroll
    for (int j = 0; j < BC / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (8 * j + e % 2 >= mine) s[j][e] = v;
}

// Over the four lanes that share rows; each of them gets it.
__device__ __forceinline__ float max_of_row(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float sum_of_row(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

// Stores f(sum, half) of each of a lane's sums to x (n, tokens, c), through the panels of its rows, where they stay; to
// these alone if x is null. The panels have been read, by the other warp with the same rows before the barriers of the
// last sum.
template <class P, Unit UNIT, class F>
__device__ __forceinline__ void store_rows(bf16* x, unsigned char* panels, const float (&sum)[P::W / 8][4],
                                           const Head<P>& head, F f) {
    const unsigned thread = thread_again(), lane = thread % 32, g = lane / 4, t = lane % 4;
    const unsigned from = P::channel(thread);
    unsigned char* const mine = panels + from / BK * P::PANEL + P::row(thread) * BK * sizeof(bf16);
    __syncwarp();  // the warp has read what is overwritten below
#pragma unroll
    for (int j = 0; j < P::W / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            unsigned char* row = mine + j / 8 * P::PANEL + (g + 8 * half) * BK * sizeof(bf16);
            *reinterpret_cast<uint32_t*>(row + (j % 8 ^ g) * 16 + 4 * t) =
                pack(f(sum[j][2 * half], half), f(sum[j][2 * half + 1], half));
        }
    __syncwarp();  // what was written above is read below, or from the panels, by other lanes
    if (!x) return;
    const unsigned first = head.row + P::row(thread);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned row = lane / 8 + 4 * i, chunk = lane % 8;
        if (first + row >= head.tokens || 8 * chunk >= P::W) continue;
        bf16* const to = x + (head.offset + (first + row) * head.pitch);
#pragma unroll
        for (int j = 0; j < (P::W + BK - 1) / BK; ++j) {
            const unsigned char* eight = mine + j * P::PANEL + row * BK * sizeof(bf16) + (chunk ^ row % 8) * 16;
            const unsigned channel = from + j * BK + 8 * chunk;
            if (UNIT == Unit::ELEMENT) {
                for (unsigned e = 0; e < 8 && channel + e < head.d; ++e) {
                    to[channel + e] = reinterpret_cast<const bf16*>(eight)[e];
                }
            } else if (channel < head.d) {
                *wide(to + channel) = *reinterpret_cast<const uint4*>(eight);
            }
        }
    }
}

// The layer that follows: z = residual + y w^T + b, over all channels. z is null for none.
struct Projection {
    bf16* z;               // (n, tokens, c)
    const bf16* weight;    // (c, c)
    const float* bias;     // (c)
    const bf16* residual;  // (n, tokens, c)
};

// z for the rows of y that lie in the panels; `rows` are those of the block.
template <class P, Unit UNIT>
__device__ __forceinline__ void project(const Projection& to, unsigned char* shared, const Head<P>& rows) {
    using Q = Pass<P::D, P::GROUPS, 1, 0>;
    static_assert(P::PARTS == 1 && UNIT != Unit::ELEMENT, "a warp has all channels of its rows, in whole chunks");
    const unsigned thread = thread_again(), lane = thread % 32, g = lane / 4, t = lane % 4, c = rows.pitch;
    // From here on the ring brings the rows of the weight, first to the slot that all have read: the last slab of v is
    // in the other.
    static_assert(P::TURNS % SLOTS == 0, "a round ends with the last slot");
    const Head<Q> weight(c, c, 1, 0);
    Columns<Q, UNIT, false> columns(shared_address(shared), weight, to.weight, nullptr);
    const Products<Q> products(shared_address(shared));
    // (16 rows, 32 channels) of a warp. Unit u of a row (four channels) is at place u ^ 2 (row % 4), so that the four
    // rows of a half warp's stores are in different banks.
    float* const stage =
        reinterpret_cast<float*>(shared + Q::RING + SLOTS * SLAB) + 3 * BC + thread / 32 * 16 * 32;
    auto place = [&](unsigned row, unsigned unit) { return stage + row * 32 + (unit ^ row % 4 * 2) * 4; };
    while (columns.left()) {
#pragma unroll
        for (int turn = 0; turn < Q::ROUND && columns.left(); turn += Q::TURNS, columns.next()) {
            float s[BC / 8][4];  // (16 rows, BC channels of z) of a warp
            products.score(s, columns, 0, turn);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                __syncwarp();  // the warp has read what is overwritten below
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float* two = place(g + 8 * half, 2 * j + t / 2) + t % 2 * 2;
                        *reinterpret_cast<float2*>(two) =
                            make_float2(s[4 * h + j][2 * half], s[4 * h + j][2 * half + 1]);
                    }
                __syncwarp();  // what was written above is read below by other lanes
                const unsigned first = rows.row + P::row(thread), channel = columns.column + 32 * h + lane % 8 * 4;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const unsigned row = lane / 8 + 4 * i;
                    if (first + row >= rows.tokens || channel >= c) continue;
                    const size_t at = rows.offset + (first + row) * c + channel;
                    const float4 v = load4(place(row, lane % 8)) + load4(to.bias + channel);
                    store4(to.z + at, v + load4(to.residual + at));
                }
            }
        }
    }
}

// `lost` receives the error of rounding y to bf16; null if it is not needed. So is y, if something is projected.
template <class P, Unit UNIT>
__device__ __forceinline__ void fwd(bf16* y, bf16* lost,                          // (n, tokens, c)
                                    float* stats,                                 // (n, heads, 2, tokens)
                                    const bf16* q, const bf16* k, const bf16* v,  // (n, tokens, c)
                                    const Sizes& sizes, const Projection& then) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const Head<P> head(sizes);
    bring_rows<P, UNIT>(base, q, head);
    Columns<P, UNIT, false> columns(base, head, k, v);
    const Products<P> products(base);

    float o[P::W / 8][4] = {};            // (16 rows, W channels) of a warp: y times l
    float m[2] = {-INFINITY, -INFINITY};  // (2 rows): the largest score so far, times log2 e
    float l[2] = {};                      // (2 rows): sum of exp(S - m) over this lane's columns so far
    while (columns.left()) {
#pragma unroll
        for (int t = 0; t < P::ROUND && columns.left(); t += P::TURNS, columns.next()) {
            float s[BC / 8][4];      // (16 rows, BC columns) of a warp: unscaled S, then P times l
            uint32_t p[BC / 16][4];  // (16 rows, BC columns) of a warp: P times l, rounded
            products.score(s, columns, 0, t);
            if (columns.column + BC > head.tokens) leave_out(s, head.tokens - columns.column, -INFINITY);
            float shrink[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float largest = -INFINITY;
#pragma unroll
                for (int j = 0; j < BC / 8; ++j) largest = fmaxf(largest, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
                // The scale is positive, so the largest stays the largest.
                const float before = m[half];
                m[half] = fmaxf(before, max_of_row(largest) * sizes.scale_log2);
                shrink[half] = exp2_fast(before - m[half]);
                l[half] = __fmul_rn(l[half], shrink[half]);
#pragma unroll
                for (int j = 0; j < BC / 8; ++j)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; ++e) {
                        s[j][e] = exp_score(s[j][e], sizes.scale_log2, m[half]);
                        l[half] = __fadd_rn(l[half], s[j][e]);
                    }
            }
            // Most blocks of columns have no larger score than those before: a factor of 1 changes no bits.
            if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int j = 0; j < P::W / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) o[j][e] *= shrink[e / 2];
            }
            to_operand(p, s);
            products.add(o, p, columns, t + P::SECOND_SUM);
        }
    }

    const Head<P> last = Head<P>::again(sizes);
    const unsigned thread = thread_again();
    float inv_l[2];  // (2 rows)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        inv_l[half] = 1 / sum_of_row(l[half]);
        const unsigned row = last.my_row(thread, half);
        if (thread % 4 == 0 && row < last.tokens && P::channel(thread) == 0) {
            stats[2 * last.first_token + row] = m[half];
            stats[2 * last.first_token + last.tokens + row] = inv_l[half];
        }
    }
    if (lost) {
        store_rows<P, UNIT>(lost, shared, o, last, [&](float sum, int half) {
            return fmaf(sum, inv_l[half], -__bfloat162float(__float2bfloat16_rn(sum * inv_l[half])));
        });
        // y's products are computed again: there are too few registers to keep them.
        for (float& r : inv_l) r = __uint_as_float(kept(__float_as_uint(r)));
    }
    store_rows<P, UNIT>(y, shared, o, last, [&](float sum, int half) { return sum * inv_l[half]; });
    if constexpr (P::PARTS == 1 && UNIT != Unit::ELEMENT) {
        if (then.z) project<P, UNIT>(then, shared, Head<P>::again(sizes));
    }
}

// Rows are queries. Also writes delta.
template <class P, Unit UNIT>
__device__ __forceinline__ void bwd_q(bf16* dq,                                     // (n, tokens, c)
                                      float* delta,                                 // (n, heads, tokens)
                                      const bf16* q, const bf16* k, const bf16* v,  // (n, tokens, c)
                                      const bf16* y, const bf16* lost,              // (n, tokens, c)
                                      const bf16* dy,                               // (n, tokens, c)
                                      const float* stats,                           // (n, heads, 2, tokens)
                                      const Sizes& sizes) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const Head<P> head(sizes);
    bring_rows<P, UNIT>(base, q, head);
    bring_rows<P, UNIT>(base + P::SLABS * P::PANEL, dy, head);
    Columns<P, UNIT, false> columns(base, head, k, v);
    const Products<P> products(base);

    float m[2], inv_l[2], my_delta[2];  // (2 rows)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned mine = head.my_row(threadIdx.x, half), row = min(mine, head.tokens - 1);
        m[half] = stats[2 * head.first_token + row];
        inv_l[half] = stats[2 * head.first_token + head.tokens + row];
        const unsigned at = head.offset + row * head.pitch;
        float sum = 0.0f;
        for (unsigned i = threadIdx.x % 4 * 4; i < head.d; i += 16) {
            const unsigned count = min(head.d - i, 4u);
            const bool vector = UNIT != Unit::ELEMENT;
            const float4 a = load_group(dy, at + i, count, vector);
            const float4 b = load_group(y, at + i, count, vector) + load_group(lost, at + i, count, vector);
            sum = fmaf(a.x, b.x, sum);
            sum = fmaf(a.y, b.y, sum);
            sum = fmaf(a.z, b.z, sum);
            sum = fmaf(a.w, b.w, sum);
        }
        my_delta[half] = sum_of_row(sum);
        if (threadIdx.x % 4 == 0 && mine < head.tokens && P::channel(threadIdx.x) == 0) {
            delta[head.first_token + row] = my_delta[half];
        }
    }

    float sum[P::W / 8][4] = {};  // (16 rows, W channels) of a warp: of dq, unscaled
    while (columns.left()) {
#pragma unroll
        for (int t = 0; t < P::ROUND && columns.left(); t += P::TURNS, columns.next()) {
            float s[BC / 8][4], dp[BC / 8][4];  // (16 rows, BC columns) of a warp: unscaled S, then P; dP, then dS
            uint32_t ds[BC / 16][4];            // (16 rows, BC columns) of a warp: dS, rounded
            products.score(s, columns, 0, t);
#pragma unroll
            for (int j = 0; j < BC / 8; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[j][e] = exp_score(s[j][e], sizes.scale_log2, m[e / 2]) * inv_l[e / 2];
            if (columns.column + BC > head.tokens) leave_out(s, head.tokens - columns.column, 0.0f);
            const Probabilities p(s);
            products.score(dp, columns, 1, t + P::DP);
#pragma unroll
            for (int j = 0; j < BC / 8; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float2 two = p.at(j, half);
                    dp[j][2 * half] = two.x * (dp[j][2 * half] - my_delta[half]);
                    dp[j][2 * half + 1] = two.y * (dp[j][2 * half + 1] - my_delta[half]);
                }
            to_operand(ds, dp);
            products.add(sum, ds, columns, t + P::FIRST_SUM);
        }
    }
    store_rows<P, UNIT>(dq, shared, sum, Head<P>::again(sizes), [&](float sum, int) { return sum * sizes.scale; });
}

// Rows are keys, columns queries: S, P, dP and dS transposed. Writes dk and dv (SUMS 2), dk (SCORES 2) or dv.
template <class P, Unit UNIT>
__device__ __forceinline__ void bwd_kv(bf16* dk, bf16* dv,                           // (n, tokens, c)
                                       const bf16* q, const bf16* k, const bf16* v,  // (n, tokens, c)
                                       const bf16* dy,                               // (n, tokens, c)
                                       const float* stats,                           // (n, heads, 2, tokens)
                                       const float* delta,                           // (n, heads, tokens)
                                       const Sizes& sizes) {
    extern __shared__ __align__(1024) unsigned char shared[];
    constexpr bool DK = P::SCORES == 2, DV = P::SUM_OF_SECOND;
    const uint32_t base = shared_address(shared);
    const Head<P> head(sizes);
    bring_rows<P, UNIT>(base, k, head);
    if (DK) bring_rows<P, UNIT>(base + P::SLABS * P::PANEL, v, head);
    Columns<P, UNIT, true> columns(base, head, q, dy, stats, delta);
    const Products<P> products(base);
    // (3, BC), this lane's first of each 8 columns: m log2 e, 1 / l, delta.
    const float* of_column = reinterpret_cast<const float*>(shared + P::RING + SLOTS * SLAB) + threadIdx.x % 4 * 2;

    float sum_k[P::W / 8][4] = {};  // (16 rows, W channels) of a warp: of dk, unscaled
    float sum_v[P::W / 8][4] = {};  // (16 rows, W channels) of a warp: of dv
    while (columns.left()) {
#pragma unroll
        for (int t = 0; t < P::ROUND && columns.left(); t += P::TURNS, columns.next()) {
            float s[BC / 8][4];      // (16 rows, BC columns) of a warp: unscaled S, then P
            uint32_t p[BC / 16][4];  // (16 rows, BC columns) of a warp: P, then dS, rounded
            products.score(s, columns, 0, t);
#pragma unroll
            for (int j = 0; j < BC / 8; ++j) {
                const float2 m = *reinterpret_cast<const float2*>(of_column + 8 * j);
                const float2 inv_l = *reinterpret_cast<const float2*>(of_column + BC + 8 * j);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    s[j][e] = exp_score(s[j][e], sizes.scale_log2, e % 2 ? m.y : m.x) * (e % 2 ? inv_l.y : inv_l.x);
                }
            }
            const Probabilities kept_p(s);
            if (DV) {
                to_operand(p, s);
                products.add(sum_v, p, columns, t + P::SECOND_SUM);
            }
            if (DK) {
                float dp[BC / 8][4];  // (16 rows, BC columns) of a warp: dP, then dS
                products.score(dp, columns, 1, t + P::DP);
#pragma unroll
                for (int j = 0; j < BC / 8; ++j) {
                    const float2 delta = *reinterpret_cast<const float2*>(of_column + 2 * BC + 8 * j);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const float2 two = kept_p.at(j, half);
                        dp[j][2 * half] = two.x * (dp[j][2 * half] - delta.x);
                        dp[j][2 * half + 1] = two.y * (dp[j][2 * half + 1] - delta.y);
                    }
                }
                to_operand(p, dp);
                products.add(sum_k, p, columns, t + P::FIRST_SUM);
            }
        }
    }
    const Head<P> last = Head<P>::again(sizes);
    if (DV) store_rows<P, UNIT>(dv, shared, sum_v, last, [](float sum, int) { return sum; });
    if (DK) store_rows<P, UNIT>(dk, shared, sum_k, last, [&](float sum, int) { return sum * sizes.scale; });
}

// dk and dv: in one block or, where a thread cannot hold both sums, in blocks of their own, by blockIdx.y.
template <int D, int GROUPS, Unit UNIT>
__device__ __forceinline__ void bwd_kv(bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* dy,
                                       const float* stats, const float* delta, const Sizes& sizes) {
    if constexpr (D <= BOTH_SUMS) {
        bwd_kv<Pass<D, GROUPS, 2, 2>, UNIT>(dk, dv, q, k, v, dy, stats, delta, sizes);
    } else if (blockIdx.y == 0) {
        bwd_kv<Pass<D, GROUPS, 2, 1>, UNIT>(dk, dv, q, k, v, dy, stats, delta, sizes);
    } else {
        bwd_kv<Pass<D, GROUPS, 1, 1>, UNIT>(dk, dv, q, k, v, dy, stats, delta, sizes);
    }
}

}  // namespace mma
