#include <cstdint>
#include <string>

#include "bindings/python.cpp"
#include "kernels.h"

namespace {

template <void (*function)(const void*, const void*, float*)>
void matmul(uintptr_t a, uintptr_t b, uintptr_t d) {
  function(reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), reinterpret_cast<float*>(d));
}

}  // namespace

WAVEMIX_MODULE(_emulator_tests, "Kernels that test the emulator") {
  using namespace wavemix::test;
  m.def("run_wrong_kernel",
        [](const std::string& name, bool wrong, uintptr_t input, uintptr_t output, int count) {
          run_wrong_kernel(name, wrong, reinterpret_cast<const float*>(input), reinterpret_cast<float*>(output), count);
        },
        {"name", "wrong", "input", "output", "count"});
  m.def("matmul_f16", &matmul<matmul_f16>, {"a", "b", "d"});
  m.def("matmul_bf16", &matmul<matmul_bf16>, {"a", "b", "d"});
  m.def("matmul_tf32", &matmul<matmul_tf32>, {"a", "b", "d"});
}
