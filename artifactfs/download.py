"""A version as files in a directory: download, make exactly equal, compare.

Nothing outside the root is ever written or read: every directory below it is opened component by component, relative to its
parent and without following links; a symlink of a version is made as a link, and nothing is written through it. The root itself
may be a link, as its name is the caller's.

A file appears under its name when it is whole and checked: it is written beside it as ``.<hash>.afs-part`` and renamed. A
download that was killed is resumed by starting it again: files that are already right, by their content and not by their times,
are kept, and a large one goes on behind its last good block. Nothing is fsync'd: after a power loss, download again or verify.

One :class:`_Job` walks the version in the caller's thread and hands small batches of entries to a few worker threads. Workers
share only its counts and its lists of failures and problems, which ``_lock`` guards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fcntl import LOCK_EX, LOCK_NB, flock
from typing import Literal, TypeAlias

from blake3 import blake3

from artifactfs.content import DIGEST_SIZE, EntryChecksum, Hasher, block_digest
from artifactfs.errors import (
    ArtifactFSError,
    ConflictError,
    IntegrityError,
    NotFoundError,
    SourceChangedError,
    UsageError,
    from_os_error,
)
from artifactfs.model import BLOCK, Dir, Entry, File, Ref, Remote, Symlink, Version, is_executable
from artifactfs.publish import Progress, Report
from artifactfs.reader import Handle, Reader
from artifactfs.reflink import share
from artifactfs.store import Store

WORKERS = 8
"""Threads: a remote store's round trips overlap, a local one's reads and hashes use both cores."""
_BATCH_FILES = 8
_BATCH_BYTES = 1 << 20
"""What a worker takes at once. More files a batch cost fewer futures, but leave workers idle in a small version."""
_PIECE = 4 * BLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PART = ".afs-part"

Stored: TypeAlias = File | Ref
Kind = Literal["missing", "extra", "differs", "mode", "unreadable"]
Existing: TypeAlias = Literal["replace", "keep", "refuse"]
"""What becomes of a file that is there already and has other content."""
Select: TypeAlias = Callable[[str, Entry], bool]
"""Whether a path is wanted; of a directory: whether anything below it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One path where a directory, or a store, is not what a version says. ``message`` is a whole sentence."""

    path: str
    kind: Kind
    message: str


def get(
    store: Store,
    reader: Reader,
    version: Version,
    root: str,
    prefix: str = "",
    report: Report | None = None,
    *,
    allow_missing_references: bool = False,
    existing: Existing = "replace",
    select: Select | None = None,
) -> Progress:
    """Put the entries whose path starts with the string ``prefix`` into the directory ``root``, which is made if it is missing.

    Other files there are left alone; files that differ are replaced, links in their way too, unless ``existing`` is ``keep``
    (then none is even compared) or ``refuse`` (a ConflictError). ``select`` picks among the entries. A directory where a file
    belongs, or the other way round, is a ConflictError. An entry that cannot be had (damaged, its source changed or gone) does
    not stop the others: its error is raised at the end. ``allow_missing_references`` passes over references whose target is
    gone or changed. ``report`` is called from one thread at a time: ``stored`` counts the bytes written, ``bytes`` those that
    were right before as well.
    """
    job = _Job(store, reader, version, report)
    job.allow_missing_references = allow_missing_references
    job.existing, job.select = existing, select
    return job.download(root, prefix)


def checkout(
    store: Store,
    reader: Reader,
    version: Version,
    root: str,
    report: Report | None = None,
    *,
    allow_missing_references: bool = False,
) -> Progress:
    """Make ``root`` exactly the version: as :func:`get`, and whatever else is in the directory is removed.

    The root directory, the home directory and those above it, and a directory with the store in it are refused.
    """
    _refuse_wholesale(store, root)
    job = _Job(store, reader, version, report)
    job.exact = True
    job.allow_missing_references = allow_missing_references
    return job.download(root, "")


def get_file(store: Store, reader: Reader, version: Version, path: str, root: str) -> str:
    """Put the one entry at ``path`` below the directory ``root``; returns where it is. NotFoundError if there is none."""
    entry = store.tree.resolve(version.root, path)
    if entry is None or isinstance(entry, Dir):
        raise NotFoundError(f"{version.qualified_name} has no file {path!r}")
    job = _Job(store, reader, version, None)
    with job.rooted(root, make=True):
        folder = path.rpartition("/")[0]
        job.place(folder, [entry])
    job.finish()
    return os.path.join(root, path)


def verify(store: Store, reader: Reader, version: Version, root: str, report: Report | None = None) -> list[Problem]:
    """Where the directory ``root`` is not exactly the version, sorted by path; nothing is written. NotFoundError for no root.

    Every byte is read and compared. Of a reference whose content was never read only the size can be compared; one that is
    not there is no problem, as a download may have passed over it.
    """
    job = _Job(store, reader, version, report)
    with job.rooted(root, make=False):
        job.run(job.compare_folder, job.compare, "")
    return job.findings()


def verify_stored(store: Store, reader: Reader, version: Version, report: Report | None = None) -> list[Problem]:
    """The entries of ``version`` whose bytes cannot be read as they were stored, sorted by path. Everything is read once."""
    job = _Job(store, reader, version, report)
    job.run(lambda path, folder: None, job.read, "")
    return job.findings()


class _Job:
    """One walk over a version with workers. The root is a descriptor: what happens to its name meanwhile does not matter."""

    def __init__(self, store: Store, reader: Reader, version: Version, report: Report | None) -> None:
        self.exact = False
        self.allow_missing_references = False
        self.existing: Existing = "replace"
        self.select: Select | None = None
        self._problems: list[Problem] = []
        self._store = store
        self._reader = reader
        self._version = version
        self._report = report
        self._progress = Progress()
        self._lock = threading.Lock()
        self._failures: list[tuple[str, ArtifactFSError]] = []
        self._stop: BaseException | None = None
        self._root = -1
        self._shares = True

    # Running

    def download(self, root: str, prefix: str) -> Progress:
        with self.rooted(root, make=True):
            self.run(self.make_folder, self.place, prefix)
        self.finish()
        return self._progress

    @contextlib.contextmanager
    def rooted(self, root: str, make: bool) -> Iterator[None]:
        """Hold the root directory open."""
        try:
            if make:
                os.makedirs(root, exist_ok=True)
            self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileExistsError, NotADirectoryError):
            raise UsageError(f"{root!r} is not a directory; name another one") from None
        except OSError as error:
            raise from_os_error(error, f"opening the directory {root!r}") from None
        try:
            yield
        finally:
            os.close(self._root)

    def run(self, enter: Callable[[str, Dir], object], work: Callable[[str, list[Entry]], None], prefix: str) -> None:
        """Call ``enter(path, directory)`` here and then ``work(path, entries)`` in a worker, for every directory."""
        slots = threading.Semaphore(4 * WORKERS)

        def task(path: str, batch: list[Entry]) -> None:
            try:
                if self._stop is None:
                    work(path, batch)
            except BaseException as error:
                self._stop = self._stop or error
            finally:
                slots.release()

        with ThreadPoolExecutor(WORKERS, thread_name_prefix="afs-download") as pool:
            try:
                for path, batch in self._batches(enter, prefix):
                    slots.acquire()
                    if self._stop is not None:
                        break
                    pool.submit(task, path, batch)
            except BaseException as error:
                self._stop = error
                raise
        if self._stop is not None:
            raise self._stop

    def finish(self) -> None:
        """Raise the first failure, by path, that did not stop the others."""
        if not self._failures:
            return
        self._failures.sort(key=lambda failure: failure[0])
        first = self._failures[0][1]
        if len(self._failures) == 1:
            raise first
        raise type(first)(f"{first} (and {len(self._failures) - 1} more of {self._version.qualified_name} failed)")

    def findings(self) -> list[Problem]:
        """The problems, sorted by path; a part of the tree that could not be read is one."""
        unreadable = [Problem(path, "unreadable", str(error)) for path, error in self._failures]
        return sorted(self._problems + unreadable, key=lambda problem: problem.path)

    def _open(self, path: str, entry: Stored) -> Handle:
        """The bytes of an entry, which may be fetched together with those beside it."""
        return self._reader.open(entry, self._where(path), lambda: self._store.tree.page_of(self._version.root, path))

    def _batches(self, enter: Callable[[str, Dir], object], prefix: str) -> Iterator[tuple[str, list[Entry]]]:
        pending: list[tuple[str, Dir]] = [("", self._version.root)]
        while pending:
            path, folder = pending.pop()
            if not self._guard(path, lambda path=path, folder=folder: enter(path, folder)):  # type: ignore[misc]
                continue
            batch: list[Entry] = []
            below: list[tuple[str, Dir]] = []
            size = 0
            for entry in self._entries(path, folder, prefix):
                if isinstance(entry, Dir):
                    below.append((_join(path, entry.name), entry))
                    continue
                batch.append(entry)
                size += 0 if isinstance(entry, Symlink) else max(entry.size, 0)
                if len(batch) >= _BATCH_FILES or size >= _BATCH_BYTES:
                    yield path, batch
                    batch, size = [], 0
            if batch:
                yield path, batch
            pending.extend(reversed(below))

    def _entries(self, path: str, folder: Dir, prefix: str) -> Iterator[Entry]:
        """The entries of a directory that ``prefix`` selects; one whose name would lead elsewhere is a failure."""
        try:
            for entry in self._store.tree.entries(folder):
                inside = _join(path, entry.name)
                below = isinstance(entry, Dir) and prefix.startswith(inside + "/")
                if not (below or inside.startswith(prefix)) or (self.select is not None and not self.select(inside, entry)):
                    continue
                if entry.name in ("", ".", "..") or "/" in entry.name or "\0" in entry.name:
                    self._fail(inside, IntegrityError(f"{self._where(inside)} is a hostile name; it is not written"))
                    continue
                yield entry
        except IntegrityError as error:
            self._fail(path, error)

    def _guard(self, path: str, action: Callable[[], object]) -> bool:
        """Run ``action``; False if it failed in a way that concerns ``path`` alone, which is noted. Other errors are raised."""
        try:
            action()
        except (IntegrityError, NotFoundError, ConflictError, UsageError) as error:
            self._fail(path, error)
            return False
        except OSError as error:
            raise from_os_error(error, f"writing {path!r} of {self._version.qualified_name}") from None
        return True

    def _fail(self, path: str, error: ArtifactFSError) -> None:
        with self._lock:
            self._failures.append((path, error))

    def _where(self, path: str) -> str:
        return f"{self._version.qualified_name}/{path}"

    def _count(self, files: int, size: int, stored: int) -> None:
        with self._lock:
            self._progress.files += files
            self._progress.bytes += size
            self._progress.stored += stored
            if self._report is not None:
                self._report(self._progress)

    def _open_folder(self, path: str, make: bool = False) -> int:
        """A descriptor of the directory at ``path`` below the root. ConflictError if something else stands there."""
        fd = os.dup(self._root)
        for part in path.split("/") if path else ():
            try:
                below = self._open_part(fd, part, path, make)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _open_part(self, fd: int, part: str, path: str, make: bool) -> int:
        try:
            return os.open(part, _FOLDER, dir_fd=fd)
        except FileNotFoundError:
            if not make:
                raise
        except NotADirectoryError:  # Linux says so of a link too
            if not (make and self.exact):
                message = f"{path!r} is a directory in {self._version.qualified_name}, but a file or link is in its place"
                raise ConflictError(message) from None
            os.unlink(part, dir_fd=fd)
        with contextlib.suppress(FileExistsError):
            os.mkdir(part, dir_fd=fd)
        return os.open(part, _FOLDER, dir_fd=fd)

    # Downloading

    def make_folder(self, path: str, folder: Dir) -> None:
        """Make the directory; with ``exact``, remove what does not belong into it."""
        fd = self._open_folder(path, make=True)
        try:
            if self.exact:
                resumable = self._part_names(path, folder)
                for name in self._extra(fd, folder):
                    if name not in resumable:
                        _remove(fd, name)
        finally:
            os.close(fd)

    def place(self, path: str, entries: list[Entry]) -> None:
        """Put the entries into the directory at ``path``."""
        folder: list[int] = []
        if not self._guard(path, lambda: folder.append(self._open_folder(path, make=True))):
            return
        try:
            for entry in entries:
                if self._stop is not None:
                    return
                where = _join(path, entry.name)
                self._guard(where, lambda entry=entry, where=where: self._place(folder[0], where, entry))  # type: ignore[misc]
        finally:
            os.close(folder[0])

    def _place(self, fd: int, path: str, entry: Entry) -> None:
        if isinstance(entry, Symlink):
            self._place_link(fd, path, entry)
        elif isinstance(entry, Ref) and self.allow_missing_references:
            with contextlib.suppress(NotFoundError, SourceChangedError):
                self._place_file(fd, path, entry)
        elif isinstance(entry, (File, Ref)):
            self._place_file(fd, path, entry)

    def _place_link(self, fd: int, path: str, entry: Symlink) -> None:
        with contextlib.suppress(OSError):
            if os.readlink(entry.name, dir_fd=fd) == entry.target:
                return
        if self.existing != "replace" and _is_there(fd, entry.name):
            if self.existing == "keep":
                return
            raise self._taken(path)
        temporary = self._part_name(path, entry)
        try:
            try:
                os.symlink(entry.target, temporary, dir_fd=fd)
            except FileExistsError:  # a killed download has left it
                os.unlink(temporary, dir_fd=fd)
                os.symlink(entry.target, temporary, dir_fd=fd)
        except ValueError:
            raise IntegrityError(f"{self._where(path)} is a symlink whose target cannot exist; it is not written") from None
        try:
            self._rename(fd, temporary, path, entry.name)
        except FileNotFoundError:  # another download into the same directory has taken it
            if os.readlink(entry.name, dir_fd=fd) != entry.target:
                raise

    def _place_file(self, fd: int, path: str, entry: Stored) -> None:
        taken = self.existing != "replace" and _is_there(fd, entry.name)
        if (taken and self.existing == "keep") or self._is_right(fd, entry):
            self._count(1, max(entry.size, 0), 0)
            return
        if taken and entry.id:  # it was compared by that
            raise self._taken(path)
        part = _Part(fd, self._part_name(path, entry), entry)
        try:
            self._fill(part, path, entry)
            if taken and not _same_bytes(fd, entry.name, part.fd):
                raise self._taken(path)
            self._rename(fd, part.name, path, entry.name)
        except BaseException:
            part.discard()
            raise
        finally:
            part.close()
        self._count(1, 0, 0)

    def _taken(self, path: str) -> ConflictError:
        return ConflictError(f"{path!r} is there already, and not as {self._version.qualified_name} has it; move it away")

    def _is_right(self, fd: int, entry: Stored) -> bool:
        """Whether the file is there and has the very content; its executable bit is then set as the entry says."""
        found = _open_regular(fd, entry.name)
        if found < 0:
            return False
        try:
            status = os.fstat(found)
            if not entry.id or status.st_size != entry.size or not _has_content(found, entry):
                return False
            if is_executable(status.st_mode) != entry.executable:
                os.fchmod(found, _with_executable(stat.S_IMODE(status.st_mode), entry.executable))
            return True
        finally:
            os.close(found)

    def _part_name(self, path: str, entry: Stored | Symlink) -> str:
        """The same for the same entry of the same version, so that a killed download finds it again.

        No version can have an entry of its own part's name: the name depends on the digest of the whole version.
        """
        what = (b"l", entry.target.encode()) if isinstance(entry, Symlink) else (b"x" if entry.executable else b"-", entry.id)
        identity = b"\0".join((self._version.root.digest, path.encode(), *what))
        return f".{blake3(identity).hexdigest()[:24]}{_PART}"

    def _fill(self, part: _Part, path: str, entry: Stored) -> None:
        """Write the content, behind the blocks that are there already."""
        offset = part.good_bytes(self._block_digests(entry)) if part.resumable else 0
        self._count(0, offset, 0)
        os.ftruncate(part.fd, offset)
        with contextlib.closing(self._open(path, entry)) as handle:
            while (entry.size < 0 or offset < entry.size) and (data := handle.read(offset, _PIECE)):
                shared = self._share(handle, part.fd, offset, data) if part.resumable and self._shares else 0
                _write_at(part.fd, offset + shared, data[shared:])
                offset += len(data)
                self._count(0, len(data), len(data))
                if self._stop is not None:
                    raise _Stopped
        if entry.size >= 0 and offset != entry.size:
            raise IntegrityError(f"{self._where(path)} has {entry.size} bytes, but only {offset} could be read")
        # Read in sequence it was compared on the way; unless there was nowhere to keep what came out of order.
        unknown = isinstance(entry, Remote) and entry.checksum and not self._reader.is_verified(entry)
        if unknown and not _has_content(part.fd, entry):
            raise IntegrityError(f"{self._where(path)} is not what was recorded: its {entry.algorithm} is another")

    def _share(self, handle: Handle, fd: int, offset: int, data: bytes) -> int:
        """Have the beginning of ``data``, which belongs at ``offset``, on disk only once, where the store or the cache has it.

        How many bytes of it are. What was shared is read back: it was not that file which was checked."""
        shared = 0
        try:
            while shared < len(data) and (found := handle.lying(offset + shared)) is not None:
                more = share(found, fd, offset + shared, len(data) - shared)
                if not more or os.pread(fd, more, offset + shared) != data[shared : shared + more]:
                    break
                shared += more
        except OSError:  # another file system, or one that cannot
            self._shares = False
        return shared

    def _block_digests(self, entry: Stored) -> bytes:
        return self._store.block_list(entry) if isinstance(entry, File) and not isinstance(entry, Remote) else b""

    def _rename(self, fd: int, temporary: str, path: str, name: str) -> None:
        try:
            os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            return
        except IsADirectoryError:
            if not self.exact:
                os.unlink(temporary, dir_fd=fd)
                message = f"{path!r} is a file in {self._version.qualified_name}, but a directory is in its place; move it away"
                raise ConflictError(message) from None
        shutil.rmtree(name, dir_fd=fd)
        os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)

    def _extra(self, fd: int, folder: Dir) -> Iterator[str]:
        """The names in a local directory that the version's has not."""
        local = sorted(os.listdir(fd), key=os.fsencode)
        entries = self._store.tree.entries(folder) if local else iter(())
        entry = next(entries, None)
        for name in local:
            key = os.fsencode(name)
            while entry is not None and entry.name.encode() < key:
                entry = next(entries, None)
            if entry is None or entry.name.encode() != key:
                yield name

    def _part_names(self, path: str, folder: Dir) -> set[str]:
        """The parts that a killed download of the directory may have left and this one can go on with."""
        large = (entry for entry in self._store.tree.entries(folder) if isinstance(entry, File) and entry.size > BLOCK)
        return {self._part_name(_join(path, entry.name), entry) for entry in large}

    # Verifying

    def compare_folder(self, path: str, folder: Dir) -> None:
        """Note whether the directory is missing, and what does not belong into it."""
        try:
            fd = self._open_folder(path)
        except FileNotFoundError:
            self._note(path, "missing", f"Directory {path!r} of {self._version.qualified_name} is missing")
            return
        except ConflictError as error:
            self._note(path, "differs", str(error))
            return
        try:
            for name in self._extra(fd, folder):
                inside = _join(path, name)
                self._note(inside, "extra", f"Found file {inside!r} which is not a member of {self._version.qualified_name}")
        finally:
            os.close(fd)

    def compare(self, path: str, entries: list[Entry]) -> None:
        """Compare the entries of the directory at ``path``."""
        try:
            fd = self._open_folder(path)
        except (FileNotFoundError, ConflictError):
            for entry in entries:
                self._note_missing(_join(path, entry.name), entry)
            return
        try:
            for entry in entries:
                where = _join(path, entry.name)
                try:
                    self._compare(fd, where, entry)
                except OSError as error:
                    self._note(where, "unreadable", str(from_os_error(error, f"reading {where!r}")))
        finally:
            os.close(fd)

    def _compare(self, fd: int, path: str, entry: Entry) -> None:
        try:
            status = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            self._note_missing(path, entry)
            return
        if isinstance(entry, Symlink):
            if not stat.S_ISLNK(status.st_mode) or os.readlink(entry.name, dir_fd=fd) != entry.target:
                self._note(path, "differs", f"Symlink {path!r} differs: it should be a link to {entry.target!r}")
        elif isinstance(entry, (File, Ref)):
            self._compare_file(fd, path, entry)
            self._count(1, max(entry.size, 0), 0)

    def _compare_file(self, fd: int, path: str, entry: Stored) -> None:
        found = _open_regular(fd, entry.name)
        if found < 0:
            self._note(path, "differs", f"Digest mismatch for file: {path!r} is not a regular file")
            return
        try:
            status = os.fstat(found)
            same = entry.size in (-1, status.st_size) and (not entry.id or _has_content(found, entry))
        finally:
            os.close(found)
        if not same:
            self._note(path, "differs", f"Digest mismatch for file: {path!r} is not what {self._version.qualified_name} has")
        elif is_executable(status.st_mode) != entry.executable:
            what = "should be executable" if entry.executable else "should not be executable"
            self._note(path, "mode", f"Mode of {path!r} differs: it {what}")

    def read(self, path: str, entries: list[Entry]) -> None:
        """Read the entries of a directory from where they are stored."""
        for entry in entries:
            if isinstance(entry, (File, Ref)) and self._stop is None:
                where = _join(path, entry.name)
                try:
                    self._read(where, entry)
                except (IntegrityError, NotFoundError) as error:
                    self._note(where, "unreadable", str(error))

    def _read(self, path: str, entry: Stored) -> None:
        offset = 0
        with contextlib.closing(self._open(path, entry)) as handle:
            while data := handle.read(offset, _PIECE):
                offset += len(data)
                self._count(0, len(data), 0)
        self._count(1, 0, 0)
        if entry.size >= 0 and offset != entry.size:
            raise IntegrityError(f"{self._where(path)} has {entry.size} bytes, but only {offset} could be read")

    def _note_missing(self, path: str, entry: Entry) -> None:
        if not isinstance(entry, Ref):
            self._note(path, "missing", f"File {path!r} of {self._version.qualified_name} is missing")

    def _note(self, path: str, kind: Kind, message: str) -> None:
        with self._lock:
            self._problems.append(Problem(path, kind, message))


