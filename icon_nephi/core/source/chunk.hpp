// What a chunk of points reads: the code at each, and the derivatives of that.
//
// Row r of a point p is row p * R + r of the inputs: r = 0 its values, 1 + a their
// derivatives by coordinate a (R = 1: values alone).
#pragma once

#include "model.hpp"

namespace nephi {

// Gradients by everything but the points and the tables, of one share of the points.
struct Sums {
    std::vector<LayerSums> layers;
    std::vector<float> last, last_bias, shared;

    explicit Sums(const Model& m)
        : last(size_t(m.dimension) * m.hidden, 0.0f),
          last_bias(m.dimension, 0.0f),
          shared(size_t(m.spec->shared), 0.0f) {
        for (const Layer& layer : m.layers) layers.emplace_back(layer);
    }

    void operator+=(const Sums& other) {
        for (size_t l = 0; l < layers.size(); l++) {
            add_all(layers[l].weight, other.layers[l].weight);
            add_all(layers[l].bias, other.layers[l].bias);
        }
        add_all(last, other.last);
        add_all(last_bias, other.last_bias);
        add_all(shared, other.shared);
    }

   private:
    static void add_all(std::vector<float>& to, const std::vector<float>& from) {
        for (size_t k = 0; k < to.size(); k++) to[k] += from[k];
    }
};

struct Inputs {
    const Model& model;
    const int R, K;  // rows of a point, columns of a row
    int points = 0;
    float x[3][ROWS] = {}, inside[3][ROWS] = {}, near[3][ROWS] = {};
    std::vector<Axis> axes;  // [grids][dimension]
    std::vector<float> rows, slope, second;

    Inputs(const Model& m, bool jets, bool by_x)
        : model(m),
          R(m.rows(jets)),
          K(m.inputs),
          axes(m.grids.size() * m.dimension),
          rows(size_t(ROWS) * K, 0.0f) {
        const int d = m.dimension;
        if (by_x && !jets) slope.assign(size_t(ROWS) * d * K, 0.0f);
        if (by_x && jets) second.assign(size_t(ROWS / R) * (d * (d + 1) / 2) * K, 0.0f);
    }

