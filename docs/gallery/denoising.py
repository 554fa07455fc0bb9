"""
Learning to denoise
===================

A noisy patch is denoised by minimising an energy whose filters are learnt: a field of experts.
The inner problem is smooth and convex, and every patch of a batch has a count of its own.
"""

# %%
# A short run
# -----------
#
# Four of fifteen epochs.

import matplotlib.pyplot as plt
import jax
from short_runs import draw_metric, example, said

import bilevel as bl

denoising = example("denoising")
task = denoising.task()
comparison = bl.compare(task, ("full", "auto"), epochs=4, progress=False)
said(comparison.runs)

# %%
# A patch that was not trained on: as it is, with noise, and denoised.

figure = plt.figure(figsize=(8.4, 3.2), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
draw_metric(left.subplots(), comparison.runs, task.metric_name)
clean = denoising.patches(20, 0)[2][5:6]
noisy = denoising.with_noise(jax.random.key(0), clean)
prior = denoising.Prior(*comparison.runs["auto"][0].theta)
found = denoising.Denoiser(denoising.Experts(3)).denoised(
    prior, noisy, bl.Fidelity(bl.Budget(iterations=300, rtol=1e-5))
)
for axes, patch, name in zip(
    right.subplots(1, 3), (clean, noisy, found.value), ("clean", "noisy", "denoised"), strict=True
):
    axes.imshow(patch[0], cmap="gray", vmin=0, vmax=1)
    axes.set_title(name)
    axes.set_axis_off()
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/denoising.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/denoising.py
#
#    .. literalinclude:: /../examples/denoising.py
