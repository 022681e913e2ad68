// Grids of which one block faults while others run.

// What no allocation reaches.
__device__ void fault(int *x) { x[1ll << 40] = 1; }

// The last block faults, all others wait for it.
extern "C" __global__ void waits_by_reading(int *x) {
    if (blockIdx.x == gridDim.x - 1) {
        fault(x);
    }
    while (*(volatile int *)x == 0) {
    }
}
extern "C" __global__ void waits_past_l1(int *x) {
    if (blockIdx.x == gridDim.x - 1) {
        fault(x);
    }
    int seen = threadIdx.x;
    while (seen == 0) {
        asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(seen) : "l"(x) : "memory");
    }
}
extern "C" __global__ void waits_by_atomics(int *x) {
    if (blockIdx.x == gridDim.x - 1) {
        fault(x);
    }
    while (atomicCAS(x, 1, 0) == 0) {
    }
}
// One thread of each block waits, the others at a barrier.
extern "C" __global__ void waits_at_barrier(int *x) {
    if (blockIdx.x == gridDim.x - 1) {
        fault(x);
    }
    if (threadIdx.x == 0) {
        while (*(volatile int *)x == 0) {
        }
    }
    __syncthreads();
}
// Every block faults, the first after long work.
extern "C" __global__ void first_block_is_late(int *x, unsigned rounds) {
    unsigned v = threadIdx.x;
    if (blockIdx.x == 0) {
        for (unsigned i = 0; i < rounds; i++) {
            v = (v ^ v >> 7) * 1664525u + i;
        }
    }
    x[(1ll << 40) + v % 2] = 1;
}
