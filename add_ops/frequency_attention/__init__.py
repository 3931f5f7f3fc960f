"""Frequency attention distillation: the spectral distance of two feature maps, its attention map and its loss."""
