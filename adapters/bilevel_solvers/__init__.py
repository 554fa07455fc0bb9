"""Other people's solvers behind the protocol of the core, and bridges to those who call it.

The public names stand in `__init__.pyi`, one line each, and are imported when they are used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
