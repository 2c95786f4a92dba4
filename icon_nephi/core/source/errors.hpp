// What entry points answer: nothing that comes from outside reaches memory unchecked.
#pragma once

#include <cstdint>
#include <exception>
#include <limits>
#include <new>

#define NEPHI_API extern "C" __attribute__((visibility("default")))

namespace nephi {

enum Answer : int {
    DONE = 0,
    NO_MEMORY = 1,
    WRONG_SIZE = 2,     // a count, a number of axes or channels, or a length
    MISSING = 3,        // a pointer that must not be null
    NOT_SUPPORTED = 4,  // a kind or an order that this library does not know
    FAILED = 5,
};

// Voxels and rows are counted in int32 inside vectors.
constexpr int64_t MOST = std::numeric_limits<int32_t>::max();

struct Refused {
    Answer why;
};

inline void require(bool right, Answer why) {
    if (!right) throw Refused{why};
}

// The product of counts, each at least 1, which may be at most a limit.
inline int64_t product(const int64_t* counts, int64_t n, int64_t most = MOST) {
    int64_t total = 1;
    for (int64_t i = 0; i < n; i++) {
        require(counts[i] >= 1 && counts[i] <= most / total, WRONG_SIZE);
        total *= counts[i];
    }
    return total;
}

// No exception leaves the library.
template <class Work>
Answer answered(Work work) {
    try {
        work();
        return DONE;
    } catch (const Refused& refused) {
        return refused.why;
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

// Calls `work` with the dimension as a constant.
template <int N>
struct Constant {
    static constexpr int value = N;
};

template <class Work>
void by_dimension(int64_t dimension, Work work) {
    if (dimension == 2) return work(Constant<2>{});
    if (dimension == 3) return work(Constant<3>{});
    throw Refused{NOT_SUPPORTED};
}

}  // namespace nephi
