"""Train a torch network through a JAX solver of the heat equation, refined as training goes on.

    python examples/torch_heat_emulator.py
    python examples/torch_heat_emulator.py --epochs 40 --seed 1

The emulator of `heat_emulator.py` in one dimension, in torch: the network, its optimizer and the
training loop are PyTorch's, and inside the loss sits P_K, K Jacobi iterations of an implicit
Euler step on JAX's side:

    loss = mean (P_K(f(u₀)) - u₂)².

`bilevel_arrays.torch.function` makes P_K a function of tensors. Its iterations K are numbers, so
that the controller can raise them without anything being compiled anew, and a probe brings
back from every backward pass what both solves took.

It trains twice from the same start, with the full solve and with progressive refinement, and
prints what each took and where it ended. It needs PyTorch: pip install torch.
"""

import argparse
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from heat_emulator import BATCH, REFINEMENT, SETTINGS, VALIDATION, Emulation

import bilevel as bl
import bilevel_arrays as ba
import bilevel_pde as pde
from bilevel_arrays.library import load

torch: Any = load("torch")

SETTING = SETTINGS[1, "paper"]


class Outcome(NamedTuple):
    """What a training run came to: iterations of all solves, and the metric after each epoch."""

    iterations: int
    metrics: list[float]
    budgets: list[int]
    seconds: float


def network(points: int, width: int, seed: int) -> Any:
    """A multilayer perceptron from fields to fields, with ReLU between its layers."""
    torch.manual_seed(seed)
    sizes = [points, *[width] * SETTING.blocks]
    layers: list[Any] = []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, points))


class Study:
    """The data, in tensors, and P_K as a function of them."""

    def __init__(self, points: int = SETTING.points, samples: int = 200, seed: int = 0):
        self.emulation = Emulation(pde.Grid(points), samples + VALIDATION, jax.random.key(seed))
        # The generator is JAX's: where it computes in double precision, so does torch.
        (self.starts, self.targets), (self.start, self.later) = (
            tuple(torch.from_dlpack(part) for part in jax.tree.map(jnp.copy, pair))
            for pair in (self.emulation.train, self.emulation.validation)
        )
        self.step = ba.torch.function(self._step, constant=["fidelity"], probe=bl.Probe.zeros())

    def _step(self, fields: Any, fidelity: bl.Fidelity, probe: bl.Probe) -> Any:
        return self.emulation.step(fields, fidelity.with_probe(probe))

    def metric(self, model: Any) -> float:
        """‖f(f(u₀)) - u₂‖² / ‖u₂‖², the mean over the validation states."""
        with torch.no_grad():
            twice = model(model(self.start))
            error = ((twice - self.later) ** 2).sum(1) / (self.later**2).sum(1)
            return error.mean().item()

    def train(self, controller: bl.Controller, epochs: int, width: int, seed: int) -> Outcome:
        """A plain training loop of torch, with a controller in it."""
        model = network(self.start.shape[1], width, seed).to(self.start.dtype)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.94 ** (1 / 100))
        source = torch.Generator().manual_seed(seed)
        state, iterations, metrics, budgets = controller.init(), 0, [], []
        begun = time.perf_counter()
        for _ in range(epochs):
            fidelity = controller.fidelity(state)
            budgets.append(int(fidelity.budget.iterations))
            order = torch.randperm(len(self.starts), generator=source)
            for batch in order.split(BATCH):
                found, report = self.step(model(self.starts[batch]), fidelity)
                loss = ((found - self.targets[batch]) ** 2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                done = report.probe
                iterations += int(done.primal_iterations + done.adjoint_iterations)
            metrics.append(self.metric(model))
            state = controller.update(state, metrics[-1])
        return Outcome(iterations, metrics, budgets, time.perf_counter() - begun)


def controllers() -> dict[str, bl.Controller]:
    """The full solve, and progressive refinement with the published thresholds."""
    ladder = bl.Ladder.iterations(start=1, step=1, stop=SETTING.full)
    full = bl.Budget(iterations=SETTING.full)
    return {
        "full": bl.FixedFidelity(full, full),
        "prdp": bl.ProgressiveRefinement(ladder, **REFINEMENT[1]),
    }


def main() -> None:
    """Train with both, and print a table."""
    parser = argparse.ArgumentParser(description="A torch network, trained through a JAX solver.")
    parser.add_argument("--epochs", type=int, default=SETTING.epochs)
    parser.add_argument("--width", type=int, default=SETTING.width)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # for so small a network threads only get into JAX's way
    study = Study(seed=chosen.seed)
    print(f"{'policy':8}{'iterations':>12}{'last K':>8}{'2-step nMSE':>14}{'seconds':>9}")
    for name, controller in controllers().items():
        run = study.train(controller, chosen.epochs, chosen.width, chosen.seed)
        print(
            f"{name:8}{run.iterations:12,}{run.budgets[-1]:8}{run.metrics[-1]:14.3e}"
            f"{run.seconds:9.1f}"
        )


if __name__ == "__main__":
    main()
