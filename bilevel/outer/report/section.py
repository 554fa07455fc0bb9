"""Section: one task on the page, with the runs that are compared."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bilevel.outer import text
from bilevel.outer.comparison import Comparison
from bilevel.outer.diagnostics import diagnose_seeds
from bilevel.outer.finding import Finding
from bilevel.outer.report.chart import Chart
from bilevel.outer.report.charts import charts_of
from bilevel.outer.run import COMPLETED, Run
from bilevel.outer.sheet import Column, Sheet


@dataclasses.dataclass(frozen=True)
class Section:
    """What the page says of one task.

    - `comparison`: its runs, by policy.
    - `configurations`: by the directory that holds one, its keys and values.
    """

    comparison: Comparison
    configurations: Mapping[str, Mapping[str, str]] = dataclasses.field(
        default_factory=dict[str, Mapping[str, str]]
    )

    @property
    def title(self) -> str:
        """Its heading."""
        return self.comparison.task or "no name"

    @property
    def policies(self) -> list[str]:
        """The policies that have a run."""
        return [name for name, runs in self.comparison.runs.items() if runs]

    @property
    def lead(self) -> str:
        """What there is, in a sentence."""
        runs = [run for group in self.comparison.runs.values() for run in group]
        done = sum(run.status == COMPLETED for run in runs)
        metric = self.comparison.metric_name
        count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
        ended = "" if done == len(runs) else f", {done} of them completed"
        named = ", ".join(self.policies) or "none"
        return f"{count}{ended}. Policies: {named}. Metric: {metric}, smaller is better."

    @property
    def charts(self) -> list[Chart]:
        """What is drawn."""
        known = {
            name: group
            for name, group in self.comparison.runs.items()
            if any(run.history for run in group)
        }
        if not known:
            return []
        comparison = self.comparison
        target = comparison.mean_target if len(known) > 1 or comparison.target is not None else None
        return charts_of(known, comparison.metric_name, target)

    @property
    def findings(self) -> list[tuple[str, list[Finding]]]:
        """By policy, what its histories say; first, what those of all policies say alike."""
        found = {name: diagnose_seeds(self.comparison.runs[name]) for name in self.policies}
        if len(found) < 2:
            return list(found.items())
        first, *others = found.values()
        shared = [one for one in first if all(one in other for other in others)]
        own = [(name, [one for one in group if one not in shared]) for name, group in found.items()]
        return [*([("Every policy", shared)] if shared else []), *own]

    @property
    def sheets(self) -> list[Sheet]:
        """The tables: of policies where there are several, and of all runs."""
        several = len(self.policies) > 1
        return [*(self.comparison.sheets if several else []), self._runs]

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables has to know."""
        return self.comparison.notes if len(self.policies) > 1 else []

    @property
    def _runs(self) -> Sheet:
        pairs = [(name, run) for name, group in self.comparison.runs.items() for run in group]
        summaries = [run.summary for _, run in pairs]
        metric = self.comparison.metric_name

        def column(head: str, name: str, form: text.Form) -> Column:
            return Column(head, [form(getattr(summary, name)) for summary in summaries])

        columns = [
            Column("run", [name for name, _ in pairs], words=True),
            column("seed", "seed", _whole),
            Column("ended", [summary.status for summary in summaries], words=True),
            column("epochs", "epochs", text.count),
            column("updates", "updates", text.count),
            column(f"first {metric}", "first_metric", text.number),
            column(f"final {metric}", "final_metric", text.number),
            column(f"best {metric}", "best_metric", text.number),
            column("Σ primal", "primal_iterations", text.count),
            column("Σ adjoint", "adjoint_iterations", text.count),
            column("wall, s", "seconds", text.seconds),
            column("without compile, s", "seconds_without_compile", text.seconds),
            column("solver, s", "solver_seconds", text.seconds),
            column("compiles", "compilations", text.count),
            Column(
                "kept in",
                [text.NOTHING if run.directory is None else str(run.directory) for _, run in pairs],
                words=True,
            ),
        ]
        known = [column for column in columns if set(column.cells) != {text.NOTHING}]
        if len(pairs) > 1:
            return Sheet("Every run", known)
        # One row would be wider than a telephone, and compare nothing.
        names, values = [column.name for column in known], [column.cells[0] for column in known]
        return Sheet(
            "The run", [Column("number", names, words=True), Column("value", values, words=True)]
        )

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Machine, versions and origin, as far as they are known."""
        origin = self.comparison.origin
        facts = [(name, str(origin.get(name) or "")) for name in ("command", "date")]
        machine: Any = origin.get("machine")
        if isinstance(machine, Mapping):
            facts += [(str(name), _in_words(value)) for name, value in machine.items()]
        summaries = [run.summary for group in self.comparison.runs.values() for run in group]
        facts.append(("device", _together(summary.device for summary in summaries)))
        facts.append(("controllers", _together(summary.controller for summary in summaries)))
        packages = dict.fromkeys(package for summary in summaries for package in summary.versions)
        facts += [
            (package, _together(summary.versions.get(package, "") for summary in summaries))
            for package in packages
        ]
        return [(name, value) for name, value in facts if value]


def _whole(value: float | None) -> str:
    return text.NOTHING if value is None else str(value)


def _in_words(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _together(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(filter(None, map(str, values))))


def section_of(
    runs: Mapping[str, Sequence[Run]],
    title: str,
    metric_name: str,
    target: float | None,
) -> Section:
    """A section of runs that nobody has compared.

    **Arguments:**

    - `runs`: by policy, one for each seed.
    - `title`, `metric_name`, `target`: as of a comparison.
    """
    comparison = Comparison(
        task=title,
        metric_name=metric_name,
        runs={name: list(group) for name, group in runs.items()},
        target=target,
        margin=0.02,
        search=[],
        interrupted=False,
    )
    return Section(comparison)
