// silu: y = x sigmoid(x), and its gradient.
//
// computes   fwd: y[i] = x[i] sigmoid(x[i]);  bwd: dx[i] = dy[i] s (1 + x[i] (1 - s)), s = sigmoid(x[i]); dx may be dy
// layout     x, y, dy, dx flat, len elements of f32 or bf16
// mapping    block = 1024 elements, thread = 4 neighbours: elementwise.cuh
// shared     none
// bound by   memory: 2 (fwd) or 3 (bwd) elements moved per exponential and division
// host       grid.x = ceil(len / 1024); all start on 256-byte boundaries
// numerics   f32, see activation.cuh; one rounding to T
#include "activation.cuh"
#include "elementwise.cuh"

#define ENTRY(suffix, T)                                                                                             \
    extern "C" __global__ void __launch_bounds__(256) silu_fwd_##suffix(T* y, const T* x, size_t len) {              \
        map1(y, x, len, [](float x) { return silu(x); });                                                            \
    }                                                                                                                \
    extern "C" __global__ void __launch_bounds__(256) silu_bwd_##suffix(                                             \
        T* dx, const T* dy, const T* x, size_t len) {                                                                \
        map2(dx, dy, x, len, [](float dy, float x) { return dy * silu_slope(x); });                                  \
    }
F32_AND_BF16(ENTRY)
#undef ENTRY
