// The Python face of the pointwise MLP: matrices are (address, row stride), arrays by channel plain addresses.
#include "wavemix/mlp.h"

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

MlpArgs mlp_args(int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p,
                 uint64_t seed, int64_t first_row, int threads) {
  if (size.size() != 5) throw py::value_error("size: expected (rows, a, b, k, o)");
  if (tensors.size() != 6) throw py::value_error("tensors: expected scale, shift, w1, b1, w2 and b2");
  if (!(p >= 0.0 && p <= 1.0)) throw py::value_error("p: expected a probability, 0 to 1, got " + std::to_string(p));
  check_threads(threads);
  MlpArgs args;
  args.dtype = dtype_of(dtype);
  args.rows = size[0];
  args.a = size[1];
  args.b = size[2];
  args.k = size[3];
  args.o = size[4];
  args.x = matrix(x, "x");
  args.second = matrix(second, "second");
  const void** slots[] = {&args.scale, &args.shift, &args.w1, &args.b1, &args.w2, &args.b2};
  for (size_t i = 0; i < 6; ++i) *slots[i] = pointer(tensors[i]);
  args.p = p;
  args.seed = seed;
  args.first_row = first_row;
  return args;
}

}  // namespace

void bind_mlp(py::module_& m) {
  m.def(
      "mlp_forward_cpu",
      [](int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p, uint64_t seed,
         int64_t first_row, const Ints& out, int threads) {
        const auto args = mlp_args(dtype, size, x, second, tensors, p, seed, first_row, threads);
        const auto to = matrix(out, "out");
        py::gil_scoped_release unlocked;
        mlp_forward_cpu(args, to, threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("x"), py::arg("second"), py::arg("tensors"), py::arg("p"),
      py::arg("seed"), py::arg("first_row"), py::arg("out"), py::arg("threads"));
  m.def(
      "mlp_backward_cpu",
      [](int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p, uint64_t seed,
         int64_t first_row, const Ints& grad, const Ints& d_x, const Ints& d_second, const Ints& out,
         const Ints& d_tensors, int threads) {
        const auto args = mlp_args(dtype, size, x, second, tensors, p, seed, first_row, threads);
        if (d_tensors.size() != 4) throw py::value_error("d_tensors: expected those of w1, b1, w2 and b2");
        MlpGradArgs grads;
        grads.grad = matrix(grad, "grad");
        grads.d_x = matrix(d_x, "d_x");
        grads.d_second = matrix(d_second, "d_second");
        grads.out = matrix(out, "out");
        void** slots[] = {&grads.d_w1, &grads.d_b1, &grads.d_w2, &grads.d_b2};
        for (size_t i = 0; i < 4; ++i) *slots[i] = pointer(d_tensors[i]);
        py::gil_scoped_release unlocked;
        mlp_backward_cpu(args, grads, threads);
      },
      py::arg("dtype"), py::arg("size"), py::arg("x"), py::arg("second"), py::arg("tensors"), py::arg("p"),
      py::arg("seed"), py::arg("first_row"), py::arg("grad"), py::arg("d_x"), py::arg("d_second"), py::arg("out"),
      py::arg("d_tensors"), py::arg("threads"));
  m.def(
      "philox4x32_cpu",
      [](const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
        if (counter.size() != 4 || key.size() != 2)
          throw py::value_error("philox4x32_cpu: expected 4 counter and 2 key words, got " +
                                std::to_string(counter.size()) + " and " + std::to_string(key.size()));
        uint32_t words[4];
        philox4x32_cpu({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]}, words);
        return std::vector<uint32_t>(words, words + 4);
      },
      py::arg("counter"), py::arg("key"));
}

}  // namespace wavemix::bindings
