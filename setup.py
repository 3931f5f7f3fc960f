"""Builds add_ops._C, the CPU kernels. Everything else about the package stands in pyproject.toml.

ADD_OPS_NO_CPP=1   install without it (the pure-PyTorch reference answers)
ADD_OPS_WERROR=1   compiler warnings are errors, and a failed build fails the install
ADD_OPS_SANITIZE=address,undefined   or thread: with GCC's sanitizers, for make sanitize
"""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

STRICT = os.environ.get("ADD_OPS_WERROR") == "1"
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-Werror"] if STRICT else []
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
if sanitizers := os.environ.get("ADD_OPS_SANITIZE"):
    FLAGS += ["-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    # The thread sanitizer cannot see the locks of OpenMP's pool: csrc/parallel.h then starts threads of its own.
    OPENMP = [f"-fsanitize={sanitizers}", *([] if sanitizers == "thread" else OPENMP)]

# A *_kernel.cpp is compiled once per instruction set; csrc/dispatch.h chooses between the copies at run time.
ISA_FLAGS: dict[str, list[str]] = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]


def kernel(source: str) -> bool:
    return source.endswith("_kernel.cpp")


class BuildKernels(build_ext):
    """Compiles the sources side by side, the kernels once per instruction set, and links one module."""

    def build_extension(self, ext: Extension) -> None:
        def compile_one(source: str, isa: str) -> list[str]:
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, isa),
                macros=[("ADD_OPS_ISA", isa)],
                include_dirs=[*ext.include_dirs, *self.include_dirs],
                # Kernels may fuse multiply and add; plans must not, their rounding is part of the definition of a bin.
                extra_postargs=[*FLAGS, *OPENMP, *ISA_FLAGS[isa], *([] if kernel(source) else ["-ffp-contract=off"])],
            )

        jobs = [(s, isa) for s in ext.sources for isa in (ISA_FLAGS if kernel(s) else ["baseline"])]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [name for names in pool.map(lambda job: compile_one(*job), jobs) for name in names]
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(objects, target, extra_postargs=OPENMP, target_lang="c++")

    def run(self) -> None:
        super().run()
        missing = [ext.name for ext in self.extensions if not Path(self.get_ext_fullpath(ext.name)).exists()]
        if missing:
            print("add_ops: the C++ kernels could not be built; installing without them.", file=sys.stderr)


INCLUDES = [pybind11.get_include()]
extension = Extension("add_ops._C", SOURCES, include_dirs=INCLUDES, depends=HEADERS, optional=not STRICT)
if os.environ.get("ADD_OPS_NO_CPP") == "1":
    print("add_ops: ADD_OPS_NO_CPP=1, installing without the C++ kernels.", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildKernels})
