// group_norm: normalisation over the pixels and channels of an image's group, with an optional SiLU behind it, and its gradients.
//
// computes   N = pixels c/groups numbers: mean = sum x / N, var = sum (x - mean)^2 / N, rstd = 1 / sqrt(var + eps);
//            xhat = (x - mean) rstd, z = gamma xhat + beta, y = z or silu(z); dz = dy or dy silu'(z); dgamma = sum dz xhat, dbeta = sum dz;
//            dx = rstd (gamma dz - s1 - xhat s2), s1 = sum gamma dz / N, s2 = sum gamma dz xhat / N
//            in passes: fwd_moments, fwd_join, fwd_apply; bwd_sums, bwd_join, then bwd_params for each of gamma and beta, and bwd_dx
// layout     x, y (n, pixels, c) and dx, which comes in as dy: f32 or bf16. The rest is f32: gamma, beta, dgamma, dbeta (c); stats (n, groups, 3): mean,
//            what rounding took from it, rstd; partials of strips of pixels: (n, strips, 3, c) forward, (n, strips, 2, c) backward
// mapping    passes over the image: block = a strip of pixels and a tile of channels, thread = 4 neighbouring channels of 8 pixels. A warp is
//            2^lane_bits lanes across the channels by 32 >> lane_bits along the pixels, a block 2^warp_bits warps across by 8 >> warp_bits
//            along: 4x4 pixels of 512 channels fill a block as well as 784 pixels of 32. Sums are by channel, not by group: neighbours in memory are
//            neighbours in a warp whatever c/groups is, and dgamma and dbeta need them so
//            joins: block = one (image, group), 1 to 8 warps; 2^lane_bits lanes across the group's channels, the others along the strips
// shared     12 KiB (fwd_moments), 8 KiB (bwd_sums): sums of the 8 warps; joins 4 KiB at most
// bound by   memory: forward reads x twice and writes y, backward reads x and dy twice and writes dx; the second time from the second-level cache
//            if a batch fits. Keeping dz would save an exponential and cost a write
// host       grid (n strips, tiles) with tiles of 4 << (lane_bits + warp_bits) channels and strips of 2048 >> (lane_bits + warp_bits) pixels; vec
//            only if 4 divides c; groups divides c; tensors start on 256-byte boundaries
// numerics   the variance takes two passes, over registers, about the mean of a warp's pixels: E[x^2] - E[x]^2 loses every digit when the mean is large
//            beside the deviation. A mean in f32 is off by up to half an ulp, then many deviations: so each mean m travels with sum (x - m), and
//            the joins are f64 (Chan, Golub and LeVeque 1983). x - m is exact for x within a factor of two of m. Every sum has an order that
//            depends on the image's extent alone: the same bits for any batch, at every repetition
#include "activation.cuh"
#include "dtype.cuh"
#include "reduce.cuh"

constexpr unsigned WARPS = 8;          // of a block
constexpr unsigned PIXELS = 8;         // of a thread: 32 f32 in registers, 8 loads of 16 bytes in flight
constexpr unsigned WARP_TILE = 4 * 32; // channels of a warp, at most

// Where a thread works.
struct Place {
    unsigned image, strip;
    unsigned c0, live;     // its first channel, and how many of the 4 exist
    unsigned count;        // pixels of its warp that exist
    unsigned mine;         // pixels of its own that do, 0 to PIXELS
    size_t at, stride;     // element index of its first number, and from pixel to pixel
};

