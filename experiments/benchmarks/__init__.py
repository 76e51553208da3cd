"""How fast and how large, compared with PyTorch or another baseline, interleaved in one run."""
