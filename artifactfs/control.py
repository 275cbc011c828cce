"""How a mount's daemon is spoken to: one question a connection over a Unix socket, JSON lines both ways.

The question is an object with ``op``. The answers are ``{"progress": …}`` any number of times, then ``{"result": …}`` or
``{"error": {"type": …, "message": …}}``, which becomes the same class of ``errors.py`` on the other side. The socket lies in a
directory that only its user may enter, which is all the protection it has and needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from artifactfs import errors
from artifactfs.errors import ArtifactFSError, from_os_error

log = logging.getLogger(__name__)

Answers = Iterator[dict[str, Any]]

_MAX_PATH = 107  # bytes that fit in a sockaddr_un with the final NUL (unix(7))
_MAX_QUESTION = 1 << 16
_SEND_TIMEOUT = 5.0  # seconds that a client may take to read an answer before it is given up


class NoDaemonError(ArtifactFSError):
    """Nobody listens there: the daemon has ended, or is about to."""


class Server:
    """Answers questions, each in a thread of its own, until :meth:`close`."""

    def __init__(self, path: str, answer: Callable[[dict[str, Any]], Answers]) -> None:
        """``answer`` yields what is to be sent for a question; what it raises is sent as the error."""
        self._path = path
        self._answer = answer
        self._threads: set[threading.Thread] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        try:
            with _short(path) as name:
                self._socket.bind(name)
            os.chmod(path, 0o600)
            self._socket.listen(16)
        except OSError as error:
            self._socket.close()
            raise from_os_error(error, f"listening on {path}") from None
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self, patience: float = 0.0) -> None:
        """Take no more questions; wait up to ``patience`` seconds for answers that are under way."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in list(self._threads):
            thread.join(patience)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._converse, args=(connection,), name="control", daemon=True)
            self._threads.add(thread)
            thread.start()

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_SEND_TIMEOUT)
                for answer in self._answers(connection):
                    connection.sendall(_line(answer))
        except (OSError, ValueError) as error:
            log.info("a control connection ended early: %s", error)
        finally:
            self._threads.discard(threading.current_thread())

    def _answers(self, connection: socket.socket) -> Answers:
        with connection.makefile("rb") as file:
            question = json.loads(file.readline(_MAX_QUESTION) or b"{}")
        try:
            yield from self._answer(question)
        except ArtifactFSError as error:
            yield {"error": pack_error(error)}
        except Exception as error:
            log.exception("a bug in answering %s", question)
            yield {"error": pack_error(error)}


def ask(path: str, question: dict[str, Any], report: Callable[[Any], None] | None = None) -> Any:
    """The result of a question; ``report`` is given each progress. The daemon's error is raised here.

    NoDaemonError if nobody listens, or the daemon ended before it gave its answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            with _short(path) as name:
                connection.connect(name)
            connection.sendall(_line(question))
            with connection.makefile("rb") as file:
                for line in file:
                    answer = json.loads(line)
                    if "error" in answer:
                        raise unpack_error(answer["error"])
                    if "result" in answer:
                        return answer["result"]
                    if report is not None:
                        report(answer.get("progress"))
        except ArtifactFSError:  # the daemon's answer; some of them are ValueErrors too
            raise
        except (OSError, ValueError) as error:
            raise NoDaemonError(f"no daemon answers at {path}: {error}") from None
    raise NoDaemonError(f"the daemon at {path} ended without an answer")


def pack_error(error: BaseException) -> dict[str, str]:
    """An error for the way to another process."""
    if not isinstance(error, ArtifactFSError):
        return {"type": "ArtifactFSError", "message": f"internal error: {type(error).__name__}: {error}; its log has more"}
    known = next(kind for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
    return {"type": known.__name__, "message": str(error)}


def unpack_error(packed: dict[str, str]) -> ArtifactFSError:
    """The error that :func:`pack_error` packed."""
    kind = getattr(errors, packed.get("type", ""), ArtifactFSError)
    if not (isinstance(kind, type) and issubclass(kind, ArtifactFSError)):
        kind = ArtifactFSError
    return kind(packed.get("message", "unknown error"))


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode() + b"\n"


@contextlib.contextmanager
def _short(path: str) -> Iterator[str]:
    """``path``, or another name for it that fits into a socket's address."""
    if len(os.fsencode(path)) <= _MAX_PATH:
        yield path
        return
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)
