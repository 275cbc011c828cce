"""Handles: checked reads of entries, wherever their bytes lie.

Four ways lead to the bytes. Content of a local store is read by the store itself. A ``file://`` reference is read where it
is, each block checked. Small contents of a remote store go through :mod:`artifactfs.packed`: the first that is missing in a
pack is fetched alone, with the next one all that its page has in that pack. Everything else goes through the cache in blocks:
what is there is read from it, a miss joins the fetch that is already under way for that block or starts one, and blocks are
released one by one as they arrive and pass their check. A block that fails it is fetched once more, then its readers get an
IntegrityError. Wrong bytes are neither served nor cached. What the cache does not take (none, disk full) is kept in memory for
a while. The block list of a content is fetched beside its first blocks, which wait for it before they are used.

Reading in sequence opens a window that doubles as it is used up and is fetched by several streams; a far seek closes it and
fetches the blocks touched, no more. A remote that sends only whole contents is streamed once from its first byte, and its
blocks are cached as they pass.

Threads: every public method may be called from any thread. ``Reader._lock`` guards all shared state; it is never held
during I/O beyond a look whether the cache has a block. Each fetch has a thread of its own, so no stalled remote keeps
others waiting; who waits for a block gives up when its fetch has made no progress for the deadline, and takes the fetch
away with it. Errors belong to those who wait; the next read tries again.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import msgspec
from cachetools import LRUCache

from artifactfs.cache import BlockCache, CachedContent
from artifactfs.cache.records import Records
from artifactfs.content import DIGEST_SIZE, EntryChecksum, block_digest, check_block_list
from artifactfs.errors import ArtifactFSError, IntegrityError, NetworkError, SourceChangedError
from artifactfs.model import BLOCK, File, Lying, Ref, Remote, block_count, reference_key, remote_key, scheme_of
from artifactfs.packed import OTHERS, PackedContents, Small, closed_error, offline_error
from artifactfs.references import (
    DEADLINE,
    Source,
    WholeOnly,
    check_readable,
    is_local,
    is_pinned,
    open_reference,
    resolve,
    source_key,
)
from artifactfs.references import (
    is_verified as is_pinned_as_recorded,
)
from artifactfs.store import LocalContent, Store
from artifactfs.waiting import Budget, Result, Workers, about_to_wait

log = logging.getLogger(__name__)

WHOLE = 4 << 20
"""Bytes of a server's file up to which all of it is fetched and compared with its checksum before any byte is served: a twentieth
of a second on a usual link. Of larger ones pinned ranges are served before that."""
SEEN_HERE = "seen:"
"""What the ETag of a server's file begins with that has none: it is worth something in this process only."""
_PIN_DECODE = msgspec.msgpack.Decoder(tuple[str, str]).decode

BUDGET = 128 << 20
"""Bytes that may be asked for and not yet here, ahead of what is read."""

_FORWARD = 16 << 20  # a seek this far ahead, or
_BACKWARD = 1 << 20  # this far back, leaves the window open: parallel readers and the kernel's readahead come out of order
_NEAR = 256 << 10  # while it is closed only this counts as sequence, or random reads of a small file would open it
_RUN = 256 << 10  # two of the kernel's reads in sequence open it; one alone may be a header
_WINDOW_MIN = 2 * BLOCK
_WINDOW_MAX = 48 * BLOCK
_PART_MAX = 6  # blocks of a prefetch: of a window of 48 MiB eight streams get one part each
_DEMAND = 4  # blocks of a fetch that somebody waits for: large enough for the link, small enough for several streams
_STEP = 8 * BLOCK  # a read of more is served in steps of this size
_STREAMS = 12  # a content: those of the window, and some that are ending
_MEMORY = 64 * BLOCK  # blocks that came last or that the cache did not take, more than a window; checked ones of local references
_PAUSE = 10.0  # seconds that a whole content waits, with nowhere to keep its blocks, for somebody to read on
_PROGRESS = 16 << 10  # bytes; a remote that drips less must not keep its readers waiting
_RESOLVED = 65536  # references whose size was asked for
_LOOK = 0.005  # seconds between two looks whether another process has cached a block
_LIST = -1  # the block list, as a block number
_PACKS = 16384  # packs and pages of which is known how often a content was missing there

Entry: TypeAlias = File | Ref
Beside: TypeAlias = Callable[[], tuple[bytes, Sequence[object]]]
"""Gives the id of the page that an entry is of, and the entries of that."""


class Handle(Protocol):
    """An open entry. Threads may share it."""

    size: int
    """In bytes; -1 for a reference of unknown size until the first read."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer only at the end, none behind it."""

    def lying(self, offset: int) -> Lying | None:
        """Where the bytes from ``offset`` lie on a local disk, not checked, as far as one file has them; None if none has, or
        if they may change."""

    def close(self) -> None:
        """Let go of it. Idempotent."""


