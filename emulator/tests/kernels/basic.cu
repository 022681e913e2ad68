// Small kernels for the tests of the driver itself: launches, parameters, shared memory, streams, graphs, faults.

extern "C" __global__ void axpy(float a, const float *x, float *y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = a * x[i] + y[i];
    }
}

extern "C" __global__ void fill(float *y, float v, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = v;
    }
}

// Everything that an index can be, so that the layout of blocks and threads is seen.
extern "C" __global__ void indices(int *out) {
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int at = block * blockDim.x * blockDim.y * blockDim.z + thread;
    out[at] = blockIdx.x | blockIdx.y << 4 | blockIdx.z << 8 | threadIdx.x << 12 | threadIdx.y << 16 |
              threadIdx.z << 20;
}

// Reverses a block's elements through dynamic shared memory.
extern "C" __global__ void reverse(float *x) {
    extern __shared__ float buffer[];
    buffer[threadIdx.x] = x[threadIdx.x];
    __syncthreads(); // every element is there
    x[threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(128) bounded(float *x) { x[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f; }

__device__ float scale = 2.0f;
__constant__ float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};

extern "C" __global__ void scaled(float *x) { x[threadIdx.x] = scale * table[threadIdx.x % 4]; }

struct Mixed {
    char c;
    double d;
    short s[3];
    float2 f;
};

// Parameters of every size and alignment.
extern "C" __global__ void mixed(double *out, char c, Mixed m, short s, long long l, float f) {
    out[0] = c;
    out[1] = m.c;
    out[2] = m.d;
    out[3] = m.s[2];
    out[4] = m.f.y;
    out[5] = s;
    out[6] = (double)l;
    out[7] = f;
}

extern "C" __global__ void store_at(float *x, long long index) { x[index] = 1.0f; }

extern "C" __global__ void misaligned(char *x) { *(int *)(x + 1) = 1; }

extern "C" __global__ void trapping() { asm volatile("trap;"); }

extern "C" __global__ void copy(const float *x, float *y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = x[i];
    }
}

extern "C" __global__ void no_parameters() {}
