// One warp multiplies 16x16 matrices by way of cp.async, ldmatrix and mma: what a tiled matrix product is made of.
#include "cuda/common/mma.cuh"
#include "kernels.h"

namespace wavemix::test {
namespace {

template <class T>
struct Matrices {
  const T *a, *b;
  float* d;
};

template <class T>
__global__ void matmul_16_bit(const __grid_constant__ Matrices<T> of) {
  constexpr int kSize = 16;
  WAVEMIX_SHARED(T, a_tile, kSize * kSize);
  WAVEMIX_SHARED(T, b_tile, kSize * kSize);
  const int lane = static_cast<int>(threadIdx.x);
  cp_async<16>(&a_tile[8 * lane], of.a + 8 * lane);
  cp_async<16>(&b_tile[8 * lane], of.b + 8 * lane);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  // Matrices of A in the order of its registers: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
  Fragment a_part[4], b_part[4];
  ldmatrix_x4<false>(a_part, &a_tile[lane % 16 * kSize + lane / 16 * 8]);
  // B lies row major (k, n): transposed on the way; registers 0, 1 serve columns 0-7, registers 2, 3 columns 8-15.
  ldmatrix_x4<true>(b_part, &b_tile[lane % 16 * kSize + lane / 16 * 8]);
  for (int half = 0; half < 2; ++half) {
    float sum[4] = {};
    const Fragment b_half[2] = {b_part[2 * half], b_part[2 * half + 1]};
    mma_m16n8k16<T>(sum, a_part, b_half);
    for (int k = 0; k < 4; ++k) of.d[(lane / 4 + 8 * (k / 2)) * kSize + 8 * half + 2 * (lane % 4) + k % 2] = sum[k];
  }
}

__global__ void matmul_tf32_kernel(const __grid_constant__ Matrices<float> of) {
  constexpr int kRows = 16, kInner = 8, kColumns = 16;
  const int lane = static_cast<int>(threadIdx.x), group = lane / 4, member = lane % 4;
  Fragment a_part[4];
  for (int k = 0; k < 4; ++k) a_part[k] = to_tf32(of.a[(group + 8 * (k % 2)) * kInner + member + 4 * (k / 2)]);
  for (int half = 0; half < 2; ++half) {
    Fragment b_part[2];
    for (int k = 0; k < 2; ++k) b_part[k] = to_tf32(of.b[(member + 4 * k) * kColumns + 8 * half + group]);
    float sum[4] = {};
    mma_m16n8k8_tf32(sum, a_part, b_part);
    for (int k = 0; k < 4; ++k) of.d[(group + 8 * (k / 2)) * kRows + 8 * half + 2 * member + k % 2] = sum[k];
  }
}

template <class T>
void one_warp(const char* what, void (*kernel)(Matrices<T>), const void* a, const void* b, float* d) {
  const Launch launch{[what] { return std::string(what); }, 1, 32, 0, nullptr};
  launch(kernel, Matrices<T>{static_cast<const T*>(a), static_cast<const T*>(b), d});
}

}  // namespace

void matmul_f16(const void* a, const void* b, float* d) { one_warp("matmul_f16", matmul_16_bit<__half>, a, b, d); }
void matmul_bf16(const void* a, const void* b, float* d) {
  one_warp("matmul_bf16", matmul_16_bit<__nv_bfloat16>, a, b, d);
}
void matmul_tf32(const void* a, const void* b, float* d) { one_warp("matmul_tf32", matmul_tf32_kernel, a, b, d); }

}  // namespace wavemix::test
