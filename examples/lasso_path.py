"""Walk down the path of an elastic net: one ℓ₁ penalty for each group of features.

    bilevel run examples/lasso_path.py
    bilevel compare examples/lasso_path.py --policies full,prdp,auto --seeds 0,1,2

The features are those of scikit-learn's diabetes data, their squares, and their products.  The
inner problem is not smooth, and there are five of it, one for each fold of a cross-validation
that leaves the fold out:

    ½ mean (Xw - y)² + Σⱼ exp(θ_{g(j)}) |wⱼ| + ½ exp(θ_q) ‖w‖²,

with an ℓ₁ penalty for each of the three groups g, and one ℓ₂ penalty.  The outer loss is the mean
squared error on the samples left out.  θ starts high on the path of the lasso, at a part of the
smallest penalty for which w = 0, and descends from there.  It cannot start at the very top: the
derivative lives on the support of w (Bertrand et al., Implicit differentiation of Lasso-type
models for hyperparameter optimization, ICML 2020), and a group of which nothing is in has none.

The report sets the result beside the best of the path with one penalty for all features, which is
what a grid search finds.  The solver is the accelerated proximal gradient method with restarts;
`--set acceleration=none` takes the plain one, and ten times as many iterations.  `full` solves to
a relative residual of 1e-5, forward and backward.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from sklearn.datasets import load_diabetes

import bilevel as bl

GROUPS = ("features", "squares", "products")

CAP, TOLERANCE = 5000, 1e-5
"""Most iterations of a solve, and the relative residual at which it stops before."""

EXACT = bl.Budget(iterations=10_000, rtol=1e-6)

FOLDS = 5

QUADRATIC = -6.0
"""Logarithm of the ℓ₂ penalty at the start, and on the path that the result is compared with."""


class Penalties(NamedTuple):
    """Logarithms: `absolute` of the ℓ₁ penalties, one a group, `quadratic` of the ℓ₂ penalty."""

    absolute: Float[Array, " groups"]
    quadratic: Float[Array, ""]


class Regression:
    """The data, in groups of features, and the fit under given penalties.

    Targets are in units of their standard deviation, so an error of one is that of their mean.

    **Arguments:**

    - `seed`: of the split.
    - `acceleration`: of the proximal gradient method.
    """

    def __init__(self, seed: int, acceleration: str):
        random = np.random.default_rng(seed)
        data, progression = (np.asarray(part) for part in load_diabetes(return_X_y=True))
        order = random.permutation(len(data))
        measured, targets = data[order], progression[order]
        count = measured.shape[1]
        pairs = [(i, j) for i in range(count) for j in range(i, count)]
        # The square of a feature with two values says what the feature itself says.
        pairs = [(i, j) for i, j in pairs if i != j or len(np.unique(measured[:, i])) > 2]
        scaled = measured / measured.std(0)
        columns = [scaled, *((scaled[:, i] * scaled[:, j])[:, None] for i, j in pairs)]
        inputs = np.concatenate(columns, axis=1)
        self.groups = np.array([0] * count + [1 if i == j else 2 for i, j in pairs])
        train = 3 * len(inputs) // 4
        inputs = (inputs - inputs[:train].mean(0)) / inputs[:train].std(0)
        targets = (targets - targets[:train].mean()) / targets[:train].std()
        self.inputs, self.targets = jnp.asarray(inputs[:train]), jnp.asarray(targets[:train])
        self.unseen = jnp.asarray(inputs[train:]), jnp.asarray(targets[train:])
        self.left_out = np.arange(FOLDS)[:, None] == np.arange(train) % FOLDS
        gram = inputs[:train].T @ inputs[:train] / train
        # Of no fold the largest eigenvalue is above that of all samples by more than this factor.
        largest = float(np.linalg.eigvalsh(gram)[-1]) * FOLDS / (FOLDS - 1)
        self.step = 1 / largest
        self.solver = bl.ProximalGradient(self.step, acceleration)
        self.top = float(np.abs(inputs[:train].T @ targets[:train]).max() / train)
        self.problem = bl.CompositeMinimization(
            self._misfit,
            bl.ElasticNet(
                lambda theta: jnp.exp(theta.absolute)[self.groups],
                lambda theta: jnp.exp(theta.quadratic),
            ),
            step=self.step,
        )

    def _misfit(self, w: Array, theta: Penalties) -> Array:
        """Half the mean squared error on what each fold keeps, their sum: each its own problem."""
        del theta
        kept = ~self.left_out
        return 0.5 * jnp.sum(self._squares(w) * kept / kept.sum(1, keepdims=True))

    def _squares(self, w: Array) -> Array:
        return (w @ self.inputs.T - self.targets) ** 2

    def penalties(self, below: float | Array) -> Penalties:
        """The same ℓ₁ penalty for all, `below` times the smallest one for which w = 0."""
        absolute = jnp.full(len(GROUPS), jnp.log(below * self.top))
        return Penalties(absolute, jnp.full((), QUADRATIC, absolute.dtype))

    def fit(self, theta: Penalties, fidelity: bl.Fidelity) -> Array:
        """The coefficients, of shape (folds, features), as far as the fidelity goes."""
        return bl.solve(
            self.problem,
            theta,
            jnp.zeros((FOLDS, len(self.groups))),
            solver=self.solver,
            estimator=bl.Implicit(bl.ConjugateGradient()),
            fidelity=fidelity,
        ).value

    def loss(self, w: Array) -> Array:
        """The mean squared error on the samples that are left out."""
        return jnp.mean(jnp.sum(self._squares(w) * self.left_out, axis=0))

    def test(self, w: Array) -> float:
        """The mean squared error of the folds' mean coefficients, on samples never seen."""
        inputs, targets = self.unseen
        return float(jnp.mean((inputs @ jnp.mean(w, axis=0) - targets) ** 2))

    def path(self, points: int = 30) -> tuple[float, float]:
        """The least cross-validation error on a path of one penalty, and its test error."""
        fit = jax.jit(lambda below: self.fit(self.penalties(below), bl.Fidelity(EXACT)))
        found = [fit(below) for below in np.geomspace(1.0, 1e-3, points)]
        best = min(found, key=lambda w: float(self.loss(w)))
        return float(self.loss(best)), self.test(best)


