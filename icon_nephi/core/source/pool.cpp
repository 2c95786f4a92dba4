#include "pool.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "errors.hpp"

#if defined(__GLIBCXX__) && _GLIBCXX_RELEASE >= 11
namespace std {
// What vectors of impossible lengths call: libstdc++'s own is newer than the systems
// that a wheel is for.
[[noreturn]] void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std
#endif

namespace nephi {
namespace {

// As std's, whose waiting is newer than the systems a wheel is for.
struct Condition {
    pthread_cond_t raw = PTHREAD_COND_INITIALIZER;

    void wait(std::unique_lock<std::mutex>& hold) {
        pthread_cond_wait(&raw, hold.mutex()->native_handle());
    }
    void notify_all() { pthread_cond_broadcast(&raw); }
};

struct Job {
    const std::function<void(int64_t, int)>* work;
    int64_t tasks, workers;
    std::atomic<int64_t> next{0};
    int64_t joined = 1, busy = 0;  // guarded by the pool's lock
    std::mutex failing;
    Answer failure = DONE;

    void take(int worker) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            const Answer answer = answered([&] { (*work)(task, worker); });
            if (answer != DONE) {
                std::lock_guard<std::mutex> hold(failing);
                failure = answer;
                next = tasks;
            }
        }
    }
};

struct Pool {
    std::mutex lock;
    Condition wake, done;
    std::vector<Job*> jobs;
    int64_t threads = 0;
    pid_t process = getpid();

    void serve() {
        std::unique_lock<std::mutex> hold(lock);
        for (;;) {
            Job* job = nullptr;
            for (Job* j : jobs)
                if (j->joined < j->workers && j->next < j->tasks) job = j;
            if (job == nullptr) {
                wake.wait(hold);
                continue;
            }
            const int worker = int(job->joined++);
            job->busy++;
            hold.unlock();
            job->take(worker);
            hold.lock();
            if (--job->busy == 0) done.notify_all();
        }
    }

    void grow(int64_t wanted) {
        while (threads < wanted) {
            std::thread(&Pool::serve, this).detach();
            threads++;
        }
    }
};

// Never deleted: its threads sleep until the process ends. A fork has none of them, so
// a child makes a pool of its own.
Pool& pool() {
    static std::mutex making;
    static Pool* made = nullptr;
    std::lock_guard<std::mutex> hold(making);
    if (made == nullptr || made->process != getpid()) made = new Pool;
    return *made;
}

}  // namespace

void run(int64_t tasks, int64_t threads, const std::function<void(int64_t, int)>& work) {
    const int64_t workers = std::min(usable(threads), tasks);
    if (workers <= 1) {
        for (int64_t task = 0; task < tasks; task++) work(task, 0);
        return;
    }
    Pool& shared = pool();
    Job job;
    job.work = &work;
    job.tasks = tasks;
    job.workers = workers;
    {
        std::lock_guard<std::mutex> hold(shared.lock);
        try {
            shared.grow(workers - 1);
        } catch (const std::exception&) {
            // No more threads are to be had: those there are do it.
        }
        shared.jobs.push_back(&job);
    }
    shared.wake.notify_all();
    job.take(0);
    std::unique_lock<std::mutex> hold(shared.lock);
    shared.jobs.erase(std::find(shared.jobs.begin(), shared.jobs.end(), &job));
    while (job.busy != 0) shared.done.wait(hold);
    require(job.failure == DONE, job.failure);
}

}  // namespace nephi
