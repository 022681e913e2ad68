// avg_pool: the mean of 2x2 pixels.
//
// computes   fwd: y[n, i, j, k] = ((a + b) + (d + e)) / 4, its four x;  bwd: dx[n, i, j, k] = dy[n, i/2, j/2, k] / 4
// layout     x, dx (n, 2h, 2w, c), y, dy (n, h, w, c), f32 or bf16; pixels = n h w
// mapping    rows.cuh, 256 threads: row = pixel of y (fwd) or dy (bwd); item = four channels; a thread reads (writes)
//            the same of the four pixels of x (dx)
// shared     none
// bound by   memory: 5 elements moved per element of y
// host       pixels < 2^32; tensors start on 16-byte boundaries
// numerics   sums in f32, one rounding to T; a quarter is exact
#include "dtype.cuh"
#include "rows.cuh"

// The four pixels of x (or dx) for one of y: the index of the upper left, and the offsets to its neighbours.
struct Square {
    size_t pixel, right, below;
};

// y's pixel (r, j), counting the rows of all images, lies at r w + j. The upper left of its four lies in row 2 r and
// column 2 j of rows of 2 w, at 4 r w + 2 j = 4 (r w + j) - 2 j. So only j takes a division.
__device__ __forceinline__ Square square(size_t pixel, unsigned w) {
    const unsigned j = unsigned(pixel) % w;
    return {4 * pixel - 2 * size_t(j), 1, 2 * size_t(w)};
}

template <class T>
__device__ __forceinline__ void fwd(T* y,        // (n, h, w, c)
                                    const T* x,  // (n, 2h, 2w, c)
                                    size_t pixels, unsigned w, unsigned c, unsigned lane_bits) {
    const size_t pixel = row_of_thread(lane_bits);
    if (pixel >= pixels) return;
    const Square p = square(pixel, w);
    each_item((c + 3) / 4, lane_bits, [&](unsigned group) {
        const unsigned k = 4 * group, count = min(c - k, 4u);
        const bool vector = c % 4 == 0;
        const auto of = [&](size_t offset) { return load_group(x, (p.pixel + offset) * c + k, count, vector); };
        const float4 a = of(0), b = of(p.right), d = of(p.below), e = of(p.below + p.right);
        const float4 mean = make_float4(0.25f * ((a.x + b.x) + (d.x + e.x)), 0.25f * ((a.y + b.y) + (d.y + e.y)),
                                        0.25f * ((a.z + b.z) + (d.z + e.z)), 0.25f * ((a.w + b.w) + (d.w + e.w)));
        store_group(y, pixel * c + k, mean, count, vector);
    });
}

template <class T>
__device__ __forceinline__ void bwd(T* dx,        // (n, 2h, 2w, c)
                                    const T* dy,  // (n, h, w, c)
                                    size_t pixels, unsigned w, unsigned c, unsigned lane_bits) {
    const size_t pixel = row_of_thread(lane_bits);
    if (pixel >= pixels) return;
    const Square p = square(pixel, w);
    each_item((c + 3) / 4, lane_bits, [&](unsigned group) {
        const unsigned k = 4 * group, count = min(c - k, 4u);
        const bool vector = c % 4 == 0;
        const float4 v = load_group(dy, pixel * c + k, count, vector);
        const float4 quarter = make_float4(0.25f * v.x, 0.25f * v.y, 0.25f * v.z, 0.25f * v.w);
        const auto to = [&](size_t offset) { store_group(dx, (p.pixel + offset) * c + k, quarter, count, vector); };
        to(0), to(p.right), to(p.below), to(p.below + p.right);
    });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) avg_pool_fwd_##suffix(                                         \
        T* y, const T* x, size_t pixels, unsigned w, unsigned c, unsigned lane_bits) {                               \
        fwd(y, x, pixels, w, c, lane_bits);                                                                          \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) avg_pool_bwd_##suffix(                                         \
        T* dx, const T* dy, size_t pixels, unsigned w, unsigned c, unsigned lane_bits) {                             \
        bwd(dx, dy, pixels, w, c, lane_bits);                                                                        \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
