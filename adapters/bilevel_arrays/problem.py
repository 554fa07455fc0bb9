"""Inner problems written for other arrays than JAX's."""

import abc
from collections.abc import Callable
from typing import Any

from jaxtyping import PyTree

from bilevel.bound import BoundProblem
from bilevel.signature import check_callable
from bilevel_arrays.guard import Guarded
from bilevel_arrays.operators import as_operator, is_symmetric
from bilevel_arrays.pullback import (
    Pullback,
    by_torch,
    by_user,
    gradient_by_torch,
    like_theta,
    no_derivative,
)
from bilevel_arrays.space import Space

Function = Callable[..., Any]


class ArrayProblem(abc.ABC):
    """F(x, θ) = 0 on arrays of any library; base class of the four kinds."""

    def __init__(self, vjp: Function | None):
        self.vjp = vjp
        if vjp is not None:
            check_callable(type(self).__name__, "vjp", vjp, ("x", "theta", "v"))

    @abc.abstractmethod
    def at(self, theta: PyTree, space: Space) -> BoundProblem:
        """The problem at one θ, as solvers see it."""

    @abc.abstractmethod
    def pullback(self, theta: PyTree, x: PyTree, space: Space) -> Pullback:
        """V -> vᵀN and v -> vᵀ∂_θ r at an iterate, with r the downhill residual, N = -∂ₓr."""

    @abc.abstractmethod
    def evaluated(self, theta: PyTree, x: PyTree, space: Space) -> PyTree:
        """What the user's functions compute, as they do: to see what they captured."""

    def _user(self, name: str, function: Function, space: Space, *, vector: bool = True) -> Guarded:
        return Guarded(type(self).__name__, name, function, space, vector=vector)

    def _pulled(self, function: Function, theta: PyTree, x: PyTree, space: Space) -> Pullback:
        """That of the user's function, uphill or a mapping."""
        owner = type(self).__name__
        if self.vjp is not None:
            return by_user(owner, self.vjp, x, theta, space)
        return by_torch(owner, function, x, theta, space)


class Minimization(ArrayProblem):
    """x*(θ) minimises an objective.

    **Arguments:**

    - `objective`: objective(x, theta) -> scalar, in PyTorch, whose autograd differentiates it.
    - `gradient`: gradient(x, theta) -> like x, ∂ₓ objective, for other libraries or in its place.
    - `vjp`: vjp(x, theta, v) -> (like x, like theta): the products of v with the derivatives of
        the gradient, vᵀ∂ₓ(∂ₓ objective) and vᵀ∂_θ(∂ₓ objective); for hypergradients, where the
        gradient is not in PyTorch.

    **Raises:** `TypeError` where neither or both of the first two are given.

    >>> import numpy as np, bilevel as bl, bilevel_arrays as ba
    >>> problem = ba.Minimization(gradient=lambda x, theta: x - theta)
    >>> solver, budget = bl.GradientDescent(step_size=0.5), bl.Budget(iterations=2)
    >>> ba.solve(problem, np.full(1, 4.0), np.zeros(1), solver=solver, budget=budget).value
    array([3.])
    """

    def __init__(
        self,
        objective: Function | None = None,
        *,
        gradient: Function | None = None,
        vjp: Function | None = None,
    ):
        super().__init__(vjp)
        if (objective is None) == (gradient is None):
            msg = (
                "Minimization: give either objective(x, theta), in PyTorch, or gradient=(x, theta) "
                "-> like x."
            )
            raise TypeError(msg)
        self.objective, self.gradient = objective, gradient
        for name, function in (("objective", objective), ("gradient", gradient)):
            if function is not None:
                check_callable("Minimization", name, function, ("x", "theta"))

    def at(self, theta: PyTree, space: Space) -> BoundProblem:
        """The problem at one θ, as solvers see it."""
        if self.gradient is not None:
            own = self._user("gradient(x, theta)", self.gradient, space)

            def residual(x: PyTree) -> PyTree:
                return space.negative(own(x, theta))
        else:
            if not space.is_torch:
                msg = (
                    f"Minimization: arrays of {space.xp.__name__} have no automatic derivatives. "
                    "Give gradient=(x, theta) -> like x in place of the objective."
                )
                raise TypeError(msg)
            assert self.objective is not None
            objective = self._user("objective(x, theta)", self.objective, space, vector=False)

            def residual(x: PyTree) -> PyTree:
                owner = "Minimization: objective(x, theta)"
                return space.negative(gradient_by_torch(owner, objective, x, theta, graph=False))

        return BoundProblem(
            name="Minimization",
            theta=theta,
            residual=residual,
            objective=self.objective or self.gradient,
            symmetric=True,
            positive_definite=True,
        )

    def evaluated(self, theta: PyTree, x: PyTree, space: Space) -> PyTree:
        """The objective, or the gradient."""
        del space
        function = self.objective or self.gradient
        assert function is not None
        return function(x, theta)

    def pullback(self, theta: PyTree, x: PyTree, space: Space) -> Pullback:
        """The Hessian, and the mixed derivative."""
        owner, objective = "Minimization: objective(x, theta)", self.objective

        def derived(x: PyTree, theta: PyTree) -> PyTree:
            assert objective is not None
            return gradient_by_torch(owner, objective, x, theta, graph=True)

        found = self._pulled(self.gradient or derived, theta, x, space)
        return Pullback(found.of_x, lambda v: found.of_theta(space.negative(v)))


