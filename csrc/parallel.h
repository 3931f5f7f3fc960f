// Threads: OpenMP, so that the process keeps the single pool that torch already runs.
#pragma once

#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

namespace add_ops {

// Calls body(item, worker) once for every item in [0, count); worker is in [0, threads) and names private scratch
// memory. The caller cuts its work into items without looking at `threads`, and no two items write the same memory: so
// results are the same, bit for bit, for every number of threads. The body must not throw; allocate before the call.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < count; ++item) body(item, omp_get_thread_num());
    return;
  }
#elif defined(__SANITIZE_THREAD__)  // which understands threads, but not how OpenMP's wait for each other
  if (threads > 1 && count > 1) {
    const int64_t most = std::min<int64_t>(threads, count);
    std::vector<std::thread> workers;
    for (int64_t worker = 0; worker < most; ++worker)
      workers.emplace_back([=, &body] {
        for (int64_t item = count * worker / most; item < count * (worker + 1) / most; ++item)
          body(item, static_cast<int>(worker));
      });
    for (std::thread& worker : workers) worker.join();
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t item = 0; item < count; ++item) body(item, 0);
}

}  // namespace add_ops
