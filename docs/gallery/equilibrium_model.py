"""
A network that is a fixed point
===============================

A deep equilibrium model on digits: its layer is applied until nothing changes any more. The
adjoint is solved by the transposed iteration; after each update the layer is projected onto
contractions.
"""

# %%
# A short run
# -----------
#
# Half as wide as the whole example, 8 of 40 epochs.

import matplotlib.pyplot as plt
from short_runs import draw_metric, example, said

import bilevel as bl

equilibrium_model = example("equilibrium_model")
task = equilibrium_model.task(width=32)
comparison = bl.compare(task, ("full", "auto"), epochs=8, progress=False)
said(comparison.runs)

# %%
# ``auto`` gives a solve a few iterations for as long as that does, ``full`` some forty throughout.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
for policy, (run,) in comparison.runs.items():
    history = run.history
    mean = history.column("primal_iterations")[1:] / history.column("solves")[1:]
    right.plot(history.column("epoch")[1:], mean, label=policy)
right.set(xlabel="epoch", ylabel="iterations of a solve, mean", ylim=(0, None))
right.legend()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/equilibrium_model.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/equilibrium_model.py
#
#    .. literalinclude:: /../examples/equilibrium_model.py
