// Calls through function pointers: tables of functions in global and constant memory, a pointer that the host reads
// from a variable and passes as an argument, virtual functions, structures returned, barriers inside, and recursion,
// which is refused when it happens.

typedef unsigned long long u64;
typedef float (*Binary)(float, float);

__device__ __noinline__ float add(float a, float b) { return a + b; }
__device__ __noinline__ float sub(float a, float b) { return a - b; }
__device__ __noinline__ float mul(float a, float b) {
    float product = 0;
    for (int k = 0; k < (int)a; ++k) product += b;
    return product;
}
__device__ Binary table[3] = {add, sub, mul};
__constant__ Binary fixed[2] = {mul, add};
__device__ Binary chosen = sub;

extern "C" __global__ void by_table(float* out, const float* x, const int* which, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float r = table[which[i]](x[i], 2.0f);
    // All lanes are together again, whatever they called.
    out[3 * i] = __popc(__activemask());
    out[3 * i + 1] = r;
    out[3 * i + 2] = fixed[i & 1](r, 3.0f);
}

extern "C" __global__ void by_argument(float* out, Binary f, int n) {
    int i = threadIdx.x;
    if (i < n) out[i] = f(i, 3.0f) + chosen(i, 1.0f);
}

struct Shape {
    float size;
    __device__ Shape(float size) : size(size) {}
    __device__ virtual float area() const = 0;
    __device__ virtual void grow(int steps) { size += steps; }
    __device__ virtual ~Shape() {}
};
struct Square : Shape {
    __device__ Square(float size) : Shape(size) {}
    __device__ float area() const override { return size * size; }
};
struct Disc : Shape {
    __device__ Disc(float size) : Shape(size) {}
    __device__ float area() const override { return 3.0f * size * size; }
    __device__ void grow(int steps) override {
        for (int s = 0; s < steps; ++s) size *= 2.0f;
    }
};
struct Frame : Shape {
    const Shape* inner;
    __device__ Frame(float size, const Shape* inner) : Shape(size), inner(inner) {}
    // A virtual function that calls another.
    __device__ float area() const override { return size - inner->area(); }
};

extern "C" __global__ void by_virtual(float* out, int n) {
    int i = threadIdx.x;
    Square square(i);
    Disc disc(i + 1);
    Frame frame(1000, &disc);
    Shape* shapes[3] = {&square, &disc, &frame};
    if (i < n) {
        shapes[i % 3]->grow(i % 4);
        out[i] = shapes[i % 3]->area();
    }
}

typedef void (*Action)(u64*, int);
__device__ __noinline__ void step(u64* at, int by) { *at += by; }
__device__ __noinline__ void jump(u64* at, int by) { *at ^= (u64)by << 40; }
struct Pair {
    double a;
    int b;
};
__device__ __noinline__ Pair half(int x) { return {x * 0.5, x}; }
__device__ __noinline__ Pair quarter(int x) { return {x * 0.25, -x}; }

extern "C" __global__ void by_select(u64* out, double* sums, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    Action act = i & 1 ? step : jump;
    Pair (*make)(int) = i % 5 ? half : quarter;
    for (int k = 0; k < n; ++k) act(&out[i], k);
    Pair pair = make(i);
    sums[i] = pair.a + pair.b;
}

typedef int (*Exchange)(int*, int);
__device__ __noinline__ int next(int* shared, int value) {
    shared[threadIdx.x] = value;
    __syncthreads();
    return shared[(threadIdx.x + 1) % blockDim.x];
}
__device__ __noinline__ int mirrored(int* shared, int value) {
    shared[threadIdx.x] = value;
    __syncthreads();
    return shared[blockDim.x - 1 - threadIdx.x];
}
__device__ Exchange exchanges[2] = {next, mirrored};

extern "C" __global__ void with_barriers(int* out) {
    __shared__ int shared[64];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = exchanges[blockIdx.x % 2](shared, i);
}

typedef int (*Step)(int, void*);
__device__ __noinline__ int count_down(int n, void* self) { return n ? 1 + ((Step)self)(n - 1, self) : 0; }
__device__ __noinline__ int last(int n, void*) { return 100 * n; }
__device__ Step steps[2] = {count_down, last};

extern "C" __global__ void recursive(int* out, int n) {
    out[threadIdx.x] = steps[0](n, (void*)steps[threadIdx.x % 2]);
}
