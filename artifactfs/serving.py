"""What the process of a mount does: open what is to be shown, mount it, answer questions, and commit a stage when it is over.

The end of a mount is one path whoever begins it: our ``unmount``, ``umount``, ``fusermount -u``, a signal. The kernel takes the
mount away, libfuse's loop returns, and only then is a stage committed, its outcome written into its record, and told to whoever
waits. A signal unmounts as ``unmount`` does; while files are still open it detaches the mount and waits for their last close,
``MountRequest.drain`` seconds. What is still being written then is not committed: the stage is left to be resumed. A second
signal stops at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import os
import signal
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from artifactfs import control, mountpoint, names, registry
from artifactfs.cache import BlockCache
from artifactfs.errors import ArtifactFSError, ConflictError, MountError, NotFoundError, UsageError
from artifactfs.model import BLAKE3, Version
from artifactfs.mount import FOREVER, Options, Session
from artifactfs.names import ArtifactName
from artifactfs.publish import Progress, Published, check_sequence
from artifactfs.reader import BUDGET, Reader
from artifactfs.registry import MountRecord, MountRequest, Registry
from artifactfs.staging import Stage, StageSpec, left_out_warning, read_spec
from artifactfs.store import Store
from artifactfs.store.server import ArtifactServer
from artifactfs.store.urls import open_store
from artifactfs.view import FRESH, BrowseView, DiffView, FileTree, VersionView
from artifactfs.warm import warm

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_AT_ONCE = 2.0  # seconds within which the loop ends if nothing is open any more (measured: 10 ms on a quiet machine)
_NEWS = 0.2  # seconds between two reports of progress to one listener


def run(request: MountRequest, ready: Callable[[MountRecord], None], id: str = "", log_path: str = "") -> int:
    """Mount, answer and, for a stage, commit, all in this process: exit code 0 once that is done. Call it in the main thread.

    ``ready`` is called once the mount answers. Raises why it cannot be mounted, or why the commit failed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # before any thread is made: all inherit it
    try:
        mounts = Registry(request.state_dir)
        mounts.prepare()
        return _Serving(request, mounts, id or mounts.new_id(), log_path).run(ready)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Serving:
    """One mount from before it is mounted until its outcome is told.

    The main thread mounts, answers and commits; a thread waits for signals, another takes questions.
    """

    def __init__(self, request: MountRequest, registry_: Registry, id: str, log_path: str) -> None:
        self._request = request
        self._registry = registry_
        self._id = id
        self._log_path = log_path
        self._where = mountpoint.check(request.mountpoint)
        self._record: MountRecord | None = None
        self._stage: Stage | None = None
        self._url = request.store
        self._session: Session | None = None
        self._unmounting = threading.Lock()
        self._discard = False
        self._keep = False
        self._mounted = threading.Event()
        self._ended = threading.Event()  # libfuse's loop has returned
        self._over = threading.Event()
        self._server_close: Callable[[], None] = lambda: None
        self._outcome: dict[str, Any] = {}
        self._progress = Progress()

    def run(self, ready: Callable[[MountRecord], None]) -> int:
        threading.Thread(target=self._obey_signals, name="signals", daemon=True).start()
        try:
            with contextlib.ExitStack() as stack:
                return self._run(stack, ready)
        finally:
            self._over.set()

    def _run(self, stack: contextlib.ExitStack, ready: Callable[[MountRecord], None]) -> int:
        mountpoint.check_device()
        self._check_place()
        tree, options = self._open(stack)
        self._session = Session(tree, self._where, options)
        server = control.Server(self._registry.socket(self._id), self._answer)
        self._server_close = functools.partial(server.close, 5 * _NEWS)
        stack.callback(self._server_close)
        log_end = registry.log_size(self._log_path)
        try:
            self._session.run(lambda: self._announce(options.label, ready))
        except MountError as error:
            self._abandon()
            raise MountError(f"{error}: {registry.last_line(self._log_path, log_end)}") from None
        self._ended.set()
        return self._finish()

    def _check_place(self) -> None:
        """The mount may not cover or lie in what it is made from."""
        asked = self._request
        ours = {
            "cache": asked.cache_dir,
            "staging directory": asked.resume or asked.staging_dir,
            "state directory": asked.state_dir,
        }
        local = _local_path(asked.store)
        mountpoint.check_outside(self._where, {**ours, "store": local} if local else ours)

    def _open(self, stack: contextlib.ExitStack) -> tuple[FileTree | Stage, Options]:
        """The tree to mount and how."""
        asked = self._request
        cache = BlockCache(Path(asked.cache_dir), asked.cache_size)
        stack.callback(cache.close)
        url = read_spec(Path(asked.resume)).store if asked.resume else asked.store
        store = open_store(url, cache, asked.offline)
        self._url = _recorded(url, store)
        budget = 0 if asked.prefetch == "none" else BUDGET
        reader = Reader(store, cache, offline=asked.offline, budget=budget)
        stack.callback(reader.close)
        options = Options("", allow_other=asked.allow_other, extra=asked.options)
        if asked.kind == "stage":
            self._stage = open_stage(asked, store, reader)
            if asked.eager:
                self._stage.store_ahead()
            return self._stage, dataclasses.replace(options, label=self._stage.label)
        view = open_view(asked, store, reader)
        stack.callback(view.close)
        if asked.prefetch == "all" and isinstance(view, VersionView):
            threading.Thread(target=_prefetch, args=(store, reader, view), name="prefetch", daemon=True).start()
        timeout = FRESH if view.changes else FOREVER
        return view, dataclasses.replace(options, label=view.label, timeout=timeout, keep_pages=True)

    def _announce(self, label: str, ready: Callable[[MountRecord], None]) -> None:
        """The mount answers: have it on record, and tell whoever asked for it."""
        assert self._session is not None
        self._record = MountRecord(
            id=self._id,
            kind=self._request.kind,
            name=label,
            mountpoint=self._where,
            store=self._stage.spec.store if self._stage else self._url,
            process=registry.this_process(),
            started_at=datetime.datetime.now(datetime.UTC).isoformat(),
            log=self._log_path,
            staging=str(self._stage.path) if self._stage else "",
            device=self._session.device,
        )
        self._mounted.set()
        try:
            self._registry.save(self._record)
            ready(self._record)
        except Exception as error:  # nobody would ever find this mount
            log.error("unmounting again: %s", error)
            threading.Thread(target=self._unmount, args=(True,), daemon=True).start()

    def _abandon(self) -> None:
        """It never was mounted: a stage made for it has nothing in it, a resumed one stays as it was."""
        if self._stage is not None and not self._request.resume:
            self._stage.discard()
        elif self._stage is not None:
            self._stage.close()

    def _finish(self) -> int:
        """What is left to do once nothing is mounted any more."""
        assert self._record is not None
        if self._stage is None:
            self._registry.remove(self._record)
            self._tell({"result": self._result()})
            return 0
        try:
            self._finish_stage(self._stage)
        except BaseException as error:
            failure = self._fail(error)
            self._stage.close()
            raise failure from error
        self._tell({"result": self._result()})
        return 0

    def _finish_stage(self, stage: Stage) -> None:
        if self._discard:
            stage.discard()
            self._save(state="committed", staging="")
            return
        if self._keep:
            stage.close()
            assert self._record is not None
            left = MountError(f"it was unmounted without a commit: artifactfs commit --resume {self._record.staging}")
            self._save(state="failed", error=control.pack_error(left))
            return
        self._save(state="committing")
        warning = _warn(stage)
        published = stage.commit(self._report, final=True)
        self._save(state="committed", warning=warning, **_made(published))
        stage.remove()

    def _fail(self, error: BaseException) -> ArtifactFSError:
        """Have it on record that nothing was committed, and why; the error to raise says where the changes are."""
        assert self._record is not None
        packed = control.pack_error(error)
        staging = self._record.staging
        packed["message"] += f"; the changes are kept in {staging}: artifactfs commit --resume {staging}"
        self._save(state="failed", error=packed)
        self._tell({"error": packed})
        return control.unpack_error(packed)

    def _save(self, **changes: Any) -> None:
        assert self._record is not None
        self._record = msgspec.structs.replace(self._record, **changes)
        try:
            self._registry.save(self._record)
        except ArtifactFSError as error:  # what has become of the stage is also in its directory, and told to whoever waits
            log.error("%s", error)

    def _tell(self, outcome: dict[str, Any]) -> None:
        self._outcome = outcome
        self._over.set()

    def _result(self, **more: Any) -> dict[str, Any]:
        return {"record": msgspec.to_builtins(self._record), "discarded": self._discard, **more}

    def _report(self, progress: Progress) -> None:
        self._progress = progress

    # Questions, in threads of the control server

    def _answer(self, question: dict[str, Any]) -> control.Answers:
        if question.get("op") == "unmount":
            yield from self._answer_unmount(*(bool(question.get(key)) for key in ("discard", "keep", "lazy")))
        elif self._stage is None:
            raise UsageError(
                f"{self._where} is a read-only mount: it has nothing to commit; `artifactfs stage` makes one that has"
            )
        elif question.get("op") == "commit":
            yield from self._answer_commit(self._stage)
        elif question.get("op") == "status":
            yield {"result": [msgspec.to_builtins(change) for change in self._stage.status()]}
        else:
            raise UsageError(f"the daemon does not know {question.get('op')!r}; it is of another version of artifactfs")

    def _answer_unmount(self, discard: bool, keep: bool, lazy: bool) -> control.Answers:
        with self._unmounting:
            taken = not self._ended.is_set() and self._unmount_for(discard, keep, lazy)
        # What is taken away while nothing uses it ends the loop, however busy the machine is; else open files may keep it.
        if not self._ended.wait(None if taken and not lazy else _AT_ONCE):
            yield {"result": self._result(detached=True)}
            return
        yield from self._progress_until(self._over)
        yield self._outcome

    def _unmount_for(self, discard: bool, keep: bool, lazy: bool) -> bool:
        self._discard, self._keep = discard, keep  # before the loop can return and look at them
        try:
            return self._unmount(lazy)
        except BaseException:
            self._discard = self._keep = False
            raise

    def _answer_commit(self, stage: Stage) -> control.Answers:
        done = threading.Event()
        outcome: list[dict[str, Any]] = []

        def work() -> None:
            try:
                warning = _warn(stage)
                made = _made(stage.commit(self._report))
                record = {**msgspec.to_builtins(self._record), "warning": warning}
                outcome.append({"result": {"record": record, **made}})
            except BaseException as error:
                outcome.append({"error": control.pack_error(error)})
            finally:
                done.set()

        threading.Thread(target=work, name="commit", daemon=True).start()
        yield from self._progress_until(done)
        yield outcome[0]

    def _progress_until(self, done: threading.Event) -> control.Answers:
        while not done.wait(_NEWS):
            yield {"progress": dataclasses.asdict(self._progress)}

    def _unmount(self, lazy: bool) -> bool:
        """Take the mount away; False if the kernel no longer has it there. ConflictError if another one is over it."""
        assert self._session is not None
        mount = mountpoint.at(self._where)
        if mount is None or mount.device != self._session.device:
            if mount is not None and any(m.device == self._session.device for m in mountpoint.table()):
                raise ConflictError(f"{mount.source} is mounted over {self._where}; unmount that first")
            return False
        mountpoint.unmount(self._where, lazy)
        return True

    # Signals, in a thread of their own

    def _obey_signals(self) -> None:
        number = signal.sigwait(_SIGNALS)
        if not self._mounted.is_set() and not self._over.is_set():
            os._exit(128 + number)  # nothing is mounted and nothing was promised
        if self._over.is_set():
            return
        log.info("%s: unmounting", signal.Signals(number).name)
        threading.Thread(target=self._drain, name="drain", daemon=True).start()
        signal.sigwait(_SIGNALS)
        if not self._over.is_set():
            log.warning("a second signal: stopping at once")
            os._exit(128 + number)

    def _drain(self) -> None:
        """Unmount; while files are open, let their users finish for a while."""
        assert self._session is not None
        try:
            self._unmount(lazy=False)
        except ArtifactFSError as busy:
            log.info("%s", busy)
            with contextlib.suppress(ArtifactFSError):
                self._unmount(lazy=True)
        if not self._ended.wait(self._request.drain):
            self._give_up()

    def _give_up(self) -> None:
        """End this process beside libfuse's loop, which goes on as long as files are open. The kernel answers their users with
        ENOTCONN; what a stage was told is in its directory."""
        assert self._record is not None
        if self._stage is None:
            self._registry.remove(self._record)
        else:
            open_ = ConflictError(f"files in {self._where} were still open {self._request.drain:g} s after it was told to end")
            self._fail(open_)
        self._server_close()
        os._exit(1)


