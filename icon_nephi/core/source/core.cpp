// The whole library: one source, compiled once for each set of instructions.
#include "pool.cpp"
#include "model.cpp"
#include "sines.cpp"
#include "field.cpp"
#include "blocks.cpp"
#include "regularity.cpp"
#include "adam.cpp"
#include "search.cpp"
#include "features.cpp"
#include "dense.cpp"

// Of the functions and structs that Python calls; see icon_nephi/core/loading.py.
NEPHI_API int nephi_version() { return 4; }

// Asked of the baseline build, which runs on any processor.
NEPHI_API int nephi_has_avx2() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

// Of Intel's alone: on AMD's Zen 4, which does half a register at a time, the small
// field was a tenth slower than with AVX2.
NEPHI_API int nephi_has_avx512() {
#if defined(__x86_64__)
    return nephi_has_avx2() && __builtin_cpu_is("intel") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}