__device__ __forceinline__ Place place_of(unsigned pixels, unsigned c, unsigned strips, unsigned lane_bits, unsigned warp_bits) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned step = 32u >> lane_bits, of_warp = step * PIXELS;
    Place at;
    at.image = blockIdx.x / strips;
    at.strip = blockIdx.x % strips;
    const unsigned across = ((warp & ((1u << warp_bits) - 1)) << lane_bits) + (lane & ((1u << lane_bits) - 1));
    at.c0 = (blockIdx.y << (lane_bits + warp_bits + 2)) + 4 * across;
    at.live = at.c0 < c ? min(c - at.c0, 4u) : 0;
    const unsigned start = (at.strip * (WARPS >> warp_bits) + (warp >> warp_bits)) * of_warp, first = lane >> lane_bits;
    at.count = start < pixels ? min(pixels - start, of_warp) : 0;
    at.mine = at.live && first < at.count ? ((at.count - first - 1) >> (5 - lane_bits)) + 1 : 0;
    at.at = (size_t(at.image) * pixels + start + first) * c + at.c0;
    at.stride = size_t(step) * c;
    return at;
}

// The first `live` of 4 neighbours, zero for the others. VEC: all 4 are there, and aligned.
template <bool VEC, class T>
__device__ __forceinline__ float4 load_live(const T* p, unsigned live) {
    if (VEC) return load4(p);
    return make_float4(load(p), live > 1 ? load(p + 1) : 0, live > 2 ? load(p + 2) : 0, live > 3 ? load(p + 3) : 0);
}

template <bool VEC, class T>
__device__ __forceinline__ void store_live(T* p, float4 v, unsigned live) {
    if (VEC) return store4(p, v);
    store(p, v.x);
    if (live > 1) store(p + 1, v.y);
    if (live > 2) store(p + 2, v.z);
    if (live > 3) store(p + 3, v.w);
}

__device__ __forceinline__ float& get(float4& v, unsigned i) { return reinterpret_cast<float*>(&v)[i]; }

// Pixels k0 .. k0 + K of the thread, zero where there are none.
template <bool VEC, unsigned K, class T>
__device__ __forceinline__ void load_pixels(float4 (&v)[K], const T* x, const Place& at, unsigned k0) {
#pragma unroll
    for (unsigned k = 0; k < K; ++k) {
        v[k] = make_float4(0, 0, 0, 0);
        if (k0 + k < at.mine) v[k] = load_live<VEC>(x + at.at + (k0 + k) * at.stride, at.live);
    }
}

// Sum over the lanes of a warp that have the same channels; each of them gets it.
__device__ __forceinline__ void sum_pixels(float (&v)[4], unsigned lane_bits) {
    for (unsigned offset = 1u << lane_bits; offset < 32; offset *= 2)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
}

// z = (x - mean) a + b for the thread's channels.
struct Affine {
    float mean[4], a[4], b[4];
};

__device__ __forceinline__ Affine affine_of(const Place& at, const float* stats, const float* gamma, const float* beta, unsigned c, unsigned groups) {
    Affine affine;
    const unsigned width = c / groups;
    unsigned group = at.c0 / width, next = (group + 1) * width;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        affine.mean[i] = affine.a[i] = affine.b[i] = 0;
        if (i < at.live) {
            if (at.c0 + i == next) ++group, next += width;
            const float* of_group = stats + 3 * (size_t(at.image) * groups + group);
            affine.mean[i] = of_group[0];
            affine.a[i] = of_group[2] * gamma[at.c0 + i];
            // What rounding took from the mean goes into the shift.
            affine.b[i] = beta[at.c0 + i] - of_group[1] * affine.a[i];
        }
    }
    return affine;
}

// ---- forward ----

// Each channel's m (about the mean of the strip), sum (x - m) and sum (x - m)^2 over a strip.
template <class T>
__device__ __forceinline__ void fwd_moments(float* partials, const T* x, unsigned pixels, unsigned c, unsigned strips, unsigned lane_bits,
                                            unsigned warp_bits, unsigned vec) {
    // 12 KiB: m, first and second sum of each warp's channels; written by the lanes of its first pixel, read below by a thread for each channel.
    __shared__ float sums[WARPS][3][WARP_TILE];
    const Place at = place_of(pixels, c, strips, lane_bits, warp_bits);
    float4 v[PIXELS];
    if (vec)
        load_pixels<true>(v, x, at, 0);
    else
        load_pixels<false>(v, x, at, 0);

    float m[4] = {0, 0, 0, 0}, d1[4] = {0, 0, 0, 0}, d2[4] = {0, 0, 0, 0};
#pragma unroll
    for (unsigned k = 0; k < PIXELS; ++k)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) m[i] += get(v[k], i);
    sum_pixels(m, lane_bits);
    const float per_pixel = at.count ? 1.0f / float(at.count) : 0;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) m[i] *= per_pixel;
