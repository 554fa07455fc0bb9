"""Plan: what a sweep consists of, kept with it so that it can be gone on with."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from bilevel.outer.checkpoints.durable import write_file
from bilevel.outer.fingerprint import differences
from bilevel.outer.history import encode
from bilevel.outer.policy import parse_policies
from bilevel.outer.sweeps.point import Point, plain, points

PLAN_FILE = "sweep.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs of a sweep: settings x policies x seeds.

    - `task`: where it comes from; `fixed`: its arguments that are the same in every run.
    - `settings`: by name, the values that are tried.
    - `policies`, `seeds`.
    - `training`: how each run is trained, in plain data; of the same keys in every plan.
    - `target`, `margin`: as of a comparison.
    - `origin`: when, where and by which command it was begun; two plans may differ in it.
    - `name`, `metric_name`: of the task, known once one has been built.
    """

    task: str
    fixed: dict[str, Any]
    settings: dict[str, list[Any]]
    policies: tuple[str, ...]
    seeds: tuple[int, ...]
    training: dict[str, Any]
    target: float | None
    margin: float
    origin: dict[str, Any]
    name: str
    metric_name: str

    @property
    def points(self) -> list[Point]:
        """Every choice of settings."""
        return points(self.settings)

    def runs(self) -> Iterator[tuple[Point, str, int]]:
        """Settings, policy and seed of every run, in the order in which they are begun."""
        for point in self.points:
            for policy in self.policies:
                for seed in self.seeds:
                    yield point, policy, seed

    def folder(self, point: Point, policy: str, seed: int) -> Path:
        """Of a run, from the sweep's directory on."""
        (parsed,) = parse_policies(policy)
        return Path(point.folder) / parsed.slug / f"seed-{seed}"

    def difference(self, other: "Plan") -> str | None:
        """The first thing in which another plan differs, in words."""
        found = differences(_compared(self), _compared(other))
        return found[0] if found else None

    def save(self, directory: Path) -> None:
        """Write it into the sweep's directory."""
        content = json.dumps(encode(_stored(self)), indent=2, allow_nan=False)
        write_file(directory / PLAN_FILE, f"{content}\n".encode())

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read the plan of a sweep.

        **Raises:** `FileNotFoundError` if there is none, `ValueError` if it cannot be read.
        """
        path = directory / PLAN_FILE
        if not path.is_file():
            msg = f"{directory} holds no sweep: there is no {PLAN_FILE} in it."
            raise FileNotFoundError(msg)
        try:
            stored: Any = json.loads(path.read_text(encoding="utf-8"))
            plan = cls(**{field.name: stored[field.name] for field in dataclasses.fields(cls)})
            plan = dataclasses.replace(
                plan, policies=tuple(plan.policies), seeds=tuple(map(int, plan.seeds))
            )
            parse_policies(",".join(plan.policies))
            list(plan.runs())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"{path} is no plan of a sweep that bilevel wrote: {error!r}"
            raise ValueError(msg) from error
        return plan


def _stored(plan: Plan) -> dict[str, Any]:
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    return {name: plain(value) for name, value in fields.items()}


def _compared(plan: Plan) -> dict[str, str]:
    fields = {name: value for name, value in _stored(plan).items() if name != "origin"}
    return dict(_flat("", fields))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Keys with dots in them, and values in words."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), part)
    else:
        yield prefix, json.dumps(encode(value))
