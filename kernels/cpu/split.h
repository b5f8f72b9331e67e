// Splitting work over the host's threads.
#pragma once
#include "fff.h"

namespace hf_fff {

template <class F> void parallel(const ParallelFor& host, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (count <= grain) return f(0, count);
  host.run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace hf_fff
