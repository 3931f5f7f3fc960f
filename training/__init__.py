"""Training and evaluation on pairs of raw and compressed images: `python training/train.py --help`."""
