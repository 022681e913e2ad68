// c = a b^T on tensor cores: a (m, k) and b (n, k) bf16, c (m, n) f32, all row-major; m, n multiples of 64, k of 32.
//
// Block = one 64x64 tile of c, 128 threads = 2x2 warps of 32x32. Tiles of 32 along k arrive by cp.async in two stages.
// Shared rows are padded to 40 elements (80 bytes), so that the 8 rows of an ldmatrix lie in different banks.
// The kernels after the first have one bug each.

#include <cuda_bf16.h>
#include <stdint.h>

enum Bug { NONE, DROPPED_BARRIER, OFF_BY_ONE, DROPPED_WAIT };

constexpr int TILE = 64, STEP = 32, ROW = 40;

__device__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ void copy_16(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ void load_4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b_0, uint32_t b_1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_0), "r"(b_1));
}

template <Bug bug>
__device__ void multiply(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int n, int k) {
    __shared__ __align__(16) __nv_bfloat16 a_tile[2][TILE][ROW];
    __shared__ __align__(16) __nv_bfloat16 b_tile[2][TILE][ROW];
    const int row_0 = blockIdx.y * TILE, col_0 = blockIdx.x * TILE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
    float sum[2][4][4] = {};

    auto fetch = [&](int stage, int k_0) {
        for (int i = threadIdx.x; i < TILE * STEP / 8; i += 128) {
            const int row = i / (STEP / 8), at = i % (STEP / 8) * 8;
            const int shift = bug == OFF_BY_ONE ? 1 : 0; // one row too far: the last tile ends outside a
            copy_16(&a_tile[stage][row][at], a + (size_t)(row_0 + row + shift) * k + k_0 + at);
            copy_16(&b_tile[stage][row][at], b + (size_t)(col_0 + row) * k + k_0 + at);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };

    fetch(0, 0);
    for (int k_0 = 0; k_0 < k; k_0 += STEP) {
        const int stage = k_0 / STEP % 2;
        if (k_0 + STEP < k) {
            fetch(1 - stage, k_0 + STEP);
            if (bug != DROPPED_WAIT) {
                asm volatile("cp.async.wait_group 1;" ::: "memory"); // this round's tiles have arrived
            }
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads(); // what every thread fetched is seen by all
        for (int kk = 0; kk < STEP; kk += 16) {
            uint32_t a_frag[2][4], b_frag[2][4];
            for (int i = 0; i < 2; i++) {
                // lanes 0-15 give rows 0-15 of columns 0-7, lanes 16-31 those of columns 8-15
                load_4(a_frag[i], &a_tile[stage][warp_row + i * 16 + lane % 16][kk + lane / 16 * 8]);
                // matrices: columns of c 0-7 with k 0-7, then k 8-15, then columns 8-15 alike
                load_4(b_frag[i], &b_tile[stage][warp_col + i * 16 + lane % 8 + lane / 16 * 8][kk + lane / 8 % 2 * 8]);
            }
            for (int i = 0; i < 2; i++) {
                for (int j = 0; j < 4; j++) {
                    multiply_add(sum[i][j], a_frag[i], b_frag[j / 2][j % 2 * 2], b_frag[j / 2][j % 2 * 2 + 1]);
                }
            }
        }
        if (bug != DROPPED_BARRIER) {
            __syncthreads(); // this stage has been read before it is fetched into again
        }
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            const int row = row_0 + warp_row + i * 16 + lane / 4, col = col_0 + warp_col + j * 8 + lane % 4 * 2;
            c[(size_t)row * n + col] = sum[i][j][0];
            c[(size_t)row * n + col + 1] = sum[i][j][1];
            c[(size_t)(row + 8) * n + col] = sum[i][j][2];
            c[(size_t)(row + 8) * n + col + 1] = sum[i][j][3];
        }
    }
}

extern "C" __global__ void mma_gemm(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int n, int k) {
    multiply<NONE>(a, b, c, n, k);
}
extern "C" __global__ void mma_gemm_dropped_barrier(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int n,
                                                    int k) {
    multiply<DROPPED_BARRIER>(a, b, c, n, k);
}
extern "C" __global__ void mma_gemm_off_by_one(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int n, int k) {
    multiply<OFF_BY_ONE>(a, b, c, n, k);
}
extern "C" __global__ void mma_gemm_dropped_wait(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int n,
                                                 int k) {
    multiply<DROPPED_WAIT>(a, b, c, n, k);
}
