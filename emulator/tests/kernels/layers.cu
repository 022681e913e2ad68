// Layers as public CUDA code writes them: layer norm, transpose, scan, convolution, strided elementwise.

// y = (x - mean) / sqrt(var + eps) * gamma + beta. Block = one row, threads a multiple of 32; dynamic shared memory:
// one float per warp.
extern "C" __global__ void layer_norm(const float *x, const float *gamma, const float *beta, float *y, int cols) {
    extern __shared__ float partial[];
    const float *row = x + (size_t)blockIdx.x * cols;
    auto sum_of_block = [&](float v) {
        for (int offset = 16; offset > 0; offset >>= 1) {
            v += __shfl_down_sync(0xffffffff, v, offset);
        }
        __syncthreads(); // the last sum has been read
        if (threadIdx.x % 32 == 0) {
            partial[threadIdx.x / 32] = v;
        }
        __syncthreads(); // every warp's sum is there
        float sum = 0.0f;
        for (int warp = 0; warp < blockDim.x / 32; warp++) {
            sum += partial[warp];
        }
        return sum;
    };
    float sum = 0.0f;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        sum += row[col];
    }
    const float mean = sum_of_block(sum) / cols;
    sum = 0.0f;
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        sum += (row[col] - mean) * (row[col] - mean);
    }
    const float scale = rsqrtf(sum_of_block(sum) / cols + 1e-5f);
    for (int col = threadIdx.x; col < cols; col += blockDim.x) {
        y[(size_t)blockIdx.x * cols + col] = (row[col] - mean) * scale * gamma[col] + beta[col];
    }
}

// out[c][r] = in[r][c] through tiles of 32x33; blocks of 32x8.
extern "C" __global__ void transpose(const float *in, float *out, int rows, int cols) {
    __shared__ float tile[32][33];
    int c = blockIdx.x * 32 + threadIdx.x, r = blockIdx.y * 32 + threadIdx.y;
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
        if (r + i < rows && c < cols) {
            tile[threadIdx.y + i][threadIdx.x] = in[(r + i) * cols + c];
        }
    }
    __syncthreads(); // the tile is there
    c = blockIdx.y * 32 + threadIdx.x, r = blockIdx.x * 32 + threadIdx.y;
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
        if (r + i < cols && c < rows) {
            out[(r + i) * rows + c] = tile[threadIdx.x][threadIdx.y + i];
        }
    }
}

// Inclusive prefix sum of up to 1024 numbers in one block (Hillis and Steele).
extern "C" __global__ void scan(const int *in, int *out, int n) {
    __shared__ int buffer[2][1024];
    int from = 0;
    buffer[0][threadIdx.x] = threadIdx.x < n ? in[threadIdx.x] : 0;
    __syncthreads(); // the numbers are there
    for (int offset = 1; offset < blockDim.x; offset *= 2) {
        int v = buffer[from][threadIdx.x];
        if (threadIdx.x >= offset) {
            v += buffer[from][threadIdx.x - offset];
        }
        buffer[1 - from][threadIdx.x] = v;
        from = 1 - from;
        __syncthreads(); // this round's sums are read in the next
    }
    if (threadIdx.x < n) {
        out[threadIdx.x] = buffer[from][threadIdx.x];
    }
}

__constant__ float weights[3][3] = {{1, 2, 1}, {0, 0.5f, 0}, {-1, -2, -1}};

// 3x3 convolution with zeros around, blocks of 16x16, halo in shared memory.
extern "C" __global__ void convolve(const float *in, float *out, int h, int w) {
    __shared__ float tile[18][18];
    const int x = blockIdx.x * 16 + threadIdx.x, y = blockIdx.y * 16 + threadIdx.y;
    for (int i = threadIdx.y; i < 18; i += 16) {
        for (int j = threadIdx.x; j < 18; j += 16) {
            const int at_y = (int)blockIdx.y * 16 + i - 1, at_x = (int)blockIdx.x * 16 + j - 1;
            tile[i][j] = at_y >= 0 && at_y < h && at_x >= 0 && at_x < w ? in[at_y * w + at_x] : 0.0f;
        }
    }
    __syncthreads(); // tile and halo are there
    if (x < w && y < h) {
        float sum = 0.0f;
        for (int i = 0; i < 3; i++) {
            for (int j = 0; j < 3; j++) {
                sum += weights[i][j] * tile[threadIdx.y + i][threadIdx.x + j];
            }
        }
        out[y * w + x] = sum;
    }
}

// Vector loads and stores, grid-stride loop, restrict and read-only loads.
extern "C" __global__ void scale_4(const float4 *__restrict__ in, float4 *__restrict__ out, float a, int n4) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n4; i += gridDim.x * blockDim.x) {
        float4 v = __ldg(in + i);
        v.x *= a, v.y *= a, v.z *= a, v.w *= a;
        out[i] = v;
    }
}
