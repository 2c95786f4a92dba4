// Products of small matrices whose rows stay in the first caches.
//
// Lanes are the columns (hidden units, inputs); points and their derivatives are rows.
// A weight is packed in panels of two registers' width, each contiguous: a panel then
// stays in the first cache whatever the width of the layer.
#pragma once

#include <cstring>
#include <vector>

#include "vectors.hpp"

namespace nephi {

constexpr int PANEL = 2 * LANES;
// Rows of a chunk: a multiple of the tiles' rows, and of 3 (2D) and 4 (3D) rows a point.
constexpr int ROWS = 48;
constexpr int TILE = 6;

constexpr int in_tiles(int rows) { return (rows + TILE - 1) / TILE * TILE; }

// [inner][outer] as panels: [outer / PANEL][inner][PANEL]; outer a multiple of PAD.
inline std::vector<float> packed(const std::vector<float>& plain, int inner, int outer) {
    std::vector<float> panels(plain.size());
    float* to = panels.data();
    for (int at = 0; at < outer; at += PANEL)
        for (int k = 0; k < inner; k++, to += PANEL)
            std::memcpy(to, plain.data() + int64_t(k) * outer + at, 4 * PANEL);
    return panels;
}

// Y[rows][columns] = X[rows][inner] B, or += with ADD; B in panels. Rows are done in
// tiles: X and Y have some up to `in_tiles(rows)`.
template <bool ADD>
inline void multiply(int rows, const float* X, int ldx, const float* B, int inner,
                     int columns, float* Y, int ldy) {
    for (int at = 0; at < columns; at += PANEL, B += int64_t(inner) * PANEL)
        for (int r = 0; r < rows; r += TILE) {
            const float* x = X + r * ldx;
            float* y = Y + r * ldy + at;
            vec sum[TILE][2];
            for (int i = 0; i < TILE; i++)
                for (int j = 0; j < 2; j++)
                    sum[i][j] = ADD ? load(y + i * ldy + LANES * j) : vec{};
            for (int k = 0; k < inner; k++) {
                const vec b0 = load(B + k * PANEL), b1 = load(B + k * PANEL + LANES);
                for (int i = 0; i < TILE; i++) {
                    const float f = x[i * ldx + k];
                    sum[i][0] += b0 * f;
                    sum[i][1] += b1 * f;
                }
            }
            for (int i = 0; i < TILE; i++)
                for (int j = 0; j < 2; j++) store(y + i * ldy + LANES * j, sum[i][j]);
        }
}

constexpr int OUTER = LANES == 16 ? 8 : 4;  // rows of a tile: of 32 registers, or 16

// S[inner][columns] += X^T G of rows; inner a multiple of OUTER, columns of PAD.
inline void add_outer(int rows, const float* X, int ldx, int inner, const float* G,
                      int columns, float* S) {
    for (int k = 0; k < inner; k += OUTER)
        for (int at = 0; at < columns; at += PANEL) {
            float* s = S + k * columns + at;
            vec sum[OUTER][2];
            for (int i = 0; i < OUTER; i++)
                for (int j = 0; j < 2; j++) sum[i][j] = load(s + i * columns + LANES * j);
            for (int r = 0; r < rows; r++) {
                const float *g = G + r * columns + at, *x = X + r * ldx + k;
                const vec g0 = load(g), g1 = load(g + LANES);
                for (int i = 0; i < OUTER; i++) {
                    sum[i][0] += g0 * x[i];
                    sum[i][1] += g1 * x[i];
                }
            }
            for (int i = 0; i < OUTER; i++)
                for (int j = 0; j < 2; j++) store(s + i * columns + LANES * j, sum[i][j]);
        }
}

}  // namespace nephi
