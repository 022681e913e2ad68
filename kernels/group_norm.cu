// group_norm: normalisation over the pixels and channels of an image's group, with an optional scale and shift of each
// image's channels and an optional SiLU after it, and its gradients.
//
// computes   N = pixels c/groups elements: mean = sum x / N, var = sum (x - mean)^2 / N, rstd = 1 / sqrt(var + eps);
//            xhat = (x - mean) rstd, z = gamma xhat + beta, y = z or silu(z);
//            dz = dy or dy silu'(z); dgamma = sum dz xhat, dbeta = sum dz;
//            dx = rstd (gamma dz - s1 - xhat s2), s1 = sum gamma dz / N, s2 = sum gamma dz xhat / N.
//            With dropout, y is m scale times that and dy is first multiplied by m scale, m a function of the stream.
//            One launch each way, fwd_slab and bwd_slab, where a slab fits into shared memory: group_norm_slab.cuh.
//            bwd_slab also adds up to two gradients of x that are there already, and may leave the sums of dx over the
//            pixels. By strips otherwise: fwd_moments, fwd_join, fwd_apply; bwd_sums, bwd_join and bwd_dx;
//            dropout is a pass of its own. Either way each image's part of dgamma and dbeta is left for add_parts.
//            With scales and shifts of each image, z = (gamma xhat + beta) (1 + scale) + shift: slabs read them; for
//            strips fwd_scale_shift makes gamma and beta of each image's own, with which all passes over the image run
//            (per_image = c, otherwise 0), and bwd_scale_shift makes dscale = gamma sum dz xhat + beta sum dz and
//            dshift = sum dz of bwd_join's sums, and of the sums the images' shares of dgamma and dbeta
// layout     x, y, dx, dy (n, pixels, c): f32 or bf16. x, dx and what is added to it are each one tensor, or two: of
//            the first c_first channels and of the others. If dx is one it may be dy. The rest is f32: gamma, beta,
//            dgamma, dbeta (c); stats (n, groups, 3): mean, its rounding error, rstd; shares or sums (n, 2, c): each
//            image's part of dgamma and dbeta; pixel sums (n, c), also rounded to x's type; of strips: partials
//            (n, strips, 3, c) forward, (n, strips, 2, c) backward; slopes (n, groups, 2); gammas and betas of each
//            image's own (2, n, c). scale_shift and its gradient (n, 2c), an image's scales before its shifts: f32 or
//            bf16
// mapping    slabs: block = all pixels of an image's slab, whole groups of at most 256 channels; a thread has 16 bytes
//            of every rows-th pixel.
//            passes over strips: block = a strip of pixels and a tile of channels;
//            warp w = the (w % 2^warp_bits)-th group of channels of the tile, the (w >> warp_bits)-th of pixels;
//            lane l = 4 neighbouring channels, the (l % 2^lane_bits)-th quad of the warp, of PIXELS pixels, every
//            (32 >> lane_bits)-th. So 4x4 pixels of 512 channels fill a block as well as 784 pixels of 32. Sums are per
//            channel, not per group: neighbours in memory are then neighbours in a warp whatever c/groups is, and
//            dgamma and dbeta need sums per channel.
//            joins: block = one (image, group), 1 to 8 warps; 2^lane_bits lanes across the group's channels, the others
//            along the strips.
//            fwd_scale_shift, bwd_scale_shift: thread = a channel of an image
// shared     slabs: what is read more than once, 4 KiB for each 16 bytes of a thread, up to 84 KiB: x forward, x and dy
//            backward; and 3 to 5 KiB (forward), 7 to 11 KiB (backward) for sums. Strips: 12 KiB (fwd_moments), 8 KiB
//            (bwd_sums): the 8 warps' sums; joins up to 4 KiB
// bound by   memory. Slabs: forward reads x and writes y, backward reads x, dy and what it adds, writes dx; all once.
//            An image of 32x32 pixels of 16 channels in bf16 takes 32 KiB: six blocks a multiprocessor of an H100
//            forward, three backward. Philox of the masks, ten rounds for four elements, and the exponentials come
//            close. Strips: forward reads x twice, backward x and dy twice; the second time from L2 if a batch fits.
//            Storing dz would save an exponential and cost a write. The f64 of the joins is no bound: for 128 images of
//            32x32x128 they take 2.8 M such instructions, 4 us of an RTX 4090 (1/64 of its f32 rate), beside 67 us in
//            which it reads x once in f32
// host       slabs: grid n slabs; 4 divides c/groups, columns of 16 bytes divide c and c_first, up to 256 channels and
//            64 groups in a slab; pixels c < 2^32; shared memory for `kept` pixels of a thread, all of them if there is
//            a mask backward; the clock is null or the step's (clock.cuh).
//            strips: grid (n strips, tiles) with tiles of 4 << (lane_bits + warp_bits) channels and strips of
//            2048 >> (lane_bits + warp_bits) pixels; lane_bits up to 5, warp_bits up to 3; vec only if 4 divides c and
//            c_first. c_first = c and no second tensor for one; groups divides c; tensors start on 256-byte boundaries
// numerics   the variance takes two passes, over shared memory or registers, about a mean in f32: E[x^2] - E[x]^2 loses
//            every digit when the mean is large compared with the deviation. A mean in f32 is off by up to half an ulp,
//            which may be many deviations, so each mean m is kept with sum (x - m), and the joins are f64 (Chan, Golub
//            and LeVeque 1983). x - m is exact for x within a factor of two of m. A sum over a slab has up to 25 terms
//            of a thread (of each of its channels), then up to 16 threads in f32, the rest in f64. What is added to dx
//            is added in f32, (first + second) + own, and rounded once with it. The order of every sum depends on the
//            image's extent alone: the same bits for any batch, at every repetition
#include "group_norm_slab.cuh"
#include "reduce.cuh"