def open_view(asked: MountRequest, store: Store, reader: Reader) -> FileTree:
    """The read-only tree that the request names. NotFoundError if there is none."""
    text = asked.name
    _, colon, alias = text.partition(":")
    if not colon:
        if asked.path_prefix:
            raise UsageError(f"--path-prefix needs one version: {text.strip('/')}:latest, say")
        return _open_levels(asked, store, reader)
    old, dots, new = alias.partition("..")
    if dots and old and new:
        name = names.parse(text.partition(":")[0], asked.entity, asked.project)
        if asked.path_prefix:
            raise UsageError(f"--path-prefix needs one version, not the difference {text}")
        first, second = (store.version(name.at(names.check_alias(part))) for part in (old, new))
        return DiffView(store, reader, first, second)
    return VersionView(store, reader, store.version(names.parse(text, asked.entity, asked.project)), asked.path_prefix)


def _open_levels(asked: MountRequest, store: Store, reader: Reader) -> BrowseView:
    """A browsing view. A name that is no level from the top is tried with the default entity and project before it."""
    parts = names.parse_prefix(asked.name)
    try:
        return BrowseView(store, reader, parts)
    except NotFoundError:
        defaults = (asked.entity, asked.project)[: max(3 - len(parts), 0)]
        if not defaults or not all(defaults) or len(defaults) + len(parts) != 3:
            raise
        return BrowseView(store, reader, (*defaults, *parts))


