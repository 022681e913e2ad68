// sample_step: x_T, and one step x_t -> x_{t-1} of a reverse process in one kernel: ancestral, DDIM, DPM-Solver++ or
// Heun's, with guidance, a learned variance and a classifier's gradient.
//
// computes   start:     x[i, k] = z_k of image i's stream
//            step:      y = y_2 + weight (y_1 - y_2) of two halves, times scale[i];
//                       x_0 = clip(limit(x0_xt x + x0_output y) + shift_x0 g);
//                       next = c_x0 x_0 + c_xt x + c_before before + shift_mean variance g + sigma z.
//                       limit clips to +-bound, or to +-s and divides by s = limits[i]; clip is to +-shifted_bound. A
//                       learned variance is exp(log_offset + log_factor v), or v if it is RAW, and sigma its
//                       root where f.sigma is not 0. z is drawn unless sigma is 0
//            correct:   eps = eps_xt x + eps_output y + shift g;  next = x + factors[i, 0] eps + factors[i, 1] z
//            diffuse:   next = signal from + noise z where mask is 0 or there is no mask, otherwise x
//            these four write the new x as f32 and, unless `input` is null, `copies` times in T for the network
//            rescale:   scale[i] = phi dev(y_1) / dev(y) + 1 - phi, deviations over image i
//            threshold: limits[i] = the quantile of image i's |x_0|, between ranks `rank` and rank + 1, at least 1 and
//                       at most `largest`
//            norms:     factors[i] = (-e / noise, sqrt(2 e)), e = two_alpha (snr noise |z| / |eps|)^2
// layout     x, next, x_0, before, gradient, from, mask (n, h, w, c) f32; y (the network's output) (halves n, h, w, c)
//            in T, or 2c channels with v, the variance, in the second c; input (copies n, h, w, c) in T; per image f32
// mapping    start to diffuse: thread = 4 neighbours of one image = one Philox block; grid (ceil(image/1024), images up
//            to 65535, looped). The rest: a block an image, 4 neighbours a thread at a time
// shared     rescale, norms: 64 B, the warps' sums; threshold: 1036 B, a histogram of one byte of the bits of |x_0|
// bound by   memory without noise (12 bytes per element in f32 for ddim); Philox and Box-Muller with it. The statistics
//            read an image from the cache that it was just written to, threshold four times
// host       image < 2^32; n < 2^31; bound is infinite if x_0 is not clipped; `row` is 1, or so many images draw from
//            the stream of the first of them; the turn is the step's or null. One 32-bit division for 4 elements if the
//            channels are doubled
// numerics   f32 in the CPU's order of operations: the CPU's bits for equal y, if the CPU has FMA, but for a learned
//            variance (expf, 2 ulp) and sums (f64, in another order); NaN stays NaN
#include "dtype.cuh"
#include "philox.cuh"
#include "reduce.cuh"

// Host twin: how the network's output is read.
struct Reading {
    float weight;      // of y_1, with the class, against y_2, without
    unsigned halves;   // 2: images n .. 2n are y_2; 1: there is no y_2
    unsigned doubled;  // c, if each pixel has as many channels more for the variance; otherwise 0
};

// Host twin: the factors of one step, as src/diffusion/sampler.rs derives them.
struct Factors {
    float x0_xt, x0_output;          // x_0 = x0_xt x_t + x0_output y
    float c_x0, c_xt, c_before;      // of x_0, x_t and before in the next x
    float sigma;                     // of the noise; with a learned variance 1 or 0
    float bound;                     // on |x_0|; infinite if it is not clipped
    float log_offset, log_factor;    // of the learned log variance
    float variance;                  // if it is not learned
    float shift_x0, shift_mean;      // of the gradient, scaled
    float shifted_bound;             // on |x_0| after its shift; infinite if that is not clipped
};

// Host twin: what changes from one step of a reverse process to the next, in device memory, written at a step's start
// in stream order. So the launches of a step are captured once in a CUDA graph and replayed at every other timestep.
// Kernels take `const Turn* turn` as their last parameter; with a null pointer the arguments themselves count.
struct Turn {
    uint32_t step;    // the `step` of the noise's streams
    float time;       // the timestep that the network is given (time_embedding.cu)
    Factors factors;
};

__device__ __forceinline__ Factors of_turn(const Factors& f, const Turn* turn) {
    return turn != nullptr ? turn->factors : f;
}

__device__ __forceinline__ Stream of_turn(Stream s, const Turn* turn) {
    if (turn != nullptr) s.step = turn->step;
    return s;
}

