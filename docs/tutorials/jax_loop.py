"""
Refine your own training loop in JAX
====================================

A training loop that exists already needs three lines more: the controller names a
:term:`fidelity`, the loss hands it to the solve, and once an epoch the controller is told the
validation metric. Here the loop trains a small network in front of a heat solver, with minibatches
and `optax <https://optax.readthedocs.io>`_.
"""

# %%
# What is trained
# ---------------
#
# The network sees a temperature profile and proposes an intermediate state; one implicit heat
# step then has to bring that to where *two* steps lead. The step is a linear system, which
# Jacobi's method solves, and the gradient reaches the network through it.

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import bilevel as bl

POINTS = 30
WEIGHT = 1e-3 * (POINTS + 1) ** 2


class HeatStep:
    """(I - κΔt ∂²/∂x²) with zero boundary values, as an operator object."""

    symmetric = positive_definite = True

    def matvec(self, u):
        """Three-point differences."""
        padded = jnp.pad(u, 1)
        return u + WEIGHT * (2 * u - padded[:-2] - padded[2:])

    def diagonal(self):
        """What Jacobi divides by."""
        return jnp.full(POINTS, 1 + 2 * WEIGHT)


heat_step = bl.LinearSystem(HeatStep(), lambda u: u)
grid = jnp.arange(1, POINTS + 1) / (POINTS + 1)


def states(key, count):
    """Random profiles: a few sine modes."""
    amplitudes = jax.random.normal(key, (count, 5))
    return amplitudes @ jnp.sin(jnp.pi * jnp.arange(1, 6)[:, None] * grid)


def exact_step(u):
    """One step to the default accuracy, a sample at a time."""
    return jax.vmap(lambda sample: bl.solve(heat_step, sample, jnp.zeros(POINTS)).value)(u)


train, unseen = states(jax.random.key(0), 200), states(jax.random.key(1), 20)
train_target, unseen_target = (exact_step(exact_step(u)) for u in (train, unseen))
network = eqx.nn.MLP(POINTS, POINTS, 64, 2, key=jax.random.key(2))

# %%
# The loss passes the fidelity on. Under ``vmap`` every sample has a count and a status of its own.


def loss(network, batch, fidelity):
    inputs, targets = batch

    def one(u):
        return bl.solve(
            heat_step,
            network(u),
            jnp.zeros(POINTS),
            solver=bl.Jacobi(),
            estimator=bl.Implicit(solver=bl.Jacobi()),
            fidelity=fidelity,
        ).value

    return jnp.mean((jax.vmap(one)(inputs) - targets) ** 2)


@eqx.filter_jit
def validate(network):
    """The normalised error on unseen states, with the step solved out."""
    found = exact_step(jax.vmap(network)(unseen))
    return jnp.mean((found - unseen_target) ** 2) / jnp.mean(unseen_target**2)


# %%
# The loop
# --------
#
# The update is compiled once: the fidelity is an argument, and all that a controller changes in
# it is the value of arrays. A ``bl.Probe`` is an argument full of zeros whose derivative
# carries the report of the solves out of the backward pass; it costs nothing.

optimizer = optax.adam(2e-3)
traced = []


@eqx.filter_jit
def update(network, optimizer_state, batch, fidelity):
    traced.append("once a compilation, for Python runs this line only while JAX traces it")

    def probed(arguments):
        network, probe = arguments
        return loss(network, batch, fidelity.with_probe(probe))

    value, (gradient, report) = eqx.filter_value_and_grad(probed)((network, bl.Probe.zeros()))
    change, new_state = optimizer.update(gradient, optimizer_state)
    usable = report.failures == 0  # a failed solve leaves a gradient of NaN: skip the update
    change = jax.tree.map(lambda leaf: jnp.where(usable, leaf, 0), change)
    kept = jax.tree.map(lambda new, old: jnp.where(usable, new, old), new_state, optimizer_state)
    return eqx.apply_updates(network, change), kept, value, report


def train_with(controller, epochs=60):
    """What a run went through: metric, budget and iterations, epoch by epoch."""
    trained = network
    optimizer_state = optimizer.init(eqx.filter(trained, eqx.is_array))
    rows, iterations = [], 0
    state = controller.update(controller.init(), float(validate(trained)))  # before training
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(epoch), len(train))
        fidelity = controller.fidelity(state)
        for start in range(0, len(train), 50):
            batch = [data[order[start : start + 50]] for data in (train, train_target)]
            trained, optimizer_state, _, report = update(trained, optimizer_state, batch, fidelity)
            iterations += int(report.primal_iterations) + int(report.adjoint_iterations)
        metric = float(validate(trained))
        state = controller.update(state, metric)
        rows.append((epoch, metric, int(fidelity.budget.iterations), iterations))
    return jnp.array(rows).T


# %%
# Three controllers through the same loop, and one compilation for all of them:

ladder = bl.Ladder.iterations(start=1, step=1, stop=25)
runs = {
    "25 iterations always": train_with(bl.FixedFidelity(ladder.fidelity(24))),
    "3 iterations always": train_with(bl.FixedFidelity(ladder.fidelity(2))),
    "progressive refinement": train_with(bl.ProgressiveRefinement(ladder)),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name, (epoch, metric, budget, iterations) in runs.items():
    left.loglog(iterations, metric, label=name)
    right.plot(epoch, budget, label=name)
    print(f"{name}: {metric[-1]:.4f} after {iterations[-1]:,.0f} iterations, summed over samples")
print(f"compilations of the update: {len(traced)}")
left.set(xlabel="Σ primal and adjoint iterations", ylabel="validation error")
right.set(xlabel="epoch", ylabel="iterations allowed in a solve")
right.legend(fontsize=8)
plt.show()

# %%
# What a controller is told
# -------------------------
#
# ``ProgressiveRefinement`` reads the metric alone, and once an epoch is a habit, not a rule:
# call ``update`` as often as there is something to tell. ``ErrorControlled`` reads the
# gradient's norm and the estimate of its error instead, after any update, which
# ``bl.hypergradient`` returns:

controller = bl.ErrorControlled(ladder)
state = controller.init()
samples = train[:50], train_target[:50]
for _ in range(4):
    fidelity = controller.fidelity(state)
    result = bl.hypergradient(
        lambda x, u: jnp.mean((x - samples[1][0]) ** 2),
        heat_step,
        network(samples[0][0]),
        jnp.zeros(POINTS),
        solver=bl.Jacobi(),
        estimator=bl.Implicit(solver=bl.Jacobi()),
        fidelity=fidelity,
    )
    norm = jnp.linalg.norm(result.gradient)
    state = controller.update(state, gradient_norm=norm, error=result.error)
    print(
        f"{fidelity.budget.iterations} primal and {fidelity.adjoint_budget.iterations} adjoint "
        f"iterations: the error is {result.error.total / norm:.2f} of the gradient"
    )

# %%
# The same loop with checkpoints, a history, a command line and comparisons over seeds is
# ``bl.optimize``: :doc:`/tasks`.