class Reader:
    """Opens entries of ``store``. ``cache`` None: nothing is kept on disk. ``offline``: what is neither local nor cached is an
    OfflineError, and no connection is made. ``budget``: see :data:`BUDGET`. ``deadline``: seconds without progress until a
    read is given up with a NetworkError."""

    def __init__(
        self,
        store: Store,
        cache: BlockCache | None,
        *,
        offline: bool = False,
        budget: int = BUDGET,
        deadline: float = DEADLINE,
    ) -> None:
        self.store = store
        self.cache = cache
        self.offline = offline
        self.budget = Budget(budget)
        self.deadline = deadline
        self._lock = threading.Lock()
        self._workers = Workers()
        self._contents: dict[tuple[bytes, int, str], _Content] = {}
        self._packs = _Packs()
        self._packed = PackedContents(store.stream, cache, offline=offline, budget=self.budget, deadline=deadline)
        self._memory: LRUCache[tuple[bytes, int], bytes] = LRUCache(_MEMORY, getsizeof=len)
        self._resolved: LRUCache[bytes, Entry] = LRUCache(_RESOLVED)
        self._resolving: dict[bytes, Result[Entry]] = {}
        self._pins = Records(cache.root, f"{store.url} pins") if cache is not None else None
        self._condemned: LRUCache[bytes, str] = LRUCache(_RESOLVED)
        self._local_store = scheme_of(store.url) in ("", "file")
        self._closed = False

    def open(self, entry: Entry, where: str = "", beside: Beside | None = None) -> Handle:
        """A handle on the bytes of ``entry``; ``where`` (``entity/project/name:v3/path``) names it in messages. Makes no
        connection. ``beside`` gives the page that the entry is of, whose other contents may then be fetched with it. UsageError
        for a reference that cannot be read."""
        if isinstance(entry, Ref):
            entry = self.store.referenced(entry)
        if isinstance(entry, File):
            if isinstance(entry, Remote):
                _check_empty(entry, where)
                return _RemoteHandle(self, entry, where)
            local = self.store.local_content(entry)
            if local is not None:
                return _StoredHandle(entry.size, local, where)
            place = self.store.packed(entry)
            if place is not None:
                return _PackedHandle(self, self._packed, Small(entry.id, place), where or entry.name, beside)
        elif is_local(entry):
            return _LocalHandle(self, entry, where or entry.uri)
        else:
            check_readable(entry)
        return _RemoteHandle(self, entry, where)

    def size(self, ref: Ref) -> int:
        """The size of ``ref`` in bytes. One that was not recorded is asked for once, and remembered."""
        if ref.size >= 0:
            return ref.size
        entry = self.store.referenced(ref)
        return entry.size if entry.size >= 0 else self.pinned(entry, ref.uri).size

    def cached_bytes(self, entry: Entry) -> int:
        """How many bytes of ``entry`` can be read without a connection."""
        if isinstance(entry, Ref):
            entry = self.store.referenced(entry)
        local = is_local(entry) if isinstance(entry, Ref) else self.store.local_content(entry)
        if local:
            if not isinstance(local, bool):
                local.close()
            return max(entry.size, 0)
        if isinstance(entry, Ref) and not is_pinned(entry):
            with self._lock:
                entry = self._resolved.get(reference_key(entry), entry)
        elif isinstance(entry, Remote):
            entry = self._known_pin(entry) or entry
        if self.cache is None or entry.size <= 0:
            return 0
        key = _key(entry, entry.name)
        cached = self.cache.content(key, entry.size)
        try:
            return cached.cached_bytes()
        finally:
            cached.close()

    def prefetch_small(self, entries: Iterable[Entry]) -> bool:
        """Begin to fetch those of ``entries`` that are small contents of a remote store and not here, together where they lie
        together. False if the budget was used up already: ask again after some were read."""
        return self._packed.prefetch(self._smalls(entries))

    def rest_of_pack(self, small: Small, beside: Beside) -> Iterable[Small]:
        """What to fetch besides ``small``, which is missing: the contents beside it in the same pack, unless it is the first
        that is missing there."""
        page, entries = beside()
        if self.budget.left < _DEMAND * BLOCK or not self._packs.goes_on(small.extent.object, page):
            return ()
        return (other for other in self._smalls(entries) if other.extent.object == small.extent.object)

    def _smalls(self, entries: Iterable[object]) -> Iterator[Small]:
        for entry in entries:
            if isinstance(entry, File):
                place = self.store.packed(entry)
                if place is not None:
                    yield Small(entry.id, place)

    def close(self) -> None:
        """Stop all fetches; whoever waits for one gets an error. Idempotent."""
        self._packed.close()
        with self._lock:
            self._closed = True
            slots = [slot for content in self._contents.values() for slot in self._cancel_all(content)]
        for slot in slots:
            slot.fail(closed_error())

    def pinned(self, entry: Entry, where: str) -> Entry:
        """``entry`` itself, or a reference that was recorded without a pin or a size as its remote has it now."""
        if isinstance(entry, Remote):
            pinned = self._known_pin(entry)
            if pinned is not None:
                return pinned
            key = entry.id
        elif isinstance(entry, File) or is_pinned(entry):
            return entry
        else:
            key = reference_key(entry)
        with self._lock:
            known = self._resolved.get(key)
            result = self._resolving.get(key)
            first = known is None and result is None
            if first:
                self._check_online(where or entry.name)
                result = self._resolving[key] = Result()
        if known is not None:
            return known
        assert result is not None
        if first:
            self._workers.run(functools.partial(self._resolve, entry, key, result))
        if not result.wait(self.deadline):
            raise NetworkError(f"{where or entry.name}: no answer within {self.deadline:g} s; check the network, then try again")
        return result.get()

    def is_verified(self, entry: Entry) -> bool:
        """Whether what is read of ``entry`` is compared with what was recorded: at once, or because all of it was here once. Of a
        server's large file that is not known before; until then its bytes are only pinned."""
        if isinstance(entry, Ref):
            return is_pinned_as_recorded(entry)
        if not isinstance(entry, Remote) or (entry.checksum and entry.size <= WHOLE):
            return True
        known = self._known_pin(entry)
        if known is None or self.cache is None:
            return False
        with self._lock:
            content = self._contents.get((remote_key(known), known.size, ""))
        if content is not None and content.verified:
            return True
        return self.cache.content(remote_key(known), known.size).get_list() is not None

    def _known_pin(self, entry: Remote) -> Remote | None:
        """``entry`` as it was pinned here before, in this process or another; itself if it needs no pin."""
        if not needs_pin(entry):
            return entry
        with self._lock:
            known = self._resolved.get(entry.id)
        if isinstance(known, Remote):
            return msgspec.structs.replace(entry, etag=known.etag, modified=known.modified)
        data = self._pins.get(entry.id.hex()) if self._pins is not None else None
        if data is None:
            return None
        etag, modified = _PIN_DECODE(data)
        return msgspec.structs.replace(entry, etag=etag, modified=modified)

    def forget_pin(self, entry: Entry) -> None:
        """What was seen of a server's file holds no more: the next who opens it asks again."""
        if isinstance(entry, Remote):
            with self._lock:
                self._resolved.pop(entry.id, None)
            if self._pins is not None:
                self._pins.remove(entry.id.hex())

    def condemn(self, content: _Content, error: IntegrityError) -> None:
        """All of a content was here, and it is not what its checksum says: nothing of it stays, and its readers hear of it."""
        log.error("%s", error)
        self.forget_pin(content.entry)
        with self._lock:
            self._condemned[content.key] = str(error)
            for key in [key for key in self._memory if key[0] == content.key]:
                del self._memory[key]
        if self.cache is not None:
            try:
                self.cache.evict(content.key)
            except ArtifactFSError as failure:
                log.warning("%s", failure)

    def check_condemned(self, content: _Content) -> None:
        """IntegrityError if :meth:`condemn` was told of these very bytes."""
        with self._lock:
            text = self._condemned.get(content.key)
        if text is not None:
            raise IntegrityError(text)

    def _resolve(self, ref: Entry, key: bytes, result: Result[Entry]) -> None:
        found: Entry
        try:
            if isinstance(ref, Remote):
                found = self.store.pin(ref, self.deadline)
                if self._pins is not None and not found.etag.startswith(SEEN_HERE):
                    self._pins.put(ref.id.hex(), msgspec.msgpack.encode((found.etag, found.modified)))
            else:
                assert isinstance(ref, Ref)
                found = resolve(ref, self.deadline)
        except BaseException as error:
            with self._lock:
                self._resolving.pop(key, None)
            result.fail(error)
            return
        with self._lock:
            self._resolved[key] = found
            self._resolving.pop(key, None)
        result.set(found)

    # Contents

    def acquire(self, entry: Entry, where: str) -> _Content:
        """The shared state of a content, to be released."""
        key = _key(entry, where)
        kind = entry.uri if isinstance(entry, Ref) else ""
        with self._lock:
            content = self._contents.get((key, entry.size, kind))
            if content is None:
                cached = self.cache.content(key, entry.size) if self.cache is not None else None
                content = _Content(self, entry, key, cached, (key, entry.size, kind))
                self._contents[content.identity] = content
            content.users += 1
            return content

    def release(self, content: _Content) -> None:
        """Fetches that nobody can use any more end, but for a whole content that is being cached."""
        with self._lock:
            content.users -= 1
            slots: list[_Slot] = []
            if not content.users and not (content.whole and content.keeps):
                slots = self._cancel_all(content)
            self._forget_unused(content)
        for slot in slots:
            slot.fail(closed_error())

    def _forget_unused(self, content: _Content) -> None:
        if not content.users and not content.fetches and self._contents.get(content.identity) is content:
            del self._contents[content.identity]
            if content.cached is not None:
                content.cached.close()

    def _cancel_all(self, content: _Content) -> list[_Slot]:
        return [slot for fetch in list(content.fetches) for slot in self._cancel(fetch)]

    def _cancel(self, fetch: _Fetch) -> list[_Slot]:
        """Tell the fetch to stop and take its slots away, to be failed once the lock is free."""
        content = fetch.content
        fetch.cancelled = True
        fetch.wake.set()
        content.spools.discard(fetch)
        self.budget.give_back(fetch.left)
        fetch.left = 0
        blocks = [block for block, slot in content.slots.items() if slot.fetch is fetch]
        return [content.slots.pop(block) for block in blocks]

    def touch(self, content: _Content, block: int) -> None:
        """Note how far ``content`` is read: a stream that waits for that may go on."""
        content.touched = block
        if content.spools:
            with self._lock:
                for spool in content.spools:
                    spool.wake.set()

    def remember(self, key: bytes, block: int, data: bytes) -> None:
        """Keep a checked block in memory for a while."""
        with self._lock:
            self._memory[key, block] = data

    def recall(self, key: bytes, block: int) -> bytes | None:
        """A block that :meth:`remember` was given."""
        with self._lock:
            return self._memory.get((key, block))

    def forget(self, key: bytes, block: int) -> None:
        """The opposite of :meth:`remember`."""
        with self._lock:
            self._memory.pop((key, block), None)

    # Planning. Everything here runs under the lock; the fetches begin when it is free.

    def want(self, content: _Content, blocks: Iterable[int], where: str, anew: bool = False) -> dict[int, _Slot | None]:
        """Where to wait for each of ``blocks``; None for one that has come to the cache meanwhile (not with ``anew``).
        OfflineError if one is not there and may not be fetched."""
        with self._starting() as start, self._lock:
            found: dict[int, _Slot | None] = {}
            missing: list[int] = []
            for block in blocks:
                slot = content.slots.get(block)
                if slot is not None or (not anew and content.has(block)):
                    found[block] = slot
                else:
                    missing.append(block)
            if missing and not (missing == [_LIST] and (self._local_store or content.all_here)):
                self._check_online(where)
            if content.whole and missing and missing[0] != _LIST:
                self._attach(content, missing, where, start)
            else:
                for first, end in _runs(missing, _DEMAND):
                    self._begin(content, first, end, where, start)
            found.update((block, content.slots[block]) for block in missing)
            return found

    def prefetch(self, content: _Content, first: int, end: int, part: int, where: str) -> int:
        """Begin to fetch the blocks from ``first`` to ``end`` (exclusive), ``part`` to a stream, as far as streams and budget
        allow. Returns the block up to which that was done."""
        if self.offline or content.whole:
            return first
        with self._starting() as start, self._lock:
            missing = [block for block in range(first, end) if block not in content.slots and not content.has(block)]
            for low, high in _runs(missing, part):
                room = self.budget.left >= (high - low) * BLOCK
                if self._closed or not room or len(content.fetches) >= _STREAMS:
                    return low
                self._begin(content, low, high, where, start)
        return end

    @contextmanager
    def _starting(self) -> Iterator[list[_Fetch]]:
        """Collects fetches; their threads are started at the end, even after an error. To be entered before the lock."""
        fetches: list[_Fetch] = []
        try:
            yield fetches
        finally:
            for fetch in fetches:
                try:
                    self._workers.run(functools.partial(self._run, fetch))
                except RuntimeError as error:  # no more threads
                    self._end(fetch, ArtifactFSError(f"{fetch.where} cannot be fetched: {error}"))

    def _begin(self, content: _Content, first: int, end: int, where: str, start: list[_Fetch], whole: bool = False) -> _Fetch:
        fetch = _Fetch(content, first, end, where, whole=whole)
        content.fetches.add(fetch)
        if whole:
            content.spools.add(fetch)
        else:
            content.slots.update((block, _Slot(fetch)) for block in range(first, end))
            fetch.left = sum(content.length(block) for block in range(max(first, 0), end))
            self.budget.charge(fetch.left)
        start.append(fetch)
        return fetch

    def _attach(self, content: _Content, blocks: list[int], where: str, start: list[_Fetch]) -> None:
        """Let a stream of the whole content that has not passed ``blocks`` yet deliver them."""
        ahead = [fetch for fetch in content.spools if fetch.position <= blocks[0]]
        spool = max(ahead, key=lambda fetch: fetch.position) if ahead else None
        if spool is None:
            spool = self._begin(content, 0, block_count(content.size), where, start, whole=True)
        content.slots.update((block, _Slot(spool)) for block in blocks)
        spool.wake.set()

    def _check_online(self, where: str) -> None:
        if self._closed:
            raise closed_error()
        if self.offline:
            raise offline_error(where)

    # Waiting

    def wait(self, content: _Content, block: int, slot: _Slot | None, where: str) -> bytes | None:
        """The bytes of ``block`` once they are there; None for one that has come to the cache."""
        limit = time.monotonic() + self.deadline
        while slot is not None:
            if slot.wait(max(limit - time.monotonic(), 0.0)):
                if not slot.cancelled:
                    return slot.get()
                slot = self.want(content, [block], where)[block]
                continue
            limit = max(limit, slot.fetch.moved + self.deadline)
            if limit <= time.monotonic():
                self._give_up(slot.fetch)
                text = f"{where}: {content.where()} made no progress in {self.deadline:g} s; check the network, then try again"
                raise NetworkError(text)
        return None

    def _give_up(self, fetch: _Fetch) -> None:
        """Take a stalled fetch out of the way: its other readers, who may have waited less, start another."""
        with self._lock:
            slots = self._cancel(fetch)
        for slot in slots:
            slot.cancel()

    # Fetching, each in a thread of its own

    def _run(self, fetch: _Fetch) -> None:
        error: BaseException | None = None
        try:
            if fetch.first == _LIST:
                fetch.content.fetch_list(fetch)
            else:
                self._fetch(fetch)
        except _StoppedError:
            pass
        except BaseException as caught:  # whatever it is, those who wait must hear of it
            error = caught
        self._end(fetch, error)

    def _end(self, fetch: _Fetch, error: BaseException | None) -> None:
        content = fetch.content
        if isinstance(error, SourceChangedError):
            self.forget_pin(content.entry)
        with self._lock:
            content.fetches.discard(fetch)
            slots = self._cancel(fetch)
            self._forget_unused(content)
        for slot in slots:
            if error is not None:
                slot.fail(error)
            elif fetch.first == _LIST:
                slot.set(b"")
            else:
                slot.cancel()

    def _fetch(self, fetch: _Fetch) -> None:
        content = fetch.content
        blocks = range(fetch.first, fetch.end)
        claimed = list(blocks) if fetch.whole else [block for block in blocks if content.claim(block)]
        try:
            for first, end in _runs(claimed, len(blocks)):
                self._stream(fetch, first, end)
            for block in blocks if len(claimed) < len(blocks) else ():
                if block not in claimed and not self._from_other(fetch, block):
                    self._stream(fetch, block, block + 1)
        except WholeOnly as whole:
            if self._widen(fetch):
                self._receive(fetch, whole.stream, fetch.first, fetch.end)
            else:
                _close(whole.stream)
        finally:
            for block in blocks if not fetch.whole else ():
                content.disclaim(block)

    def _stream(self, fetch: _Fetch, first: int, end: int) -> None:
        content = fetch.content
        offset = first * BLOCK
        self._receive(fetch, content.source().fetch(offset, min(end * BLOCK, content.size) - offset), first, end)

    def _from_other(self, fetch: _Fetch, block: int) -> bool:
        """Wait for a block that another process is fetching into the cache; False if it takes too long or does not come."""
        content = fetch.content
        limit = time.monotonic() + OTHERS
        while not content.claim(block) and time.monotonic() < limit:
            if fetch.cancelled:
                raise _StoppedError
            time.sleep(_LOOK)
        content.prepare(fetch.where)
        data = content.peek(block, 0, content.length(block))
        if data is not None and self._vouched(fetch, block, data):
            self._pass_on(fetch, block, data)
        return data is not None

    def _widen(self, fetch: _Fetch) -> bool:
        """The remote sends the whole content where a part was asked for: whether this fetch goes on to take all of it. If
        another does so already, that one delivers what this one was for."""
        content = fetch.content
        with self._lock:
            content.whole = True
            mine = [block for block, slot in content.slots.items() if slot.fetch is fetch]
            for spool in content.spools:
                if not spool.cancelled and all(spool.position <= block for block in mine):
                    for block in mine:
                        content.slots[block].fetch = spool
                    spool.wake.set()
                    return False
            self.budget.give_back(fetch.left)
            fetch.left = 0
            fetch.whole, fetch.first, fetch.end, fetch.position = True, 0, block_count(content.size), 0
            content.spools.add(fetch)
            return True

    def _receive(self, fetch: _Fetch, stream: Iterator[bytes], first: int, end: int) -> None:
        """Cut the stream into the blocks from ``first`` to ``end`` (exclusive), and deliver each."""
        block, parts, have = first, [], 0
        need = fetch.content.length(block)
        try:
            for piece in stream:
                fetch.arrived(len(piece))
                view = memoryview(piece)
                while len(view):
                    parts.append(view[: need - have])
                    view = view[len(parts[-1]) :]
                    have += len(parts[-1])
                    if have < need:
                        continue
                    self._take(fetch, block, b"".join(parts))
                    block, parts, have = block + 1, [], 0
                    if block == end:
                        return
                    need = fetch.content.length(block)
        finally:
            _close(stream)
        raise IntegrityError(f"{fetch.content.where()} ended within block {block}; try again")

    def _take(self, fetch: _Fetch, block: int, data: bytes) -> None:
        """Check and deliver one block; one that fails is fetched once more."""
        content = fetch.content
        content.prepare(fetch.where)
        if not content.matches(block, data):
            log.warning("%s: block %d from %s fails its check; it is fetched again", fetch.where, block, content.where())
            data = content.fetch_block(block)
            if not content.matches(block, data):
                self._reject(fetch, block)
                return
        self._deliver(fetch, block, data)
        if fetch.whole and not content.keeps:
            self._pause(fetch)

    def _deliver(self, fetch: _Fetch, block: int, data: bytes) -> None:
        content = fetch.content
        content.hold(block)
        content.keep(block, data, replace=not fetch.whole)
        content.disclaim(block)
        if self._vouched(fetch, block, data):
            self._pass_on(fetch, block, data)

    def _vouched(self, fetch: _Fetch, block: int, data: bytes) -> bool:
        """Whether this block may be served: False for one that completes a content which then proves to be wrong."""
        content = fetch.content
        if content.verified:
            return True
        self.remember(content.key, block, data)
        try:
            content.check_whole(fetch)
        except IntegrityError as error:
            with self._lock:
                slot = self._passed(fetch, block)
            if slot is not None:
                slot.fail(error)
            return False
        content.let_go(block)
        return True

    def _pass_on(self, fetch: _Fetch, block: int, data: bytes) -> None:
        content = fetch.content
        with self._lock:
            self._memory[content.key, block] = data  # also if it is cached now: it is about to be read, mostly in pieces
            slot = self._passed(fetch, block)
        if slot is not None:
            slot.set(data)

    def _reject(self, fetch: _Fetch, block: int) -> None:
        error = fetch.content.damaged(block, fetch.where)
        log.error("%s", error)
        with self._lock:
            slot = self._passed(fetch, block)
        if slot is not None:
            slot.fail(error)

    def _passed(self, fetch: _Fetch, block: int) -> _Slot | None:
        """Account for a block that is done; its slot, whichever fetch it was waiting for."""
        fetch.position = block + 1
        done = min(fetch.left, fetch.content.length(block))  # nothing is left of a cancelled fetch, or of a whole content
        fetch.left -= done
        self.budget.give_back(done)
        return fetch.content.slots.pop(block, None)

    def _pause(self, fetch: _Fetch) -> None:
        """Nothing keeps the blocks of this stream but a little memory: go on only as its readers do."""
        content = fetch.content
        slack = _MEMORY // BLOCK // 4
        while True:
            with self._lock:
                fetch.wake.clear()
                wanted = any(slot.fetch is fetch for slot in content.slots.values())
                if wanted or fetch.position <= content.touched + slack:
                    return
            if not fetch.wake.wait(_PAUSE):
                with self._lock:
                    if not any(slot.fetch is fetch for slot in content.slots.values()):
                        content.spools.discard(fetch)
                        raise _StoppedError
            if fetch.cancelled:
                raise _StoppedError


