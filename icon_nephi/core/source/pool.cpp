#include "pool.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace nephi {
namespace {

struct Job {
    const std::function<void(int64_t, int)>* work;
    int64_t tasks, workers;
    std::atomic<int64_t> next{0};
    int64_t joined = 1, busy = 0;  // guarded by the pool's lock
    std::mutex failing;
    std::exception_ptr failure;

    void take(int worker) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            try {
                (*work)(task, worker);
            } catch (...) {
                std::lock_guard<std::mutex> hold(failing);
                failure = std::current_exception();
                next = tasks;
            }
        }
    }
};

struct Pool {
    std::mutex lock;
    std::condition_variable wake, done;
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
    shared.done.wait(hold, [&] { return job.busy == 0; });
    if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace nephi
