"""Builds add_ops._C, the CPU kernels. Everything else about the package stands in pyproject.toml.

ADD_OPS_NO_CPP=1   install without it (the pure-PyTorch reference answers)
ADD_OPS_WERROR=1   compiler warnings are errors, and a failed build fails the install
ADD_OPS_SANITIZE=address,undefined   or thread: with GCC's sanitizers, for make sanitize
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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


def pybind11_headers(folder: Path) -> Path:
    """A copy of them: pip's build environments lie in another place each time, and all would be compiled again."""
    headers = folder / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        shutil.copytree(pybind11.get_include(), draft := headers.with_suffix(".part"), dirs_exist_ok=True)
        draft.rename(headers)
    return headers


class BuildKernels(build_ext):
    """Compiles by ninja, side by side and only what changed, the kernels once per instruction set; links one module."""

    def build_extension(self, ext: Extension) -> None:
        # An editable install gets another temporary folder each time; what it compiled is kept.
        kept = self.inplace or getattr(self, "editable_mode", False)
        folder = (Path("build", "ninja") if kept else Path(self.build_temp)).absolute() / sys.implementation.cache_tag
        folder.mkdir(parents=True, exist_ok=True)
        commands: list[list[str]] = []
        for name in ("spawn", "call"):  # by the version of setuptools, which makes the commands; ninja runs them
            setattr(self.compiler, name, lambda command, **_: commands.append(command))
        self.compiler.force = True
        steps, objects = [], []
        for source in ext.sources:
            for isa in ISA_FLAGS if kernel(source) else ["baseline"]:
                # Kernels may fuse multiply and add; plans must not, their rounding is part of the definition of a bin.
                flags = [*FLAGS, *OPENMP, *ISA_FLAGS[isa], *([] if kernel(source) else ["-ffp-contract=off"])]
                (target,) = self.compiler.compile(
                    [source],
                    output_dir=str(folder / isa),
                    macros=[("ADD_OPS_ISA", isa)],
                    include_dirs=[str(pybind11_headers(folder)), *self.include_dirs],
                    extra_postargs=flags,
                )
                steps.append((target, [os.path.abspath(source)], [*commands.pop(), "-MD", "-MF", f"{target}.d"]))
                objects.append(target)
        module = os.path.abspath(self.get_ext_fullpath(ext.name))
        self.compiler.link_shared_object(objects, module, extra_postargs=OPENMP, target_lang="c++")
        steps.append((module, objects, commands.pop()))
        lines = [f"builddir = {folder}", "rule run", "  command = $command"]
        for target, inputs, command in steps:
            output, *names = (re.sub("([$ :])", r"$\1", name) for name in (target, *inputs))
            lines += [f"build {output}: run {' '.join(names)}", f"  command = {shlex.join(command).replace('$', '$$')}"]
            lines += ["  deps = gcc", f"  depfile = {output}.d"] if target != module else []
        (folder / "build.ninja").write_text("\n".join([*lines, ""]))
        try:
            subprocess.run(["ninja", "--quiet", "-f", folder / "build.ninja"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error

    def run(self) -> None:
        super().run()
        missing = [ext.name for ext in self.extensions if not Path(self.get_ext_fullpath(ext.name)).exists()]
        if missing:
            print("add_ops: the C++ kernels could not be built; installing without them.", file=sys.stderr)


extension = Extension("add_ops._C", SOURCES, depends=HEADERS, optional=not STRICT)
if os.environ.get("ADD_OPS_NO_CPP") == "1":
    print("add_ops: ADD_OPS_NO_CPP=1, installing without the C++ kernels.", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildKernels})
