// What the interpreter itself does: control flow, calls, communication between lanes and warps, every memory space.
#include <cassert>
#include <cooperative_groups.h>
#include <cstdio>

namespace cg = cooperative_groups;

__constant__ float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
__device__ int counter = 5;
__device__ const char *names[2] = {"even", "odd"};

struct Big {
    int a[5];
    double d;
    char c;
};

__noinline__ __device__ float helper(float x, const Big &b, Big v) { return x * b.a[2] + v.d; }
__noinline__ __device__ Big make(int i) {
    Big b;
    for (int k = 0; k < 5; k++) {
        b.a[k] = i * k;
    }
    b.d = i;
    b.c = 3;
    return b;
}

// Structures by value and by reference through calls that are not inlined, constants, arrays in local memory.
extern "C" __global__ void calls(float *out, Big b, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) {
        return;
    }
    Big v = make(i);
    out[i] = helper(out[i], b, v) + table[i & 3] + v.a[i % 5] + b.a[i % 5];
}

// Loops of different length per lane, early exits, a switch with many cases.
extern "C" __global__ void diverge(int *out, int n) {
    const int i = threadIdx.x;
    if (i >= n) {
        return;
    }
    int sum = 0;
    for (int k = 0; k < i; k++) {
        if (k % 7 == 3) {
            continue;
        }
        if (sum > 300) {
            break;
        }
        switch ((i + k) % 9) {
        case 0: sum += 3; break;
        case 1: sum = sum * 5 % 101; break;
        case 2: sum ^= 3; break;
        case 3: sum += k; break;
        case 4: sum -= i; break;
        case 5: sum += k / (i + 1); break;
        case 6: sum |= 4; break;
        default: sum += 1;
        }
    }
    const int warp_sum = __reduce_add_sync(__activemask(), sum);
    out[i] = sum * 1000 + warp_sum % 1000;
}

extern "C" __global__ void say(int n) {
    const int i = threadIdx.x;
    if (i < n) {
        printf("thread %d is %s, half is %.2f, %5u|%-4d|%llx\n", i, names[i & 1], i * 0.5, i, -i, 0x123456789abull + i);
    }
}

extern "C" __global__ void asserting(int *x) { assert(x[threadIdx.x] > 0); }

// Votes, matches, ballots, shuffles of every mode, in one number per lane.
extern "C" __global__ void warp_functions(unsigned *out) {
    const unsigned i = threadIdx.x, all = ~0u;
    unsigned *o = out + i * 16;
    int equal;
    o[0] = __ballot_sync(all, i & 1);
    o[1] = __any_sync(all, i == 7) * 2 + __all_sync(all, i < 32);
    o[2] = __match_any_sync(all, i / 5);
    o[3] = __match_all_sync(all, 42, &equal);
    o[4] = equal;
    o[5] = __reduce_add_sync(all, i) + __reduce_max_sync(all, i ^ 5) + __reduce_and_sync(all, i | 64);
    o[6] = __shfl_sync(all, i * 3, (i + 1) % 32);
    o[7] = __shfl_up_sync(all, i * 3, 2);
    o[8] = __shfl_down_sync(all, i * 3, 3, 8);
    o[9] = __shfl_xor_sync(all, i * 3, 5);
    o[10] = __syncthreads_count(i % 3 == 0);
    o[11] = __syncthreads_or(i == 100) * 2 + __syncthreads_and(i < 100);
    o[12] = i < 16 ? __ballot_sync(0xffff, i & 2) : __ballot_sync(0xffff0000, i & 4);
    auto tile = cg::tiled_partition<8>(cg::this_thread_block());
    o[13] = tile.shfl_down(i, 2) + tile.any(i == 9);
    auto group = cg::coalesced_threads();
    o[14] = group.size() * 100 + group.thread_rank();
    o[15] = __popc(__activemask());
}

// A flag passed between warps by volatile shared memory, and by named barriers.
extern "C" __global__ void producer_consumer(int *out) {
    __shared__ int data[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int round = 0; round < 3; round++) {
        if (warp == 0) {
            data[lane] = lane * 10 + round;
            asm volatile("bar.arrive 1, 64;" ::: "memory"); // full
            asm volatile("bar.sync 2, 64;" ::: "memory");   // empty
        } else {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            out[round * 32 + lane] = data[31 - lane];
            asm volatile("bar.arrive 2, 64;" ::: "memory");
        }
    }
}

// A lock taken by every lane of every warp: lanes of one warp must not starve each other.
extern "C" __global__ void spin_lock(int *lock, int *value) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            *(volatile int *)value = *(volatile int *)value + 1;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}

