"""Every entry by name."""

from . import bench_frequency_attention, bench_multi_view, bench_sliced_wasserstein

PRIMITIVES = ("spectral_distance", "view_histogram", "project_and_sort")
ENTRIES = {
    entry.name: entry
    for room in (bench_frequency_attention, bench_multi_view, bench_sliced_wasserstein)
    for entry in room.ENTRIES
}
