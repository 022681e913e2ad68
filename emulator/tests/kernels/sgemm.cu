// c = a b, row-major, f32; m, n and k are arbitrary.
//
// Block = one 64x64 tile of c, 256 threads, 4x4 elements each. Shared: a and b tiles of 8 along k.
// The kernels after the first are the same with one bug each: they must be refused.

enum Bug { NONE, DROPPED_BARRIER, OFF_BY_ONE, UNINITIALISED };

constexpr int TILE = 64, STEP = 8;

template <Bug bug>
__device__ void multiply(const float *a, const float *b, float *c, int m, int n, int k) {
    __shared__ float a_tile[STEP][TILE]; // transposed: column of a first
    __shared__ float b_tile[STEP][TILE];
    const int row_0 = blockIdx.y * TILE, col_0 = blockIdx.x * TILE;
    const int thread = threadIdx.x;
    const int my_row = thread / 16 * 4, my_col = thread % 16 * 4;
    float sum[4][4] = {};
    for (int k_0 = 0; k_0 < k; k_0 += STEP) {
        for (int i = thread; i < STEP * TILE; i += 256) {
            const int row = row_0 + i / STEP, at_k = k_0 + i % STEP;
            const bool inside = bug == OFF_BY_ONE ? row <= m && at_k < k : row < m && at_k < k;
            if (inside) {
                a_tile[i % STEP][i / STEP] = a[row * k + at_k];
            } else if (bug != UNINITIALISED) {
                a_tile[i % STEP][i / STEP] = 0.0f;
            }
        }
        for (int i = thread; i < STEP * TILE; i += 256) {
            const int at_k = k_0 + i / TILE, col = col_0 + i % TILE;
            b_tile[i / TILE][i % TILE] = at_k < k && col < n ? b[at_k * n + col] : 0.0f;
        }
        __syncthreads(); // tiles written above are read below
        for (int at_k = 0; at_k < STEP; at_k++) {
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 4; j++) {
                    sum[i][j] += a_tile[at_k][my_row + i] * b_tile[at_k][my_col + j];
                }
            }
        }
        if (bug != DROPPED_BARRIER) {
            __syncthreads(); // tiles read above are overwritten in the next round
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            const int row = row_0 + my_row + i, col = col_0 + my_col + j;
            if (row < m && col < n) {
                c[row * n + col] = sum[i][j];
            }
        }
    }
}

extern "C" __global__ void sgemm(const float *a, const float *b, float *c, int m, int n, int k) {
    multiply<NONE>(a, b, c, m, n, k);
}
extern "C" __global__ void sgemm_dropped_barrier(const float *a, const float *b, float *c, int m, int n, int k) {
    multiply<DROPPED_BARRIER>(a, b, c, m, n, k);
}
extern "C" __global__ void sgemm_off_by_one(const float *a, const float *b, float *c, int m, int n, int k) {
    multiply<OFF_BY_ONE>(a, b, c, m, n, k);
}
extern "C" __global__ void sgemm_uninitialised(const float *a, const float *b, float *c, int m, int n, int k) {
    multiply<UNINITIALISED>(a, b, c, m, n, k);
}
