"""The outer loop: what it trains, counts, compiles, keeps and refuses."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import bilevel as bl
from bilevel.budget import Budget
from bilevel.outer.archive import ResumeError
from bilevel.outer.callbacks import Event
from bilevel.outer.checkpoint import read_arrays
from bilevel.outer.history import History
from bilevel.outer.optimize import NonFiniteError, optimize
from bilevel.outer.run import Run
from bilevel.outer.task import Task
from bilevel.refinement.error_controlled import ErrorControlled
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.fixed import FixedFidelity
from bilevel.refinement.ladder import Ladder
from bilevel.refinement.progressive import ProgressiveRefinement
from bilevel.refinement.scheduled import ScheduledFidelity

Train = Callable[..., Run]


def climbing(step: int = 1, ladder: Ladder | None = None) -> ScheduledFidelity:
    return ScheduledFidelity(ladder or Ladder.iterations(1, 1, 12), lambda updates: step * updates)


def test_one_update_is_the_optimizer_s(train: Train):
    run = train(epochs=1, controller=FixedFidelity(Budget(1)), optimizer=optax.sgd(0.5))
    # K = 1: x = theta / 2, so dL/dtheta = (2.5 - 2) / 2.
    assert float(run.theta) == pytest.approx(5.0 - 0.5 * 0.25, rel=1e-14)
    assert run.history[1].loss == pytest.approx(0.125, rel=1e-14)
    assert run.history[1].gradient_norm == pytest.approx(0.25, rel=1e-14)


def noisy_task(batches: Any) -> Task:
    """A gradient of θ - b in two parameters."""

    def loss(theta: jax.Array, batch: jax.Array, fidelity: Fidelity) -> jax.Array:
        del fidelity
        return 0.5 * jnp.sum((theta - batch) ** 2)

    return Task(jnp.zeros(2), loss, batches=batches, optimizer=optax.sgd(0.0), full=Budget(1))


@pytest.mark.parametrize("policy", ["full", "auto"])
def test_the_noise_of_a_batch_s_gradient(policy: str):
    random = np.random.default_rng(0)
    batches = jnp.asarray(random.standard_normal((400, 2)) * [3.0, 4.0])
    task = noisy_task(list(batches))
    ladder = Ladder.iterations(1, 1, 3)
    controller = FixedFidelity(Budget(1)) if policy == "full" else bl.AutomaticRefinement(ladder)
    run = optimize(task, controller=controller, epochs=2, progress=False)
    # Without a step the distances of neighbours average to √2 of the standard deviation, whose
    # two parts are 3 and 4; 400 of them know it to 5 %.
    noise = [record.gradient_noise for record in run.history]
    assert noise[0] is None
    assert noise[1] == pytest.approx(5.0, rel=0.1)
    assert noise[2] == noise[1]  # the last batch of an epoch is no neighbour of the next's first
    pairs = np.diff(np.asarray(batches), axis=0)
    assert noise[1] == pytest.approx(np.sqrt(np.mean(np.sum(pairs**2, 1)) / 2), rel=1e-6)


@pytest.mark.parametrize(
    "batches",
    [None, [jnp.ones(2)], lambda epoch, key: [epoch * jnp.ones(2)]],
    ids=["none", "list", "callable"],
)
def test_one_batch_has_no_noise_that_could_be_told(batches: Any):
    task = noisy_task([jnp.ones(2)] if batches is None else batches)
    run = optimize(task, controller=FixedFidelity(Budget(1)), epochs=3, progress=False)
    assert [record.gradient_noise for record in run.history] == [None] * 4


def test_a_skipped_update_has_no_noise():
    batches = [jnp.array([1.0, 0.0]), jnp.array([jnp.nan, 0.0]), jnp.array([1.0, 2.0])]
    run = optimize(
        noisy_task(batches), controller=FixedFidelity(Budget(1)), epochs=1, progress=False
    )
    assert run.history[1].nonfinite == 1
    # The third batch is compared with the first: the second left nothing to compare with.
    assert run.history[1].gradient_noise == pytest.approx(2.0 / np.sqrt(2.0), rel=1e-6)


def test_the_metric_before_training_is_the_first_record(train: Train):
    history = train(epochs=3).history
    assert [record.epoch for record in history] == [0, 1, 2, 3]
    assert history[0].metric == pytest.approx(3.0)
    assert history[0].updates == 0
    assert history[0].loss is None


def test_every_budget_uses_the_same_executable(
    train: Train, compilations: Callable[[Callable[[], Any]], list[str]]
):
    runs: list[Run] = []
    names = compilations(lambda: runs.append(train(epochs=12, controller=climbing())))
    run = runs[0]
    assert [record.budget_iterations for record in run.history[1:]] == list(range(1, 13))
    assert run.summary.compilations == 1
    # JAX's own log agrees: update and validation, each once, and nothing else but the schedule.
    assert sorted(names) == ["_scheduled", "outer_update", "outer_validation"]
    assert run.summary.other_compilations == 1


def test_a_batch_of_another_shape_compiles_and_is_counted(train: Train):
    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        return jnp.mean((theta - batch) ** 2)

    run = train(loss=loss, batches=[np.ones(4), np.ones(4), np.ones(3)], epochs=4)
    assert run.summary.compilations == 2


def test_each_static_part_compiles_once(train: Train):
    grids: list[int] = []

    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        grids.append(fidelity["grid"])
        return jnp.mean((theta - jnp.ones(fidelity["grid"])) ** 2)

    ladder = Ladder.iterations(1, 1, 4).with_static(grid=[8, 8, 16, 16])
    run = train(loss=loss, ladder=ladder, controller=ScheduledFidelity(ladder), epochs=6)
    assert run.summary.compilations == 2
    assert grids == [8, 16]


def test_iterations_are_summed_exactly(train: Train):
    run = train(epochs=12, controller=climbing())
    assert run.summary.primal_iterations == sum(range(1, 13))
    assert run.summary.adjoint_iterations == 2 * 12
    assert run.summary.solves == 12
    assert [record.primal_iterations for record in run.history] == [None, *range(1, 13)]


def test_no_report_is_unknown_and_not_zero(train: Train):
    run = train(loss=lambda theta, batch, fidelity: theta**2, epochs=2)
    assert run.summary.primal_iterations is None
    assert run.history[1].work is None


def test_theta_keeps_its_dtype(train: Train):
    for dtype in (jnp.float32, jnp.float64):
        run = train(theta0=jnp.asarray(5.0, dtype), epochs=3, optimizer=optax.adam(0.1))
        assert run.theta.dtype == dtype
        assert run.summary.compilations == 1


class Model(eqx.Module):
    weight: jax.Array
    steps: jax.Array
    slope: float
    activation: Callable[[jax.Array], jax.Array]


def test_an_equinox_module_keeps_what_is_not_trained(train: Train):
    model = Model(jnp.ones(3), jnp.arange(2), 0.25, jnp.tanh)

    def loss(theta: Model, batch: Any, fidelity: Fidelity) -> Any:
        return jnp.sum(theta.activation(theta.slope * theta.weight) ** 2) + theta.steps[0]

    run = train(theta0=model, loss=loss, validate=lambda m: jnp.sum(m.weight**2), epochs=3)
    assert run.theta.slope == 0.25
    assert run.theta.activation is jnp.tanh
    assert run.theta.steps.tolist() == [0, 1]
    assert float(jnp.sum(run.theta.weight)) < 3.0


def test_numbers_in_containers_are_trained(train: Train):
    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        return theta["a"] ** 2 + jnp.sum(theta["b"] ** 2)

    theta0 = {"a": 1.0, "b": np.ones(2, np.float32), "n": 3}
    run = train(theta0=theta0, loss=loss, validate=lambda theta: theta["a"] ** 2, epochs=2)
    assert float(run.theta["a"]) == 0.0
    assert run.theta["b"].dtype == jnp.float32
    assert run.theta["n"] == 3


def test_complex_parameters_descend(train: Train):
    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        return jnp.abs(theta - (1 + 2j)) ** 2

    run = train(
        theta0=0j,
        loss=loss,
        validate=lambda theta: jnp.abs(theta - (1 + 2j)),
        epochs=40,
        optimizer=optax.sgd(0.2),
    )
    assert run.history.column("metric")[-1] < 1e-6


def test_a_projection_is_applied_after_every_update(train: Train):
    run = train(projection=lambda theta: jnp.maximum(theta, 4.0), epochs=30)
    assert float(run.theta) == 4.0


def test_line_searches_get_the_value_function(train: Train):
    run = train(optimizer=optax.lbfgs(), controller=FixedFidelity(Budget(40)), epochs=5)
    assert run.history.column("metric")[-1] < 1e-8


def test_an_optimizer_with_a_random_key_in_its_state(train: Train):
    noisy = optax.chain(optax.add_noise(0.01, 0.5, key=jax.random.key(3)), optax.sgd(0.5))
    assert train(optimizer=noisy, epochs=3).summary.compilations == 1


# ------------------------------------------------------------------ not finite


def poisoned(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
    return jnp.mean((theta - batch) ** 2)


def test_a_nonfinite_update_leaves_no_trace(train: Train):
    good, bad = [np.ones(2), 3 * np.ones(2)], np.array([1.0, np.nan])
    optimizer = optax.adam(0.1)
    with_bad = train(loss=poisoned, batches=[good[0], bad, good[1]], optimizer=optimizer, epochs=4)
    without = train(loss=poisoned, batches=good, optimizer=optimizer, epochs=4)
    # Momentum and step count of Adam would differ had the bad update touched the state.
    assert float(with_bad.theta) == float(without.theta)
    assert [record.nonfinite for record in with_bad.history] == [0, 1, 1, 1, 1]
    assert [record.updates for record in with_bad.history] == [0, 2, 2, 2, 2]
    assert with_bad.history[2].loss == without.history[2].loss


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_too_many_in_a_row_end_the_run_with_a_clear_message(
    train: Train, tmp_path: Path, value: float
):
    def batches(epoch: int, key: Any) -> list[np.ndarray]:
        return [np.ones(2)] if epoch < 3 else [np.full(2, value)]

    with pytest.raises(NonFiniteError, match="4 updates in a row") as caught:
        train(loss=poisoned, batches=batches, epochs=30, max_nonfinite=4, directory=tmp_path / "a")
    run = caught.value.run
    assert run.status == "nonfinite"
    assert run.summary.nonfinite == 4
    assert run.summary.epochs == 5
    kept = Run.read(tmp_path / "a", like=5.0 * jnp.ones(()))
    assert kept.status == "nonfinite"
    assert float(kept.theta) == float(run.theta)
    assert np.isfinite(float(run.theta))


def test_the_limit_counts_updates_in_a_row(train: Train):
    batches = [np.ones(2), np.full(2, np.nan), np.full(2, np.nan)]
    run = train(loss=poisoned, batches=batches, epochs=5, max_nonfinite=3)
    assert run.summary.nonfinite == 10


def test_a_finite_gradient_with_an_infinite_step_is_skipped(train: Train):
    run = train(optimizer=optax.scale(1e308), epochs=2, theta0=1e10, max_nonfinite=5)
    assert float(run.theta) == 1e10
    assert run.summary.nonfinite == 2


# ------------------------------------------------------------------ controllers


def published_poisson() -> Task:
    n, h = 30, 1 / 31
    x = jnp.linspace(h, 1 - h, n, dtype=jnp.float32)
    matrix = (jnp.eye(n, k=1) + jnp.eye(n, k=-1) - 2 * jnp.eye(n)) / h**2
    target = jnp.linalg.solve(matrix, -2 * jnp.sin(2 * jnp.pi * x)).astype(jnp.float32)
    shape = -jnp.sin(2 * jnp.pi * x)

    def jacobi(rhs: Any, iterations: Any) -> Any:
        def step(_: Any, u: Any) -> Any:
            neighbours = jnp.pad(u, 1)
            return (neighbours[2:] + neighbours[:-2]) / 2 - rhs * (h**2 / 2)

        return lax.fori_loop(0, iterations, step, jnp.zeros_like(rhs))

    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        assert fidelity.probe is not None
        iterations = fidelity.budget.iterations
        u = lax.stop_gradient(jacobi(theta * shape, iterations))
        # The operator is symmetric and the start zero: K adjoint steps are the derivative.
        adjoint = lax.stop_gradient(jacobi((u - target) / n, iterations))
        value = lax.stop_gradient(jnp.sum((u - target) ** 2) / (2 * n))
        slope = jnp.vdot(adjoint, shape)
        counts = iterations * (fidelity.probe.primal_iterations + fidelity.probe.adjoint_iterations)
        return value + slope * (theta - lax.stop_gradient(theta)) + counts.astype(jnp.float32)

    return Task(
        jnp.float32(5.0),
        loss,
        validate=lambda theta: jnp.abs(theta - 2) / 2,
        optimizer=optax.sgd(275.0),
        epochs=180,
        ladder=Ladder.iterations(25, 10, 600),
    )


def test_the_published_refinement_is_reproduced():
    task = published_poisson()
    controller = ProgressiveRefinement(
        Ladder.iterations(25, 10, 600),
        stepping_threshold=0.92,
        ema_window=None,
        error_window=2,
    )
    run = optimize(task, controller=controller, progress=False)
    budgets = [record.budget_iterations for record in run.history[1:]]
    assert budgets[:33] == [25] * 2 + [35] * 13 + [45] * 7 + [55] * 5 + [65] * 4 + [75] * 2
    assert max(b for b in budgets if b is not None) == 600
    for target, published in ((1e-4, 37_585), (1e-5, 54_580)):
        there = run.history.first_at(target)
        assert there is not None
        spent = run.history.until(there).total("primal_iterations")
        assert spent == pytest.approx(published, rel=0.02)
    assert run.summary.compilations == 1


def test_the_gradient_norm_reaches_the_controller(train: Train):
    class Level(eqx.Module):
        level: jax.Array
        rejected: jax.Array

    class Doubling:
        requires = frozenset({"gradient_norm"})

        def init(self) -> Level:
            return Level(jnp.int32(1), jnp.int32(0))

        def update(self, state: Level, metric: Any, *, gradient_norm: Any, error: Any) -> Level:
            return Level(state.level + jnp.int32(1000 * gradient_norm), state.rejected)

        def fidelity(self, state: Level) -> Fidelity:
            return Fidelity(Budget(state.level), level=state.level)

    run = train(controller=Doubling(), epochs=2)
    assert run.summary.other_compilations == 2, "validation, and a controller written in JAX"
    # Nothing is read before the first gradient, which is (2.5 - 2) / 2 at K = 1.
    assert [record.level for record in run.history[1:]] == [1, 251]


def quadratic_result(error: float) -> Callable[..., Any]:
    def hypergradient(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        solution = types.SimpleNamespace(
            iterations=fidelity.budget.iterations,
            applications=fidelity.budget.iterations + 1,
            status=jnp.int32(1),
        )
        part = error / fidelity.budget.iterations
        parts = types.SimpleNamespace(primal=part, adjoint=0.0 * part, total=part)
        return types.SimpleNamespace(
            value=theta**2,
            gradient=2 * theta,
            primal=solution,
            adjoint=solution,
            error=parts,
            cost=None,
        )

    return hypergradient


def test_the_estimated_error_drives_an_error_controller(train: Train):
    ladder = Ladder.iterations(1, 1, 30)
    run = train(
        loss=None,
        hypergradient=quadratic_result(8.0),
        controller=ErrorControlled(ladder),
        optimizer=optax.sgd(1e-6),
        epochs=4,
        ladder=ladder,
    )
    # ‖z‖ = 10: half of the allowed 5 is reached at K = 4, by strides 1 and 2.
    assert [record.budget_iterations for record in run.history[1:]] == [1, 2, 2, 2]
    assert run.history[1].error == pytest.approx(8.0)
    assert run.history[1].primal_iterations == 1
    assert run.history[1].adjoint_applications == 2
    assert run.history[1].primal_residual is None
    assert run.summary.compilations == 1


def linear_task(*, explicit: bool) -> Task:
    matrix = jnp.diag(jnp.arange(1.0, 9.0))
    goal = jnp.ones(8)
    problem = bl.LinearSystem(matrix, lambda theta: theta)
    settings: dict[str, Any] = {
        "solver": bl.ConjugateGradient(),
        "estimator": bl.Implicit(solver=bl.ConjugateGradient()),
    }

    def outer(x: Any, theta: Any) -> Any:
        return 0.5 * jnp.sum((x - goal) ** 2)

    def loss(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        x = bl.solve(problem, theta, jnp.zeros(8), fidelity=fidelity, **settings).value
        return outer(x, theta)

    def hypergradient(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        return bl.hypergradient(outer, problem, theta, jnp.zeros(8), fidelity=fidelity, **settings)

    return Task(
        jnp.zeros(8) + 0.5,
        None if explicit else loss,
        hypergradient=hypergradient if explicit else None,
        validate=lambda theta: jnp.linalg.norm(theta / jnp.arange(1.0, 9.0) - goal),
        ladder=Ladder.iterations(1, 1, 8),
        optimizer=optax.sgd(1.0),
        epochs=6,
    )


def test_solves_report_through_the_probe_and_through_results_alike():
    controller = FixedFidelity(Budget(3), Budget(2))
    loss, explicit = (
        optimize(linear_task(explicit=explicit), controller=controller, progress=False)
        for explicit in (False, True)
    )
    np.testing.assert_allclose(loss.theta, explicit.theta, rtol=1e-12)
    for run in (loss, explicit):
        assert run.summary.primal_iterations == 3 * 6
        assert run.summary.adjoint_iterations == 2 * 6
        assert run.summary.solves == 6
        assert run.history[1].primal_capped == 1
        assert run.summary.failures == 0
        assert run.summary.compilations == 1
    for name in ("primal_residual", "adjoint_residual"):
        mine, other = loss.history.column(name)[1:], explicit.history.column(name)[1:]
        np.testing.assert_allclose(mine, other, rtol=1e-6)
        assert np.all((mine > 1e-3) & (mine < 1))
    assert explicit.summary.error_applications
    assert loss.summary.error_applications == 0


def test_the_error_of_real_hypergradients_refines_both_budgets():
    task = linear_task(explicit=True)
    assert task.ladder is not None
    run = optimize(
        task, controller=ErrorControlled(task.ladder, eta=0.9), epochs=12, progress=False
    )
    budgets = [record.budget_iterations or 0 for record in run.history[1:]]
    assert budgets[0] == 1
    assert max(budgets) > 3
    last = run.history[-1]
    assert last.error is not None
    assert last.gradient_norm is not None
    assert last.error <= 0.1 * last.gradient_norm
    assert run.summary.compilations == 1


def test_an_error_controller_refuses_a_task_that_measures_none(train: Train):
    class Strict:
        """It needs an error, and does not say how to measure one."""

        requires = frozenset({"error"})
        own = ErrorControlled(Ladder.iterations(1, 1, 4))
        init, update, fidelity = own.init, own.update, own.fidelity

    with pytest.raises(TypeError, match="hypergradient= "):
        train(controller=Strict())


def test_a_hypergradient_of_another_structure_is_refused(train: Train):
    def wrong(theta: Any, batch: Any, fidelity: Fidelity) -> Any:
        result = quadratic_result(1.0)(theta, batch, fidelity)
        result.gradient = {"theta": result.gradient}
        return result

    with pytest.raises(TypeError, match="gradient should be like theta"):
        train(loss=None, hypergradient=wrong)


def test_a_rejected_metric_is_counted(train: Train):
    with pytest.warns(RuntimeWarning, match="the metric is nan"):
        run = train(
            validate=lambda theta: theta * jnp.nan,
            controller=ProgressiveRefinement(Ladder.iterations(1, 1, 4)),
            epochs=3,
        )
    assert [record.rejected for record in run.history] == [1, 2, 3, 4]
    assert run.summary.best_metric is None


# ------------------------------------------------------------------ data and metric


def test_batches_by_function_get_the_epoch_and_its_own_key(train: Train):
    def epochs_keys(seed: int) -> list[tuple[int, tuple[int, ...]]]:
        seen: list[tuple[int, tuple[int, ...]]] = []

        def batches(epoch: int, key: Any) -> list[float]:
            seen.append((epoch, tuple(jax.random.key_data(key).tolist())))
            return [float(epoch)]

        train(loss=poisoned, batches=batches, epochs=3, seed=seed)
        return seen

    first = epochs_keys(0)
    assert [epoch for epoch, _ in first] == [1, 2, 3]
    assert len({key for _, key in first}) == 3
    assert epochs_keys(0) == first
    assert epochs_keys(1) != first


def test_without_validation_the_metric_is_the_mean_loss(train: Train):
    run = train(
        loss=poisoned,
        validate=None,
        batches=[np.ones(1), np.zeros(1)],
        optimizer=optax.sgd(0.0),
        epochs=1,
    )
    assert run.history[0].metric is None
    assert run.history[1].metric == pytest.approx((16 + 25) / 2)


def test_a_metric_may_leave_jax(train: Train):
    run = train(validate=lambda theta: float(np.asarray(theta)), jit_validate=False, epochs=1)
    assert run.history[0].metric == 5.0
    assert run.summary.other_compilations == 0


def test_a_metric_that_leaves_jax_says_how(train: Train):
    with pytest.raises(jax.errors.JAXTypeError) as caught:
        train(validate=lambda theta: float(np.asarray(theta)))
    assert "jit_validate=False" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("wrong", [lambda t: jnp.ones(2), lambda t: 1j * t, lambda t: None])
def test_a_metric_that_is_no_real_number_is_refused(train: Train, wrong: Any, jitted: bool):
    with pytest.raises(TypeError, match="validate should return one real number"):
        train(validate=wrong, jit_validate=jitted)


@pytest.mark.parametrize(
    "wrong", [lambda t, b, f: jnp.ones(2) * t, lambda t, b, f: 3, lambda t, b, f: 1j * t]
)
def test_a_loss_that_is_no_real_scalar_is_refused(train: Train, wrong: Any):
    with pytest.raises(TypeError, match="loss should be one real floating-point number"):
        train(loss=wrong)


def test_batches_that_are_none_in_an_epoch_are_refused(train: Train):
    with pytest.raises(ValueError, match="no batch in epoch 1"):
        train(batches=lambda epoch, key: [])
    with pytest.raises(TypeError, match="iterable of batches"):
        train(batches=lambda epoch, key: 3)


def test_without_jit_it_is_the_same(train: Train):
    plain = train(epochs=3, controller=climbing())
    with jax.disable_jit():
        stepwise = train(epochs=3, controller=climbing())
    assert float(stepwise.theta) == pytest.approx(float(plain.theta), rel=1e-12)
    assert stepwise.summary.compilations == 0


# ------------------------------------------------------------------ endings


def test_a_run_is_kept_and_read_back(train: Train, tmp_path: Path):
    run = train(
        theta0={"w": jnp.ones(2), "b": jnp.float32(1.0)},
        directory=tmp_path / "deep" / "a",
        loss=lambda t, b, f: jnp.sum(t["w"] ** 2) + t["b"] ** 2,
        validate=lambda t: jnp.sum(t["w"] ** 2),
        epochs=2,
    )
    kept = Run.read(tmp_path / "deep" / "a")
    assert set(kept.theta) == {"w", "b"}
    np.testing.assert_array_equal(kept.theta["w"], run.theta["w"])
    assert list(kept.history) == list(run.history)
    assert kept.summary == run.summary
    shaped = Run.read(tmp_path / "deep" / "a", like=run.theta)
    assert shaped.theta["b"].dtype == jnp.float32


def test_a_directory_with_a_run_is_not_overwritten(train: Train, tmp_path: Path):
    train(directory=tmp_path, epochs=2)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        train(directory=tmp_path, epochs=1)
    train(directory=tmp_path, epochs=1, overwrite=True)
    assert len(History.read(tmp_path / "history.jsonl")) == 2


def interrupting(at: int) -> Callable[[int, Any], Any]:
    def batches(epoch: int, key: Any) -> Any:
        yield np.ones(1)
        if epoch == at:
            raise KeyboardInterrupt
        yield np.zeros(1)

    return batches


def test_a_policy_for_a_controller_is_sent_to_compare(train: Train):
    message = r"got 'prdp'\. Policies by name are for bl\.compare.*bl\.ProgressiveRefinement"
    with pytest.raises(TypeError, match=message):
        train(controller="prdp")


def diverging(theta: Any, batch: Any, fidelity: Any) -> Any:
    """An inner gradient descent whose step is far too long."""
    problem = bl.Minimization(lambda x, t: 50.0 * (x - t) ** 2)
    solver = bl.GradientDescent(step_size=0.1)
    return bl.solve(problem, theta, 0.0, solver=solver, fidelity=fidelity).value ** 2


def test_a_run_given_up_for_failed_solves_says_so(train: Train, capsys: pytest.CaptureFixture[str]):
    ladder = bl.Ladder.iterations(50, 50, 100)
    with pytest.raises(NonFiniteError) as caught:
        train(loss=diverging, ladder=ladder, max_nonfinite=3, epochs=9, progress=True)
    message = str(caught.value)
    assert message.startswith("given up in epoch 3: in 3 updates in a row")
    failures = caught.value.run.summary.failures
    assert failures
    assert f"Inner solves failed in these updates ({failures} of them" in message
    assert "larger budget seldom mends" in message
    # The first epoch's note names them too.
    assert "inner solves failed:" in capsys.readouterr().err


def poisoned_after_failure(theta: Any, batch: Any, fidelity: Any) -> Any:
    """Reports a failed solve for every batch, and is not finite for those below 1."""
    failed = 0.0 if fidelity.probe is None else fidelity.probe.failures
    return jnp.where(batch[0] >= 1, 1.0, jnp.nan) * theta + jnp.where(batch[0] == 1, failed, 0.0)


def test_failures_before_the_last_good_update_are_not_told_of(train: Train):
    batches = [np.zeros(1), np.ones(1), np.full(1, 2.0), *[np.zeros(1)] * 3]
    with pytest.raises(NonFiniteError) as caught:
        train(loss=poisoned_after_failure, batches=batches, max_nonfinite=3, epochs=1)
    assert caught.value.run.summary.failures == 1
    assert "Inner solves failed" not in str(caught.value)
    assert "Start with a larger budget" in str(caught.value)


def test_ctrl_c_keeps_what_was_done(train: Train, tmp_path: Path):
    run = train(loss=poisoned, batches=interrupting(3), directory=tmp_path, epochs=9)
    assert run.status == "interrupted"
    assert "in epoch 3 (updates so far: 1)" in run.summary.message
    assert [record.epoch for record in run.history] == [0, 1, 2]
    assert (run.summary.epochs, run.summary.updates) == (2, 5)
    assert read_arrays(tmp_path / "theta.npz")["value"] == float(run.theta)
    # The half epoch is in theta too: sgd(0.5) on (theta - 1)^2 lands on 1.
    assert float(run.theta) == 1.0
    assert len(History.read(tmp_path / "history.jsonl")) == 3


def test_an_error_keeps_what_was_done_and_is_raised(train: Train, tmp_path: Path):
    def batches(epoch: int, key: Any) -> list[np.ndarray]:
        if epoch == 3:
            msg = "disk gone"
            raise OSError(msg)
        return [np.ones(1)]

    with pytest.raises(OSError, match="disk gone"):
        train(loss=poisoned, batches=batches, directory=tmp_path, epochs=9)
    kept = Run.read(tmp_path)
    assert kept.status == "failed"
    assert "disk gone" in kept.summary.message
    assert len(kept.history) == 3


def test_a_resumed_run_is_the_uninterrupted_one(train: Train, tmp_path: Path):
    def batches(epoch: int, key: Any) -> Any:
        return list(jax.random.normal(key, (3, 2)))

    common: dict[str, Any] = {
        "loss": poisoned,
        "batches": batches,
        "optimizer": optax.adam(0.3),
        "controller": ProgressiveRefinement(
            Ladder.iterations(1, 1, 9), ema_window=3, error_window=2
        ),
        "seed": 7,
    }

    def stop_at_four(event: Event) -> None:
        if event.epoch == 4:
            event.stop("far enough")

    whole = train(**common, epochs=9)
    first = train(**common, epochs=9, directory=tmp_path, callbacks=[stop_at_four])
    assert first.status == "stopped"
    rest = train(**common, epochs=9, directory=tmp_path, resume=True)
    assert float(rest.theta) == float(whole.theta)
    for name in ("metric", "loss", "gradient_norm", "level", "updates"):
        np.testing.assert_array_equal(rest.history.column(name), whole.history.column(name))
    assert len(History.read(tmp_path / "history.jsonl")) == 10
    elapsed = rest.history.column("elapsed")
    assert np.all(np.diff(elapsed) > 0)


def test_a_run_interrupted_within_an_epoch_goes_on_within_it(train: Train, tmp_path: Path):
    whole = train(loss=poisoned, batches=interrupting(99), epochs=5, optimizer=optax.sgd(0.1))
    train(
        loss=poisoned,
        batches=interrupting(3),
        epochs=5,
        optimizer=optax.sgd(0.1),
        directory=tmp_path,
    )
    rest = train(
        loss=poisoned,
        batches=interrupting(99),
        epochs=5,
        optimizer=optax.sgd(0.1),
        directory=tmp_path,
        resume=True,
    )
    assert float(rest.theta) == float(whole.theta)


def test_resuming_needs_the_same_optimizer_and_seed(train: Train, tmp_path: Path):
    train(directory=tmp_path, epochs=2)
    with pytest.raises(ValueError, match="a run of something else: optimizer"):
        train(directory=tmp_path, epochs=4, optimizer=optax.adam(0.1), resume=True)
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        train(directory=tmp_path, epochs=4, seed=1, resume=True)
    with pytest.raises(FileNotFoundError, match="Leave resume out"):
        train(directory=tmp_path / "nothing", resume=True)


def _measured(scale: float) -> Any:
    def loss(theta: Any, batch: Any, fidelity: Any) -> Any:
        return scale * (theta - 2.0) ** 2

    return loss


def _refining(**settings: Any) -> ProgressiveRefinement:
    ladder = Ladder.iterations(1, 1, settings.pop("stop", 9))
    return ProgressiveRefinement(ladder, error_window=2, **settings)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer": optax.sgd(0.2)}, "step_size was -0.1, is -0.2"),
        ({"optimizer": optax.sgd(optax.constant_schedule(0.1))}, "optimizer"),
        ({"loss": _measured(2.0)}, "loss.scale was 1.0, is 2.0"),
        ({"controller": _refining(stop=8)}, "controller.ladder.primal.iterations.stop was 9, is 8"),
        ({"controller": _refining(ema_window=3)}, "controller.ema_window was 6, is 3"),
        ({"batches": [jnp.ones(2)]}, "task.batches was 2 of float64.2., is 1 of"),
        ({"theta0": jnp.ones(3)}, r"theta was float64\[\], is float64\[3\]"),
    ],
)
def test_resuming_names_what_has_changed(tmp_path: Path, changed: dict[str, Any], message: str):
    common: dict[str, Any] = {
        "theta0": 5.0,
        "loss": _measured(1.0),
        "batches": [jnp.ones(2), jnp.ones(2)],
        "optimizer": optax.sgd(0.1),
        "controller": _refining(),
    }

    def train(epochs: int, **overrides: Any) -> Any:
        return optimize(
            Task(**common | overrides),
            epochs=epochs,
            progress=False,
            directory=tmp_path,
            resume=any(tmp_path.iterdir()),
        )

    before = train(2)
    kept = _contents(tmp_path / "checkpoints")
    with pytest.raises(ResumeError, match=message):
        train(4, **changed)
    # A refusal leaves the run as it was, and the same run goes on.
    assert _contents(tmp_path / "checkpoints") == kept
    assert len(train(4).history) == len(before.history) + 2


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Noting:
    """A reporter that keeps the notes and shows nothing."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


