"""
The source of a Poisson problem
===============================

The strength of a source is found from the field it makes, by gradient descent through Jacobi's
method: the first experiment of the paper on progressive refinement, with its settings.
"""

# %%
# A short run
# -----------
#
# The example at its full size: it is small.

import matplotlib.pyplot as plt
from short_runs import draw_metric, example, said

import bilevel as bl

poisson_inverse = example("poisson_inverse")
task = poisson_inverse.task()
comparison = bl.compare(task, ("full", "prdp"), epochs=180, progress=False)
said(comparison.runs)

# %%
# Both end at the true strength; refinement starts at 25 iterations and goes up by tens.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
for policy, (run,) in comparison.runs.items():
    right.plot(run.history.column("epoch"), run.history.column("budget_iterations"), label=policy)
right.set(xlabel="outer step", ylabel="iterations allowed in a solve")
right.legend()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/poisson_inverse.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/poisson_inverse.py
#
#    .. literalinclude:: /../examples/poisson_inverse.py
