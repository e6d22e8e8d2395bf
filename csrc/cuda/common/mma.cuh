// Tensor-core and asynchronous-copy instructions of sm_80, each a function: inline PTX under nvcc, the same meaning
// spelled out in the emulator. Fragment layouts are those of the PTX ISA, sections "Matrix Fragments for mma.m16n8k16"
// and "mma.m16n8k8"; lane = 4 * group + member:
//   A (16 x k, row major)   rows group, group + 8; B (k x 8, column major)   column group
//   C, D (16 x 8)           d[0], d[1] row group, d[2], d[3] row group + 8; columns 2 * member, 2 * member + 1
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/common/shared.cuh"

namespace wavemix {

// Two 16-bit elements or one tf32 per register.
using Fragment = uint32_t;

#if defined(__CUDACC__)

// d += a * b, products exact, sums in fp32.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const Fragment (&a)[4], const Fragment (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, "16-bit floating-point elements");
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// tf32 has the same layout with a[0..3] at (group, member), (group + 8, member), and both again at column member + 4.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const Fragment (&a)[4], const Fragment (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Round to nearest, ties away from zero; without it the tensor core cuts the low 13 bits off.
__device__ inline Fragment to_tf32(float x) {
  Fragment y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Four 8x8 matrices of 16-bit elements: lanes 8m .. 8m + 7 point at the 16-byte rows of matrix m; register m of a lane
// gets elements 2 * member and 2 * member + 1 of row `group` (transposed: of column `group`).
template <bool transposed, class T>
__device__ inline void ldmatrix_x4(Fragment (&r)[4], const T* row) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// 4, 8 or 16 bytes from global to shared memory, past the registers (16: past the first-level cache too). They are
// there after cp_async_wait in the copying thread, and after a barrier behind it in the others.
template <int bytes, class T>
__device__ inline void cp_async(T* target, const T* source) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "the widths the instruction has");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(source), "n"(bytes) : "memory");
  }
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the last `pending` groups of this thread are under way.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#else

namespace emulator {

struct Mma {
  float* d;
  const Fragment *a, *b;
};

inline float element(Fragment pair, int which, __half) {
  __half x;
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  std::memcpy(&x, &bits, sizeof(x));
  return __half2float(x);
}
inline float element(Fragment pair, int which, __nv_bfloat16) {
  __nv_bfloat16 x;
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  std::memcpy(&x, &bits, sizeof(x));
  return __bfloat162float(x);
}
inline float tf32_value(Fragment bits) {
  float x;
  bits &= 0xffffe000u;  // the tensor core reads 19 bits
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The tensor core's own order of summation is not specified; in double every order gives the same result here.
template <int K, class A, class B>
void multiply(void* const (&payloads)[kWarp], const A& a_at, const B& b_at) {
  auto mma = [&](int lane) -> const Mma& { return *static_cast<const Mma*>(payloads[lane]); };
  float result[kWarp][4];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int k = 0; k < 4; ++k) {
      const int row = lane / 4 + 8 * (k / 2), column = 2 * (lane % 4) + k % 2;
      double sum = mma(lane).d[k];
      for (int inner = 0; inner < K; ++inner)
        sum += static_cast<double>(a_at(mma, row, inner)) * static_cast<double>(b_at(mma, inner, column));
      result[lane][k] = static_cast<float>(sum);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(mma(lane).d, result[lane], sizeof(result[lane]));
}

}  // namespace emulator

template <class T>
void mma_m16n8k16(float (&d)[4], const Fragment (&a)[4], const Fragment (&b)[2], WAVEMIX_SITE) {
  emulator::Mma mine{d, a, b};
  emulator::warp_operation(
      0xffffffffu, {file, line}, "mma_m16n8k16", &mine, [](void* const(&payloads)[emulator::kWarp]) {
        emulator::multiply<16>(
            payloads,
            [](auto& mma, int row, int k) {
              return emulator::element(mma(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2], k % 2, T{});
            },
            [](auto& mma, int k, int column) {
              return emulator::element(mma(column * 4 + k % 8 / 2).b[k / 8], k % 2, T{});
            });
      });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const Fragment (&a)[4], const Fragment (&b)[2], WAVEMIX_SITE) {
  emulator::Mma mine{d, a, b};
  emulator::warp_operation(
      0xffffffffu, {file, line}, "mma_m16n8k8_tf32", &mine, [](void* const(&payloads)[emulator::kWarp]) {
        emulator::multiply<8>(
            payloads,
            [](auto& mma, int row, int k) {
              return emulator::tf32_value(mma(row % 8 * 4 + k % 4).a[row / 8 + k / 4 * 2]);
            },
            [](auto& mma, int k, int column) { return emulator::tf32_value(mma(column * 4 + k % 4).b[k / 4]); });
      });
}

inline Fragment to_tf32(float x) {
  Fragment bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // Half a unit of the 19 bits, added to the magnitude; infinities and NaN have no bits to round.
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <bool transposed, class T>
void ldmatrix_x4(Fragment (&r)[4], SharedSpan<T> row, WAVEMIX_SITE) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  if (row.offset() % 16 != 0)
    emulator::fail("ldmatrix_x4: a row " + std::to_string(row.offset()) +
                   " bytes into its array; rows start at multiples of 16");
  struct Load {
    SharedSpan<uint16_t> row;
    std::vector<SharedSpan<uint16_t> > rows;  // all lanes' rows
  };
  Load load{shared_cast<uint16_t>(row), {}};
  emulator::warp_operation(0xffffffffu, {file, line}, "ldmatrix_x4", &load,
                           [](void* const(&payloads)[emulator::kWarp]) {
                             for (void* reader : payloads) {
                               for (const void* offered : payloads)
                                 static_cast<Load*>(reader)->rows.push_back(static_cast<const Load*>(offered)->row);
                             }
                           });
  // Each lane reads its own elements, so that a race with any other thread's write shows.
  const int group = emulator::lane() / 4, member = emulator::lane() % 4;
  for (int m = 0; m < 4; ++m) {
    Fragment half[2];
    for (int k = 0; k < 2; ++k)
      half[k] = transposed ? load.rows[8 * m + 2 * member + k][group] : load.rows[8 * m + group][2 * member + k];
    r[m] = half[0] | half[1] << 16;
  }
}

template <int bytes, class T>
void cp_async(SharedSpan<T> target, const T* source) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "the widths the instruction has");
  if (target.offset() % bytes != 0 || reinterpret_cast<uintptr_t>(source) % bytes != 0)
    emulator::fail("cp_async: target offset " + std::to_string(target.offset()) + " and source address " +
                   std::to_string(reinterpret_cast<uintptr_t>(source)) + " must be multiples of " +
                   std::to_string(bytes) + " bytes");
  emulator::copy_async(target.memory(), target.offset(), source, bytes, sizeof(T));
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int pending>
void cp_async_wait() {
  emulator::wait_for_copies(pending);
}

#endif

}  // namespace wavemix
