// How well an image agrees with values at points under many affine maps: see the search
// of icon_nephi's affine.
#include <algorithm>
#include <vector>

#include "images.hpp"
#include "pool.hpp"

namespace nephi {
namespace {

constexpr int64_t MAPS = 16;  // a task

struct Search {
    int64_t channels, count;
    const float *points, *target, *image;
    const int64_t* size;
};

// Arrays of one number a point, padded to whole registers.
template <int D>
struct Found {
    int padded_count;
    std::vector<float> memory;
    std::vector<int32_t> voxels;
    float *point[D], *moved[D], *weight, *values, *target;
    Spots<D> spots;

    explicit Found(const Search& s)
        : padded_count(int((s.count + LANES - 1) / LANES * LANES)),
          memory(size_t(padded_count) * (4 * D + 2 + s.channels), 0.0f),
          voxels(size_t(padded_count), 0) {
        float* next = memory.data();
        for (float** group : {point, moved, spots.share, spots.steps})
            for (int a = 0; a < D; a++, next += padded_count) group[a] = next;
        weight = next;
        values = weight + padded_count;
        target = values + padded_count;
        spots.voxel = voxels.data();
        for (int64_t p = 0; p < s.count; p++)
            for (int a = 0; a < D; a++) point[a][p] = s.points[p * D + a];
        for (int64_t c = 0; c < s.channels; c++)
            std::copy_n(s.target + c * s.count, s.count, target + c * padded_count);
    }
};

// Correlation of v and t at points with weights 0 or 1, `total` of them.
inline float correlation(const float* v, const float* t, const float* w, int count,
                         float total) {
    vec sum_v{}, sum_t{}, vv{}, tt{}, vt{};
    for (int k = 0; k < count; k += LANES) {
        sum_v += load(v + k) * load(w + k);
        sum_t += load(t + k) * load(w + k);
    }
    const float mean_v = sum_of(sum_v) / total, mean_t = sum_of(sum_t) / total;
    for (int k = 0; k < count; k += LANES) {
        const vec a = (load(v + k) - mean_v) * load(w + k);
        const vec b = (load(t + k) - mean_t) * load(w + k);
        vv += a * a;
        tt += b * b;
        vt += a * b;
    }
    return sum_of(vt) / std::sqrt(sum_of(vv) * sum_of(tt) + 1e-12f);
}

template <int D>
float rate(const Search& s, const float* matrix, Found<D>& f) {
    const vec one = splat(1.0f), zero{};
    vec inside{};
    for (int k = 0; k < f.padded_count; k += LANES) {
        veci in = (veci{} == 0);
        for (int a = 0; a < D; a++) {
            const float* row = matrix + a * (D + 1);
            vec y = splat(row[D]);
            for (int b = 0; b < D; b++) y += load(f.point[b] + k) * row[b];
            store(f.moved[a] + k, y);
            in &= (y >= zero) & (y <= one);
        }
        vec tag = in ? one : zero;
        for (int i = 0; i < LANES; i++)
            if (k + i >= s.count) tag[i] = 0.0f;
        store(f.weight + k, tag);
        inside += tag;
    }
    locate<D>(f.moved, f.padded_count, s.size, f.spots);
    const float found = sum_of(inside), total = std::max(found, 1.0f);
    const int64_t voxels = product(s.size, D);
    float agreement = 0.0f;
    for (int64_t c = 0; c < s.channels; c++) {
        read_channel<D>(s.image + c * voxels, s.size, f.spots, f.padded_count, f.values,
                        nullptr);
        agreement += correlation(f.values, f.target + c * f.padded_count, f.weight,
                                 f.padded_count, total);
    }
    return agreement / float(s.channels) * std::sqrt(found / float(s.count));
}

}  // namespace
}  // namespace nephi

using namespace nephi;

// Scores [maps] of matrices [maps, D, D + 1], points [count, D] -> the image's unit box:
// mean correlation of the image there and of targets [channels, count], times the root
// of the share of points inside.
NEPHI_API int nephi_rate(int64_t dimension, int64_t channels, int64_t count, int64_t maps,
                         const float* matrices, const float* points, const float* target,
                         const float* image, const int64_t* size, int64_t threads,
                         float* scores) {
    return answered([&] {
        require(channels >= 1 && channels <= 4096, WRONG_SIZE);
        require(count >= 1 && count <= MOST / 64 && maps >= 0, WRONG_SIZE);
        require(points && target && image && size, MISSING);
        require(maps == 0 || (matrices && scores), MISSING);
        by_dimension(dimension, [&](auto d) {
            constexpr int D = decltype(d)::value;
            check_image(size, D);
            const Search search{channels, count, points, target, image, size};
            run((maps + MAPS - 1) / MAPS, threads, [&](int64_t task, int) {
                Found<D> found(search);
                for (int64_t m = task * MAPS; m < std::min(maps, (task + 1) * MAPS); m++)
                    scores[m] = rate<D>(search, matrices + m * D * (D + 1), found);
            });
        });
    });
}
