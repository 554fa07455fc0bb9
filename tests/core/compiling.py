"""Compilation for tests: what is compiled once and run once need not run fast."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Three times quicker to compile on a CPU, where a version of XLA knows the second one.
CANDIDATES: list[dict[str, Any]] = [
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
    {"xla_backend_optimization_level": 0},
]


@functools.cache
def options() -> dict[str, Any]:
    for candidate in CANDIDATES:
        try:
            jax.jit(jnp.negative, compiler_options=candidate)(1.0)
        except Exception:  # noqa: BLE001, S112  the error's type is XLA's own and differs
            continue
        return candidate
    return {}


def jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` with little optimisation: for numbers, not for times or bits."""
    return jax.jit(function, compiler_options=options())
