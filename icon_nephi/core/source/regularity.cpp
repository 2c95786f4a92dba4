// Gradient inverse consistency of two maps with the guard against folds, as guarded_term
// of icon_nephi's folds, with its gradient; determinants.
#include <algorithm>
#include <vector>

#include "errors.hpp"
#include "vectors.hpp"

extern "C" {

// The first map takes x to post_1 (y + u_1(y)), y = pre_1 x; the second goes on from
// there. Matrices are [D, D + 1].
struct NephiConsistency {
    int64_t bytes, dimension, count;
    const float *points, *values;            // [count, D]: x, and where both take it
    const float *jacobian_1, *jacobian_2;    // [count, D, D] of u_1 and u_2
    const float *pre_1, *post_1, *pre_2, *post_2;
    const float* extent;  // [D]
    float consistency, hinge, goal, weight;
};
}

namespace nephi {
namespace {

template <int D>
struct Square {
    float v[D][D] = {};
};

template <int D>
NEPHI_INLINE Square<D> transposed(const Square<D>& a) {
    Square<D> t;
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) t.v[i][j] = a.v[j][i];
    return t;
}

template <int D>
NEPHI_INLINE Square<D> operator*(const Square<D>& a, const Square<D>& b) {
    Square<D> c;
    for (int i = 0; i < D; i++)
        for (int k = 0; k < D; k++)
            for (int j = 0; j < D; j++) c.v[i][j] += a.v[i][k] * b.v[k][j];
    return c;
}

template <int D>
NEPHI_INLINE Square<D> linear(const float* affine) {
    Square<D> m;
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) m.v[i][j] = affine[i * (D + 1) + j];
    return m;
}

// I + du/dx
template <int D>
NEPHI_INLINE Square<D> slopes(const float* jacobian) {
    Square<D> m;
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) m.v[i][j] = jacobian[i * D + j] + float(i == j);
    return m;
}

template <int D>
NEPHI_INLINE Square<D> cofactors(const Square<D>& a) {
    Square<D> c;
    if constexpr (D == 2) {
        c.v[0][0] = a.v[1][1];
        c.v[0][1] = -a.v[1][0];
        c.v[1][0] = -a.v[0][1];
        c.v[1][1] = a.v[0][0];
    } else {
        for (int i = 0; i < 3; i++)
            for (int j = 0; j < 3; j++) {
                const int k = (i + 1) % 3, l = (i + 2) % 3, m = (j + 1) % 3, n = (j + 2) % 3;
                c.v[i][j] = a.v[k][m] * a.v[l][n] - a.v[k][n] * a.v[l][m];
            }
    }
    return c;
}

template <int D>
NEPHI_INLINE float determinant(const Square<D>& a) {
    const Square<D> c = cofactors(a);
    float total = 0.0f;
    for (int j = 0; j < D; j++) total += a.v[0][j] * c.v[0][j];
    return total;
}

// The lower of the two middle ones, as torch's; none if one is none.
inline float median(std::vector<float> values) {
    for (float v : values)
        if (std::isnan(v)) return v;
    const size_t middle = (values.size() - 1) / 2;
    std::nth_element(values.begin(), values.begin() + middle, values.end());
    return values[middle];
}

struct Terms {
    double apart = 0, drift = 0, lacking = 0, folded = 0;
};

// What a call shares among its points.
template <int D>
struct Shared {
    Square<D> pre_1, post_1, pre_2, post_2;
    float ratio[D][D], scale[D], usual;
};

template <int D>
Shared<D> shared_of(const NephiConsistency& s) {
    Shared<D> c{linear<D>(s.pre_1), linear<D>(s.post_1), linear<D>(s.pre_2),
                linear<D>(s.post_2), {}, {}, 1.0f};
    const float most = *std::max_element(s.extent, s.extent + D);
    for (int i = 0; i < D; i++) {
        c.scale[i] = s.extent[i] / most;
        for (int j = 0; j < D; j++) c.ratio[i][j] = s.extent[i] / s.extent[j];
    }
    return c;
}

