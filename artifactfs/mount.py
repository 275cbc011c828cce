"""The FUSE adapter: decode what libfuse asks, call the tree, encode what it says. The only importer of ``fuse`` (fusepy).

fusepy gives the loading of libfuse 2 and its structures. Its translation of every operation is replaced here by one that copies
less, keeps names that are not UTF-8 (surrogateescape), reads directories as they are asked for, and lets no exception past: an
error of ``errors.py`` and an OSError answer with their errno, anything else is a bug, which is logged with its traceback and
answered with EIO.

Only operations that are needed are defined, because each one that is defined is a round trip: no ``flush``, no ``access``
(``default_permissions`` has the kernel check), no locks (the kernel's own are right: all users of a mount are on this machine).

Importing this module raises MountError where libfuse 2 is not installed.

Threads: libfuse's own loop has many, which fight over the interpreter: four programs that read get a fifth of what one thread
would give them. :class:`_Loop` has one thread that receives and answers, as long as that is fast; once a request waits for a
remote, or takes longer than :data:`PATIENCE`, another thread receives beside it. :meth:`Session.run` must be called in the main
thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from cachetools import TTLCache

from artifactfs import mountpoint
from artifactfs.errors import ArtifactFSError, MountError
from artifactfs.model import Attributes, Space
from artifactfs.view import FileTree
from artifactfs.waiting import before_waiting


def _find_libfuse() -> None:
    """Spare fusepy's search, which starts ldconfig or even a compiler, where the usual name of the library will do."""
    if sys.platform == "linux" and "FUSE_LIBRARY_PATH" not in os.environ:
        with contextlib.suppress(OSError):
            ctypes.CDLL("libfuse.so.2")
            os.environ["FUSE_LIBRARY_PATH"] = "libfuse.so.2"


_find_libfuse()
try:
    import fuse
except (OSError, AttributeError) as missing:
    _install = (
        "on macOS, macFUSE" if sys.platform == "darwin" else "`apt install libfuse2 fuse3` (Fedora: `dnf install fuse-libs fuse`)"
    )
    raise MountError(f"libfuse 2 cannot be loaded ({missing}), so nothing can be mounted: install it, {_install}") from None

_lib = fuse._libfuse
_lib.fuse_setup.restype = ctypes.c_void_p
_lib.fuse_setup.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_size_t, *[ctypes.c_void_p] * 3]
_lib.fuse_teardown.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_lib.fuse_get_session.restype = ctypes.c_void_p
_lib.fuse_get_session.argtypes = [ctypes.c_void_p]
_lib.fuse_session_next_chan.restype = ctypes.c_void_p
_lib.fuse_session_next_chan.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_lib.fuse_chan_bufsize.restype = ctypes.c_size_t
_lib.fuse_chan_bufsize.argtypes = [ctypes.c_void_p]
_receive = _lib.fuse_chan_recv
_receive.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_process = _lib.fuse_session_process
_process.restype = None
_process.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_invalidate = _lib.fuse_lowlevel_notify_inval_inode
_invalidate.argtypes = [ctypes.c_void_p, ctypes.c_uint64, fuse.c_off_t, fuse.c_off_t]
_lib.fuse_chan_fd.argtypes = [ctypes.c_void_p]
_lib.fuse_chan_new.restype = ctypes.c_void_p
_lib.fuse_chan_new.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p]
_writev = ctypes.CDLL(None, use_errno=True).writev
_writev.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_writev.restype = ctypes.c_ssize_t

log = logging.getLogger(__name__)

FOREVER = 86400.0
"""Seconds for which the kernel may keep what it knows about a version: it cannot change."""

_CHANGING = 60.0
"""The same of a stage, which only changes through the kernel; but see :class:`_ChangingLinks`."""

PATIENCE = 0.005
"""Seconds that a request may take before others are received beside it: far more than one that reads no disk takes, and little
to wait for who comes after one that does."""

_MAX_READ = 128 << 10  # the most that one request of libfuse 2's protocol can ask for
_REPEATS = 10.0  # seconds for which the same failure is not logged again: a program may retry in a loop


