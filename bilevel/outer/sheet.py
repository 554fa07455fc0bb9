"""Sheet: a table that no screen is too narrow for."""

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bilevel.outer import text


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    - `name`: at its head.
    - `cells`: one a row.
    - `words`: whether it is read from the left, rather than compared digit by digit.
    """

    name: str
    cells: Sequence[str]
    words: bool = False


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Columns under a title.

    Where the screen is too narrow for all, it is folded: below each other stand as many
    columns as fit, with the first column before each part. A cut number is no number.

    - `title`: above it.
    - `columns`: the first names the rows.

    >>> sheet = Sheet("made", [Column("policy", ["full"], words=True), Column("s", ["12"])])
    >>> print(sheet.markdown())
    | policy | s |
    | :-- | --: |
    | full | 12 |
    """

    title: str
    columns: Sequence[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """In as many parts as the width asks for."""
        roomy = options.update(width=10_000)
        first, *others = self.columns
        parts: list[list[Column]] = [[first]]
        for column in others:
            wider = _table([*parts[-1], column])
            fits = Measurement.get(console, roomy, wider).maximum <= options.max_width
            if fits or len(parts[-1]) == 1:
                parts[-1].append(column)
            else:
                parts.append([first, column])
        for place, part in enumerate(parts):
            yield _table(part, None if place else self.title)

    def markdown(self) -> str:
        """The table in Markdown, without its title."""
        rows = [
            [column.name for column in self.columns],
            [":--" if column.words else "--:" for column in self.columns],
            *zip(*(column.cells for column in self.columns), strict=True),
        ]
        # A bar in a cell would end it.
        return "\n".join(
            f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows
        )


def _table(columns: Sequence[Column], title: str | None = None) -> Table:
    table = text.table(title=None if title is None else escape(title))
    for column in columns:
        # The head makes no column wider than its longest word has to.
        words = max(column.name.split(), key=len, default="")
        width = max(map(len, [*column.cells, words]))
        head = "\n".join(textwrap.wrap(column.name, width)) if width else ""
        table.add_column(Text(head), justify="left" if column.words else "right", no_wrap=True)
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table
