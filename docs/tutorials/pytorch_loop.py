"""
Refine your own training loop in PyTorch
========================================

A controller is three functions on a handful of numbers. Told Python's own numbers it computes with
NumPy: nothing of it asks for JAX arrays, and so it can lead any loop at all, one in PyTorch among
them. What stays yours is the solver; what the controller gives is the number of its iterations.
"""

# %%
# The controller by itself
# ------------------------
#
# Metrics in, budgets out. These are made up: they stall twice.

import bilevel as bl

ladder = bl.Ladder.iterations(start=2, step=4, stop=40)
controller = bl.ProgressiveRefinement(ladder, ema_window=None)
state = controller.init()
for metric in (1.0, 0.5, 0.3, 0.299, 0.2985, 0.2, 0.12, 0.119, 0.1189):
    state = controller.update(state, metric)
    budget = controller.fidelity(state).budget
    print(f"metric {metric:.3f}: {int(budget.iterations):2} iterations from here on")

# %%
# A state can be saved like any other: it is a tuple of small NumPy arrays.

print(type(state).__name__, {name: value.tolist() for name, value in state._asdict().items()})

# %%
# A loop in PyTorch
# -----------------
#
# The heat problem of :doc:`jax_loop`, with Jacobi's method written in PyTorch and
# differentiated by unrolling: the loop runs as often as the controller says, and autograd goes
# back through it. PyTorch compiles nothing here, so another count costs nothing.
#
# PyTorch is no requirement of this package. Where it is not installed, as it may be where this page
# was built, the functions below are defined and not called.

try:
    import torch
except ImportError:
    torch = None

POINTS = 30
WEIGHT = 1e-3 * (POINTS + 1) ** 2


def jacobi(rhs, iterations):
    """Iterations for u - κΔt u″ = rhs, from zero, a batch of profiles at once."""
    u = torch.zeros_like(rhs)
    for _ in range(iterations):
        beside = torch.nn.functional.pad(u, (1, 1))
        u = (rhs + WEIGHT * (beside[:, :-2] + beside[:, 2:])) / (1 + 2 * WEIGHT)
    return u


def states(count):
    """Random profiles: a few sine modes."""
    grid = torch.arange(1, POINTS + 1) / (POINTS + 1)
    modes = torch.sin(torch.pi * torch.arange(1, 6)[:, None] * grid)
    return torch.randn(count, 5) @ modes


def train_with(controller, epochs=60, converged=200):
    """Train, and return the last metric and the sum of iterations."""
    torch.manual_seed(0)
    inputs, unseen = states(200), states(20)
    targets, wanted = (jacobi(jacobi(u, converged), converged) for u in (inputs, unseen))
    network = torch.nn.Sequential(
        torch.nn.Linear(POINTS, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, POINTS),
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)

    def validate():
        with torch.no_grad():
            found = jacobi(network(unseen), converged)
            return float(torch.mean((found - wanted) ** 2) / torch.mean(wanted**2))

    state = controller.update(controller.init(), validate())  # before training
    total = 0
    for _ in range(epochs):
        iterations = int(controller.fidelity(state).budget.iterations)
        for batch, target in zip(inputs.split(50), targets.split(50), strict=True):
            optimizer.zero_grad()
            loss = torch.mean((jacobi(network(batch), iterations) - target) ** 2)
            loss.backward()
            if all(torch.isfinite(p.grad).all() for p in network.parameters()):
                optimizer.step()
            total += 2 * iterations  # forward, and back again
        state = controller.update(state, validate())
    return validate(), total


if torch is None:
    print("PyTorch is not installed here: the loop was not run.")
else:
    ladder = bl.Ladder.iterations(start=1, step=1, stop=25)
    for name, chosen in {
        "25 iterations always": bl.FixedFidelity(ladder.fidelity(24)),
        "progressive refinement": bl.ProgressiveRefinement(ladder),
    }.items():
        metric, total = train_with(chosen)
        print(f"{name}: {metric:.4f} after {total:,} iterations")

# %%
# What is not there yet
# ---------------------
#
# Estimates of the error, statuses and implicit gradients come from ``bl.solve``, which takes
# JAX arrays. An inner problem that is written in JAX can be called from PyTorch through DLPack
# (``jax.dlpack.from_dlpack``, ``torch.from_dlpack``) inside a ``torch.autograd.Function`` of
# your own; an adapter that does so is planned and not part of this version.
