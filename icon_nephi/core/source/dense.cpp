// A pair compared at every node of a lattice: local correlation by box sums, gradient
// inverse consistency by differences, and the gradient by the code.
//
// The maps of both directions are x + u(x), u a quadratic spline with its coefficients
// as code (see icon_nephi.losses.dense). Lattices span the fixed image's unit box; in two
// dimensions they have one plane. Work is shared out by planes, which depend on the
// lattice alone, and sums are added up in the order of the planes.
#include <algorithm>
#include <utility>
#include <vector>

#include "images.hpp"
#include "pool.hpp"

extern "C" {

struct NephiSide {
    const float* moving;    // [channels, *grid]
    const float* reachable;  // [*grid], 1 or 0, of the moving image; null: everywhere
    int64_t grid[3];
    float to_moving[12];     // [D, D + 1], unit box of the lattice -> of the moving image
    const float* fixed;      // [channels, *size]
    const float* samples;    // [*size]: what a sample counts; null: 1
    const float* centres;    // [*size]: what a window counts
};

struct NephiDense {
    int64_t bytes;
    int64_t dimension, channels, radius, squared, shared;
    int64_t order;      // of the spline's support: 3
    int64_t size[3];    // of the lattice that is compared, slowest axis first
    int64_t between[3];  // of the lattice where the maps are held together
    int64_t nodes[3];   // of the code
    const float* code;  // [2 D, *nodes]: of the first map, of the second
    float scale[3];     // from the code's unit to the unit box, by axis
    float extent[3];    // millimetres of the unit box
    NephiSide sides[2];
    float floor, lmbda, drift, hinge, goal, tension;
};
}

namespace nephi {
namespace {

constexpr int SUPPORT = 3;

struct Grid {
    int64_t n[3];  // padded to three axes by a first one of 1
    int64_t plane() const { return n[1] * n[2]; }
    int64_t all() const { return n[0] * plane(); }
};

template <int D>
Grid grid_of(const int64_t* size) {
    Grid g{{1, 1, 1}};
    for (int a = 0; a < D; a++) g.n[3 - D + a] = size[a];
    return g;
}

// Quadratic spline along one axis: which nodes a place reads, and which places read a
// node.
struct Axis {
    int64_t places, nodes;
    int support;
    std::vector<int64_t> first, low, high;  // of a place; of a node, places [low, high)
    std::vector<float> weight;              // [places][support]

    Axis(int64_t places_, int64_t nodes_, bool flat)
        : places(places_), nodes(nodes_), support(flat ? 1 : SUPPORT),
          first(size_t(places_)), low(size_t(nodes_), places_), high(size_t(nodes_), 0),
          weight(size_t(places_) * support, 1.0f) {
        for (int64_t i = 0; i < places; i++) {
            if (!flat) {
                const double t = double(i) / double(places - 1) * double(nodes - 2) + 0.5;
                const int64_t middle =
                    std::min(std::max<int64_t>(1, int64_t(t + 0.5)), nodes - 2);
                const double f = t - double(middle);
                first[i] = middle - 1;
                weight[i * 3] = float(0.5 * (0.5 - f) * (0.5 - f));
                weight[i * 3 + 1] = float(0.75 - f * f);
                weight[i * 3 + 2] = float(0.5 * (0.5 + f) * (0.5 + f));
            }
            for (int k = 0; k < support; k++) {
                const int64_t node = first[i] + k;
                low[node] = std::min(low[node], i);
                high[node] = i + 1;
            }
        }
    }
    float share(int64_t place, int64_t node) const {
        return weight[place * support + (node - first[place])];
    }
    // first[] does not decrease, so places that read a node follow each other.
};

inline void add_row(float* to, const float* from, float share, int64_t n) {
    const vec s = splat(share);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + s * load(from + i));
    for (; i < n; i++) to[i] += share * from[i];
}

// A code on a lattice, and the transposed.
struct Spline {
    Grid lattice, code;
    Axis z, y, x;
    Spline(const Grid& lattice_, const Grid& code_, bool flat)
        : lattice(lattice_), code(code_), z(lattice.n[0], code.n[0], flat),
          y(lattice.n[1], code.n[1], false), x(lattice.n[2], code.n[2], false) {}

