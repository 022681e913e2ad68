// Group norm in one launch: a block has whole groups of an image's channels, all pixels, in shared memory.
//
// A slab is `columns` columns of 16 bytes of every pixel: whole groups, and whole sectors of 32 bytes where the image's
// channels are such. A thread has one column of every `rows`-th pixel, k = 0, 1, ... of them:
//
//     columns = 4, 64 rows        column 0     column 1     column 2     column 3
//     pixel  0                    thread 0     thread 1     thread 2     thread 3      \
//     pixel  1                    thread 4     thread 5     thread 6     thread 7       |  k = 0
//      ..   63                    thread 252   thread 253   thread 254   thread 255    /
//     pixel 64                    thread 0     thread 1     thread 2     thread 3         k = 1
//
// It copies its own 16 bytes to place (k, thread) of shared memory, all of them before it waits for the first, and
// reads them back in every pass: neighbours lie side by side, nobody waits for another, and no register is taken. Of
// images for which there is no room, the first `kept` are held and the others are read from global memory again. What
// is held changes no bit.
//
// Sums go from threads to the slab's channels in three steps of fixed order, f32 in the first two: a thread's pixels,
// at most 16 threads of a column, then f64.
#pragma once
#include "activation.cuh"
#include "clock.cuh"
#include "dtype.cuh"
#include "philox.cuh"
#include "ptx.cuh"

// Host twin: threads per block; the joins have as few as 32. At 80 registers per thread a multiprocessor holds three
// blocks: 24 warps, in passes over strips with 4 or 8 loads of 16 bytes per lane in flight.
constexpr unsigned BLOCK = 256;

// Host twin: channels of a slab, at most; its groups have four or more.
constexpr unsigned SLAB_CHANNELS = 256;
constexpr unsigned SLAB_GROUPS = SLAB_CHANNELS / 4;

// Host twin: an image batch in slabs.
struct Slab {
    unsigned n, pixels, c, groups;  // images, pixels of each, channels, groups of them
    unsigned c_first;               // channels of the first of two tensors; c of one
    unsigned columns, slabs;        // of 16 bytes in a slab; slabs of an image
    unsigned kept;                  // that a thread keeps in shared memory, of each tensor that is read twice
    unsigned silu;                  // 1: a SiLU follows
};

// What dropout does to the output: element k of an image is kept, and scaled, if word k % 4 of Philox block k / 4 is at
// least the threshold. None if the threshold is 0.
struct Masks {
    Stream stream;  // of the image
    uint32_t threshold;
    float scale;
};

// A tensor (n, pixels, c), or two that hold its first c_first channels and the others. second: null for one.
template <class T>
struct Channels {
    T *first, *second;
    unsigned c_first, c;

    // Channel i of a pixel. So are the three after it if i and both tensors' channels divide by four.
    __device__ __forceinline__ T* at(size_t pixel, unsigned i) const {
        const bool of_first = i < c_first;
        return (of_first ? first : second) + pixel * width(i) + (of_first ? i : i - c_first);
    }
    __device__ __forceinline__ unsigned width(unsigned i) const { return i < c_first ? c_first : c - c_first; }
    // Whether the tensor that has channel i is there.
    __device__ __forceinline__ bool has(unsigned i) const { return (i < c_first ? first : second) != nullptr; }
};

__device__ __forceinline__ float& get(float4& v, unsigned i) { return reinterpret_cast<float*>(&v)[i]; }

// Quads of neighbouring channels in 16 bytes.
template <class T>
constexpr unsigned QUADS = WIDE<T> / 4;

// Quad q of 16 bytes.
template <class T>
__device__ __forceinline__ float4 quad(const uint4& v, unsigned q);
template <>
__device__ __forceinline__ float4 quad<float>(const uint4& v, unsigned) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}
template <>
__device__ __forceinline__ float4 quad<bf16>(const uint4& v, unsigned q) {
    const unsigned lo = q == 0 ? v.x : v.z, hi = q == 0 ? v.y : v.w;
    return make_float4(__uint_as_float(lo << 16), __uint_as_float(lo & 0xffff0000u),  //
                       __uint_as_float(hi << 16), __uint_as_float(hi & 0xffff0000u));
}

