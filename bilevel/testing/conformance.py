"""Conformance: a property that was checked, and the error that says it does not hold."""

from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


class ConformanceError(AssertionError):
    """A property does not hold; the message says which, what was expected, and what came.

    - `subject`: what was checked.
    - `broken`: name of the property that does not hold.
    - `expected`, `got`: in words, with the numbers.
    - `advice`: what to do next.

    >>> error = ConformanceError(
    ...     "MySolver", "budget respected", "1 iteration", "2", "Look at step."
    ... )
    >>> print(error)
    MySolver: 'budget respected' does not hold. Expected 1 iteration, got 2. Look at step.
    """

    def __init__(self, subject: str, broken: str, expected: str, got: str, advice: str):
        expected, got = expected.rstrip("."), got.rstrip(".")
        super().__init__(
            f"{subject}: {broken!r} does not hold. Expected {expected}, got {got}. {advice}"
        )
        self.subject = subject
        self.broken = broken
        self.expected = expected
        self.got = got
        self.advice = advice


class Checklist:
    """The properties that were found to hold, in order."""

    def __init__(self, subject: str):
        self.subject = subject
        self.held: list[str] = []

    def hold(self, name: str) -> None:
        """Note a property that was found to hold."""
        self.held.append(name)

    def fail(self, name: str, expected: str, got: str, advice: str) -> None:
        """**Raises:** `ConformanceError`, always."""
        raise ConformanceError(self.subject, name, expected, got, advice)

    def require(
        self, name: str, condition: object, expected: str, got: object, advice: str
    ) -> None:
        """**Raises:** `ConformanceError` unless the condition holds."""
        if not bool(condition):
            self.fail(name, expected, str(got), advice)

    def require_like(self, name: str, expected: PyTree, got: PyTree, advice: str) -> None:
        """**Raises:** `ConformanceError` unless structure, shapes and dtypes agree."""
        first, second = jax.tree.structure(expected), jax.tree.structure(got)
        self.require(name, first == second, f"the structure {first}", second, advice)
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True
        )
        for (path, leaf), value in pairs:
            where = jax.tree_util.keystr(path) or "the only leaf"
            shapes = (np.shape(leaf), np.shape(value))
            dtypes = (jax.numpy.result_type(leaf), jax.numpy.result_type(value))
            agree = shapes[0] == shapes[1] and dtypes[0] == dtypes[1]
            self.require(
                name,
                agree,
                f"{dtypes[0]}{list(shapes[0])} at {where}",
                f"{dtypes[1]}{list(shapes[1])}",
                advice,
            )

    def require_close(
        self, name: str, expected: PyTree, got: PyTree, tolerance: float, advice: str
    ) -> None:
        """**Raises:** `ConformanceError` unless two pytrees agree to a relative tolerance."""
        error = relative_error(expected, got)
        self.require(
            name,
            error <= tolerance,
            f"a relative difference of at most {tolerance:.1e}",
            f"{error:.1e}",
            advice,
        )


def relative_error(expected: PyTree, got: PyTree) -> float:
    """‖got - expected‖ / ‖expected‖ over all leaves, infinite where it is not a number."""
    difference = [
        np.asarray(b, wide(b)) - np.asarray(a, wide(a))
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True)
    ]
    error, size = flat_norm(difference), flat_norm(expected)
    if not np.isfinite(error):
        return float("inf")
    return 0.0 if error == 0 else error / size if size > 0 else float("inf")


def flat_norm(x: PyTree) -> float:
    """Euclidean norm over all leaves, in double precision on the host."""
    leaves = [np.asarray(leaf, wide(leaf)).reshape(-1) for leaf in jax.tree.leaves(x)]
    largest = max((float(np.abs(leaf).max(initial=0.0)) for leaf in leaves), default=0.0)
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * float(np.sqrt(sum(float(np.sum(np.abs(v / largest) ** 2)) for v in leaves)))


def wide(leaf: Any) -> Any:
    """The double-precision dtype of a leaf's kind."""
    return np.complex128 if np.iscomplexobj(leaf) else np.float64
