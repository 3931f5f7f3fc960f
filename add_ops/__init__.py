"""Exact, fast operators and losses for ADD distillation (Le & Woo, AAAI 2022, arXiv 2112.03553)."""

from ._dispatch import backends, use_backend
from .add_loss import ADDLoss
from .frequency_attention.op import (
    FrequencyAttentionLoss,
    frequency_attention_loss,
    frequency_attention_map,
    spectral_distance,
)
from .multi_view.op import MultiViewLoss, multi_view_attention, multi_view_loss, sample_views
from .sliced_wasserstein.directions import sample_projections
from .sliced_wasserstein.op import (
    SlicedWassersteinLoss,
    max_sliced_wasserstein,
    project_and_sort,
    sliced_wasserstein,
)
from .version import __version__

__all__ = [
    "ADDLoss",
    "FrequencyAttentionLoss",
    "MultiViewLoss",
    "SlicedWassersteinLoss",
    "__version__",
    "backends",
    "frequency_attention_loss",
    "frequency_attention_map",
    "max_sliced_wasserstein",
    "multi_view_attention",
    "multi_view_loss",
    "project_and_sort",
    "sample_projections",
    "sample_views",
    "sliced_wasserstein",
    "spectral_distance",
    "use_backend",
]