// Rounds quad q of 16 bytes.
__device__ __forceinline__ void set_quad(float*, uint4& v, unsigned, float4 f) {
    v = make_uint4(__float_as_uint(f.x), __float_as_uint(f.y), __float_as_uint(f.z), __float_as_uint(f.w));
}
__device__ __forceinline__ void set_quad(bf16*, uint4& v, unsigned q, float4 f) {
    const __nv_bfloat162 lo = __floats2bfloat162_rn(f.x, f.y), hi = __floats2bfloat162_rn(f.z, f.w);
    const unsigned l = *reinterpret_cast<const unsigned*>(&lo), h = *reinterpret_cast<const unsigned*>(&hi);
    if (q == 0)
        v.x = l, v.y = h;
    else
        v.z = l, v.w = h;
}

// Zeroes what dropout drops.
__device__ __forceinline__ void drop(float4& v, const uint4& words, uint32_t threshold) {
    v.x = words.x >= threshold ? v.x : 0.0f;
    v.y = words.y >= threshold ? v.y : 0.0f;
    v.z = words.z >= threshold ? v.z : 0.0f;
    v.w = words.w >= threshold ? v.w : 0.0f;
}

// The thread's place in its block's slab.
template <class T>
struct Place {
    unsigned image, slab;
    unsigned column, row, rows;
    unsigned start, channels;  // the slab's first channel, and how many it has
    unsigned c0;               // the first channel of the thread's column
    unsigned count;            // pixels of the thread; 0 beyond the last channel
    unsigned width;            // channels of a group

    __device__ __forceinline__ explicit Place(const Slab& s) {
        image = blockIdx.x / s.slabs, slab = blockIdx.x % s.slabs;
        rows = BLOCK / s.columns, row = threadIdx.x / s.columns, column = threadIdx.x % s.columns;
        start = slab * s.columns * WIDE<T>, channels = min(s.columns * WIDE<T>, s.c - start);
        c0 = start + column * WIDE<T>;
        count = row < min(rows, s.pixels) && c0 < s.c ? (s.pixels - row - 1) / rows + 1 : 0;
        width = s.c / s.groups;
    }

    // Index of the thread's first pixel among those of all images.
    __device__ __forceinline__ size_t pixel(const Slab& s) const { return size_t(image) * s.pixels + row; }

    // The Philox block of its first quad, and from one of its pixels to the next.
    __device__ __forceinline__ uint32_t block(const Slab& s) const { return row * (s.c / 4) + c0 / 4; }
    __device__ __forceinline__ uint32_t block_step(const Slab& s) const { return rows * (s.c / 4); }

    // The group of quad q, counted from the slab's first.
    __device__ __forceinline__ unsigned group(unsigned q) const { return (column * WIDE<T> + 4 * q) / width; }
};

// What a thread reads of a tensor: from its first pixel, `step` elements to the next; the first `kept` are in shared
// memory, BLOCK apart.
template <class T>
struct Reads {
    const T* at;
    unsigned step;
    uint4* held;
    unsigned kept;

    __device__ __forceinline__ Reads(const Channels<const T>& x, const Place<T>& here, const Slab& s, uint4* held_,
                                     unsigned kept_)
        : at(nullptr), step(0), held(held_ + threadIdx.x), kept(kept_) {
        if (here.count == 0) return;
        at = x.at(here.pixel(s), here.c0);
        step = here.rows * x.width(here.c0);
        for (unsigned k = 0; k < min(here.count, kept); ++k)
            copy_async(shared_address(held + k * BLOCK), at + k * step, true);
    }

    __device__ __forceinline__ uint4 get(unsigned k) const {
        return k < kept ? held[k * BLOCK] : *wide(at + k * step);
    }
};

// Parts in which a column's rows are summed: 32 sums side by side, or one for each column.
__device__ __forceinline__ unsigned parts_of(unsigned columns) { return columns < 32 ? 32 / columns : 1; }

// The second step of a sum over the pixels: of_threads (QUADS, BLOCK, V) to sums (QUADS, parts, columns, V). Neighbours
// read and write neighbours.
template <class T, unsigned V>
__device__ __forceinline__ void sum_rows(float* sums, const float* of_threads, unsigned columns, unsigned rows) {
    constexpr unsigned EACH = BLOCK / QUADS<T>;
    const unsigned q = threadIdx.x / EACH, u = threadIdx.x % EACH;
    const unsigned across = V * columns, some = parts_of(columns) * across;
    if (u >= some) return;
    float sum = 0.0f;
    for (unsigned i = u; i < rows * across; i += some) sum += of_threads[q * BLOCK * V + i];
    sums[q * some + u] = sum;
}

