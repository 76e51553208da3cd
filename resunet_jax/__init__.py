"""Lung and infection segmentation in chest CT: a cascade of residual U-Nets in pure-functional JAX.

The public names stand in `__init__.pyi`; each is imported when it is first asked for, so that `--help` needs no JAX.
"""

import lazy_loader

__version__ = "0.23.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