// Host twin: pixels per thread, each with 4 neighbouring channels: 32 f32 in registers, 8 loads of 16 bytes in flight.
constexpr unsigned PIXELS = 8;
constexpr unsigned WARPS = BLOCK / 32;
constexpr unsigned WARP_TILE = 4 * 32;    // channels per warp, at most

// The channels and pixels of a thread in a pass over the image.
struct Position {
    unsigned image, strip;
    unsigned c0, channels;  // the first of its 4 channels, and how many of them exist
    unsigned warp_pixels;   // pixels of its warp that exist
    unsigned pixels;        // pixels of its own that exist, 0 to PIXELS
    size_t pixel, step;     // index of its first pixel among those of all images, and from one to the next
};

// A warp with lane_bits = 3: 8 lanes across           A block with warp_bits = 1: 2 warps across
//
// channels     0..3     4..7     ..   28..31          channels          0..31         32..63
// pixel 0      lane 0   lane 1   ..   lane 7          pixels 0..31      [ warp 0 ]    [ warp 1 ]
// pixel 1      lane 8   lane 9   ..   lane 15         pixels 32..63     [ warp 2 ]    [ warp 3 ]
// pixel 2      lane 16  lane 17  ..   lane 23         pixels 64..95     [ warp 4 ]    [ warp 5 ]
// pixel 3      lane 24  lane 25  ..   lane 31         pixels 96..127    [ warp 6 ]    [ warp 7 ]
// pixel 4      lane 0   lane 1   ..   lane 7
//   ..  31     PIXELS of each lane                    the strip: 128 pixels; the tile: 64 channels
__device__ __forceinline__ Position position_of(unsigned pixels, unsigned c, unsigned strips, unsigned lane_bits,
                                                unsigned warp_bits) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned step = 32u >> lane_bits, of_warp = step * PIXELS;
    Position pos;
    pos.image = blockIdx.x / strips;
    pos.strip = blockIdx.x % strips;
    const unsigned across = ((warp & ((1u << warp_bits) - 1)) << lane_bits) + (lane & ((1u << lane_bits) - 1));
    pos.c0 = (blockIdx.y << (lane_bits + warp_bits + 2)) + 4 * across;
    pos.channels = pos.c0 < c ? min(c - pos.c0, 4u) : 0;
    const unsigned start = (pos.strip * (WARPS >> warp_bits) + (warp >> warp_bits)) * of_warp;
    const unsigned first = lane >> lane_bits;
    pos.warp_pixels = start < pixels ? min(pixels - start, of_warp) : 0;
    const bool any = pos.channels && first < pos.warp_pixels;
    pos.pixels = any ? ((pos.warp_pixels - first - 1) >> (5 - lane_bits)) + 1 : 0;
    pos.pixel = size_t(pos.image) * pixels + start + first;
    pos.step = step;
    return pos;
}

// Loads pixels k0 .. k0 + K of the thread, zero where there are none. VEC: four divides the channels.
template <bool VEC, unsigned K, class T>
__device__ __forceinline__ void load_pixels(float4 (&v)[K],  // (K pixels, 4 channels)
                                            const Channels<const T>& x, const Position& pos, unsigned k0) {
    const T* at = x.at(pos.pixel, pos.c0);
    const size_t stride = pos.step * x.width(pos.c0);
#pragma unroll
    for (unsigned k = 0; k < K; ++k) {
        v[k] = make_float4(0, 0, 0, 0);
        if (k0 + k >= pos.pixels) continue;
        if (VEC) {
            v[k] = load4(at + (k0 + k) * stride);
        } else {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i)
                if (i < pos.channels) get(v[k], i) = load(x.at(pos.pixel + (k0 + k) * pos.step, pos.c0 + i));
        }
    }
}

