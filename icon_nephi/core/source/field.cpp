// A field's displacements and Jacobians at points, and their vector-Jacobian products.
//
// Points are shared out in chunks of ROWS rows. In the backward pass a chunk leaves the
// gradient by its code values; the nodes of the grids, which chunks share, get it
// afterwards, each node from the points in their order: slabs of nodes are then any
// thread's. What is summed over points, such as the gradients of weights, is summed in
// shares that depend on the number of points alone.
#include <algorithm>

#include "networks.hpp"
#include "pool.hpp"

namespace nephi {
namespace {

constexpr int64_t SHARES = 8;        // of the points, each with sums of its own
constexpr int64_t SHARE_CHUNKS = 10;  // chunks of a share at a time: rows stay in a cache

struct Call {
    const Model& model;
    int64_t count;
    const float* x;
    bool jets;
    int64_t threads;

    int rows() const { return model.rows(jets); }
    int chunk() const { return ROWS / rows(); }
};

inline void check(const Call& call) {
    require(call.count >= 0 && call.count <= MOST / 64, WRONG_SIZE);
    require(call.count == 0 || call.x != nullptr, MISSING);
}

// [count][D] of the last layer.
template <int D>
inline void last_layer(const Model& m, const float* top, int count, float* out) {
    for (int r = 0; r < count; r++, top += m.hidden) {
        vec total[D]{};
        for (int h = 0; h < m.hidden; h += LANES)
            for (int i = 0; i < D; i++)
                total[i] += load(top + h) * load(m.last.weight.data() + i * m.hidden + h);
        for (int i = 0; i < D; i++) out[r * D + i] = sum_of(total[i]);
    }
}

template <int D>
inline void write_out(const Inputs& in, const float* out, float* u, float* jacobian) {
    const float* bias = in.model.last.bias.data();
    for (int p = 0; p < in.points; p++)
        for (int i = 0; i < D; i++) {
            const float* of = out + p * in.R * D + i;
            u[p * D + i] = of[0] + bias[i];
            for (int a = 0; a + 1 < in.R; a++)
                jacobian[(p * D + i) * D + a] = of[(1 + a) * D] * in.near[a][p];
        }
}

template <int D, int K>
void forward_all(const Call& call, float* u, float* jacobian) {
    const int64_t step = call.chunk(), per = SHARE_CHUNKS * step;
    run((call.count + per - 1) / per, call.threads, [&](int64_t task, int) {
        Inputs in(call.model, call.jets, false);
        std::unique_ptr<Network> network = make_network(call.model, false);
        float out[ROWS * D];
        const int64_t end = std::min(call.count, (task + 1) * per);
        for (int64_t at = task * per; at < end; at += step) {
            read_inputs<D, K>(in, call.x + at * D, int(std::min(step, end - at)), false);
            last_layer<D>(call.model, network->forward(in), in.count(), out);
            write_out<D>(in, out, u + at * D, call.jets ? jacobian + at * D * D : nullptr);
        }
    });
}

struct Gradients {
    const float *u, *jacobian;  // given; null: zero
    float* const* tables;       // added to; null: not wanted
    float* const* weights;      // added to; null: not wanted
    float* shared;              // added to; null: not wanted
    float* x;                   // written; null: not wanted
};

// By the rows of the last layer's outputs.
template <int D>
inline void gather_gradient(const Inputs& in, const Gradients& g, int64_t at, float* of) {
    for (int p = 0; p < in.points; p++)
        for (int i = 0; i < D; i++) {
            float* to = of + p * in.R * D + i;
            to[0] = g.u ? g.u[(at + p) * D + i] : 0.0f;
            for (int a = 0; a + 1 < in.R; a++) {
                const float given = g.jacobian ? g.jacobian[((at + p) * D + i) * D + a] : 0;
                to[(1 + a) * D] = given * in.near[a][p];
            }
        }
}

// By the last layer, and by what it reads: [in_tiles(count)][hidden].
template <int D>
inline void derive_last(const Inputs& in, const float* of, const float* top, Sums& sums,
                        float* of_top) {
    const Model& m = in.model;
    const int H = m.hidden, count = in.count();
    for (int p = 0; p < in.points; p++)
        for (int i = 0; i < D; i++) sums.last_bias[i] += of[p * in.R * D + i];
    for (int h = 0; h < H; h += LANES) {
        vec weight[D], total[D];
        for (int i = 0; i < D; i++) {
            weight[i] = load(m.last.weight.data() + i * H + h);
            total[i] = load(sums.last.data() + i * H + h);
        }
        for (int r = 0; r < count; r++) {
            const vec t = load(top + r * H + h);
            vec by{};
            for (int i = 0; i < D; i++) {
                total[i] += t * of[r * D + i];
                by += weight[i] * of[r * D + i];
            }
            store(of_top + r * H + h, by);
        }
        for (int i = 0; i < D; i++) store(sums.last.data() + i * H + h, total[i]);
    }
}

// What a worker needs to derive a chunk.
struct Worker {
    Inputs in;
    std::unique_ptr<Network> network;
    std::vector<float> of_top;

