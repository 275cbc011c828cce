"""Random commits, over bases and afresh, deletions and collections, against dictionaries."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from commits import NAME, commit, contents, file_at, objects, problems
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from steps import small_packs

from artifactfs.folders import MadeFolder
from artifactfs.maintenance import gc
from artifactfs.model import BLOCK, Dir, File
from artifactfs.publish import Change, NewFile, objects_of
from artifactfs.store.native import NativeStore
from artifactfs.store.urls import open_store

_RANDOM = random.Random(1)
SMALL = [b"", b"1", *(_RANDOM.randbytes(size) for size in (10, 3000, 9000))]
LARGE = [_RANDOM.randbytes(2 * BLOCK + 5)]
LARGE += [LARGE[0] + b"more", LARGE[0][:BLOCK] + b"!" + LARGE[0][BLOCK + 1 :], LARGE[0][: BLOCK + 1]]
POOL = SMALL + LARGE
NAMES = st.sampled_from(["a", "b", "c", "a-b", "é"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


class StoreMachine(RuleBasedStateMachine):
    versions = Bundle("versions")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.files = []
        for number, data in enumerate(POOL):
            path = self.root / f"content{number}"
            path.write_bytes(data)
            self.files.append(str(path))
        self.live: dict[int, dict[str, int]] = {}
        self.packs = small_packs(5000)
        self.packs.__enter__()

    def teardown(self) -> None:
        try:
            self.everything_is_as_it_should_be(True)
        finally:
            self.packs.__exit__(None, None, None)
            shutil.rmtree(self.root)

    @property
    def store(self) -> NativeStore:
        return open_store(str(self.root / "store"))

    @initialize()
    def make(self) -> None:
        assert commit(self.store, {}).version.number == 0
        self.live[0] = {}

    @rule(target=versions, files=st.dictionaries(PATHS, st.integers(0, len(POOL) - 1), max_size=5))
    def log(self, files: dict[str, int]) -> int:
        model = _without_clashes(files)
        return self._commit(_folder({path: NewFile(self.files[it], False) for path, it in model.items()}), model)

    @rule(
        target=versions,
        base=versions,
        changes=st.dictionaries(PATHS, st.one_of(st.none(), st.integers(0, len(POOL) - 1)), max_size=4),
        patch=st.booleans(),
    )
    def stage(self, base: int, changes: dict[str, int | None], patch: bool) -> int:
        """A commit over any live version, large files as patches of what was there."""
        if base not in self.live:
            base = max(self.live)
        store = self.store
        version = store.any_version(NAME, base)
        old = self.live[base]
        model = dict(old)
        made: dict[str, Change] = {}
        for path, content in _without_clashes({**old, **changes}).items():
            if path in changes and changes[path] is not None:
                model[path] = changes[path]  # type: ignore[assignment]
                made[path] = self._new(store, version, path, old.get(path), changes[path], patch)  # type: ignore[arg-type]
            elif path in old and content is None:
                del model[path]
                made[path] = None
        for path in [path for path in old if path not in _without_clashes({**old, **changes})]:
            del model[path]
            made[path] = None
        return self._commit(_folder(made, store, version.root), model, base=base)

    @rule(version=consumes(versions))
    def delete(self, version: int) -> None:
        if version in self.live and len(self.live) > 1:
            self.store.delete_version(NAME.at(f"v{version}"))
            del self.live[version]

    @rule()
    def collect(self) -> None:
        store = self.store
        gc(store, grace=-10)
        live = [store.any_version(NAME, number) for number in self.live]
        referred = {key for version in live for key in objects_of(store, version.root)}
        assert objects(store.url).keys() == referred

    @invariant()
    def latest_is_the_highest(self) -> None:
        if self.live:
            assert self.store.version(NAME).number == max(self.live)

    def everything_is_as_it_should_be(self, whole: bool) -> None:
        store = self.store
        assert [it.number for it in store.versions(NAME)] == sorted(self.live)
        assert problems(store.url) == []
        for number, model in self.live.items():
            found = contents(store, store.any_version(NAME, number))
            files = {path: data for path, value in found.items() if value is not None for data in [value[0]]}
            assert files == {path: POOL[content] for path, content in model.items()}

    def _new(self, store: NativeStore, version: Any, path: str, old: int | None, content: int, patch: bool) -> NewFile:
        new = self.files[content]
        if not patch or old is None:
            return NewFile(new, False)
        before, after = POOL[old], POOL[content]
        blocks = range(-(-len(after) // BLOCK))
        changed = {it for it in blocks if before[it * BLOCK : (it + 1) * BLOCK] != after[it * BLOCK : (it + 1) * BLOCK]}
        return NewFile(new, False, file_at(store, version, path), frozenset(changed), lambda at, size: before[at : at + size])

    def _commit(self, folder: MadeFolder, model: dict[str, int], **fields: Any) -> int:
        done = commit(self.store, folder, **fields)
        number = done.version.number
        if done.created:
            assert number not in self.live
            self.live[number] = model
        else:
            assert {k: POOL[v] for k, v in self.live[number].items()} == {k: POOL[v] for k, v in model.items()}
        return number


def _without_clashes(files: dict[str, Any]) -> dict[str, Any]:
    """Without those below a path that is a file itself."""
    parents = {path for path, content in files.items() if content is not None}
    return {path: content for path, content in files.items() if not any(_above(path, it) for it in parents)}


def _above(path: str, parent: str) -> bool:
    return path.startswith(parent + "/")


def _folder(changes: dict[str, Change], store: NativeStore | None = None, base: Dir | None = None) -> MadeFolder:
    """The changes by path as folders in folders, each over what the base has there."""
    here: dict[str, Change] = {}
    below: dict[str, dict[str, Change]] = {}
    for path, change in changes.items():
        name, _, rest = path.partition("/")
        if rest:
            below.setdefault(name, {})[rest] = change
        else:
            here[name] = change
    for name, inner in below.items():
        found = store.tree.lookup(base, name) if store is not None and base is not None else None
        if here.get(name) is None or isinstance(found, File):
            here.setdefault(name, None)
            if any(change is not None for change in inner.values()) or isinstance(found, Dir):
                here[name] = _folder(inner, store, found if isinstance(found, Dir) else None)
    return MadeFolder(here, base)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=25, stateful_step_count=12)
