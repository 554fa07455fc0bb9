"""Set-up for all tests: double precision by default, repeatable examples."""

import itertools
import os
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")
# Without fused multiply-adds: XLA fuses a·b + c into one rounding where its other fusions
# happen to allow it, so equal operations in equal order would differ in the last bit.
# In one piece: every core has its own tests, so splitting a program for threads costs only.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_max_isa=AVX --xla_cpu_parallel_codegen_split_count=1")

# Tests compare against analytic values to 1e-12; single precision is asked for by dtype.
jax.config.update("jax_enable_x64", True)
# A cache shared between runs would hide what compiles, and tests count compilations.
jax.config.update("jax_enable_compilation_cache", False)

# An example may compile, so time says nothing about it, and few examples must do.
settings.register_profile(
    "local",
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_report_header() -> str:
    """What the numbers depend on."""
    return f"jax {jax.__version__}, {jax.default_backend()}, double precision by default"


MOST_MAPS = 20_000
"""Memory maps of a process (Linux allows 65,530) above which compiled programs are let go."""

_MAPS = Path("/proc/self/maps")
_TESTS = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Let compiled programs go before the process has no room for one more."""
    if next(_TESTS) % 20 or not _MAPS.exists():
        return
    with _MAPS.open("rb") as maps:
        if sum(1 for _ in maps) > MOST_MAPS:
            jax.clear_caches()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs an accelerator where there is none."""
    if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
        pytest.skip("JAX finds no accelerator")
