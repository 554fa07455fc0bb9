"""
Ten images in place of a thousand
=================================

A data set is distilled: ten synthetic images, one for each digit, on which a classifier is
trained, and which are changed until that classifier does well on real images. Training to the
end is the inner problem.
"""

# %%
# A short run
# -----------
#
# Twenty of sixty epochs.

import matplotlib.pyplot as plt
import numpy as np
from short_runs import draw_metric, example, said

import bilevel as bl

distillation = example("distillation")
task = distillation.task()
comparison = bl.compare(task, ("full", "auto"), epochs=20, progress=False)
said(comparison.runs)

# %%
# What a classifier should see of each digit, if it may see one image of it.

figure = plt.figure(figsize=(8.4, 3.4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
draw_metric(left.subplots(), comparison.runs, task.metric_name)
images = np.asarray(comparison.runs["auto"][0].theta).reshape(10, 8, 8)
for digit, axes in enumerate(right.subplots(2, 5).flat):
    axes.imshow(images[digit], cmap="gray_r", vmin=0, vmax=1)
    axes.set_axis_off()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/distillation.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/distillation.py
#
#    .. literalinclude:: /../examples/distillation.py
