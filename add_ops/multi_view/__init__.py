"""Multi-view attention distillation: feature maps as masses binned along random views, and their loss."""