class _Stopped(Exception):
    """Another worker failed. Never seen outside: that worker's error is."""


class _Part:
    """A file being written beside its final name. Locked: a second download into the same directory takes another name."""

    def __init__(self, folder: int, name: str, entry: Stored) -> None:
        self._folder = folder
        self._mode = 0o777 if entry.executable else 0o666
        self.resumable = isinstance(entry, File) and entry.size > BLOCK
        self.name = name
        self.fd = self._open(0)
        if not self._is_ours():
            os.close(self.fd)
            self.resumable = False
            self.name = f".{secrets.token_hex(12)}{_PART}"
            self.fd = self._open(os.O_EXCL)

    def good_bytes(self, blocks: bytes) -> int:
        """The length of the whole good blocks at its beginning."""
        good = 0
        while good < len(blocks) // DIGEST_SIZE:
            data = os.pread(self.fd, BLOCK, good * BLOCK)
            if len(data) < BLOCK or block_digest(data) != blocks[good * DIGEST_SIZE : (good + 1) * DIGEST_SIZE]:
                break
            good += 1
        return good * BLOCK

    def discard(self) -> None:
        """Remove it, unless a later attempt can go on with it."""
        if not self.resumable:
            with contextlib.suppress(OSError):
                os.unlink(self.name, dir_fd=self._folder)

    def close(self) -> None:
        os.close(self.fd)

    def _open(self, flags: int) -> int:
        flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self.name, flags, self._mode, dir_fd=self._folder)

    def _is_ours(self) -> bool:
        """Whether nobody else writes it, and it is still under its name: a lock can be had on a file just renamed away."""
        try:
            flock(self.fd, LOCK_EX | LOCK_NB)
            ours, there = os.fstat(self.fd), os.stat(self.name, dir_fd=self._folder, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(ours.st_mode) and ours.st_nlink == 1 and os.path.samestat(ours, there)


def _refuse_wholesale(store: Store, root: str) -> None:
    """UsageError where removing what does not belong there could only be a mistake."""
    real = os.path.realpath(root)
    local_store = store.url.removeprefix("file://")
    for precious, what in (
        ("/", "the root directory"),
        (os.path.expanduser("~"), "your home directory"),
        (local_store, "the store"),
    ):
        if precious.startswith("/") and _is_below(os.path.realpath(precious), real):
            raise UsageError(f"{root!r} holds {what}; a checkout would remove all else that is in it: name another directory")


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _remove(fd: int, name: str) -> None:
    """Remove whatever has this name; links are not followed."""
    if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=fd)
    else:
        os.unlink(name, dir_fd=fd)


