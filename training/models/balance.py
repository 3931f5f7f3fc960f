"""The scale of distillation terms, set once from what they and the cross-entropy are at the start of a training."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor


class Balance:
    """Factors that let every kind of distillation term start at the same multiple of the cross-entropy.

    A kind is what stands before the "/" of a term's name: ADD has two, ``frequency`` and ``multi_view``; layers keep
    their weights within it. With ``n`` kinds each starts at ``balance / n`` times the cross-entropy, so that all
    together start at ``balance`` times it. In the first ``steps`` batches the factor is that of the batch itself; then
    it is set to that of the means over them, of all processes, and stays.

    Args:
        balance: multiple of the cross-entropy, > 0; or 0: every factor is 1.
        steps: batches to measure, >= 1.
        accelerator: the processes that must agree.

    Attributes:
        factors: by kind; empty until they are set. Reading them waits for nothing.
    """

    def __init__(self, balance: float, steps: int, accelerator: Accelerator) -> None:
        self.balance, self.steps, self.accelerator = balance, steps, accelerator
        self.factors: dict[str, float] = {}
        self.sums: dict[str, Tensor] = {}  # by kind, of its terms and of the cross-entropy beside them: (2,)
        self.seen = 0

    def _factor(self, sums: Tensor, kinds: int) -> Tensor:
        total, cross_entropy = sums.unbind(-1)
        return torch.where(total > 0, self.balance * cross_entropy / (kinds * total), 1.0)

    def __call__(self, terms: dict[str, Tensor], cross_entropy: Tensor) -> dict[str, Tensor]:
        """The terms of a batch, scalars, scaled; ``cross_entropy`` is the batch's."""
        if not self.balance or not terms:
            return terms
        kind_of = {name: name.partition("/")[0] for name in terms}
        if self.factors:
            return {name: self.factors[kind_of[name]] * term for name, term in terms.items()}
        kinds = dict.fromkeys(kind_of.values())
        factors = {}
        for kind in kinds:
            total = sum(term.detach().float() for name, term in terms.items() if kind_of[name] == kind)
            now = torch.stack([total, cross_entropy.detach().float()])
            self.sums[kind] = self.sums[kind] + now if kind in self.sums else now
            factors[kind] = self._factor(now, len(kinds))
        return {name: factors[kind_of[name]] * term for name, term in terms.items()}

    def step(self) -> dict[str, float]:
        """Count a batch, with terms or without; where it is the one that sets the factors, returns them, else {}."""
        if not self.balance or self.factors:
            return {}
        self.seen += 1
        if self.seen % self.steps or not self.sums:
            return {}
        sums = self.accelerator.reduce(torch.stack([self.sums[kind] for kind in sorted(self.sums)]))
        if not bool((sums[:, 0] > 0).all()):  # a kind that was 0 so far: measure on
            return {}
        found = self._factor(sums, len(sums)).tolist()
        self.factors = dict(zip(sorted(self.sums), found, strict=True))
        return self.factors

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        return {"factors": self.factors, "sums": {k: v.cpu() for k, v in self.sums.items()}, "seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.factors, self.seen = state["factors"], state["seen"]
        self.sums = {kind: value.to(self.accelerator.device) for kind, value in state["sums"].items()}