// The third: number i of V of a quad of the slab.
template <class T, unsigned V>
__device__ __forceinline__ double sum_of(const float* sums, unsigned columns, unsigned quad, unsigned i) {
    const unsigned across = V * columns, parts = parts_of(columns);
    const float* at = sums + quad % QUADS<T> * parts * across + quad / QUADS<T> * V + i;
    double sum = 0.0;
    for (unsigned p = 0; p < parts; ++p) sum += double(at[p * across]);
    return sum;
}

// The same for all quads of a group.
template <class T>
__device__ __forceinline__ double sum_of_group(const float* sums, unsigned columns, unsigned group, unsigned width) {
    double sum = 0.0;
    for (unsigned quad = group * width / 4; quad < (group + 1) * width / 4; ++quad)
        sum += sum_of<T, 1>(sums, columns, quad, 0);
    return sum;
}

// gamma and beta of four channels of an image, from i on, with its scales and shifts if there are such.
template <class T>
__device__ __forceinline__ void coefficients(float4& g, float4& b, const float* gamma, const float* beta,
                                             const T* scale_shift, unsigned image, unsigned i, unsigned c) {
    g = load4(gamma + i), b = load4(beta + i);
    if (scale_shift == nullptr) return;
    const T* own = scale_shift + size_t(image) * 2 * c + i;
    float4 scale = load4(own), shift = load4(own + c);
#pragma unroll
    for (unsigned e = 0; e < 4; ++e) {
        const float by = 1.0f + get(scale, e);
        get(g, e) *= by;
        get(b, e) = fmaf(get(b, e), by, get(shift, e));
    }
}

template <class T>
__device__ __forceinline__ void fwd_slab(T* y, float* stats,                     // (n, pixels, c), (n, groups, 3)
                                         const Channels<const T>& x,             // (n, pixels, c)
                                         const float* gamma, const float* beta,  // (c)
                                         const T* scale_shift,                   // (n, 2c) or null
                                         const Slab& s, float eps, Masks masks) {
    constexpr unsigned Q = QUADS<T>;
    // (kept, BLOCK): each thread writes and reads its own.
    extern __shared__ uint4 held[];
    // 2 or 4 KiB, (sum, QUADS, BLOCK): each thread's sums, written before and read by sum_rows between barriers.
    __shared__ float of_threads[2][Q * BLOCK];
    // 512 bytes, (sum, QUADS, parts, columns): written by sum_rows, read by a thread for each group after a barrier.
    __shared__ float sums[2][SLAB_GROUPS];
    // 768 bytes: mean, its rounding error and rstd, written by that thread, read by all after a barrier; a mean in f32
    // before.
    __shared__ float of_group[3][SLAB_GROUPS];
    const Place<T> here(s);
    const unsigned t = threadIdx.x;
    const double total = double(here.width) * double(s.pixels);
    const Reads<T> from(x, here, s, held, s.kept);
    commit_group();
    wait_group<0>();

    float4 sum[Q] = {};  // (Q quads)
    for (unsigned k = 0; k < here.count; ++k) {
        const uint4 v = from.get(k);
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) sum[q] = sum[q] + quad<T>(v, q);
    }
#pragma unroll
    for (unsigned q = 0; q < Q; ++q) of_threads[0][q * BLOCK + t] = (sum[q].x + sum[q].y) + (sum[q].z + sum[q].w);
    __syncthreads();  // the threads' sums written above are read below
    sum_rows<T, 1>(sums[0], of_threads[0], s.columns, here.rows);
    __syncthreads();  // the sums written above are read below
    const bool has_group = t < here.channels / here.width;
    if (has_group) of_group[0][t] = float(sum_of_group<T>(sums[0], s.columns, t, here.width) / total);
    __syncthreads();  // the groups' means in f32 are read below

    float m[Q];  // (Q quads)
    float4 sum_d[Q] = {}, sum_d2[Q] = {};  // (Q quads)
#pragma unroll
    for (unsigned q = 0; q < Q; ++q) m[q] = here.count ? of_group[0][here.group(q)] : 0.0f;
    for (unsigned k = 0; k < here.count; ++k) {
        const uint4 v = from.get(k);
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) {
            float4 d = quad<T>(v, q);
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                get(d, i) -= m[q];
                get(sum_d[q], i) += get(d, i);
                get(sum_d2[q], i) = fmaf(get(d, i), get(d, i), get(sum_d2[q], i));
            }
        }
    }
