"""Files to batches: NumPy, nibabel, grain; never JAX."""
