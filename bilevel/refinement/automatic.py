"""AutomaticRefinement: as fine as the gradient needs, measured, without anything to set."""

from typing import Annotated, Any, ClassVar, NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field

from bilevel.refinement.arguments import checked
from bilevel.refinement.error_model import AutomaticState, Rule, after, blank, compared_levels
from bilevel.refinement.fidelity import Fidelity
from bilevel.refinement.ladder import Ladder, positions_of_both
from bilevel.refinement.lookup import fidelity_at, require_state
from bilevel.refinement.measurement import measured
from bilevel.refinement.namespace import AnyArray

Part = Annotated[
    float, Field(gt=0.0, lt=1.0, description="It is a part of something, such as 0.1.")
]


class Differences(NamedTuple):
    """Distances between gradients of one batch at one θ, computed at the levels compared.

    - `coarser`: ‖g_a − g_b‖ of the coarsest and the middle one.
    - `finer`: ‖g_b − g_c‖ of the middle and the finest one.
    - `noise`: standard deviation of a batch's gradient about the mean of all batches, as a
        norm; 0 where there is one batch, NaN where it was not measured this time.

    In a loop of one's own, with `gradient(fidelity)` for the present batch and θ:

    >>> ladder = Ladder.iterations(1, 1, 50)
    >>> controller = AutomaticRefinement(ladder)
    >>> state = controller.init()
    >>> def gradient(fidelity):
    ...     return 1.0 + 0.5 ** int(fidelity.budget.iterations)
    >>> for _ in range(20):
    ...     g = gradient(controller.fidelity(state))
    ...     difference = None
    ...     if controller.due(state):
    ...         a, b, c = (gradient(fidelity) for fidelity in controller.compared(state))
    ...         difference = Differences(abs(a - b), abs(b - c))
    ...     state = controller.update(state, gradient_norm=abs(g), error=difference)
    >>> int(controller.fidelity(state).budget.iterations)  # 0.5 ** 5 < 0.05
    5
    """

    coarser: Any
    finer: Any
    noise: Any = 0.0