    int64_t half() const { return code.n[0] * lattice.plane(); }  // floats of `middle`

    // middle [node plane][y][x] of one channel.
    void begin(const float* table, float scale, int64_t plane, float* middle) const {
        const int64_t nx = lattice.n[2];
        std::vector<float> rows(size_t(code.n[1] * nx));
        const float* from = table + plane * code.plane();
        for (int64_t j = 0; j < code.n[1]; j++)
            for (int64_t i = 0; i < nx; i++) {
                float sum = 0.0f;
                for (int k = 0; k < x.support; k++)
                    sum += x.weight[i * x.support + k] * from[j * code.n[2] + x.first[i] + k];
                rows[size_t(j * nx + i)] = scale * sum;
            }
        float* to = middle + plane * lattice.plane();
        for (int64_t j = 0; j < lattice.n[1]; j++) {
            float* row = to + j * nx;
            std::fill_n(row, nx, 0.0f);
            for (int k = 0; k < y.support; k++)
                add_row(row, &rows[size_t((y.first[j] + k) * nx)],
                        y.weight[j * y.support + k], nx);
        }
    }
    void finish(const float* middle, int64_t plane, float* to) const {
        const int64_t n = lattice.plane();
        to += plane * n;
        std::fill_n(to, n, 0.0f);
        for (int k = 0; k < z.support; k++)
            add_row(to, middle + (z.first[plane] + k) * n, z.weight[plane * z.support + k], n);
    }
    // Adds what a lattice of gradients is to one plane of nodes.
    void transposed(const float* gradient, float scale, int64_t node, float* table) const {
        const int64_t n = lattice.plane(), nx = lattice.n[2];
        std::vector<float> sum((size_t)n, 0.0f), rows((size_t)nx, 0.0f);
        for (int64_t i = z.low[node]; i < z.high[node]; i++)
            add_row(sum.data(), gradient + i * n, z.share(i, node), n);
        for (int64_t j = 0; j < code.n[1]; j++) {
            std::fill(rows.begin(), rows.end(), 0.0f);
            for (int64_t i = y.low[j]; i < y.high[j]; i++)
                add_row(rows.data(), &sum[size_t(i * nx)], y.share(i, j), nx);
            float* to = table + node * code.plane() + j * code.n[2];
            for (int64_t k = 0; k < code.n[2]; k++) {
                float found = 0.0f;
                for (int64_t i = x.low[k]; i < x.high[k]; i++) found += x.share(i, k) * rows[size_t(i)];
                to[k] += scale * found;
            }
        }
    }
};

// Box sums along a row, and over the rows of a plane; what lies outside counts nothing.
void box_row(const float* from, int64_t n, int64_t radius, float* padded, float* to) {
    std::fill_n(padded, radius, 0.0f);
    std::copy_n(from, n, padded + radius);
    std::fill_n(padded + radius + n, radius + LANES, 0.0f);
    const int64_t width = 2 * radius + 1;
    for (int64_t i = 0; i < n; i += LANES) {
        vec sum = load(padded + i);
        for (int64_t k = 1; k < width; k++) sum += load(padded + i + k);
        const int64_t left = n - i;
        if (left >= LANES)
            store(to + i, sum);
        else
            for (int64_t k = 0; k < left; k++) to[i + k] = sum[k];
    }
}

void sum_rows(const float* from, int64_t step, int64_t at, int64_t count, int64_t radius,
              int64_t n, float* to) {
    const int64_t low = std::max<int64_t>(0, at - radius);
    const int64_t high = std::min(count - 1, at + radius);
    std::copy_n(from + low * step, n, to);
    for (int64_t r = low + 1; r <= high; r++) {
        const float* row = from + r * step;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store(to + i, load(to + i) + load(row + i));
        for (; i < n; i++) to[i] += row[i];
    }
}

struct Strip {  // scratch of one worker
    std::vector<float> memory;
    std::vector<int32_t> voxels;
    std::vector<float> plane;
    Strip(int64_t nx, int64_t plane_)
        : memory(size_t(nx + 8 * LANES) * 40, 0.0f), voxels(size_t(nx + 2 * LANES), 0),
          plane(size_t(plane_), 0.0f) {}
    float* take(int64_t nx, int i) { return memory.data() + size_t(nx + 8 * LANES) * i; }
};

struct Agreement {
    double agreement = 0, share = 0;
};

// One direction's similarity; `total`, by the map's displacement, is added to.
template <int D>
struct Comparison {
    const NephiDense& s;
    const NephiSide& side;
    const Grid size;
    const int64_t count;
    // Arrays of the lattice.
    const float* move[D];
    float *tag, *a, *slope[D], *sums[6], *by[3], *total[D];

