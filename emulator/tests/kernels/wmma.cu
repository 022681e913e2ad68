// The warp matrix interface of mma.h: f16 with f32 accumulators, one 16x16x16 tile per warp, k in steps of 16.

#include <mma.h>
using namespace nvcuda;

extern "C" __global__ void wmma_gemm(const half *a, const half *b, float *c, int n, int k) {
    const int row = blockIdx.y * 16, col = blockIdx.x * 16;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a_frag;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::col_major> b_frag;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int at = 0; at < k; at += 16) {
        wmma::load_matrix_sync(a_frag, a + row * k + at, k);
        wmma::load_matrix_sync(b_frag, b + col * k + at, k);
        wmma::mma_sync(sum, a_frag, b_frag, sum);
    }
    for (int i = 0; i < sum.num_elements; i++) {
        sum.x[i] *= 2.0f;
    }
    wmma::store_matrix_sync(c + row * n + col, sum, n, wmma::mem_row_major);
}
