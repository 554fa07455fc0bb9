"""
Finding wrong labels
====================

Three tenths of the labels are wrong. A softmax regression is fitted to weighted samples, and the
weights are learnt from a few samples whose labels are right: those that pull the fit away lose
theirs.
"""

# %%
# A short run
# -----------
#
# 300 samples, 25 of 100 steps.

import matplotlib.pyplot as plt
import numpy as np
from short_runs import draw_metric, example, said

import bilevel as bl

hyper_cleaning = example("hyper_cleaning")
task = hyper_cleaning.task(train=300, validation=200)
comparison = bl.compare(task, ("full", "auto"), epochs=25, progress=False)
said(comparison.runs)

# %%
# The weights that were learnt. Nobody told which labels are wrong.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
cleaning = hyper_cleaning.Cleaning(300, 200, 0.3, 0, "nesterov")
weights = 1 / (1 + np.exp(-np.asarray(comparison.runs["auto"][0].theta)))
bins = np.linspace(0, 1, 21)
right.hist(weights[~cleaning.corrupted], bins, alpha=0.7, label="right labels")
right.hist(weights[cleaning.corrupted], bins, alpha=0.7, label="wrong labels")
right.set(xlabel="weight of a sample", ylabel="samples")
right.legend()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/hyper_cleaning.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/hyper_cleaning.py
#
#    .. literalinclude:: /../examples/hyper_cleaning.py