// Host twin: the second half of the output is the logarithm of the variance, but for log_offset and log_factor.
constexpr unsigned LOGARITHM = 1;

// Host twin: it is the variance itself.
constexpr unsigned RAW = 2;

// Stores elements i .. i + count of the new x.
template <class T>
__device__ __forceinline__ void put(float* x, T* input, size_t i, float4 v, unsigned count, bool vector, size_t len,
                                    unsigned copies) {
    store_group(x, i, v, count, vector);
    if (input == nullptr) return;
    for (unsigned k = 0; k < copies; ++k) store_group(input, k * len + i, v, count, vector);
}

// The stream of image i, or of the first image of its row.
__device__ __forceinline__ Stream of_row(Stream s, uint32_t i, uint32_t row) {
    s.stream += i;
    if (row > 1) s.stream -= s.stream % row;
    return s;
}

// Four neighbours of the network's output: v is zero unless the variance is learned.
struct Read {
    float y[4], v[4];
};

// Elements k .. k + count of image i, of n.
template <class T>
__device__ __forceinline__ Read read(const T* y, size_t i, unsigned k, unsigned count, size_t n, unsigned image,
                                     const Reading& r, float scale) {
    Read out;
    float other[4];
    if (r.doubled == 0) {
        const bool vector = image % 4 == 0;
        const float4 a = load_group(y, i * image + k, count, vector);
        out.y[0] = a.x, out.y[1] = a.y, out.y[2] = a.z, out.y[3] = a.w;
        out.v[0] = out.v[1] = out.v[2] = out.v[3] = 0.0f;
        if (r.halves == 2) {
            const float4 b = load_group(y, (n + i) * image + k, count, vector);
            other[0] = b.x, other[1] = b.y, other[2] = b.z, other[3] = b.w;
        }
    } else {
        unsigned channel = k % r.doubled;
        size_t at = 2 * i * image + 2 * size_t(k - channel) + channel;
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            out.y[j] = out.v[j] = other[j] = 0.0f;
            if (j < count) {
                out.y[j] = load(y + at), out.v[j] = load(y + at + r.doubled);
                if (r.halves == 2) other[j] = load(y + 2 * n * image + at);
            }
            ++at;
            if (++channel == r.doubled) channel = 0, at += r.doubled;
        }
    }
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
        if (r.halves == 2) out.y[j] = fmaf(r.weight, __fsub_rn(out.y[j], other[j]), other[j]);
        out.y[j] = __fmul_rn(out.y[j], scale);
    }
    return out;
}

template <class T>
__device__ __forceinline__ void start(float* x, T* input, size_t n, size_t image, unsigned copies,
                                      const Stream& streams, unsigned row) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        const float4 z = normals(of_row(streams, uint32_t(i), row), uint32_t(block));
        put(x, input, i * image + 4 * block, z, count, image % 4 == 0, n * image, copies);
    }
}

// x_0 of one element before it is limited.
__device__ __forceinline__ float predicted(float x0_xt, float x0_output, float x_t, float y) {
    return fmaf(x0_xt, x_t, __fmul_rn(x0_output, y));
}

// x_0 within +-bound. Comparisons, because fminf and fmaxf would drop a NaN.
__device__ __forceinline__ float clip(float x_0, float bound) {
    x_0 = x_0 < -bound ? -bound : x_0;
    return x_0 > bound ? bound : x_0;
}

