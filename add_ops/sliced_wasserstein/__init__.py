"""Sliced Wasserstein distance between point sets: project, sort, compare."""