// The last block sums what all blocks left, as in the CUDA samples.
template <bool fence> __device__ void last_block(float *partial, unsigned *arrived, float *out, const float *x) {
    __shared__ bool last;
    partial[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x] * 2;
    if (fence) {
        __threadfence(); // partial sums written above are read by the last block
    }
    __syncthreads();     // all threads' partial sums are written
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1) == gridDim.x - 1;
    }
    __syncthreads(); // last is written
    if (last) {
        float sum = 0;
        for (int i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) {
            sum += partial[i];
        }
        atomicAdd(out, sum);
    }
}
extern "C" __global__ void last_block_sums(float *partial, unsigned *arrived, float *out, const float *x) {
    last_block<true>(partial, arrived, out, x);
}
extern "C" __global__ void last_block_without_fence(float *partial, unsigned *arrived, float *out, const float *x) {
    last_block<false>(partial, arrived, out, x);
}

// All blocks wait for each other twice.
extern "C" __global__ void grid_barrier(unsigned *arrived, int *out) {
    for (unsigned round = 1; round <= 2; round++) {
        out[blockIdx.x] += blockIdx.x;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            atomicAdd(arrived, 1);
            while (*(volatile unsigned *)arrived < round * gridDim.x) {
            }
            __threadfence();
        }
        __syncthreads();
        out[gridDim.x + blockIdx.x * 2 + round - 1] = out[(blockIdx.x + 1) % gridDim.x];
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            atomicAdd(arrived + 1, 1);
            while (*(volatile unsigned *)(arrived + 1) < round * gridDim.x) {
            }
            __threadfence();
        }
        __syncthreads();
    }
}

// All blocks but the last wait for its values with loads past the L1 cache, then say that they have them.
extern "C" __global__ void handed_over_past_l1(unsigned *done, int *value, int *out) {
    if (blockIdx.x == gridDim.x - 1) {
        value[threadIdx.x] = 3 * threadIdx.x;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            atomicExch(done, 1);
        }
        return;
    }
    if (threadIdx.x == 0) {
        unsigned seen = 0;
        while (seen == 0) {
            asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(seen) : "l"(done) : "memory");
        }
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = value[threadIdx.x];
}

// Bugs.
extern "C" __global__ void divergent_barrier(int *out) {
    if (threadIdx.x < 40) {
        __syncthreads();
    }
    out[threadIdx.x] = 1;
}
extern "C" __global__ void two_barriers(int *out) {
    if (threadIdx.x < 32) {
        out[threadIdx.x] = 1;
        __syncthreads();
    } else {
        out[threadIdx.x] = 2;
        __syncthreads();
        out[threadIdx.x] = 3;
    }
}
extern "C" __global__ void inactive_shuffle(int *out) {
    const int i = threadIdx.x;
    if (i < 16) {
        out[i] = __shfl_down_sync(0xffff, i, 8);
    }
}
extern "C" __global__ void missing_lane(int *out) {
    const int i = threadIdx.x;
    if (i < 16) {
        out[i] = __shfl_xor_sync(0xffffffff, i, 1);
    } else {
        out[i] = i;
    }
}
extern "C" __global__ void block_race(int *out) { out[threadIdx.x] = blockIdx.x; }
extern "C" __global__ void neighbour_race(int *out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
    const int next = out[(i + 1) % n];
    out[i] = next + 1;
}
extern "C" __global__ void warp_race(int *out) {
    __shared__ volatile int data[32];
    __shared__ int plain[32];
    data[threadIdx.x] = threadIdx.x;
    plain[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = plain[31 - threadIdx.x];
}
extern "C" __global__ void warp_synchronised(int *out) {
    __shared__ int plain[32];
    plain[threadIdx.x] = threadIdx.x;
    __syncwarp();
    out[threadIdx.x] = plain[31 - threadIdx.x];
}
extern "C" __global__ void half_words(unsigned short *x) {
    __shared__ unsigned short s[64];
    s[threadIdx.x] = x[blockIdx.x * 33 + threadIdx.x];
    s[threadIdx.x] += 1;
    __syncthreads();
    if (threadIdx.x < 33) {
        x[blockIdx.x * 33 + threadIdx.x] = s[threadIdx.x];
    }
}
extern "C" __global__ void endless(int *x) {
    while (*(volatile int *)x == 0) {
    }
}
extern "C" __global__ void one_atomic(int *x) { atomicAdd(x, 1); }

__device__ __forceinline__ void copy_async(void *shared, const void *global) {
    const unsigned to = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global));
}
template <int keep> __device__ void async_copy(int4 *out, const int4 *in) {
    __shared__ int4 s[2][32];
    copy_async(&s[0][threadIdx.x], in + threadIdx.x);
    asm volatile("cp.async.commit_group;");
    copy_async(&s[1][threadIdx.x], in + 32 + threadIdx.x);
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group %0;" ::"n"(keep) : "memory");
    __syncthreads();
    out[threadIdx.x] = s[0][31 - threadIdx.x];
    if (keep == 1) {
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
    }
    out[32 + threadIdx.x] = s[1][31 - threadIdx.x];
}
extern "C" __global__ void async_copies(int4 *out, const int4 *in) { async_copy<1>(out, in); }
extern "C" __global__ void async_too_early(int4 *out, const int4 *in) { async_copy<2>(out, in); }
