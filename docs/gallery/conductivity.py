"""
A conductivity, on ever finer grids
===================================

What is refined here is the grid. A conductivity is found from the fields it lets through, first
with the equation on a coarse grid, then on finer ones; the gradient goes through the transfers
of multigrid.
"""

# %%
# A short run
# -----------
#
# On 32 by 32 cells at the most, 40 of 200 steps.

import matplotlib.pyplot as plt
import numpy as np
from short_runs import draw_metric, example, said

import bilevel as bl

conductivity = example("conductivity")
task = conductivity.task(cells=32)
comparison = bl.compare(task, ("full", "prdp"), epochs=40, progress=False)
said(comparison.runs)

# %%
# The logarithm of the conductivity that was found, from noisy fields.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
image = right.imshow(np.asarray(comparison.runs["prdp"][0].theta).T, origin="lower", cmap="RdBu_r")
right.set_title("log k")
right.set_axis_off()
figure.colorbar(image)
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/conductivity.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/conductivity.py
#
#    .. literalinclude:: /../examples/conductivity.py
