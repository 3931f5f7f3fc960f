#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef ADD_OPS_X86
#include <cpuid.h>
#endif

namespace add_ops {

static bool runs_here(Isa isa) {
#ifdef ADD_OPS_X86
  unsigned eax, ebx, ecx = 0, edx;  // clang 14 knows no __builtin_cpu_supports("f16c")
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == Isa::baseline;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

Isa active_isa() {
  static const Isa best = runs_here(Isa::avx512) ? Isa::avx512 : runs_here(Isa::avx2) ? Isa::avx2 : Isa::baseline;
  const char* word = std::getenv("ADD_OPS_CPU_CAPABILITY");
  if (word == nullptr || *word == '\0') return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(word) != isa_name(isa)) continue;
    if (runs_here(isa)) return isa;
    throw std::invalid_argument("ADD_OPS_CPU_CAPABILITY=" + std::string(word) +
                                ": this processor or build cannot run it; the best here is " + isa_name(best));
  }
  throw std::invalid_argument("ADD_OPS_CPU_CAPABILITY: expected baseline, avx2 or avx512, got '" + std::string(word) +
                              "'");
}

}  // namespace add_ops
