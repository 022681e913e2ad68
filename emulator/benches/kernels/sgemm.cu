// C = A B in f32, row-major, m, n multiples of 128 and k of 8: the classic register-tiled product.
// Mapping: block = 128 x 128 of C, 256 threads = 16 x 16, thread = 8 x 8 of C; K in steps of 8 through shared memory.
// Shared: a transposed (8 x 128), b (8 x 128); both written by all threads and read after the barrier that follows.
// Host guarantees: grid = (n / 128, m / 128), 256 threads.

extern "C" __global__ void __launch_bounds__(256) sgemm(const float *a, const float *b, float *c, int m, int n, int k)
{
    __shared__ __align__(16) float as[8][128];
    __shared__ __align__(16) float bs[8][128];
    int t = threadIdx.x;
    int row = t / 16, column = t % 16;
    a += (size_t)blockIdx.y * 128 * k;
    b += blockIdx.x * 128;
    c += (size_t)blockIdx.y * 128 * n + blockIdx.x * 128;

    float sum[8][8] = {};
    for (int k0 = 0; k0 < k; k0 += 8) {
        float4 x = *(const float4 *)&a[(size_t)(t / 2) * k + k0 + t % 2 * 4];
        float4 y = *(const float4 *)&b[(size_t)(k0 + t / 32) * n + t % 32 * 4];
        __syncthreads(); // the last step's reads are done: the tiles may be overwritten
        as[t % 2 * 4 + 0][t / 2] = x.x;
        as[t % 2 * 4 + 1][t / 2] = x.y;
        as[t % 2 * 4 + 2][t / 2] = x.z;
        as[t % 2 * 4 + 3][t / 2] = x.w;
        *(float4 *)&bs[t / 32][t % 32 * 4] = y;
        __syncthreads(); // the tiles written above are read below
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float u[8], v[8];
            *(float4 *)&u[0] = *(float4 *)&as[i][row * 8];
            *(float4 *)&u[4] = *(float4 *)&as[i][row * 8 + 4];
            *(float4 *)&v[0] = *(float4 *)&bs[i][column * 8];
            *(float4 *)&v[4] = *(float4 *)&bs[i][column * 8 + 4];
#pragma unroll
            for (int p = 0; p < 8; p++)
#pragma unroll
                for (int q = 0; q < 8; q++)
                    sum[p][q] += u[p] * v[q];
        }
    }
#pragma unroll
    for (int p = 0; p < 8; p++) {
        float *to = &c[(size_t)(row * 8 + p) * n + column * 8];
        *(float4 *)&to[0] = *(float4 *)&sum[p][0];
        *(float4 *)&to[4] = *(float4 *)&sum[p][4];
    }
}