def _open_regular(fd: int, name: str) -> int:
    """A descriptor of the regular file, or -1 if there is none; links are not followed and nothing blocks."""
    try:
        found = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return -1
    if stat.S_ISREG(os.fstat(found).st_mode):
        return found
    os.close(found)
    return -1


def _has_content(fd: int, entry: Stored) -> bool:
    """Whether a file has the bytes of an entry whose content was recorded."""
    if not isinstance(entry, Remote):
        return _content_id(fd) == entry.id
    if not entry.checksum:  # nobody knows
        return False
    checksum = EntryChecksum(entry.algorithm)
    offset = 0
    while data := os.pread(fd, BLOCK, offset):
        checksum.update(data)
        offset += len(data)
    return offset == entry.size and checksum.finish() == entry.checksum


def _content_id(fd: int) -> bytes:
    hasher = Hasher()
    offset = 0
    while data := os.pread(fd, BLOCK, offset):
        hasher.block(data)
        offset += len(data)
    return hasher.finish().id


def _is_there(folder: int, name: str) -> bool:
    """Whether anything has this name, be it a broken link."""
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _same_bytes(folder: int, name: str, fd: int) -> bool:
    """Whether the regular file ``name`` has the bytes of ``fd``."""
    found = _open_regular(folder, name)
    if found < 0:
        return False
    try:
        return _content_id(found) == _content_id(fd)
    finally:
        os.close(found)


def _with_executable(mode: int, executable: bool) -> int:
    """``mode`` with execute permission for those who may read, or for nobody."""
    return mode | (mode & 0o444) >> 2 if executable else mode & ~0o111


def _write_at(fd: int, offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