template <class T>
__device__ __forceinline__ void step(float* next, T* input, float* x_0, const float* x, const T* y, const float* before,
                                     const float* gradient, const float* scale, const float* limits, size_t n,
                                     size_t image, unsigned copies, unsigned learned, const Reading& r,
                                     const Factors& by_value, const Stream& given, unsigned row, const Turn* turn) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const Factors f = of_turn(by_value, turn);
    const Stream streams = of_turn(given, turn);
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const bool vector = image % 4 == 0;
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        float4 noise = make_float4(0.0f, 0.0f, 0.0f, 0.0f), past = noise, slope = noise;
        if (f.sigma != 0.0f) noise = normals(of_row(streams, uint32_t(i), row), uint32_t(block));
        const size_t offset = i * image + 4 * block;
        const float4 x_t = load_group(x, offset, count, vector);
        if (before != nullptr) past = load_group(before, offset, count, vector);
        if (gradient != nullptr) slope = load_group(gradient, offset, count, vector);
        const Read out = read(y, i, unsigned(4 * block), count, n, unsigned(image), r,
                              scale == nullptr ? 1.0f : scale[i]);
        const float bound = limits == nullptr ? f.bound : limits[i];
        const float xs[4] = {x_t.x, x_t.y, x_t.z, x_t.w}, zs[4] = {noise.x, noise.y, noise.z, noise.w};
        const float bs[4] = {past.x, past.y, past.z, past.w}, gs[4] = {slope.x, slope.y, slope.z, slope.w};
        float images[4], v[4];
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            float image_j = clip(predicted(f.x0_xt, f.x0_output, xs[j], out.y[j]), bound);
            if (limits != nullptr) image_j = __fdiv_rn(image_j, bound);
            float sigma = f.sigma, variance = f.variance;
            if (learned == RAW) {
                variance = out.v[j];
                // Without noise its root is not asked for.
                if (sigma != 0.0f) sigma = __fmul_rn(sigma, __fsqrt_rn(variance));
            } else if (learned == LOGARITHM) {
                const float log_variance = fmaf(f.log_factor, out.v[j], f.log_offset);
                sigma = __fmul_rn(sigma, expf(__fmul_rn(0.5f, log_variance)));
                variance = expf(log_variance);
            }
            if (gradient != nullptr) {
                image_j = clip(fmaf(f.shift_x0, gs[j], image_j), f.shifted_bound);
            }
            float mean = fmaf(f.c_x0, image_j, __fmul_rn(f.c_xt, xs[j]));
            if (before != nullptr) mean = fmaf(f.c_before, bs[j], mean);
            if (gradient != nullptr) mean = fmaf(__fmul_rn(f.shift_mean, variance), gs[j], mean);
            images[j] = image_j;
            v[j] = fmaf(sigma, zs[j], mean);
        }
        put(next, input, offset, make_float4(v[0], v[1], v[2], v[3]), count, vector, n * image, copies);
        if (x_0 != nullptr) {
            store_group(x_0, offset, make_float4(images[0], images[1], images[2], images[3]), count, vector);
        }
    }
}

template <class T>
__device__ __forceinline__ void correct(float* next, T* input, const float* x, const T* y, const float* scale,
                                        const float* factors, size_t n, size_t image, unsigned copies, float eps_xt,
                                        float eps_output, const Reading& r, const Stream& streams, unsigned row,
                                        const float* gradient, float shift) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const bool vector = image % 4 == 0;
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        const size_t offset = i * image + 4 * block;
        const float4 x_t = load_group(x, offset, count, vector);
        const float4 z = normals(of_row(streams, uint32_t(i), row), uint32_t(block));
        const Read out = read(y, i, unsigned(4 * block), count, n, unsigned(image), r,
                              scale == nullptr ? 1.0f : scale[i]);
        float4 g = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (gradient != nullptr) g = load_group(gradient, offset, count, vector);
        const float drift = factors[2 * i], noise = factors[2 * i + 1];
        const float xs[4] = {x_t.x, x_t.y, x_t.z, x_t.w}, zs[4] = {z.x, z.y, z.z, z.w};
        const float gs[4] = {g.x, g.y, g.z, g.w};
        float v[4];
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            const float eps = fmaf(shift, gs[j], predicted(eps_xt, eps_output, xs[j], out.y[j]));
            v[j] = fmaf(noise, zs[j], fmaf(drift, eps, xs[j]));
        }
        put(next, input, offset, make_float4(v[0], v[1], v[2], v[3]), count, vector, n * image, copies);
    }
}

template <class T>
__device__ __forceinline__ void diffuse(float* next, T* input, const float* x, const float* from, const float* mask,
                                        size_t n, size_t image, unsigned copies, float signal, float noise,
                                        const Stream& streams, unsigned row) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const bool vector = image % 4 == 0;
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        const size_t offset = i * image + 4 * block;
        float4 z = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (noise != 0.0f) z = normals(of_row(streams, uint32_t(i), row), uint32_t(block));
        const float4 a = load_group(from, offset, count, vector);
        float4 v = make_float4(fmaf(noise, z.x, __fmul_rn(signal, a.x)), fmaf(noise, z.y, __fmul_rn(signal, a.y)),
                               fmaf(noise, z.z, __fmul_rn(signal, a.z)), fmaf(noise, z.w, __fmul_rn(signal, a.w)));
        if (mask != nullptr) {
            const float4 m = load_group(mask, offset, count, vector), own = load_group(x, offset, count, vector);
            v = make_float4(m.x == 0.0f ? v.x : own.x, m.y == 0.0f ? v.y : own.y, m.z == 0.0f ? v.z : own.z,
                            m.w == 0.0f ? v.w : own.w);
        }
        put(next, input, offset, v, count, vector, n * image, copies);
    }
}

