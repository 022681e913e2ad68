// tree_sum: the sum of several arrays along a fixed binary tree, whose order does not depend on who made which.
//
// computes   fwd  to[i] = tree of x[0, i] .. x[count - 1, i]: a node of n > 1 terms is the sum of its left child, which
//            has the largest power of two below n, and its right one, which has the rest
// layout     to (len), x (count, len), f32
// mapping    thread = 4 neighbours, block = 1024 elements; a thread goes through the terms like a binary counter: a
//            node waits in the slot of its height until its right sibling is complete
// shared     none
// bound by   memory: count + 1 elements moved for each sum
// host       1 <= count < 2^LEVELS; len is a multiple of 4; both start on 256-byte boundaries and do not overlap;
//            grid.x = ceil(len / 1024)
// numerics   f32 additions in the order of the tree: the CPU's bits
#include "dtype.cuh"
#include "elementwise.cuh"

// Host twin: heights of nodes that can wait.
constexpr unsigned LEVELS = 8;

extern "C" __global__ void __launch_bounds__(256) tree_sum_fwd(float* to, const float* x, size_t len, unsigned count) {
    const size_t i = first_element();
    if (i >= len) return;
    float4 waiting[LEVELS];  // in registers: every loop over it is unrolled
    for (unsigned term = 0; term < count; ++term) {
        float4 node = load4(x + term * len + i);
        bool rises = true;
#pragma unroll
        for (unsigned level = 0; level < LEVELS; ++level) {
            const bool is_right = term >> level & 1;
            if (rises && is_right) node = waiting[level] + node;
            if (rises && !is_right) waiting[level] = node;
            rises = rises && is_right;
        }
    }
    // What is left of a count that is no power of two: the lowest node is the rightmost.
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    bool begun = false;
#pragma unroll
    for (unsigned level = 0; level < LEVELS; ++level) {
        if (count >> level & 1) {
            sum = begun ? waiting[level] + sum : waiting[level];
            begun = true;
        }
    }
    store4(to + i, sum);
}