class RootFinding(ArrayProblem):
    """x*(θ) with function(x*, θ) = 0.

    **Arguments:**

    - `function`: residual(x, theta) -> like x.
    - `vjp`: vjp(x, theta, v) -> (like x, like theta): vᵀ∂ₓ and vᵀ∂_θ of the function; for
        hypergradients, where it is not in PyTorch.
    - `symmetric`, `positive_definite`: of which kind its Jacobian in x is, if known.

    >>> import numpy as np, bilevel as bl, bilevel_arrays as ba
    >>> problem = ba.RootFinding(lambda x, theta: 2 * x - theta)
    >>> solver = bl.Richardson(step_size=0.5)
    >>> ba.solve(problem, np.full(1, 6.0), np.zeros(1), solver=solver).value
    array([3.])
    """

    def __init__(
        self,
        function: Function,
        *,
        vjp: Function | None = None,
        symmetric: bool | None = None,
        positive_definite: bool | None = None,
    ):
        super().__init__(vjp)
        check_callable("RootFinding", "function", function, ("x", "theta"))
        self.function = function
        self.symmetric, self.positive_definite = symmetric, positive_definite

    def at(self, theta: PyTree, space: Space) -> BoundProblem:
        """The problem at one θ, as solvers see it."""
        function = self._user("function(x, theta)", self.function, space)
        return BoundProblem(
            name="RootFinding",
            theta=theta,
            residual=lambda x: space.negative(function(x, theta)),
            symmetric=self.symmetric,
            positive_definite=self.positive_definite,
        )

    def evaluated(self, theta: PyTree, x: PyTree, space: Space) -> PyTree:
        """The function."""
        del space
        return self.function(x, theta)

    def pullback(self, theta: PyTree, x: PyTree, space: Space) -> Pullback:
        """The Jacobian."""
        found = self._pulled(self.function, theta, x, space)
        return Pullback(found.of_x, lambda v: found.of_theta(space.negative(v)))


class FixedPoint(ArrayProblem):
    """x*(θ) with x* = mapping(x*, θ).

    **Arguments:**

    - `mapping`: mapping(x, theta) -> like x; a contraction in x near the solution.
    - `vjp`: vjp(x, theta, v) -> (like x, like theta): vᵀ∂ₓ and vᵀ∂_θ of the mapping; for
        hypergradients, where it is not in PyTorch.
    - `symmetric`: whether the Jacobian of the mapping in x is symmetric, if known.

    >>> import numpy as np, bilevel as bl, bilevel_arrays as ba
    >>> problem = ba.FixedPoint(lambda x, theta: theta * np.cos(x))
    >>> round(float(ba.solve(problem, 1.0, np.full(1, 0.5)).value[0]), 4)
    0.7391
    """

    def __init__(
        self, mapping: Function, *, vjp: Function | None = None, symmetric: bool | None = None
    ):
        super().__init__(vjp)
        check_callable("FixedPoint", "mapping", mapping, ("x", "theta"))
        self.mapping, self.symmetric = mapping, symmetric

    def at(self, theta: PyTree, space: Space) -> BoundProblem:
        """The problem at one θ, as solvers see it."""
        mapping = self._user("mapping(x, theta)", self.mapping, space)
        return BoundProblem(
            name="FixedPoint",
            theta=theta,
            residual=lambda x: space.subtract(mapping(x, theta), x),
            mapping=lambda x: mapping(x, theta),
            symmetric=self.symmetric,
        )

    def evaluated(self, theta: PyTree, x: PyTree, space: Space) -> PyTree:
        """The mapping."""
        del space
        return self.mapping(x, theta)

    def pullback(self, theta: PyTree, x: PyTree, space: Space) -> Pullback:
        """I minus the Jacobian of the mapping."""
        found = self._pulled(self.mapping, theta, x, space)
        return Pullback(lambda v: space.subtract(v, found.of_x(v)), found.of_theta)


