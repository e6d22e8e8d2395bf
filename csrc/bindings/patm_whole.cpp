// The Python face of the whole PATM: tensors are (address, four strides), the rest plain addresses.
#include "wavemix/patm_whole.h"

#include <iterator>
#include <tuple>

#include "bindings/patm.h"

namespace wavemix::bindings {
namespace {

// dtype, shape, x, scale, shift, by_image: what the whole PATM reads.
using ImageInts = std::tuple<int, Ints, Ints, uintptr_t, uintptr_t, bool>;

PatmArgs image_args(const ImageInts& ints) {
  const auto& [dtype, shape, x, scale, shift, by_image] = ints;
  auto args = shaped<PatmArgs>(dtype, shape);
  if ((scale == 0) != (shift == 0)) throw std::invalid_argument("scale, shift: expected both or neither");
  args.x = plane(x, "x", shape);
  args.scale = pointer(scale);
  args.shift = pointer(shift);
  args.by_image = by_image;
  return args;
}

constexpr const char* kPatmWeights[] = {
#define WAVEMIX_NAME(name) #name,
    WAVEMIX_PATM_WEIGHTS(WAVEMIX_NAME)
#undef WAVEMIX_NAME
};

// Addresses in the order of kPatmWeights, which Python compares with its own names at import.
template <class Address>
void read_weights(const std::vector<uintptr_t>& addresses, const char* name, PatmWeights<Address>& to) {
  if (addresses.size() != std::size(kPatmWeights))
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(std::size(kPatmWeights)) +
                                " addresses, got " + std::to_string(addresses.size()));
  size_t i = 0;
#define WAVEMIX_READ(name) to.name = pointer(addresses[i++]);
  WAVEMIX_PATM_WEIGHTS(WAVEMIX_READ)
#undef WAVEMIX_READ
}

PatmArgs whole_args(const ImageInts& ints, const std::vector<uintptr_t>& weights, int64_t hidden, bool residual,
                    uintptr_t path) {
  auto args = image_args(ints);
  read_weights(weights, "weights", args);
  args.hidden = hidden;
  args.residual = residual;
  args.path = pointer(path);
  return args;
}

}  // namespace

void bind_patm_whole(Module& m) {
  m.attr("PATM_WEIGHTS", std::vector<const char*>(std::begin(kPatmWeights), std::end(kPatmWeights)));
#if WAVEMIX_WITH_CPU
  m.def("patm_moments_cpu",
        [](const ImageInts& image, uintptr_t mean, uintptr_t covariance, int threads) {
          check_threads(threads);
          const auto args = image_args(image);
          const Unlocked unlocked;
          patm_moments_cpu(args, static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(covariance)),
                           threads);
        },
        {"image", "mean", "covariance", "threads"});
  m.def("patm_forward_cpu",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, bool residual, uintptr_t path,
           const Ints& out, uintptr_t branch_mean, int threads) {
          check_threads(threads);
          const auto args = whole_args(image, weights, hidden, residual, path);
          const auto to = plane(out, "out", std::get<1>(image));
          const Unlocked unlocked;
          patm_forward_cpu(args, to, pointer(branch_mean), threads);
        },
        {"image", "weights", "hidden", "residual", "path", "out", "branch_mean", "threads"});
  m.def("patm_backward_cpu",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, uintptr_t path,
           const Ints& grad, uintptr_t branch_mean, uintptr_t center, const Ints& d_image, bool wide,
           const std::vector<uintptr_t>& gradients, int threads) {
          check_threads(threads);
          const auto args = whole_args(image, weights, hidden, false, path);
          PatmGradArgs grads;
          read_weights(gradients, "gradients", grads);
          grads.grad = plane(grad, "grad", std::get<1>(image));
          grads.branch_mean = pointer(branch_mean);
          grads.center = pointer(center);
          grads.d_image = plane(d_image, "d_image", std::get<1>(image));
          grads.wide = wide;
          const Unlocked unlocked;
          patm_backward_cpu(args, grads, threads);
        },
        {"image", "weights", "hidden", "path", "grad", "branch_mean", "center", "d_image", "wide", "gradients",
         "threads"});
  m.def("patm_add_linear_cpu",
        [](const ImageInts& image, const Ints& partial, uintptr_t matrix, uintptr_t vector, const Ints& out,
           int threads) {
          check_threads(threads);
          const auto args = image_args(image);
          const auto& shape = std::get<1>(image);
          const auto from = plane(partial, "partial", shape), to = plane(out, "out", shape);
          const Unlocked unlocked;
          patm_add_linear_cpu(args, from, pointer(matrix), pointer(vector), to, threads);
        },
        {"image", "partial", "matrix", "vector", "out", "threads"});