def task(
    start: float = 0.1,
    epochs: int = 150,
    seed: int = 0,
    acceleration: Literal["restart", "none"] = "restart",
) -> bl.Task:
    """The penalties' task.

    Args:
        start: ℓ₁ penalties at the start, in units of the smallest for which w = 0; below 1.
        epochs: outer steps.
        seed: of the split.
        acceleration: of the proximal gradient method, with restarts, or none.

    """
    if not 0 < start < 1:
        msg = f"start is above 0 and below 1, where w and its derivative are zero; got {start}."
        raise ValueError(msg)
    regression = Regression(seed, acceleration)

    def loss(theta: Penalties, batch: None, fidelity: bl.Fidelity) -> Array:
        del batch
        return regression.loss(regression.fit(theta, fidelity))

    def validate(theta: Penalties) -> Array:
        return regression.loss(regression.fit(theta, bl.Fidelity(EXACT)))

    def report(runs: Sequence[Any], directory: Path | None) -> None:
        del directory
        paths: dict[int, tuple[float, float]] = {}
        for run in runs:
            of_run = Regression(run.summary.seed, acceleration)
            if run.summary.seed not in paths:
                paths[run.summary.seed] = of_run.path()
            w = of_run.fit(Penalties(*run.theta), bl.Fidelity(EXACT))
            counts = np.count_nonzero(np.asarray(w), axis=0) > FOLDS / 2
            chosen = ", ".join(
                f"{counts[of_run.groups == group].sum()} {name}"
                for group, name in enumerate(GROUPS)
            )
            best, unseen = paths[run.summary.seed]
            print(
                f"{run.summary.policy}: {chosen} in; cross-validation error {of_run.loss(w):.4f}, "
                f"with one penalty {best:.4f}; test error {of_run.test(w):.4f}, with one penalty "
                f"{unseen:.4f}"
            )

    return bl.Task(
        regression.penalties(start),
        loss,
        validate=validate,
        name="lasso path",
        metric_name="cross-validation error",
        optimizer=optax.adam(0.1),
        epochs=epochs,
        ladder=bl.Ladder.iterations(1, 1, CAP).with_tolerances(bl.Budget(rtol=TOLERANCE)),
        policies=("full", "prdp", "auto"),
        report=report,
    )


if __name__ == "__main__":
    import sys

    from bilevel.cli import main

    sys.exit(main(["compare", __file__, "--overwrite", *sys.argv[1:]]))