#pragma unroll
    for (unsigned k = 0; k < PIXELS; ++k)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            const float d = k < at.mine ? get(v[k], i) - m[i] : 0;
            d1[i] += d;
            d2[i] = fmaf(d, d, d2[i]);
        }
    sum_pixels(d1, lane_bits);
    sum_pixels(d2, lane_bits);

    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane >> lane_bits == 0)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            sums[warp][0][4 * lane + i] = m[i];
            sums[warp][1][4 * lane + i] = d1[i];
            sums[warp][2][4 * lane + i] = d2[i];
        }
    __syncthreads(); // the warps' sums written above are read below

    const unsigned tile = 4u << (lane_bits + warp_bits), of_warp = (32u >> lane_bits) * PIXELS;
    const unsigned first = at.strip * (WARPS >> warp_bits) * of_warp;
    for (unsigned j = threadIdx.x; j < tile && blockIdx.y * tile + j < c; j += 32 * WARPS) {
        const unsigned column = j >> (lane_bits + 2), i = j & ((4u << lane_bits) - 1);
        const unsigned along = WARPS >> warp_bits;
        float mean = 0, first_sum = 0, second_sum = 0;
        unsigned total = 0;
        for (unsigned w = 0; w < along; ++w) {
            const unsigned from = first + w * of_warp, count = from < pixels ? min(pixels - from, of_warp) : 0;
            mean = fmaf(float(count), sums[(w << warp_bits) + column][0][i], mean);
            total += count;
        }
        mean *= 1.0f / float(total);
        // About one mean for all warps: sum (x - mean) = sum (x - m) + n (m - mean), and so for the squares.
        for (unsigned w = 0; w < along; ++w) {
            const unsigned from = first + w * of_warp, count = from < pixels ? min(pixels - from, of_warp) : 0;
            const float(*of_warp_w)[WARP_TILE] = sums[(w << warp_bits) + column];
            if (count) {
                const float shift = of_warp_w[0][i] - mean, moved = float(count) * shift;
                first_sum += of_warp_w[1][i] + moved;
                second_sum += fmaf(shift, 2 * of_warp_w[1][i] + moved, of_warp_w[2][i]);
            }
        }
        float* out = partials + size_t(blockIdx.x) * 3 * c + blockIdx.y * tile + j;
        out[0] = mean;
        out[c] = first_sum;
        out[2 * size_t(c)] = second_sum;
    }
}

