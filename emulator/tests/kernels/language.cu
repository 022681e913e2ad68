// C++ features: noinline functions, recursion, switch, local arrays, 64- and 128-bit arithmetic, structs by value,
// tables, loops with several exits, templates, printf and assert.

#include <assert.h>
#include <stdio.h>

struct Box {
    int low[3];
    float weight;
    long long id;
};

__constant__ int primes[8] = {2, 3, 5, 7, 11, 13, 17, 19};

__noinline__ __device__ int collatz(int n) {
    int steps = 0;
    while (n != 1 && steps < 200) {
        n = n % 2 ? 3 * n + 1 : n / 2;
        steps++;
    }
    return steps;
}

__noinline__ __device__ Box widen(Box b, int by) {
    b.low[1] += by;
    b.weight *= 2.0f;
    b.id = b.id * 1000003 + by;
    return b;
}

__device__ int choose(int which, int v) {
    switch (which) {
    case 0: return v + 1;
    case 1: return v * v;
    case 2: return -v;
    case 3: return v >> 1;
    case 4: v += 3; // falls through
    case 5: return v ^ 0x55;
    case 6: return v % 7;
    default: return 42;
    }
}

extern "C" __global__ void language(Box box, const int *in, long long *out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) {
        return;
    }
    const int v = in[i];
    int local[16];
    for (int k = 0; k < 16; k++) {
        local[k] = v * k + primes[(k + i) % 8];
    }
    const Box wide = widen(box, v);
    long long *own = out + i * 8;
    own[0] = collatz(v + 1);
    own[1] = choose(v % 9, v);
    own[2] = local[v % 16] + local[(v * 3) % 16];
    own[3] = wide.id + wide.low[1] + (long long)wide.weight;
    const long long big = ((long long)v << 33) - 12345678901ll;
    own[4] = big / (v - 3 ? v - 3 : 1) + big % 1000003;
    own[5] = (unsigned long long)big / (unsigned)(v + 7) + __umul64hi(big, big);
    own[6] = __mulhi(v * 123457, v * 7654321) + (long long)__umulhi(v * 99991u, 0xdeadbeefu);
    int sum = 0;
    for (int k = 0; k < 100; k++) {
        if (k % 3 == v % 3) {
            continue;
        }
        if (sum > 500 + v) {
            break;
        }
        sum += k;
    }
    own[7] = sum;
}

extern "C" __global__ void print(int v) {
    if (threadIdx.x < 2) {
        printf("thread %d of block %u: %.3f %s %lld %c\n", threadIdx.x, blockIdx.x, v * 0.5, "text",
               (long long)v << 32, 'x');
    }
}
// Output without a newline, then a fault.
extern "C" __global__ void print_and_trap(int v) {
    printf("no more than %d", v);
    __trap();
}

extern "C" __global__ void check(const int *in) { assert(in[threadIdx.x] != 7); }

extern "C" __global__ void integers(const unsigned *in, unsigned *out, int n) {
    const int i = threadIdx.x;
    if (i < n) {
        const unsigned a = in[i], b = in[(i + 1) % n];
        out[i] = __dp4a((int)a, (int)b, 5) + __vadd4(a, b) + __sad((int)a, (int)b, 3) + (a / (b % 1000 + 1)) +
                 (a % 12345) + min(a, b) + (unsigned)__hadd((int)a, (int)b) + (unsigned char)(a >> 9) * (signed char)b +
                 ((a << (b & 31)) | (a >> (32 - (b & 31)) % 32));
    }
}
