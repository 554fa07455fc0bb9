"""Print a code block of the README: what it promises is what is run.

A block is named by the comment on the line before it, ``<!-- run: NAME -->``.
Usage: ``python .ci/readme_block.py NAME``.
"""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def block(name: str) -> str:
    """The text of the code block called `name`, which the README must have exactly once."""
    pattern = rf"<!-- run: {re.escape(name)} -->\n+```\w*\n(.*?)^```$"
    found = re.findall(pattern, README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if len(found) != 1:
        msg = f"README.md has {len(found)} code blocks named {name!r}; it must have one."
        raise SystemExit(msg)
    return found[0]


if __name__ == "__main__":
    sys.stdout.write(block(*sys.argv[1:]))
