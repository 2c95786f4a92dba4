#include "model.hpp"

namespace nephi {
namespace {

constexpr int64_t WIDEST = 4096;

// 0, 1, ... of a hidden layer's inputs, padded by -1.
std::vector<int> plain_columns(int width) {
    std::vector<int> columns(padded(width), -1);
    for (int k = 0; k < width; k++) columns[k] = k;
    return columns;
}

constexpr float TAU = 6.283185307179586f;

}  // namespace

Model::Model(const NephiField* field, bool back) : spec(field) {
    require(field != nullptr, MISSING);
    require(field->bytes == sizeof(NephiField), WRONG_SIZE);
    require(field->kind == SMALL || field->kind == SINES, NOT_SUPPORTED);
    require(field->dimension == 2 || field->dimension == 3, NOT_SUPPORTED);
    require(field->support == 2 || field->support == 3, NOT_SUPPORTED);
    require(field->width >= 1 && field->width <= WIDEST, WRONG_SIZE);
    require(field->layers >= (field->kind == SINES) && field->layers <= 64, WRONG_SIZE);
    require(field->weights != nullptr, MISSING);
    kind = Kind(field->kind);
    dimension = int(field->dimension);
    support = int(field->support);
    width = int(field->width);
    hidden = padded(width);
    read_code();
    if (kind == SMALL)
        read_small(back);
    else
        read_sines(back);
}

void Model::read_code() {
    const NephiField& f = *spec;
    require(f.grids >= 0 && f.grids <= 64, WRONG_SIZE);
    require(f.shared >= 0 && f.shared <= WIDEST, WRONG_SIZE);
    require(f.shared == 0 || f.shared_code != nullptr, MISSING);
    require(f.grids == 0 || (f.nodes && f.stored && f.used && f.tables), MISSING);
    for (int64_t l = 0; l < f.grids; l++) {
        const int64_t *nodes = f.nodes + l * dimension, stored = f.stored[l];
        require(stored >= 4 && stored % 4 == 0 && stored <= WIDEST, WRONG_SIZE);
        require(f.used[l] >= 1 && f.used[l] <= stored, WRONG_SIZE);
        product(nodes, dimension);
        require(f.tables[l] != nullptr, MISSING);
        Grid grid{};
        grid.table = f.tables[l];
        grid.stored = int(stored);
        grid.column = coded;
        int64_t step = stored;
        for (int a = dimension - 1; a >= 0; a--) {
            require(nodes[a] >= support, WRONG_SIZE);
            grid.nodes[a] = nodes[a];
            grid.step[a] = step;
            step *= nodes[a];
        }
        grids.push_back(grid);
        coded += int(stored);
        require(coded <= 16 * WIDEST, WRONG_SIZE);
    }
    place = coded + int(f.shared);
}

// Where the code's values lie in a weight whose code begins at a column: the global
// code first, then grid after grid.
std::vector<int> Model::code_columns(int first) const {
    std::vector<int> columns;
    int at = first + int(spec->shared);
    for (int64_t l = 0; l < spec->grids; l++)
        for (int64_t c = 0; c < spec->stored[l]; c++)
            columns.push_back(c < spec->used[l] ? at++ : -1);
    for (int k = 0; k < spec->shared; k++) columns.push_back(first + k);
    return columns;
}

void Model::read_last(const float* weight, const float* bias, float factor) {
    require(weight != nullptr && bias != nullptr, MISSING);
    last.weight.assign(size_t(dimension) * hidden, 0.0f);
    for (int i = 0; i < dimension; i++) {
        for (int h = 0; h < width; h++)
            last.weight[size_t(i) * hidden + h] = factor * weight[int64_t(i) * width + h];
        last.bias.push_back(factor * bias[i]);
    }
}

// [2 x - 1, z]
void Model::read_small(bool back) {
    require(spec->layers >= 1, NOT_SUPPORTED);
    std::vector<int> columns = code_columns(dimension);
    for (int a = 0; a < dimension; a++) columns.push_back(a);
    int count = 0;
    for (int c : columns) count += c >= 0;
    inputs = padded(int(columns.size()));
    columns.resize(inputs, -1);
    const float* const* w = spec->weights;
    for (int64_t l = 0; l < spec->layers; l++) {
        const int rows = l ? width : count;
        layers.push_back(make_layer(w[2 * l], w[2 * l + 1], rows, width,
                                    l ? plain_columns(width) : columns, spec->omega, back));
    }
    read_last(w[2 * spec->layers], w[2 * spec->layers + 1], 1.0f);
}

// [z, sines, cosines] for the gates, [sines, cosines] for the waves.
void Model::read_sines(bool back) {
    const int64_t count = spec->frequencies;
    require(count >= 1 && count <= WIDEST, WRONG_SIZE);
    require(spec->frequency != nullptr, MISSING);
    waves = padded(int(count));
    frequency.assign(size_t(dimension) * waves, 0.0f);
    for (int64_t f = 0; f < count; f++)
        for (int a = 0; a < dimension; a++)
            frequency[size_t(a) * waves + f] = TAU * spec->frequency[f * dimension + a];
    std::vector<int> columns = code_columns(0), features;
    place = padded(place);
    columns.resize(place, -1);
    int code = 0;
    for (int c : columns) code += c >= 0;
    for (int part = 0; part < 2; part++)
        for (int f = 0; f < waves; f++)
            features.push_back(f < count ? part * int(count) + f : -1);
    for (int c : features) columns.push_back(c < 0 ? -1 : code + c);
    inputs = int(columns.size());
    const float* const* w = spec->weights;
    for (int64_t l = 0; l < spec->layers; l++, w += 4) {
        const int gate = l ? width : code + 2 * int(count);
        const int wave = l ? width : 2 * int(count);
        layers.push_back(make_layer(w[0], w[1], gate, width,
                                    l ? plain_columns(width) : columns, spec->omega, back));
        layers.push_back(make_layer(w[2], w[3], wave, width,
                                    l ? plain_columns(width) : features,
                                    l ? spec->omega : spec->first_omega, back));
    }
    read_last(w[0], w[1], 0.5f);
}

}  // namespace nephi