#endif

#if WAVEMIX_WITH_CUDA
  m.def("patm_moments_workspace_cuda",
        [](const ImageInts& image, int multiprocessors) {
          return patm_moments_workspace_cuda(image_args(image), multiprocessors);
        },
        {"image", "multiprocessors"});
  m.def("patm_moments_cuda",
        [](const ImageInts& image, uintptr_t mean, uintptr_t covariance, uintptr_t workspace, int multiprocessors,
           uintptr_t stream) {
          const auto args = image_args(image);
          const Unlocked unlocked;
          patm_moments_cuda(args, static_cast<double*>(pointer(mean)), static_cast<double*>(pointer(covariance)),
                            pointer(workspace), multiprocessors, pointer(stream));
        },
        {"image", "mean", "covariance", "workspace", "multiprocessors", "stream"});
  m.def("patm_statistics_cuda",
        [](int dtype, int64_t c, uintptr_t mean, uintptr_t covariance, const std::vector<uintptr_t>& thetas,
           const std::vector<uintptr_t>& norms, const std::vector<double>& eps, uintptr_t out, uintptr_t stream) {
          if (thetas.size() != 4 || norms.size() != 4 || eps.size() != 2)
            throw std::invalid_argument("thetas, norms, eps: expected 4, 4 and 2 values");
          auto args = shaped<PatmArgs>(dtype, Ints{1, c, 1, 1});
          args.theta_h = pointer(thetas[0]);
          args.theta_h_bias = pointer(thetas[1]);
          args.theta_w = pointer(thetas[2]);
          args.theta_w_bias = pointer(thetas[3]);
          const auto vector = [&](size_t i) { return static_cast<const float*>(pointer(norms[i])); };
          const PatmStatisticsArgs of = {static_cast<const double*>(pointer(mean)),
                                         static_cast<const double*>(pointer(covariance)),
                                         {vector(0), vector(2)},
                                         {vector(1), vector(3)},
                                         {eps[0], eps[1]},
                                         static_cast<float*>(pointer(out))};
          const Unlocked unlocked;
          patm_statistics_cuda(args, of, pointer(stream));
        },
        {"dtype", "c", "mean", "covariance", "thetas", "norms", "eps", "out", "stream"});
  m.def("patm_through_statistics_cuda",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, uintptr_t mean, uintptr_t covariance,
           uintptr_t sums, int64_t sums_stride, uintptr_t invstd, uintptr_t matrix, uintptr_t vector, uintptr_t size,
           uintptr_t d_theta, uintptr_t stream) {
          const auto args = whole_args(image, weights, 0, false, 0);
          const PatmThroughArgs of = {static_cast<const double*>(pointer(mean)),
                                      static_cast<const double*>(pointer(covariance)),
                                      static_cast<const float*>(pointer(sums)),
                                      static_cast<const float*>(pointer(invstd)),
                                      sums_stride,
                                      pointer(matrix),
                                      static_cast<float*>(pointer(vector)),
                                      static_cast<float*>(pointer(size)),
                                      static_cast<float*>(pointer(d_theta))};
          const Unlocked unlocked;
          patm_through_statistics_cuda(args, of, pointer(stream));
        },
        {"image", "weights", "mean", "covariance", "sums", "sums_stride", "invstd", "matrix", "vector", "size",
         "d_theta", "stream"});
  m.def("patm_branch_weights_workspace_cuda",
        [](const ImageInts& image, int multiprocessors) {
          return patm_branch_weights_workspace_cuda(image_args(image), multiprocessors);
        },
        {"image", "multiprocessors"});
  m.def("patm_branch_weights_cuda",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, uintptr_t branch_mean,
           uintptr_t a, uintptr_t workspace, int multiprocessors, uintptr_t stream) {
          const auto args = whole_args(image, weights, hidden, false, 0);
          const Unlocked unlocked;
          patm_branch_weights_cuda(args, static_cast<float*>(pointer(branch_mean)), static_cast<float*>(pointer(a)),
                                   pointer(workspace), multiprocessors, pointer(stream));
        },
        {"image", "weights", "hidden", "branch_mean", "a", "workspace", "multiprocessors", "stream"});
  m.def("patm_shared_cuda", &patm_shared_cuda, {"c"});
  m.def("patm_mix_cuda",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, bool residual, uintptr_t path,
           uintptr_t a, const Ints& out, int multiprocessors, uintptr_t stream) {
          const auto args = whole_args(image, weights, hidden, residual, path);
          const auto to = view<Plane>(out, "out");
          const Unlocked unlocked;
          patm_mix_cuda(args, static_cast<const float*>(pointer(a)), to, multiprocessors, pointer(stream));
        },
        {"image", "weights", "hidden", "residual", "path", "a", "out", "multiprocessors", "stream"});
  m.def("patm_mixed_gradients_workspace_cuda",
        [](const ImageInts& image, int multiprocessors) {
          return patm_mixed_gradients_workspace_cuda(image_args(image), multiprocessors);
        },
        {"image", "multiprocessors"});
  m.def("patm_mixed_gradients_cuda",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, uintptr_t path,
           const Ints& grad, uintptr_t a, uintptr_t d_a, uintptr_t d_proj, uintptr_t workspace, int multiprocessors,
           uintptr_t stream) {
          const auto args = whole_args(image, weights, hidden, false, path);
          const auto from = plane(grad, "grad", std::get<1>(image));
          const Unlocked unlocked;
          patm_mixed_gradients_cuda(args, from, static_cast<const float*>(pointer(a)),
                                    static_cast<float*>(pointer(d_a)), static_cast<float*>(pointer(d_proj)),
                                    pointer(workspace), multiprocessors, pointer(stream));
        },
        {"image", "weights", "hidden", "path", "grad", "a", "d_a", "d_proj", "workspace", "multiprocessors", "stream"});
  m.def("patm_wave_gradients_workspace_cuda",
        [](const ImageInts& image, int multiprocessors) {
          return patm_wave_gradients_workspace_cuda(image_args(image), multiprocessors);
        },
        {"image", "multiprocessors"});
  m.def("patm_wave_gradients_cuda",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, uintptr_t path,
           const Ints& grad, uintptr_t a, uintptr_t d_mean, uintptr_t center, uintptr_t gradients, uintptr_t sums,
           uintptr_t workspace, int multiprocessors, uintptr_t stream) {
          const auto args = whole_args(image, weights, hidden, false, path);
          PatmWaveGradArgs grads;
          grads.grad = plane(grad, "grad", std::get<1>(image));
          grads.a = static_cast<const float*>(pointer(a));
          grads.d_mean = static_cast<const float*>(pointer(d_mean));
          grads.center = static_cast<const float*>(pointer(center));
          grads.gradients = pointer(gradients);
          grads.sums = static_cast<float*>(pointer(sums));
          const Unlocked unlocked;
          patm_wave_gradients_cuda(args, grads, pointer(workspace), multiprocessors, pointer(stream));
        },
        {"image", "weights", "hidden", "path", "grad", "a", "d_mean", "center", "gradients", "sums", "workspace",
         "multiprocessors", "stream"});
  m.def("patm_image_gradients_workspace_cuda",
        [](const ImageInts& image, int multiprocessors) {
          return patm_image_gradients_workspace_cuda(image_args(image), multiprocessors);
        },
        {"image", "multiprocessors"});
  m.def("patm_image_gradients_cuda",
        [](const ImageInts& image, const std::vector<uintptr_t>& weights, int64_t hidden, uintptr_t gradients,
           uintptr_t matrix, uintptr_t vector, uintptr_t size, uintptr_t d_theta, const Ints& d_image,
           uintptr_t d_weights, uintptr_t workspace, int multiprocessors, uintptr_t stream) {
          const auto args = whole_args(image, weights, hidden, false, 0);
          PatmImageGradArgs grads;
          grads.gradients = pointer(gradients);
          grads.matrix = pointer(matrix);
          grads.vector = static_cast<const float*>(pointer(vector));
          grads.size = static_cast<const float*>(pointer(size));
          grads.d_theta = static_cast<const float*>(pointer(d_theta));
          grads.d_image = view<Plane>(d_image, "d_image");
          grads.d_weights = static_cast<float*>(pointer(d_weights));
          const Unlocked unlocked;
          patm_image_gradients_cuda(args, grads, pointer(workspace), multiprocessors, pointer(stream));
        },
        {"image", "weights", "hidden", "gradients", "matrix", "vector", "size", "d_theta", "d_image", "d_weights",
         "workspace", "multiprocessors", "stream"});
#endif
}

}  // namespace wavemix::bindings
