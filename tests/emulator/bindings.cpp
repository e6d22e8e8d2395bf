#include <pybind11/pybind11.h>

#include <cstdint>

#include "kernels.h"

namespace py = pybind11;

namespace {
template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}
}  // namespace

PYBIND11_MODULE(_emulator_tests, m) {
  using namespace wavemix::test;
  m.def("run_wrong_kernel", [](const std::string& name, bool wrong, uintptr_t input, uintptr_t output, int count) {
    run_wrong_kernel(name, wrong, pointer<const float>(input), pointer<float>(output), count);
  });
  m.def("matmul_f16", [](uintptr_t a, uintptr_t b, uintptr_t d) {
    matmul_f16(pointer<const void>(a), pointer<const void>(b), pointer<float>(d));
  });
  m.def("matmul_bf16", [](uintptr_t a, uintptr_t b, uintptr_t d) {
    matmul_bf16(pointer<const void>(a), pointer<const void>(b), pointer<float>(d));
  });
  m.def("matmul_tf32", [](uintptr_t a, uintptr_t b, uintptr_t d) {
    matmul_tf32(pointer<const float>(a), pointer<const float>(b), pointer<float>(d));
  });
}
