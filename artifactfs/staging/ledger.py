"""The table of nodes and its journal as one: a change is recorded first and made then, under one lock.

The gate keeps changes waiting while a commit reads what is staged. A commit that was attempted may be repeated under its id only
as long as nothing has changed since; so the first change after it renews the id, in the same record.
"""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from artifactfs.staging.journal import Delta, Journal
from artifactfs.staging.nodes import FileNode, Header, Namespace, Node, header_delta


class Unread(Exception):
    """An operation must know something of the base that is not known yet; ``fetch`` finds it out, without any lock."""

    def __init__(self, key: object, fetch: Callable[[], Any]) -> None:
        self.key = key
        self.fetch = fetch


class Ledger:
    """``lock`` is the stage's second lock: see :mod:`artifactfs.staging.stage`. ``doom`` is told the numbers of data files that
    nobody needs any more; it is called with the lock held and must only remember them."""

    def __init__(self, space: Namespace, journal: Journal, doom: Callable[[int], None]) -> None:
        self.space = space
        self.journal = journal
        self.lock = threading.RLock()
        self.gated = False
        self.careful = space.header.attempted
        """Whether writers must ask: a commit is under way, or one was attempted and nothing has changed since."""
        self._gate = threading.Condition(self.lock)
        self._doom = doom
        self._numbers = itertools.count(space.header.next_id)

    def new_number(self) -> int:
        """A number for a node or a data file that none has had."""
        return next(self._numbers)

    def record(self, deltas: list[Delta], freeing: bool = False) -> None:
        """Record the changes and make them; on OSError none is made. ``freeing``: they make space. Call it with the lock."""
        if self.space.header.attempted:
            deltas = [header_delta(self._renewed()), *deltas]
        self.journal.append(deltas, freeing)
        self.space.apply(deltas)
        self.careful = self.gated
        if self.space.dead:
            self._count_dead()

    def change(self, node: Node, *deltas: Delta, freeing: bool = False) -> None:
        """Record and make changes of one node, and of nothing that others can see if it has no name any more."""
        with self.lock:
            if node.nlink:
                self.record([*self.space.adoption(node), *deltas], freeing)
                return
            if not node.adopted:
                self.space.attach(node)
            self.space.apply(deltas)

    def note(self, *deltas: Delta) -> None:
        """Record what changes nothing that is shown or committed."""
        with self.lock:
            self.journal.append(list(deltas))
            self.space.apply(deltas)
            self.careful = self.gated or self.space.header.attempted

    def set_header(self, **changes: Any) -> None:
        """Change the header, durably."""
        with self.lock:
            self.note(header_delta(msgspec.structs.replace(self.space.header, **changes)))
        self.journal.sync()

    def touch(self) -> None:
        """Content that is not recorded is about to change."""
        with self.lock:
            if self.space.header.attempted:
                self.record([])

    def forget(self, node: Node) -> None:
        """Drop a node that has no name and is not open. Call it with the lock."""
        self.space.nodes.pop(node.ino, None)
        if isinstance(node, FileNode) and node.data:
            self.doom(node.data)

    def doom(self, data: int) -> None:
        """A data file is not needed any more."""
        self._doom(data)

    def await_gate(self) -> None:
        with self.lock:
            while self.gated:
                self._gate.wait()

    def close_gate(self) -> None:
        """From now on changes wait; those under way are not waited for."""
        with self.lock:
            self.gated = self.careful = True

    def open_gate(self) -> None:
        with self.lock:
            self.gated = False
            self.careful = self.space.header.attempted
            self._gate.notify_all()

    def _renewed(self) -> Header:
        return msgspec.structs.replace(self.space.header, commit=uuid.uuid4().hex, attempted=False)

    def _count_dead(self) -> None:
        dead, self.space.dead = self.space.dead, []
        for node in dead:
            if not node.nlink and not (isinstance(node, FileNode) and node.open):
                self.forget(node)
