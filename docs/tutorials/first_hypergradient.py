"""
A first hypergradient
=====================

Five minutes from an inner problem to its :term:`hypergradient`, to an estimate of that gradient's
error, and to a training run that spends only the iterations it needs.
"""

# %%
# The problem
# -----------
#
# A ridge regression has a penalty, and someone has to choose it. Let that be a gradient method:
# the weights *w* are fitted to training data under a penalty exp(θ), which is the :term:`inner
# problem`, and θ is to make the error of these weights on other data small, which is the
# :term:`outer loss`.

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevel as bl

X, Z = jax.random.normal(jax.random.key(0), (2, 100, 20))  # training and validation inputs
noise = 0.5 * jax.random.normal(jax.random.key(1), (2, 100))
y, z = X[:, :5].sum(1) + noise[0], Z[:, :5].sum(1) + noise[1]  # 5 of 20 features matter


def objective(w, theta):
    return jnp.mean((X @ w - y) ** 2) + jnp.exp(theta) * jnp.sum(w**2)


def validation(w, theta):
    return jnp.mean((Z @ w - z) ** 2)


problem = bl.Minimization(objective)

# %%
# One gradient
# ------------
#
# ``bl.hypergradient`` takes the outer loss, the problem, θ and a start for the inner solve. How far
# the inner solve goes is its :term:`budget`.

start = jnp.zeros(20)
result = bl.hypergradient(
    validation,
    problem,
    jnp.zeros(()),
    start,
    solver=bl.GradientDescent(step_size=0.1),
    budget=bl.Budget(iterations=10),
)
print(f"dL/dθ = {result.gradient:.4f}, off by about {result.error.total:.1e}")

# %%
# The result says more than a number. Two solves stand behind it: the primal one, for *w*, and the
# :term:`adjoint` one, for the gradient. Each has a status, a residual and a count of iterations.

for name, solution in (("primal", result.primal), ("adjoint", result.adjoint)):
    status = bl.Status(int(solution.status)).name
    print(f"{name}: {status} after {solution.iterations} iterations")
print("short?", result.diagnosis.partition(". ")[0])

# %%
# Is the estimate right? The gradient of a solve that is not stopped early tells.

exact = bl.hypergradient(validation, problem, jnp.zeros(()), start, error=False).gradient
print(f"truly off by {abs(result.gradient - exact):.1e}")

# %%
# What a budget buys
# ------------------
#
# Budgets are values, not part of the compiled program, so trying eleven of them compiles once.

budgets = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
true, estimated = [], []
for iterations in budgets:
    result = bl.hypergradient(
        validation,
        problem,
        jnp.zeros(()),
        start,
        solver=bl.GradientDescent(step_size=0.1),
        budget=bl.Budget(iterations=iterations),
    )
    true.append(abs(result.gradient - exact))
    estimated.append(result.error.total)

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.semilogy(budgets, true, "o-", label="true error")
axes.semilogy(budgets, estimated, "x--", label="estimated error")
axes.axhline(abs(exact), color="grey", linewidth=1)
axes.annotate("|dL/dθ|", (budgets[-1], abs(exact)), ha="right", va="bottom", color="grey")
axes.set(xlabel="iterations of the inner solve", ylabel="error of the gradient")
axes.legend()
plt.show()

# %%
# In code of your own
# -------------------
#
# ``bl.solve`` is the inner solution as a function of θ, differentiable like anything else in
# JAX, by ``jax.grad``, ``jax.jvp`` and ``jax.vmap``, under ``jax.jit``.


@jax.jit
def loss(theta):
    w = bl.solve(problem, theta, start, solver=bl.GradientDescent(step_size=0.1)).value
    return validation(w, theta)


print(f"dL/dθ = {jax.grad(loss)(jnp.zeros(())):.4f}")

# %%
# A first refined run
# -------------------
#
# Far from the optimum, a rough gradient points the right way. *Progressive refinement* starts with
# a small budget and raises it when the validation metric stalls. The task's loss is handed a
# :term:`fidelity`, the budgets of this update, and passes it on; the budgets to go through are a
# :term:`ladder`.


def refined_loss(theta, batch, fidelity):
    solver = bl.GradientDescent(step_size=0.1)
    w = bl.solve(problem, theta, start, solver=solver, fidelity=fidelity).value
    return validation(w, theta)


task = bl.Task(
    jnp.ones(()),
    refined_loss,
    validate=lambda theta: validation(bl.solve(problem, theta, start).value, theta),
    optimizer=optax.adam(0.1),
    epochs=80,
    ladder=bl.Ladder.iterations(start=2, step=3, stop=50),
    metric_name="validation error",
)
comparison = bl.compare(task, ("full", "prdp", "auto"), progress=False)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
for policy, runs in comparison.runs.items():
    history = runs[0].history
    left.plot(history.cumulative("primal_iterations"), history.column("metric"), label=policy)
    right.plot(history.column("epoch"), history.column("budget_iterations"), label=policy)
left.set(xlabel="primal iterations so far", ylabel="validation error", xscale="symlog")
right.set(xlabel="epoch", ylabel="iterations allowed in a solve")
left.legend()
plt.show()

# %%
# ``full`` solves every update to the ladder's last budget; ``prdp`` is progressive refinement
# as it was published; ``auto`` has nothing to set and measures the gradient's error now and
# then. ``bl.plot_runs`` and ``comparison.save`` write larger pictures and tables than these.

for policy, runs in comparison.runs.items():
    summary = runs[0].summary
    print(
        f"{policy}: validation error {summary.final_metric:.4f} after "
        f"{summary.primal_iterations} primal and {summary.adjoint_iterations} adjoint iterations"
    )

# %%
# Where to go from here
# ---------------------
#
# - :doc:`/tasks`: the same from the command line, with checkpoints, configurations and reports.
# - :doc:`problem_and_solver`: when none of the four kinds of inner problem is yours.
# - :doc:`choice_of_estimator`: other ways to the gradient, and when they pay.
