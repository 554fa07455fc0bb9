"""
A corrector for Burgers' equation
=================================

A network learns what a coarse, diffusive solver gets wrong, through two steps of that solver:
one of the experiments of the paper on progressive refinement.
"""

# %%
# A short run
# -----------
#
# The small size, 10 of 100 epochs.

import matplotlib.pyplot as plt
import jax
from short_runs import draw_metric, example, said

import bilevel as bl
import bilevel_pde as pde

burgers_corrector = example("burgers_corrector")
task = burgers_corrector.task(size="small")
comparison = bl.compare(task, ("full", "auto"), epochs=10, progress=False)
said(comparison.runs)

# %%
# A state after five steps: of the coarse solver, with the network's correction, and of the
# reference.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
flow = burgers_corrector.Flow(pde.Grid(64, boundary=pde.Periodic()))
states = burgers_corrector.trajectories(jax.random.key(9), 64, 1)
exact = bl.Fidelity(bl.Budget(iterations=200, rtol=1e-6))
network = comparison.runs["auto"][0].theta
for label, used in (("coarse", lambda u: 0 * u), ("corrected", network)):
    right.plot(flow.corrected(used, states[:, 0], 5, exact)[-1][0], label=label)
right.plot(states[0, -1], "k:", label="reference")
right.set(xlabel="point")
right.legend(fontsize=8)
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/burgers_corrector.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/burgers_corrector.py
#
#    .. literalinclude:: /../examples/burgers_corrector.py
