"""``python -m benchmarks.warm``: compiles the kernels that the benchmarks on a GPU launch, several at a time.

One process compiles one kernel after the other, for a second or more each; Triton's cache serves all processes.
"""

from __future__ import annotations

import argparse
import sys
from multiprocessing import get_context

import torch

from add_ops._output import outliving_readers

from .entry import REHEARSAL
from .jobs import COMPILED, OTHERS, Job, parts, warm

DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
PROCESSES = 1 if REHEARSAL else 8


def run(job: Job) -> str | None:
    """What went wrong."""
    try:
        warm(job, DEVICE)
    except Exception as error:
        return f"{job}: {type(error).__name__}: {error}"
    return None


@outliving_readers()
def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    jobs = [job for part in parts(DEVICE, quick=False) for job in part.jobs if job.kind not in (COMPILED, OTHERS)]
    with get_context("spawn").Pool(PROCESSES) as pool:
        wrong = [text for text in pool.imap_unordered(run, jobs) if text]
    print(*wrong, f"compiled what {len(jobs) - len(wrong)} of {len(jobs)} jobs launch", sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
