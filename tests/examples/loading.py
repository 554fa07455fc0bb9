"""Examples as modules: they import files beside them, as they do where they are run."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """The module of one example."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        # Dataclasses look their module up.
        sys.modules[name] = module
        specification.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        sys.modules.pop(name, None)
