// add: y = a + b.
//
// computes   y[i] = a[i] + b[i]; y may be a or b
// layout     a, b, y flat, len elements of f32 or bf16
// mapping    block = 1024 elements, thread = 4 neighbours: elementwise.cuh
// shared     none
// bound by   memory: 3 elements moved per addition
// host       grid.x = ceil(len / 1024); all three start on 256-byte boundaries
// numerics   f32 addition, one rounding to T
#include "elementwise.cuh"

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) add_fwd_##suffix(T* y, const T* a, const T* b, size_t len) {   \
        map2(y, a, b, len, [](float a, float b) { return a + b; });                                                  \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
