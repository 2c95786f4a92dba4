// The modulated sine field: gates g_0 = sin(V_0 [z, F]), g_i = sin(V_i g_{i-1}) + g_0,
// waves w_0 = sin(W_0 F), w_i = sin(W_i h_{i-1}), products h_0 = w_0, h_i = g_i w_i.
#include "networks.hpp"

namespace nephi {
namespace {

typedef std::vector<float> Rows;

struct Level {
    Rows gate_z, sine, wave_z, wave;  // of the two layers: z, and its sine's jet
    Rows gate, product;
};

inline void add_rows(const float* a, const float* b, int count, float* to) {
    for (int k = 0; k < count; k += LANES) store(to + k, load(a + k) + load(b + k));
}

// h = g w on jets
inline void multiply_jets(const float* g, const float* w, int points, int R, int H,
                          float* h) {
    for (int p = 0; p < points; p++, g += R * H, w += R * H, h += R * H)
        for (int k = 0; k < H; k += LANES) {
            const vec g0 = load(g + k), w0 = load(w + k);
            store(h + k, g0 * w0);
            for (int r = 1; r < R; r++) {
                const int at = r * H + k;
                store(h + at, load(g + at) * w0 + g0 * load(w + at));
            }
        }
}

// From the gradient by h = g w those by g, added, and by w, written.
inline void product_gradient(const float* of, const float* g, const float* w, int points,
                             int R, int H, float* of_g, float* of_w) {
    for (int at = 0; at < points * R * H; at += R * H)
        for (int k = at; k < at + H; k += LANES) {
            const vec g0 = load(g + k), w0 = load(w + k), of0 = load(of + k);
            vec by_g = load(of_g + k) + of0 * w0, by_w = of0 * g0;
            for (int r = 1; r < R; r++) {
                const int row = k + r * H;
                const vec slope = load(of + row);
                by_g += slope * load(w + row);
                by_w += slope * load(g + row);
                store(of_g + row, load(of_g + row) + slope * w0);
                store(of_w + row, slope * g0);
            }
            store(of_g + k, by_g);
            store(of_w + k, by_w);
        }
}

class SineNetwork : public Network {
   public:
    SineNetwork(const Model& model, bool keep_all)
        : m(model), H(model.hidden), keep(keep_all), count(model.layers.size() / 2) {
        const size_t size = size_t(ROWS) * H;
        levels.resize(keep || count < 2 ? count : 2);
        for (Level& level : levels)
            for (Rows* rows : {&level.gate_z, &level.sine, &level.wave_z, &level.wave,
                               &level.gate, &level.product})
                rows->assign(size, 0.0f);
        if (keep)
            for (Rows* rows : {&of_first, &of_gate, &of_wave, &spare})
                rows->assign(size, 0.0f);
    }

    const float* forward(const Inputs& in) override {
        for (size_t l = 0; l < count; l++) {
            Level& level = at(l);
            const float* z = l ? at(l - 1).gate.data() : in.rows.data();
            const float* w = l ? at(l - 1).product.data() : in.rows.data() + m.place;
            // The first gate is its sine, and the first product its wave.
            layer(in, 2 * l, z, l ? H : in.K, level.gate_z, l ? level.sine : level.gate);
            layer(in, 2 * l + 1, w, l ? H : in.K, level.wave_z,
                  l ? level.wave : level.product);
            if (l == 0) continue;
            add_rows(level.sine.data(), levels[0].gate.data(), in.count() * H,
                     level.gate.data());
            multiply_jets(level.gate.data(), level.wave.data(), in.points, in.R, H,
                          level.product.data());
        }
        return at(count - 1).product.data();
    }

    void backward(const Inputs& in, float* of_top, Sums& sums, float* of_inputs,
                  bool places) override {
        const int rows = in.count(), size = in_tiles(rows) * H;
        float *first = of_first.data(), *gate = of_gate.data(), *next = spare.data();
        std::memset(first, 0, 4 * size_t(size));
        std::memset(gate, 0, 4 * size_t(size));
        for (size_t l = count - 1; l > 0; l--) {
            Level &level = levels[l], &below = levels[l - 1];
            product_gradient(of_top, level.gate.data(), level.wave.data(), in.points, in.R,
                             H, gate, of_wave.data());
            add_rows(first, gate, rows * H, first);
            derive(in, 2 * l, gate, level.gate_z, level.sine, below.gate.data(), H, sums);
            derive(in, 2 * l + 1, of_wave.data(), level.wave_z, level.wave,
                   below.product.data(), H, sums);
            pass(rows, 2 * l + 1, of_wave.data(), of_top);
            pass(rows, 2 * l, gate, next);
            std::swap(gate, next);
        }
        add_rows(first, gate, rows * H, first);
        Level& level = levels[0];
        const float* features = in.rows.data() + m.place;
        derive(in, 0, first, level.gate_z, level.gate, in.rows.data(), in.K, sums);
        derive(in, 1, of_top, level.wave_z, level.product, features, in.K, sums);
        const Layer &gates = m.layers[0], &waves = m.layers[1];
        multiply<false>(rows, first, H, gates.up.data(), H, places ? in.K : m.place,
                        of_inputs, in.K);
        if (places)
            multiply<true>(rows, of_top, H, waves.up.data(), H, waves.inputs,
                           of_inputs + m.place, in.K);
    }

   private:
    const Model& m;
    const int H;
    const bool keep;
    const size_t count;
    std::vector<Level> levels;
    Rows of_first, of_gate, of_wave, spare;

    // Without gradients all levels but the first, whose gate is added, share memory.
    Level& at(size_t l) { return levels[keep || l < 1 ? l : 1]; }

    void layer(const Inputs& in, size_t number, const float* from, int pitch, Rows& z,
               Rows& out) {
        const Layer& of = m.layers[number];
        multiply<false>(in.count(), from, pitch, of.down.data(), of.inputs, H, z.data(), H);
        sine_layer(z.data(), of.bias.data(), in.points, in.R, H, out.data());
    }

    // The gradient by z in place of that by its sine, and by the layer.
    void derive(const Inputs& in, size_t number, float* of, const Rows& z, const Rows& out,
                const float* from, int pitch, Sums& sums) {
        LayerSums& to = sums.layers[number];
        sine_gradient(of, z.data(), out.data(), in.points, in.R, H, to.bias.data());
        add_outer(in.count(), from, pitch, m.layers[number].inputs, of, H,
                  to.weight.data());
    }

    void pass(int rows, size_t number, const float* of, float* to) {
        multiply<false>(rows, of, H, m.layers[number].up.data(), H, H, to, H);
    }
};

}  // namespace

std::unique_ptr<Network> make_network(const Model& model, bool keep) {
    if (model.kind == SMALL) return std::make_unique<SmallNetwork>(model);
    return std::make_unique<SineNetwork>(model, keep);
}

}  // namespace nephi