// Stores pixel k of the thread.
template <bool VEC, class T>
__device__ __forceinline__ void store_pixel(const Channels<T>& y, const Position& pos, unsigned k, float4 v) {
    if (VEC) {
        store4(y.at(pos.pixel, pos.c0) + k * (pos.step * y.width(pos.c0)), v);
    } else {
#pragma unroll
        for (unsigned i = 0; i < 4; ++i)
            if (i < pos.channels) store(y.at(pos.pixel + k * pos.step, pos.c0 + i), get(v, i));
    }
}

// Sums over the lanes of a warp that share channels; each of them gets the sums.
__device__ __forceinline__ void sum_pixels(float (&v)[4], unsigned lane_bits) {
    for (unsigned offset = 1u << lane_bits; offset < 32; offset *= 2)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], offset);
}

// Writes each warp's sums per channel to shared memory, where all threads can read them when it returns. Of the lanes
// that share channels, the first writes.
template <unsigned SUMS>
__device__ __forceinline__ void share_sums(float (&shared)[WARPS][SUMS][WARP_TILE],
                                           const float (&sums)[SUMS][4],  // (sums, the thread's 4 channels)
                                           unsigned lane_bits) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane >> lane_bits == 0)
#pragma unroll
        for (unsigned s = 0; s < SUMS; ++s)
            store4(&shared[warp][s][4 * lane], make_float4(sums[s][0], sums[s][1], sums[s][2], sums[s][3]));
    __syncthreads();  // the warps' sums written above are read by the caller
}

// f(i, group) for each of the thread's channels c0 + i that exists; a group has `width` channels.
template <class F>
__device__ __forceinline__ void each_channel(const Position& pos, unsigned width, F f) {
    unsigned group = pos.c0 / width, next = (group + 1) * width;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i)
        if (i < pos.channels) {
            if (pos.c0 + i == next) ++group, next += width;
            f(i, group);
        }
}

// z = (x - mean) a + b for the thread's channels.
struct Affine {
    float mean[4], a[4], b[4];
};

__device__ __forceinline__ Affine affine_of(const Position& pos,
                                            const float* stats,                     // (n, groups, 3)
                                            const float* gamma, const float* beta,  // (c) or (n, c)
                                            unsigned per_image, unsigned c, unsigned groups, unsigned vec) {
    Affine affine = {};
    const unsigned width = c / groups;
    gamma += size_t(pos.image) * per_image;
    beta += size_t(pos.image) * per_image;
    if (vec && width % 4 == 0) {
        // Four channels of one group: as few loads as there are numbers, and whole sectors.
        float4 g = load4(gamma + pos.c0), b = load4(beta + pos.c0);
        const float* of_group = stats + 3 * (size_t(pos.image) * groups + pos.c0 / width);
        const float mean = of_group[0], lost = of_group[1], rstd = of_group[2];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            affine.mean[i] = mean;
            affine.a[i] = rstd * get(g, i);
            affine.b[i] = get(b, i) - lost * affine.a[i];
        }
        return affine;
    }
    each_channel(pos, width, [&](unsigned i, unsigned group) {
        const float* of_group = stats + 3 * (size_t(pos.image) * groups + group);
        affine.mean[i] = of_group[0];
        affine.a[i] = of_group[2] * gamma[pos.c0 + i];
        // The rounding error of the mean goes into the shift.
        affine.b[i] = beta[pos.c0 + i] - of_group[1] * affine.a[i];
    });
    return affine;
}

// A flag as a type.
template <bool VALUE_>
struct Flag {
    static constexpr bool VALUE = VALUE_;
};

// Calls f(silu, vec), both as `Flag`: f is instantiated for each combination, so that no pixel tests them.
template <class F>
__device__ __forceinline__ void with_flags(unsigned silu, unsigned vec, F f) {
    switch (2 * silu + vec) {
        case 0: f(Flag<false>(), Flag<false>()); break;
        case 1: f(Flag<false>(), Flag<true>()); break;
        case 2: f(Flag<true>(), Flag<false>()); break;
        case 3: f(Flag<true>(), Flag<true>()); break;
    }
}

// ---- forward ----

// Each channel's m (about the mean of the strip), sum (x - m) and sum (x - m)^2 over a strip.
template <class T>
__device__ __forceinline__ void fwd_moments(float* partials,             // (n, strips, 3, c)
                                            const Channels<const T>& x,  // (n, pixels, c)
                                            unsigned pixels, unsigned c, unsigned strips, unsigned lane_bits,
                                            unsigned warp_bits, unsigned vec) {
    // 12 KiB, (warp, moment, channel): written by share_sums, read below by a thread for each channel.
    __shared__ alignas(16) float shared[WARPS][3][WARP_TILE];
    const Position pos = position_of(pixels, c, strips, lane_bits, warp_bits);
    float4 v[PIXELS];  // (PIXELS, 4 channels)
    if (vec)
        load_pixels<true>(v, x, pos, 0);
    else
        load_pixels<false>(v, x, pos, 0);

    float moments[3][4] = {};  // (moment, 4 channels): with d = x - m
    float (&m)[4] = moments[0], (&sum_d)[4] = moments[1], (&sum_d2)[4] = moments[2];
#pragma unroll
    for (unsigned k = 0; k < PIXELS; ++k)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) m[i] += get(v[k], i);
    sum_pixels(m, lane_bits);
    const float per_pixel = pos.warp_pixels ? 1.0f / float(pos.warp_pixels) : 0;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) m[i] *= per_pixel;
