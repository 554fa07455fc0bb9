"""
Prices for firms that compete
=============================

A supplier names prices; firms that buy from it then compete in quantities. Their equilibrium, a
variational inequality, is the inner problem: a projected map whose fixed point leaves some
firms out of some markets. Its Jacobian is not symmetric, so the adjoint is solved by BiCGStab.
"""

# %%
# A short run
# -----------
#
# Twenty of fifty epochs.

import matplotlib.pyplot as plt
from short_runs import draw_metric, example, said

import bilevel as bl

stackelberg = example("stackelberg")
task = stackelberg.task()
comparison = bl.compare(task, ("full", "auto"), epochs=20, progress=False)
said(comparison.runs)

# %%
# The prices that were found, a row for each of eight firms and a column for each of four markets.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
image = right.imshow(comparison.runs["auto"][0].theta, aspect="auto", cmap="viridis")
right.set(xlabel="market", ylabel="firm", title="price")
figure.colorbar(image)
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/stackelberg.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/stackelberg.py
#
#    .. literalinclude:: /../examples/stackelberg.py
