// C = A B^T with A (m x k) and B (n x k) in bf16, row-major, C in f32: ldmatrix and mma.sync m16n8k16.
// Mapping: block = 64 x 64 of C, 4 warps as 2 x 2, warp = 32 x 32 of C = 2 x 4 tiles; K in steps of 64 through shared
// memory.
// Shared: both tiles with rows of 72 elements (144 bytes: eight rows of ldmatrix fall into different banks).
// Host guarantees: m, n, k multiples of 64; grid = (n / 64, m / 64), 128 threads.
#include <cuda_bf16.h>

__device__ void load(unsigned (&r)[4], const __nv_bfloat16 *at)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((unsigned)__cvta_generic_to_shared(at)));
}

__device__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(128) mma(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int m,
                                                      int n, int k)
{
    __shared__ __align__(16) __nv_bfloat16 as[64][72];
    __shared__ __align__(16) __nv_bfloat16 bs[64][72];
    int t = threadIdx.x, lane = t % 32, warp = t / 32;
    int row = warp / 2 * 32, column = warp % 2 * 32;
    a += (size_t)blockIdx.y * 64 * k;
    b += (size_t)blockIdx.x * 64 * k;

    float sum[2][4][4] = {};
    for (int k0 = 0; k0 < k; k0 += 64) {
        __syncthreads(); // the last step's reads are done: the tiles may be overwritten
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = i * 16 + t / 8, x = t % 8 * 8;
            *(uint4 *)&as[r][x] = *(const uint4 *)&a[(size_t)r * k + k0 + x];
            *(uint4 *)&bs[r][x] = *(const uint4 *)&b[(size_t)r * k + k0 + x];
        }
        __syncthreads(); // the tiles written above are read below
#pragma unroll
        for (int kk = 0; kk < 64; kk += 16) {
            unsigned fa[2][4], fb[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                load(fa[i], &as[row + i * 16 + lane % 16][kk + lane / 16 * 8]);
                load(fb[i], &bs[column + i * 16 + lane % 8 + lane / 16 * 8][kk + lane / 8 % 2 * 8]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++)
                    multiply(sum[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float *to = &c[((size_t)blockIdx.y * 64 + row + i * 16 + lane / 4) * n + blockIdx.x * 64 + column + j * 8 +
                           lane % 4 * 2];
            *(float2 *)&to[0] = make_float2(sum[i][j][0], sum[i][j][1]);
            *(float2 *)&to[8 * n] = make_float2(sum[i][j][2], sum[i][j][3]);
        }
}