    static int64_t arrays() { return 1 + 1 + D + 6 + 3; }

    Comparison(const NephiDense& s_, const NephiSide& side_, const Grid& size_,
               const float* moves, float* memory, float* totals)
        : s(s_), side(side_), size(size_), count(size_.all()) {
        auto next = [&] { return std::exchange(memory, memory + count); };
        for (int i = 0; i < D; i++) move[i] = moves + i * count;
        tag = next();
        a = next();
        for (int i = 0; i < D; i++) slope[i] = next();
        for (auto& one : sums) one = next();
        for (auto& one : by) one = next();
        for (int i = 0; i < D; i++) total[i] = totals + i * count;
    }

    // Where a row's nodes go: values, slopes by displacement, and tags.
    void warp(int64_t channel, int64_t plane, Strip& w) const {
        const int64_t nx = size.n[2], padded_count = (nx + LANES - 1) / LANES * LANES;
        float *place[D], *inner[D], *values = w.take(nx, 0), *tags = w.take(nx, 1);
        Spots<D> spots;
        for (int i = 0; i < D; i++) {
            place[i] = w.take(nx, 2 + i);
            spots.share[i] = w.take(nx, 5 + i);
            spots.steps[i] = w.take(nx, 8 + i);
            inner[i] = w.take(nx, 11 + i);
        }
        spots.voxel = w.voxels.data();
        const int64_t voxels = product(side.grid, D);
        const float* image = side.moving + channel * voxels;
        float m[D][D + 1];
        for (int i = 0; i < D; i++)
            for (int j = 0; j <= D; j++) m[i][j] = side.to_moving[i * (D + 1) + j];
        float* along = w.take(nx, 14);
        const float step = 1.0f / float(nx - 1);
        for (int64_t i = 0; i < padded_count; i++) along[i] = i < nx ? float(i) * step : 0.0f;
        for (int64_t y = 0; y < size.n[1]; y++) {
            const int64_t row = (plane * size.n[1] + y) * nx;
            float fixed_part[D] = {};
            if (D == 3) fixed_part[0] = float(plane) / float(size.n[0] - 1);
            fixed_part[D - 2] = float(y) / float(size.n[1] - 1);
            for (int64_t k = 0; k < padded_count; k += LANES) {
                vec at[D];
                for (int j = 0; j < D; j++) {
                    vec u{};
                    if (k + LANES <= nx)
                        u = load(move[j] + row + k);
                    else
                        for (int64_t l = 0; l < nx - k; l++) u[l] = move[j][row + k + l];
                    at[j] = u + (j == D - 1 ? load(along + k) : splat(fixed_part[j]));
                }
                veci in = (veci{} == 0);
                for (int i = 0; i < D; i++) {
                    vec q = splat(m[i][D]);
                    for (int j = 0; j < D; j++) q += m[i][j] * at[j];
                    store(place[i] + k, q);
                    // A border voxel's own place may lie beyond it by rounding.
                    in &= (q >= splat(-1e-6f)) & (q <= splat(1.000001f));
                }
                store(tags + k, in ? splat(1.0f) : vec{});
            }
            locate<D>(place, int(padded_count), side.grid, spots);
            if (side.reachable)
                for (int64_t i = 0; i < nx; i++) {
                    int64_t voxel = 0;
                    for (int j = 0; j < D; j++) {
                        const float t = place[j][i] * float(side.grid[j] - 1) + 0.5f;
                        const int64_t v = t > 0.0f ? int64_t(std::min(t, 1e9f)) : 0;
                        voxel = voxel * side.grid[j] + std::min(v, side.grid[j] - 1);
                    }
                    tags[i] *= side.reachable[voxel];
                }
            read_channel<D>(image, side.grid, spots, int(padded_count), values, inner);
            if (side.samples)
                for (int64_t i = 0; i < nx; i++) tags[i] *= side.samples[row + i];
            for (int64_t i = 0; i < nx; i++) {
                a[row + i] = values[i];
                tag[row + i] = tags[i];
            }
            for (int j = 0; j < D; j++)
                for (int64_t i = 0; i < nx; i++) {
                    float sum = 0.0f;
                    for (int l = 0; l < D; l++) sum += m[l][j] * inner[l][i];
                    slope[j][row + i] = sum;
                }
        }
    }