def open_stage(asked: MountRequest, store: Any, reader: Reader) -> Stage:
    """The stage that the request makes or resumes. What could only make its commit fail is refused now, before any work."""
    if asked.resume:
        return Stage.resume(Path(asked.resume), store, reader)
    name = names.parse(asked.name, asked.entity, asked.project)
    for alias in asked.aliases:
        if alias != names.LATEST:
            names.check_new_alias(alias)
    newest = _version_or_none(store, name.at(names.LATEST))
    base = _base(asked.base or name.alias, store, name, newest)
    name = name.at("")
    _check_type(asked.type, store, name)
    id = os.urandom(6).hex()
    spec = StageSpec(
        name=name,
        store=_recorded(asked.store, store),
        type=asked.type,
        base=base.number if base else None,
        aliases=asked.aliases,
        tags=tuple(names.check_tags(asked.tags)),
        # What is not given is the base's, as with W&B's new_draft.
        description=base.description if base and asked.description is None else asked.description,
        metadata=base.metadata if base and asked.metadata is None else names.check_metadata(asked.metadata),
        expect_base=asked.expect_base,
        commit=id + os.urandom(10).hex(),
        algorithm=newest.algorithm if newest else BLAKE3,
        mountpoint=mountpoint.absolute(asked.mountpoint),
        created_at=datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z"),
    )
    return Stage.begin(Path(asked.staging_dir) / f"{name.collection}-{id}", spec, store, reader)