class _Content:
    """One content while it is open: its source, its part of the cache, its block digests, and what is under way for it.

    ``slots``, ``fetches``, ``spools``, ``whole``, ``touched``, ``users``, ``_held`` and ``_shown`` belong to the reader's lock.
    """

    def __init__(
        self, reader: Reader, entry: Entry, key: bytes, cached: CachedContent | None, identity: tuple[bytes, int, str]
    ) -> None:
        self.entry = entry
        self.key = key
        self.size = entry.size
        self.cached = cached
        self.identity = identity
        self.users = 0
        self.slots: dict[int, _Slot] = {}
        self.fetches: set[_Fetch] = set()
        self.spools: set[_Fetch] = set()
        self.whole = False
        self.touched = 0
        self.keeps = cached is not None
        self._reader = reader
        self._source: Source | None = None
        self._digests: bytes | None = None
        self.verified = True  # or its checksum is still to be compared with all of it
        self.all_here = False
        self._whole: _Whole | None = None
        self._held: set[int] = set()
        self._shown: set[int] = set()
        if isinstance(entry, Remote):
            self.verified = False
            if entry.size > WHOLE or not entry.checksum:
                self._whole = _Whole(entry)
        elif not entry.id or entry.size <= BLOCK:
            self._digests = entry.id

    def source(self) -> Source:
        if self._source is None:
            entry, reader = self.entry, self._reader
            self._source = reader.store.source(entry) if isinstance(entry, File) else open_reference(entry, reader.deadline)
        return self._source

    def where(self) -> str:
        """What the bytes come from, for messages."""
        return self._source.where if self._source is not None else f"content {self.key.hex()}"

    def length(self, block: int) -> int:
        return min(BLOCK, self.size - block * BLOCK)

    def has(self, block: int) -> bool:
        """Whether :meth:`peek` will probably find it. Call it with the reader's lock held."""
        if block == _LIST:
            return self._digests is not None
        return (self.cached is not None and self.cached.has(block)) or (self.key, block) in self._reader._memory

    def peek(self, block: int, start: int, size: int) -> bytes | None:
        """``size`` bytes from ``start`` of a block that is cached, if its digest is known by now."""
        if self._digests is None:
            return None
        data = self._find(block, start, size)
        return data if data is not None and self._may_show(block) else None

    def _find(self, block: int, start: int, size: int) -> bytes | None:
        kept = self._reader.recall(self.key, block)
        if kept is not None:
            if self.keeps and start + size == len(kept):
                self._reader.forget(self.key, block)  # read in sequence to its end; who wants it again finds it in the cache
            return kept[start : start + size]
        return self.cached.read(block, start, size, self._digest(block)) if self.cached is not None else None

    def keep(self, block: int, data: bytes, replace: bool) -> bool:
        """Whether the cache has it now."""
        cached = self.cached
        self.keeps = cached is not None and (
            (not replace and cached.has(block)) or cached.write(block, data, self._digest(block))
        )
        return self.keeps

    def claim(self, block: int) -> bool:
        """Whether no other process is fetching the block; then this one is, until :meth:`disclaim`."""
        cache = self._reader.cache
        return cache is None or cache.claim(self.key, block)

    def disclaim(self, block: int) -> None:
        if self._reader.cache is not None:
            self._reader.cache.disclaim(self.key, block)

    def matches(self, block: int, data: bytes) -> bool:
        """Whether ``data`` can be this block; anything can where no content id is known: then the pin vouches for it."""
        digest = self._digest(block)
        return not digest or block_digest(data) == digest

    def fetch_block(self, block: int) -> bytes:
        """One block, straight from the source."""
        offset, size = block * BLOCK, self.length(block)
        try:
            return b"".join(self.source().fetch(offset, size))
        except WholeOnly as whole:
            return _cut(whole.stream, offset, size)

    def damaged(self, block: int, where: str) -> IntegrityError:
        """The error for a block that failed its check twice. Where nothing but the content id pins the target, it changed."""
        if isinstance(self.entry, Ref) and not self.entry.extra:
            return SourceChangedError(f"{where}: {self.where()} is no longer what was recorded (block {block}); add it again")
        text = f"{where}: block {block} from {self.where()} does not match its recorded digest, fetched twice"
        return IntegrityError(f"{text}; run `artifactfs verify`")

    def begin(self, where: str) -> None:
        """Begin to fetch the block digests, if they are recorded and not known yet: blocks are fetched meanwhile, and wait for
        them before they are used."""
        self._reader.check_condemned(self)
        if self._digests is None and not self._load_cached_list():
            if isinstance(self.entry, Remote):  # nothing of it can be checked before all of it is here
                self.prepare(where)
            else:
                self._reader.want(self, [_LIST], where)

    def prepare(self, where: str) -> None:
        """Make sure that the block digests are known, if they are recorded at all."""
        if self._digests is None and not self._load_cached_list():
            slot = self._reader.want(self, [_LIST], where)[_LIST]
            self._reader.wait(self, _LIST, slot, where)

    def _load_cached_list(self) -> bool:
        if isinstance(self.entry, Remote):
            return self._load_remote_list(self.entry)
        data = self.cached.get_list() if self.cached is not None else None
        if not data:
            return False
        try:
            self._digests = check_block_list(self.entry.id, self.size, data, "the cache")
        except IntegrityError:
            return False
        return True

    def _load_remote_list(self, entry: Remote) -> bool:
        """The digests of the blocks of a server's file that was compared with its checksum. There is none, and none is waited
        for, of a large one that is not all here."""
        cached = self.cached
        data = None
        if cached is not None and self.size > BLOCK:
            data = cached.get_list()
        elif cached is not None and self.size and self._whole is None:  # one block, which is there only if it was compared
            block = cached.read(0, 0, self.size)
            data = block_digest(block) if block is not None else None
        if data:
            self._digests, self.verified = data, True
        elif self._whole is not None:
            self.all_here = bool(entry.checksum) and cached is not None and cached.cached_bytes() == self.size
            if not self.all_here:
                self._digests = b""
        return self._digests is not None

    def hold(self, block: int) -> None:
        """A block has arrived, and it is not known yet whether it completes a server's file that is wrong: until
        :meth:`let_go` nobody sees it."""
        if not self.verified:
            with self._reader._lock:
                self._held.add(block)

    def let_go(self, block: int) -> None:
        with self._reader._lock:
            self._held.discard(block)
            self._shown.add(block)

    def _may_show(self, block: int) -> bool:
        """Whether a block that is here may be served. Of a server's file that was not compared with its checksum all but the last
        may, whichever that is, and whoever brought it: another process may have cached it. IntegrityError if it is wrong."""
        if self.verified or self._whole is None:
            return True
        with self._reader._lock:
            if block in self._held:
                return False
            last = block not in self._shown and len(self._shown) + 1 >= block_count(self.size)
            if not last:
                self._shown.add(block)
        if last:
            about_to_wait()
            self.check_whole()
            self.let_go(block)
        return True

    def check_whole(self, fetch: _Fetch | None = None) -> None:
        """Compare a server's file with its checksum as soon as all of it is here. IntegrityError if it is wrong."""
        self._reader.check_condemned(self)
        if self._whole is None or not isinstance(self.entry, Remote) or not self.entry.checksum:
            return
        digests = self._whole.advance(self, fetch)
        if digests is not None:
            self._accept(digests)

    def _accept(self, digests: bytes) -> None:
        if self.cached is not None and self.size > BLOCK:
            self.cached.set_list(digests)
        self._digests, self.verified = digests, True

    def any_block(self, block: int) -> bytes | None:
        """A block that is here, whether its digest is known or not."""
        data = self._reader.recall(self.key, block)
        if data is None and self.cached is not None:
            data = self.cached.read(block, 0, self.length(block))
        return data

    def _fetch_remote(self, entry: Remote, fetch: _Fetch) -> None:
        """Have the blocks' digests of a server's file: from all of it, which is fetched if it is small, or here already."""
        if self._whole is not None:
            self.check_whole(fetch)
            self.all_here = False
            if self._digests is None:  # something was evicted meanwhile
                self._digests = b""
            return
        data = self._fetch_all(fetch)
        if _checksum(entry, data) != entry.checksum:
            log.warning("%s: %s has not the checksum that was recorded; it is fetched again", fetch.where, self.where())
            data = self._fetch_all(fetch)
        if _checksum(entry, data) != entry.checksum:
            raise _wrong(entry, fetch.where, self.where())
        pieces = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
        digests = [block_digest(piece) for piece in pieces]
        for block, piece in enumerate(pieces):
            self.keeps = self.cached is not None and self.cached.write(block, piece, digests[block])
            self._reader.remember(self.key, block, piece)
        self._accept(b"".join(digests))

    def _fetch_all(self, fetch: _Fetch) -> bytes:
        pieces: list[bytes] = []
        try:
            stream = self.source().fetch(0, self.size)
            for piece in stream:
                fetch.arrived(len(piece))
                pieces.append(piece)
        except WholeOnly as whole:
            pieces = [_cut(whole.stream, 0, self.size)]
        data = b"".join(pieces)
        if len(data) != self.size:
            raise IntegrityError(f"{self.where()} ended after {len(data)} of {self.size} bytes; try again")
        return data

    def fetch_list(self, fetch: _Fetch) -> None:
        entry = self.entry
        if isinstance(entry, Remote):
            self._fetch_remote(entry, fetch)
            return
        file = entry if isinstance(entry, File) else File(entry.name, entry.size, entry.executable, entry.id, blocks=entry.blocks)
        try:
            blocks = check_block_list(entry.id, self.size, self._reader.store.block_list(file), self.where())
        except IntegrityError as error:
            log.warning("%s; it is fetched again", error)
            blocks = check_block_list(entry.id, self.size, self._reader.store.block_list(file), self.where())
        if self.cached is not None:
            self.cached.set_list(blocks)
        self._digests = blocks

    def _digest(self, block: int) -> bytes:
        """The BLAKE3 of a block; "" if none is recorded."""
        return self._digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE] if self._digests else b""


