"""Controllers that go by gradients at several levels, in the outer loop."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.outer.gradients import measured_in
from bilevel.outer.run import Run
from bilevel.outer.task import Task

Train = Callable[..., Run]

LADDER = bl.Ladder.iterations(1, 1, 40)


def stochastic(make_task: Any, inner: Any, batches: int = 8, **fields: Any) -> Task:
    """Least squares through a truncated solve, on batches that disagree."""
    targets = 2.0 + jax.random.normal(jax.random.key(0), (batches,))

    def loss(theta: Any, batch: Any, fidelity: bl.Fidelity) -> Any:
        return inner(theta, batch, fidelity)

    return make_task(loss=loss, batches=list(targets), ladder=LADDER, **fields)


def solved(theta: Any, batch: Any, fidelity: bl.Fidelity) -> Any:
    """½ (x − batch)² of x = θ, by K steps of a contraction by a half."""
    problem = bl.FixedPoint(lambda x, t: 0.5 * x + 0.5 * t)
    iteration = bl.FixedPointIteration()
    x = bl.solve(problem, theta, jnp.zeros(()), solver=iteration, fidelity=fidelity).value
    return 0.5 * (x - batch) ** 2


def budgets(run: Run) -> list[int]:
    return [int(record.budget_iterations or 0) for record in run.history][1:]


def test_one_compilation_serves_all_levels_and_comparisons(make_task: Any):
    run = bl.optimize(
        stochastic(make_task, solved, epochs=12, optimizer=optax.sgd(0.05)),
        controller=bl.AutomaticRefinement(LADDER),
        progress=False,
    )
    assert run.summary.compilations == 1
    assert len(set(budgets(run))) > 1
    assert run.summary.status == "completed"


def test_work_of_comparisons_is_counted(train: Train):
    """Without comparisons Σ would be the sum of the budgets, for no solve stops early."""
    run = train(controller=bl.AutomaticRefinement(LADDER), ladder=LADDER, epochs=30)
    used = sum(budgets(run))
    spent = run.history.total("primal_iterations")
    assert spent is not None
    assert spent > used
    # The adjoint's, by hand 2 a gradient, tells how many gradients there were.
    gradients = (run.history.total("adjoint_iterations") or 0) / 2
    assert gradients > 30
    assert run.history.total("updates") == 30


def test_no_step_is_made_along_a_gradient_that_is_mostly_error(make_task: Any):
    """Half of θ is lost at K = 1, and its gradient has the wrong sign: θ would leave 2."""

    def loss(theta: Any, batch: Any, fidelity: bl.Fidelity) -> Any:
        del batch
        lost = 0.5 ** jnp.asarray(fidelity.budget.iterations, theta.dtype)
        return 0.5 * (theta - 2.0 - 12.0 * lost) ** 2

    run = bl.optimize(
        make_task(loss=loss, ladder=LADDER, theta0=5.0, epochs=1),
        controller=bl.AutomaticRefinement(LADDER),
        progress=False,
    )
    coarse = bl.optimize(
        make_task(loss=loss, ladder=LADDER, theta0=5.0, epochs=1),
        controller=bl.FixedFidelity(LADDER.coarsest),
        progress=False,
    )
    # θ − 2 = 3 before the step of a half: 3/2 after a good one, 9/2 after K = 1.
    assert float(run.history[-1].metric or 0) == pytest.approx(1.5, abs=0.4)
    assert float(coarse.history[-1].metric or 0) == pytest.approx(4.5)
    assert budgets(run)[0] >= 5


def test_a_noisy_gradient_takes_fewer_iterations(make_task: Any):
    """At the optimum the mean gradient is zero: all that is left of a batch's is noise."""
    common: dict[str, Any] = {"epochs": 30, "optimizer": optax.sgd(0.05)}
    noisy, quiet = (
        bl.optimize(
            stochastic(make_task, solved, **common)
            if several
            else make_task(
                loss=lambda theta, batch, fidelity: solved(theta, 2.0, fidelity),
                ladder=LADDER,
                **(common | {"epochs": 240}),
            ),
            controller=bl.AutomaticRefinement(LADDER),
            progress=False,
        )
        for several in (True, False)
    )
    assert max(budgets(noisy)[-5:]) <= 8
    assert min(budgets(quiet)[-5:]) >= 14


def test_it_resumes_to_the_last_bit(make_task: Any, tmp_path: Path):
    def train(epochs: int, name: str, **options: Any) -> Run:
        return bl.optimize(
            stochastic(make_task, solved, optimizer=optax.sgd(0.05, momentum=0.5)),
            controller=bl.AutomaticRefinement(LADDER),
            epochs=epochs,
            directory=tmp_path / name,
            progress=False,
            **options,
        )

    whole = train(9, "whole")
    train(4, "parts")
    parts = train(9, "parts", resume=True)
    assert float(parts.theta) == float(whole.theta)
    assert budgets(parts) == budgets(whole)
    assert [r.primal_iterations for r in parts.history] == [
        r.primal_iterations for r in whole.history
    ]


