// The Python face of the 1x1 convolution: matrices of pixels are (address, row stride).
#include "wavemix/conv1x1.h"

#include "bindings/common.h"

namespace wavemix::bindings {

void bind_conv1x1(Module& m) {
  m.def("conv1x1_backward_weight_cpu",
        [](int dtype, const Ints& size, const Ints& grad, const Ints& image, uintptr_t out, int threads) {
          if (size.size() != 3) throw std::invalid_argument("size: expected (rows, o, c)");
          check_threads(threads);
          Conv1x1GradArgs args;
          args.dtype = dtype_of(dtype);
          args.rows = size[0];
          args.o = size[1];
          args.c = size[2];
          args.grad = matrix(grad, "grad");
          args.image = matrix(image, "image");
          args.out = pointer(out);
          const Unlocked unlocked;
          conv1x1_backward_weight_cpu(args, threads);
        },
        {"dtype", "size", "grad", "image", "out", "threads"});
}

}  // namespace wavemix::bindings