// One point's terms; the gradient of weight (apart + consistency drift + hinge lacking),
// all means, by both Jacobians and the values.
template <int D>
void derive_point(const NephiConsistency& s, const Shared<D>& c, const Square<D>& inner,
                  int64_t n, Terms& terms, float* by_1, float* by_2, float* by_values) {
    const float mean = s.weight / float(s.count);
    const Square<D> outer = c.post_2 * slopes<D>(s.jacobian_2 + n * D * D) * c.pre_2;
    const Square<D> both = outer * inner;
    Square<D> g;
    for (int i = 0; i < D; i++)
        for (int j = 0; j < D; j++) {
            const float r = c.ratio[i][j], e = (both.v[i][j] - float(i == j)) * r;
            terms.apart += double(e) * e;
            g.v[i][j] = 2.0f * e * r * mean / D;
        }
    const Square<D> of_2 = transposed(c.post_2) * g * transposed(inner) * transposed(c.pre_2);
    Square<D> of_inner = transposed(outer) * g;
    const float det = determinant(inner), lack = s.goal - det / c.usual;
    terms.folded += det <= 0.0f;
    if (lack != lack) terms.lacking += lack;
    if (lack > 0.0f) {
        terms.lacking += double(lack) * lack;
        const Square<D> by = cofactors(inner);
        const float k = -2.0f * lack / c.usual * mean * s.hinge;
        for (int i = 0; i < D; i++)
            for (int j = 0; j < D; j++) of_inner.v[i][j] += k * by.v[i][j];
    }
    const Square<D> of_1 = transposed(c.post_1) * of_inner * transposed(c.pre_1);
    std::memcpy(by_1 + n * D * D, of_1.v, sizeof(of_1.v));
    std::memcpy(by_2 + n * D * D, of_2.v, sizeof(of_2.v));
    for (int i = 0; i < D; i++) {
        const float e = (s.values[n * D + i] - s.points[n * D + i]) * c.scale[i];
        terms.drift += double(e) * e;
        by_values[n * D + i] = 2.0f * e * c.scale[i] * mean * s.consistency;
    }
}

template <int D>
void derive_all(const NephiConsistency& s, double* sums, float* by_1, float* by_2,
                float* by_values) {
    std::fill_n(sums, 4, 0.0);
    if (s.count == 0) return;
    Shared<D> c = shared_of<D>(s);
    std::vector<Square<D>> inner(size_t(s.count), Square<D>{});
    std::vector<float> found(size_t(s.count), 0.0f);
    for (int64_t n = 0; n < s.count; n++) {
        inner[n] = c.post_1 * slopes<D>(s.jacobian_1 + n * D * D) * c.pre_1;
        found[n] = determinant(inner[n]);
    }
    c.usual = median(found);
    if (std::fabs(c.usual) < 1e-6f) c.usual = 1.0f;
    Terms terms;
    for (int64_t n = 0; n < s.count; n++)
        derive_point<D>(s, c, inner[n], n, terms, by_1, by_2, by_values);
    sums[0] = terms.apart / double(s.count) / D;
    sums[1] = terms.drift / double(s.count);
    sums[2] = terms.lacking / double(s.count);
    sums[3] = terms.folded / double(s.count);
}

}  // namespace
}  // namespace nephi

using namespace nephi;

// Means to sums: |D - I|^2 / d, drift, what determinants lack squared, share folded; and
// the gradients of weight (sums[0] + consistency sums[1] + hinge sums[2]).
NEPHI_API int nephi_consistency(const NephiConsistency* given, double* sums, float* by_1,
                                float* by_2, float* by_values) {
    return answered([&] {
        require(given && sums, MISSING);
        const NephiConsistency& s = *given;
        require(s.bytes == sizeof(NephiConsistency), WRONG_SIZE);
        require(s.count >= 0 && s.count <= MOST / 16, WRONG_SIZE);
        require(s.pre_1 && s.post_1 && s.pre_2 && s.post_2 && s.extent, MISSING);
        require(s.count == 0 || (s.points && s.values && s.jacobian_1 && s.jacobian_2 &&
                                 by_1 && by_2 && by_values),
                MISSING);
        by_dimension(s.dimension, [&](auto d) {
            derive_all<decltype(d)::value>(s, sums, by_1, by_2, by_values);
        });
    });
}

// [count] of Jacobians [count, D, D], whole ones, not those of displacements.
NEPHI_API int nephi_determinants(int64_t dimension, int64_t count, const float* jacobians,
                                 float* found) {
    return answered([&] {
        require(count >= 0, WRONG_SIZE);
        require(count == 0 || (jacobians && found), MISSING);
        by_dimension(dimension, [&](auto d) {
            constexpr int D = decltype(d)::value;
            for (int64_t n = 0; n < count; n++) {
                Square<D> m;
                std::memcpy(m.v, jacobians + n * D * D, sizeof(m.v));
                found[n] = determinant(m);
            }
        });
    });
}
