// The similarity of small blocks of samples: correlation of intensities, and the mean
// squared difference of features, with the gradient by where the map takes them.
//
// See icon_nephi's PatchNCC, FeatureDifference and patch_maps. Of a block all stays in
// the first cache; blocks are shared out, and what they add is added up in their order.
#include <algorithm>
#include <utility>
#include <vector>

#include "images.hpp"
#include "pool.hpp"

extern "C" {

struct NephiImage {
    const float* intensities;  // [channels, *size]
    const void* features;      // [*size, stored], see `bits`
    const uint8_t* counts;     // [*size]: 0 where a voxel does not; null: all do
    int64_t size[3];
};

struct NephiBlocks {
    int64_t bytes;
    int64_t dimension, count, samples;  // of a block
    int64_t places;                     // of a block, where the map is evaluated
    int64_t channels, features, stored, bits;
    int64_t form;  // of the correlation: 0 plain, 1 squared, 2 with the floor shared
    const float* centres;  // [count, D]
    const float* offsets;  // [D, samples]: from the centre
    const float* corners;  // [D, places]: those of the places; null: the samples
    const float* shares;   // [places, samples]: what of a place's move a sample makes
    const float* post;     // [D, D + 1]: applied to the places' moves
    NephiImage moving, fixed;
    float floor, weight;
};
}

namespace nephi {
namespace {

constexpr int64_t BLOCK_SHARES = 16;
constexpr int64_t MOST_SAMPLES = 1 << 20;

struct Totals {
    double agreement = 0, share = 0, error = 0, inside = 0;
};

// Arrays of one number a sample, padded to whole registers.
template <int D>
struct Scratch {
    const int padded_samples;
    std::vector<float> memory;
    std::vector<int32_t> voxels;
    float *offset[D], *at[D], *moved[D], *place[D], *slope[D], *total[D], *error[D];
    float *tag, *a, *b, *valid;
    std::vector<float> shares;  // [places][padded samples]
    Spots<D> moving, fixed;