#pragma unroll
    for (unsigned q = 0; q < Q; ++q) {
        of_threads[0][q * BLOCK + t] = (sum_d[q].x + sum_d[q].y) + (sum_d[q].z + sum_d[q].w);
        of_threads[1][q * BLOCK + t] = (sum_d2[q].x + sum_d2[q].y) + (sum_d2[q].z + sum_d2[q].w);
    }
    __syncthreads();  // the threads' sums written above are read below
    sum_rows<T, 1>(sums[0], of_threads[0], s.columns, here.rows);
    sum_rows<T, 1>(sums[1], of_threads[1], s.columns, here.rows);
    __syncthreads();  // the sums written above are read below; all have read the means in f32
    if (has_group) {
        const double moved = sum_of_group<T>(sums[0], s.columns, t, here.width) / total;
        const double squares = sum_of_group<T>(sums[1], s.columns, t, here.width) / total;
        // About the mean, not m. Rounding may leave less than nothing of a variance of zero.
        const double mean = double(of_group[0][t]) + moved, var = fmax(squares - moved * moved, 0.0);
        of_group[0][t] = float(mean);
        of_group[1][t] = float(mean - double(float(mean)));
        of_group[2][t] = float(1.0 / sqrt(var + double(eps)));
        float* out = stats + 3 * (size_t(here.image) * s.groups + here.start / here.width + t);
#pragma unroll
        for (unsigned i = 0; i < 3; ++i) out[i] = of_group[i][t];
    }
    __syncthreads();  // mean, error and rstd written above are read below
    if (here.count == 0) return;

    float4 a[Q], b[Q];  // (Q quads): z = (x - m) a + b
#pragma unroll
    for (unsigned q = 0; q < Q; ++q) {
        const unsigned group = here.group(q);
        coefficients(a[q], b[q], gamma, beta, scale_shift, here.image, here.c0 + 4 * q, s.c);
        m[q] = of_group[0][group];
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) {
            get(a[q], i) *= of_group[2][group];
            // The rounding error of the mean goes into the shift.
            get(b[q], i) -= of_group[1][group] * get(a[q], i);
        }
    }
    T* to = y + here.pixel(s) * s.c + here.c0;
    uint32_t block = here.block(s);
    for (unsigned k = 0; k < here.count; ++k, to += size_t(here.rows) * s.c, block += here.block_step(s)) {
        const uint4 v = from.get(k);
        uint4 rounded = {};
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) {
            float4 z = quad<T>(v, q);
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                get(z, i) = fmaf(get(z, i) - m[q], get(a[q], i), get(b[q], i));
                if (s.silu) get(z, i) = silu(get(z, i));
                get(z, i) *= masks.scale;
            }
            if (masks.threshold) drop(z, philox(masks.stream, block + q), masks.threshold);
            set_quad(to, rounded, q, z);
        }
        *wide(to) = rounded;
    }
}

// Where the gradients go that a backward pass gives besides dx; each null if it is not wanted.
template <class T>
struct Gives {
    // (n, c_first), (n, c - c_first): sums over the pixels of dx as it was rounded, in f32 and rounded.
    Channels<float> pixel_sums;
    Channels<T> rounded_sums;
    float* shares;                          // (n, 2, c): each image's part of dgamma and dbeta
    T* dscale_shift;                        // (n, 2c)
};

