// Threads: OpenMP, so that the process keeps the single pool that torch already runs.
#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace add_ops {

// Calls body(item, worker) once for every item in [0, count); worker is in [0, threads) and names private scratch memory.
// The caller cuts its work into items without looking at `threads`, and no two items write the same memory: so results
// are the same, bit for bit, for every number of threads. The body must not throw; allocate before the call.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t item = 0; item < count; ++item) body(item, omp_get_thread_num());
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t item = 0; item < count; ++item) body(item, 0);
}

}  // namespace add_ops