    Worker(const Call& call, bool by_x)
        : in(call.model, call.jets, by_x),
          network(make_network(call.model, true)),
          of_top(size_t(ROWS) * call.model.hidden, 0.0f) {}
};

template <int D, int K>
inline void derive_chunk(const Call& call, const Gradients& g, Worker& w, int64_t at,
                         int points, Sums& sums, float* of_inputs) {
    Inputs& in = w.in;
    float of[ROWS * D];
    read_inputs<D, K>(in, call.x + at * D, points, g.x != nullptr);
    const float* top = w.network->forward(in);
    gather_gradient<D>(in, g, at, of);
    derive_last<D>(in, of, top, sums, w.of_top.data());
    w.network->backward(in, w.of_top.data(), sums, of_inputs, g.x != nullptr);
    const int coded = call.model.coded, shared = int(call.model.spec->shared);
    for (int p = 0; p < points; p++)
        for (int k = 0; k < shared; k++)
            sums.shared[k] += of_inputs[size_t(p) * in.R * in.K + coded + k];
    if (g.x) points_gradient<D>(in, of_inputs, g.x + at * D);
}

// Adds rows [begin, begin + count) of points to the tables' nodes.
template <int D, int K, bool JET>
void add_to_tables(const Call& call, const Gradients& g, int64_t begin, int64_t count,
                   const float* of_inputs) {
    const Model& m = call.model;
    const int64_t step = call.chunk(), pitch = m.inputs, slabs = usable(call.threads);
    run(int64_t(m.grids.size()) * slabs, call.threads, [&](int64_t task, int) {
        const Grid& grid = m.grids[task / slabs];
        float* table = g.tables[task / slabs];
        const int64_t slab = task % slabs, nodes = grid.nodes[0];
        const int64_t low = nodes * slab / slabs, high = nodes * (slab + 1) / slabs;
        std::vector<Axis> axes(D);
        float x[ROWS];
        for (int64_t at = 0; at < count; at += step) {
            const int points = int(std::min(step, count - at));
            for (int a = 0; a < D; a++) {
                for (int p = 0; p < points; p++) {
                    const float v = call.x[(begin + at + p) * D + a];
                    x[p] = v < 0.0f ? 0.0f : v > 1.0f ? 1.0f : v;
                }
                find_weights<K, JET>(x, points, grid.nodes[a], axes[a]);
            }
            add_grid<K, D, JET>(table, grid, axes.data(), points,
                                of_inputs + at * call.rows() * pitch, int(pitch), low, high);
        }
    });
}

// Adds them up in their order, into the first; what is packed is then taken apart once.
void add_sums(const Model& m, const std::vector<std::unique_ptr<Sums>>& all,
              const Gradients& g) {
    const int d = m.dimension, layers = int(m.layers.size());
    const float factor = m.kind == SINES ? 0.5f : 1.0f;
    Sums& total = *all.front();
    for (size_t s = 1; s < all.size(); s++) total += *all[s];
    if (g.shared)
        for (size_t k = 0; k < total.shared.size(); k++) g.shared[k] += total.shared[k];
    if (!g.weights) return;
    for (int l = 0; l < layers; l++)
        total.layers[l].add_to(m.layers[l], m.width, g.weights[2 * l],
                               g.weights[2 * l + 1]);
    for (int i = 0; i < d; i++) {
        g.weights[2 * layers + 1][i] += factor * total.last_bias[i];
        for (int h = 0; h < m.width; h++)
            g.weights[2 * layers][i * m.width + h] +=
                factor * total.last[size_t(i) * m.hidden + h];
    }
}

template <int D, int K>
void backward_all(const Call& call, const Gradients& g) {
    if (call.count == 0) return;
    const int64_t step = call.chunk(), pitch = call.model.inputs, R = call.rows();
    const int64_t chunks = (call.count + step - 1) / step;
    const int64_t most = std::min(SHARE_CHUNKS, (chunks + SHARES - 1) / SHARES);
    const int64_t share = most * step, block = SHARES * share;
    std::vector<std::unique_ptr<Sums>> sums;
    for (int64_t s = 0; s < std::min(SHARES, (chunks + most - 1) / most); s++)
        sums.push_back(std::make_unique<Sums>(call.model));
    std::vector<std::unique_ptr<Worker>> workers(size_t(usable(call.threads)));
    // The last chunk's rows are rounded up to whole tiles.
    std::vector<float> of_inputs(size_t((block * R + ROWS) * pitch));
    for (int64_t begin = 0; begin < call.count; begin += block) {
        const int64_t count = std::min(block, call.count - begin);
        run((count + share - 1) / share, call.threads, [&](int64_t task, int worker) {
            if (!workers[worker])
                workers[worker] = std::make_unique<Worker>(call, g.x != nullptr);
            const int64_t end = std::min(count, (task + 1) * share);
            for (int64_t at = task * share; at < end; at += step)
                derive_chunk<D, K>(call, g, *workers[worker], begin + at,
                                   int(std::min(step, end - at)), *sums[task],
                                   of_inputs.data() + at * R * pitch);
        });
        if (!g.tables) continue;
        if (call.jets)
            add_to_tables<D, K, true>(call, g, begin, count, of_inputs.data());
        else
            add_to_tables<D, K, false>(call, g, begin, count, of_inputs.data());
    }
    add_sums(call.model, sums, g);
}

}  // namespace
}  // namespace nephi