// dx may be dy, if it is one tensor. plus: gradients of x that are added, each null if there is none.
template <class T>
__device__ __forceinline__ void bwd_slab(const Channels<T>& dx, const Gives<T>& gives,
                                         const T* dy,                             // (n, pixels, c)
                                         const Channels<const T> (&plus)[2],      // (n, pixels, c)
                                         const Channels<const T>& x,              // (n, pixels, c)
                                         const float* stats,                      // (n, groups, 3)
                                         const float* gamma, const float* beta,   // (c)
                                         const T* scale_shift,                    // (n, 2c) or null
                                         const Slab& s, Masks masks) {
    constexpr unsigned Q = QUADS<T>;
    // (tensor, kept, BLOCK): each thread writes and reads its own.
    extern __shared__ uint4 held[];
    // 8 or 4 KiB, (QUADS, BLOCK, 4 channels): each thread's sums, written before and read by sum_rows between barriers;
    // then two f64 for each channel, and in the end for each thread.
    __shared__ alignas(16) float of_threads[4 * Q * BLOCK];
    // 2 KiB, (sum, QUADS, parts, columns, 4): written by sum_rows, read by a thread for each channel after a barrier.
    __shared__ float sums[2][BLOCK];
    // 1 KiB: mean, rstd and what dx subtracts, written by a thread for each group, read by all after a barrier.
    __shared__ float4 of_groups[SLAB_GROUPS];
    static_assert(sizeof(double) * 2 * BLOCK <= sizeof(of_threads), "two f64 for each thread");
    double* wide_sums = reinterpret_cast<double*>(of_threads);
    const Place<T> here(s);
    const unsigned t = threadIdx.x;
    const Channels<const T> of_y = {dy, nullptr, s.c, s.c};
    const Reads<T> from(x, here, s, held, s.kept);
    const Reads<T> from_y(of_y, here, s, held + s.kept * BLOCK, s.kept);
    commit_group();

    const float* of_slab = stats + 3 * (size_t(here.image) * s.groups + here.start / here.width);  // (groups, 3)
    // z = (x - m) g rstd + b for quad q. Found before each of the two passes, so that no register holds it in between.
    const auto affine = [&](float4& g, float4& b, unsigned q) {
        const float* of_group = of_slab + 3 * here.group(q);
        coefficients(g, b, gamma, beta, scale_shift, here.image, here.c0 + 4 * q, s.c);
#pragma unroll
        for (unsigned i = 0; i < 4; ++i) get(b, i) -= of_group[1] * (of_group[2] * get(g, i));
    };
    // dz by z, of what dropout keeps of dy.
    const auto dz_of = [&](float dy, float z) { return dy * masks.scale * (s.silu ? silu_slope(z) : 1.0f); };
    wait_group<0>();

    if (masks.threshold) {
        uint32_t block = here.block(s);
#pragma unroll 1
        for (unsigned k = 0; k < here.count; ++k, block += here.block_step(s)) {
            uint4 w = from_y.get(k);
#pragma unroll
            for (unsigned q = 0; q < Q; ++q) {
                float4 kept = quad<T>(w, q);
                drop(kept, philox(masks.stream, block + q), masks.threshold);
                set_quad(dx.first, w, q, kept);
            }
            from_y.held[k * BLOCK] = w;
        }
    }
    float m[Q];                          // (Q quads)
    float4 a[Q], b[Q];                   // (Q quads)
    float4 by_d[Q] = {}, plain[Q] = {};  // (Q quads): sums of dz (x - m), and of dz
    if (here.count) {
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) {
            const float* of_group = of_slab + 3 * here.group(q);
            affine(a[q], b[q], q);
            m[q] = of_group[0];
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) get(a[q], i) *= of_group[2];
        }
    }
#pragma unroll 1
    for (unsigned k = 0; k < here.count; ++k) {
        const uint4 v = from.get(k), w = from_y.get(k);
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) {
            float4 x_q = quad<T>(v, q), dy_q = quad<T>(w, q);
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const float d = get(x_q, i) - m[q];
                const float dz = dz_of(get(dy_q, i), fmaf(d, get(a[q], i), get(b[q], i)));
                get(by_d[q], i) = fmaf(dz, d, get(by_d[q], i));
                get(plain[q], i) += dz;
            }
        }
    }
    float4* quads = reinterpret_cast<float4*>(of_threads);
#pragma unroll
    for (unsigned q = 0; q < Q; ++q) quads[q * BLOCK + t] = by_d[q];
    __syncthreads();  // the threads' sums written above are read below
    sum_rows<T, 4>(sums[0], of_threads, s.columns, here.rows);
    __syncthreads();  // all have read them before they are overwritten
