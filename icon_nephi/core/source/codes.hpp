// Reading grids of vectors at points, and the transposed: adding to their nodes.
//
// Tables are channels last, [*nodes, stored], the channels padded to a multiple of 4 by
// zeros: lanes are channels, so nothing is gathered. Linear reading has K = 2 nodes an
// axis, the quadratic B-spline K = 3 (see icon_nephi's interpolation).
#pragma once

#include "matrices.hpp"

namespace nephi {

// Of one axis of one grid, for the points of a chunk.
struct Axis {
    float value[3][ROWS], slope[3][ROWS];
    int32_t base[ROWS];
    float steps;
};

struct Grid {
    const float* table;
    int64_t nodes[3];  // by axis
    int64_t step[3];   // numbers from a node to the next, by axis
    int stored;        // channels, padded
    int column;        // where they lie in a row
};

// Where a point lies on an axis. A place that is not a number gets weights that are
// none, at a node that exists.
template <int K, bool SLOPES>
inline void find_weights(const float* x, int count, int64_t nodes, Axis& axis) {
    const float steps = float(nodes - (K - 1)), last = float(nodes - K);
    axis.steps = steps;
    for (int p = 0; p < count; p++) {
        const float t = K == 2 ? x[p] * steps : x[p] * steps + 0.5f;
        // floor of t, or t rounded (half to even, as torch does) less one.
        float base = t;
        if (K == 3) base = (t + 12582912.0f) - 12582912.0f - 1.0f;
        base = base > 0.0f ? base : 0.0f;
        base = base < last ? base : last;
        if (K == 2) base = float(int32_t(base));
        axis.base[p] = int32_t(base);
        const float f = K == 2 ? t - base : t - base - 1.0f;
        if (K == 2) {
            axis.value[0][p] = 1.0f - f;
            axis.value[1][p] = f;
            if (SLOPES) axis.slope[0][p] = -steps;
            if (SLOPES) axis.slope[1][p] = steps;
        } else {
            axis.value[0][p] = 0.5f * (0.5f - f) * (0.5f - f);
            axis.value[1][p] = 0.75f - f * f;
            axis.value[2][p] = 0.5f * (0.5f + f) * (0.5f + f);
            if (SLOPES) axis.slope[0][p] = (f - 0.5f) * steps;
            if (SLOPES) axis.slope[1][p] = -2.0f * f * steps;
            if (SLOPES) axis.slope[2][p] = (f + 0.5f) * steps;
        }
    }
}

// The second derivative of a node's weight, which is constant.
template <int K>
NEPHI_INLINE float bend(const Axis& axis, int node) {
    if (K == 2) return 0.0f;
    return (node == 1 ? -2.0f : 1.0f) * axis.steps * axis.steps;
}

template <int D>
NEPHI_INLINE int64_t first_node(const Grid& grid, const Axis* axes, int p) {
    int64_t at = 0;
    for (int a = 0; a < D; a++) at += axes[a].base[p] * grid.step[a];
    return at;
}

// Number of the second derivative by axes a and b among D (D + 1) / 2.
template <int D>
constexpr int mixed(int a, int b) {
    const int low = a < b ? a : b, high = a < b ? b : a;
    return low * D - low * (low - 1) / 2 + high - low;
}

// Where the values of a point go, and its derivatives, `pitch` apart.
struct Targets {
    float *value, *slope, *second;
    int pitch;
};

// ORDER 0: values, 1: and slopes, 2: and second derivatives.
template <class V, int K, int D, int ORDER>
inline void read_point(const Grid& grid, const Axis* axes, int p, const Targets& to) {
    constexpr int LANE = sizeof(V) / 4, Y = D - 2, Z = D - 1, X = 0;
    const Axis &ax = axes[X], &ay = axes[Y], &az = axes[Z];
    const float* start = grid.table + first_node<D>(grid, axes, p);
    for (int part = 0; part < grid.stored; part += LANE) {
        V value{}, slope[D]{}, second[D * (D + 1) / 2]{};
        for (int i = 0; i < (D == 3 ? K : 1); i++) {
            const float wx = D == 3 ? ax.value[i][p] : 1.0f;
            const float dx = D == 3 ? ax.slope[i][p] : 0.0f;
            for (int j = 0; j < K; j++) {
                const float* node = start + part + j * grid.step[Y];
                if (D == 3) node += i * grid.step[X];
                const float wy = ay.value[j][p], dy = ay.slope[j][p];
                V a{}, b{}, c{};
                for (int k = 0; k < K; k++) {
                    const V t = load<V>(node + k * grid.stored);
                    a += t * az.value[k][p];
                    if (ORDER >= 1) b += t * az.slope[k][p];
                    if (ORDER == 2) c += t * bend<K>(az, k);
                }
                value += a * (wx * wy);
                if (ORDER >= 1) {
                    if (D == 3) slope[X] += a * (dx * wy);
                    slope[Y] += a * (wx * dy);
                    slope[Z] += b * (wx * wy);
                }
                if (ORDER == 2) {
                    if (D == 3) {
                        second[mixed<D>(X, X)] += a * (bend<K>(ax, i) * wy);
                        second[mixed<D>(X, Y)] += a * (dx * dy);
                        second[mixed<D>(X, Z)] += b * (dx * wy);
                    }
                    second[mixed<D>(Y, Y)] += a * (wx * bend<K>(ay, j));
                    second[mixed<D>(Y, Z)] += b * (wx * dy);
                    second[mixed<D>(Z, Z)] += c * (wx * wy);
                }
            }
        }
        const int at = grid.column + part;
        store(to.value + at, value);
        if (ORDER >= 1)
            for (int a = 0; a < D; a++) store(to.slope + a * to.pitch + at, slope[a]);
        if (ORDER == 2)
            for (int a = 0; a < D * (D + 1) / 2; a++)
                store(to.second + a * to.pitch + at, second[a]);
    }
}

// Adds a point's gradient, by its values and with JET by its slopes, to the nodes that
// lie in [low, high) of the grid's first axis.
template <class V, int K, int D, bool JET>
inline void add_point(float* table, const Grid& grid, const Axis* axes, int p,
                      const float* row, int pitch, int64_t low, int64_t high) {
    constexpr int LANE = sizeof(V) / 4, Y = D - 2, Z = D - 1, X = 0;
    const Axis &ax = axes[X], &ay = axes[Y], &az = axes[Z];
    const int64_t base = ax.base[p];
    if (base + K <= low || base >= high) return;
    float* start = table + first_node<D>(grid, axes, p);
    for (int part = 0; part < grid.stored; part += LANE) {
        const float* g = row + grid.column + part;
        V of[D + 1];
        for (int a = 0; a <= (JET ? D : 0); a++) of[a] = load<V>(g + a * pitch);
        for (int i = 0; i < (D == 3 ? K : 1); i++) {
            if (D == 3 && (base + i < low || base + i >= high)) continue;
            const float wx = D == 3 ? ax.value[i][p] : 1.0f;
            const float dx = D == 3 ? ax.slope[i][p] : 0.0f;
            for (int j = 0; j < K; j++) {
                if (D == 2 && (base + j < low || base + j >= high)) continue;
                float* node = start + part + j * grid.step[Y];
                if (D == 3) node += i * grid.step[X];
                const float wy = ay.value[j][p], dy = ay.slope[j][p];
                V a = of[0] * (wx * wy), b{};
                if (JET) {
                    if (D == 3) a += of[1 + X] * (dx * wy);
                    a += of[1 + Y] * (wx * dy);
                    b = of[1 + Z] * (wx * wy);
                }
                for (int k = 0; k < K; k++) {
                    float* q = node + k * grid.stored;
                    V t = load<V>(q) + a * az.value[k][p];
                    if (JET) t += b * az.slope[k][p];
                    store(q, t);
                }
            }
        }
    }
}

// Calls `work` with the widest registers that the channels fill.
template <class Work>
NEPHI_INLINE void by_width(const Grid& grid, Work work) {
    if (grid.stored % LANES == 0) return work(vec{});
#if defined(__AVX512F__)
    if (grid.stored % 8 == 0) return work(vec8{});
#endif
    work(vec4{});
}

template <int K, int D, int ORDER>
inline void read_grid(const Grid& grid, const Axis* axes, int points, Targets to,
                      int64_t value_step, int64_t slope_step, int64_t second_step) {
    by_width(grid, [&](auto lane) {
        for (int p = 0; p < points; p++) {
            read_point<decltype(lane), K, D, ORDER>(grid, axes, p, to);
            to.value += value_step;
            if (ORDER >= 1) to.slope += slope_step;
            if (ORDER == 2) to.second += second_step;
        }
    });
}

template <int K, int D, bool JET>
inline void add_grid(float* table, const Grid& grid, const Axis* axes, int points,
                     const float* rows, int pitch, int64_t low, int64_t high) {
    by_width(grid, [&](auto lane) {
        typedef decltype(lane) V;
        for (int p = 0; p < points; p++, rows += (JET ? 1 + D : 1) * pitch)
            add_point<V, K, D, JET>(table, grid, axes, p, rows, pitch, low, high);
    });
}

}  // namespace nephi
