// Which instruction set answers. Every *_kernel.cpp is compiled once per instruction set (see setup.py), each time with
// ADD_OPS_ISA set to the namespace its functions live in; the choice between the copies is made at run time.
//
// A kernel file must not emit code that the linker could share between its copies (an inline function or a template of
// the standard library compiled with -mavx512f may otherwise answer for the baseline): keep its helpers inside
// namespace ADD_OPS_ISA and allocate in the caller.
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define ADD_OPS_X86 1
#endif

namespace add_ops {

enum class Isa { baseline, avx2, avx512 };

// The best set of this processor, or the one that the environment variable ADD_OPS_CPU_CAPABILITY names
// (baseline, avx2, avx512). Throws std::invalid_argument for an unknown word or one this processor cannot run.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace add_ops

// ADD_OPS_DECLARE_KERNEL(void, name, (arguments)) declares add_ops::<isa>::name for every instruction set of the build;
// ADD_OPS_KERNEL(name) is the copy to call now. Both are used inside namespace add_ops.
#ifdef ADD_OPS_X86
#define ADD_OPS_DECLARE_KERNEL(result, name, arguments) \
  namespace baseline { result name arguments; }         \
  namespace avx2 { result name arguments; }             \
  namespace avx512 { result name arguments; }
#define ADD_OPS_KERNEL(name) \
  (active_isa() == Isa::avx512 ? avx512::name : active_isa() == Isa::avx2 ? avx2::name : baseline::name)
#else
#define ADD_OPS_DECLARE_KERNEL(result, name, arguments) \
  namespace baseline { result name arguments; }
#define ADD_OPS_KERNEL(name) ((void)active_isa(), baseline::name)
#endif
