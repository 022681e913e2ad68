// Atomics on global and shared memory, compare-and-swap loops, fences, the last block's turn.

__device__ double add_by_cas(double *address, double v) {
    unsigned long long *bits = (unsigned long long *)address;
    unsigned long long old = *bits, assumed;
    do {
        assumed = old;
        old = atomicCAS(bits, assumed, __double_as_longlong(v + __longlong_as_double(assumed)));
    } while (assumed != old);
    return __longlong_as_double(old);
}

__device__ void max_by_cas(float *address, float v) {
    int *bits = (int *)address;
    int old = *(volatile int *)bits;
    while (v > __int_as_float(old)) {
        const int seen = atomicCAS(bits, old, __float_as_int(v));
        if (seen == old) {
            break;
        }
        old = seen;
    }
}

extern "C" __global__ void atomics(int *i, unsigned *u, unsigned long long *l, float *f, double *d) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&i[0], t);
    atomicSub(&i[1], 1);
    atomicMax(&i[2], t * 7 % 101);
    atomicMin(&i[3], -(t * 5 % 103));
    atomicAnd(&u[0], ~(1u << (t % 8)));
    atomicOr(&u[1], 1u << (t % 16));
    atomicXor(&u[2], (unsigned)t);
    atomicInc(&u[3], 9);
    atomicDec(&u[4], 6);
    atomicAdd(&l[0], 1ull << 33);
    atomicMax(&l[1], (unsigned long long)t << 20);
    atomicAdd(&f[0], 0.5f);
    max_by_cas(&f[1], (float)(t % 97));
    atomicAdd(&d[0], 0.25);
    add_by_cas(&d[1], 0.125);
    atomicExch(&i[4], t);
}

__device__ unsigned finished = 0;

// Sums of blocks, and the sum of those by the block that finishes last.
extern "C" __global__ void last_block(const int *in, int *partial, int *total, int n) {
    __shared__ int sum;
    __shared__ bool last;
    if (threadIdx.x == 0) {
        sum = 0;
    }
    __syncthreads(); // the sum is zero before it is added to
    const int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n) {
        atomicAdd(&sum, in[at]);
    }
    __syncthreads(); // the block's sum is complete
    if (threadIdx.x == 0) {
        *(volatile int *)&partial[blockIdx.x] = sum;
        __threadfence(); // the partial sum is seen before the count
        last = atomicAdd(&finished, 1) == gridDim.x - 1;
    }
    __syncthreads(); // whether this block is the last is known to all
    if (last && threadIdx.x == 0) {
        __threadfence(); // no partial sum is read before the count was
        int all_sums = 0;
        for (int block = 0; block < gridDim.x; block++) {
            all_sums += *(volatile int *)&partial[block];
        }
        *total = all_sums;
        finished = 0;
    }
}
