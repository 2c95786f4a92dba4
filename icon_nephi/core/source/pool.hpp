// Tasks shared by a few threads.
//
// Which tasks there are never depends on how many threads work, and what they find is
// added up in the order of the tasks: any number of threads gives the same bits.
// Threads take tasks as they come to them, and nobody waits for one that has not begun:
// on a busy machine the caller does the work by itself.
#pragma once

#include <cstdint>
#include <functional>

namespace nephi {

// Calls work(task, worker) for every task below `tasks`; worker is below `threads`.
void run(int64_t tasks, int64_t threads, const std::function<void(int64_t, int)>& work);

constexpr int64_t MOST_THREADS = 64;

inline int64_t usable(int64_t threads) {
    return threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads;
}

}  // namespace nephi
