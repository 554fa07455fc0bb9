"""Compile ahead of time, and count it: every compilation is one that was asked for."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


class Executable(Generic[P, R]):
    """A function compiled once for each distinct shape, dtype, structure and sharding.

    jit compiles behind the caller's back. This compiles by itself and calls nothing but
    what it compiled, so `count` and `seconds` are the truth and not an inference.

    - `count`: compilations so far.
    - `seconds`: wall time that the caller waited for them, tracing included.

    **Arguments:**

    - `function`: traceable.
    - `runs_briefly`: whether to compile fast rather than well.
    - `out`: where it shall leave its results, as `jax.jit` takes it; open by default.

    >>> double = Executable(lambda x: 2 * x)
    >>> float(double(np.float32(3.0))), float(double(np.float32(4.0))), double.count
    (6.0, 8.0, 1)
    """

    def __init__(self, function: Callable[P, R], *, runs_briefly: bool = False, out: Any = None):
        # What runs for microseconds is not worth optimising: a third of the compile time.
        self._options = {"xla_backend_optimization_level": 0} if runs_briefly else None
        self.count = 0
        self.seconds = 0.0
        self._function = function
        self._jitted: Any = jax.jit(function, out_shardings=out)
        self._compilations: dict[Hashable, _Compilation] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the executable for these arguments, compiling it if there is none yet."""
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return self._function(*args, **kwargs)
        signature = _signature((args, kwargs))
        if signature not in self._compilations:
            self.prepare(*args, **kwargs)
        compilation = self._compilations[signature]
        if not compilation.done:
            start = time.perf_counter()
            compilation.wait()
            self.seconds += time.perf_counter() - start
        return compilation.executable(*args, **kwargs)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """Compile beside whatever the caller does next.

        **Arguments:** those of a later call; arrays may be given by shape and dtype.

        **Returns:** shapes and dtypes of the result.
        """
        start = time.perf_counter()
        traced = self._jitted.trace(*args, **kwargs)
        self._compilations[_signature((args, kwargs))] = _Compilation(traced.lower(), self._options)
        self.seconds += time.perf_counter() - start
        self.count += 1
        return traced.out_info


class _Compilation:
    """A compilation under way in a thread of its own: XLA leaves Python's lock alone."""

    def __init__(self, lowered: Any, options: dict[str, int] | None):
        self._options = options
        self.done = False
        self.executable: Any = None
        self._lowered: Any = lowered
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._compile, name="bilevel-compile")
        self._thread.start()

    def wait(self) -> None:
        """Wait until it is done; raises what the compiler raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self.done = True
        self._lowered = None

    def _compile(self) -> None:
        try:
            self.executable = self._lowered.compile(compiler_options=self._options)
        except BaseException as error:  # noqa: BLE001
            self._failure = error


def _signature(arguments: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, tuple(_leaf_signature(leaf) for leaf in leaves)


def _leaf_signature(leaf: Any) -> Hashable:
    if isinstance(leaf, jax.Array):
        # A sharding that was asked for is part of the executable, a default one is not.
        sharding = leaf.sharding if leaf.committed else None
        weak = getattr(leaf, "weak_type", False)  # random keys have no such thing
        return leaf.shape, leaf.dtype, weak, sharding
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), False, None
    return type(leaf)