// The deviation of sums over `image` elements, times the root of their number.
__device__ __forceinline__ double deviation(double sum, double squares, unsigned image) {
    return sqrt(fmax(squares - sum * sum / image, 0.0));
}

template <class T>
__device__ __forceinline__ void rescale(float* scale, const T* y, size_t n, unsigned image, double phi,
                                        const Reading& r) {
    __shared__ double scratch[THREADS / 32];
    const size_t i = blockIdx.x;
    const Reading with = {1.0f, 1, r.doubled};
    double sums[4] = {0.0, 0.0, 0.0, 0.0};
    for (unsigned k = 4 * threadIdx.x; k < image; k += 4 * THREADS) {
        const unsigned count = min(4u, image - k);
        const Read both = read(y, i, k, count, n, image, r, 1.0f), one = read(y, i, k, count, n, image, with, 1.0f);
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            if (j >= count) continue;
            sums[0] += both.y[j], sums[1] += double(both.y[j]) * both.y[j];
            sums[2] += one.y[j], sums[3] += double(one.y[j]) * one.y[j];
        }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) sums[q] = block_sum<THREADS>(sums[q], scratch);
    if (threadIdx.x != 0) return;
    const double of_both = deviation(sums[0], sums[1], image), of_one = deviation(sums[2], sums[3], image);
    scale[i] = of_both == 0.0 ? 1.0f : float(phi * (of_one / of_both) + (1.0 - phi));
}

// Selection by radix: four passes over the image, each finds one byte of the bits of the wanted |x_0|, which are
// ordered as the numbers are.
template <class T>
__device__ __forceinline__ void threshold(float* limits, const float* x, const T* y, const float* scale, size_t n,
                                          unsigned image, float x0_xt, float x0_output, unsigned rank, double fraction,
                                          float largest, const Reading& r, const Turn* turn) {
    if (turn != nullptr) x0_xt = turn->factors.x0_xt, x0_output = turn->factors.x0_output;
    __shared__ unsigned counts[256];
    __shared__ unsigned found, left, above;
    const size_t i = blockIdx.x;
    const float scale_i = scale == nullptr ? 1.0f : scale[i];
    const bool vector = image % 4 == 0;
    auto each = [&](auto&& use) {
        for (unsigned k = 4 * threadIdx.x; k < image; k += 4 * THREADS) {
            const unsigned count = min(4u, image - k);
            const Read out = read(y, i, k, count, n, image, r, scale_i);
            const float4 x_t = load_group(x, i * image + k, count, vector);
            const float xs[4] = {x_t.x, x_t.y, x_t.z, x_t.w};
#pragma unroll
            for (unsigned j = 0; j < 4; ++j) {
                if (j < count) use(__float_as_uint(predicted(x0_xt, x0_output, xs[j], out.y[j])) & 0x7fffffffu);
            }
        }
    };
    if (threadIdx.x == 0) found = 0, left = rank, above = 0xffffffffu;
    for (int shift = 24; shift >= 0; shift -= 8) {
        counts[threadIdx.x] = 0;
        __syncthreads();  // the counts are zero, and `found` is written, before they are used
        const unsigned prefix = found;
        each([&](unsigned bits) {
            // The bytes found so far; a shift by 32 is not defined.
            const bool same = shift == 24 || (bits >> (shift + 8)) == (prefix >> (shift + 8));
            if (same) atomicAdd(&counts[(bits >> shift) & 255u], 1u);
        });
        __syncthreads();  // all have counted
        if (threadIdx.x == 0) {
            unsigned byte = 0;
            while (left >= counts[byte]) left -= counts[byte++];
            found |= byte << shift;
            // Kept for the last byte: how many are the wanted number itself.
            above = counts[byte];
        }
        __syncthreads();  // `found` is read, and the counts are cleared, above
    }
    const unsigned lower = found;
    const bool again = left + 1 < above;
    __syncthreads();  // all have read `above` before it becomes the smallest larger number
    if (threadIdx.x == 0) above = again ? lower : 0xffffffffu;
    __syncthreads();  // it is written before it is lowered
    if (!again) {
        each([&](unsigned bits) {
            if (bits > lower) atomicMin(&above, bits);
        });
    }
    __syncthreads();  // all have lowered it
    if (threadIdx.x != 0) return;
    const double low = __uint_as_float(lower), high = above == 0xffffffffu ? low : double(__uint_as_float(above));
    const float s = float(__dadd_rn(low, __dmul_rn(fraction, __dsub_rn(high, low))));
    limits[i] = s > 1.0f ? fminf(s, largest) : 1.0f;
}

