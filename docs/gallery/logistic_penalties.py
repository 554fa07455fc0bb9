"""
Penalties of a logistic regression
==================================

Logistic regression with a penalty for each feature, learnt from the validation loss, as HOAG
(Pedregosa 2016) learns a single one. The unknown is scaled so that one step size serves
whatever the penalties are.
"""

# %%
# A short run
# -----------
#
# A quarter of the samples, and 60 features of which 10 matter.

import matplotlib.pyplot as plt
from short_runs import draw_metric, example, said

import bilevel as bl

logistic_penalties = example("logistic_penalties")
task = logistic_penalties.task(samples=500, features=60, relevant=10)
comparison = bl.compare(task, ("full", "auto"), epochs=40, progress=False)
said(comparison.runs)

# %%
# Penalties of features that say nothing go up, the others stay.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
regression = logistic_penalties.Regression(500, 60, 10, 0, "descent")
theta = comparison.runs["auto"][0].theta
right.hist(theta[~regression.relevant], 20, label="features that say nothing")
right.hist(theta[regression.relevant], 20, label="features that matter")
right.set(xlabel="log penalty", ylabel="features")
right.legend()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/logistic_penalties.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/logistic_penalties.py
#
#    .. literalinclude:: /../examples/logistic_penalties.py
