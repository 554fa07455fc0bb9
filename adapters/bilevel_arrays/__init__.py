"""Arrays of other libraries: PyTorch outside and JAX inside, and inner problems on any arrays.

`import bilevel_arrays`; the public names stand in `__init__.pyi`, one line each, and are
imported when they are used. So is the library behind each of them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