    void box_plane(float* array, int64_t plane, Strip& w) const {
        const int64_t nx = size.n[2], ny = size.n[1];
        float* from = array + plane * size.plane();
        for (int64_t y = 0; y < ny; y++)
            box_row(from + y * nx, nx, s.radius, w.take(nx, 20), w.plane.data() + y * nx);
        for (int64_t y = 0; y < ny; y++)
            sum_rows(w.plane.data(), nx, y, ny, s.radius, nx, from + y * nx);
    }

    // Products of a plane, summed over its windows.
    void prepare(int64_t channel, int64_t plane, Strip& w) const {
        const int64_t n = size.plane(), at = plane * n;
        const float* b = side.fixed + channel * count + at;
        for (int64_t i = 0; i < n; i++) {
            const float t = tag[at + i], x = a[at + i], y = b[i];
            sums[0][at + i] = t;
            sums[1][at + i] = t * x;
            sums[2][at + i] = t * y;
            sums[3][at + i] = t * x * x;
            sums[4][at + i] = t * y * y;
            sums[5][at + i] = t * x * y;
        }
        for (float* one : sums) box_plane(one, plane, w);
    }

    // The correlation of all windows centred in a plane, and what of its derivatives
    // each window adds to its samples.
    Agreement agree(int64_t plane, Strip& w) const {
        const int64_t nx = size.n[2], whole = size.plane();
        const float window = std::pow(float(2 * s.radius + 1), float(D));
        double agreed = 0, shared = 0;
        float* total_of[6];
        for (int k = 0; k < 6; k++) total_of[k] = w.take(nx, 24 + k);
        for (int64_t y = 0; y < size.n[1]; y++) {
            const int64_t row = plane * whole + y * nx;
            for (int k = 0; k < 6; k++)
                sum_rows(sums[k] + y * nx, whole, plane, size.n[0], s.radius, nx, total_of[k]);
            float row_agreed = 0, row_shared = 0;
            for (int64_t i = 0; i < nx; i++) {
                const float n = std::max(total_of[0][i], 1.0f);
                const float ma = total_of[1][i] / n, mb = total_of[2][i] / n;
                const float va = std::max(total_of[3][i] / n - ma * ma, 0.0f) + s.floor;
                const float vb = std::max(total_of[4][i] / n - mb * mb, 0.0f) + s.floor;
                const float ab = total_of[5][i] / n - ma * mb + (s.shared ? s.floor : 0.0f);
                const float root = 1.0f / std::sqrt(va * vb), found = ab * root;
                const float share = side.centres[row + i] * total_of[0][i] / window;
                const float slope_of = s.squared ? 2.0f * found : 1.0f;
                const float p = share * slope_of * root / n;
                const float q = share * slope_of * found / va / n;
                by[0][row + i] = p;
                by[1][row + i] = q;
                by[2][row + i] = q * ma - p * mb;
                row_agreed += share * (s.squared ? found * found : found);
                row_shared += share;
            }
            agreed += row_agreed;
            shared += row_shared;
        }
        return {agreed, shared};
    }