@pytest.mark.parametrize("ladder", [bl.Ladder.iterations(7, 1, 7), LADDER])
def test_one_epoch_and_one_level_are_enough(make_task: Any, ladder: bl.Ladder):
    run = bl.optimize(
        make_task(ladder=ladder, epochs=1),
        controller=bl.AutomaticRefinement(ladder),
        progress=False,
    )
    assert run.summary.status == "completed"
    assert len(run.history) == 2


def test_gradients_that_are_not_finite_raise_the_level_and_end_the_run(make_task: Any):
    def loss(theta: Any, batch: Any, fidelity: bl.Fidelity) -> Any:
        del batch
        return jnp.where(fidelity.budget.iterations < 9, jnp.nan, 1.0) * theta**2

    with pytest.warns(RuntimeWarning, match="goes on with more iterations"):
        run = bl.optimize(
            make_task(loss=loss, ladder=LADDER, epochs=8),
            controller=bl.AutomaticRefinement(LADDER),
            progress=False,
        )
    # 1, 2, 4, 8 are lost. 16 is exact, and yet it never goes back to 8.
    assert run.history.total("nonfinite") == 4
    assert math.isfinite(float(run.theta))
    assert budgets(run)[-1] >= 9
    with pytest.warns(RuntimeWarning), pytest.raises(bl.NonFiniteError):
        bl.optimize(
            make_task(loss=lambda theta, *_: theta * jnp.nan, ladder=LADDER, epochs=20),
            controller=bl.AutomaticRefinement(LADDER),
            progress=False,
        )


def test_an_error_that_no_task_estimates_is_measured(make_task: Any):
    """x = θ + a 2⁻ᴷ, and its derivative 1 + b 2⁻ᴹ: each budget moves by its own part."""

    @jax.custom_vjp
    def truncated(theta: Any, primal: Any, adjoint: Any) -> Any:
        return theta + 4.0 * 0.5**primal

    def backward(residuals: Any, cotangent: Any) -> Any:
        return cotangent * (1 + 4.0 * 0.8**residuals), jnp.zeros(()), jnp.zeros(())

    truncated.defvjp(lambda t, k, m: (truncated(t, k, m), m), backward)

    def loss(theta: Any, batch: Any, fidelity: bl.Fidelity) -> Any:
        del batch
        budget, adjoint = fidelity.budget, fidelity.adjoint_budget
        assert adjoint is not None
        counts = (jnp.asarray(b.iterations, theta.dtype) for b in (budget, adjoint))
        return 0.5 * (truncated(theta, *counts) - 2.0) ** 2

    run = bl.optimize(
        make_task(loss=loss, ladder=LADDER, epochs=120, theta0=5.0, optimizer=optax.sgd(0.002)),
        controller=bl.ErrorControlled(LADDER, eta=0.9),
        progress=False,
    )
    last = run.history[-1]
    assert last.budget_iterations is not None
    assert last.adjoint_budget_iterations is not None
    assert last.adjoint_budget_iterations > last.budget_iterations > 1
    assert run.summary.compilations == 1


def test_measuring_takes_a_fifth_of_the_work_at_the_most():
    for updates in (1, 2, 8, 15, 100):
        epochs = [epoch for epoch in range(1, 61) if measured_in(epoch, updates)]
        # Two more gradients, one of them with twice the primal, one with twice the adjoint.
        assert 3 * len(epochs) <= 0.2 * 60 * updates + 1e-9
        assert epochs


def test_differences_are_those_of_the_gradients(make_task: Any):
    """d/dθ ½ (θ (1 − 2⁻ᴷ) − 2)² at θ = 5, by hand."""
    seen: list[Any] = []

    class Watching(bl.AutomaticRefinement):
        def update(self, state: Any, metric: Any = None, **measured: Any) -> Any:
            seen.append((int(state.level), measured))
            return super().update(state, metric, **measured)

    bl.optimize(make_task(ladder=LADDER, epochs=1), controller=Watching(LADDER), progress=False)

    def gradient(K: int) -> float:
        gain = 1 - 0.5**K
        return gain * (5.0 * gain - 2.0)

    level, measured = seen[0]
    assert level == 0
    assert float(measured["gradient_norm"]) == pytest.approx(abs(gradient(1)))
    expected = [abs(gradient(1) - gradient(2)), abs(gradient(2) - gradient(3))]
    assert np.allclose([float(d) for d in measured["error"][:2]], expected)
    assert math.isnan(float(measured["error"].noise))
