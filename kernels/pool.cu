// pool: the tokens that an attention pools, and the first of them.
//
// computes   tokens_fwd:           y[i, 0, k] = sum over p of x[i, p, k] / pixels + position[0, k],
//                                  y[i, 1 + p, k] = x[i, p, k] + position[1 + p, k];
//            tokens_bwd_dx:        dx[i, p, k] = dy[i, 1 + p, k] + dy[i, 0, k] / pixels;
//            tokens_bwd_position:  dposition[j, k] = sum over i of dy[i, j, k], or that much more if accumulate;
//            first_fwd:            y[i, k] = x[i, 0, k];
//            first_bwd:            dx[i, j, k] = dy[i, k] if j = 0, else 0
// layout     of tokens: x, dx (n, pixels, c), y, dy (n, pixels + 1, c) of f32 or bf16; position, dposition
//            (pixels + 1, c) f32; of first: x, dx (n, tokens, c), y, dy (n, c)
// mapping    rows.cuh, 256 threads, item = one channel; row = image (tokens_fwd, tokens_bwd_dx, first_fwd), each thread
//            walking along the pixels, token (tokens_bwd_position), walking along the images, or token of an image
//            (first_bwd)
// shared     none
// bound by   latency: the coarsest level of a network has few pixels, some hundred kilobytes in all
// host       pixels, tokens, n < 2^31
// numerics   f32 sums in the order of the pixels or images; each result is rounded once to T
#include "dtype.cuh"
#include "rows.cuh"

template <class T>
__device__ __forceinline__ void tokens_fwd(T* y,                   // (n, pixels + 1, c)
                                           const T* x,             // (n, pixels, c)
                                           const float* position,  // (pixels + 1, c)
                                           unsigned n, unsigned pixels, unsigned c, unsigned lane_bits) {
    const size_t image = row_of_thread(lane_bits);
    if (image >= n) return;
    x += image * pixels * c;
    y += image * (size_t(pixels) + 1) * c;
    each_item(c, lane_bits, [&](unsigned k) {
        float sum = 0.0f;
        for (size_t p = 0; p < pixels; ++p) {
            const float v = load(x + p * c + k);
            sum += v;
            store(y + (1 + p) * c + k, v + position[(1 + p) * c + k]);
        }
        store(y + k, sum / float(pixels) + position[k]);
    });
}

template <class T>
__device__ __forceinline__ void tokens_bwd_dx(T* dx,        // (n, pixels, c)
                                              const T* dy,  // (n, pixels + 1, c)
                                              unsigned n, unsigned pixels, unsigned c, unsigned lane_bits) {
    const size_t image = row_of_thread(lane_bits);
    if (image >= n) return;
    dx += image * pixels * c;
    dy += image * (size_t(pixels) + 1) * c;
    each_item(c, lane_bits, [&](unsigned k) {
        const float of_mean = load(dy + k) / float(pixels);
        for (size_t p = 0; p < pixels; ++p) store(dx + p * c + k, load(dy + (1 + p) * c + k) + of_mean);
    });
}

template <class T>
__device__ __forceinline__ void tokens_bwd_position(float* dposition,  // (tokens, c)
                                                    const T* dy,       // (n, tokens, c)
                                                    unsigned n, unsigned tokens, unsigned c, unsigned accumulate,
                                                    unsigned lane_bits) {
    const size_t token = row_of_thread(lane_bits);
    if (token >= tokens) return;
    each_item(c, lane_bits, [&](unsigned k) {
        float sum = accumulate ? dposition[token * c + k] : 0.0f;
        for (size_t image = 0; image < n; ++image) sum += load(dy + (image * tokens + token) * c + k);
        dposition[token * c + k] = sum;
    });
}

template <class T>
__device__ __forceinline__ void first_fwd(T* y,        // (n, c)
                                          const T* x,  // (n, tokens, c)
                                          unsigned n, unsigned tokens, unsigned c, unsigned lane_bits) {
    const size_t image = row_of_thread(lane_bits);
    if (image >= n) return;
    each_item(c, lane_bits, [&](unsigned k) { y[image * c + k] = x[image * tokens * c + k]; });
}

template <class T>
__device__ __forceinline__ void first_bwd(T* dx,        // (n, tokens, c)
                                          const T* dy,  // (n, c)
                                          unsigned n, unsigned tokens, unsigned c, unsigned lane_bits) {
    const size_t row = row_of_thread(lane_bits);
    if (row >= size_t(n) * tokens) return;
    const size_t image = row / tokens;
    const bool first = row == image * tokens;
    each_item(c, lane_bits, [&](unsigned k) { store(dx + row * c + k, first ? load(dy + image * c + k) : 0.0f); });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) pool_tokens_fwd_##suffix(                                      \
        T* y, const T* x, const float* position, unsigned n, unsigned pixels, unsigned c, unsigned lane_bits) {      \
        tokens_fwd(y, x, position, n, pixels, c, lane_bits);                                                         \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) pool_tokens_bwd_dx_##suffix(                                   \
        T* dx, const T* dy, unsigned n, unsigned pixels, unsigned c, unsigned lane_bits) {                           \
        tokens_bwd_dx(dx, dy, n, pixels, c, lane_bits);                                                              \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) pool_tokens_bwd_position_##suffix(                             \
        float* dposition, const T* dy, unsigned n, unsigned tokens, unsigned c, unsigned accumulate,                 \
        unsigned lane_bits) {                                                                                        \
        tokens_bwd_position(dposition, dy, n, tokens, c, accumulate, lane_bits);                                     \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) pool_first_fwd_##suffix(                                       \
        T* y, const T* x, unsigned n, unsigned tokens, unsigned c, unsigned lane_bits) {                             \
        first_fwd(y, x, n, tokens, c, lane_bits);                                                                    \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) pool_first_bwd_##suffix(                                       \
        T* dx, const T* dy, unsigned n, unsigned tokens, unsigned c, unsigned lane_bits) {                           \
        first_bwd(dx, dy, n, tokens, c, lane_bits);                                                                  \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
