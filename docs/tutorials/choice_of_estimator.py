"""
Which estimator when
====================

An :term:`estimator` is a way to get a :term:`hypergradient` from a solve that was stopped
early. The table says which to take; below it is what it rests on, measured while this page was
built.

.. list-table::
   :header-rows: 1
   :widths: 34 24 42

   * - where you are
     - take
     - because
   * - anything, and no reason to do otherwise
     - ``bl.Implicit()``
     - memory does not grow with the iterations; the adjoint has a solver and budget of its own
   * - few inner steps, or the truncated computation *is* the model, as of learnt optimizers
     - ``bl.Unrolled()``
     - the exact derivative of what was computed, whether or not it is near a solution
   * - the same, and memory is short
     - ``bl.Unrolled(last=T)``
     - the last T steps carry most of the derivative where the iteration contracts
   * - the same, and θ is a handful of numbers
     - ``bl.Unrolled(mode="forward")``
     - no states are kept at all; the price grows with the size of θ
   * - Newton's method, multigrid, any step that contracts fast
     - ``bl.OneStep()``
     - one more step, no adjoint; the error is of the order of the contraction factor
   * - gradient steps, modest accuracy, no linear solver wanted
     - ``bl.Neumann()``
     - a truncated series; converges as slowly as the inner iteration itself
   * - very many unknowns, few directions with curvature
     - ``bl.Nystrom(rank)``
     - no iteration; wrong where what is left out has little curvature and matters
   * - a black box, such as SciPy or scikit-learn
     - ``bl.Implicit()``
     - the only one that needs nothing but the solution

Whichever it is: ``result.error`` says what it cost, in the units of the gradient.
"""

# %%
# A minimisation, with conjugate gradients at hand
# ------------------------------------------------
#
# Ridge regression with 60 weights and a penalty for each, and gradient descent as the inner
# solver. The inner solve gets 200 iterations throughout, which leaves an error far below what
# is drawn; what varies is what the estimator spends on the derivative: iterations of the
# adjoint, terms of the series, or steps that are unrolled.

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bilevel as bl

random = np.random.default_rng(0)
features = random.standard_normal((150, 60)) * np.geomspace(1, 0.3, 60)
features, targets = jnp.asarray(features, "float32"), jnp.asarray(random.standard_normal(150))
unseen, wanted = features[:50] + 0.3, targets[:50]


def objective(w, theta):
    return 0.5 * jnp.mean((features @ w - targets) ** 2) + 0.5 * jnp.sum(jnp.exp(theta) * w**2)


def validation(w, theta):
    return jnp.mean((unseen @ w - wanted) ** 2)


ridge, theta, start = bl.Minimization(objective), jnp.full(60, -3.0), jnp.zeros(60)
exact = bl.hypergradient(validation, ridge, theta, start, error=False).gradient
step_size = 2 / (0.05 + float(jnp.linalg.eigvalsh(features.T @ features / 150)[-1] + 0.05))
descent = bl.GradientDescent(step_size)


def relative_error(gradient, reference):
    """The distance from the exact gradient, over its norm."""
    return float(jnp.linalg.norm(gradient - reference) / jnp.linalg.norm(reference))


def error_of(estimator, iterations, primal=200):
    """The error of an estimator that may spend so many iterations on the derivative."""
    result = bl.hypergradient(
        validation,
        ridge,
        theta,
        start,
        solver=descent,
        estimator=estimator,
        budget=bl.Budget(iterations=primal),
        adjoint_budget=bl.Budget(iterations=iterations),
        error=False,
    )
    return relative_error(result.gradient, exact)


spent = (1, 2, 4, 8, 16, 30)
curves = {
    "Implicit, conjugate gradients": [
        error_of(bl.Implicit(bl.ConjugateGradient()), k) for k in spent
    ],
    "Neumann": [error_of(bl.Neumann(), k) for k in spent],
    "Unrolled(last=T)": [error_of(bl.Unrolled(last=k), 0) for k in spent],
    "Nystrom(rank)": [error_of(bl.Nystrom(rank=k), 1) for k in spent],
}
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for (name, errors), mark in zip(curves.items(), "osx^", strict=True):
    axes.semilogy(spent, errors, f"{mark}-", markersize=4, label=name)
