// bins[v] += occurrences of byte v in x[0..n], counted in shared memory, then added to global memory. 256 threads.
// The kernels after the first have one bug each.

enum Bug { NONE, DROPPED_BARRIER, OFF_BY_ONE, NOT_ATOMIC, UNINITIALISED };

template <Bug bug>
__device__ void count(const unsigned char *x, unsigned *bins, int n) {
    __shared__ unsigned local[256];
    if (bug != UNINITIALISED) {
        local[threadIdx.x] = 0;
    }
    if (bug != DROPPED_BARRIER) {
        __syncthreads(); // zeros written above are counted up below
    }
    const int step = gridDim.x * blockDim.x;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        const int v = x[i] + (bug == OFF_BY_ONE ? 1 : 0); // 255 + 1 is outside the bins
        if (bug == NOT_ATOMIC) {
            local[v]++;
        } else {
            atomicAdd(&local[v], 1u);
        }
    }
    __syncthreads(); // all counts are there
    atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
}

extern "C" __global__ void histogram(const unsigned char *x, unsigned *bins, int n) { count<NONE>(x, bins, n); }
extern "C" __global__ void histogram_dropped_barrier(const unsigned char *x, unsigned *bins, int n) {
    count<DROPPED_BARRIER>(x, bins, n);
}
extern "C" __global__ void histogram_off_by_one(const unsigned char *x, unsigned *bins, int n) {
    count<OFF_BY_ONE>(x, bins, n);
}
extern "C" __global__ void histogram_not_atomic(const unsigned char *x, unsigned *bins, int n) {
    count<NOT_ATOMIC>(x, bins, n);
}
extern "C" __global__ void histogram_uninitialised(const unsigned char *x, unsigned *bins, int n) {
    count<UNINITIALISED>(x, bins, n);
}