@pytest.mark.parametrize("metric", [-3.0, float("nan")])
def test_a_metric_that_cannot_refine_is_said_once(make_task: Any, metric: float):
    progress = Noting()

    def train(controller: Any, progress: Any) -> Any:
        task = make_task(validate=lambda theta: theta * 0 + metric)
        return optimize(task, optax.sgd(0.1), controller, epochs=4, progress=progress)

    train(_refining(), progress)
    assert len(progress.notes) == 1
    assert f"at the start: ProgressiveRefinement: the metric is {metric:.4g}" in progress.notes[0]
    with pytest.warns(RuntimeWarning, match="bl.Sched") as warned:
        train(_refining(), False)
    assert len(warned) == 1
    progress.notes.clear()
    train(FixedFidelity(bl.Budget(3)), progress)  # it reads no metric
    assert progress.notes == []


def test_a_metric_that_comes_down_to_zero_is_no_matter_of_complaint():
    progress = Noting()
    task = Task(1.0, lambda theta, batch, fidelity: theta**2, validate=abs)
    run = optimize(task, optax.sgd(0.5), _refining(), epochs=3, progress=progress)
    assert run.summary.final_metric == 0.0
    assert progress.notes == []


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": None, "task_optimizer": None}, "optimizer is missing"),
        ({"epochs": 0}, "epochs should be greater than or equal to 1, got 0"),
        ({"epochs": 2.5}, "epochs should be a valid integer"),
        ({"seed": -1}, "seed should be greater than or equal to 0"),
        ({"max_nonfinite": 0}, "max_nonfinite should be greater"),
    ],
)
def test_bad_settings_are_refused(make_task: Any, arguments: dict[str, Any], message: str):
    arguments = dict(arguments)
    own = {"optimizer": None} if "task_optimizer" in arguments else {}
    arguments.pop("task_optimizer", None)
    with pytest.raises(ValueError, match=message):
        optimize(make_task(**own), **arguments, progress=False)


def test_what_is_missing_is_named(make_task: Any):
    with pytest.raises(ValueError, match="controller is missing"):
        optimize(make_task(ladder=None), progress=False)
    with pytest.raises(ValueError, match="epochs is missing"):
        optimize(make_task(epochs=None), progress=False)
    with pytest.raises(TypeError, match="Call it to get its task"):
        optimize(make_task, progress=False)
    with pytest.raises(TypeError, match="a class instead of an object"):
        optimize(make_task(), controller=FixedFidelity, progress=False)
    with pytest.raises(TypeError, match="optimizer should be an optax optimizer"):
        optimize(make_task(), optimizer="adam", progress=False)  # pyright: ignore[reportArgumentType]


def test_a_file_is_no_directory(train: Train, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        train(directory=tmp_path / "file")
