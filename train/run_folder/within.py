"""Actions of packages that may hang, such as those that wait for a server: for so long, no longer.

Such a package is a guest: whatever it does, it holds a run up for seconds and cannot end it.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOCAL_SECONDS = 60.0
"""Longest wait for a package itself, which may lie on a slow disk."""
FINISH_SECONDS = 60.0
"""Longest wait for what is still to be sent at the end."""


def within(seconds: float, action: Callable[[], T]) -> T:
    """Return what `action`, which may hang, returns on a thread of its own.

    Raises:
        TimeoutError: If it has not returned.
    """
    results: list[T] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:  # raised again below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not results:
        raise TimeoutError(f"it has not returned within {seconds:.0f} s")
    return results[0]
