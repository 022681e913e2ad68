// What changes from one training step to the next, in device memory. Kernels that need it take `const Clock* clock` as
// their last parameter. So the arguments of a step's launches are the same in every step, and the launches are captured
// once in a CUDA graph and replayed. With a null clock (validation, tests) the arguments themselves count.
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

// Host twin: what changes from one training step to the next, written once at a step's start, in stream order.
struct Clock {
    uint32_t step;     // index of the step from 0: the `step` of its random numbers
    uint32_t row;      // the meter row that it writes
    uint32_t place;    // where its images begin in the numbers of those that are loaded
    AdamFactors adam;  // its update
};

// The streams of this step: with a clock, its step replaces the argument's.
__device__ __forceinline__ Stream of_step(Stream s, const Clock* clock) {
    if (clock != nullptr) s.step = clock->step;
    return s;
}

// The numbers of this step's images: with a clock `numbers` are those of a step whose images would begin at place 0.
__device__ __forceinline__ const unsigned* of_place(const unsigned* numbers, const Clock* clock) {
    return clock != nullptr ? numbers + clock->place : numbers;
}

// The step's row of the meter: with a clock `rows` are all rows, otherwise just this one.
template <class ROW>
__device__ __forceinline__ ROW* row_of_step(ROW* rows, const Clock* clock) {
    return clock != nullptr ? rows + clock->row : rows;
}
