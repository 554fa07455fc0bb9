"""LinearModel: which inner problem a scikit-learn estimator solves, and what judges it.

All of them minimise, over coefficients w of standardised features,

    Σ s loss(y, f) + ½ Σ q w² + Σ a |w|,    f = features · w,

with training weights s that add up to one.  q and a come from scikit-learn's alpha,
l1_ratio and C.  An intercept without a penalty is centred away where the loss is squared,
else it is one more feature whose q is zero.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

import bilevel as bl

Theta = dict[str, Array]
"""Hyperparameters by their names in scikit-learn; alpha and C by their logarithms."""


class Shared(NamedTuple):
    """What all folds have in common, in NumPy or JAX.

    - `features`: standardised, with a column for an intercept that is not centred away.
    - `scale`: what each feature was divided by; infinite for an intercept without a penalty.
    - `outputs`: one column a class less one, orthonormal, for the multinomial model.
    """

    features: Float[Any, "n d"]
    scale: Float[Any, " d"]
    outputs: Float[Any, "k kminus1"]


class Fold(NamedTuple):
    """One fold; of a one-against-rest model, one fold and one class.

    - `train`, `test`: weights of the samples; the former of sum 1, as the latter but for
        the unit of the test loss.
    - `target`: what is predicted: 0 and 1, -1 and 1, the number of the class, or y.
    - `total`: the sum that the training weights had.
    - `mean`, `target_mean`: of the training samples, where an intercept is centred away.
    - `gram`, `moment`: Σ s x xᵀ and Σ s x y of the centred training samples, squared loss
        only; `gram` is empty where it would be large.
    - `largest`: the largest eigenvalue of the Gram matrix.
    """

    train: Float[Any, " n"]
    test: Float[Any, " n"]
    target: Float[Any, " n"]
    total: Float[Any, ""]
    mean: Float[Any, " d"]
    target_mean: Float[Any, ""]
    gram: Float[Any, "d d"]
    moment: Float[Any, " d"]
    largest: Float[Any, ""]


@dataclasses.dataclass(frozen=True)
class LinearModel(abc.ABC):
    """A linear model's inner problem; hashable, so that compiled code is found again."""

    inverse: ClassVar[bool] = False
    """Whether the strength is C, large where the penalty is small."""
    squared: ClassVar[bool] = False
    """Whether the inner loss is squared: intercepts are centred away, Gram matrices made."""

    @property
    def iterative(self) -> bool:
        """Whether the inner systems are solved by a Krylov method."""
        return False

    @property
    def strength(self) -> str:
        """The name of the hyperparameter that scales the penalty."""
        return "C" if self.inverse else "alpha"

    @abc.abstractmethod
    def problem(self, shared: Shared, fold: Fold) -> bl.InnerProblem:
        """The inner problem of one fold."""

    @abc.abstractmethod
    def solver(self, fold: Fold) -> bl.InnerSolver | None:
        """What solves it; `None` for the library's choice."""

    def estimator(self) -> bl.Estimator | None:
        """How the hypergradient is obtained."""
        return None

    def outer_loss(self, x: Array, shared: Shared, fold: Fold) -> Array:
        """The loss of the test samples."""
        scores = self.scores(x, shared, fold)
        return jnp.sum(_masked(fold.test, self.test_loss(fold.target, scores, shared)))

    def scores(self, x: Array, shared: Shared, fold: Fold) -> Array:
        """The linear predictions f."""
        del fold
        return shared.features @ x

    @abc.abstractmethod
    def loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """The training loss of each sample."""

    def test_loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """The smooth test loss of each sample."""
        return self.loss(target, scores, shared)

    def shape(self, features: int, outputs: int) -> tuple[int, ...]:
        """Shape of the unknown."""
        del outputs
        return (features,)


def _masked(weight: Array, loss: Array) -> Array:
    # Samples of another fold may be predicted as badly as to overflow.
    return jnp.where(weight > 0, weight * jnp.where(weight > 0, loss, 0.0), 0.0)


@dataclasses.dataclass(frozen=True)
class SquaredModel(LinearModel):
    """Squared loss: the training samples enter by their Gram matrix alone."""

    squared: ClassVar[bool] = True

    def scores(self, x: Array, shared: Shared, fold: Fold) -> Array:
        """Predictions, with the intercept that the means imply."""
        return shared.features @ x + (fold.target_mean - fold.mean @ x)

    def loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """(y - f)²."""
        del shared
        return (target - scores) ** 2


def _gram_product(shared: Shared, fold: Fold, x: Array) -> Array:
    if fold.gram.shape[0]:
        return fold.gram @ x
    scores = fold.train * (shared.features @ x - fold.mean @ x)
    return scores @ shared.features - jnp.sum(scores) * fold.mean


@dataclasses.dataclass(frozen=True)
class RidgeModel(SquaredModel):
    """`Ridge`: Σ s (y - f)² + α ‖w‖², a linear system."""

    def problem(self, shared: Shared, fold: Fold) -> bl.InnerProblem:
        """(G + q) w = moment, q = α / Σs."""

        def operator(theta: Theta) -> Any:
            penalty = jnp.exp(theta["alpha"]) / (fold.total * shared.scale**2)
            matrix = None
            if fold.gram.shape[0]:
                matrix = fold.gram + jnp.diag(penalty)
            return bl.LinearOperator(
                lambda v: _gram_product(shared, fold, v) + penalty * v,
                matrix=matrix,
                symmetric=True,
                positive_definite=True,
            )

        return bl.LinearSystem(operator, fold.moment, symmetric=True, positive_definite=True)

    def solver(self, fold: Fold) -> bl.InnerSolver | None:
        """A factorisation where there is a Gram matrix."""
        return bl.Direct() if fold.gram.shape[0] else bl.ConjugateGradient()


