// Self-similarity of an image with itself: with_features of icon_nephi's features.
//
// An image of two dimensions is one plane of three: means over equal planes are those of
// one. Slabs of planes are the tasks; a slab reads the planes beside it again.
#include <algorithm>
#include <vector>

#include "images.hpp"
#include "pool.hpp"

namespace nephi {
namespace {

constexpr int64_t REACH = 2, SLAB = 8;

struct Side {
    int axis, sign;
};

struct Planes {
    int64_t dimension, channels, size[3];
    const float* image;
    std::vector<float> around;  // [channels][size + 2 REACH], borders repeated
    int64_t wide[3], step[3];
    std::vector<std::pair<Side, Side>> pairs;

    int64_t plane() const { return size[1] * size[2]; }
    int64_t voxels() const { return size[0] * plane(); }
};

inline int64_t clamped(int64_t i, int64_t n) { return i < 0 ? 0 : i >= n ? n - 1 : i; }

Planes make_planes(int64_t dimension, int64_t channels, const int64_t* size,
                   const float* image) {
    Planes s{};
    s.dimension = dimension;
    s.channels = channels;
    s.image = image;
    s.size[0] = 1;
    std::copy_n(size, dimension, s.size + 3 - dimension);
    for (int a = 0; a < 3; a++) s.wide[a] = s.size[a] + 2 * REACH;
    s.step[2] = 1;
    s.step[1] = s.wide[2];
    s.step[0] = s.wide[1] * s.wide[2];
    s.around.resize(size_t(channels * s.wide[0] * s.step[0]));
    float* to = s.around.data();
    for (int64_t c = 0; c < channels; c++)
        for (int64_t x = 0; x < s.wide[0]; x++)
            for (int64_t y = 0; y < s.wide[1]; y++) {
                const float* row = image + ((c * s.size[0] + clamped(x - REACH, s.size[0])) *
                                                s.size[1] +
                                            clamped(y - REACH, s.size[1])) *
                                               s.size[2];
                for (int64_t z = 0; z < s.wide[2]; z++)
                    *to++ = row[clamped(z - REACH, s.size[2])];
            }
    std::vector<Side> sides;
    for (int a = int(3 - dimension); a < 3; a++)
        for (int sign : {1, -1}) sides.push_back({a, sign});
    for (size_t i = 0; i < sides.size(); i++)
        for (size_t j = i + 1; j < sides.size(); j++)
            if (sides[i].axis != sides[j].axis) s.pairs.push_back({sides[i], sides[j]});
    return s;
}

// Squared differences of two places beside the voxels of a plane.
void differences(const Planes& s, const std::pair<Side, Side>& pair, int64_t x,
                 float* to) {
    const int64_t first = pair.first.sign * REACH * s.step[pair.first.axis];
    const int64_t other = pair.second.sign * REACH * s.step[pair.second.axis];
    std::fill_n(to, s.plane(), 0.0f);
    for (int64_t c = 0; c < s.channels; c++)
        for (int64_t y = 0; y < s.size[1]; y++) {
            const float* at = s.around.data() + (c * s.wide[0] + x + REACH) * s.step[0] +
                              (y + REACH) * s.step[1] + REACH;
            float* row = to + y * s.size[2];
            for (int64_t z = 0; z < s.size[2]; z++) {
                const float apart = at[z + first] - at[z + other];
                row[z] += apart * apart;
            }
        }
}

// Sums of 3 by 3 voxels of a plane, borders repeated.
void sum_around(const Planes& s, const float* from, float* rows, float* to) {
    const int64_t ny = s.size[1], nz = s.size[2];
    for (int64_t y = 0; y < ny; y++) {
        const float* f = from + y * nz;
        float* r = rows + y * nz;
        for (int64_t z = 1; z + 1 < nz; z++) r[z] = f[z - 1] + f[z] + f[z + 1];
        r[0] = f[0] + f[0] + f[1];
        r[nz - 1] = f[nz - 2] + f[nz - 1] + f[nz - 1];
    }
    for (int64_t y = 0; y < ny; y++) {
        const float *a = rows + clamped(y - 1, ny) * nz, *b = rows + y * nz;
        const float* c = rows + clamped(y + 1, ny) * nz;
        for (int64_t z = 0; z < nz; z++) to[y * nz + z] = a[z] + b[z] + c[z];
    }
}

// [pairs][voxels]: mean squared differences, of planes [begin, end).
void measure(const Planes& s, int64_t begin, int64_t end, float* found) {
    const int64_t plane = s.plane();
    std::vector<float> memory(size_t(plane) * 5);
    float *apart = memory.data(), *rows = apart + plane, *ring = rows + plane;
    for (size_t pair = 0; pair < s.pairs.size(); pair++) {
        int64_t known = -1;  // the last plane in the ring
        for (int64_t x = begin; x < end; x++) {
            for (int64_t p = std::max(known + 1, clamped(x - 1, s.size[0]));
                 p <= clamped(x + 1, s.size[0]); p++, known = p - 1) {
                differences(s, s.pairs[pair], p, apart);
                sum_around(s, apart, rows, ring + p % 3 * plane);
            }
            const float* a = ring + clamped(x - 1, s.size[0]) % 3 * plane;
            const float* b = ring + x % 3 * plane;
            const float* c = ring + clamped(x + 1, s.size[0]) % 3 * plane;
            float* to = found + int64_t(pair) * s.voxels() + x * plane;
            for (int64_t i = 0; i < plane; i++) to[i] = (a[i] + b[i] + c[i]) * (1.0f / 27.0f);
        }
    }
}

// e^x to 1e-7, x not above zero.
NEPHI_INLINE vec falling_exp(vec x) {
    x = x < -80.0f ? splat(-80.0f) : x;
    const float magic = 12582912.0f;
    vec k = x * 1.44269504f + magic;
    typedef uint32_t vecu __attribute__((vector_size(4 * LANES), may_alias));
    const vecu shift = (vecu)k << 23;
    k = k - magic;
    const vec f = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    vec p = f * (1.0f / 5040.0f) + 1.0f / 720.0f;
    for (float c : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f})
        p = p * f + c;
    return (vec)((vecu)p + shift);
}

// Of voxels [begin, end): less the least, and the sum of their means over the channels.
double lower(const Planes& s, int64_t begin, int64_t end, float* found, float* spread) {
    const int64_t n = s.voxels(), count = int64_t(s.pairs.size());
    double total = 0.0;
    for (int64_t i = begin; i < end; i++) {
        float low = found[i], sum = 0.0f;
        for (int64_t c = 1; c < count; c++) low = std::min(low, found[c * n + i]);
        for (int64_t c = 0; c < count; c++) sum += found[c * n + i] -= low;
        spread[i] = sum / float(count);
        total += spread[i];
    }
    return total;
}

// Of voxels [begin, end): the image and the features, beside each other.
void write(const Planes& s, int64_t begin, int64_t end, float floor_, const float* found,
           const float* spread, float* out) {
    const int64_t n = s.voxels(), count = int64_t(s.pairs.size());
    const int64_t pitch = s.channels + count;
    for (int64_t i = begin; i < end; i++)
        for (int64_t c = 0; c < s.channels; c++) out[i * pitch + c] = s.image[c * n + i];
    for (int64_t c = 0; c < count; c++)
        for (int64_t i = begin; i < end; i += LANES) {
            float lane[LANES] = {};
            const int64_t some = std::min<int64_t>(LANES, end - i);
            for (int64_t k = 0; k < some; k++)
                lane[k] = -found[c * n + i + k] / std::max(spread[i + k], floor_);
            store(lane, falling_exp(load(lane)));
            for (int64_t k = 0; k < some; k++)
                out[(i + k) * pitch + s.channels + c] = lane[k];
        }
}

void find_features(const Planes& s, int64_t threads, float* out) {
    const int64_t slabs = (s.size[0] + SLAB - 1) / SLAB, plane = s.plane();
    std::vector<float> found(s.pairs.size() * size_t(s.voxels()), 0.0f);
    std::vector<float> spread(size_t(s.voxels()), 0.0f);
    std::vector<double> parts(size_t(slabs), 0.0);
    auto begin = [&](int64_t slab) { return std::min(slab * SLAB, s.size[0]); };
    run(slabs, threads, [&](int64_t slab, int) {
        measure(s, begin(slab), begin(slab + 1), found.data());
        parts[slab] = lower(s, begin(slab) * plane, begin(slab + 1) * plane, found.data(),
                            spread.data());
    });
    double total = 0.0;
    for (double part : parts) total += part;
    const float least = float(1e-3 * total / double(s.voxels()) + 1e-12);
    run(slabs, threads, [&](int64_t slab, int) {
        write(s, begin(slab) * plane, begin(slab + 1) * plane, least, found.data(),
              spread.data(), out);
    });
}

}  // namespace
}  // namespace nephi

