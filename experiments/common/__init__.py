"""What the scripts share; light to import, so that --help needs no JAX."""