#define ENTRY(suffix, T)                                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) group_norm_fwd_moments_##suffix(                                              \
        float* partials, const T* x, unsigned pixels, unsigned c, unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec) { \
        fwd_moments(partials, x, pixels, c, strips, lane_bits, warp_bits, vec);                                                     \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// Sum over the block's warps (at most WARPS) in order; every thread gets it. `scratch` is free again when the call returns.
__device__ __forceinline__ double join_sum(double v, double* scratch) {
    v = warp_sum(v);
    if (blockDim.x == 32) return v;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads(); // the warps' sums written above are read below
    double sum = scratch[0];
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += scratch[w];
    __syncthreads(); // all have read before a caller writes scratch again
    return sum;
}

// Joins the strips and channels of one (image, group) to its stats. `lane_bits`: 2^lane_bits lanes side by side on the group's channels.
extern "C" __global__ void __launch_bounds__(256) group_norm_fwd_join(float* stats, const float* partials, unsigned pixels, unsigned strip,
                                                                      unsigned strips, unsigned c, unsigned groups, unsigned lane_bits, float eps) {
    __shared__ double scratch[WARPS];
    const unsigned width = c / groups, image = blockIdx.x / groups, group = blockIdx.x % groups;
    const unsigned lanes = 1u << lane_bits, column = threadIdx.x & (lanes - 1), row = threadIdx.x >> lane_bits, rows = blockDim.x >> lane_bits;
    const float* part = partials + size_t(image) * strips * 3 * c + group * width;
    const double total = double(width) * double(pixels);

    double sum = 0;
    for (unsigned s = row; s < strips; s += rows) {
        const double count = min(strip, pixels - s * strip);
        for (unsigned i = column; i < width; i += lanes) {
            const float* p = part + size_t(s) * 3 * c + i;
            sum += double(p[0]) * count + double(p[c]);
        }
    }
    const double mean = join_sum(sum, scratch) / total;

    double squares = 0;
    for (unsigned s = row; s < strips; s += rows) {
        const double count = min(strip, pixels - s * strip);
        for (unsigned i = column; i < width; i += lanes) {
            const float* p = part + size_t(s) * 3 * c + i;
            // About the group's mean instead of m: sum (x - m)^2 + 2 (m - mean) sum (x - m) + n (m - mean)^2.
            const double shift = double(p[0]) - mean;
            squares += double(p[2 * size_t(c)]) + shift * (2 * double(p[c]) + count * shift);
        }
    }
    const double var = join_sum(squares, scratch) / total;

    if (threadIdx.x == 0) {
        float* out = stats + 3 * size_t(blockIdx.x);
        out[0] = float(mean);
        out[1] = float(mean - double(float(mean)));
        out[2] = float(1.0 / sqrt(var + double(eps)));
    }
}

template <bool SILU, bool VEC, class T>
__device__ __forceinline__ void apply_pixels(T* y, const T* x, const Place& at, const Affine& affine) {
    float4 v[PIXELS];
    load_pixels<VEC>(v, x, at, 0);
#pragma unroll
    for (unsigned k = 0; k < PIXELS; ++k)
        if (k < at.mine) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const float z = fmaf(get(v[k], i) - affine.mean[i], affine.a[i], affine.b[i]);
                get(v[k], i) = SILU ? silu(z) : z;
            }
            store_live<VEC>(y + at.at + k * at.stride, v[k], at.live);
        }
}

template <class T>
__device__ __forceinline__ void fwd_apply(T* y, const T* x, const float* stats, const float* gamma, const float* beta, unsigned pixels, unsigned c,
                                          unsigned groups, unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec, unsigned silu) {
    const Place at = place_of(pixels, c, strips, lane_bits, warp_bits);
    if (at.mine == 0) return;
    const Affine affine = affine_of(at, stats, gamma, beta, c, groups);
    switch (2 * silu + vec) {
        case 0: apply_pixels<false, false>(y, x, at, affine); break;
        case 1: apply_pixels<false, true>(y, x, at, affine); break;
        case 2: apply_pixels<true, false>(y, x, at, affine); break;
        case 3: apply_pixels<true, true>(y, x, at, affine); break;
    }
}

