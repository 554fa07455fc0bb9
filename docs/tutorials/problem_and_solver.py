"""
A problem and a solver of your own
==================================

Four kinds of :term:`inner problem` are there to be called: a minimisation, a root, a fixed point, a
linear system. Here neither the problem nor the solver is among what the package has. Both are
written, and both are put to the conformance kit, which looks for the mistakes that otherwise show
up as a training run that does not train.
"""

# %%
# The problem: a hanging cable
# ----------------------------
#
# A cable of 21 point masses hangs between two posts. Its links are springs whose force grows with
# the cube of their strain besides, and θ holds what a manufacturer could choose: the logarithm of
# the stiffness, and each mass. The unknown *x* is where the masses are, and at rest the forces on
# every mass add up to nothing.
#
# An inner problem is a class with one method, ``residual``: zero at the solution, of the shape
# of *x*. Its fields are declared as in a dataclass.

from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import bilevel as bl
from bilevel.testing import ConformanceError, check_inner_problem, check_inner_solver, taylor_test

MASSES = 21


class Cable(bl.InnerProblem):
    """Where the masses of a cable between (0, 0) and (span, 0) come to rest."""

    span: float
    symmetric = True  # the forces have a potential, so that their derivative is symmetric

    def forces(self, x, theta):
        """The force on each mass, positions of shape (masses, 2)."""
        ends = jnp.array([[0.0, 0.0], [self.span, 0.0]], x.dtype)
        points = jnp.concatenate([ends[:1], x, ends[1:]])
        link = points[1:] - points[:-1]
        length = jnp.linalg.norm(link, axis=1, keepdims=True)
        strain = length * (MASSES + 1) / self.span - 1
        tension = jnp.exp(theta["stiffness"]) * (strain + strain**3) * link / length
        weight = jnp.stack([jnp.zeros(MASSES), -theta["mass"]], axis=1)
        return tension[1:] - tension[:-1] + weight

    def residual(self, x, theta):
        """Minus the force: its derivative in x has positive eigenvalues where a cable is stable."""
        return -self.forces(x, theta)


cable = Cable(1.0)
theta = {"stiffness": jnp.log(jnp.float32(3.0)), "mass": jnp.full(MASSES, 0.05)}
straight = jnp.stack([jnp.linspace(0, 1, MASSES + 2)[1:-1], jnp.zeros(MASSES)], axis=1)
sagging = straight.at[:, 1].set(-0.5 * jnp.sin(jnp.pi * straight[:, 0]))

# %%
# The kit compares what a problem claims with what it does: shapes and dtypes, ``jit``,
# ``vmap``, both derivatives, and the symmetry that was declared.

print(*check_inner_problem(cable, theta, sagging), sep=", ")

# %%
# A claim that is not true is found. Rods that push each mass by the height of its left
# neighbour, and not the other way round, have no potential, and whoever forgets to take the
# declaration back is told:


class Pushed(Cable):
    """A cable with forces that are not symmetric."""

    def residual(self, x, theta):
        return -self.forces(x, theta) - 30.0 * jnp.roll(x[:, ::-1], 1, axis=0)


try:
    check_inner_problem(Pushed(1.0), theta, sagging)
except ConformanceError as error:
    print(error)

# %%
# The solver: Barzilai and Borwein's steps
# ----------------------------------------
#
# A solver makes one step. It does not decide when to stop, counts nothing and checks nothing: the
# one loop of the package does, for every solver. This one goes along the residual, by a step whose
# length comes from the last two points and residuals (Barzilai and Borwein 1988). The residual that
# it is given points downhill, whatever the sign of the problem's own.


class State(NamedTuple):
    """Where the iteration is, and what it needs of the step before."""

    x: jax.Array
    before: jax.Array
    residual: jax.Array
    length: jax.Array


class BarzilaiBorwein(bl.InnerSolver):
    """Gradient steps whose length is ⟨s, s⟩ / ⟨s, y⟩ of the last differences."""

    first: float  # length of the first step
    adaptive = True  # the length depends on the residual: OneStep, which takes it as fixed, refuses

    def init(self, problem, x):
        """Where the iteration starts."""
        zero = jnp.zeros_like(x)
        return State(x, x, zero, jnp.asarray(self.first, x.dtype))

    def step(self, problem, state, residual):
        """One step."""
        s, y = state.x - state.before, state.residual - residual
        curvature = jnp.sum(s * y)
        usable = curvature > 0
        length = jnp.sum(s * s) / jnp.where(usable, curvature, 1)
        length = jnp.where(usable, length, state.length)
        return State(state.x + length * residual, state.x, residual, length)


# %%
# The kit tries it on a small problem that it suits: that budgets are kept, that a status is
# true, that ``jit`` and ``vmap`` change nothing, that single precision stays so.

print(*check_inner_solver(BarzilaiBorwein(0.1)), sep=", ")

# %%
# and on ours:

budget = bl.Budget(iterations=400, rtol=1e-5)
print(len(check_inner_solver(BarzilaiBorwein(0.01), cable, theta, sagging, budget=budget)), "hold")

# %%
# Both at work
# ------------
#
# What was written above is all there is to write. Budgets, statuses, the residual's history and
# every estimator work with it.

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
for solver in (BarzilaiBorwein(0.01), bl.Newton(), bl.Richardson(0.003)):
    solution = bl.solve(cable, theta, sagging, solver=solver, budget=budget, history=400)
    name = type(solver).__name__
    print(f"{name:16} {bl.Status(int(solution.status)).name:10} {solution.iterations:4} iterations")
    left.semilogy(solution.history / solution.scale, label=name)
    if isinstance(solver, BarzilaiBorwein):
        right.plot(*sagging.T, ":", color="grey", label="start")
        right.plot(*solution.value.T, "o-", markersize=3, label="at rest")
left.set(xlabel="iteration", ylabel="relative residual", ylim=(1e-7, None))
left.legend()
right.legend()
right.set_aspect("equal")
plt.show()

# %%
# And the point of it all: design the cable. Which masses make it hang like a parabola, at the least
# weight? The gradient comes from the implicit function theorem, through an adjoint solve whose
# status the result tells.


def unlike_a_parabola(x, theta):
    """How far the cable is from the wanted curve, and how heavy it is."""
    wanted = -4 * 0.35 * x[:, 0] * (1 - x[:, 0])
    return jnp.sum((x[:, 1] - wanted) ** 2) + 1e-3 * jnp.sum(theta["mass"])


result = bl.hypergradient(
    unlike_a_parabola, cable, theta, sagging, solver=BarzilaiBorwein(0.01), budget=budget
)
print(f"dL/d(log stiffness) = {result.gradient['stiffness']:.4f}")
print(f"the gradient's error is about {result.error.total:.1e}")
print("adjoint:", result.adjoint.diagnosis)

# %%
# That the derivative is one can be tested without any formula: the remainder of its Taylor
# expansion falls with the square of the step. In double precision, which this needs:

with jax.enable_x64(True):
    fine = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (theta, sagging))

    def loss(theta):
        x = bl.solve(cable, theta, fine[1], solver=bl.Newton()).value
        return unlike_a_parabola(x, theta)

    print(f"the remainder falls with the power {taylor_test(loss, fine[0]).slope:.2f} of the step")

# %%
# :doc:`/custom` has the rest: signs, what a step may use of the problem, what a solver declares.