def _recorded(url: str, store: Store) -> str:
    """What a record says of the store that ``url`` means: of a server its name, which the environment may have given."""
    return store.url if isinstance(store, ArtifactServer) else url


def _base(text: str, store: Store, name: ArtifactName, newest: Version | None) -> Version | None:
    if text == "none":
        return None
    return store.version(name.at(names.check_alias(text))) if text else newest


def _version_or_none(store: Store, name: ArtifactName) -> Version | None:
    try:
        return store.version(name)
    except NotFoundError:
        return None


def _check_type(given: str, store: Store, name: ArtifactName) -> None:
    if given:
        names.check_type(given, name.collection)
    try:
        collection = store.collection(name)
    except NotFoundError:
        return
    check_sequence(collection)
    known = collection.type
    if given and known != given:
        raise UsageError(f"{name.path} already exists with type {known!r}, not {given!r}; use that type or another name")


def _warn(stage: Stage) -> str:
    """One line about what a commit of the stage leaves out, which is also logged; "" if there is nothing."""
    warning = left_out_warning(stage.left_out())
    if warning:
        log.warning("%s", warning)
    return warning


def _made(published: Published | None) -> dict[str, Any]:
    if published is None:
        return {"committed": "", "created": False}
    return {"committed": published.version.qualified_name, "created": published.created}


def _prefetch(store: Store, reader: Reader, view: VersionView) -> None:
    """Bring all that the view shows into the cache."""
    try:
        failures = warm(store, reader, view.version, view.prefix)
    except ArtifactFSError as error:
        log.warning("prefetching %s: %s", view.label, error)
        return
    for failure in failures:
        log.warning("prefetching %s/%s: %s", view.label, failure.path, failure.error)


def _local_path(store: str) -> str:
    """The directory of an embedded store; "" for a store elsewhere."""
    if store.startswith("file:"):
        return urllib.parse.unquote(urllib.parse.urlsplit(store).path)
    return "" if "://" in store else store
