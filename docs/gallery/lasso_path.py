"""
Down the path of an elastic net
===============================

The penalties of an elastic net, one for each group of features, are learnt from a
cross-validation. The inner problem is not smooth; the accelerated proximal gradient method
solves it, and its derivative lives on the support.
"""

# %%
# A short run
# -----------
#
# 40 of 150 steps.

import matplotlib.pyplot as plt
import numpy as np
from short_runs import draw_metric, example, said

import bilevel as bl

lasso_path = example("lasso_path")
task = lasso_path.task()
comparison = bl.compare(task, ("full", "auto"), epochs=40, progress=False)
said(comparison.runs)

# %%
# How many features of each group are in, fold by fold, before and after.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
regression = lasso_path.Regression(0, "restart")
names = list(lasso_path.GROUPS)
ends = {
    "at the start": task.parameters,
    "learnt": lasso_path.Penalties(*comparison.runs["auto"][0].theta),
}
for shift, (label, theta) in enumerate(ends.items()):
    support = np.asarray(regression.fit(theta, bl.Fidelity(lasso_path.EXACT)) != 0)
    counts = [support[:, regression.groups == group].sum(1).mean() for group in range(len(names))]
    right.bar(np.arange(len(names)) + 0.4 * shift, counts, 0.4, label=label)
right.set_xticks(np.arange(len(names)) + 0.2, names)
right.set(ylabel="features in, mean of the folds")
right.legend()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/lasso_path.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/lasso_path.py
#
#    .. literalinclude:: /../examples/lasso_path.py
