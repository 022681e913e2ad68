// Kernels over the rows of a matrix, such as the pixels of images: no element's index is divided by the width.
//
// mapping    block = 2^lane_bits threads side by side along a row, the others on the next rows; where a row is longer,
//            its threads loop over it
//
//            lane_bits = 2     item    0     1     2     3     4     5
//                              row 0   t 0   t 1   t 2   t 3   t 0   t 1
//                              row 1   t 4   t 5   t 6   t 7   t 4   t 5
// host       over_rows in src/device/cuda/tile.rs: lane_bits, and enough blocks along x for the rows; widths < 2^31
#pragma once

// The thread's row, which may be one beyond the last.
__device__ __forceinline__ size_t row_of_thread(unsigned lane_bits) {
    return size_t(blockIdx.x) * (blockDim.x >> lane_bits) + (threadIdx.x >> lane_bits);
}

// f(k) for each of the thread's items k of a row of `width`.
template <class F>
__device__ __forceinline__ void each_item(unsigned width, unsigned lane_bits, F f) {
    for (unsigned k = threadIdx.x & ((1u << lane_bits) - 1); k < width; k += 1u << lane_bits) f(k);
}