#pragma unroll
    for (unsigned k = 0; k < PIXELS; ++k)
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            const float d = k < pos.pixels ? get(v[k], i) - m[i] : 0;
            sum_d[i] += d;
            sum_d2[i] = fmaf(d, d, sum_d2[i]);
        }
    sum_pixels(sum_d, lane_bits);
    sum_pixels(sum_d2, lane_bits);
    share_sums(shared, moments, lane_bits);

    const unsigned tile = 4u << (lane_bits + warp_bits), of_warp = (32u >> lane_bits) * PIXELS;
    const unsigned first = pos.strip * (WARPS >> warp_bits) * of_warp;
    for (unsigned j = threadIdx.x; j < tile && blockIdx.y * tile + j < c; j += BLOCK) {
        const unsigned column = j >> (lane_bits + 2), i = j & ((4u << lane_bits) - 1);
        const unsigned along = WARPS >> warp_bits;
        float mean = 0, total_d = 0, total_d2 = 0;
        unsigned total = 0;  // pixels
        for (unsigned w = 0; w < along; ++w) {
            const unsigned from = first + w * of_warp, count = from < pixels ? min(pixels - from, of_warp) : 0;
            mean = fmaf(float(count), shared[(w << warp_bits) + column][0][i], mean);
            total += count;
        }
        mean *= 1.0f / float(total);
        // About one mean for all warps: sum (x - mean) = sum (x - m) + n (m - mean), and so for the squares.
        for (unsigned w = 0; w < along; ++w) {
            const unsigned from = first + w * of_warp, count = from < pixels ? min(pixels - from, of_warp) : 0;
            const float (*moments_w)[WARP_TILE] = shared[(w << warp_bits) + column];  // (moment, channel)
            if (count) {
                const float shift = moments_w[0][i] - mean, moved = float(count) * shift;
                total_d += moments_w[1][i] + moved;
                total_d2 += fmaf(shift, 2 * moments_w[1][i] + moved, moments_w[2][i]);
            }
        }
        float* out = partials + size_t(blockIdx.x) * 3 * c + blockIdx.y * tile + j;
        out[0] = mean;
        out[c] = total_d;
        out[2 * size_t(c)] = total_d2;
    }
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_fwd_moments_##suffix(                           \
        float* partials, const T* x, const T* x_second, unsigned c_first, unsigned pixels, unsigned c,               \
        unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec) {                                     \
        const Channels<const T> whole = {x, x_second, c_first, c};                                                   \
        fwd_moments(partials, whole, pixels, c, strips, lane_bits, warp_bits, vec);                                  \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// Sum over the block's warps (at most WARPS) in order; every thread gets it. `scratch` may be reused when the call
// returns.
__device__ __forceinline__ double join_sum(double v, double* scratch) {
    v = warp_sum(v);
    if (blockDim.x == 32) return v;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();  // the warps' sums written above are read below
    double sum = scratch[0];
    for (unsigned w = 1; w < blockDim.x / 32; ++w) sum += scratch[w];
    __syncthreads();  // all have read before a caller writes scratch again
    return sum;
}

// Joins the strips and channels of one (image, group), in partials (n, strips, 3, c), into its row of stats
// (n, groups, 3). 2^lane_bits lanes lie side by side along the group's channels; `strip` is the pixels per strip.
extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_fwd_join(
    float* stats, const float* partials, unsigned pixels, unsigned strip, unsigned strips, unsigned c, unsigned groups,
    unsigned lane_bits, float eps) {
    __shared__ double scratch[WARPS];  // 64 bytes: join_sum's
    const unsigned width = c / groups, image = blockIdx.x / groups, group = blockIdx.x % groups;
    const unsigned lanes = 1u << lane_bits, column = threadIdx.x & (lanes - 1);
    const unsigned row = threadIdx.x >> lane_bits, rows = blockDim.x >> lane_bits;
    const float* part = partials + size_t(image) * strips * 3 * c + group * width;  // (strips, 3, width)
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
            // About the group's mean, not m: sum (x - m)^2 + 2 (m - mean) sum (x - m) + n (m - mean)^2.
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
__device__ __forceinline__ void apply_pixels(const Channels<T>& y, const Channels<const T>& x, const Position& pos,
                                             const Affine& affine) {
    float4 v[PIXELS];  // (PIXELS, 4 channels)
    load_pixels<VEC>(v, x, pos, 0);
#pragma unroll
    for (unsigned k = 0; k < PIXELS; ++k)
        if (k < pos.pixels) {
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const float z = fmaf(get(v[k], i) - affine.mean[i], affine.a[i], affine.b[i]);
                get(v[k], i) = SILU ? silu(z) : z;
            }
            store_pixel<VEC>(y, pos, k, v[k]);
        }
}

template <class T>
__device__ __forceinline__ void fwd_apply(T* y, const Channels<const T>& x,       // (n, pixels, c)
                                          const float* stats,                     // (n, groups, 3)
                                          const float* gamma, const float* beta,  // (c) or (n, c)
                                          unsigned per_image, unsigned pixels, unsigned c, unsigned groups,
                                          unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec,
                                          unsigned silu) {
    const Position pos = position_of(pixels, c, strips, lane_bits, warp_bits);
    if (pos.pixels == 0) return;
    const Affine affine = affine_of(pos, stats, gamma, beta, per_image, c, groups, vec);
    const Channels<T> to = {y, nullptr, c, c};
    with_flags(silu, vec, [&](auto silu, auto vec) { apply_pixels<silu.VALUE, vec.VALUE>(to, x, pos, affine); });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_fwd_apply_##suffix(                             \
        T* y, const T* x, const T* x_second, unsigned c_first, const float* stats, const float* gamma,               \
        const float* beta, unsigned per_image, unsigned pixels, unsigned c, unsigned groups, unsigned strips,        \
        unsigned lane_bits, unsigned warp_bits, unsigned vec, unsigned silu) {                                       \
        const Channels<const T> whole = {x, x_second, c_first, c};                                                   \
        fwd_apply(y, whole, stats, gamma, beta, per_image, pixels, c, groups, strips, lane_bits, warp_bits, vec,     \
                  silu);                                                                                             \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// own (2, n, c): gamma (1 + scale) and beta (1 + scale) + shift of each image.
template <class T>
__device__ __forceinline__ void fwd_scale_shift(float* own,                             // (2, n, c)
                                                const T* scale_shift,                   // (n, 2c)
                                                const float* gamma, const float* beta,  // (c)
                                                unsigned n, unsigned c) {
    const size_t at = size_t(blockIdx.x) * BLOCK + threadIdx.x, rows = size_t(n) * c;
    if (at >= rows) return;
    const size_t image = at / c, i = at % c, row = image * 2 * c + i;
    const float scale = 1.0f + load(scale_shift + row), shift = load(scale_shift + row + c);
    own[at] = gamma[i] * scale;
    own[rows + at] = fmaf(beta[i], scale, shift);
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_fwd_scale_shift_##suffix(                       \
        float* own, const T* scale_shift, const float* gamma, const float* beta, unsigned n, unsigned c) {           \
        fwd_scale_shift(own, scale_shift, gamma, beta, n, c);                                                        \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// One launch: group_norm_slab.cuh.
#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_fwd_slab_##suffix(                             \
        T* y, float* stats, const T* x, const T* x_second, const float* gamma, const float* beta,                    \
        const T* scale_shift, Slab slab, float eps, Stream masks, unsigned threshold, float scale,                   \
        const Clock* clock) {                                                                                        \
        const Channels<const T> whole = {x, x_second, slab.c_first, slab.c};                                         \
        const Masks of = {of_image(of_step(masks, clock), blockIdx.x / slab.slabs), threshold, scale};               \
        fwd_slab(y, stats, whole, gamma, beta, scale_shift, slab, eps, of);                                          \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// ---- backward ----

// dz for the output's gradient dy and x = mean + d.
template <bool SILU>
__device__ __forceinline__ float dz_of(float dy, float d, float a, float b) {
    return SILU ? dy * silu_slope(fmaf(d, a, b)) : dy;
}

// Pixels of two tensors that a backward pass holds at a time: its registers then allow 16 warps or more per
// multiprocessor.
constexpr unsigned HALF = PIXELS / 2;

template <bool SILU, bool VEC, class T>
__device__ __forceinline__ void add_pixels(float (&sum_dz_d)[4], float (&sum_dz)[4],  // (4 channels)
                                           const Channels<const T>& x, const Channels<const T>& dy,
                                           const Position& pos, const Affine& affine) {
#pragma unroll
    for (unsigned k0 = 0; k0 < PIXELS; k0 += HALF) {
        float4 v[HALF], g[HALF];  // (HALF pixels, 4 channels)
        load_pixels<VEC>(v, x, pos, k0);
        load_pixels<VEC>(g, dy, pos, k0);
        // Where there is no pixel, dy and so dz are zero.
#pragma unroll
        for (unsigned k = 0; k < HALF; ++k)
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const float d = get(v[k], i) - affine.mean[i];
                const float dz = dz_of<SILU>(get(g[k], i), d, affine.a[i], affine.b[i]);
                sum_dz_d[i] = fmaf(dz, d, sum_dz_d[i]);
                sum_dz[i] += dz;
            }
    }
}

// Each channel's sum dz (x - mean) and sum dz over a strip.
template <class T>
__device__ __forceinline__ void bwd_sums(float* partials,                        // (n, strips, 2, c)
                                         const Channels<const T>& x,             // (n, pixels, c)
                                         const T* dy,                            // (n, pixels, c)
                                         const float* stats,                     // (n, groups, 3)
                                         const float* gamma, const float* beta,  // (c) or (n, c)
                                         unsigned per_image, unsigned pixels, unsigned c, unsigned groups,
                                         unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec,
                                         unsigned silu) {
    // 8 KiB, (warp, sum, channel): written by share_sums, read below by a thread for each channel.
    __shared__ alignas(16) float shared[WARPS][2][WARP_TILE];
    const Position pos = position_of(pixels, c, strips, lane_bits, warp_bits);
    float sums[2][4] = {};  // (sum, 4 channels): of dz (x - mean), and of dz
    if (pos.pixels != 0) {
        const Affine affine = affine_of(pos, stats, gamma, beta, per_image, c, groups, vec);
        with_flags(silu, vec, [&](auto silu, auto vec) {
            const Channels<const T> of_y = {dy, nullptr, c, c};
            add_pixels<silu.VALUE, vec.VALUE>(sums[0], sums[1], x, of_y, pos, affine);
        });
    }
    sum_pixels(sums[0], lane_bits);
    sum_pixels(sums[1], lane_bits);
    share_sums(shared, sums, lane_bits);

    const unsigned tile = 4u << (lane_bits + warp_bits);
    for (unsigned j = threadIdx.x; j < tile && blockIdx.y * tile + j < c; j += BLOCK) {
        const unsigned column = j >> (lane_bits + 2), i = j & ((4u << lane_bits) - 1);
        float total[2] = {0, 0};
        for (unsigned w = 0; w < WARPS >> warp_bits; ++w)
#pragma unroll
            for (unsigned part = 0; part < 2; ++part) total[part] += shared[(w << warp_bits) + column][part][i];
        float* out = partials + size_t(blockIdx.x) * 2 * c + blockIdx.y * tile + j;
        out[0] = total[0];
        out[c] = total[1];
    }
}

// Three blocks a multiprocessor: left to itself, the assembler takes 64 registers for sm_100, and spills one. (bwd_dx
// would take 100 for channels that do not divide by four.)
#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_bwd_sums_##suffix(                           \
        float* partials, const T* x, const T* x_second, unsigned c_first, const T* dy, const float* stats,           \
        const float* gamma, const float* beta, unsigned per_image, unsigned pixels, unsigned c, unsigned groups,     \
        unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec, unsigned silu) {                      \
        const Channels<const T> whole = {x, x_second, c_first, c};                                                   \
        bwd_sums(partials, whole, dy, stats, gamma, beta, per_image, pixels, c, groups, strips, lane_bits,           \
                 warp_bits, vec, silu);                                                                              \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// Joins the strips of one (image, group), in partials (n, strips, 2, c). Writes the image's share of each channel's
// dgamma and dbeta to sums (n, 2, c), and what dx subtracts to slopes (n, groups, 2):
// s1 + xhat s2 = slopes[0] + (x - mean) slopes[1].
extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_bwd_join(
    float* sums, float* slopes, const float* partials, const float* stats, const float* gamma, unsigned per_image,
    unsigned pixels, unsigned strips, unsigned c, unsigned groups, unsigned lane_bits) {
    // 4 KiB, (warp, sum, channel): each warp's sum dz (x - mean) and sum dz for up to 32 channels; read by the first
    // warp, free for reuse after the second barrier.
    __shared__ double by_warp[WARPS][2][32];
    const unsigned width = c / groups, image = blockIdx.x / groups, group = blockIdx.x % groups;
    const unsigned lanes = 1u << lane_bits, column = threadIdx.x & (lanes - 1);
    const unsigned row = threadIdx.x >> lane_bits, rows = blockDim.x >> lane_bits;
    const float* part = partials + size_t(image) * strips * 2 * c + group * width;  // (strips, 2, width)
    const double mean_lost = stats[3 * size_t(blockIdx.x) + 1], rstd = stats[3 * size_t(blockIdx.x) + 2];
    gamma += size_t(image) * per_image;

    double s1 = 0, s2 = 0;
    for (unsigned i0 = 0; i0 < width; i0 += lanes) {
        const unsigned i = i0 + column;
        double sum_dz_d = 0, sum_dz = 0;
        if (i < width)
            for (unsigned s = row; s < strips; s += rows) {
                const float* p = part + size_t(s) * 2 * c + i;
                sum_dz_d += double(p[0]);
                sum_dz += double(p[c]);
            }
        for (unsigned offset = lanes; offset < 32; offset *= 2) {
            sum_dz_d += __shfl_xor_sync(0xffffffffu, sum_dz_d, offset);
            sum_dz += __shfl_xor_sync(0xffffffffu, sum_dz, offset);
        }
        if (blockDim.x > 32) {
            if (threadIdx.x % 32 < lanes) {
                by_warp[threadIdx.x / 32][0][threadIdx.x % 32] = sum_dz_d;
                by_warp[threadIdx.x / 32][1][threadIdx.x % 32] = sum_dz;
            }
            __syncthreads();  // the warps' sums written above are read below
            if (threadIdx.x < lanes)
                for (unsigned w = 1; w < blockDim.x / 32; ++w) {
                    sum_dz_d += by_warp[w][0][threadIdx.x];
                    sum_dz += by_warp[w][1][threadIdx.x];
                }
            __syncthreads();  // all have read before the next channels' sums are written
        }
        if (threadIdx.x < lanes && i < width) {
            // sum dz xhat, corrected for the rounding error of the mean.
            const double sum_dz_xhat = (sum_dz_d - mean_lost * sum_dz) * rstd, weight = gamma[group * width + i];
            s1 += weight * sum_dz;
            s2 += weight * sum_dz_xhat;
            float* out = sums + size_t(image) * 2 * c + group * width + i;
            out[0] = float(sum_dz_xhat);
            out[c] = float(sum_dz);
        }
    }
    if (threadIdx.x < 32) {
        // Lanes beyond `lanes` hold zero.
        const double total = double(width) * double(pixels);
        s1 = warp_sum(s1) / total;
        s2 = warp_sum(s2) / total * rstd;
        if (threadIdx.x == 0) {
            slopes[2 * size_t(blockIdx.x)] = float(s1 - mean_lost * s2);
            slopes[2 * size_t(blockIdx.x) + 1] = float(s2);
        }
    }
}

// dscale_shift of each image from its row of sums, which becomes its share of dgamma and dbeta.
template <class T>
__device__ __forceinline__ void bwd_scale_shift(T* dscale_shift,                        // (n, 2c)
                                                float* sums,                            // (n, 2, c)
                                                const T* scale_shift,                   // (n, 2c)
                                                const float* gamma, const float* beta,  // (c)
                                                unsigned n, unsigned c) {
    const size_t at = size_t(blockIdx.x) * BLOCK + threadIdx.x;
    if (at >= size_t(n) * c) return;
    const size_t image = at / c, i = at % c, row = image * 2 * c + i;
    const float scale = 1.0f + load(scale_shift + row), sum_dz_xhat = sums[row], sum_dz = sums[row + c];
    store(dscale_shift + row, fmaf(gamma[i], sum_dz_xhat, beta[i] * sum_dz));
    store(dscale_shift + row + c, sum_dz);
    sums[row] = scale * sum_dz_xhat;
    sums[row + c] = scale * sum_dz;
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK) group_norm_bwd_scale_shift_##suffix(                       \
        T* dscale_shift, float* sums, const T* scale_shift, const float* gamma, const float* beta, unsigned n,       \
        unsigned c) {                                                                                                \
        bwd_scale_shift(dscale_shift, sums, scale_shift, gamma, beta, n, c);                                         \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// dx = (gamma dz - (s1 + (x - mean) s2)) rstd for the thread's channels.
struct Slopes {
    float gamma[4], rstd[4], s1[4], s2[4];
};

template <bool SILU, bool VEC, class T>
__device__ __forceinline__ void dx_pixels(const Channels<T>& dx, const Channels<const T>& dy,
                                          const Channels<const T>& x, const Position& pos, const Affine& affine,
                                          const Slopes& slopes) {
    constexpr unsigned COUNT = VEC ? HALF : 1;  // that is held at a time; each number has its own address otherwise
#pragma unroll
    for (unsigned k0 = 0; k0 < PIXELS; k0 += COUNT) {
        float4 v[COUNT], g[COUNT];  // (COUNT pixels, 4 channels)
        load_pixels<VEC>(v, x, pos, k0);
        load_pixels<VEC>(g, dy, pos, k0);
#pragma unroll
        for (unsigned k = 0; k < COUNT; ++k)
            if (k0 + k < pos.pixels) {
#pragma unroll
                for (unsigned i = 0; i < 4; ++i) {
                    const float d = get(v[k], i) - affine.mean[i];
                    const float dz = dz_of<SILU>(get(g[k], i), d, affine.a[i], affine.b[i]);
                    // Rounded before the difference, as s1 was, so that dx is zero if a group has one element.
                    const float gamma_dz = __fmul_rn(dz, slopes.gamma[i]);
                    get(g[k], i) = (gamma_dz - fmaf(d, slopes.s2[i], slopes.s1[i])) * slopes.rstd[i];
                }
                store_pixel<VEC>(dx, pos, k0 + k, g[k]);
            }
    }
}

// dx may be dy, if it is one tensor.
template <class T>
__device__ __forceinline__ void bwd_dx(const Channels<T>& dx,                  // (n, pixels, c)
                                       const T* dy,                            // (n, pixels, c)
                                       const Channels<const T>& x,             // (n, pixels, c)
                                       const float* stats,                     // (n, groups, 3)
                                       const float* slopes,                    // (n, groups, 2)
                                       const float* gamma, const float* beta,  // (c) or (n, c)
                                       unsigned per_image, unsigned pixels, unsigned c, unsigned groups,
                                       unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec,
                                       unsigned silu) {
    const Position pos = position_of(pixels, c, strips, lane_bits, warp_bits);
    if (pos.pixels == 0) return;
    const Affine affine = affine_of(pos, stats, gamma, beta, per_image, c, groups, vec);
    Slopes of_channel = {};
    gamma += size_t(pos.image) * per_image;
    if (vec && c / groups % 4 == 0) {
        const size_t of_group = size_t(pos.image) * groups + pos.c0 / (c / groups);
        float4 g = load4(gamma + pos.c0);
        const float rstd = stats[3 * of_group + 2], s1 = slopes[2 * of_group], s2 = slopes[2 * of_group + 1];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            of_channel.gamma[i] = get(g, i);
            of_channel.rstd[i] = rstd, of_channel.s1[i] = s1, of_channel.s2[i] = s2;
        }
    } else {
        each_channel(pos, c / groups, [&](unsigned i, unsigned group) {
            const size_t of_group = size_t(pos.image) * groups + group;
            of_channel.gamma[i] = gamma[pos.c0 + i];
            of_channel.rstd[i] = stats[3 * of_group + 2];
            of_channel.s1[i] = slopes[2 * of_group];
            of_channel.s2[i] = slopes[2 * of_group + 1];
        });
    }
    with_flags(silu, vec, [&](auto silu, auto vec) {
        const Channels<const T> of_y = {dy, nullptr, c, c};
        dx_pixels<silu.VALUE, vec.VALUE>(dx, of_y, x, pos, affine, of_channel);
    });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_bwd_dx_##suffix(                             \
        T* dx, T* dx_second, const T* dy, const T* x, const T* x_second, unsigned c_first, const float* stats,       \
        const float* slopes, const float* gamma, const float* beta, unsigned per_image, unsigned pixels,             \
        unsigned c, unsigned groups, unsigned strips, unsigned lane_bits, unsigned warp_bits, unsigned vec,          \
        unsigned silu) {                                                                                             \
        const Channels<T> to = {dx, dx_second, c_first, c};                                                          \
        const Channels<const T> whole = {x, x_second, c_first, c};                                                   \
        bwd_dx(to, dy, whole, stats, slopes, gamma, beta, per_image, pixels, c, groups, strips, lane_bits,           \
               warp_bits, vec, silu);                                                                                \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

// One launch: group_norm_slab.cuh.
#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCK, 3) group_norm_bwd_slab_##suffix(                             \
        T* dx, T* dx_second, float* pixel_sums, float* pixel_sums_second, T* rounded_sums, T* rounded_sums_second,   \
        float* shares, T* dscale_shift,                                                                              \
        const T* dy, const T* plus, const T* plus_second, const T* more, const T* more_second, const T* x,           \
        const T* x_second, const float* stats, const float* gamma, const float* beta, const T* scale_shift,          \
        Slab slab, Stream masks, unsigned threshold, float scale, const Clock* clock) {                              \
        const Channels<T> to = {dx, dx_second, slab.c_first, slab.c};                                                \
        const Channels<const T> whole = {x, x_second, slab.c_first, slab.c};                                         \
        const Channels<const T> others[2] = {{plus, plus_second, slab.c_first, slab.c},                              \
                                             {more, more_second, slab.c_first, slab.c}};                             \
        const Gives<T> gives = {{pixel_sums, pixel_sums_second, slab.c_first, slab.c},                               \
                                {rounded_sums, rounded_sums_second, slab.c_first, slab.c},                           \
                                shares, dscale_shift};                                                               \
        const Masks of = {of_image(of_step(masks, clock), blockIdx.x / slab.slabs), threshold, scale};               \
        bwd_slab(to, gives, dy, others, whole, stats, gamma, beta, scale_shift, slab, of);                           \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
