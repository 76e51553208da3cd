"""The environment of all tests, set before JAX starts, and of the scripts that they run."""

import gc
import importlib.metadata
import os
import tempfile

# What one test compiles, the others, the workers and the scripts that they start need not compile again.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="resunet-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    # As the scripts have it, or they would find entries without the date of their last use.
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # the models are tiny: compiling them takes the time
# In parts that are compiled side by side, small programs take a third more of the processors' time.
os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
# XLA's older way to make loops takes half of the time to compile; jaxlib 0.11 no longer has it.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
gc.set_threshold(50_000, 20, 20)  # tracing makes many objects and little garbage
