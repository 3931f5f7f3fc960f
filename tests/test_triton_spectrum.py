"""The Triton kernels of the spectral distance: awkward sizes, every way to launch them, tables, and what is refused."""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton
from closeness import TENSOR_CORES, relative_error
from torch._subclasses import FakeTensorMode
from triton_checks import DEVICE, DISTANCES, ON_GPU, check, layouts, on_triton, same_bits, values_and_gradient

import add_ops
from add_ops import _triton
from add_ops.frequency_attention import real_basis, triton_kernels

__all__ = ["on_triton"]  # every test's fixture

MAPS = [(1, 1, 1, 2), (2, 1, 2, 1), (2, 33, 4, 4), (3, 65, 7, 5), (1, 17, 8, 8), (2, 5, 3, 37), (2, 19, 16, 16)]
LARGER_MAPS = [(1, 6, 13, 29), (1, 9, 32, 32), (1, 3, 31, 31), (1, 2, 56, 28), (1, 2, 34, 38)]
SIDES = [(17, 16), (2, 60), (64, 64), (48, 3), (1, 33)]
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")


def distances_of(sides):
    """Of two spectra with a side above 32 the reference takes the cosine."""
    return DISTANCES if max(sides) <= 32 else ("l2", "gaussian")


# A GPU runs every combination; the interpreter, which is slow, each layout of whole and of split maps, each shape in
# some layout, either of the distances with one spectrum, and each half precision.
LAID_OUT = [
    (shape, layout)
    for i, shape in enumerate(MAPS)
    for j, layout in enumerate(LAYOUTS)
    if ON_GPU or shape in (MAPS[2], MAPS[6]) or i % 4 == j
]
LARGER = [
    (shape, distance)
    for i, shape in enumerate(LARGER_MAPS)
    for distance in distances_of(shape[2:])
    if ON_GPU or distance == ("l2", "gaussian")[i % 2] or distance == "cosine"
]
HALVES = [
    (sides, dtype)
    for i, sides in enumerate(SIDES if ON_GPU else SIDES[:2])
    for j, dtype in enumerate((torch.float16, torch.bfloat16))
    if ON_GPU or i == j
]
CAPABILITIES = [80, 90, 100] if ON_GPU else [80]  # the interpreter, as an H100 in all other tests, knows no warps


@pytest.mark.parametrize(("shape", "layout"), LAID_OUT, ids=str)
def test_spectral_distance_at_awkward_sizes(shape, layout):
    student, teacher = torch.randn(2, *shape, device=DEVICE)
    weights = 10 ** (6 * torch.rand(shape[0], *shape[2:], device=DEVICE))  # as large as exp(gamma m) becomes
    teacher = layouts(teacher)[layout]
    check(lambda x: add_ops.spectral_distance(x, teacher.to(x.dtype)), layouts(student)[layout], weights)


@pytest.mark.parametrize(("shape", "distance"), LARGER, ids=str)
def test_spectral_distances_at_larger_sizes(shape, distance):
    batch, channels, *sides = shape
    both = torch.randn(2, batch, *sides, channels, device=DEVICE).movedim(4, 2)
    upstream = torch.randn(batch, *sides, device=DEVICE)
    # Where a coefficient of the cosine is small, 1/|F| amplifies the rounding of all of them.
    allowed = 1e-4 if distance == "cosine" else 0
    check(lambda x: add_ops.spectral_distance(*x, distance=distance, sigma=0.1), both, upstream, allowed)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", [(1, 66, 7, 8), (1, 17, 15, 14), (1, 5, 20, 27), (1, 2, 36, 34)], ids=str)
def test_the_launches_of_every_architecture(shape, capability, monkeypatch):
    monkeypatch.setattr(_triton, "limits", lambda device: (capability, 227 * 1024))
    student, teacher = torch.randn(2, *shape, device=DEVICE)
    if capability < 90 and max(shape[2:]) > 32:
        with pytest.raises(RuntimeError, match="a side of 36×34 is longer than 32"):
            add_ops.spectral_distance(student, teacher)
        return
    upstream = torch.randn(1, *shape[2:], device=DEVICE)
    check(lambda x: add_ops.spectral_distance(x, teacher.to(x.dtype)), student, upstream)


@pytest.mark.parametrize(("sides", "dtype"), HALVES, ids=str)
def test_half_precision_at_other_sides(sides, dtype):
    student, teacher = torch.randn(2, 2, 3, *sides, device=DEVICE, dtype=torch.float64).to(dtype)
    upstream = torch.randn(2, *sides, device=DEVICE)
    for distance in distances_of(sides):
        with add_ops.use_backend("reference"):
            wanted = values_and_gradient(
                lambda x, d=distance: add_ops.spectral_distance(x, teacher.double(), distance=d),
                student.double(),
                upstream,
            )
        found = values_and_gradient(
            lambda x, d=distance: add_ops.spectral_distance(x, teacher, distance=d), student, upstream
        )
        for one, other in zip(found, wanted, strict=True):
            assert relative_error(one, other) <= max(TENSOR_CORES[one.dtype], 2e-5 if one.dtype == torch.float32 else 0)