using namespace nephi;

// [*size, channels + features] of [channels, *size]; 12 features, in 2D 4.
NEPHI_API int nephi_features(int64_t dimension, int64_t channels, const int64_t* size,
                             const float* image, int64_t threads, float* out) {
    return answered([&] {
        require(dimension == 2 || dimension == 3, NOT_SUPPORTED);
        require(channels >= 1 && channels <= 4096, WRONG_SIZE);
        require(size && image && out, MISSING);
        check_image(size, dimension);
        find_features(make_planes(dimension, channels, size, image), threads, out);
    });
}

// [voxels, stored] numbers of 16 bits, of `count` channels between 0 and 1 that lie
// `step` apart, the voxels `pitch`; the rest zero.
NEPHI_API int nephi_pack(int64_t voxels, int64_t count, int64_t pitch, int64_t step,
                         const float* from, int64_t stored, uint16_t* to) {
    return answered([&] {
        require(voxels >= 0 && voxels <= MOST && count >= 0 && stored >= count, WRONG_SIZE);
        require(stored <= 4096 && pitch >= 0 && step >= 0, WRONG_SIZE);
        require(voxels == 0 || (from && to), MISSING);
        for (int64_t i = 0; i < voxels; i++, from += pitch, to += stored)
            for (int64_t c = 0; c < stored; c++) {
                const float v = c < count ? from[c * step] : 0.0f;
                to[c] = uint16_t(v > 0.0f ? (v < 1.0f ? v * 65535.0f + 0.5f : 65535.0f) : 0.0f);
            }
    });
}