    int count() const { return points * R; }
};

// Beyond the border of the box lies the border; beyond it by a rounding is of the box.
constexpr float EDGE = 1e-6f;

inline void take_points(Inputs& in, const float* x, int points) {
    const int d = in.model.dimension;
    in.points = points;
    for (int a = 0; a < d; a++)
        for (int p = 0; p < points; p++) {
            const float v = x[p * d + a];
            in.near[a][p] = v >= -EDGE && v <= 1.0f + EDGE;
            in.inside[a][p] = v >= 0.0f && v <= 1.0f;
            in.x[a][p] = v < 0.0f ? 0.0f : v > 1.0f ? 1.0f : v;
        }
}

template <int D, int K, bool SLOPES>
inline void find_all_weights(Inputs& in) {
    for (size_t l = 0; l < in.model.grids.size(); l++)
        for (int a = 0; a < D; a++)
            find_weights<K, SLOPES>(in.x[a], in.points, in.model.grids[l].nodes[a],
                            in.axes[l * D + a]);
}

template <int D, int K, int ORDER>
inline void read_grids(Inputs& in) {
    find_all_weights<D, K, ORDER >= 1>(in);
    const int second = D * (D + 1) / 2;
    Targets to{in.rows.data(), in.rows.data() + in.K, in.second.data(), in.K};
    const bool jets = in.R > 1;
    if (!jets) to.slope = in.slope.data();
    for (size_t l = 0; l < in.model.grids.size(); l++)
        read_grid<K, D, ORDER>(in.model.grids[l], &in.axes[l * D], in.points, to,
                               int64_t(in.R) * in.K, int64_t(jets ? in.R : D) * in.K,
                               int64_t(second) * in.K);
}

template <int D, int K>
inline void read_code(Inputs& in, bool by_x) {
    const int order = (in.R > 1) + by_x;
    if (order == 0)
        read_grids<D, K, 0>(in);
    else if (order == 1)
        read_grids<D, K, 1>(in);
    else
        read_grids<D, K, 2>(in);
    const Model& m = in.model;
    for (int p = 0; p < in.points; p++)
        for (int64_t k = 0; k < m.spec->shared; k++)
            in.rows[size_t(p) * in.R * in.K + m.coded + k] = m.spec->shared_code[k];
}

// [2 x - 1] and its derivatives.
template <int D>
inline void place_small(Inputs& in) {
    for (int p = 0; p < in.points; p++) {
        float* row = in.rows.data() + size_t(p) * in.R * in.K + in.model.place;
        for (int a = 0; a < D; a++) row[a] = 2.0f * in.x[a][p] - 1.0f;
        for (int r = 1; r < in.R; r++) row[r * in.K + r - 1] = 2.0f;
    }
}

// Sines and cosines of 2 pi B (2 x - 1), and their derivatives.
template <int D>
inline void place_sines(Inputs& in) {
    const int n = in.model.waves;
    for (int p = 0; p < in.points; p++) {
        float* row = in.rows.data() + size_t(p) * in.R * in.K + in.model.place;
        for (int f = 0; f < n; f += LANES) {
            vec phase{}, slope[D], sine, cosine;
            for (int a = 0; a < D; a++) {
                slope[a] = load(in.model.frequency.data() + a * n + f);
                phase += slope[a] * (2.0f * in.x[a][p] - 1.0f);
            }
            sine_cosine(phase, sine, cosine);
            store(row + f, sine);
            store(row + n + f, cosine);
            for (int r = 1; r < in.R; r++) {
                store(row + r * in.K + f, cosine * slope[r - 1] * 2.0f);
                store(row + r * in.K + n + f, -sine * slope[r - 1] * 2.0f);
            }
        }
    }
}

template <int D, int K>
inline void read_inputs(Inputs& in, const float* x, int points, bool by_x) {
    take_points(in, x, points);
    read_code<D, K>(in, by_x);
    if (in.model.kind == SMALL)
        place_small<D>(in);
    else
        place_sines<D>(in);
}

NEPHI_INLINE float dot(const float* a, const float* b, int count) {
    vec4 total{};
    for (int k = 0; k < count; k += 4) total += load<vec4>(a + k) * load<vec4>(b + k);
    return sum_of(total);
}

// What the place itself adds to the derivative by coordinate a.
template <int D>
inline float place_slope(const Inputs& in, const float* g, int p, int a) {
    const Model& m = in.model;
    if (m.kind == SMALL) return 2.0f * g[m.place + a];
    const int n = m.waves;
    const float* row = in.rows.data() + size_t(p) * in.R * in.K + m.place;
    vec total{};
    for (int f = 0; f < n; f += LANES) {
        const vec sine = load(row + f), cosine = load(row + n + f);
        const float* of = g + m.place + f;
        vec by_phase = load(of) * cosine - load(of + n) * sine;
        for (int r = 1; r < in.R; r++) {
            const vec slope = 2.0f * load(m.frequency.data() + (r - 1) * n + f);
            by_phase -= slope * (load(of + r * in.K) * sine + load(of + n + r * in.K) * cosine);
        }
        total += by_phase * load(m.frequency.data() + a * n + f);
    }
    return 2.0f * sum_of(total);
}

// The gradient by the points from that by the inputs, `of` [count][K].
template <int D>
inline void points_gradient(const Inputs& in, const float* of, float* by_x) {
    const int second = D * (D + 1) / 2, C = in.model.coded;
    for (int p = 0; p < in.points; p++) {
        const float* g = of + size_t(p) * in.R * in.K;
        for (int a = 0; a < D; a++) {
            const float* slope = in.R > 1 ? in.rows.data() + size_t(p * in.R + 1 + a) * in.K
                                          : in.slope.data() + size_t(p * D + a) * in.K;
            float total = dot(g, slope, C) + place_slope<D>(in, g, p, a);
            for (int r = 1; r < in.R; r++)
                total += dot(g + r * in.K,
                             in.second.data() +
                                 size_t(p * second + mixed<D>(a, r - 1)) * in.K,
                             C);
            by_x[p * D + a] = in.inside[a][p] * total;
        }
    }
}

}  // namespace nephi
