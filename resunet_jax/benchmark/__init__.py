"""How fast and how large, beside PyTorch or the plain way, measured alternately in one run."""
