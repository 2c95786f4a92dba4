// The two fields between their inputs and their last layer, on a chunk of rows.
#pragma once

#include <memory>

#include "chunk.hpp"

namespace nephi {

class Network {
   public:
    virtual ~Network() = default;
    // [count][hidden]: what the last layer reads.
    virtual const float* forward(const Inputs& in) = 0;
    // From the gradient by that (overwritten) those by the layers, which are added to
    // `sums`, and by the inputs, written; without `places` by the code's columns only.
    virtual void backward(const Inputs& in, float* of_top, Sums& sums, float* of_inputs,
                          bool places) = 0;
};

// z of `count` rows becomes [cosine, z'] and out [sine, cosine z'] of z + b.
inline void sine_layer(float* z, const float* bias, int points, int R, int H, float* out) {
    for (int p = 0; p < points; p++, z += R * H, out += R * H)
        for (int h = 0; h < H; h += LANES) {
            vec sine, cosine;
            sine_cosine(load(z + h) + load(bias + h), sine, cosine);
            store(z + h, cosine);
            store(out + h, sine);
            for (int r = 1; r < R; r++) store(out + r * H + h, cosine * load(z + r * H + h));
        }
}

// The gradient by z from that by [sine, cosine z'], in place; by the bias, added.
inline void sine_gradient(float* g, const float* z, const float* out, int points, int R,
                          int H, float* by_bias) {
    for (int h = 0; h < H; h += LANES) {
        vec total = load(by_bias + h);
        for (int p = 0; p < points; p++) {
            const int at = p * R * H + h;
            const vec cosine = load(z + at);
            vec bent{};
            for (int r = 1; r < R; r++) {
                const vec of = load(g + at + r * H);
                bent += of * load(z + at + r * H);
                store(g + at + r * H, of * cosine);
            }
            vec of = load(g + at) * cosine;
            if (R > 1) of -= bent * load(out + at);
            store(g + at, of);
            total += of;
        }
        store(by_bias + h, total);
    }
}

class SmallNetwork : public Network {
   public:
    explicit SmallNetwork(const Model& model) : m(model) {
        const size_t size = size_t(ROWS) * m.hidden;
        for (size_t l = 0; l < m.layers.size(); l++) {
            z.emplace_back(size, 0.0f);
            out.emplace_back(size, 0.0f);
        }
        spare.assign(m.layers.size() > 1 ? size : 0, 0.0f);
    }

    const float* forward(const Inputs& in) override {
        const int H = m.hidden;
        for (size_t l = 0; l < m.layers.size(); l++) {
            const Layer& layer = m.layers[l];
            const float* from = l ? out[l - 1].data() : in.rows.data();
            multiply<false>(in.count(), from, l ? H : in.K, layer.down.data(), layer.inputs,
                            H, z[l].data(), H);
            sine_layer(z[l].data(), layer.bias.data(), in.points, in.R, H, out[l].data());
        }
        return out.back().data();
    }

    void backward(const Inputs& in, float* of_top, Sums& sums, float* of_inputs,
                  bool places) override {
        const int H = m.hidden, rows = in.count();
        float *of = of_top, *next = spare.data();
        for (size_t l = m.layers.size(); l-- > 0;) {
            const Layer& layer = m.layers[l];
            LayerSums& to = sums.layers[l];
            sine_gradient(of, z[l].data(), out[l].data(), in.points, in.R, H,
                          to.bias.data());
            const float* from = l ? out[l - 1].data() : in.rows.data();
            add_outer(rows, from, l ? H : in.K, layer.inputs, of, H, to.weight.data());
            if (l) {
                multiply<false>(rows, of, H, layer.up.data(), H, H, next, H);
                std::swap(of, next);
            } else {
                const int columns = places ? in.K : padded(m.place);
                multiply<false>(rows, of, H, layer.up.data(), H, columns, of_inputs, in.K);
            }
        }
    }

   private:
    const Model& m;
    std::vector<std::vector<float>> z, out;  // by layer
    std::vector<float> spare;
};

std::unique_ptr<Network> make_network(const Model& model, bool keep);

}  // namespace nephi
