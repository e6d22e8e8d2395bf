// The Python face of the pointwise MLP: matrices are (address, row stride), arrays by channel plain addresses.
#include "wavemix/mlp.h"

#include "bindings/common.h"

namespace wavemix::bindings {
namespace {

MlpArgs mlp_args(int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p,
                 uint64_t seed, int64_t first_row, int threads) {
  if (size.size() != 5) throw std::invalid_argument("size: expected (rows, a, b, k, o)");
  if (tensors.size() != 6) throw std::invalid_argument("tensors: expected scale, shift, w1, b1, w2 and b2");
  if (!(p >= 0.0 && p <= 1.0))
    throw std::invalid_argument("p: expected a probability, 0 to 1, got " + std::to_string(p));
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

void bind_mlp(Module& m) {
  m.def("mlp_forward_cpu",
        [](int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p, uint64_t seed,
           int64_t first_row, const Ints& out, int threads) {
          const auto args = mlp_args(dtype, size, x, second, tensors, p, seed, first_row, threads);
          const auto to = matrix(out, "out");
          const Unlocked unlocked;
          mlp_forward_cpu(args, to, threads);
        },
        {"dtype", "size", "x", "second", "tensors", "p", "seed", "first_row", "out", "threads"});
  m.def("mlp_backward_cpu",
        [](int dtype, const Ints& size, const Ints& x, const Ints& second, const Ints& tensors, double p, uint64_t seed,
           int64_t first_row, const Ints& grad, const Ints& d_x, const Ints& d_second, const Ints& out,
           const Ints& d_tensors, int threads) {
          const auto args = mlp_args(dtype, size, x, second, tensors, p, seed, first_row, threads);
          if (d_tensors.size() != 4) throw std::invalid_argument("d_tensors: expected those of w1, b1, w2 and b2");
          MlpGradArgs grads;
          grads.grad = matrix(grad, "grad");
          grads.d_x = matrix(d_x, "d_x");
          grads.d_second = matrix(d_second, "d_second");
          grads.out = matrix(out, "out");
          void** slots[] = {&grads.d_w1, &grads.d_b1, &grads.d_w2, &grads.d_b2};
          for (size_t i = 0; i < 4; ++i) *slots[i] = pointer(d_tensors[i]);
          const Unlocked unlocked;
          mlp_backward_cpu(args, grads, threads);
        },
        {"dtype", "size", "x", "second", "tensors", "p", "seed", "first_row", "grad", "d_x", "d_second", "out",
         "d_tensors", "threads"});
  m.def("philox4x32_cpu",
        [](const std::vector<uint32_t>& counter, const std::vector<uint32_t>& key) {
          if (counter.size() != 4 || key.size() != 2)
            throw std::invalid_argument("philox4x32_cpu: expected 4 counter and 2 key words, got " +
                                        std::to_string(counter.size()) + " and " + std::to_string(key.size()));
          uint32_t words[4];
          philox4x32_cpu({counter[0], counter[1], counter[2], counter[3]}, {key[0], key[1]}, words);
          return std::vector<uint32_t>(words, words + 4);
        },
        {"counter", "key"});
}

}  // namespace wavemix::bindings
