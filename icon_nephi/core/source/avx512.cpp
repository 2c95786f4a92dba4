// For Intel's x86-64 processors with AVX-512.
#include "core.cpp"

// See baseline.cpp.
NEPHI_API void* PyInit__avx512() { return nullptr; }
