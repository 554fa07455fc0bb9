"""bilevel: optimise through inner problems that an iterative solver solves to a budget.

The public names stand in `__init__.pyi`, a line each, and are imported when they are first
used, so that the command line starts without JAX.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
