// 128-bit integers. nvcc puts their division in line: a quotient digit of 32 bits at a time, estimated from a
// reciprocal in floating point, multiplied and subtracted through the carry flag, and corrected by what the flag says.

typedef unsigned __int128 u128;
typedef __int128 i128;

template <class T>
__device__ void arithmetic(T* out, const T* a, const T* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[6 * i] = a[i] / b[i];
    out[6 * i + 1] = a[i] % b[i];
    out[6 * i + 2] = a[i] * b[i];
    out[6 * i + 3] = a[i] + b[i];
    out[6 * i + 4] = a[i] - b[i];
    out[6 * i + 5] = a[i] >> (int)(b[i] & 127);
}

extern "C" __global__ void unsigned_128(u128* out, const u128* a, const u128* b, int n) { arithmetic(out, a, b, n); }

extern "C" __global__ void signed_128(i128* out, const i128* a, const i128* b, int n) { arithmetic(out, a, b, n); }
