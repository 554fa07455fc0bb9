# The public names of bilevel_arrays, one line each; `__init__.py` imports them when they are used.

from . import mesh as mesh
from . import torch as torch
from .problem import FixedPoint as FixedPoint
from .problem import LinearSystem as LinearSystem
from .problem import Minimization as Minimization
from .problem import RootFinding as RootFinding
from .solving import hypergradient as hypergradient
from .solving import solve as solve
