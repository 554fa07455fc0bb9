"""Client: JAX's coordination service, as far as a run talks to it by itself."""

from typing import Any

import jax

_LONG = 24 * 3600
"""Seconds that a meeting may be waited for: who is lost meanwhile is seen by the watch."""


class Client:
    """Keys and values that all processes see, and meetings of all.

    **Arguments:**

    - `raw`: of JAX.
    - `index`, `count`: number of this process, and how many there are.
    """

    def __init__(self, raw: Any, index: int, count: int):
        self._raw = raw
        self.index, self.count = index, count

    def tell(self, key: str, value: str) -> None:
        """Set a key."""
        self._raw.key_value_set(key, value, allow_overwrite=True)

    def offer(self, key: str, value: str) -> bool:
        """Set a key that nobody has set; whether that was so."""
        try:
            self._raw.key_value_set(key, value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" in str(error):
                return False
            raise
        return True

    def find(self, key: str) -> str | None:
        """The value of a key; `None` if it has none."""
        try:
            return self._raw.key_value_try_get(key)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def entries(self, folder: str) -> dict[str, str]:
        """All keys below one, by what stands behind it."""
        found: list[tuple[str, str]] = self._raw.key_value_dir_get(folder)
        return {key.removeprefix(folder): value for key, value in found}

    def meet(self, name: str, seconds: float = _LONG) -> None:
        """Wait until all processes do; a name serves once.

        **Raises:** `RuntimeError` where they do not come.
        """
        self._raw.wait_at_barrier(name, round(1000 * seconds))

    def living(self) -> set[int]:
        """Processes that are there; each that is has to ask, too, before anyone is told."""
        return set(self._raw.get_live_nodes(list(range(self.count))))


def client() -> Client:
    """Of this process.

    **Raises:** `RuntimeError` where JAX has connected it to none.
    """
    # JAX's public functions reach it through devices only, which a lost process stops.
    from jax._src.distributed import global_state  # noqa: PLC0415

    if global_state.client is None:
        msg = "this process is connected to no others: see bl.connected_processes."
        raise RuntimeError(msg)
    return Client(global_state.client, global_state.process_id, global_state.num_processes)