class WritableTree(Protocol):
    """What a staging mount asks of ``staging.Stage`` besides :class:`FileTree`'s calls; errors are as there."""

    def getattr(self, path: str, fh: int | None = None) -> Attributes: ...
    def opendir(self, path: str) -> Callable[[], Iterable[tuple[str, int, int]]]: ...
    def readlink(self, path: str) -> str: ...
    def create(self, path: str, mode: int, flags: int, owner: tuple[int, int]) -> int: ...
    def mknod(self, path: str, mode: int, owner: tuple[int, int], device: int) -> None: ...
    def open(self, path: str, flags: int) -> int: ...
    def read(self, fh: int, size: int, offset: int) -> bytes: ...
    def write(self, fh: int, data: bytes, offset: int) -> int: ...
    def truncate(self, path: str, size: int) -> None: ...
    def ftruncate(self, fh: int, size: int) -> None: ...
    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None: ...
    def fsync(self, fh: int, datasync: bool) -> None: ...
    def fsyncdir(self, path: str) -> None: ...
    def release(self, fh: int) -> None: ...
    def mkdir(self, path: str, mode: int, owner: tuple[int, int]) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def unlink(self, path: str) -> None: ...
    def rename(self, old: str, new: str) -> None: ...
    def symlink(self, target: str, path: str, owner: tuple[int, int]) -> None: ...
    def link(self, old: str, new: str) -> None: ...
    def chmod(self, path: str, mode: int) -> None: ...
    def chown(self, path: str, uid: int, gid: int) -> None: ...
    def utimens(self, path: str, atime_ns: int | None, mtime_ns: int | None) -> None: ...
    def statfs(self) -> Space: ...
    def getxattr(self, path: str, name: str) -> bytes: ...
    def listxattr(self, path: str) -> list[str]: ...
    def setxattr(self, path: str, name: str, value: bytes, flags: int) -> None: ...
    def removexattr(self, path: str, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    """How a tree is mounted.

    ``label`` follows ``artifactfs#`` in the source of ``findmnt``. ``timeout`` is how long (seconds) the kernel may keep
    attributes and names of a tree that is not writable, and with ``keep_pages`` it keeps contents from one open to the next.
    ``extra`` are options for libfuse.
    """

    label: str
    timeout: float = 0.0
    keep_pages: bool = False
    allow_other: bool = False
    extra: tuple[str, ...] = ()


class Session:
    """One mount, from :meth:`run` to its return."""

    def __init__(self, tree: FileTree | WritableTree, path: str, options: Options) -> None:
        """``path`` is absolute; ``tree`` is writable if it can ``write``."""
        self._tree = tree
        self._path = path
        self._options = options
        self._device = -1

    def run(self, ready: Callable[[], None]) -> None:
        """Mount and answer until it is unmounted, by whomever. ``ready`` is called once, when the mount answers.

        MountError if the mount does not come about; libfuse has then written its reason to file descriptor 2.
        """
        writable = hasattr(self._tree, "write")
        adapter = (_Writing if writable else _Reading)(self._tree, lambda: self._started(ready))
        operations = _table(adapter)
        arguments = [b"fuse", b"-f", b"-o", _joined(self._arguments(writable)), os.fsencode(self._path)]
        argv = (ctypes.c_char_p * len(arguments))(*arguments)
        where, threads = ctypes.c_void_p(), ctypes.c_int()
        size = ctypes.sizeof(operations)
        handle = _lib.fuse_setup(
            len(arguments), argv, ctypes.byref(operations), size, ctypes.byref(where), ctypes.byref(threads), None
        )
        if not handle:
            raise MountError(f"{self._options.label} could not be mounted on {self._path}")
        try:
            _Loop(handle, _ChangingLinks if writable else None).run()
        finally:
            _lib.fuse_teardown(handle, where)
        if self._device == -1:
            raise MountError(f"{self._options.label} was unmounted from {self._path} before it answered")

    @property
    def device(self) -> int:
        """The minor device number of the mount, which names its connection; -1 before it is ready."""
        return self._device

    def _started(self, ready: Callable[[], None]) -> None:
        """The kernel has asked its first question, to which the answer is about to be given."""
        mount = mountpoint.at(self._path)
        self._device = mount.device if mount is not None else 0
        ready()

    def _arguments(self, writable: bool) -> dict[str, Any]:
        options = self._options
        timeout = options.timeout
        if writable:
            timeout = _CHANGING
        known: dict[str, Any] = {
            "fsname": mountpoint.SOURCE + options.label,
            "subtype": "artifactfs",
            "default_permissions": True,
            "use_ino": True,
            "nosuid": True,
            "nodev": True,
            "max_read": _MAX_READ,
            "attr_timeout": timeout,
            "entry_timeout": timeout,
            "negative_timeout": timeout,
            "kernel_cache": options.keep_pages,
            "allow_other": options.allow_other,
        }
        known.update({"big_writes": True, "atomic_o_trunc": True} if writable else {"ro": True})
        for option in options.extra:
            key, equals, value = option.partition("=")
            known[key] = value if equals else True
        return known


class _Operations(fuse.fuse_operations):  # type: ignore[misc]  # fusepy has no types
    """``struct fuse_operations`` of libfuse 2.9, of which fusepy leaves out the end."""

    _fields_ = (
        ("poll", ctypes.c_void_p),
        ("write_buf", ctypes.c_void_p),
        ("read_buf", ctypes.c_void_p),
        ("flock", ctypes.c_void_p),
        (
            "fallocate",
            ctypes.CFUNCTYPE(
                ctypes.c_int, ctypes.c_char_p, ctypes.c_int, fuse.c_off_t, fuse.c_off_t, ctypes.POINTER(fuse.fuse_file_info)
            ),
        ),
    )


class _Turn:
    """A thread's time of receiving: how many requests it has received, and whether it is answering the last."""

    __slots__ = ("busy", "count")

    def __init__(self) -> None:
        self.count = 0
        self.busy = False


class _Loop:
    """Receives requests and has each answered, in one thread as long as that is quick.

    The *leader* is the thread whose turn it is. When it is about to wait for a remote, it is overtaken: another thread has the
    next turn. It answers its request, and then waits to be called again. So it is if its request takes long for another reason:
    a watch looks at it every :data:`PATIENCE` while there is work, and whether it is still at the request of the last look.
    ``_lock`` guards whose turn it is and who waits.
    """

    def __init__(self, handle: int, links: type[_ChangingLinks] | None = None) -> None:
        self._session = ctypes.c_void_p(_lib.fuse_get_session(handle))
        self._channel = ctypes.c_void_p(_lib.fuse_session_next_chan(self._session, None))
        self._size = _lib.fuse_chan_bufsize(self._channel)
        self._links = links(self._channel) if links else None
        self._lock = threading.Lock()
        self._turn = _Turn()
        self._waiting: list[threading.Event] = []
        self._threads: list[threading.Thread] = []
        self._work_to_watch = threading.Event()
        self._over = False

    def run(self) -> None:
        """Return once the mount has ended and every request is answered."""
        watch = threading.Thread(target=self._watch, name="watch", daemon=True)
        watch.start()
        self._work()
        watch.join()
        for thread in self._threads:  # none is added once it is over
            thread.join()

    def _work(self) -> None:
        """Receive when it is this thread's turn, until it is over."""
        while not self._over:
            self._lead(self._turn)
            called = threading.Event()
            with self._lock:
                if self._over:
                    return
                self._waiting.append(called)
            called.wait()

    def _lead(self, turn: _Turn) -> None:
        """Answer requests until this thread is overtaken or the mount has ended."""
        buffer = ctypes.create_string_buffer(self._size)
        before_waiting(functools.partial(self._overtake, turn))
        session, channel, size, work = self._session, self._channel, self._size, self._work_to_watch
        place = ctypes.byref(channel)
        links = self._links
        answers = channel if links is None else links.channel
        request = _Request.from_buffer(buffer)
        while self._turn is turn:
            length = _receive(place, buffer, size)
            if length == -errno.EINTR:
                continue
            if length <= 0:
                self._end()
                return
            turn.count += 1
            turn.busy = True
            if not work.is_set():
                work.set()
            if links is not None:
                links.request.opcode = request.opcode
                links.request.linked = request.linked
            _process(session, buffer, length, answers)
            turn.busy = False

    def _watch(self) -> None:
        while not self._over:
            self._work_to_watch.wait()
            turn, seen = self._turn, self._turn.count
            time.sleep(PATIENCE)
            if turn.busy and turn.count == seen:
                self._overtake(turn)
            elif turn.count == seen:
                self._work_to_watch.clear()
                if turn.busy or self._over:  # the flag was set again before it was cleared here
                    self._work_to_watch.set()

    def _overtake(self, turn: _Turn) -> None:
        with self._lock:
            if self._over or self._turn is not turn:
                return
            self._turn = _Turn()
            if self._waiting:
                self._waiting.pop().set()
                return
            thread = threading.Thread(target=self._work, name="requests", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _end(self) -> None:
        with self._lock:
            self._over = True
            for called in self._waiting:
                called.set()
        self._work_to_watch.set()


class _Request(ctypes.Structure):
    """How a request begins (``struct fuse_in_header`` and ``fuse_link_in``, linux/fuse.h)."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("opcode", ctypes.c_uint32),
        ("unique", ctypes.c_uint64),
        ("node", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 2),
        ("linked", ctypes.c_uint64),
    )


class _Vector(ctypes.Structure):
    """``struct iovec`` of an answer, which is a header and the rest."""

    _fields_ = (
        ("header", ctypes.c_void_p),
        ("header_size", ctypes.c_size_t),
        ("rest", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
    )


class _Known(ctypes.Structure):
    """The attributes of an answer and how long they are good for (``struct fuse_attr_out``)."""

    _fields_ = (
        ("valid", ctypes.c_uint64),
        ("valid_ns", ctypes.c_uint32),
        ("dummy", ctypes.c_uint32),
        ("ino", ctypes.c_uint64),
        ("sizes_and_times", ctypes.c_byte * 52),
        ("mode", ctypes.c_uint32),
        ("links", ctypes.c_uint32),
    )


class _KnownEntry(ctypes.Structure):
    """The same of an answer with a name (``struct fuse_entry_out``)."""

    _fields_ = (
        ("node", ctypes.c_uint64),
        ("generation", ctypes.c_uint64),
        ("valid_name", ctypes.c_uint64),
        ("valid", ctypes.c_uint64),
        ("valid_name_ns", ctypes.c_uint32),
        ("valid_ns", ctypes.c_uint32),
        ("ino", ctypes.c_uint64),
        ("sizes_and_times", ctypes.c_byte * 52),
        ("mode", ctypes.c_uint32),
        ("links", ctypes.c_uint32),
    )


_LINK = 13
_ANSWERS = {1: _KnownEntry, 3: _Known, 4: _Known, 8: _KnownEntry, _LINK: _KnownEntry, 35: _KnownEntry}
"""By opcode: LOOKUP, GETATTR, SETATTR, MKNOD, LINK, CREATE. Directories and new symlinks have one name."""


class _ChangingLinks:
    """Has the kernel keep no attributes of files with several names, and so lets it keep those of all others.

    libfuse shows it each name of a file as a file of its own, so it would not know that one has changed when another was written,
    nor how many names there are. This sees every answer on its way to the kernel; ``request`` says, in each thread, what is being
    answered.
    """

    def __init__(self, channel: ctypes.c_void_p) -> None:
        self.request = threading.local()
        self._kernel = channel
        self._descriptor = _lib.fuse_chan_fd(channel)
        self._linked: set[int] = set()
        # struct fuse_chan_ops: receive (libfuse's own channel does that), send, destroy
        self._send = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(self._answer)
        self._calls = (ctypes.c_void_p * 3)(None, ctypes.cast(self._send, ctypes.c_void_p), None)
        size = _lib.fuse_chan_bufsize(channel)
        self.channel = ctypes.c_void_p(_lib.fuse_chan_new(self._calls, self._descriptor, size, None))
        """Where answers go through this object."""

    def _answer(self, channel: int, vector: int, count: int) -> int:
        form = _ANSWERS.get(self.request.opcode)
        if form is not None and count == 2:
            parts = _Vector.from_address(vector)
            if parts.size >= ctypes.sizeof(form):
                self._limit(form.from_address(parts.rest))
        if _writev(self._descriptor, vector, count) == -1:
            return -ctypes.get_errno()
        return 0

    def _limit(self, known: Any) -> None:
        if stat.S_ISDIR(known.mode):
            return
        if self.request.opcode == _LINK:
            _invalidate(self._kernel, self.request.linked, -1, 0)
        if known.links > 1:
            self._linked.add(known.ino)
        if known.ino in self._linked:
            known.valid = known.valid_ns = 0


class _Stream:
    """A directory being read: its items with the offset after each, which libfuse hands back to go on from there.

    ``dots`` are the inode numbers of ``.`` and ``..``, not 0: the C library passes over an item whose number is 0.
    A directory that can change needs ``snapshot``: it is read whole when it is asked for from its beginning. What was in it
    before keeps its offset then, because the kernel does not tell rewinddir(3) from seekdir(3) to the first place.
    """

    def __init__(self, items: Callable[[], Iterable[tuple[str, int, int]]], dots: tuple[int, int], snapshot: bool) -> None:
        self._items = items
        self._dots = [(name, stat.S_IFDIR, ino) for name, ino in zip((".", ".."), dots, strict=True)]
        self._snapshot = snapshot
        self._at = 0
        self._taken: list[tuple[str, int, int] | None] = []
        self._rest: Iterator[tuple[int, tuple[str, int, int]]] = iter(())
        self._waiting: tuple[int, tuple[str, int, int]] | None = None

    def after(self, offset: int) -> Iterator[tuple[int, tuple[str, int, int]]]:
        """(offset after it, item) of the items from ``offset`` on. An item at which the caller stops comes again."""
        if offset == 0 or offset != self._at:
            self._restart(offset)
        while True:
            found = self._waiting or next(self._rest, None)
            if found is None:
                return
            self._waiting = found
            yield found
            self._waiting = None
            self._at = found[0]

    def _restart(self, offset: int) -> None:
        items: Iterable[tuple[str, int, int] | None] = self._taken
        if not self._snapshot:
            items = self._items()
        elif offset == 0 or not self._taken:
            items = self._taken = self._retaken()
        numbered = itertools.islice(enumerate(itertools.chain(self._dots, items), 1), offset, None)
        self._rest = ((after, item) for after, item in numbered if item is not None)
        self._at = offset
        self._waiting = None

    def _retaken(self) -> list[tuple[str, int, int] | None]:
        """The items as they are now: those that were there before at their places, None where one is gone, then the new ones."""
        found = {item[0]: item for item in self._items()}
        return [*(item and found.pop(item[0], None) for item in self._taken), *found.values()]


class _Reading:
    """The operations of a read-only mount: each method is one that libfuse is given."""

    _snapshots = False
    _unit = 512
    """Bytes that statfs counts in: few enough for a version of a few small files to show its size."""

    def __init__(self, tree: Any, started: Callable[[], None]) -> None:
        self._tree = tree
        self._started = started
        self._streams: dict[int, _Stream] = {}
        self._numbers = itertools.count(1)

    def init(self, connection: int) -> int:
        self._started()
        return 0

    def getattr(self, path: bytes, buffer: Any) -> None:
        _fill(buffer.contents, self._tree.getattr(_decode(path)))

    def readlink(self, path: bytes, buffer: Any, size: int) -> None:
        target = _encode(self._tree.readlink(_decode(path)))[: size - 1] + b"\0"
        ctypes.memmove(buffer, target, len(target))

    def open(self, path: bytes, info: Any) -> None:
        fields = info.contents
        fields.fh = self._tree.open(_decode(path), fields.flags)

    def read(self, path: None, buffer: Any, size: int, offset: int, info: Any) -> int:
        data = self._tree.read(info.contents.fh, size, offset)
        length = len(data)
        if length > size:
            raise AssertionError(f"{length} bytes for a read of {size}")
        ctypes.memmove(buffer, data, length)
        return length

    def release(self, path: None, info: Any) -> None:
        self._tree.release(info.contents.fh)

    def statfs(self, path: bytes, buffer: Any) -> None:
        space: Space = self._tree.statfs()
        fields = buffer.contents
        fields.f_bsize = fields.f_frsize = self._unit
        fields.f_blocks = -(-space.total // self._unit)
        fields.f_bfree = fields.f_bavail = space.free // self._unit
        fields.f_files = space.files
        fields.f_ffree = fields.f_favail = space.files_free
        fields.f_namemax = 255

    def getxattr(self, path: bytes, name: bytes, buffer: Any, size: int, *_: int) -> int:
        if name.startswith((b"security.", b"system.")):  # asked before every write: answered before anything else happens
            return -errno.ENODATA
        return _give(self._tree.getxattr(_decode(path), _decode(name)), buffer, size)

    def listxattr(self, path: bytes, buffer: Any, size: int) -> int:
        names = self._tree.listxattr(_decode(path))
        return _give(b"".join(_encode(name) + b"\0" for name in names), buffer, size)

    def opendir(self, path: bytes, info: Any) -> None:
        where = _decode(path)
        dots = (self._tree.getattr(where).ino, self._tree.getattr(os.path.dirname(where)).ino)
        number = next(self._numbers)
        self._streams[number] = _Stream(self._items(where), dots, self._snapshots)
        info.contents.fh = number

    def _items(self, path: str) -> Callable[[], Iterable[tuple[str, int, int]]]:
        return lambda: self._tree.readdir(path)

    def readdir(self, path: None, buffer: Any, fill: Any, offset: int, info: Any) -> None:
        entry = fuse.c_stat()
        for after, (name, mode, ino) in self._streams[info.contents.fh].after(offset):
            entry.st_mode = mode
            entry.st_ino = ino
            if fill(buffer, _encode(name), entry, after):
                return

    def releasedir(self, path: None, info: Any) -> None:
        self._streams.pop(info.contents.fh, None)


class _Writing(_Reading):
    """The operations of a staging mount."""

    _snapshots = True
    _unit = 4096

    def fgetattr(self, path: bytes | None, buffer: Any, info: Any) -> None:
        _fill(buffer.contents, self._tree.getattr(_decode(path or b""), info.contents.fh))

    def _items(self, path: str) -> Callable[[], Iterable[tuple[str, int, int]]]:
        """What lists the directory that is at ``path`` now, wherever it goes."""
        items: Callable[[], Iterable[tuple[str, int, int]]] = self._tree.opendir(path)
        return items

    def create(self, path: bytes, mode: int, info: Any) -> None:
        fields = info.contents
        fields.fh = self._tree.create(_decode(path), stat.S_IMODE(mode), fields.flags, _caller())

    def mknod(self, path: bytes, mode: int, device: int) -> None:
        self._tree.mknod(_decode(path), mode, _caller(), device)

    def write(self, path: None, buffer: Any, size: int, offset: int, info: Any) -> int:
        written: int = self._tree.write(info.contents.fh, ctypes.string_at(buffer, size), offset)
        return written

    def truncate(self, path: bytes, length: int) -> None:
        self._tree.truncate(_decode(path), length)

    def ftruncate(self, path: None, length: int, info: Any) -> None:
        self._tree.ftruncate(info.contents.fh, length)

    def fallocate(self, path: None, mode: int, offset: int, length: int, info: Any) -> None:
        self._tree.fallocate(info.contents.fh, mode, offset, length)

    def fsync(self, path: None, datasync: int, info: Any) -> None:
        self._tree.fsync(info.contents.fh, bool(datasync))

    def fsyncdir(self, path: bytes | None, datasync: int, info: Any) -> None:
        self._tree.fsyncdir(_decode(path or b"/"))

    def mkdir(self, path: bytes, mode: int) -> None:
        self._tree.mkdir(_decode(path), stat.S_IMODE(mode), _caller())

    def rmdir(self, path: bytes) -> None:
        self._tree.rmdir(_decode(path))

    def unlink(self, path: bytes) -> None:
        self._tree.unlink(_decode(path))

    def rename(self, old: bytes, new: bytes) -> None:
        self._tree.rename(_decode(old), _decode(new))

    def symlink(self, target: bytes, path: bytes) -> None:
        self._tree.symlink(_decode(target), _decode(path), _caller())

    def link(self, old: bytes, new: bytes) -> None:
        self._tree.link(_decode(old), _decode(new))

    def chmod(self, path: bytes, mode: int) -> None:
        self._tree.chmod(_decode(path), stat.S_IMODE(mode))

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        """An id that is not to change is -1 also where it arrives unsigned."""
        self._tree.chown(_decode(path), *(-1 if id in (-1, 0xFFFFFFFF) else id for id in (uid, gid)))

    def utimens(self, path: bytes, times: Any) -> None:
        fields = times.contents
        self._tree.utimens(_decode(path), _nanoseconds(fields.actime), _nanoseconds(fields.modtime))

    def setxattr(self, path: bytes, name: bytes, value: Any, size: int, flags: int, *_: int) -> None:
        self._tree.setxattr(_decode(path), _decode(name), ctypes.string_at(value, size), flags)

    def removexattr(self, path: bytes, name: bytes) -> None:
        self._tree.removexattr(_decode(path), _decode(name))


_logged: TTLCache[str, bool] = TTLCache(1024, _REPEATS)
_logged_lock = threading.Lock()
_SERIOUS = frozenset((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENOSPC, errno.EACCES))


def _answer(function: Callable[..., int | None], *args: Any) -> int:
    """Every request comes through here: the result of its operation, or minus an errno."""
    try:
        return function(*args) or 0
    except (ArtifactFSError, OSError) as error:
        return -_code(error)
    except BaseException:
        log.exception("a bug in %s; answered with EIO", getattr(function, "__name__", function))
        return -errno.EIO


def _table(adapter: _Reading) -> Any:
    """The operations that ``adapter`` has, as libfuse takes them."""
    table = _Operations()
    # ctypes keeps what a structure points to by the number of its field, which a subclass counts from 0 again: on its own it
    # would let go of `mkdir` for `fallocate`.
    table.callbacks = []
    for name, prototype, *bits in (*fuse.fuse_operations._fields_, *_Operations._fields_):
        method = getattr(adapter, name, None)
        if method is not None and not bits:
            callback = prototype(functools.partial(_answer, method))
            table.callbacks.append(callback)
            setattr(table, name, callback)
    table.flag_nullpath_ok = 1
    table.flag_nopath = 1  # reads, writes and the like are by handle alone: libfuse need not build their paths
    table.flag_utime_omit_ok = 1  # else `touch -m` is dropped without a word
    return table


def _joined(options: dict[str, Any]) -> bytes:
    """The options as one argument; libfuse parts them at commas and takes a backslash as an escape."""
    given = [key if value is True else f"{key}={value}" for key, value in options.items() if value is not False]
    return ",".join(option.replace("\\", "\\\\").replace(",", "\\,") for option in given).encode("utf-8", "surrogateescape")


def _code(error: ArtifactFSError | OSError) -> int:
    """The errno to answer with. What a user will want an explanation of is logged, the same not in every retry."""
    code = error.errno if isinstance(error.errno, int) and error.errno > 0 else errno.EIO
    if isinstance(error, ArtifactFSError) and code in _SERIOUS:
        text = str(error)
        with _logged_lock:
            new = text not in _logged
            _logged[text] = True
        if new:
            log.warning("%s (%s)", text, errno.errorcode.get(code, code))
    return code


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _fill(fields: Any, attributes: Attributes) -> None:
    """Write a ``struct stat``, which libfuse has zeroed."""
    mode, ino, links, uid, gid, size, blocks, atime, mtime, ctime, device = attributes
    fields.st_mode = mode
    fields.st_ino = ino
    fields.st_nlink = links
    fields.st_uid = uid
    fields.st_gid = gid
    fields.st_rdev = device
    fields.st_size = size
    fields.st_blocks = blocks
    for spec, moment in ((fields.st_atimespec, atime), (fields.st_mtimespec, mtime), (fields.st_ctimespec, ctime)):
        spec.tv_sec, spec.tv_nsec = divmod(moment, 10**9)


def _give(value: bytes, buffer: Any, size: int) -> int:
    """Answer as getxattr(2) does: a size of 0 asks for the length, a value that is longer than ``size`` is ERANGE."""
    if size == 0:
        return len(value)
    if len(value) > size:
        return -errno.ERANGE
    ctypes.memmove(buffer, value, len(value))
    return len(value)


def _caller() -> tuple[int, int]:
    """The user and group of the process that asks."""
    context = _lib.fuse_get_context().contents
    return context.uid, context.gid


_UTIME_NOW = (1 << 30) - 1  # linux/stat.h; libfuse passes both on
_UTIME_OMIT = (1 << 30) - 2


def _nanoseconds(spec: Any) -> int | None:
    """A time to set, in ns since the epoch; None if it is to stay."""
    if spec.tv_nsec == _UTIME_OMIT:
        return None
    if spec.tv_nsec == _UTIME_NOW:
        return time.time_ns()
    return int(spec.tv_sec) * 10**9 + int(spec.tv_nsec)
