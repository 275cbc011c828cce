"""Locks that a forked child finds free.

A program may fork, as torch's DataLoader does, while threads of ours are at work: the child has none of them, so a lock that one
of them held at that moment would stay locked for ever.
"""

from __future__ import annotations

import os
import threading
import weakref

_locks: weakref.WeakSet[threading.Lock] = weakref.WeakSet()


def new_lock() -> threading.Lock:
    """A lock; in a child that is forked while another thread holds it, it is free.

    What it guards must then be good enough to go on with: a cache, a counter, something that is made anew.
    """
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def _free() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does for its own locks


os.register_at_fork(after_in_child=_free)