#define ENTRY(suffix, T)                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) group_norm_fwd_apply_##suffix(                                                     \
        T* y, const T* x, const float* stats, const float* gamma, const float* beta, unsigned pixels, unsigned c, unsigned groups,       \
        unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec, unsigned silu) {                                          \
        fwd_apply(y, x, stats, gamma, beta, pixels, c, groups, strips, lane_bits, warp_bits, vec, silu);                                 \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// ---- backward ----

// dz where the output's gradient is dy and x is the mean + d.
template <bool SILU>
__device__ __forceinline__ float dz_of(float dy, float d, float a, float b) {
    return SILU ? dy * silu_slope(fmaf(d, a, b)) : dy;
}

constexpr unsigned HALF = PIXELS / 2; // the backward passes hold two tensors: 4 pixels at a time, so that registers allow 16 warps or more

template <bool SILU, bool VEC, class T>
__device__ __forceinline__ void add_pixels(float (&by_x)[4], float (&plain)[4], const T* x, const T* dy, const Place& at, const Affine& affine) {
#pragma unroll
    for (unsigned k0 = 0; k0 < PIXELS; k0 += HALF) {
        float4 v[HALF], g[HALF];
        load_pixels<VEC>(v, x, at, k0);
        load_pixels<VEC>(g, dy, at, k0);
        // Where there is no pixel dy is zero, and dz with it.
#pragma unroll
        for (unsigned k = 0; k < HALF; ++k)
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const float d = get(v[k], i) - affine.mean[i];
                const float dz = dz_of<SILU>(get(g[k], i), d, affine.a[i], affine.b[i]);
                by_x[i] = fmaf(dz, d, by_x[i]);
                plain[i] += dz;
            }
    }
}

// Each channel's sum dz (x - mean) and sum dz over a strip.
template <class T>
__device__ __forceinline__ void bwd_sums(float* partials, const T* x, const T* dy, const float* stats, const float* gamma, const float* beta,
                                         unsigned pixels, unsigned c, unsigned groups, unsigned strips, unsigned lane_bits, unsigned warp_bits,
                                         unsigned vec, unsigned silu) {
    // 8 KiB: the two sums of each warp's channels; written by the lanes of its first pixel, read below by a thread for each channel.
    __shared__ float sums[WARPS][2][WARP_TILE];
    const Place at = place_of(pixels, c, strips, lane_bits, warp_bits);
    float by_x[4] = {0, 0, 0, 0}, plain[4] = {0, 0, 0, 0};
    if (at.mine != 0) {
        const Affine affine = affine_of(at, stats, gamma, beta, c, groups);
        switch (2 * silu + vec) {
            case 0: add_pixels<false, false>(by_x, plain, x, dy, at, affine); break;
            case 1: add_pixels<false, true>(by_x, plain, x, dy, at, affine); break;
            case 2: add_pixels<true, false>(by_x, plain, x, dy, at, affine); break;
            case 3: add_pixels<true, true>(by_x, plain, x, dy, at, affine); break;
        }
    }
    sum_pixels(by_x, lane_bits);
    sum_pixels(plain, lane_bits);
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane >> lane_bits == 0)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            sums[warp][0][4 * lane + i] = by_x[i];
            sums[warp][1][4 * lane + i] = plain[i];
        }
    __syncthreads(); // the warps' sums written above are read below

    const unsigned tile = 4u << (lane_bits + warp_bits);
    for (unsigned j = threadIdx.x; j < tile && blockIdx.y * tile + j < c; j += 32 * WARPS) {
        const unsigned column = j >> (lane_bits + 2), i = j & ((4u << lane_bits) - 1);
        float total[2] = {0, 0};
        for (unsigned w = 0; w < WARPS >> warp_bits; ++w)
#pragma unroll
            for (unsigned part = 0; part < 2; ++part) total[part] += sums[(w << warp_bits) + column][part][i];
        float* out = partials + size_t(blockIdx.x) * 2 * c + blockIdx.y * tile + j;
        out[0] = total[0];
        out[c] = total[1];
    }
}