using namespace nephi;

// u [count, D] and with jets the Jacobian [count, D, D] at x [count, D].
NEPHI_API int nephi_field_forward(const NephiField* field, int64_t count, const float* x,
                                  int64_t jets, int64_t threads, float* u,
                                  float* jacobian) {
    return answered([&] {
        const Model model(field, false);
        const Call call{model, count, x, jets != 0, threads};
        check(call);
        require(count == 0 || (u && (!jets || jacobian)), MISSING);
        by_dimension(model.dimension, [&](auto d) {
            constexpr int D = decltype(d)::value;
            if (model.support == 2)
                forward_all<D, 2>(call, u, jacobian);
            else
                forward_all<D, 3>(call, u, jacobian);
        });
    });
}

// From the gradients by u and by the Jacobian (null: zero) those by tables, weights and
// the global code, which are added to, and by x, which is written; null: not wanted.
NEPHI_API int nephi_field_backward(const NephiField* field, int64_t count, const float* x,
                                   int64_t jets, int64_t threads, const float* by_u,
                                   const float* by_jacobian, float* const* tables,
                                   float* const* weights, float* shared, float* by_x) {
    return answered([&] {
        const Model model(field, true);
        const Call call{model, count, x, jets != 0, threads};
        check(call);
        if (tables)
            for (size_t l = 0; l < model.grids.size(); l++) require(tables[l], MISSING);
        if (weights)
            for (int w = 0; w < model.weights(); w++) require(weights[w], MISSING);
        const Gradients g{by_u, by_jacobian, tables, weights, shared, by_x};
        by_dimension(model.dimension, [&](auto d) {
            constexpr int D = decltype(d)::value;
            if (model.support == 2)
                backward_all<D, 2>(call, g);
            else
                backward_all<D, 3>(call, g);
        });
    });
}
