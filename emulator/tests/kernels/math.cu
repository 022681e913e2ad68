// Mathematical functions over arrays, compiled twice: as they are, and with --use_fast_math (math_fast.ptx).

#define UNARY(name, type, expression)                                                               \
    extern "C" __global__ void name(const type *in, type *out, int n) {                             \
        const int i = blockIdx.x * blockDim.x + threadIdx.x;                                        \
        if (i < n) {                                                                                \
            const type x = in[i];                                                                   \
            out[i] = expression;                                                                    \
        }                                                                                           \
    }

UNARY(f32_exp, float, expf(x))
UNARY(f32_log, float, logf(fabsf(x)))
UNARY(f32_sin, float, sinf(x))
UNARY(f32_cos, float, cosf(x))
UNARY(f32_tanh, float, tanhf(x))
UNARY(f32_erf, float, erff(x))
UNARY(f32_sqrt, float, sqrtf(fabsf(x)))
UNARY(f32_rsqrt, float, rsqrtf(fabsf(x)))
UNARY(f32_reciprocal, float, 1.0f / x)
UNARY(f32_power, float, powf(fabsf(x), 1.7f))
UNARY(f32_sigmoid, float, 1.0f / (1.0f + expf(-x)))
UNARY(f32_gelu, float, 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x))))
UNARY(f32_floor, float, floorf(x) + ceilf(x) + rintf(x) + truncf(x))
UNARY(f64_exp, double, exp(x))
UNARY(f64_log, double, log(fabs(x)))
UNARY(f64_sin, double, sin(x))
UNARY(f64_sqrt, double, sqrt(fabs(x)))
UNARY(f64_reciprocal, double, 1.0 / x)
UNARY(f64_through_f32, double, (double)(float)x)
