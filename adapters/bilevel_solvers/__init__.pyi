# The public names of bilevel_solvers, one line each; `__init__.py` imports them when they are used.

from .black_box import BlackBox as BlackBox
from .black_box import Run as Run
from .estimator_solver import sklearn as sklearn
from .host_solver import host as host
from .jaxopt_solver import jaxopt as jaxopt
from .lineax_solver import lineax as lineax
from .minimize_solver import scipy_minimize as scipy_minimize
from .optax_solver import optax as optax
from .optimistix_solver import optimistix as optimistix
from .pyamg_solver import pyamg as pyamg
from .root_solver import scipy_root as scipy_root
from .scipy_bridge import Evaluation as Evaluation
from .scipy_bridge import NonFiniteEvaluationError as NonFiniteEvaluationError
from .scipy_bridge import ScipyObjective as ScipyObjective
from .scipy_bridge import scipy_objective as scipy_objective
from .search import BilevelSearch as BilevelSearch
from .sparse_solver import scipy_sparse as scipy_sparse
