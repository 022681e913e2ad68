// What changes from one training step to the next, in device memory. Kernels that need it take `const Clock* clock` as
// their last parameter: the arguments of a step's launches are then the same in every step, so that they can be
// captured in a CUDA graph and launched again. A null clock (validation, sampling, tests) means that the arguments
// themselves say.
#pragma once
#include <cstdint>

#include "meter.cuh"
#include "philox.cuh"

// Host twin: the factors of one update of adam, as derived in src/ops/adam.rs.
struct AdamFactors {
    float keep;                         // 1 - lr decay
    float one_beta1, beta2, one_beta2;  // 1 - beta1, beta2, 1 - beta2
    float rate;                         // lr / (1 - beta1^k)
    float unbias;                       // 1 / sqrt(1 - beta2^k)
    float eps;
    float one_ema;                      // 1 - ema_decay
};

// Host twin: the numbers of one training step, written once at its start, in the order of the stream.
struct Clock {
    uint32_t step;     // number of the step from 0: the `step` of its random numbers
    uint32_t row;      // the row of the meter that it writes
    AdamFactors adam;  // its update
};

// The streams of this step: with a clock, its step and not that of the arguments.
__device__ __forceinline__ Stream of_step(Stream s, const Clock* clock) {
    if (clock != nullptr) s.step = clock->step;
    return s;
}

// The meter's row: with a clock `rows` are all of them, else the one.
template <class ROW>
__device__ __forceinline__ ROW* row_of_step(ROW* rows, const Clock* clock) {
    return clock != nullptr ? rows + clock->row : rows;
}
