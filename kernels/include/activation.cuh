// SiLU, x sigmoid(x), and its derivative.
//
// numerics   expf is accurate to 2 ulp (no fast math), the division to 2; below x = -87 the result is 0 instead of a
//            subnormal
#pragma once

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// d silu(x) / dx = s (1 + x (1 - s)), s = sigmoid(x).
__device__ __forceinline__ float silu_slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}
