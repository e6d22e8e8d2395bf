// Some elements of shared memory in one access.
#pragma once

#include <cstring>

#include "cuda/common/shared.cuh"
#include "cuda/common/vector.cuh"

namespace wavemix::reduce_haar {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T, int N>
__device__ inline void get(SharedSpan<T> source, Arithmetic<T> (&x)[N]) {
  using Word = typename WordOf<N* static_cast<int>(sizeof(T))>::type;
  const Word word = shared_cast<Word>(source)[0];
  T elements[N];
  memcpy(static_cast<void*>(elements), &word, sizeof(word));
#pragma unroll
  for (int k = 0; k < N; ++k) x[k] = widen(elements[k]);
}

// Each output is rounded once, here.
template <class T, int N>
__device__ inline void put(SharedSpan<T> target, const Arithmetic<T> (&x)[N]) {
  using Word = typename WordOf<N* static_cast<int>(sizeof(T))>::type;
  T elements[N];
  narrow(x, elements);
  Word word;
  memcpy(&word, static_cast<const void*>(elements), sizeof(word));
  shared_cast<Word>(target)[0] = word;
}

}  // namespace wavemix::reduce_haar
