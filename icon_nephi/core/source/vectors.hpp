// Vectors of floats, as wide as the build's registers, and the few functions of them.
//
// The width is a macro of each build: GCC's target_clones would compile one width for
// all, and 8-wide code on 4-wide registers is several times slower.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define NEPHI_INLINE static inline __attribute__((always_inline))

namespace nephi {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Sizes of rows are padded to this, which is two registers in any build.
constexpr int PAD = 2 * (LANES > 8 ? LANES : 8);

typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__AVX2__)
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
#endif
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t veci __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

constexpr int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

template <class V = vec>
NEPHI_INLINE V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

template <class V>
NEPHI_INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof(V));
}

NEPHI_INLINE vec splat(float x) { return x - vec{}; }

NEPHI_INLINE float sum_of(vec4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }

#if defined(__AVX2__)
NEPHI_INLINE float sum_of(vec8 v) {
    vec4 half[2];
    std::memcpy(half, &v, sizeof(v));
    return sum_of(half[0] + half[1]);
}
#endif

#if defined(__AVX512F__)
NEPHI_INLINE float sum_of(vec v) {
    vec8 half[2];
    std::memcpy(half, &v, sizeof(v));
    return sum_of(half[0] + half[1]);
}
#endif

NEPHI_INLINE vec least(vec a, vec b) { return a < b ? a : b; }

// Toward zero, of numbers that an int32 holds.
NEPHI_INLINE veci whole(vec v) { return __builtin_convertvector(v, veci); }

NEPHI_INLINE vec as_float(veci v) { return __builtin_convertvector(v, vec); }

NEPHI_INLINE bool finite(float x) { return std::isfinite(x); }

// Sine and cosine to 1e-7 for |x| < 12,000, by Cody and Waite's reduction: the first
// parts of pi / 2 have so few bits that their products are exact.
NEPHI_INLINE void sine_cosine(vec x, vec& sine, vec& cosine) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
    vec turns = x * 0.63661977236758134f + magic;
    const veci quarter = (veci)turns;
    turns = turns - magic;
    vec r = x - turns * 1.5703125f;
    r = r - turns * 4.837512969970703125e-4f;
    r = r - turns * 7.54978995489188216e-8f;
    const vec z = r * r;
    vec s = -1.9515295891e-4f * z + 8.3321608736e-3f;
    s = (s * z - 1.6666654611e-1f) * z * r + r;
    vec c = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
    c = (c * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
    const veci odd = (quarter & 1) != 0;
    const veci a = odd ? (veci)c : (veci)s, b = odd ? (veci)s : (veci)c;
    const veci one = veci{} + 1, two = veci{} + 2;
    // The sign, shifted as unsigned: shifting into the sign bit is not defined.
    typedef uint32_t vecu __attribute__((vector_size(4 * LANES), may_alias));
    const vecu flip_s = (vecu)(quarter & two) << 30;
    const vecu flip_c = (vecu)((quarter + one) & two) << 30;
    sine = (vec)(a ^ (veci)flip_s);
    cosine = (vec)(b ^ (veci)flip_c);
}

}  // namespace nephi
