// add: y = a + b, and many sums of parts in one launch.
//
// computes   fwd  y[i] = a[i] + b[i]; y may be a or b
//            parts  to[i] = sum over p of parts[p, i], added to to[i] if so, for up to 64 `to` and their parts
// layout     a, b, y flat, len elements of f32 or bf16; `to` f32, each result somewhere in it; parts f32 or f64, the
//            next part `pitch` elements further on
// mapping    fwd: block = 1024 elements, thread = 4 neighbours: elementwise.cuh. parts: block = `lanes` elements of one
//            result, which it finds in the table among its arguments; the other threads down the parts
// shared     fwd none; parts 2 KiB for f32 and for f64
// bound by   memory: 3 elements moved per addition; parts are read once
// host       fwd: grid.x = ceil(len / 1024); all three start on 256-byte boundaries. parts: grid.x = blocks of all
//            sums, ceil(len / lanes) of each, `first` those before it; lanes a power of two up to 256; no result
//            overlaps another
// numerics   f32 addition, one rounding to T. parts: column_sums.cuh, one rounding to f32, one more if added
#include "column_sums.cuh"
#include "elementwise.cuh"

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) add_fwd_##suffix(T* y, const T* a, const T* b, size_t len) {   \
        map2(y, a, b, len, [](float a, float b) { return a + b; });                                                  \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY

extern "C" __global__ void __launch_bounds__(SUM_THREADS) add_parts(float* to, Sums sums) {
    const Sum& s = sums.sums[last_from<SUMS>(sums.sums, sums.count, blockIdx.x)];
    const unsigned block = blockIdx.x - s.first;
    if (s.wide) {
        sum_parts(to + s.to, reinterpret_cast<const double*>(s.parts), s, block);
    } else {
        sum_parts(to + s.to, reinterpret_cast<const float*>(s.parts), s, block);
    }
}
