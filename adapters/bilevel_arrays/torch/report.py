"""Report: what the solves of one call did, once a backward pass went through it."""

from typing import Any


class Report:
    """The numbers that a probe brought back from the backward pass of one call.

    It is filled by the last backward pass through the call, and before that it is empty.

    >>> import bilevel as bl
    >>> report = Report("solve")
    >>> report.filled
    False
    >>> report.fill(bl.Probe.zeros())
    >>> int(report.probe.solves)
    0
    """

    def __init__(self, name: str):
        self._name = name
        self._probe: Any = None

    @property
    def filled(self) -> bool:
        """Whether a backward pass has gone through the call."""
        return self._probe is not None

    @property
    def probe(self) -> Any:
        """What was given as `probe`, filled: a `bl.Probe` or a `bl.AdjointProbe`.

        **Raises:** `RuntimeError` before a backward pass.
        """
        if self._probe is None:
            msg = (
                f"{self._name}: no backward pass has gone through this call, and its report is "
                "what one brings back. Call .backward() on a loss made of what it returned; a "
                "call of which no tensor requires grad has none."
            )
            raise RuntimeError(msg)
        return self._probe

    def fill(self, probe: Any) -> None:
        """Note what a backward pass brought back."""
        self._probe = probe

    def __repr__(self) -> str:
        """The numbers, where there are any."""
        return f"Report({self._probe!r})" if self.filled else "Report(no backward pass yet)"
