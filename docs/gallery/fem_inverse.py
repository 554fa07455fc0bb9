"""
A coefficient, with finite elements
===================================

The same kind of problem on a disc, with linear elements that scikit-fem meshes and assembles:
the matrix goes in as another library made it, and gradients go to its entries.
"""

# %%
# A short run
# -----------
#
# On 545 vertices, 40 of 150 steps.

import matplotlib.pyplot as plt
from short_runs import draw_metric, example, said

import bilevel as bl

fem_inverse = example("fem_inverse")
task = fem_inverse.task(refinements=4)
comparison = bl.compare(task, ("full", "auto"), epochs=40, progress=False)
said(comparison.runs)

# %%
# The logarithm of the coefficient that was found. The truth has a round inclusion on either side.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
disc = fem_inverse.Disc(4)
x, y = disc.points.T
image = right.tripcolor(x, y, disc.triangles, comparison.runs["auto"][0].theta, shading="gouraud")
right.set_aspect("equal")
right.set_title("log k")
right.set_axis_off()
figure.colorbar(image)
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/fem_inverse.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/fem_inverse.py
#
#    .. literalinclude:: /../examples/fem_inverse.py
