# The public names of bilevel_solvers, one line each; `__init__.py` imports them when they are used.

from .scipy_bridge import Evaluation as Evaluation
from .scipy_bridge import NonFiniteEvaluationError as NonFiniteEvaluationError
from .scipy_bridge import ScipyObjective as ScipyObjective
from .scipy_bridge import scipy_objective as scipy_objective
from .search import BilevelSearch as BilevelSearch