axes.axhline(error_of(bl.OneStep(), 0), color="grey", linestyle=":", label="OneStep, one step")
axes.set(
    xlabel="iterations, terms, unrolled steps or rank",
    ylabel="relative error of the gradient",
    title="What each spends on the derivative, the inner solve being done",
)
axes.legend(fontsize=8)
plt.show()

# %%
# Conjugate gradients are ahead by orders of magnitude, and cost per iteration what the others
# do, one product with the Hessian. The Neumann series and truncated unrolling are the same
# series here, term by term: their curves lie on each other. ``OneStep`` is its first term, and
# on gradient descent a rough direction, no more.

# %%
# Stopping the inner solve early
# ------------------------------
#
# The other question is what an unfinished *inner* solve does to the gradient. Every estimator now
# spends as much on the derivative as the inner solve had.

spent = (2, 4, 8, 16, 32, 64, 128)
curves = {
    "Implicit, conjugate gradients": [
        error_of(bl.Implicit(bl.ConjugateGradient()), k, k) for k in spent
    ],
    "Neumann": [error_of(bl.Neumann(), k, k) for k in spent],
    "Unrolled": [error_of(bl.Unrolled(max_iterations=128), 0, k) for k in spent],
}
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for (name, errors), mark in zip(curves.items(), "osx", strict=True):
    axes.loglog(spent, errors, f"{mark}-", markersize=4, label=name)
axes.set(
    xlabel="iterations of the inner solve, and as many for the derivative",
    ylabel="relative error of the gradient",
)
axes.legend(fontsize=8)
plt.show()

# %%
# Unrolling is behind at first: the derivative of an iteration converges after the iteration
# does (the curse of unrolling, Scieur et al. 2022). With conjugate gradients the adjoint is
# soon exact, and what is left is the error of the primal solve.

# %%
# A root, with Newton's method
# ----------------------------
#
# A step of Newton's method contracts faster the nearer it is. One step is then all that a
# derivative needs, and ``OneStep`` is as good as an adjoint solve and cheaper.

mixing = jnp.eye(30) + 0.1 * jnp.asarray(random.standard_normal((30, 30)), "float32")


def residual(x, theta):
    return mixing @ x + x**3 - theta


root, shift, origin = bl.RootFinding(residual), jnp.ones(30), jnp.zeros(30)


def newton_error(estimator, iterations):
    """The error of the gradient of Σ sin x after so many steps of Newton's method."""
    result = bl.hypergradient(
        lambda x, theta: jnp.sum(jnp.sin(x)),
        root,
        shift,
        origin,
        solver=bl.Newton(),
        estimator=estimator,
        budget=bl.Budget(iterations=iterations),
        error=False,
    )
    return relative_error(result.gradient, best)


best = bl.hypergradient(
    lambda x, theta: jnp.sum(jnp.sin(x)), root, shift, origin, solver=bl.Newton(), error=False
).gradient
steps = (1, 2, 3, 4, 5)
figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
for estimator, mark in ((bl.Implicit(), "o"), (bl.OneStep(), "s"), (bl.Unrolled(), "x")):
    errors = [max(newton_error(estimator, k), 1e-8) for k in steps]
    axes.semilogy(steps, errors, f"{mark}-", markersize=5, label=type(estimator).__name__)
axes.set(xlabel="steps of Newton's method", ylabel="relative error of the gradient", xticks=steps)
axes.legend(fontsize=8)
plt.show()

# %%
# What a gradient is worth
# ------------------------
#
# A curve like these needs the exact gradient, which nobody has in earnest. The estimate that
# comes with every hypergradient needs none, and its two parts say which of the two solves to
# spend more on:

for primal, adjoint in ((8, 30), (200, 3), (200, 30)):
    result = bl.hypergradient(
        validation,
        ridge,
        theta,
        start,
        solver=descent,
        estimator=bl.Implicit(bl.ConjugateGradient()),
        budget=bl.Budget(iterations=primal),
        adjoint_budget=bl.Budget(iterations=adjoint),
    )
    true = jnp.linalg.norm(result.gradient - exact)
    print(
        f"{primal:3} primal, {adjoint:2} adjoint: {result.error.primal:.1e} + "
        f"{result.error.adjoint:.1e} estimated, {true:.1e} true"
    )

# %%
# Prices are compared on larger problems, against other libraries and code by hand, by
# ``python -m benchmarks hypergradients``.
