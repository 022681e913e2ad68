// upsample: nearest neighbour, by two in both directions.
//
// computes   fwd: y[n, i, j, k] = x[n, i/2, j/2, k];  bwd: dx[n, i, j, k] = (a + b) + (d + e), its four dy
// layout     x, dx (n, h, w, c), y, dy (n, 2h, 2w, c), f32 or bf16; pixels = n h w
// mapping    rows.cuh, 256 threads: row = pixel of x (fwd) or dx (bwd); item = 16 bytes of it, or one element unless
//            `vec` (fwd), or four channels (bwd); a thread writes (reads) the same of the four pixels of y (dy)
// shared     none
// bound by   memory: 5 elements moved per element of x
// host       pixels < 2^32; vec only if 16 bytes divide c; tensors start on 16-byte boundaries
// numerics   fwd copies; bwd sums in f32, one rounding to T
#include "dtype.cuh"
#include "rows.cuh"

// The four pixels of y (or dy) for one of x: the index of the upper left, and the offsets to its neighbours.
struct Above {
    size_t pixel, right, below;
};

// x's pixel (r, j), counting the rows of all images, lies at r w + j. The upper left of its four lies in row 2 r and
// column 2 j of rows of 2 w, at 4 r w + 2 j = 4 (r w + j) - 2 j. So only j takes a division.
__device__ __forceinline__ Above above(size_t pixel, unsigned w) {
    const unsigned j = unsigned(pixel) % w;
    return {4 * pixel - 2 * size_t(j), 1, 2 * size_t(w)};
}

// V: what is copied at a time, T or 16 bytes of them; a pixel has `width` of them.
template <class V>
__device__ __forceinline__ void fwd(V* y,        // (n, 2h, 2w, width)
                                    const V* x,  // (n, h, w, width)
                                    size_t pixels, unsigned w, unsigned width, unsigned lane_bits) {
    const size_t pixel = row_of_thread(lane_bits);
    if (pixel >= pixels) return;
    const Above p = above(pixel, w);
    x += pixel * width;
    y += p.pixel * width;
    each_item(width, lane_bits, [&](unsigned k) {
        const V v = x[k];
        y[k] = v;
        y[k + p.right * width] = v;
        y[k + p.below * width] = v;
        y[k + (p.below + p.right) * width] = v;
    });
}

template <class T>
__device__ __forceinline__ void bwd(T* dx,        // (n, h, w, c)
                                    const T* dy,  // (n, 2h, 2w, c)
                                    size_t pixels, unsigned w, unsigned c, unsigned lane_bits) {
    const size_t pixel = row_of_thread(lane_bits);
    if (pixel >= pixels) return;
    const Above p = above(pixel, w);
    each_item((c + 3) / 4, lane_bits, [&](unsigned group) {
        const unsigned k = 4 * group, count = min(c - k, 4u);
        const bool vector = c % 4 == 0;
        const auto of = [&](size_t offset) { return load_group(dy, (p.pixel + offset) * c + k, count, vector); };
        const float4 a = of(0), b = of(p.right), d = of(p.below), e = of(p.below + p.right);
        const float4 sum = make_float4((a.x + b.x) + (d.x + e.x), (a.y + b.y) + (d.y + e.y),
                                       (a.z + b.z) + (d.z + e.z), (a.w + b.w) + (d.w + e.w));
        store_group(dx, pixel * c + k, sum, count, vector);
    });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) upsample_fwd_##suffix(                                         \
        T* y, const T* x, size_t pixels, unsigned w, unsigned c, unsigned vec, unsigned lane_bits) {                 \
        if (vec)                                                                                                     \
            fwd(wide(y), wide(x), pixels, w, c / WIDE<T>, lane_bits);                                                \
        else                                                                                                         \
            fwd(y, x, pixels, w, c, lane_bits);                                                                      \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) upsample_bwd_##suffix(                                         \
        T* dx, const T* dy, size_t pixels, unsigned w, unsigned c, unsigned lane_bits) {                             \
        bwd(dx, dy, pixels, w, c, lane_bits);                                                                        \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
