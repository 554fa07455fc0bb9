"""Logistic regression with one ℓ₂ penalty for every feature, learnt from validation data.

    bilevel run examples/logistic_penalties.py
    bilevel compare examples/logistic_penalties.py --policies full,prdp,auto,hoag=cubic --seeds 3

Two hundred features, of which twenty matter, and labels y = ±1 that are drawn with the odds that
these give, so that no fit is without error.  The inner problem is that of the training samples,

    g(w, θ) = 1/n Σᵢ log(1 + exp(-yᵢ xᵢᵀw)) + ½ Σⱼ exp(θⱼ) wⱼ²,

and the outer loss is the mean logistic loss on validation samples.  HOAG (Pedregosa,
Hyperparameter optimization with approximate gradient, ICML 2016) learns one penalty in this way;
here are two hundred.  Those of features that say nothing come out larger, and the report says by
how much.

An exp(θⱼ) may grow without bound, and with it the Hessian.  A step that was right for the first θ
then diverges, and one that is right for the largest penalty is too short for all others.  So the
descent is scaled: with s a quarter of the largest eigenvalue of XᵀX/n, the Hessian is at most
D = diag(s + exp(θ)), and the unknown is v = √D w.  In it the Hessian is at most one, whatever
θ is: a step of length one converges for every θ.

The solver is plain descent; `--set solver=nesterov` accelerates it, with the momentum starting anew
where it points uphill, and then a solve takes about a sixth of the iterations.  `full` solves to
a relative residual of 1e-5, forward and backward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import bilevel as bl

CAP, TOLERANCE = 3000, 1e-5
"""Most iterations of a solve, and the relative residual at which it stops before."""

EXACT = bl.Budget(iterations=5000, rtol=1e-6)


class Regression:
    """The data, and the fit under given penalties.

    **Arguments:**

    - `samples`: to train on; half as many to validate with, and as many again to test with.
    - `features`, `relevant`: how many columns, and how many of them the labels depend on.
    - `seed`: of the data.
    - `solver`: "descent" or "nesterov".
    """

    def __init__(self, samples: int, features: int, relevant: int, seed: int, solver: str):
        self.solver = {
            "descent": bl.GradientDescent(step_size=1.0),
            "nesterov": bl.Nesterov(step_size=1.0, restart=True),
        }[solver]
        if not 0 < relevant < features:
            msg = f"relevant is above 0 and below features, {features}, got {relevant}."
            raise ValueError(msg)
        random = np.random.default_rng(seed)
        # Neighbours are correlated, as columns of measured data are.
        noise = random.standard_normal((2 * samples, features))
        inputs = noise + np.roll(noise, 1, axis=1)
        self.relevant = np.zeros(features, bool)
        self.relevant[random.permutation(features)[:relevant]] = True
        truth = np.where(self.relevant, random.standard_normal(features), 0.0)
        odds = 1 / (1 + np.exp(-inputs @ truth))
        signs = np.where(random.random(2 * samples) < odds, 1.0, -1.0)
        # All that the logistic loss needs of a sample is y x.
        signed = signs[:, None] * inputs
        ends = {"train": (0, samples), "validation": (samples, 3 * samples // 2)}
        ends["test"] = (ends["validation"][1], 2 * samples)
        self.parts = {name: jnp.asarray(signed[a:b], float) for name, (a, b) in ends.items()}
        covariance = signed[:samples].T @ signed[:samples] / samples
        self.smoothness = float(np.linalg.eigvalsh(covariance)[-1]) / 4
        self.problem = bl.Minimization(self._objective)

    def _objective(self, v: Array, theta: Array) -> Array:
        w = self.weights(v, theta)
        misfit = jnp.mean(jax.nn.softplus(-self.parts["train"] @ w))
        return misfit + 0.5 * jnp.sum(jnp.exp(theta) * w**2)

    def weights(self, v: Array, theta: Array) -> Array:
        """w = v / √(s + exp(θ))."""
        return v / jnp.sqrt(self.smoothness + jnp.exp(theta))

    def fit(self, theta: Array, fidelity: bl.Fidelity) -> Array:
        """The weights w, as far as the fidelity goes."""
        v = bl.solve(
            self.problem,
            theta,
            jnp.zeros_like(theta),
            solver=self.solver,
            estimator=bl.Implicit(bl.ConjugateGradient()),
            fidelity=fidelity,
        ).value
        return self.weights(v, theta)

    def loss(self, w: Array, part: str = "validation") -> Array:
        """The mean logistic loss of a part."""
        return jnp.mean(jax.nn.softplus(-self.parts[part] @ w))

    def accuracy(self, w: Array, part: str = "test") -> float:
        """The part of samples on the right side."""
        return float(jnp.mean(self.parts[part] @ w > 0))


def task(
    samples: int = 2000,
    features: int = 200,
    relevant: int = 20,
    start: float = -4.0,
    epochs: int = 100,
    seed: int = 0,
    solver: Literal["descent", "nesterov"] = "descent",
) -> bl.Task:
    """The penalties' task.

    Args:
        samples: to train on.
        features: columns of the data.
        relevant: columns that the labels depend on.
        start: logarithm of every penalty at the start.
        epochs: outer steps.
        seed: of the data.
        solver: gradient descent, or the same accelerated.

    """
    regression = Regression(samples, features, relevant, seed, solver)

    def loss(theta: Array, batch: None, fidelity: bl.Fidelity) -> Array:
        del batch
        return regression.loss(regression.fit(theta, fidelity))

    def validate(theta: Array) -> Array:
        return regression.loss(regression.fit(theta, bl.Fidelity(EXACT)))

    def report(runs: Sequence[Any], directory: Path | None) -> None:
        del directory
        for run in runs:
            of_run = Regression(samples, features, relevant, run.summary.seed, solver)
            theta = jnp.asarray(run.theta)
            before, after = (
                of_run.accuracy(of_run.fit(penalties, bl.Fidelity(EXACT)))
                for penalties in (jnp.full_like(theta, start), theta)
            )
            print(
                f"{run.summary.policy}: median log penalty "
                f"{float(jnp.median(theta[of_run.relevant])):.2f} of features that matter, "
                f"{float(jnp.median(theta[~of_run.relevant])):.2f} of the others; test accuracy "
                f"{before:.1%} at the start, {after:.1%} at the end"
            )

    return bl.Task(
        jnp.full(features, start),
        loss,
        validate=validate,
        name="logistic penalties",
        metric_name="validation loss",
        optimizer=optax.adam(optax.cosine_decay_schedule(0.3, epochs, 0.1)),
        epochs=epochs,
        ladder=bl.Ladder.iterations(1, 1, CAP).with_tolerances(bl.Budget(rtol=TOLERANCE)),
        policies=("full", "prdp", "auto"),
        report=report,
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
