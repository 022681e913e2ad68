// concat: joins two tensors along the channels, and takes them apart again.
//
// computes   join: y[r] = [a[r], b[r]] for each row (pixel) r;  part: d[r] = dy[r][first .. first + c]
// layout     a (rows, ca), b (rows, cb), y (rows, ca + cb); d (rows, c), dy (rows, whole): f32 or bf16
// mapping    rows.cuh, 256 threads: item = 16 bytes of a row of y (join) or d (part), or one element unless `vec`
// shared     none
// bound by   memory: one read and one write per element
// host       vec only if 16 bytes divide ca and cb (join), or c, whole and first (part); first + c <= whole; tensors
//            start on 16-byte boundaries
// numerics   copies
#include "dtype.cuh"
#include "rows.cuh"

// V: what is copied at a time, T or 16 bytes of them. Widths count V.
template <class V>
__device__ __forceinline__ void join(V* y,        // (rows, wa + wb)
                                     const V* a,  // (rows, wa)
                                     const V* b,  // (rows, wb)
                                     size_t rows, unsigned wa, unsigned wb, unsigned lane_bits) {
    const size_t row = row_of_thread(lane_bits);
    if (row >= rows) return;
    y += row * (wa + wb), a += row * wa, b += row * wb;
    each_item(wa + wb, lane_bits, [&](unsigned k) { y[k] = k < wa ? a[k] : b[k - wa]; });
}

template <class V>
__device__ __forceinline__ void part(V* d,         // (rows, width)
                                     const V* dy,  // (rows, whole)
                                     size_t rows, unsigned width, unsigned whole, unsigned first, unsigned lane_bits) {
    const size_t row = row_of_thread(lane_bits);
    if (row >= rows) return;
    d += row * width, dy += row * whole + first;
    each_item(width, lane_bits, [&](unsigned k) { d[k] = dy[k]; });
}

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) concat_join_##suffix(                                          \
        T* y, const T* a, const T* b, size_t rows, unsigned ca, unsigned cb, unsigned vec, unsigned lane_bits) {     \
        if (vec)                                                                                                     \
            join(wide(y), wide(a), wide(b), rows, ca / WIDE<T>, cb / WIDE<T>, lane_bits);                            \
        else                                                                                                         \
            join(y, a, b, rows, ca, cb, lane_bits);                                                                  \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) concat_part_##suffix(                                          \
        T* d, const T* dy, size_t rows, unsigned c, unsigned whole, unsigned first, unsigned vec,                    \
        unsigned lane_bits) {                                                                                        \
        if (vec)                                                                                                     \
            part(wide(d), wide(dy), rows, c / WIDE<T>, whole / WIDE<T>, first / WIDE<T>, lane_bits);                 \
        else                                                                                                         \
            part(d, dy, rows, c, whole, first, lane_bits);                                                           \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