    explicit Scratch(const NephiBlocks& s)
        : padded_samples(int((s.samples + LANES - 1) / LANES * LANES)),
          memory(size_t(padded_samples) * (11 * D + 4), 0.0f),
          voxels(size_t(padded_samples) * 2, 0) {
        float* next = memory.data();
        auto take = [&] { return std::exchange(next, next + padded_samples); };
        for (float** group : {offset, at, moved, place, slope, total, error, moving.share,
                              moving.steps, fixed.share, fixed.steps})
            for (int i = 0; i < D; i++) group[i] = take();
        for (float** one : {&tag, &a, &b, &valid}) *one = take();
        moving.voxel = voxels.data();
        fixed.voxel = voxels.data() + padded_samples;
        const int64_t count = s.samples;
        for (int i = 0; i < D; i++) std::copy_n(s.offsets + i * count, count, offset[i]);
        std::fill_n(valid, count, 1.0f);
        if (s.corners == nullptr) return;
        shares.assign(size_t(s.places) * padded_samples, 0.0f);
        for (int64_t c = 0; c < s.places; c++)
            std::copy_n(s.shares + c * count, count, &shares[c * padded_samples]);
    }
};

// phi of a place: post (at + u).
template <int D>
NEPHI_INLINE void apply_post(const float* post, const float* at, const float* u, float* to) {
    for (int i = 0; i < D; i++) {
        float y = post[i * (D + 1) + D];
        for (int j = 0; j < D; j++) y += post[i * (D + 1) + j] * (at[j] + u[j]);
        to[i] = y;
    }
}

// Samples of a block, where the map takes them, and which of both lie in the images.
template <int D>
void place_samples(const NephiBlocks& s, int64_t block, const float* at, const float* u,
                   Scratch<D>& w) {
    const float* centre = s.centres + block * D;
    for (int64_t c = 0; c < s.places; c++) {
        float phi[D];
        const int64_t row = (block * s.places + c) * D;
        apply_post<D>(s.post, at + row, u + row, phi);
        for (int a = 0; a < D; a++)
            w.place[a][c] =
                s.corners ? phi[a] - (centre[a] + s.corners[a * s.places + c]) : phi[a];
    }
    const vec one = splat(1.0f), zero{};
    for (int k = 0; k < w.padded_samples; k += LANES) {
        veci in = (veci{} == 0);
        for (int a = 0; a < D; a++) {
            const vec x = load(w.offset[a] + k) + centre[a];
            vec y = load(w.place[a] + k);
            if (s.corners) {
                vec move{};
                for (int64_t c = 0; c < s.places; c++)
                    move += load(&w.shares[c * w.padded_samples + k]) * w.place[a][c];
                y = x + move;
            }
            store(w.at[a] + k, x);
            store(w.moved[a] + k, y);
            in &= (x >= zero) & (x <= one) & (y >= zero) & (y <= one);
        }
        store(w.tag + k, in ? load(w.valid + k) : zero);
    }
}

// Samples whose nearest voxel does not count are no longer inside.
template <int D>
void leave_out(const NephiImage& image, const Spots<D>& spots, int count, float* tag) {
    if (image.counts == nullptr) return;
    for (int k = 0; k < count; k++) {
        int64_t voxel = spots.voxel[k], step = 1;
        for (int a = D - 1; a >= 0; step *= image.size[a--])
            if (spots.share[a][k] > 0.5f) voxel += step;
        if (image.counts[voxel] == 0) tag[k] = 0.0f;
    }
}

// a and b become their differences from their means inside; returns the correlation, the
// floor added to both variances and `shared` to the covariance, and in `by` what makes its
// derivatives by a: by[0] b + by[1] a.
inline float correlate(const float* tag, int count, float inside, float floor_, float shared,
                       float* a, float* b, float* by) {
    vec sum_a{}, sum_b{}, aa{}, bb{}, ab{};
    for (int k = 0; k < count; k += LANES) {
        sum_a += load(a + k) * load(tag + k);
        sum_b += load(b + k) * load(tag + k);
    }
    const float n = inside < 1.0f ? 1.0f : inside;
    const float mean_a = sum_of(sum_a) / n, mean_b = sum_of(sum_b) / n;
    for (int k = 0; k < count; k += LANES) {
        const vec t = load(tag + k);
        const vec x = (load(a + k) - mean_a) * t, y = (load(b + k) - mean_b) * t;
        store(a + k, x);
        store(b + k, y);
        aa += x * x;
        bb += y * y;
        ab += x * y;
    }
    const float va = sum_of(aa) / n + floor_, vb = sum_of(bb) / n + floor_;
    const float scale = 1.0f / std::sqrt(va * vb), found = (sum_of(ab) / n + shared) * scale;
    by[0] = scale / n;
    by[1] = -found / va / n;
    return found;
}

// Of all channels; the gradient of the sum of shares times correlations to w.total.
template <int D>
void compare_intensities(const NephiBlocks& s, Scratch<D>& w, float inside, Totals& sums) {
    const int n = w.padded_samples;
    const int64_t moving = product(s.moving.size, D), fixed = product(s.fixed.size, D);
    const float share = inside / float(s.samples);
    for (int a = 0; a < D; a++) std::fill_n(w.total[a], n, 0.0f);
    for (int64_t c = 0; c < s.channels; c++) {
        read_channel<D>(s.moving.intensities + c * moving, s.moving.size, w.moving, n, w.a,
                        w.slope);
        read_channel<D>(s.fixed.intensities + c * fixed, s.fixed.size, w.fixed, n, w.b,
                        nullptr);
        float by[2];
        const float shared = s.form == 2 ? s.floor : 0.0f;
        const float found = correlate(w.tag, n, inside, s.floor, shared, w.a, w.b, by);
        const float factor = s.form == 1 ? 2.0f * found * share : share;
        sums.agreement += (s.form == 1 ? found * found : found) * share;
        for (int k = 0; k < n; k += LANES) {
            const vec of = (by[0] * load(w.b + k) + by[1] * load(w.a + k)) *
                           (load(w.tag + k) * factor);
            for (int a = 0; a < D; a++)
                store(w.total[a] + k, load(w.total[a] + k) + of * load(w.slope[a] + k));
        }
    }
}

// The gradient of the sum of squared differences inside to w.error.
template <int D, class T>
void compare_features(const NephiBlocks& s, Scratch<D>& w, Totals& sums) {
    const T *moving = (const T*)s.moving.features, *fixed = (const T*)s.fixed.features;
    const int stored = int(s.stored);
    int64_t corner_m[1 << D], corner_f[1 << D];
    corner_offsets<D>(s.moving.size, corner_m);
    corner_offsets<D>(s.fixed.size, corner_f);
    fetch<D>(moving, stored, corner_m, w.moving, int(s.samples));
    fetch<D>(fixed, stored, corner_f, w.fixed, int(s.samples));
    for (int k = 0; k < int(s.samples); k++) {
        vec error{}, by[D]{};
        for (int part = 0; part < stored; part += LANES) {
            vec slope[D];
            const vec a = read_channels<D>(moving, stored, corner_m, w.moving, k, part, slope);
            vec* none = nullptr;
            const vec b = read_channels<D>(fixed, stored, corner_f, w.fixed, k, part, none);
            const vec apart = a - b;
            error += apart * apart;
            for (int i = 0; i < D; i++) by[i] += apart * slope[i];
        }
        const float tag = w.tag[k];
        sums.error += tag * sum_of(error);
        for (int i = 0; i < D; i++)
            w.error[i][k] = 2.0f * tag * sum_of(by[i]) * w.moving.steps[i][k];
    }
}

// The gradient by u at a block's places from that by where its samples go.
template <int D>
void places_gradient(const NephiBlocks& s, int64_t block, const Scratch<D>& w,
                     float* const* of, float* by_u) {
    for (int64_t c = 0; c < s.places; c++) {
        float by[D];
        for (int a = 0; a < D; a++) {
            by[a] = of[a][c];
            if (!s.corners) continue;
            vec total{};
            const float* share = &w.shares[c * w.padded_samples];
            for (int k = 0; k < w.padded_samples; k += LANES)
                total += load(share + k) * load(of[a] + k);
            by[a] = sum_of(total);
        }
        float* to = by_u + (block * s.places + c) * D;
        for (int j = 0; j < D; j++) {
            to[j] = 0.0f;
            for (int i = 0; i < D; i++) to[j] += s.post[i * (D + 1) + j] * by[i];
        }
    }
}

template <int D>
void compare_block(const NephiBlocks& s, int64_t block, const float* at, const float* u,
                   Scratch<D>& w, Totals& sums, float* by_u, float* by_features) {
    place_samples<D>(s, block, at, u, w);
    locate<D>(w.moved, w.padded_samples, s.moving.size, w.moving);
    locate<D>(w.at, w.padded_samples, s.fixed.size, w.fixed);
    leave_out<D>(s.moving, w.moving, int(s.samples), w.tag);
    leave_out<D>(s.fixed, w.fixed, int(s.samples), w.tag);
    vec inside_{};
    for (int k = 0; k < w.padded_samples; k += LANES) inside_ += load(w.tag + k);
    const float inside = sum_of(inside_);
    sums.inside += inside;
    sums.share += double(inside) / double(s.samples) * double(s.channels);
    compare_intensities<D>(s, w, inside, sums);
    places_gradient<D>(s, block, w, w.total, by_u);
    if (s.features == 0) return;
    if (s.bits == 16)
        compare_features<D, uint16_t>(s, w, sums);
    else
        compare_features<D, float>(s, w, sums);
    places_gradient<D>(s, block, w, w.error, by_features);
}

template <int D>
void compare_all(const NephiBlocks& s, const float* at, const float* u, int64_t threads,
                 double* sums, float* by_u) {
    const int64_t size = s.count * s.places * D, shares = std::min(BLOCK_SHARES, s.count);
    std::vector<float> by_features(s.features ? size_t(size) : 0);
    std::vector<Totals> parts(size_t(shares), Totals{});
    run(shares, threads, [&](int64_t task, int) {
        Scratch<D> w(s);
        const int64_t end = s.count * (task + 1) / shares;
        for (int64_t block = s.count * task / shares; block < end; block++)
            compare_block<D>(s, block, at, u, w, parts[task], by_u, by_features.data());
    });
    Totals all;
    for (const Totals& part : parts) {
        all.agreement += part.agreement;
        all.share += part.share;
        all.error += part.error;
        all.inside += part.inside;
    }
    const double share = std::max(all.share, 1.0), total = double(s.count * s.samples);
    sums[0] = 1.0 - all.agreement / share;
    const double known = std::max(all.inside / std::max(total, 1.0), 1e-3) * total;
    const double per = s.features && total > 0 ? 1.0 / (known * double(s.features)) : 0.0;
    sums[1] = all.error * per;
    const float first = float(-1.0 / share), second = float(s.weight * per);
    for (int64_t i = 0; i < size; i++) by_u[i] *= first;
    if (s.features)
        for (int64_t i = 0; i < size; i++) by_u[i] += second * by_features[i];
}

void check(const NephiBlocks& s) {
    require(s.bytes == sizeof(NephiBlocks), WRONG_SIZE);
    require(s.dimension == 2 || s.dimension == 3, NOT_SUPPORTED);
    require(s.count >= 0 && s.samples >= 1 && s.samples <= MOST_SAMPLES, WRONG_SIZE);
    require(s.places >= 1 && s.places <= s.samples, WRONG_SIZE);
    require(s.corners || s.places == s.samples, WRONG_SIZE);
    require(s.count <= MOST / (s.places * 3) && s.count <= MOST / s.samples, WRONG_SIZE);
    require(s.channels >= 0 && s.channels <= 4096, WRONG_SIZE);
    require(s.features >= 0 && s.features <= 4096, WRONG_SIZE);
    require(s.offsets && s.post && (s.centres || s.count == 0), MISSING);
    require(!s.corners || s.shares, MISSING);
    for (const NephiImage* image : {&s.moving, &s.fixed}) {
        check_image(image->size, s.dimension);
        require(image->intensities || s.channels == 0, MISSING);
        if (s.features == 0) continue;
        require(s.bits == 16 || s.bits == 32, NOT_SUPPORTED);
        require(s.stored >= s.features && s.stored % 16 == 0 && s.stored <= 4096, WRONG_SIZE);
        require(image->features, MISSING);
    }
}

}  // namespace
}  // namespace nephi

// The similarity to sums[0] and the features' part without its weight to sums[1], and
// the gradient of sums[0] + weight sums[1] by u to by_u [count * places, D]. `at` is
// where the map was evaluated, u what it found there.
NEPHI_API int nephi_compare(const NephiBlocks* blocks, const float* at, const float* u,
                            int64_t threads, double* sums, float* by_u) {
    return answered([&] {
        require(blocks && sums, MISSING);
        check(*blocks);
        require(blocks->count == 0 || (at && u && by_u), MISSING);
        by_dimension(blocks->dimension, [&](auto d) {
            compare_all<decltype(d)::value>(*blocks, at, u, threads, sums, by_u);
        });
    });
}
