// For x86-64 processors with AVX2 and FMA.
#include "core.cpp"

// See baseline.cpp.
NEPHI_API void* PyInit__avx2() { return nullptr; }