#pragma unroll
    for (unsigned q = 0; q < Q; ++q) quads[q * BLOCK + t] = plain[q];
    __syncthreads();  // the threads' sums written above are read below
    sum_rows<T, 4>(sums[1], of_threads, s.columns, here.rows);
    __syncthreads();  // the sums of both are read below, of_threads may be overwritten

    if (t < here.channels) {
        const float* of_group = of_slab + 3 * (t / here.width);
        const unsigned channel = here.start + t;
        const double sum_dz = sum_of<T, 4>(sums[1], s.columns, t / 4, t % 4);
        // Corrected for the rounding error of the mean.
        const double sum_dz_d = sum_of<T, 4>(sums[0], s.columns, t / 4, t % 4) - double(of_group[1]) * sum_dz;
        const double sum_dz_xhat = sum_dz_d * double(of_group[2]);
        float by = 1.0f;
        if (scale_shift != nullptr) by += load(scale_shift + size_t(here.image) * 2 * s.c + channel);
        const double weight = double(gamma[channel] * by);
        wide_sums[t] = weight * sum_dz, wide_sums[SLAB_CHANNELS + t] = weight * sum_dz_xhat;
        const size_t row = size_t(here.image) * 2 * s.c + channel;
        if (gives.dscale_shift != nullptr) {
            const float dscale = fmaf(gamma[channel], float(sum_dz_xhat), beta[channel] * float(sum_dz));
            store(gives.dscale_shift + row, dscale);
            store(gives.dscale_shift + row + s.c, float(sum_dz));
        }
        if (gives.shares != nullptr) {
            gives.shares[row] = by * float(sum_dz_xhat);
            gives.shares[row + s.c] = by * float(sum_dz);
        }
    }
    __syncthreads();  // what the channels weigh is read below
    if (t < here.channels / here.width) {
        double s1 = 0.0, s2 = 0.0;
        for (unsigned i = t * here.width; i < (t + 1) * here.width; ++i)
            s1 += wide_sums[i], s2 += wide_sums[SLAB_CHANNELS + i];
        const double total = double(here.width) * double(s.pixels);
        // s1 + xhat s2 = slope + (x - m) s2 rstd
        s2 = s2 / total * double(of_slab[3 * t + 2]);
        const float *of_group = of_slab + 3 * t, slope = float(s1 / total - double(of_group[1]) * s2);
        of_groups[t] = make_float4(of_group[0], of_group[2], slope, float(s2));
    }
    __syncthreads();  // what is of the groups is read below

    const size_t first = here.pixel(s);
    const unsigned step = here.rows * dx.width(here.c0);
    T* to = here.count ? dx.at(first, here.c0) : nullptr;
    const T* plus_0 = plus[0].has(here.c0) ? plus[0].at(first, here.c0) : nullptr;
    const T* plus_1 = plus[1].has(here.c0) ? plus[1].at(first, here.c0) : nullptr;
    float4 g[Q];  // (Q quads)
    if (here.count)
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) affine(g[q], b[q], q);
#pragma unroll 1
    for (unsigned k = 0; k < here.count; ++k) {
        const uint4 v = from.get(k), w = from_y.get(k);
        float4 own[Q];  // (Q quads)
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) {
            // Read again for every pixel: held in registers they would be spilled.
            const float4 of_group = load_shared(shared_address(of_groups + here.group(q)));
            const float rstd = of_group.y, slope = of_group.z, s2 = of_group.w;
            float4 x_q = quad<T>(v, q), dy_q = quad<T>(w, q);
#pragma unroll
            for (unsigned i = 0; i < 4; ++i) {
                const float d = get(x_q, i) - of_group.x;
                const float dz = dz_of(get(dy_q, i), fmaf(d, rstd * get(g[q], i), get(b[q], i)));
                // Rounded before the difference, as s1 was, so that dx is zero if a group has one element.
                const float gamma_dz = __fmul_rn(dz, get(g[q], i));
                get(own[q], i) = (gamma_dz - fmaf(d, s2, slope)) * rstd;
            }
        }
        if (plus_0 != nullptr) {
            const uint4 others_0 = *wide(plus_0 + k * step);
            const uint4 others_1 = plus_1 != nullptr ? *wide(plus_1 + k * step) : uint4{};
#pragma unroll
            for (unsigned q = 0; q < Q; ++q) own[q] = (quad<T>(others_0, q) + quad<T>(others_1, q)) + own[q];
        }
        uint4 rounded = {};
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) set_quad(to, rounded, q, own[q]);
        *wide(to + k * step) = rounded;
        if (k < s.kept) from.held[k * BLOCK] = rounded;
    }
    if (gives.pixel_sums.first != nullptr || gives.pixel_sums.second != nullptr) {
        float4 sum[Q] = {};  // (Q quads)
        for (unsigned k = 0; k < here.count; ++k) {
            const uint4 v = k < s.kept ? from.held[k * BLOCK] : *wide(to + k * step);
#pragma unroll
            for (unsigned q = 0; q < Q; ++q) sum[q] = sum[q] + quad<T>(v, q);
        }
#pragma unroll
        for (unsigned q = 0; q < Q; ++q) quads[q * BLOCK + t] = sum[q];
        __syncthreads();  // the threads' sums written above are read below
        sum_rows<T, 4>(sums[0], of_threads, s.columns, here.rows);
        __syncthreads();  // the sums written above are read below
        if (t < here.channels && gives.pixel_sums.has(here.start + t)) {
            const float total = float(sum_of<T, 4>(sums[0], s.columns, t / 4, t % 4));
            *gives.pixel_sums.at(here.image, here.start + t) = total;
            store(gives.rounded_sums.at(here.image, here.start + t), total);
        }
    }
}