    // Adds the gradient of 1 - agreement / share.
    void derive(int64_t channel, int64_t plane, float scale, Strip& w) const {
        const int64_t nx = size.n[2], whole = size.plane();
        const float* b = side.fixed + channel * count;
        float* total_of[3];
        for (int k = 0; k < 3; k++) total_of[k] = w.take(nx, 24 + k);
        for (int64_t y = 0; y < size.n[1]; y++) {
            const int64_t row = plane * whole + y * nx;
            for (int k = 0; k < 3; k++)
                sum_rows(by[k] + y * nx, whole, plane, size.n[0], s.radius, nx, total_of[k]);
            float* gradient = w.take(nx, 28);
            for (int64_t i = 0; i < nx; i++)
                gradient[i] = -scale * tag[row + i] *
                              (b[row + i] * total_of[0][i] - a[row + i] * total_of[1][i] +
                               total_of[2][i]);
            for (int j = 0; j < D; j++)
                for (int64_t i = 0; i < nx; i++)
                    total[j][row + i] += gradient[i] * slope[j][row + i];
        }
    }
};

struct Held {
    double slopes = 0, drift = 0, hinge = 0, tension = 0, squares = 0;
    int64_t folded = 0;
};

// Gradient inverse consistency of a map and then another on a lattice, the first one's
// guard, and their gradients: `own` and `other` are added to.
template <int D>
struct Bond {
    const NephiDense& s;
    const Grid size;
    const float *first[D], *then[D];
    float *own[D], *other[D], *miss[D], *by[D];

    static int64_t arrays() { return 2 * D; }

    Held derive() const {
        Held held;
        const int64_t nx = size.n[2], ny = size.n[1], nz = size.n[0], all = size.all();
        int64_t axes[D], step[D];
        for (int i = 0; i < D; i++) axes[i] = size.n[3 - D + i];
        step[D - 1] = 1;
        for (int i = D - 2; i >= 0; i--) step[i] = step[i + 1] * axes[i + 1];
        const float most = *std::max_element(s.extent, s.extent + D);
        const float each = 1.0f / float(all);
        // phi_then(phi_first(x)) - x.
        int64_t offset[1 << D];
        corner_offsets<D>(axes, offset);
        auto cell_of = [&](const int64_t* index, int64_t at, float* share, bool* inside) {
            int64_t voxel = 0;
            for (int a = 0; a < D; a++) {
                float t = (float(index[a]) / float(axes[a] - 1) + first[a][at]) *
                          float(axes[a] - 1);
                inside[a] = t > 0.0f && t < float(axes[a] - 1);
                t = std::min(std::max(t, 0.0f), float(axes[a] - 1));
                if (!(t == t)) t = 0.0f;
                const int64_t cell = std::min(int64_t(t), axes[a] - 2);
                share[a] = t - float(cell);
                voxel = voxel * axes[a] + cell;
            }
            return voxel;
        };
        auto each_node = [&](auto work) {
            for (int64_t z = 0; z < nz; z++)
                for (int64_t y = 0; y < ny; y++)
                    for (int64_t x = 0; x < nx; x++) {
                        const int64_t index3[3] = {z, y, x};
                        work(index3 + (3 - D), (z * ny + y) * nx + x);
                    }
        };
        each_node([&](const int64_t* index, int64_t at) {
            float share[D];
            bool inside[D];
            const int64_t voxel = cell_of(index, at, share, inside);
            for (int i = 0; i < D; i++) {
                float corner[1 << D];
                for (int c = 0; c < 1 << D; c++) corner[c] = then[i][voxel + offset[c]];
                miss[i][at] = first[i][at] + interpolate<D>(corner, share, (float*)nullptr);
                by[i][at] = 0.0f;
            }
        });
        // Its differences, and by[]: the gradient by it.
        each_node([&](const int64_t* index, int64_t at) {
            for (int i = 0; i < D; i++) {
                const float scale = s.extent[i] / most, value = miss[i][at] * scale;
                held.drift += value * value * each;
                held.squares += first[i][at] * first[i][at] * each;
                by[i][at] += 0.5f * s.lmbda * s.drift * 2.0f * each * value * scale;
                for (int a = 0; a < D; a++) {
                    if (index[a] + 1 >= axes[a]) continue;
                    const float unit = float(axes[a] - 1) * s.extent[i] / s.extent[a];
                    const float d = (miss[i][at + step[a]] - miss[i][at]) * unit;
                    held.slopes += d * d * each / D;
                    const float g = 0.5f * s.lmbda * 2.0f * d * unit * each / D;
                    by[i][at + step[a]] += g;
                    by[i][at] -= g;
                }
            }
        });
        each_node([&](const int64_t* index, int64_t at) {
            float share[D];
            bool inside[D];
            const int64_t voxel = cell_of(index, at, share, inside);
            float back[D] = {}, weight[1 << D];
            for (int c = 0; c < 1 << D; c++) {
                weight[c] = 1.0f;
                for (int a = 0; a < D; a++)
                    weight[c] *= (c >> (D - 1 - a)) & 1 ? share[a] : 1.0f - share[a];
            }
            for (int i = 0; i < D; i++) {
                float corner[1 << D], slope[D];
                for (int c = 0; c < 1 << D; c++) {
                    corner[c] = then[i][voxel + offset[c]];
                    other[i][voxel + offset[c]] += weight[c] * by[i][at];
                }
                interpolate<D>(corner, share, slope);
                for (int a = 0; a < D; a++)
                    if (inside[a]) back[a] += slope[a] * float(axes[a] - 1) * by[i][at];
            }
            for (int i = 0; i < D; i++) own[i][at] += by[i][at] + back[i];
        });
        guard(axes, step, each, held, each_node);
        return held;
    }

