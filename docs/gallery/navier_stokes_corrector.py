"""
A corrector for a flow solver
=============================

The largest of the published experiments: a network corrects a coarse solver of the
Navier–Stokes equations, and is trained through two of its steps, each a coupled linear solve
for both velocities and the pressure by GMRES in cycles of eight.
"""

# %%
# One step of the solver
# ----------------------
#
# To train takes hours at full size. What can be seen in a minute is what the budget of its
# solves, in cycles, does to a step, and to the gradient that a network in front of it would
# get.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from short_runs import example

import bilevel as bl
import bilevel_pde as pde

navier_stokes_corrector = example("navier_stokes_corrector")
flow = navier_stokes_corrector.stepper(24)
start = jnp.stack(pde.random_velocity(jax.random.key(3), flow.staggered, 3e-3))


def loss(u, fidelity):
    """The squared velocity after a step, weighted as by a smooth error."""
    solution = navier_stokes_corrector.solved((flow, u, u), fidelity)
    moved = jnp.stack(solution.value[0])
    return jnp.mean((moved - 0.9 * u) ** 2), (solution.relative_residual, moved)


evaluate = jax.jit(jax.value_and_grad(loss, has_aux=True))


def after(cycles):
    """Residual, state and gradient after so many cycles, forward and backward."""
    budget = bl.Budget(iterations=cycles, rtol=1e-6)
    (_, (residual, moved)), gradient = evaluate(start, bl.Fidelity(budget, budget))
    return float(residual), moved, gradient


cycles = (1, 2, 3, 4, 6, 8, 12, 16, 24)
_, reference, exact = after(300)
found = [after(count) for count in cycles]
errors = [jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact) for *_, gradient in found]
print(f"{evaluate._cache_size()} compilation for {len(cycles) + 1} budgets")

# %%
# The vorticity after a step of two cycles, and after one that is solved out.


def vorticity(u):
    """∂v/∂x - ∂u/∂y, by differences of neighbouring faces."""
    u = np.asarray(u)
    return (u[1] - np.roll(u[1], 1, 0)) - (u[0] - np.roll(u[0], 1, 1))


figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(8.8, 3.1), width_ratios=(1.5, 1, 1), layout="constrained"
)
left.semilogy(cycles, [residual for residual, *_ in found], "o-", label="relative residual")
left.semilogy(cycles, errors, "s-", label="relative error of the gradient")
left.set(xlabel="cycles of GMRES, forward and backward")
left.legend(fontsize=8)
for axes, u, name in ((middle, found[1][1], "two cycles"), (right, reference, "solved out")):
    axes.imshow(vorticity(u).T, origin="lower", cmap="RdBu_r", vmin=-2, vmax=2)
    axes.set_title(name)
    axes.set_axis_off()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/navier_stokes_corrector.py --set size=small`` trains on two cores
# in minutes a policy; :doc:`/results` has what came of it.
#
# .. dropdown:: examples/navier_stokes_corrector.py
#
#    .. literalinclude:: /../examples/navier_stokes_corrector.py
