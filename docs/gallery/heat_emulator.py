"""
Emulating a heat step
=====================

A network learns to be one step of the heat equation, through the solver of the next step: a
coarse solver pulls it away from the truth, and the policies differ in when they notice.
"""

# %%
# A short run
# -----------
#
# 40 of 100 epochs.

import matplotlib.pyplot as plt
import jax
from short_runs import draw_metric, example, said

import bilevel as bl
import bilevel_pde as pde

heat_emulator = example("heat_emulator")
task = heat_emulator.task()
comparison = bl.compare(task, ("full", "auto"), epochs=40, progress=False)
said(comparison.runs)

# %%
# Two steps of the trained network against two exact ones, from a state it was not trained on.

figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
draw_metric(left, comparison.runs, task.metric_name)
emulation = heat_emulator.Emulation(pde.Grid((30,)), 6, jax.random.key(7))
start, later = (fields[0] for fields in emulation.train)
network = comparison.runs["auto"][0].theta
right.plot(start, color="grey", label="start")
right.plot(later, "k:", label="two exact steps")
right.plot(network(network(start)), label="the network, twice")
right.set(xlabel="point")
right.legend(fontsize=8)
plt.show()

# %%
# The whole of it
# ---------------
#
# ``bilevel compare examples/heat_emulator.py`` runs it in full and writes tables and pictures.
#
# .. dropdown:: examples/heat_emulator.py
#
#    .. literalinclude:: /../examples/heat_emulator.py
