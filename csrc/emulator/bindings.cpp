// The bindings of the families that have CUDA kernels, for modules that hold nothing else: the emulator's, and those
// that tests and predictions make.
#include "bindings/haar.cpp"
#include "bindings/module.cpp"
#include "bindings/patm.cpp"
#include "bindings/patm_whole.cpp"
#include "bindings/python.cpp"
#include "bindings/reduce_haar.cpp"
