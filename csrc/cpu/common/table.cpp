// One instruction set's table of kernels (isa.h).
#include "cpu/isa.h"

namespace wavemix {
namespace WAVEMIX_ISA {

extern const CpuKernels kernels = {
#define KERNEL(name, parameters, arguments) name,
#include "cpu/kernels.def"
};

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