    template <class Each>
    void guard(const int64_t* axes, const int64_t* step, float each, Held& held,
               const Each& each_node) const {
        each_node([&](const int64_t* index, int64_t at) {
            float j[D][D];
            for (int a = 0; a < D; a++)
                if (index[a] + 1 >= axes[a]) return;
            float squared = 0.0f;
            for (int i = 0; i < D; i++)
                for (int a = 0; a < D; a++) {
                    j[i][a] = (first[i][at + step[a]] - first[i][at]) * float(axes[a] - 1);
                    const float physical = j[i][a] * s.extent[i] / s.extent[a];
                    squared += physical * physical;
                }
            if (s.tension > 0.0f) {
                // Isotropic total variation: a shear costs by its size, not its square.
                const float length = std::sqrt(squared + 1e-4f);
                held.tension += (length - 1e-2f) * each;
                const float g = 0.5f * s.tension * each / length;
                for (int i = 0; i < D; i++)
                    for (int a = 0; a < D; a++) {
                        const float unit = s.extent[i] / s.extent[a];
                        const float by_difference =
                            g * j[i][a] * unit * unit * float(axes[a] - 1);
                        own[i][at + step[a]] += by_difference;
                        own[i][at] -= by_difference;
                    }
            }
            for (int i = 0; i < D; i++) j[i][i] += 1.0f;
            float cofactor[D][D];
            if constexpr (D == 2) {
                cofactor[0][0] = j[1][1];
                cofactor[0][1] = -j[1][0];
                cofactor[1][0] = -j[0][1];
                cofactor[1][1] = j[0][0];
            } else {
                for (int i = 0; i < 3; i++)
                    for (int a = 0; a < 3; a++) {
                        const int p = (i + 1) % 3, q = (i + 2) % 3;
                        const int b = (a + 1) % 3, c = (a + 2) % 3;
                        cofactor[i][a] = j[p][b] * j[q][c] - j[p][c] * j[q][b];
                    }
            }
            float determinant = 0.0f;
            for (int a = 0; a < D; a++) determinant += j[0][a] * cofactor[0][a];
            if (determinant <= 0.0f) held.folded++;
            const float lack = s.goal - determinant;
            if (lack <= 0.0f || s.hinge <= 0.0f) return;
            held.hinge += lack * lack * each;
            const float g = -0.5f * s.lmbda * s.hinge * 2.0f * lack * each;
            for (int i = 0; i < D; i++)
                for (int a = 0; a < D; a++) {
                    const float by_difference = g * cofactor[i][a] * float(axes[a] - 1);
                    own[i][at + step[a]] += by_difference;
                    own[i][at] -= by_difference;
                }
        });
    }
};

template <int D>
int64_t memory_of(const NephiDense& s) {
    const Grid size = grid_of<D>(s.size), between = grid_of<D>(s.between);
    const Grid code = grid_of<D>(s.nodes);
    const int64_t moves = 2 * D * (size.all() + between.all());
    const int64_t middles = 2 * D * code.n[0] * std::max(size.plane(), between.plane());
    const int64_t comparison = Comparison<D>::arrays() * size.all() + D * size.all();
    const int64_t bonds = 2 * (Bond<D>::arrays() + 2 * D) * between.all();
    return moves + middles + std::max(comparison, bonds);
}

template <int D>
void check(const NephiDense& s) {
    require(s.order == SUPPORT, NOT_SUPPORTED);
    require(s.channels >= 1 && s.radius >= 1 && s.radius <= 16, WRONG_SIZE);
    for (int a = 0; a < D; a++) {
        require(s.size[a] >= 2 && s.between[a] >= 2 && s.nodes[a] >= 3, WRONG_SIZE);
        require(std::isfinite(s.scale[a]) && s.extent[a] > 0.0f, WRONG_SIZE);
    }
    product(s.size, D, MOST / 64);
    product(s.between, D, MOST / 64);
    product(s.nodes, D, MOST / 64);
    require(s.code, MISSING);
    for (const NephiSide& side : s.sides) {
        check_image(side.grid, D);
        require(side.moving && side.fixed && side.centres, MISSING);
    }
}

template <int D>
void derive(const NephiDense& s, int64_t threads, float* memory, float* gradient,
            double* results) {
    const Grid size = grid_of<D>(s.size), between = grid_of<D>(s.between);
    const Grid code = grid_of<D>(s.nodes);
    const Spline fine(size, code, D == 2), coarse(between, code, D == 2);
    const int64_t all = size.all(), some = between.all(), table = code.all();
    float* moves = std::exchange(memory, memory + 2 * D * all);
    float* held = std::exchange(memory, memory + 2 * D * some);
    float* middle =
        std::exchange(memory, memory + 2 * D * code.n[0] * std::max(size.plane(), between.plane()));
    auto spread = [&](const Spline& spline, float* to) {
        const int64_t planes = code.n[0], n = spline.lattice.all(), half = spline.half();
        run(2 * D * planes, threads, [&](int64_t task, int) {
            const int64_t c = task / planes;
            spline.begin(s.code + c * table, s.scale[c % D], task % planes, middle + c * half);
        });
        run(2 * D * spline.lattice.n[0], threads, [&](int64_t task, int) {
            const int64_t c = task / spline.lattice.n[0];
            spline.finish(middle + c * half, task % spline.lattice.n[0], to + c * n);
        });
    };
    auto gather = [&](const Spline& spline, int64_t first, int64_t channels, const float* by) {
        const int64_t planes = code.n[0], n = spline.lattice.all();
        run(channels * planes, threads, [&](int64_t task, int) {
            const int64_t c = first + task / planes;
            spline.transposed(by + (c - first) * n, s.scale[c % D], task % planes,
                              gradient + c * table);
        });
    };
    std::fill_n(gradient, 2 * D * table, 0.0f);
    std::fill_n(results, 8, 0.0);
    spread(fine, moves);
    const int64_t planes = size.n[0];
    std::vector<Strip> rows;
    const int64_t workers = usable(threads);
    for (int64_t i = 0; i < workers; i++) rows.emplace_back(size.n[2], size.plane());
    std::vector<Agreement> found;
    for (int d = 0; d < 2; d++) {
        float* next = memory;
        float* totals = std::exchange(next, next + D * all);
        std::fill_n(totals, D * all, 0.0f);
        const Comparison<D> one(s, s.sides[d], size, moves + d * D * all, next, totals);
        double agreement = 0, share = 0;
        for (int64_t c = 0; c < s.channels; c++) {
            found.assign(size_t(planes), Agreement{});
            run(planes, threads, [&](int64_t plane, int w) {
                one.warp(c, plane, rows[w]);
                one.prepare(c, plane, rows[w]);
            });
            run(planes, threads,
                [&](int64_t plane, int w) { found[plane] = one.agree(plane, rows[w]); });
            double here = 0;
            for (const Agreement& part : found) {
                agreement += part.agreement;
                here += part.share;
            }
            share += here;
            // All channels have the same shares: the total is known from the first.
            const double total = std::max(1.0, here * double(s.channels));
            run(planes, threads, [&](int64_t plane, int w) {
                for (float* by : one.by) one.box_plane(by, plane, rows[w]);
            });
            run(planes, threads, [&](int64_t plane, int w) {
                one.derive(c, plane, float(1.0 / total), rows[w]);
            });
        }
        results[d] = 1.0 - agreement / std::max(1.0, share);
        gather(fine, d * D, D, totals);
    }
    if (s.lmbda <= 0.0f && s.tension <= 0.0f) return;
    spread(coarse, held);
    const int64_t bond = (Bond<D>::arrays() + 2 * D) * some;
    std::fill_n(memory, 2 * bond, 0.0f);
    Held parts[2];
    auto task_of = [&](int d) {
        Bond<D> one{s, between, {}, {}, {}, {}, {}, {}};
        float* next = memory + d * bond;
        for (int i = 0; i < D; i++) {
            one.first[i] = held + (d * D + i) * some;
            one.then[i] = held + ((1 - d) * D + i) * some;
            one.miss[i] = std::exchange(next, next + some);
            one.by[i] = std::exchange(next, next + some);
        }
        // Gradients in the order of the code's channels.
        for (int i = 0; i < D; i++) one.own[i] = next + (d * D + i) * some;
        for (int i = 0; i < D; i++) one.other[i] = next + ((1 - d) * D + i) * some;
        return one;
    };
    run(2, threads, [&](int64_t d, int) { parts[d] = task_of(int(d)).derive(); });
    float* sum = memory + Bond<D>::arrays() * some;
    const float* second = sum + bond;
    for (int64_t i = 0; i < 2 * D * some; i++) sum[i] += second[i];
    gather(coarse, 0, 2 * D, sum);
    for (const Held& part : parts) {
        results[2] += 0.5 * part.slopes;
        results[3] += 0.5 * part.drift;
        results[4] += 0.5 * part.hinge;
        results[5] += 0.5 * part.tension;
        results[7] += 0.5 * double(part.folded) / double(some);
    }
    results[6] = parts[1].squares;
}

}  // namespace
}  // namespace nephi

using namespace nephi;

// How many floats of memory `nephi_dense` takes.
NEPHI_API int nephi_dense_memory(const NephiDense* spec, int64_t* floats) {
    return answered([&] {
        require(spec && floats, MISSING);
        require(spec->bytes == int64_t(sizeof(NephiDense)), WRONG_SIZE);
        by_dimension(spec->dimension, [&](auto d) {
            check<d.value>(*spec);
            *floats = memory_of<d.value>(*spec);
        });
    });
}

// To `gradient` [2 D, *nodes] that of the loss by the code; to `results` the similarity
// of either direction; means over both of gradient inverse consistency, inverse
// consistency, guard and total variation; the second map's mean squared displacement;
// the share of places that fold.
NEPHI_API int nephi_dense(const NephiDense* spec, int64_t threads, float* memory,
                          float* gradient, double* results) {
    return answered([&] {
        require(spec && memory && gradient && results, MISSING);
        require(spec->bytes == int64_t(sizeof(NephiDense)), WRONG_SIZE);
        by_dimension(spec->dimension, [&](auto d) {
            check<d.value>(*spec);
            derive<d.value>(*spec, usable(threads), memory, gradient, results);
        });
    });
}
