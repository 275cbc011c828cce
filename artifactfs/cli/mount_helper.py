"""``mount.artifactfs``: what mount(8) runs for ``mount -t artifactfs NAME DIR -o …`` and for lines of fstab.

Called as ``mount.artifactfs NAME DIR [-sfnvh] [-N NAMESPACE] [-t TYPE] [-o OPTIONS]``. Exit codes are mount(8)'s: 0 mounted,
1 usage, 2 system, 32 failed to mount.
"""

from __future__ import annotations

import getopt
import sys

from artifactfs import daemon
from artifactfs.cli import mount_options
from artifactfs.errors import ArtifactFSError, NotPermittedError, StorageFullError, UsageError
from artifactfs.settings import load

USAGE = 1
SYSTEM = 2
FAILED = 32

_HELP = """usage: mount.artifactfs NAME DIR [-fnsvh] [-o OPTIONS]

Mounts the artifact version NAME (entity/project/name:alias) read-only on DIR. OPTIONS, parted by commas:
allow_other  offline  store=URL  path_prefix=P  prefetch=none|auto|all  and the usual ones of mount(8).
In fstab: acme/vision/bikes:latest  /mnt/bikes  artifactfs  ro,nofail,_netdev,store=/srv/store  0  0"""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Mount; mount(8)'s exit code."""
    try:
        _mount(arguments)
    except UsageError as error:
        return _failed(error, USAGE)
    except (NotPermittedError, StorageFullError, OSError, MemoryError) as error:
        return _failed(error, SYSTEM)
    except ArtifactFSError as error:
        return _failed(error, FAILED)
    except KeyboardInterrupt:
        return SYSTEM
    except Exception as error:
        return _failed(f"unexpected {type(error).__name__}: {error}", FAILED)
    return 0


def _mount(arguments: list[str]) -> None:
    try:
        flags, words = getopt.gnu_getopt(arguments, "fnsvhN:t:o:", ["help"])
    except getopt.GetoptError as error:
        raise UsageError(f"{error}; see mount.artifactfs -h") from None
    given = {flag for flag, _ in flags}
    if given & {"-h", "--help"}:
        print(_HELP)
        return
    if len(words) != 2:
        raise UsageError("a NAME and a DIR are needed; see mount.artifactfs -h")
    options = ",".join(value for flag, value in flags if flag == "-o")
    fields = mount_options.parse(options, sloppy="-s" in given)
    request = daemon.request(load(), "mount", *words, **fields)
    if "-f" in given:
        return
    record = daemon.start(request)
    if "-v" in given:
        print(f"{record.name} mounted on {record.mountpoint}")


def _failed(reason: object, code: int) -> int:
    print(f"mount.artifactfs: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