class AutomaticRefinement(eqx.Module):
    """Keep the gradient's truncation error small next to the gradient and to its noise.

    Now and then a gradient is computed at three levels, on the same batch. How fast the
    distances between them fall is the solver's rate of convergence, and so they tell the
    error that each level's gradient has, and the level that an allowed error takes. In
    between, the error is taken to stay and the gradient's norm is watched, which costs
    nothing: as training comes to its end the gradient shrinks, its error does not, and the
    level rises. Noise of minibatches hides an error, so there may be more of it. The level
    falls again where the gradient grows.

    It reads no validation metric and no epochs: it is told of every update, or of as many
    as one likes.

    **Arguments:**

    - `ladder`: the fidelities, coarse to fine. Where their static parts differ, such as a
        grid, it uses the finest level of each: what two levels on one grid differ by says
        nothing of the grid's own error.
    - `signal`: error that is allowed, as a part of the mean gradient's norm, in (0, 1).
    - `noise`: error that is allowed besides, as a part of the gradient's noise, in (0, 1).
    - `share`: part of the work that may go into comparisons, in (0, 1).

    The defaults were found on two tasks; docs/automatic.md tells what else was tried, and
    docs/results.md how they do on others.

    **Raises:** `ValueError` for an argument out of range.

    >>> controller = AutomaticRefinement(Ladder.iterations(1, 1, 50))
    >>> state = controller.init()
    >>> bool(controller.due(state)), [int(f.budget.iterations) for f in controller.compared(state)]
    (True, [1, 2, 3])
    >>> state = controller.update(state, gradient_norm=1.0, error=Differences(0.4, 0.2))
    >>> bool(state.accepted), int(controller.fidelity(state).budget.iterations)
    (False, 3)
    """

    ladder: Ladder
    signal: float = eqx.field(static=True)
    noise: float = eqx.field(static=True)
    share: float = eqx.field(static=True)
    _rule: Rule = eqx.field(static=True)
    _places: "_Places" = eqx.field(static=True)

    requires: ClassVar[frozenset[str]] = frozenset({"gradient_norm"})
    without_measurement: ClassVar[str] = "goes on with more iterations"

    @checked
    def __init__(
        self,
        ladder: Annotated[Ladder, Field(description="Use for example Ladder.iterations().")],
        *,
        signal: Part = 0.05,
        noise: Part = 0.1,
        share: Part = 0.05,
    ):
        if not ladder.has_one_shape:
            ladder = Ladder.of(ladder.fidelity(level) for level in ladder.static.last_of_each)
        self.ladder = ladder
        self.signal = signal
        self.noise = noise
        self.share = share
        self._rule = Rule(signal, noise, share, len(ladder) - 1)
        apart = ladder.has_one_shape and ladder.adjoint is not None and len(ladder.adjoint) > 1
        self._places = _Places(ladder, 2 if apart else 1)

    def init(self) -> AutomaticState:
        """The state before the first update, at the coarsest level, with a comparison due."""
        return blank(self._places.sides, due=len(self.ladder) > 1)

    def due(self, state: AutomaticState) -> Bool[AnyArray, ""]:
        """Whether the next gradient should be compared."""
        return state.due

    def compared(self, state: AutomaticState) -> tuple[Fidelity, Fidelity, Fidelity]:
        """The levels that a comparison computes a gradient at, coarse to fine.

        One of them is the level of `fidelity(state)`.
        """
        coarse, middle, fine = (self._at(levels) for levels in compared_levels(self._rule, state))
        return coarse, middle, fine

    def update(
        self,
        state: AutomaticState,
        metric: Any = None,
        *,
        gradient_norm: Any = None,
        error: Any = None,
    ) -> AutomaticState:
        """The state after one more update.

        **Arguments:**

        - `state`: the state before.
        - `metric`: unused.
        - `gradient_norm`: Euclidean norm of the gradient, a real scalar.
        - `error`: `Differences`, where a comparison was made; else `None`.

        **Returns:** the new state, of the same structure, shapes and dtypes.

        **Raises:** `TypeError` where `gradient_norm` is missing or no real number, or `error`
        is something else; `ValueError` for more than one number.
        """
        del metric
        require_state("AutomaticRefinement", "update", state)
        owner = "AutomaticRefinement.update"
        if gradient_norm is None:
            msg = f"{owner}: gradient_norm is missing. Pass the norm of each update's gradient."
            raise TypeError(msg)
        norm = measured(owner, "gradient_norm", gradient_norm)
        if error is None:
            return after(self._rule, state, self._places.rows, norm, None)
        parts = ("coarser", "finer", "noise")
        if not all(hasattr(error, part) for part in parts):
            msg = (
                f"{owner}: error should be bl.Differences between the gradients at the levels of "
                f"compared(state), got {type(error).__name__}. Leave it out where none was made."
            )
            raise TypeError(msg)
        numbers = tuple(measured(owner, f"error.{part}", getattr(error, part)) for part in parts)
        return after(self._rule, state, self._places.rows, norm, numbers)

    def fidelity(self, state: AutomaticState) -> Fidelity:
        """The fidelity of the state's levels."""
        require_state("AutomaticRefinement", "fidelity", state)
        return self._at(state.levels)

    def _at(self, levels: Int[AnyArray, " sides"]) -> Fidelity:
        return fidelity_at(self.ladder, levels[0], levels[1] if len(levels) > 1 else None)


class _Places:
    """What the error falls geometrically in, a row a side; the same for equal ladders."""

    def __init__(self, ladder: Ladder, sides: int):
        self.sides = sides
        self.rows: Float[np.ndarray, "sides levels"] = positions_of_both(ladder)[:sides]
        self._key = sides, self.rows.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Places) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)
