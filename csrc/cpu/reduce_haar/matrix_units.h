// The 1x1 convolution and its Haar levels by matrix units: see matrix_units.cpp. choose.h says when.
#pragma once

#include "wavemix/reduce_haar.h"

namespace wavemix {
namespace WAVEMIX_ISA {

void reduce_haar_matrix_units(const ReduceHaarArgs& args, int threads);

}  // namespace WAVEMIX_ISA
}  // namespace wavemix
