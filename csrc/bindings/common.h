// Shared by the bindings of all families. Plain integers come in (addresses, sizes, strides), nothing of torch.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/python.h"
#include "wavemix/types.h"

namespace wavemix::bindings {

// Each adds its family's functions to the module; defined in <family>.cpp.
void bind_conv1x1(Module& m);
void bind_deconv(Module& m);
void bind_dwt(Module& m);
void bind_haar(Module& m);
void bind_haar_blocks(Module& m);
void bind_mlp(Module& m);
void bind_norm(Module& m);
void bind_patm(Module& m);
void bind_patm_whole(Module& m);
void bind_reduce_haar(Module& m);

using Ints = std::vector<int64_t>;  // address, then strides in elements; empty for an absent tensor

inline void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
inline void* pointer(int64_t address) { return pointer(static_cast<uintptr_t>(address)); }

template <class View>
View view(const Ints& ints, const char* name) {
  constexpr size_t rank = sizeof(View::stride) / sizeof(int64_t);
  View out;
  if (ints.empty()) return out;
  if (ints.size() != rank + 1)
    throw std::invalid_argument(std::string(name) + ": expected an address and " + std::to_string(rank) +
                                " strides, got " + std::to_string(ints.size()) + " integers");
  out.data = pointer(ints[0]);
  for (size_t i = 0; i < rank; ++i) out.stride[i] = ints[i + 1];
  return out;
}

inline DType dtype_of(int code) {
  if (code < 0 || code > static_cast<int>(DType::bf16))
    throw std::invalid_argument("dtype: unknown code " + std::to_string(code));
  return static_cast<DType>(code);
}

inline void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

inline Matrix matrix(const Ints& ints, const char* name) {
  if (ints.size() != 2)
    throw std::invalid_argument(std::string(name) + ": expected an address and a row stride, got " +
                                std::to_string(ints.size()) + " integers");
  return {pointer(ints[0]), ints[1]};
}

// The shape (n, c, h, w) into any arguments that have one.
template <class Args>
void set_shape(Args& args, const Ints& shape) {
  if (shape.size() != 4)
    throw std::invalid_argument("shape: expected (n, c, h, w), got " + std::to_string(shape.size()) + " integers");
  args.n = shape[0];
  args.c = shape[1];
  args.h = shape[2];
  args.w = shape[3];
}

}  // namespace wavemix::bindings
