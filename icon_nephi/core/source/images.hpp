// Reading images between their voxels, multilinearly, with the gradient.
//
// As torch's grid_sample with align_corners and padding by the border, rounding
// included: places are in the unit box, voxel i of n at i / (n - 1).
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "errors.hpp"
#include "vectors.hpp"

namespace nephi {

// Where samples lie: the first voxel of each one's cell, the share of the way through it
// by axis, and what a step in the unit box is in voxels (0 beyond the border).
template <int D>
struct Spots {
    float* share[D];
    float* steps[D];
    int32_t* voxel;
};

// Of places x[axis][count], count a multiple of LANES. What is not a number stays none,
// at a voxel that exists.
template <int D>
inline void locate(float* const* x, int count, const int64_t* size, const Spots<D>& to) {
    for (int k = 0; k < count; k += LANES) {
        veci voxel{};
        for (int a = 0; a < D; a++) {
            const float n = float(size[a] - 1);
            const vec top = splat(n), last = splat(n - 1.0f), zero{};
            const vec moved = 2.0f * load(x[a] + k) - 1.0f;
            vec t = D == 3 ? (moved + 1.0f) * 0.5f * top : (moved + 1.0f) * (top * 0.5f);
            const vec none = t == t ? zero : t;
            store(to.steps[a] + k, (t > zero) & (t < top) ? top : zero);
            t = t > zero ? t : zero;
            t = least(t, top);
            const veci cell = whole(least(t, last));
            store(to.share[a] + k, t - as_float(cell) + none);
            voxel = voxel * int32_t(size[a]) + cell;
        }
        std::memcpy(to.voxel + k, &voxel, sizeof(voxel));
    }
}

// From the values at a cell's corners, the last axis the quickest, the value inside and
// with gradient not null its derivatives, by voxel.
template <int D, class V, class S>
NEPHI_INLINE V interpolate(const V* c, const S* f, V* gradient);

template <class V, class S>
NEPHI_INLINE V interpolate_square(const V* c, const S* f, V* gradient) {
    const V low = c[1] - c[0], high = c[3] - c[2];
    const V a = c[0] + f[1] * low, b = c[2] + f[1] * high;
    if (gradient) {
        gradient[0] = b - a;
        gradient[1] = low + f[0] * (high - low);
    }
    return a + f[0] * (b - a);
}

template <int D, class V, class S>
NEPHI_INLINE V interpolate(const V* c, const S* f, V* gradient) {
    if constexpr (D == 2) {
        return interpolate_square(c, f, gradient);
    } else {
        V low[2], high[2];
        const V a = interpolate_square(c, f + 1, gradient ? low : nullptr);
        const V b = interpolate_square(c + 4, f + 1, gradient ? high : nullptr);
        if (gradient) {
            gradient[0] = b - a;
            gradient[1] = low[0] + f[0] * (high[0] - low[0]);
            gradient[2] = low[1] + f[0] * (high[1] - low[1]);
        }
        return a + f[0] * (b - a);
    }
}

// Offsets of a cell's corners from its first voxel, in voxels.
template <int D>
inline void corner_offsets(const int64_t* size, int64_t* offset) {
    for (int c = 0; c < 1 << D; c++) {
        int64_t at = 0;
        for (int a = 0; a < D; a++) at = at * size[a] + ((c >> (D - 1 - a)) & 1);
        offset[c] = at;
    }
}

// One channel at `count` spots (a multiple of LANES): values, and where `gradient` is
// not null the derivatives by place.
template <int D>
inline void read_channel(const float* image, const int64_t* size, const Spots<D>& spots,
                         int count, float* values, float* const* gradient) {
    int64_t offset[1 << D];
    corner_offsets<D>(size, offset);
    for (int k = 0; k < count; k += LANES) {
        vec corner[1 << D], share[D], slope[D];
        for (int c = 0; c < 1 << D; c++) {
            float lane[LANES];
            for (int i = 0; i < LANES; i++) lane[i] = image[spots.voxel[k + i] + offset[c]];
            corner[c] = load(lane);
        }
        for (int a = 0; a < D; a++) share[a] = load(spots.share[a] + k);
        store(values + k, interpolate<D>(corner, share, gradient ? slope : nullptr));
        if (gradient)
            for (int a = 0; a < D; a++)
                store(gradient[a] + k, slope[a] * load(spots.steps[a] + k));
    }
}

// Channels beside each other, as numbers of 32 bits or of 16 (65535: one).
NEPHI_INLINE vec load_channels(const float* p) { return load(p); }

NEPHI_INLINE vec load_channels(const uint16_t* p) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256((const __m256i*)p);
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(half)) * (1.0f / 65535.0f);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128((const __m128i*)p);
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(half)) * (1.0f / 65535.0f);
#elif defined(__SSE2__)
    const __m128i half = _mm_loadl_epi64((const __m128i*)p);
    const __m128i whole = _mm_unpacklo_epi16(half, _mm_setzero_si128());
    return (vec)_mm_cvtepi32_ps(whole) * (1.0f / 65535.0f);
#else
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = p[i] * (1.0f / 65535.0f);
    return v;
#endif
}

// LANES channels from `part` on at a spot.
template <int D, class T>
NEPHI_INLINE vec read_channels(const T* image, int stored, const int64_t* offset,
                               const Spots<D>& spots, int k, int part, vec* gradient) {
    const T* first = image + int64_t(spots.voxel[k]) * stored + part;
    vec corner[1 << D];
    float share[D];
    for (int c = 0; c < 1 << D; c++) corner[c] = load_channels(first + offset[c] * stored);
    for (int a = 0; a < D; a++) share[a] = spots.share[a][k];
    return interpolate<D>(corner, share, gradient);
}

// Asks the memory for what `count` spots read, rows along the last axis at once.
template <int D, class T>
inline void fetch(const T* image, int stored, const int64_t* offset, const Spots<D>& spots,
                  int count) {
    for (int k = 0; k < count; k++)
        for (int c = 0; c < 1 << D; c += 2) {
            const T* at = image + (int64_t(spots.voxel[k]) + offset[c]) * stored;
            __builtin_prefetch(at);
            __builtin_prefetch(at + stored);
        }
}

inline void check_image(const int64_t* size, int64_t dimension) {
    for (int64_t a = 0; a < dimension; a++) require(size[a] >= 2, WRONG_SIZE);
    product(size, dimension);
}

}  // namespace nephi
