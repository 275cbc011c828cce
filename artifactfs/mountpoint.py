"""Mountpoints as the kernel sees them: which are ours, whether a directory can become one, and taking one away.

Only Linux's ``/proc/self/mountinfo`` is read; without it (macOS) a mountpoint is known by its device number alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from artifactfs.errors import ConflictError, MountError, NotPermittedError, UsageError, from_os_error

FILE_SYSTEM = "fuse.artifactfs"
SOURCE = "artifactfs#"

_LOCAL_TYPES = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "ramfs", "overlay", "erofs")
)
_NO_FUSE = (
    "load the module with `modprobe fuse`, or start the container with --device /dev/fuse --cap-add SYS_ADMIN "
    "(`artifactfs doctor` checks it); `artifactfs get` works without mounting"
)


class Mounted(NamedTuple):
    """One line of the mount table. ``device`` is its ``st_dev``'s minor number, which names a FUSE connection."""

    path: str
    type: str
    source: str
    device: int


def table() -> list[Mounted]:
    """What is mounted, in the order of mounting; empty where the system does not tell."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except OSError:
        return []
    return [_parse(line) for line in lines if line]


def at(path: str) -> Mounted | None:
    """The uppermost mount at exactly ``path`` (absolute, without symlinks)."""
    return next((mount for mount in reversed(table()) if mount.path == path), None)


def absolute(path: str) -> str:
    """``path`` as the mount table spells it: absolute, symlinks resolved. A dead mount's path is no error."""
    return os.path.realpath(path)


def is_dead(path: str) -> bool:
    """Whether ``path`` is the mountpoint of a FUSE mount whose daemon is gone. Attributes the kernel may still have in mind."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def check(path: str) -> str:
    """The absolute path of a directory that can be mounted on.

    A dead artifactfs mount there is taken away first. UsageError if it is not there or no directory, MountError if it is not
    empty or in use, NotPermittedError if it cannot be read.
    """
    where = absolute(path)
    mount = at(where)
    if mount is not None and mount.type == FILE_SYSTEM and is_dead(where):
        unmount(where, lazy=True)
        mount = at(where)
    if mount is not None and mount.type == FILE_SYSTEM:
        raise MountError(f"{path} is in use: {mount.source} is mounted there; `artifactfs unmount {path}` first, or use another")
    _check_directory(path, where)
    return where


def _check_directory(path: str, where: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(where).st_mode):
            raise UsageError(f"mountpoint {path} is not a directory; name an empty directory")
        with os.scandir(where) as entries:
            if next(entries, None) is not None:
                raise MountError(f"mountpoint {path} is not empty; name an empty directory")
    except FileNotFoundError:
        raise UsageError(f"mountpoint {path} does not exist; make it first: mkdir -p {path}") from None
    except NotADirectoryError:
        raise UsageError(f"mountpoint {path} is not a directory; name an empty directory") from None
    except PermissionError:
        raise NotPermittedError(f"mountpoint {path} cannot be read; check its owner and mode, or use another") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise MountError(f"{path} is a dead mount of another program; `fusermount -u {path}` takes it away") from None
        raise from_os_error(error, f"looking at mountpoint {path}") from None


def is_local(path: str) -> bool:
    """Whether ``path``, there or not, is on a disk of this machine: its reads never wait for a network."""
    real = os.path.realpath(path)
    above = [mount for mount in table() if _within(real, mount.path.rstrip("/"))]
    return bool(above) and max(above, key=lambda mount: len(mount.path)).type in _LOCAL_TYPES


def check_outside(path: str, directories: dict[str, str]) -> None:
    """UsageError if the mountpoint lies in one of ``directories`` (path by what it is), which it would change, or the other way
    round: a daemon that reads its own mount would wait for itself."""
    for what, directory in directories.items():
        real = os.path.realpath(directory)
        if _within(path, real.rstrip("/")):
            raise UsageError(f"mountpoint {path} is inside the {what} {directory}; use a directory outside it")
        if _within(real, path):
            raise UsageError(
                f"the {what} {directory} would be inside the mountpoint {path}; use another directory for one of them"
            )


def check_device() -> None:
    """MountError or NotPermittedError, with what to do, if this process cannot open ``/dev/fuse`` at all."""
    if not os.path.isdir("/proc/self"):
        return  # macOS has no such device
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountError(f"there is no /dev/fuse, so nothing can be mounted: {_NO_FUSE}") from None
    except PermissionError:
        raise NotPermittedError(f"/dev/fuse may not be opened: check its mode; {_NO_FUSE}") from None
    except OSError as error:
        raise MountError(f"/dev/fuse cannot be opened ({os.strerror(error.errno or errno.EIO)}): {_NO_FUSE}") from None
    if os.geteuid() and not _fusermount():
        raise MountError("fusermount is not installed, and only root can mount without it; `apt install fuse3` (or fuse)")


def unmount(path: str, lazy: bool = False) -> None:
    """Take away the uppermost mount at ``path``; ``lazy``: at once, while open files live on until they are closed.

    ConflictError names who uses it; MountError says why the system refuses.
    """
    done = _run(_command(path, lazy))
    if done.returncode == 0:
        return
    reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    if "busy" in reason:
        who = ", ".join(users(path)[:5])
        by = f" (in use by {who})" if who else ""
        raise ConflictError(f"{path} is busy{by}; close its files and leave the directory, or unmount with --lazy")
    if "not mounted" in reason or "not found in" in reason or "no mount point" in reason:
        raise MountError(f"{path} is not mounted")
    raise MountError(f"unmounting {path} failed: {reason}")


def users(path: str) -> list[str]:
    """The processes that have something below ``path`` open, as ``bash (1234)``; only those that we may look at."""
    return [f"{_name(pid)} ({pid})" for pid in _pids() if any(_within(link, path) for link in _links(pid))]


def _parse(line: str) -> Mounted:
    """One line of mountinfo: proc(5)."""
    left, _, right = line.partition(" - ")
    fields, (kind, source, *_) = left.split(" "), right.split(" ")
    return Mounted(_unescape(fields[4]), kind, _unescape(source), int(fields[2].partition(":")[2]))


def _unescape(text: str) -> str:
    """The kernel writes space, tab, newline and backslash as octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _command(path: str, lazy: bool) -> list[str]:
    fusermount = _fusermount()
    if os.geteuid() and fusermount:
        return [fusermount, "-u", *(["-z"] if lazy else []), "--", path]
    return ["umount", *(["-l"] if lazy else []), "--", path]


def _fusermount() -> str | None:
    return shutil.which("fusermount3") or shutil.which("fusermount")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise MountError(f"{command[0]} is not installed; install it (apt install fuse3 mount)") from None


def _pids() -> list[int]:
    with contextlib.suppress(OSError):
        return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    return []


def _links(pid: int) -> Iterator[str]:
    """Where a process stands and what it has open; a process that is gone or not ours has nothing."""
    with contextlib.suppress(OSError):
        yield os.readlink(f"/proc/{pid}/cwd")
        for number in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{number}")


def _within(link: str, path: str) -> bool:
    return link == path or link.startswith(path + "/")


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
