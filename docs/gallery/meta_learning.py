"""
Where to start from
===================

Few-shot regression by implicit MAML: a network is adapted to each of many tasks by a solve that
starts from θ and is held near it, and θ is learnt such that the adapted networks do well.
"""

# %%
# A short run
# -----------
#
# Half as wide, 4 of 20 epochs.

import matplotlib.pyplot as plt
import jax
import jax.numpy as jnp
from short_runs import draw_metric, example, said

import bilevel as bl

meta_learning = example("meta_learning")
task = meta_learning.task(width=32)
comparison = bl.compare(task, ("full",), epochs=4, progress=False)
said(comparison.runs)

# %%
# A sine that was never trained on, known at ten places.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
adaptation = meta_learning.Adaptation(jax.random.key(0), 32, 1.0)
unseen = meta_learning.draw(jax.random.key(5), 1, 10, 1)
x = jnp.linspace(-5, 5, 200)
right.plot(unseen.x[0], unseen.y[0], "ko", label="known")
for label, theta in (
    ("not trained", adaptation.start),
    ("trained", comparison.runs["full"][0].theta),
):
    start = jax.tree.unflatten(jax.tree.structure(adaptation.start), jax.tree.leaves(theta))
    adapted = adaptation.solved(start, unseen.x[0], unseen.y[0], meta_learning.EXACT).value
    right.plot(x, jax.vmap(adaptation.value, (None, 0))(adapted, x), label=f"adapted, {label}")
right.legend(fontsize=8)
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/meta_learning.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/meta_learning.py
#
#    .. literalinclude:: /../examples/meta_learning.py
