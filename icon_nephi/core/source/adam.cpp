// One step of Adam over an array of numbers, and what goes with it, in one pass.
#include <algorithm>
#include <vector>

#include "errors.hpp"
#include "pool.hpp"
#include "vectors.hpp"

namespace nephi {
namespace {

constexpr int64_t STRETCH = 1 << 14;  // a task; sums are added up in their order

struct Rates {
    float rate, first, second;  // learning rate over its correction, decays
    float root, decay;          // 1 / sqrt of the second correction, of the prior
};

// Adds 2 * decay * weight to the gradient, keeps the weight in `before`, and clears the
// gradient. The sum of the new weights' squares.
double update(int64_t count, const Rates& r, float* __restrict weight,
              float* __restrict gradient, float* __restrict mean,
              float* __restrict square, float* __restrict before) {
    vec total[2]{};
    int64_t i = 0;
    const float keep = 1.0f - r.first, grow = 1.0f - r.second;
    for (; i + LANES <= count; i += LANES) {
        const vec w = load(weight + i), g = load(gradient + i) + 2.0f * r.decay * w;
        const vec m = load(mean + i) + (g - load(mean + i)) * keep;
        const vec v = load(square + i) * r.second + g * g * grow;
        vec root;
        for (int k = 0; k < LANES; k++) root[k] = std::sqrt(v[k]);
        const vec next = w - r.rate * m / (root * r.root + 1e-8f);
        store(before + i, w);
        store(gradient + i, vec{});
        store(mean + i, m);
        store(square + i, v);
        store(weight + i, next);
        total[i / LANES & 1] += next * next;
    }
    double rest = sum_of(total[0]) + sum_of(total[1]);
    for (; i < count; i++) {
        const float w = weight[i], g = gradient[i] + 2.0f * r.decay * w;
        mean[i] += (g - mean[i]) * keep;
        square[i] = square[i] * r.second + g * g * grow;
        before[i] = w;
        gradient[i] = 0.0f;
        weight[i] = w - r.rate * mean[i] / (std::sqrt(square[i]) * r.root + 1e-8f);
        rest += double(weight[i]) * weight[i];
    }
    return rest;
}

// By squares: pow of the C library would tie a wheel to its newer versions.
double power(double base, int64_t exponent) {
    double result = 1.0;
    for (; exponent > 0; exponent /= 2, base *= base)
        if (exponent % 2) result *= base;
    return result;
}

}  // namespace
}  // namespace nephi

using namespace nephi;

// Step `number` (from 1) of torch's Adam with eps 1e-8. The gradient of decay times the
// sum of squares is added before. To `squares` the sum of the new weights' squares: not
// a finite number if one of them is none.
NEPHI_API int nephi_adam(int64_t count, int64_t number, double rate, double first,
                         double second, double decay, int64_t threads, float* weight,
                         float* gradient, float* mean, float* square, float* before,
                         double* squares) {
    return answered([&] {
        require(count >= 0 && number >= 1, WRONG_SIZE);
        require(squares, MISSING);
        require(count == 0 || (weight && gradient && mean && square && before), MISSING);
        const double c1 = 1.0 - power(first, number);
        const double c2 = 1.0 - power(second, number);
        const Rates rates{float(rate / c1), float(first), float(second),
                          float(1.0 / std::sqrt(c2)), float(decay)};
        const int64_t tasks = (count + STRETCH - 1) / STRETCH;
        std::vector<double> parts(size_t(tasks), 0.0);
        run(tasks, threads, [&](int64_t task, int) {
            const int64_t at = task * STRETCH, n = std::min(STRETCH, count - at);
            parts[task] = update(n, rates, weight + at, gradient + at, mean + at,
                                 square + at, before + at);
        });
        *squares = 0.0;
        for (double part : parts) *squares += part;
    });
}
