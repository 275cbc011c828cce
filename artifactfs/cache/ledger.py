"""Grants of space, shared by all processes that use a cache. The protocol stands in :mod:`artifactfs.cache`."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import struct
import time
from collections.abc import Iterator

from blake3 import blake3

from artifactfs.cache.layout import Fd, Tree, open_directory, open_read, open_update, scan
from artifactfs.forking import new_lock

LOCK_SECONDS = 1.0
UNKNOWN = 2**63
"""``used`` while it is counted for the first time: no room for anybody."""

_RECORD = struct.Struct("<8s16sQQ")
_MAGIC = b"afscache"
_CHECK = 16
_CHUNK = 64 << 20  # small beside the default limit; large beside what a lock and two small writes cost
_CHUNK_SHARE = 128  # … and this share of a small limit


class BusyError(Exception):
    """Another process holds a lock for too long."""


class StaleError(Exception):
    """The ledger was removed or damaged while it was open."""


class Account:
    """The ledger's numbers while its lock is held: bytes ``used`` at most, and bytes ever ``granted``."""

    __slots__ = ("granted", "used")

    def __init__(self, used: int, granted: int) -> None:
        self.used = used
        self.granted = granted


class Ledger:
    """This process's access to the ledger of ``tree``, for at most ``limit`` bytes.

    Every method may be called from any thread, and raises BusyError if another process holds the lock for too long,
    StaleError, or OSError.
    """

    def __init__(self, tree: Tree, limit: int) -> None:
        self.pid = os.getpid()
        self.seen = 0
        """What was used after the latest grant."""
        self._tree = tree
        self._limit = limit
        self._mutex = new_lock()
        self._file = open_update("ledger", tree.top)
        self._evict = open_update("evict", tree.top)
        self._writers = open_directory("writers", tree.top, create=True)
        self._boot = _boot_id()
        self._room = 0  # granted to this process and not yet used
        self._flying = 0  # … and being used: the files may not be there yet
        self._record: Fd | None = None  # holds at least the sum of both
        self._recorded = 0
        self._record_name = f"{self.pid}-{secrets.token_hex(4)}"

    def valid(self) -> bool:
        """Whether the numbers were written since the last boot; if not, count before anything else."""
        with self._locked():
            return any(self._boot) and self._load() is not None

    def used(self) -> int:
        """The bytes used at most, grants included."""
        with self._locked():
            return self._account().used

    def take(self, cost: int) -> bool:
        """Whether ``cost`` bytes may now be added to the cache. If so, :meth:`settle` must follow."""
        with self._mutex:
            if self._room < cost and not self._refill(cost):
                return False
            self._room -= cost
            self._flying += cost
            return True

    def settle(self, cost: int, spent: bool) -> None:
        """End what :meth:`take` began: the bytes were added, or not."""
        with self._mutex:
            self._flying -= cost
            if not spent:
                self._room += cost
            if self._recorded and not self._room + self._flying:
                self._write_record(0)

    def close(self) -> None:
        """Give back what was not used. A forked child has nothing to give back."""
        if self._record is None or self.pid != os.getpid():
            return
        # Not for ever: the garbage collector may call this in a thread that holds the lock.
        if self._mutex.acquire(timeout=LOCK_SECONDS):
            try:
                with contextlib.suppress(BusyError, StaleError, OSError), self._file_locked():
                    self._give_back(self._account())
            finally:
                self._mutex.release()

    def _give_back(self, account: Account) -> None:
        account.used -= min(account.used, self._room)
        self._store(account)
        self._room = 0
        self._write_record(self._flying)
        if not self._flying:
            os.unlink(self._record_name, dir_fd=self._writers.number)
            self._record = None

    @contextlib.contextmanager
    def evicting(self, seconds: float) -> Iterator[None]:
        """Be the only process that counts and evicts. BusyError after ``seconds``. Threads must not share this."""
        _lock(self._evict, seconds)
        try:
            yield
        finally:
            fcntl.flock(self._evict.number, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def change(self) -> Iterator[Account]:
        """The numbers, to be changed together with the removal of files."""
        with self._locked():
            account = self._account()
            try:
                yield account
            finally:
                self._store(account)

    def begin_count(self) -> tuple[int, int]:
        """Before a scan: what live writers may still add, and what was granted so far; for :meth:`end_count`."""
        with self._locked():
            outstanding = self._room + self._flying + self._others()
            account = self._load()
            if account is None:
                account = Account(UNKNOWN, 0)
                self._store(account)
            return outstanding, account.granted

    def end_count(self, begun: tuple[int, int], found: int) -> int:
        """After a scan that found ``found`` bytes: store and return what is used at most."""
        outstanding, granted = begun
        with self.change() as account:
            account.used = found + outstanding + max(0, account.granted - granted)
            return account.used

    def _refill(self, cost: int) -> bool:
        """Get a grant so that ``cost`` fits: a chunk, or if that is too much, what is missing. Needs ``_mutex``."""
        with self._file_locked():
            account = self._account()
            if self._record is None:
                self._create_record(account)
            missing = cost - self._room
            for grant in (max(missing, min(_CHUNK, self._limit // _CHUNK_SHARE)), missing):
                if account.used + grant <= self._limit:
                    self._write_record(self._room + self._flying + grant)
                    account.used += grant
                    account.granted += grant
                    self._store(account)
                    self._room += grant
                    self.seen = account.used
                    return True
            return False

    def _create_record(self, account: Account) -> None:
        # Under the ledger's lock, so that nobody finds it before it is locked and takes its owner for dead.
        record = open_update(self._record_name, self._writers, new=True)
        fcntl.flock(record.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._record = record
        cost = self._tree.cost(8)
        account.used += cost
        account.granted += cost
        self._store(account)
        self._write_record(0)

    def _write_record(self, outstanding: int) -> None:
        assert self._record is not None
        os.pwrite(self._record.number, struct.pack("<Q", outstanding), 0)
        self._recorded = outstanding

    def _others(self) -> int:
        """What the other live writers may still add. The records of dead ones are removed."""
        names = [name for name, _ in scan("writers", self._tree.top) if name != self._record_name]
        return sum(map(self._other, names))

    def _other(self, name: str) -> int:
        try:
            record = open_read(name, self._writers)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(record.number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int.from_bytes(os.pread(record.number, 8, 0), "little")
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._writers.number)
        return 0

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex, self._file_locked():
            yield

    @contextlib.contextmanager
    def _file_locked(self) -> Iterator[None]:
        """Holds the lock against other processes. Needs ``_mutex``: threads share the descriptor, and so the lock."""
        _lock(self._file, LOCK_SECONDS)
        try:
            if not os.fstat(self._file.number).st_nlink:
                raise StaleError
            yield
        finally:
            fcntl.flock(self._file.number, fcntl.LOCK_UN)

    def _account(self) -> Account:
        account = self._load()
        if account is None:
            raise StaleError
        return account

    def _load(self) -> Account | None:
        data = os.pread(self._file.number, _RECORD.size + _CHECK, 0)
        body, check = data[: _RECORD.size], data[_RECORD.size :]
        if len(check) != _CHECK or blake3(body).digest(_CHECK) != check:
            return None
        magic, boot, used, granted = _RECORD.unpack(body)
        return Account(used, granted) if magic == _MAGIC and boot == self._boot else None

    def _store(self, account: Account) -> None:
        body = _RECORD.pack(_MAGIC, self._boot, account.used, account.granted)
        os.pwrite(self._file.number, body + blake3(body).digest(_CHECK), 0)


def _lock(file: Fd, seconds: float) -> None:
    """Lock ``file`` against other processes. BusyError if that takes longer: who holds it may be stopped, and readers wait."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BusyError from None
        time.sleep(0.001)


def _boot_id() -> bytes:
    """16 bytes that differ after each boot: after a crash, what was written last may be lost. Zeros where it is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))[:16].ljust(16, b"\0")
    except (OSError, ValueError):
        return bytes(16)
