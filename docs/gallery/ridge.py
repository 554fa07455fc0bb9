"""
One ridge penalty for every feature
===================================

The weights of a ridge regression are fitted under a penalty for each feature, and the penalties are
learnt from validation data. The inner problem is quadratic, and conjugate gradients solve it.
"""

# %%
# A short run
# -----------
#
# A fifth of the features of the whole example.

import matplotlib.pyplot as plt
from short_runs import draw_metric, example, said

import bilevel as bl

ridge = example("ridge")
task = ridge.task(features=100, relevant=10)
comparison = bl.compare(task, ("full", "auto"), epochs=40, progress=False)
said(comparison.runs)

# %%
# Of 100 features the first ten matter. Their penalties come out small.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
theta = comparison.runs["auto"][0].theta
right.plot(theta[10:].sort(), "o", markersize=3, label="features that say nothing")
right.plot(theta[:10].sort(), "s", markersize=4, label="features that matter")
right.set(xlabel="feature, in order of its penalty", ylabel="log penalty")
right.legend()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/ridge.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/ridge.py
#
#    .. literalinclude:: /../examples/ridge.py