@pytest.mark.parametrize("shape", [(2, 150, 4, 4), (1, 17, 11, 9), (1, 9, 16, 20)], ids=str)
@pytest.mark.parametrize(
    ("programs", "distance"),
    itertools.product((1, 2), DISTANCES) if ON_GPU else [(1, "l2"), (1, "cosine"), (2, "gaussian"), (2, "cosine")],
)
def test_a_program_that_takes_several_tiles(programs, shape, distance, monkeypatch):
    """Three tiles, the last one not full, by one program or two: at such sizes each has a program of its own."""
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs * shape[0])
    student, teacher = torch.randn(2, *shape, device=DEVICE)
    splits, steps = triton_kernels._prepared(student, distance, "forward", True)[1:3]
    assert steps > 1 and (splits > 1) == (programs > 1)
    upstream = torch.randn(shape[0], *shape[2:], device=DEVICE)
    allowed = 1e-4 if distance == "cosine" else 0
    check(
        lambda x: add_ops.spectral_distance(x, teacher.to(x.dtype), distance=distance, sigma=0.1),
        student,
        upstream,
        allowed,
    )


def test_large_maps_whose_columns_lie_apart_are_copied_where_masks_would_spill(monkeypatch):
    launched = []
    monkeypatch.setattr(_triton, "launch", lambda *_, **options: launched.append(options))
    large, even, small = (layouts(torch.empty(1, 2, side, side, device="meta")) for side in (37, 36, 31))
    copied = (37 * 37, 37, 1)
    for x, strides in (
        (large["channels_last"], copied),
        (large["transposed"], copied),
        (large["sliced"], large["sliced"].stride()[1:]),
        (even["channels_last"], (1, 72, 2)),
        (small["channels_last"], (1, 62, 2)),
    ):
        grad = torch.empty(1, *x.shape[2:], device="meta")
        triton_kernels.spectral_distance(x, x, "l2", 1.0, "forward")
        out = triton_kernels.spectral_distance_backward(grad, x, x, "l2", 1.0, "forward")
        for options in (launched[0], launched[2]):
            assert options["STUDENT"] == options["TEACHER"] == strides
        assert launched[2]["OUT"] == out.stride()[1:] == torch.empty_like(x).stride()[1:]
        launched.clear()


def test_nan_stays_in_its_sample():
    student, teacher = torch.randn(2, 3, 5, 9, 12, device=DEVICE)
    upstream = torch.randn(3, 9, 12, device=DEVICE)
    clean = values_and_gradient(lambda x: add_ops.spectral_distance(x, teacher), student, upstream)
    student[1, 3, 4, 5] = torch.nan
    found = values_and_gradient(lambda x: add_ops.spectral_distance(x, teacher), student, upstream)
    assert same_bits([x[::2] for x in found], [x[::2] for x in clean])
    assert bool(found[0][1].isnan().all() and found[1][1, 3].isnan().all())
    assert torch.equal(found[1][1, :3], clean[1][1, :3])


@pytest.mark.parametrize("shape", [(64, 4, 4), (256, 32, 32), (728, 8, 8)], ids=str)
def test_another_batch_size_compiles_nothing(shape, monkeypatch):
    def launches(batch):
        found = []
        monkeypatch.setattr(_triton, "launch", lambda kernel, grid, *args, **options: found.append((kernel, options)))
        student, teacher = torch.empty(2, batch, *shape, device="meta")
        triton_kernels.spectral_distance(student, teacher, "l2", 1.0, "forward")
        triton_kernels.spectral_distance_backward(student[:, 0], student, teacher, "l2", 1.0, "forward")
        return found

    assert launches(1) == launches(16) == launches(999)
    for kernel in {kernel for kernel, _ in launches(16)} if ON_GPU else ():  # the interpreter specialises nothing
        assert {"splits", "steps"} & set(kernel.arg_names) <= set(kernel.do_not_specialize)


def test_what_does_not_fit_a_gpu_is_named(monkeypatch):
    """99 KB are what sm_86, sm_89 and sm_120 have: 8×8 then goes to the reference."""
    small = 99 * 1024
    assert "8×8 take 114688 bytes of shared memory, and a program of this GPU has 101376" in (
        triton_kernels._configuration(8, 8, "l2", True, 89, small)
    )
    stages = [triton_kernels._configuration(32, 32, "l2", True, 90, size)["num_stages"] for size in (small, 114688)]
    assert stages == [1, 2]
    monkeypatch.setattr(_triton, "limits", lambda device: (89, small))
    x = torch.randn(1, 2, 8, 8, device=DEVICE, requires_grad=True)
    values = add_ops.spectral_distance(x, x.detach())
    with pytest.raises(RuntimeError, match="spectral_distance_backward here: maps of 8×8 take 114688 bytes of shared"):
        values.sum().backward()