@dataclasses.dataclass(frozen=True)
class ElasticNetModel(SquaredModel):
    """`Lasso`, r = 1, and `ElasticNet`: ½ Σ s (y - f)² + α (r ‖w‖₁ + ½ (1 - r) ‖w‖²)."""

    def problem(self, shared: Shared, fold: Fold) -> bl.InnerProblem:
        """A quadratic objective plus the elastic net."""
        # Of columns that are multiples of each other any mixture is a minimiser, and the
        # derivative a singular system: this much curvature makes them share alike.
        floor = float(jnp.finfo(shared.features.dtype).eps) ** (2 / 3)

        def smooth(x: Array, theta: Theta) -> Array:
            del theta
            return 0.5 * x @ _gram_product(shared, fold, x) - fold.moment @ x

        def ratio(theta: Theta) -> Array | float:
            return theta.get("l1_ratio", 1.0)

        penalty = bl.ElasticNet(
            lambda theta: jnp.exp(theta["alpha"]) * ratio(theta) / shared.scale,
            lambda theta: jnp.exp(theta["alpha"]) * (1.0 - ratio(theta)) / shared.scale**2 + floor,
        )
        return bl.CompositeMinimization(smooth, penalty, step=1.0 / fold.largest)

    def solver(self, fold: Fold) -> bl.InnerSolver | None:
        """Accelerated proximal gradients; the quadratic objective has one step for all points."""
        return bl.ProximalGradient(step_size=1.0 / fold.largest)


@dataclasses.dataclass(frozen=True)
class InverseModel(LinearModel):
    """C Σ s loss(y, f) + ½ ‖w‖², divided by C Σ s.

    - `krylov`: whether the Newton systems are solved by conjugate gradients.
    """

    inverse: ClassVar[bool] = True

    krylov: bool = False

    @property
    def iterative(self) -> bool:
        """Whether the Newton systems are solved by conjugate gradients."""
        return self.krylov

    def penalty(self, theta: Theta, shared: Shared, fold: Fold) -> Array:
        """q of every column: 1 / (C Σ s), in the units of the scaled feature."""
        log = theta["C"]
        # The intercept of liblinear has the penalty of a feature, whichever that is.
        extra = len(shared.scale) - len(log)
        if len(log) > 1 and extra:
            log = jnp.concatenate([log, jnp.full(extra, jnp.mean(log))])
        return jnp.exp(-log) / (fold.total * shared.scale**2)

    def problem(self, shared: Shared, fold: Fold) -> bl.InnerProblem:
        """A smooth and strictly convex objective."""

        def objective(x: Array, theta: Theta) -> Array:
            losses = self.loss(fold.target, shared.features @ x, shared)
            penalty = self.penalty(theta, shared, fold)
            square = jnp.sum(x**2, axis=tuple(range(1, x.ndim)))
            return jnp.sum(fold.train * losses) + 0.5 * jnp.sum(penalty * square)

        return bl.Minimization(objective)

    def solver(self, fold: Fold) -> bl.InnerSolver | None:
        """Newton's method."""
        del fold
        return bl.Newton(linear=bl.ConjugateGradient() if self.krylov else bl.Direct())

    def estimator(self) -> bl.Estimator | None:
        """The adjoint's systems are those of the last Newton step."""
        return bl.Implicit(bl.ConjugateGradient() if self.krylov else bl.Direct())


@dataclasses.dataclass(frozen=True)
class LogisticModel(InverseModel):
    """`LogisticRegression` of two classes, y in {0, 1}."""

    def loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """log(1 + exp(f)) - y f."""
        del shared
        return jax.nn.softplus(scores) - target * scores


@dataclasses.dataclass(frozen=True)
class MultinomialModel(InverseModel):
    """`LogisticRegression` of more than two classes.

    The unknown has one column less than there are classes.  Adding a vector to the
    coefficients of all classes changes no probability, so that at the minimiser they add
    up to zero; the scores are those of an orthonormal basis of what adds up to zero.
    """

    def shape(self, features: int, outputs: int) -> tuple[int, ...]:
        """Features by classes less one."""
        return (features, outputs - 1)

    def loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """Minus the logarithm of the probability of the right class."""
        every = scores @ shared.outputs.T
        right = jnp.take_along_axis(every, target.astype(int)[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(every, axis=1) - right


@dataclasses.dataclass(frozen=True)
class SquaredHingeModel(InverseModel):
    """`LinearSVC`, one class against the rest, y in {-1, 1}."""

    def loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """max(0, 1 - y f)²."""
        del shared
        return jnp.maximum(0.0, 1.0 - target * scores) ** 2


@dataclasses.dataclass(frozen=True)
class SquaredInsensitiveModel(InverseModel):
    """`LinearSVR` with the squared loss: max(0, |y - f| - ε)²."""

    epsilon: float = 0.0

    def loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """Squared distance to a tube of half width ε."""
        del shared
        return jnp.maximum(0.0, jnp.abs(target - scores) - self.epsilon) ** 2

    def test_loss(self, target: Array, scores: Array, shared: Shared) -> Array:
        """(y - f)²."""
        del shared
        return (target - scores) ** 2
