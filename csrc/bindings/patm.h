// Shared by the bindings of PATM's kernels.
#pragma once

#include <string>

#include "bindings/common.h"
#include "wavemix/patm.h"

namespace wavemix::bindings {

inline Plane plane(const Ints& ints, const char* name, const Ints& shape) {
  if (ints.size() == 5 && shape[1] > 1 && ints[2] != 1)
    throw std::invalid_argument(std::string(name) + ": expected contiguous channels, got a channel stride of " +
                                std::to_string(ints[2]));
  return view<Plane>(ints, name);
}

// Common to all argument structs: type and shape.
template <class Args>
Args shaped(int dtype, const Ints& shape, bool pairs = true) {
  Args args;
  args.dtype = dtype_of(dtype);
  set_shape(args, shape);
  if (pairs && args.c % 2 != 0)
    throw std::invalid_argument("shape: expected an even number of channels, got " + std::to_string(args.c));
  return args;
}

}  // namespace wavemix::bindings
