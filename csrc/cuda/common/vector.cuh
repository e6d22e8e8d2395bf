// Element types: the arithmetic each is computed in, and the widest memory accesses that carry it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "cuda/common/launch.cuh"

namespace wavemix {

constexpr int kVectorBytes = 16;  // the widest load and store of a thread on every architecture since sm_35

template <class T>
struct Element {
  using Arithmetic = float;
};
template <>
struct Element<double> {
  using Arithmetic = double;
};
template <class T>
using Arithmetic = typename Element<T>::Arithmetic;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// The machine word that moves `bytes` bytes in one instruction.
template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// Elements of one access. N elements wider than a word take several of the widest words.
template <class T, int N>
struct Vector {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "elements of 2, 4 or 8 bytes");
  static_assert((N & (N - 1)) == 0, "a power of two of elements");
  static constexpr int kBytes =
      N * static_cast<int>(sizeof(T)) < kVectorBytes ? N * static_cast<int>(sizeof(T)) : kVectorBytes;
  static constexpr int kPerWord = kBytes / static_cast<int>(sizeof(T));
  static constexpr int kWords = N / kPerWord;
  using Word = typename WordOf<kBytes>::type;
  static_assert(sizeof(Word) == kBytes && kPerWord * kWords == N, "words tile the vector");
};

// N elements as they lie in memory. To have several accesses in flight a thread fetches them all before it widens any.
template <class T, int N>
using Raw = typename Vector<T, N>::Word[Vector<T, N>::kWords];

// The read-only path: these loads may be moved above the kernel's own stores, so inputs must not overlap outputs.
template <class T, int N>
__device__ inline void fetch(const T* source, Raw<T, N>& raw) {
#pragma unroll
  for (int w = 0; w < Vector<T, N>::kWords; ++w)
    raw[w] = __ldg(reinterpret_cast<const typename Vector<T, N>::Word*>(source) + w);
}

template <class T, int N>
__device__ inline void widen(const Raw<T, N>& raw, Arithmetic<T> (&x)[N]) {
  T elements[N];
  memcpy(static_cast<void*>(elements), raw, sizeof(raw));
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = widen(elements[k]);
}

template <class T, int N>
__device__ inline void load(const T* source, Arithmetic<T> (&x)[N]) {
  Raw<T, N> raw;
  fetch<T, N>(source, raw);
  widen<T, N>(raw, x);
}

// Narrowing in pairs is one instruction for both halves.
template <int N>
__device__ inline void narrow(const double (&x)[N], double (&y)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) y[k] = x[k];
}
template <int N>
__device__ inline void narrow(const float (&x)[N], float (&y)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) y[k] = x[k];
}
template <int N>
__device__ inline void narrow(const float (&x)[N], __half (&y)[N]) {
  if constexpr (N == 1) {
    y[0] = __float2half_rn(x[0]);
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const __half2 pair = __floats2half2_rn(x[k], x[k + 1]);
      y[k] = pair.x;
      y[k + 1] = pair.y;
    }
  }
}
template <int N>
__device__ inline void narrow(const float (&x)[N], __nv_bfloat16 (&y)[N]) {
  if constexpr (N == 1) {
    y[0] = __float2bfloat16_rn(x[0]);
  } else {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[k], x[k + 1]);
      y[k] = pair.x;
      y[k + 1] = pair.y;
    }
  }
}

// Each element is rounded once, here. __stwb is the plain store as one instruction: an assignment of the word the
// compiler may take apart again, into stores of 4 bytes.
template <class T, int N>
__device__ inline void store(T* target, const Arithmetic<T> (&x)[N]) {
  using V = Vector<T, N>;
  T elements[N];
  narrow(x, elements);
#pragma unroll
  for (int w = 0; w < V::kWords; ++w) {
    typename V::Word word;
    memcpy(&word, static_cast<const void*>(elements + w * V::kPerWord), sizeof(word));
    __stwb(reinterpret_cast<typename V::Word*>(target) + w, word);
  }
}

// Returns x, but the compiler cannot know that, so it does not hoist what is computed from it. Address arithmetic of
// rare branches needs this: hoisted out of loops it would occupy registers for everyone.
__device__ inline int64_t here(int64_t x) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}

// Division of a task number by a launch constant: a multiplication instead of the ~20 instructions of an integer
// division (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994).
class Divisor {
 public:
  static constexpr int64_t kMaxDividend = INT32_MAX;  // keeps high + dividend below 2^32

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : divisor_(divisor) {
    while (shift_ < 32 && (uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }
  // Returns the remainder and leaves the quotient in `value`.
  __device__ uint32_t take(uint32_t& value) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(value) * multiplier_) >> 32);
    const uint32_t quotient = (high + value) >> shift_;
    const uint32_t remainder = value - quotient * divisor_;
    value = quotient;
    return remainder;
  }

 private:
  uint32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace wavemix