class _Whole:
    """Compares a large file of a server with its checksum as its blocks come, in whatever order: hashes those that are here, from
    the first on, as far as none is missing."""

    def __init__(self, entry: Remote) -> None:
        self._lock = threading.Lock()
        self._hash = EntryChecksum(entry.algorithm)
        self._digests = bytearray()
        self._next = 0

    def advance(self, content: _Content, fetch: _Fetch | None) -> bytes | None:
        """The digests of all blocks, once all of them were hashed; None before. IntegrityError if the checksum is another."""
        entry = content.entry
        assert isinstance(entry, Remote)
        count = block_count(content.size)
        with self._lock:  # whoever comes meanwhile waits: its own block may be the next
            while self._next < count:
                data = content.any_block(self._next)
                if data is None:
                    return None
                self._hash.update(data)
                self._digests += block_digest(data)
                self._next += 1
                if fetch is not None:
                    fetch.moved = time.monotonic()
            if content.verified:
                return None
            content._reader.check_condemned(content)
            if self._hash.finish() != entry.checksum:
                error = _wrong(entry, fetch.where if fetch is not None else entry.name, content.where())
                content._reader.condemn(content, error)
                raise error
            return bytes(self._digests)


class _RemoteHandle:
    """Reads through the cache. ``_next``, ``_run``, ``_window`` and ``_ahead`` tell whether it is read in sequence."""

    def __init__(self, reader: Reader, entry: Entry, where: str) -> None:
        self.size = entry.size
        self._reader = reader
        self._entry = entry
        self._where = where or (entry.uri if isinstance(entry, Ref) else entry.name)
        self._lock = threading.Lock()
        self._content: _Content | None = None
        self._closed = False
        self._next = -1  # where the furthest read ended; -1 before the first
        self._run = 0  # bytes read in sequence up to there
        self._window = 0  # bytes to have under way ahead of it
        self._ceiling = _WINDOW_MAX
        self._ahead = 0  # the block up to which fetching was begun

    def read(self, offset: int, size: int) -> bytes:
        content = self._open()
        end = min(offset + size, content.size)
        if offset < 0 or offset >= end:
            return b""
        content.begin(self._where)
        target = self._advance(offset, end)
        parts: list[bytes] = []
        while offset < end:
            stop = min(end, (offset // _STEP + 1) * _STEP)
            parts += self._read_step(content, offset, stop, max(target, -(-end // BLOCK)))
            offset = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def lying(self, offset: int) -> Lying | None:
        content = self._content
        if content is None or content.cached is None or not 0 <= offset < content.size:
            return None
        block, start = divmod(offset, BLOCK)
        found = content.cached.lying(block)
        return found and found._replace(offset=found.offset + start, length=found.length - start)

    def close(self) -> None:
        with self._lock:
            content, self._content, self._closed = self._content, None, True
        if content is not None:
            self._reader.release(content)

    def _open(self) -> _Content:
        content = self._content
        if content is not None:
            return content
        entry = self._reader.pinned(self._entry, self._where)
        with self._lock:
            if self._closed:
                raise ArtifactFSError(f"{self._where} was closed; open it again")
            if self._content is None:
                self._content = self._reader.acquire(entry, self._where)
                self.size = entry.size
            return self._content

    def _read_step(self, content: _Content, offset: int, end: int, target: int) -> list[bytes]:
        """The bytes from ``offset`` to ``end``, block by block; before the first wait begins the fetching of what lies ahead,
        up to block ``target``."""
        blocks = range(offset // BLOCK, -(-end // BLOCK))
        spans = {block: (max(offset - block * BLOCK, 0), min(end - block * BLOCK, BLOCK)) for block in blocks}
        found = {block: content.peek(block, low, high - low) for block, (low, high) in spans.items()}
        missing = [block for block, data in found.items() if data is None]
        if missing and missing[0] < self._ahead and missing[0] not in content.slots:
            self._narrow()
        slots = self._reader.want(content, missing, self._where) if missing else {}
        self._look_ahead(content, blocks.stop, target)
        parts: list[bytes] = []
        for block, (low, high) in spans.items():
            data = found[block]
            parts.append(self._receive(content, block, slots[block], low, high) if data is None else data)
        return parts

    def _receive(self, content: _Content, block: int, slot: _Slot | None, low: int, high: int) -> bytes:
        """The bytes ``low`` to ``high`` of a block that was not there a moment ago."""
        while True:
            data = self._reader.wait(content, block, slot, self._where)
            if data is not None:
                return data if (low, high) == (0, len(data)) else data[low:high]
            content.prepare(self._where)
            data = content.peek(block, low, high - low)
            if data is not None:
                return data
            slot = self._reader.want(content, [block], self._where, anew=True)[block]

    def _advance(self, offset: int, end: int) -> int:
        """Take note of a read; the block up to which to fetch ahead."""
        with self._lock:
            gap = offset - self._next
            opened = self._window > 0
            if self._next < 0 or not (-_BACKWARD <= gap <= _FORWARD if opened else -_NEAR <= gap <= _NEAR):
                self._next, self._run, self._window, self._ahead, self._ceiling = end, end - offset, 0, 0, _WINDOW_MAX
                return 0
            self._run += end - offset
            self._next = max(self._next, end)
            step = min(self._window // 2, _PART_MAX * BLOCK)
            if self._run < _RUN or self._next + self._window - step < self._ahead * BLOCK:
                return 0
            self._window = min(max(self._window * 2, _WINDOW_MIN), self._ceiling)
            return -(-(self._next + self._window) // BLOCK)

    def _narrow(self) -> None:
        """What was fetched ahead was evicted before it was read: do not go so far ahead again in this run."""
        with self._lock:
            self._ceiling = self._window = max(self._window // 4, BLOCK)

    def _look_ahead(self, content: _Content, next_block: int, target: int) -> None:
        """Begin to fetch what lies ahead of ``next_block``, up to block ``target``, as far as the window may reach."""
        self._reader.touch(content, next_block - 1)
        with self._lock:
            if not content.keeps:
                self._ceiling = min(self._ceiling, _MEMORY // 8)
            first = max(next_block, self._ahead)
            target = min(target, block_count(content.size), next_block + self._ceiling // BLOCK)
        if first < target:
            part = min(max(self._window // (4 * BLOCK), (target - first) // _STREAMS, 1), _PART_MAX)
            done = self._reader.prefetch(content, first, target, part, self._where)
            with self._lock:
                self._ahead = max(self._ahead, done)


class _PackedHandle:
    """Small content of a remote store, which is fetched together with others."""

    def __init__(self, reader: Reader, packed: PackedContents, small: Small, where: str, beside: Beside | None) -> None:
        self.size = small.extent.length
        self._packed = packed
        self._small = small
        self._where = where
        self._ahead = functools.partial(reader.rest_of_pack, small, beside) if beside is not None else None

    def read(self, offset: int, size: int) -> bytes:
        return self._packed.read(self._small, offset, size, self._where, self._ahead) if offset >= 0 else b""

    def lying(self, offset: int) -> None:
        return None

    def close(self) -> None:
        """Nothing is kept open."""


class _Packs:
    """Which packs are being read in: what is missing there once may be all that is asked for, what is missing twice is not.

    A page's contents are fetched ahead again only when far more of them were missing since: they do not fit into the cache.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._missed: LRUCache[bytes, int] = LRUCache(_PACKS)
        self._due: LRUCache[tuple[bytes, bytes], int] = LRUCache(_PACKS)

    def goes_on(self, object: bytes, page: bytes) -> bool:
        """Take note that a content of ``page`` was missing in the pack ``object``; whether to fetch the others there."""
        with self._lock:
            missed = self._missed[object] = self._missed.get(object, 0) + 1
            if missed < self._due.get((object, page), 2):
                return False
            self._due[object, page] = missed * 4
            return True


class _StoredHandle:
    """Content of a local store, which checks its blocks itself."""

    def __init__(self, size: int, content: LocalContent, where: str) -> None:
        self.size = size
        self._content = content
        self._where = where

    def read(self, offset: int, size: int) -> bytes:
        try:
            return self._content.read(offset, size)
        except IntegrityError as error:
            raise IntegrityError(f"{self._where}: {error}" if self._where else str(error)) from None

    def lying(self, offset: int) -> Lying | None:
        return self._content.lying(offset)

    def close(self) -> None:
        self._content.close()


class _LocalHandle:
    """A ``file://`` reference. Where its content id is known every byte comes from a block that was checked after it was
    read; otherwise the file must at least have the recorded size."""

    def __init__(self, reader: Reader, ref: Ref, where: str) -> None:
        self.size = ref.size
        self._reader = reader
        self._where = where
        check_readable(ref)
        self._content = reader.acquire(ref, where)
        self._checked = bool(ref.id)
        self._released = False

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        if offset < 0 or offset >= end:
            return b""
        if not self._checked:
            return b"".join(self._content.source().fetch(offset, end - offset))
        self._content.prepare(self._where)
        parts: list[bytes] = []
        while offset < end:
            block, start = divmod(offset, BLOCK)
            data = self._block(block)[start : min(end - block * BLOCK, BLOCK)]
            parts.append(data)
            offset += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def lying(self, offset: int) -> None:
        return None

    def close(self) -> None:
        if not self._released:
            self._released = True
            self._reader.release(self._content)

    def _block(self, block: int) -> bytes:
        """A checked block; what was checked stays right whatever becomes of the file."""
        content = self._content
        data = self._reader.recall(content.key, block)
        if data is None:
            data = content.fetch_block(block)
            if not content.matches(block, data):
                error = content.damaged(block, self._where)
                log.error("%s", error)
                raise error
            self._reader.remember(content.key, block, data)
        return data


class _Slot(Result[bytes]):
    """Where readers wait for a block. ``fetch`` is to deliver it."""

    def __init__(self, fetch: _Fetch) -> None:
        super().__init__()
        self.fetch = fetch
        self.cancelled = False

    def cancel(self) -> None:
        """The fetch was given up, for no fault of the block: who waits should ask again."""
        self.cancelled = True
        self.finish()


@dataclasses.dataclass(slots=True, eq=False)
class _Fetch:
    """One stream of the blocks from ``first`` to ``end`` (exclusive).

    ``left`` is what counts against the budget, ``position`` the next block, ``moved`` when it last made progress (0 before it
    did). ``whole``: it streams the content from its beginning, and delivers whatever block is waited for when it passes.
    """

    content: _Content
    first: int
    end: int
    where: str
    whole: bool = False
    left: int = 0
    position: int = 0
    moved: float = 0.0
    cancelled: bool = False
    wake: threading.Event = dataclasses.field(default_factory=threading.Event)
    _bytes: int = 0

    def arrived(self, size: int) -> None:
        """Count ``size`` bytes; _StoppedError if nobody wants more."""
        if self.cancelled:
            raise _StoppedError
        self._bytes += size
        if self._bytes >= _PROGRESS:
            self._bytes = 0
            self.moved = time.monotonic()


class _StoppedError(Exception):
    """A fetch that nobody needs any more."""


def _key(entry: Entry, where: str) -> bytes:
    """The identity of the bytes of a pinned entry. IntegrityError for a stored one that cannot be right."""
    if isinstance(entry, Remote):
        return remote_key(entry)
    key = source_key(entry) if isinstance(entry, Ref) else entry.id
    if len(key) != DIGEST_SIZE:
        raise IntegrityError(f"{where} has a content id of {len(key)} bytes; run `artifactfs fsck`")
    return key


def needs_pin(entry: Remote) -> bool:
    """Whether bytes of ``entry`` are served before all of it could be compared with its checksum, and nothing pins it yet."""
    return (entry.size > WHOLE or not entry.checksum) and not (entry.etag or entry.modified)


def cache_keys(cache: BlockCache, store: Store, entry: Entry) -> list[bytes]:
    """The keys under which a cache may have the bytes of a pinned entry."""
    if not isinstance(entry, Remote):
        return [_key(entry, entry.name)]
    pin = Records(cache.root, f"{store.url} pins").get(entry.id.hex()) if needs_pin(entry) else None
    if pin is None:
        return [entry.id]
    etag, modified = _PIN_DECODE(pin)
    return [entry.id, remote_key(msgspec.structs.replace(entry, etag=etag, modified=modified))]


def _check_empty(entry: Remote, where: str) -> None:
    """No byte of an empty file is ever read, so none could be found wrong."""
    if not entry.size and entry.checksum and _checksum(entry, b"") != entry.checksum:
        raise _wrong(entry, where or entry.name, "its server")


def _checksum(entry: Remote, data: bytes) -> str:
    checksum = EntryChecksum(entry.algorithm)
    checksum.update(data)
    return checksum.finish()


def _wrong(entry: Remote, where: str, source: str) -> IntegrityError:
    return IntegrityError(
        f"{where} from {source} is not what was recorded: its {entry.algorithm} is another than {entry.checksum}; "
        "log the file again, or ask who runs the server"
    )


def _runs(blocks: list[int], most: int) -> Iterator[tuple[int, int]]:
    """The ascending ``blocks`` as (first, end) of unbroken runs of at most ``most``."""
    first = 0
    for index in range(1, len(blocks) + 1):
        if index == len(blocks) or blocks[index] != blocks[index - 1] + 1 or index - first == most:
            yield blocks[first], blocks[index - 1] + 1
            first = index


def _cut(stream: Iterator[bytes], offset: int, size: int) -> bytes:
    """The ``size`` bytes from ``offset`` of a stream; fewer if it ends before."""
    parts: list[bytes] = []
    end = offset + size
    position = 0
    try:
        for piece in stream:
            if position + len(piece) > offset:
                parts.append(piece[max(offset - position, 0) : end - position])
            position += len(piece)
            if position >= end:
                break
    finally:
        _close(stream)
    return b"".join(parts)


def _close(stream: Iterator[bytes]) -> None:
    """End a stream before its end, so that its connection is free at once."""
    close = getattr(stream, "close", None)
    if close is not None:
        close()
