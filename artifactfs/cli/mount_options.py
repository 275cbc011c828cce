"""The text of ``-o``: what mount(8) and fstab write, as the fields of a mount request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from artifactfs.errors import UsageError

_IGNORED = frozenset(
    (
        *("defaults", "ro", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group", "_netdev", "nofail"),
        *("atime", "noatime", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime"),
        *("lazytime", "nolazytime", "sync", "async", "dirsync", "mand", "nomand", "iversion", "noiversion", "silent", "loud"),
        *("remount", "default_permissions", "exec", "suid", "dev", "nodev", "nosuid", "symfollow"),
    )
)
"""Words of mount(8) that make no difference to a version, which is always read-only and has neither devices nor set-id files."""
_PASSED = frozenset(("noexec", "allow_root"))
_NOT_STAGED = frozenset(("ro", "path_prefix"))
_PREFETCH = ("none", "auto", "all")


def parse(text: str, sloppy: bool = False) -> dict[str, Any]:
    """The fields of a mount request, ``store`` among them, for ``ro,allow_other,store=/srv/store``.

    UsageError for an option that is not known; ``sloppy`` passes over it, as ``mount -s`` asks.
    """
    fields: dict[str, Any] = {}
    passed: list[str] = []
    for option in filter(None, _split(text)):
        key, equals, value = option.partition("=")
        if option in ("allow_other", "offline"):
            fields[option] = True
        elif option in _PASSED:
            passed.append(option)
        elif equals and key in ("store", "path_prefix", "prefetch"):
            fields[key] = check_prefetch(value) if key == "prefetch" else value
        elif not sloppy and not _is_ignored(option, key):
            raise UsageError(f"mount option {option!r} is not known; see artifactfs mount --help")
    return {**fields, "options": tuple(passed)}


def parse_stage(text: str) -> dict[str, Any]:
    """As :func:`parse`, for a stage; UsageError also for what only a read-only mount can be."""
    for option in _split(text):
        if option.partition("=")[0] in _NOT_STAGED:
            raise UsageError(f"a stage cannot be mounted with {option!r}: it is writable, and shows its version whole")
    return parse(text)


def _is_ignored(option: str, key: str) -> bool:
    return option in _IGNORED or key in ("comment", "user") or option.startswith(("x-", "X-"))


def check_prefetch(value: str) -> str:
    """``value``, if it says what to prefetch. UsageError."""
    if value not in _PREFETCH:
        raise UsageError(f"prefetch {value!r} is not known; use none, auto or all")
    return value


def _split(text: str) -> Iterable[str]:
    r"""The options, parted by commas; ``\,`` is a comma that belongs to a value."""
    return (part.replace("\0", ",") for part in text.replace("\\,", "\0").split(","))
