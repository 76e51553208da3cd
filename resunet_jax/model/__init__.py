"""Arrays to arrays: pure JAX, no I/O."""
