// sample_step: x_T, and one step x_t -> x_{t-1} of the reverse process, ancestral or DDIM, in one kernel.
//
// computes   start: x[i, k] = z_k of image i's stream
//            step:  x_0 = clip(x0_xt x + x0_output y);  next = c_x0 x_0 + c_xt x + sigma z, z not drawn where sigma is 0
//            both write the new x as f32 and, unless `input` is null, rounded to T for the network
// layout     x, next (n, h, w, c) f32; y (the network's output) and input the same in T
// mapping    thread = 4 neighbours of one image = one Philox block; grid (ceil(image/1024), images up to 65535, looped)
// shared     none
// bound by   memory without noise (12 bytes an element); Philox and Box-Muller with it
// host       image < 2^34; bound is infinite where x_0 is not clipped
// numerics   f32 in the CPU's order of operations, so the bits are the CPU's for equal y; a NaN stays one
#include "dtype.cuh"
#include "philox.cuh"

// Elements at .. at + count of the new x.
template <class T>
__device__ __forceinline__ void put(float* x, T* input, size_t at, float4 v, unsigned count, bool vector) {
    store_group(x, at, v, count, vector);
    if (input != nullptr) store_group(input, at, v, count, vector);
}

template <class T>
__device__ __forceinline__ void start(float* x, T* input, size_t n, size_t image, Stream s) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const uint32_t first = s.stream;
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        s.stream = first + uint32_t(i);
        put(x, input, i * image + 4 * block, normals(s, uint32_t(block)), count, image % 4 == 0);
    }
}

struct Step {
    float x0_xt, x0_output, c_x0, c_xt, sigma, bound;

    __device__ __forceinline__ float next(float x_t, float y, float z) const {
        float x_0 = fmaf(x0_xt, x_t, __fmul_rn(x0_output, y));
        // Comparisons instead of fminf and fmaxf, which would drop a NaN.
        x_0 = x_0 < -bound ? -bound : x_0;
        x_0 = x_0 > bound ? bound : x_0;
        return fmaf(sigma, z, fmaf(c_x0, x_0, __fmul_rn(c_xt, x_t)));
    }
};

template <class T>
__device__ __forceinline__ void step(float* next, T* input, const float* x, const T* y, size_t n, size_t image, Step f, Stream s) {
    const size_t block = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (4 * block >= image) return;
    const unsigned count = unsigned(min(size_t(4), image - 4 * block));
    const bool vector = image % 4 == 0;
    const uint32_t first = s.stream;
    for (size_t i = blockIdx.y; i < n; i += gridDim.y) {
        float4 z = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (f.sigma != 0.0f) {
            s.stream = first + uint32_t(i);
            z = normals(s, uint32_t(block));
        }
        const size_t at = i * image + 4 * block;
        const float4 x_t = load_group(x, at, count, vector), out = load_group(y, at, count, vector);
        const float4 v = make_float4(f.next(x_t.x, out.x, z.x), f.next(x_t.y, out.y, z.y), f.next(x_t.z, out.z, z.z),
                                     f.next(x_t.w, out.w, z.w));
        put(next, input, at, v, count, vector);
    }
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) sample_step_start_##suffix(                                     \
        float* x, T* input, size_t n, size_t image, unsigned seed_lo, unsigned seed_hi, unsigned step, unsigned purpose, \
        unsigned stream) {                                                                                           \
        start(x, input, n, image, Stream{seed_lo, seed_hi, step, purpose, stream});                                  \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) sample_step_step_##suffix(                                      \
        float* next, T* input, const float* x, const T* y, size_t n, size_t image, float x0_xt, float x0_output,      \
        float c_x0, float c_xt, float sigma, float bound, unsigned seed_lo, unsigned seed_hi, unsigned t,             \
        unsigned purpose, unsigned stream) {                                                                         \
        step(next, input, x, y, n, image, Step{x0_xt, x0_output, c_x0, c_xt, sigma, bound},                          \
             Stream{seed_lo, seed_hi, t, purpose, stream});                                                          \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