class LinearSystem(ArrayProblem):
    """x*(θ) with A(θ) x* = b(θ).

    **Arguments:**

    - `operator`: operator(theta) -> a square matrix of the unknown's library, dense or sparse
        (`scipy.sparse`, `cupyx.scipy.sparse`, `torch.sparse`), a matvec function v -> A v, a pair
        (matvec, rmatvec), or an object with `matvec` and optionally `rmatvec` and `diagonal`;
        or, where it does not depend on θ, one of these itself, but for a bare function.
    - `rhs`: rhs(theta) -> b, like x; or b itself.
    - `vjp`: vjp(x, theta, v) -> like theta: vᵀ∂_θ(b(θ) - A(θ)x); for hypergradients, where
        operator and right-hand side are not in PyTorch.
    - `symmetric`, `positive_definite`: whether A is so; a constant matrix is looked at.

    Adjoints apply the transpose: of a matrix, the `rmatvec`, or what torch's autograd finds.

    >>> import numpy as np, scipy.sparse, bilevel as bl, bilevel_arrays as ba
    >>> A = scipy.sparse.diags_array([2.0, 4.0]).tocsr()
    >>> problem = ba.LinearSystem(A, lambda theta: theta * np.ones(2))
    >>> ba.solve(problem, 8.0, np.zeros(2)).value
    array([4., 2.])
    """

    def __init__(
        self,
        operator: Any,
        rhs: Any,
        *,
        vjp: Function | None = None,
        symmetric: bool | None = None,
        positive_definite: bool | None = None,
    ):
        super().__init__(vjp)
        self.operator, self.rhs = operator, rhs
        self.symmetric, self.positive_definite = symmetric, positive_definite
        self._functions = {
            "operator": callable(operator) and not callable(getattr(operator, "matvec", None)),
            "rhs": callable(rhs),
        }
        for name, value in (("operator", operator), ("rhs", rhs)):
            if self._functions[name]:
                check_callable("LinearSystem", name, value, ("theta",))

    def at(self, theta: PyTree, space: Space) -> BoundProblem:
        """The problem at one θ: operator and right-hand side are evaluated once."""
        operator = self._operator(theta, space, guarded=True)
        rhs = self._rhs(theta, space, guarded=True)
        space.require_like("LinearSystem: the right-hand side", rhs)
        return BoundProblem(
            name="LinearSystem",
            theta=theta,
            residual=lambda x: space.subtract(rhs, operator.matvec(x)),
            operator=operator,
            rhs=rhs,
            symmetric=operator.symmetric,
            positive_definite=operator.positive_definite,
            matrix_free=True,
        )

    def evaluated(self, theta: PyTree, x: PyTree, space: Space) -> PyTree:
        """The residual b - A x."""
        matvec = self._operator(theta, space, guarded=False).matvec
        return space.subtract(self._rhs(theta, space, guarded=False), matvec(x))

    def pullback(self, theta: PyTree, x: PyTree, space: Space) -> Pullback:
        """The transpose of A, and what the user or torch's autograd says of θ."""
        operator = self._operator(theta, space, guarded=False)
        transposed = operator.matvec if operator.symmetric else operator.rmatvec
        found: Pullback | None = None
        if self.vjp is None and space.is_torch:

            def residual(x: PyTree, theta: PyTree) -> PyTree:
                return self.evaluated(theta, x, space)

            found = by_torch("LinearSystem", residual, x, theta, space)
        if transposed is None:
            if found is None:
                msg = (
                    "LinearSystem: the adjoint needs the transpose of the operator, and a bare "
                    "function has none here. Give a pair (matvec, rmatvec), an object with an "
                    "rmatvec method, a matrix, or symmetric=True where it is so."
                )
                raise TypeError(msg)
            pull = found.of_x

            def transposed(v: PyTree) -> PyTree:
                return space.negative(pull(v))

        if found is not None:
            return Pullback(transposed, found.of_theta)
        if self.vjp is None:
            msg = no_derivative("LinearSystem", space).replace("(like x, like theta)", "like theta")
            raise TypeError(msg)
        vjp, what = self.vjp, "LinearSystem: vjp(x, theta, v)"
        return Pullback(transposed, lambda v: like_theta(what, theta, vjp(x, theta, v)))

    def _operator(self, theta: PyTree, space: Space, *, guarded: bool) -> Any:
        given, symmetric = self.operator, self.symmetric
        if self._functions["operator"]:
            function = self._user("operator(theta)", given, space, vector=False)
            given = function(theta) if guarded else given(theta)
        elif symmetric is None:
            symmetric = is_symmetric(given, space)
        operator = as_operator(
            "LinearSystem",
            given,
            space,
            symmetric=symmetric,
            positive_definite=self.positive_definite,
        )
        if not guarded:
            return operator
        # A guarded function of its own: what it does to v is the solver's.
        matvec = self._user("operator.matvec(v)", operator.matvec, space)
        return _with_matvec(operator, matvec)

    def _rhs(self, theta: PyTree, space: Space, *, guarded: bool) -> PyTree:
        if not self._functions["rhs"]:
            return self.rhs
        return (self._user("rhs(theta)", self.rhs, space) if guarded else self.rhs)(theta)


def _with_matvec(operator: Any, matvec: Function) -> Any:
    return type(operator)(
        matvec,
        operator.rmatvec,
        operator.diagonal,
        None,
        operator.symmetric,
        operator.positive_definite,
    )