template <class T>
__device__ __forceinline__ void norms(float* factors, const float* x, const T* y, const float* scale, size_t n,
                                      unsigned image, float eps_xt, float eps_output, double noise, double two_alpha,
                                      double snr, const Reading& r, const Stream& streams, unsigned row,
                                      const float* gradient, float shift) {
    __shared__ double scratch[THREADS / 32];
    const size_t i = blockIdx.x;
    const float scale_i = scale == nullptr ? 1.0f : scale[i];
    const Stream stream = of_row(streams, uint32_t(i), row);
    double of_eps = 0.0, of_z = 0.0;
    for (unsigned k = 4 * threadIdx.x; k < image; k += 4 * THREADS) {
        const unsigned count = min(4u, image - k);
        const Read out = read(y, i, k, count, n, image, r, scale_i);
        const float4 x_t = load_group(x, i * image + k, count, image % 4 == 0), z = normals(stream, k / 4);
        float4 g = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (gradient != nullptr) g = load_group(gradient, i * image + k, count, image % 4 == 0);
        const float xs[4] = {x_t.x, x_t.y, x_t.z, x_t.w}, zs[4] = {z.x, z.y, z.z, z.w};
        const float gs[4] = {g.x, g.y, g.z, g.w};
#pragma unroll
        for (unsigned j = 0; j < 4; ++j) {
            if (j >= count) continue;
            const double eps = fmaf(shift, gs[j], predicted(eps_xt, eps_output, xs[j], out.y[j]));
            of_eps += eps * eps, of_z += double(zs[j]) * zs[j];
        }
    }
    of_eps = block_sum<THREADS>(of_eps, scratch);
    of_z = block_sum<THREADS>(of_z, scratch);
    if (threadIdx.x != 0) return;
    const double e = of_eps == 0.0 ? 0.0 : two_alpha * snr * snr * noise * noise * (of_z / of_eps);
    factors[2 * i] = float(-e / noise), factors[2 * i + 1] = float(sqrt(2.0 * e));
}

// sample_step_start_f32, and so on, and the same in bf16. Without a bound on the blocks, ptxas squeezes norms into 32
// registers on sm_80 and step into 48 on sm_120, by spilling.
#define ENTRIES(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_start_##suffix( \
        float* x, T* input, size_t n, size_t image, unsigned copies, Stream streams, unsigned row) { \
        start(x, input, n, image, copies, streams, row); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_step_step_##suffix( \
        float* next, T* input, float* x_0, const float* x, const T* y, const float* before, const float* gradient, \
        const float* scale, const float* limits, size_t n, size_t image, unsigned copies, unsigned learned, \
        Reading r, Factors f, Stream streams, unsigned row, const Turn* turn) { \
        step(next, input, x_0, x, y, before, gradient, scale, limits, n, image, copies, learned, r, f, streams, row, \
             turn); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_correct_##suffix( \
        float* next, T* input, const float* x, const T* y, const float* scale, const float* factors, size_t n, \
        size_t image, unsigned copies, float eps_xt, float eps_output, Reading r, Stream streams, unsigned row, \
        const float* gradient, float shift) { \
        correct(next, input, x, y, scale, factors, n, image, copies, eps_xt, eps_output, r, streams, row, gradient, \
                shift); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_diffuse_##suffix( \
        float* next, T* input, const float* x, const float* from, const float* mask, size_t n, size_t image, \
        unsigned copies, float signal, float noise, Stream streams, unsigned row) { \
        diffuse(next, input, x, from, mask, n, image, copies, signal, noise, streams, row); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_rescale_##suffix( \
        float* scale, const T* y, size_t n, unsigned image, double phi, Reading r) { \
        rescale(scale, y, n, image, phi, r); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_threshold_##suffix( \
        float* limits, const float* x, const T* y, const float* scale, size_t n, unsigned image, float x0_xt, \
        float x0_output, unsigned rank, double fraction, float largest, Reading r, const Turn* turn) { \
        threshold(limits, x, y, scale, n, image, x0_xt, x0_output, rank, fraction, largest, r, turn); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) sample_step_norms_##suffix( \
        float* factors, const float* x, const T* y, const float* scale, size_t n, unsigned image, float eps_xt, \
        float eps_output, double noise, double two_alpha, double snr, Reading r, Stream streams, unsigned row, \
        const float* gradient, float shift) { \
        norms(factors, x, y, scale, n, image, eps_xt, eps_output, noise, two_alpha, snr, r, streams, row, gradient, \
              shift); \
    }
F32_AND_BF16(ENTRIES)
#undef ENTRIES
