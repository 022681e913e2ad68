// y[row] = softmax(x[row]) over the columns; block = one row, 128 threads; the reductions share one buffer.
// The kernels after the first have one bug each.

enum Bug { NONE, DROPPED_BARRIER, OFF_BY_ONE, UNINITIALISED, DIVERGENT_BARRIER };

constexpr int THREADS = 128;

template <Bug bug>
__device__ void softmax(const float *x, float *y, int cols) {
    __shared__ float buffer[THREADS];
    const float *in = x + (size_t)blockIdx.x * cols;
    float *out = y + (size_t)blockIdx.x * cols;
    const int thread = threadIdx.x;

    float most = -INFINITY;
    const int last = bug == OFF_BY_ONE ? cols + 1 : cols; // of the last row, one column too many is outside x
    for (int col = thread; col < last; col += THREADS) {
        most = fmaxf(most, in[col]);
    }
    buffer[thread] = most;
    __syncthreads(); // every thread's maximum is there
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) {
            buffer[thread] = fmaxf(buffer[thread], buffer[thread + half]);
            if (bug == DIVERGENT_BARRIER) {
                __syncthreads();
            }
        }
        if (bug != DIVERGENT_BARRIER) {
            __syncthreads(); // this round's maxima are read in the next
        }
    }
    most = buffer[0];
    if (bug != DROPPED_BARRIER) {
        __syncthreads(); // all have read the maximum before the buffer is used again
    }

    float sum = 0.0f;
    for (int col = thread; col < cols; col += THREADS) {
        const float e = expf(in[col] - most);
        if (bug == UNINITIALISED) {
            out[col] += e;
        } else {
            out[col] = e;
        }
        sum += e;
    }
    buffer[thread] = sum;
    __syncthreads(); // every thread's sum is there
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (thread < half) {
            buffer[thread] += buffer[thread + half];
        }
        __syncthreads(); // this round's sums are read in the next
    }
    for (int col = thread; col < cols; col += THREADS) {
        out[col] /= buffer[0];
    }
}

extern "C" __global__ void softmax_rows(const float *x, float *y, int cols) { softmax<NONE>(x, y, cols); }
extern "C" __global__ void softmax_dropped_barrier(const float *x, float *y, int cols) {
    softmax<DROPPED_BARRIER>(x, y, cols);
}
extern "C" __global__ void softmax_off_by_one(const float *x, float *y, int cols) { softmax<OFF_BY_ONE>(x, y, cols); }
extern "C" __global__ void softmax_uninitialised(const float *x, float *y, int cols) {
    softmax<UNINITIALISED>(x, y, cols);
}
extern "C" __global__ void softmax_divergent_barrier(const float *x, float *y, int cols) {
    softmax<DIVERGENT_BARRIER>(x, y, cols);
}