def test_a_gpu_that_cannot_run_the_kernels_is_named(monkeypatch, tmp_path):
    with FakeTensorMode():
        x = torch.empty(1, 2, 8, 8, device="cuda")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton, "limits", lambda device: (75, 64 * 1024))
    assert triton_kernels._unsupported(x, x, "l2", 1.0, "forward") == (
        "it needs a GPU of compute capability 8.0, and cuda:0 has 7.5"
    )
    monkeypatch.setattr(_triton, "limits", lambda device: (80, 227 * 1024))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("gcc", "clang"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch(mode=0o755)
    try:
        for change, words in (
            (lambda: (monkeypatch.setenv("CC", "cc"), monkeypatch.setenv("PATH", "")), None),
            (lambda: monkeypatch.delenv("CC"), "Triton's launcher needs a C compiler: gcc or clang on the PATH"),
            (lambda: monkeypatch.setenv("PATH", str(tmp_path / "gcc")), None),
            (lambda: monkeypatch.setenv("PATH", str(tmp_path / "clang")), None),
            (lambda: (monkeypatch.setenv("PATH", ""), monkeypatch.setattr(triton.knobs.build, "impl", print)), None),
            (lambda: monkeypatch.setattr(torch.version, "hip", "6.4"), "this torch is for ROCm"),
        ):
            change()
            _triton.unavailable.cache_clear()
            reason = triton_kernels._unsupported(x, x, "l2", 1.0, "forward")
            assert reason is None if words is None else words in reason
    finally:
        _triton.unavailable.cache_clear()


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    entered, launched = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((grid, options))

    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:1")
    _triton.launch(Kernel(), (2,), 3, x, num_warps=4)
    assert entered == [x.device] and launched == [((2,), {"enable_fp_fusion": True, "num_warps": 4})]


def test_a_kernel_that_does_not_start_is_an_error_of_the_named_backend(monkeypatch):
    class Broken:
        __name__ = "broken_kernel"

        def __getitem__(self, grid):
            raise OSError("no such driver")

    x = torch.ones(1, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"broken_kernel does not compile or start on .*OSError: no such driver"):
        _triton.launch(Broken(), (1,), x)


def test_memory_that_is_used_up_is_no_failed_launch():
    class Hungry:
        def __getitem__(self, grid):
            raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        _triton.launch(Hungry(), (1,), torch.ones(1, device=DEVICE))


def test_what_a_gpu_has_is_asked_of_its_driver(monkeypatch):
    found = SimpleNamespace(major=8, minor=6, shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {torch.device("cuda", 77): found}.get)
    assert _triton.limits(torch.device("cuda", 77)) == (86, 101376)
    assert _triton.limits(torch.device("cpu")) == (90, 232448), "an H100's"


def test_tables_are_built_once_whatever_the_caller_has_set():
    sides = iter([(5, 9), (9, 11), (6, 7), (3, 25)])

    def build():
        tables = real_basis.tables(*next(sides), "forward", torch.device("cpu"))
        for table in tables:
            assert table.device.type == "cpu" and table.dtype in (torch.float32, torch.int32)
            assert type(table) is torch.Tensor and not table.is_inference()
        return tables

    build()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        build()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        build()
    with FakeTensorMode():
        last = build()
    assert real_basis.tables(3, 25, "forward", torch.device("cpu")) is last


def test_a_first_call_in_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"first call for maps of 7×19 copies tables .* call it once before the capture"
    ):
        real_basis.tables(7, 19, "forward", torch.device("cuda", 0))


def test_float64_goes_to_the_reference():
    student, teacher = torch.randn(2, 2, 3, 6, 5, device=DEVICE, dtype=torch.float64)
    primitive, upstream = (lambda x: add_ops.spectral_distance(x, teacher)), torch.randn(2, 6, 5, device=DEVICE)
    found = values_and_gradient(primitive, student, upstream)
    with add_ops.use_backend("reference"):
        assert same_bits(found, values_and_gradient(primitive, student, upstream))


def test_sides_out_of_reach_are_named():
    x = torch.randn(1, 1, 65, 2, device=DEVICE)
    with pytest.raises(RuntimeError, match="a side of 65×2 is longer than 64"):
        add_ops.spectral_distance(x, x)
    with pytest.raises(RuntimeError, match="a side of 2×33 is longer than 32"):
        add_ops.spectral_distance(x[:, :, :33].mT, x[:, :, :33].mT, distance="cosine")
