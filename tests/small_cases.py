"""The Triton kernels on small CUDA tensors, forward and backward: what ``make gpu`` runs under compute-sanitizer."""

import os

import torch

import add_ops

CASES = [
    ((3, 5, 4, 4), torch.contiguous_format),
    ((1, 9, 16, 16), torch.channels_last),
    ((1, 5, 13, 22), None),
    ((1, 7, 31, 32), torch.channels_last),
    ((1, 3, 36, 40), None),
]


REHEARSAL = os.environ.get("ADD_OPS_REHEARSAL") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")


def main() -> None:
    for shape, layout in CASES[:2] if REHEARSAL else CASES:
        x = torch.randn(shape, device=DEVICE)
        x = (x.mT.contiguous().mT if layout is None else x.contiguous(memory_format=layout)).requires_grad_()
        names = ("l2", "gaussian", "cosine")[: 3 if max(shape[2:]) <= 32 else 2]
        values = [add_ops.spectral_distance(x, torch.zeros_like(x), distance=name) for name in names]
        values.append(add_ops.multi_view_attention(x, add_ops.sample_views(3, device=DEVICE), max(shape[1] // 2, 1)))
        theta = add_ops.sample_projections(shape[1], 5, device=DEVICE)
        values.append(add_ops.project_and_sort(x.flatten(2).mT, theta)[0])
        sum(value.square().sum() for value in values).backward()
        print(f"{shape} ran, the gradient's norm is {float(x.grad.norm()):.3g}")


if __name__ == "__main__":
    with add_ops.use_backend("triton"):
        main()
