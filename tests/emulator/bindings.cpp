#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

PYBIND11_MODULE(_emulator_tests, m) {
  using namespace wavemix::test;
  m.def("run_wrong_kernel", [](const std::string& name, bool wrong, uintptr_t input, uintptr_t output, int count) {
    run_wrong_kernel(name, wrong, reinterpret_cast<const float*>(input), reinterpret_cast<float*>(output), count);
  });
  const auto matmul = [&m](const char* name, void (*function)(const void*, const void*, float*)) {
    m.def(name, [function](uintptr_t a, uintptr_t b, uintptr_t d) {
      function(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), reinterpret_cast<float*>(d));
    });
  };
  matmul("matmul_f16", matmul_f16);
  matmul("matmul_bf16", matmul_bf16);
  matmul("matmul_tf32", matmul_tf32);
}
