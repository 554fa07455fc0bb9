"""Check the files named on the command line, or all that git tracks.

Text ends with one newline and holds no trailing blanks or carriage returns; no file is
larger than 500 kB; no merge marker is left.
"""

import subprocess
import sys
from pathlib import Path

LARGEST = 500_000
MARKERS = (b"<<<<<<< ", b">>>>>>> ")


def tracked() -> list[str]:
    """What git tracks, and what it would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True)
    return [name for name in listing.stdout.split("\0") if name]


def complaints(path: Path) -> list[str]:
    """What is wrong with one file."""
    content = path.read_bytes()
    found: list[str] = []
    if len(content) > LARGEST:
        found.append(f"{len(content)} bytes, more than {LARGEST}: data does not belong here")
    if b"\0" in content or not content:
        return found
    if not content.endswith(b"\n") or content.endswith(b"\n\n"):
        found.append("must end with exactly one newline")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line != line.rstrip():
            found.append(f"line {number}: trailing blanks or a carriage return")
        if line.startswith(MARKERS):
            found.append(f"line {number}: a merge marker")
    return found


def main() -> int:
    """Report every complaint; the exit status says whether there was one."""
    paths = [Path(name) for name in sys.argv[1:] or tracked()]
    found = [f"{path}: {text}" for path in paths if path.is_file() for text in complaints(path)]
    print("\n".join(found) if found else f"{len(paths)} files in order")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
