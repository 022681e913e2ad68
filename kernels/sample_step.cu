// sample_step: x_T, and one step x_t -> x_{t-1} of the reverse process, ancestral or DDIM, in one kernel.
//
// computes   start: x[i, k] = z_k of image i's stream
//            step:  x_0 = clip(x0_xt x + x0_output y);  next = c_x0 x_0 + c_xt x + sigma z, z drawn unless sigma is 0
//            both write the new x as f32 and, unless `input` is null, rounded to T for the network
// layout     x, next (n, h, w, c) f32; y (the network's output) and input have the same shape, in T
// mapping    thread = 4 neighbours of one image = one Philox block; grid (ceil(image/1024), images up to 65535, looped)
// shared     none
// bound by   memory without noise (12 bytes per element in f32); Philox and Box-Muller with it
// host       image < 2^34; bound is infinite if x_0 is not clipped
// numerics   f32 in the CPU's order of operations: the CPU's bits for equal y, if the CPU has FMA; NaN stays NaN
#include "dtype.cuh"
#include "philox.cuh"

// Stores elements i .. i + count of the new x.
template <class T>
__device__ __forceinline__ void put(float* x, T* input, size_t i, float4 v, unsigned count, bool vector) {
    store_group(x, i, v, count, vector);
    if (input != nullptr) store_group(input, i, v, count, vector);
}

template <class T>
__device__ __forceinline__ void start(float* x, T* input, size_t n, size_t image, const Stream& streams) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        const float4 z = normals(of_image(streams, uint32_t(i)), uint32_t(block));
        put(x, input, i * image + 4 * block, z, count, image % 4 == 0);
    }
}

// Host twin: the factors of one step, as src/diffusion/sampler.rs derives them.
struct Factors {
    float x0_xt, x0_output;  // x_0 = x0_xt x_t + x0_output y
    float c_x0, c_xt;        // of x_0 and x_t in the next x
    float sigma;             // of the noise
    float bound;             // on |x_0|; infinite if it is not clipped
};

// The next x of one element.
__device__ __forceinline__ float next_x(const Factors& f, float x_t, float y, float z) {
    float x_0 = fmaf(f.x0_xt, x_t, __fmul_rn(f.x0_output, y));
    // Comparisons, because fminf and fmaxf would drop a NaN.
    x_0 = x_0 < -f.bound ? -f.bound : x_0;
    x_0 = x_0 > f.bound ? f.bound : x_0;
    return fmaf(f.sigma, z, fmaf(f.c_x0, x_0, __fmul_rn(f.c_xt, x_t)));
}

template <class T>
__device__ __forceinline__ void step(float* next, T* input, const float* x, const T* y, size_t n, size_t image,
                                     const Factors& f, const Stream& streams) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const bool vector = image % 4 == 0;
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        float4 z = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (f.sigma != 0.0f) z = normals(of_image(streams, uint32_t(i)), uint32_t(block));
        const size_t offset = i * image + 4 * block;
        const float4 x_t = load_group(x, offset, count, vector), out = load_group(y, offset, count, vector);
        const float4 v = make_float4(next_x(f, x_t.x, out.x, z.x), next_x(f, x_t.y, out.y, z.y),
                                     next_x(f, x_t.z, out.z, z.z), next_x(f, x_t.w, out.w, z.w));
        put(next, input, offset, v, count, vector);
    }
}

// sample_step_start_f32, sample_step_step_f32, and the same in bf16
#define ENTRIES(suffix, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_start_##suffix( \
        float* x, T* input, size_t n, size_t image, Stream streams) { \
        start(x, input, n, image, streams); \
    } \
    extern "C" __global__ void __launch_bounds__(THREADS) sample_step_step_##suffix( \
        float* next, T* input, const float* x, const T* y, size_t n, size_t image, Factors f, Stream streams) { \
        step(next, input, x, y, n, image, f, streams); \
    }
F32_AND_BF16(ENTRIES)
#undef ENTRIES
