# The public names of bilevel_arrays, one line each; `__init__.py` imports them when they are used.

from . import torch as torch