#define ENTRY(suffix, T)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) group_norm_bwd_sums_##suffix(                                                          \
        float* partials, const T* x, const T* dy, const float* stats, const float* gamma, const float* beta, unsigned pixels, unsigned c,    \
        unsigned groups, unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec, unsigned silu) {                             \
        bwd_sums(partials, x, dy, stats, gamma, beta, pixels, c, groups, strips, lane_bits, warp_bits, vec, silu);                           \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// Joins the strips of one (image, group): each channel's part of dgamma and dbeta to `sums` (n, 2, c), and to `slopes` (n, groups, 2) what dx
// takes off: s1 + xhat s2 = slopes[0] + (x - mean) slopes[1].
extern "C" __global__ void __launch_bounds__(256) group_norm_bwd_join(float* sums, float* slopes, const float* partials, const float* stats,
                                                                      const float* gamma, unsigned pixels, unsigned strips, unsigned c,
                                                                      unsigned groups, unsigned lane_bits) {
    // 4 KiB: sum dz (x - mean) and sum dz of up to 32 channels by each warp; read by the first warp, free again after the second barrier.
    __shared__ double by_warp[WARPS][2][32];
    const unsigned width = c / groups, image = blockIdx.x / groups, group = blockIdx.x % groups;
    const unsigned lanes = 1u << lane_bits, column = threadIdx.x & (lanes - 1), row = threadIdx.x >> lane_bits, rows = blockDim.x >> lane_bits;
    const float* part = partials + size_t(image) * strips * 2 * c + group * width;
    const double lost = stats[3 * size_t(blockIdx.x) + 1], rstd = stats[3 * size_t(blockIdx.x) + 2];

    double s1 = 0, s2 = 0;
    for (unsigned i0 = 0; i0 < width; i0 += lanes) {
        const unsigned i = i0 + column;
        double by_x = 0, plain = 0;
        if (i < width)
            for (unsigned s = row; s < strips; s += rows) {
                const float* p = part + size_t(s) * 2 * c + i;
                by_x += double(p[0]);
                plain += double(p[c]);
            }
        for (unsigned offset = lanes; offset < 32; offset *= 2) {
            by_x += __shfl_xor_sync(0xffffffffu, by_x, offset);
            plain += __shfl_xor_sync(0xffffffffu, plain, offset);
        }
        if (blockDim.x > 32) {
            if (threadIdx.x % 32 < lanes) {
                by_warp[threadIdx.x / 32][0][threadIdx.x % 32] = by_x;
                by_warp[threadIdx.x / 32][1][threadIdx.x % 32] = plain;
            }
            __syncthreads(); // the warps' sums written above are read below
            if (threadIdx.x < lanes)
                for (unsigned w = 1; w < blockDim.x / 32; ++w) {
                    by_x += by_warp[w][0][threadIdx.x];
                    plain += by_warp[w][1][threadIdx.x];
                }
            __syncthreads(); // all have read before the next channels' sums are written
        }
        if (threadIdx.x < lanes && i < width) {
            // sum dz xhat, with what rounding took from the mean.
            const double by_xhat = (by_x - lost * plain) * rstd, weight = gamma[group * width + i];
            s1 += weight * plain;
            s2 += weight * by_xhat;
            float* out = sums + size_t(image) * 2 * c + group * width + i;
            out[0] = float(by_xhat);
            out[c] = float(plain);
        }
    }
    if (threadIdx.x < 32) {
        // Lanes beyond `lanes` hold zero.
        const double total = double(width) * double(pixels);
        s1 = warp_sum(s1) / total;
        s2 = warp_sum(s2) / total * rstd;
        if (threadIdx.x == 0) {
            slopes[2 * size_t(blockIdx.x)] = float(s1 - lost * s2);
            slopes[2 * size_t(blockIdx.x) + 1] = float(s2);
        }
    }
}

// dgamma (part 0) or dbeta (1): the sum of part `part` of (n, 2, c) over the images. Block = 32 channels; warp w adds up images w, w + 8, ...
extern "C" __global__ void __launch_bounds__(256) group_norm_bwd_params(float* grad, const float* sums, unsigned part, unsigned n, unsigned c,
                                                                        unsigned accumulate) {
    __shared__ double by_warp[WARPS][32]; // 2 KiB, written by all warps, read by the first
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, i = blockIdx.x * 32 + lane;
    double sum = 0;
    if (i < c)
#pragma unroll 4
        for (unsigned image = warp; image < n; image += WARPS) sum += double(sums[(size_t(image) * 2 + part) * c + i]);
    by_warp[warp][lane] = sum;
    __syncthreads(); // the warps' sums written above are read below
    if (warp == 0 && i < c) {
        for (unsigned w = 1; w < WARPS; ++w) sum += by_warp[w][lane];
        grad[i] = accumulate ? grad[i] + float(sum) : float(sum);
    }
}

// dx = (gamma dz - (s1 + (x - mean) s2)) rstd for the thread's channels.
struct Slopes {
    float gamma[4], rstd[4], s1[4], s2[4];
};

template <bool SILU, bool VEC, class T>
__device__ __forceinline__ void finish_pixels(T* dx, const T* x, const Place& at, const Affine& affine, const Slopes& slopes) {
#pragma unroll
    for (unsigned k0 = 0; k0 < PIXELS; k0 += HALF) {
        float4 v[HALF], g[HALF];
        load_pixels<VEC>(v, x, at, k0);
        load_pixels<VEC>(g, dx, at, k0);
#pragma unroll
        for (unsigned k = 0; k < HALF; ++k)
            if (k0 + k < at.mine) {
#pragma unroll
                for (unsigned i = 0; i < 4; ++i) {
                    const float d = get(v[k], i) - affine.mean[i];
                    const float dz = dz_of<SILU>(get(g[k], i), d, affine.a[i], affine.b[i]);
                    // Rounded before the difference, as s1 was: for one number in a group dx is zero.
                    get(g[k], i) = (__fmul_rn(dz, slopes.gamma[i]) - fmaf(d, slopes.s2[i], slopes.s1[i])) * slopes.rstd[i];
                }
                store_live<VEC>(dx + at.at + (k0 + k) * at.stride, g[k], at.live);
            }
    }
}

// dx comes in as dy.
template <class T>
__device__ __forceinline__ void bwd_dx(T* dx, const T* x, const float* stats, const float* slopes, const float* gamma, const float* beta,
                                       unsigned pixels, unsigned c, unsigned groups, unsigned strips, unsigned lane_bits, unsigned warp_bits,
                                       unsigned vec, unsigned silu) {
    const Place at = place_of(pixels, c, strips, lane_bits, warp_bits);
    if (at.mine == 0) return;
    const Affine affine = affine_of(at, stats, gamma, beta, c, groups);
    Slopes of_channel;
    const unsigned width = c / groups;
    unsigned group = at.c0 / width, next = (group + 1) * width;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
        of_channel.gamma[i] = of_channel.rstd[i] = of_channel.s1[i] = of_channel.s2[i] = 0;
        if (i < at.live) {
            if (at.c0 + i == next) ++group, next += width;
            const size_t of_group = size_t(at.image) * groups + group;
            of_channel.gamma[i] = gamma[at.c0 + i];
            of_channel.rstd[i] = stats[3 * of_group + 2];
            of_channel.s1[i] = slopes[2 * of_group];
            of_channel.s2[i] = slopes[2 * of_group + 1];
        }
    }
    switch (2 * silu + vec) {
        case 0: finish_pixels<false, false>(dx, x, at, affine, of_channel); break;
        case 1: finish_pixels<false, true>(dx, x, at, affine, of_channel); break;
        case 2: finish_pixels<true, false>(dx, x, at, affine, of_channel); break;
        case 3: finish_pixels<true, true>(dx, x, at, affine, of_channel); break;
    }
}

#define ENTRY(suffix, T)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) group_norm_bwd_dx_##suffix(                                                      \
        T* dx, const T* x, const float* stats, const float* slopes, const float* gamma, const float* beta, unsigned pixels, unsigned c, \
        unsigned groups, unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec, unsigned silu) {                       \
        bwd_dx(dx, x, stats, slopes, gamma, beta, pixels, c, groups, strips, lane_bits, warp_bits, vec, silu);                         \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
