// A field and its code as Python hands them over, checked, and packed for a call.
#pragma once

#include "codes.hpp"
#include "errors.hpp"

extern "C" {

// All sizes are counts of numbers. Of ctypes: see icon_nephi/core/loading.py.
struct NephiField {
    int64_t bytes;      // of this struct, so that two versions of it cannot meet
    int64_t kind;       // 0: LatentMLP, 1: ModulatedSiren
    int64_t dimension;  // 2 or 3
    int64_t support;    // nodes read along an axis: 2 linear, 3 quadratic
    int64_t grids;
    const int64_t* nodes;        // [grids, dimension]
    const int64_t* stored;       // [grids]: channels of a table, multiples of 4
    const int64_t* used;         // [grids]: those that the field reads
    const float* const* tables;  // [grids] -> [*nodes, stored]
    int64_t shared;              // size of the global code
    const float* shared_code;
    int64_t width, layers;  // hidden layers; of the sine field with the first
    int64_t frequencies;
    const float* frequency;  // [frequencies, dimension]
    float first_omega, omega;
    const float* const* weights;  // as icon_nephi.fields lists them
};
}

namespace nephi {

enum Kind { SMALL = 0, SINES = 1 };

// W and b times a factor: [inputs][outputs] in panels both ways, outputs padded.
struct Layer {
    int inputs = 0, outputs = 0;  // padded
    int rows = 0;                 // numbers of an output in the weight as it is
    float factor = 1.0f;
    std::vector<int> columns;  // of each input, its place in the weight, or -1
    std::vector<float> down, up, bias;
};

inline Layer make_layer(const float* weight, const float* bias, int rows, int width,
                        std::vector<int> columns, float factor, bool back) {
    require(weight != nullptr && bias != nullptr, MISSING);
    Layer layer;
    layer.inputs = int(columns.size());
    layer.outputs = padded(width);
    layer.rows = rows;
    layer.factor = factor;
    layer.columns = std::move(columns);
    const int in = layer.inputs, out = layer.outputs;
    std::vector<float> down(size_t(in) * out, 0.0f), up;
    if (back) up.assign(size_t(in) * out, 0.0f);
    for (int h = 0; h < width; h++)
        for (int k = 0; k < in; k++) {
            if (layer.columns[k] < 0) continue;
            const float w = factor * weight[int64_t(h) * rows + layer.columns[k]];
            down[size_t(k) * out + h] = w;
            if (back) up[size_t(h) * in + k] = w;
        }
    layer.down = packed(down, in, out);
    if (back) layer.up = packed(up, out, in);
    layer.bias.assign(out, 0.0f);
    for (int h = 0; h < width; h++) layer.bias[h] = factor * bias[h];
    return layer;
}

// The gradients of a layer, summed up as the layer is packed.
struct LayerSums {
    std::vector<float> weight, bias;
    explicit LayerSums(const Layer& of)
        : weight(size_t(of.inputs) * of.outputs, 0.0f), bias(of.outputs, 0.0f) {}

    void add_to(const Layer& of, int width, float* to_weight, float* to_bias) const {
        // A few rows of the weight at a time, so that both stay in the first cache.
        for (int begin = 0; begin < width; begin += 16)
            for (int k = 0; k < of.inputs; k++) {
                if (of.columns[k] < 0) continue;
                const float* from = weight.data() + size_t(k) * of.outputs;
                float* to = to_weight + of.columns[k];
                for (int h = begin; h < width && h < begin + 16; h++)
                    to[int64_t(h) * of.rows] += of.factor * from[h];
            }
        for (int h = 0; h < width; h++) to_bias[h] += of.factor * bias[h];
    }
};

// The last layer, D outputs: rows of the width, padded.
struct LastLayer {
    std::vector<float> weight, bias;  // [D][outputs of the layer before], [D]
};

// What a call works with. A row of inputs is: channels of the grids, as stored; the
// global code; and what comes from the place itself, from `place` on.
struct Model {
    const NephiField* spec;
    Kind kind;
    int dimension, support, width, hidden;  // hidden: width, padded
    std::vector<Grid> grids;
    int coded = 0, place = 0, inputs = 0;  // columns of the grids; first; all, padded
    int waves = 0;                         // padded frequencies
    std::vector<Layer> layers;             // the sine field: gate, wave, gate, ...
    LastLayer last;
    std::vector<float> frequency;  // [dimension][waves]

    Model(const NephiField* field, bool back);
    int weights() const { return int(layers.size()) * 2 + 2; }
    int rows(bool jets) const { return jets ? 1 + dimension : 1; }

   private:
    void read_code();
    void read_small(bool back);
    void read_sines(bool back);
    void read_last(const float* weight, const float* bias, float factor);
    std::vector<int> code_columns(int first) const;
};

}  // namespace nephi
