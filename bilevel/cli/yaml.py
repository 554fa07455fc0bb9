"""YAML, as much of it as a configuration needs."""

import importlib
from typing import Any

MOST_DEEP = 32
"""Collections within collections: it takes long to see that a thousand have no end."""


def read_yaml(text: str) -> Any:
    """Plain data of a YAML text: no tags, no aliases, no key twice.

    **Raises:** `ValueError` in one line; where PyYAML is missing, too.
    """
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        msg = "reading YAML needs PyYAML: pip install pyyaml, or write it as TOML"
        raise ValueError(msg) from None

    class Loader(yaml.SafeLoader):
        """Refuses what the safe loader lets pass."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """No aliases: a few of them stand for more than fits into memory."""
            event = self.peek_event()
            if self.check_event(yaml.AliasEvent) or getattr(event, "anchor", None):
                line = event.start_mark.line + 1
                msg = f"line {line}: anchors and aliases are not for configurations"
                raise ValueError(msg)
            self.depth += 1
            if self.depth > MOST_DEEP:
                msg = f"line {event.start_mark.line + 1}: it is nested too deeply"
                raise ValueError(msg)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
            """No key twice: the first would be dropped without a word."""
            seen: set[Any] = set()
            for key, _ in node.value:
                if key.value in seen:
                    msg = f"line {key.start_mark.line + 1}: {key.value} stands there twice"
                    raise ValueError(msg)
                if isinstance(key.value, str):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or "no YAML"
        msg = f"{where}{' '.join(str(problem).split())}"
        raise ValueError(msg) from None
    except TypeError as error:  # a key that is a list
        raise ValueError(str(error)) from None
