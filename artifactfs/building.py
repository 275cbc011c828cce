"""The contents of a draft: files, directories and references added to a tree, and the copies that they need.

Whatever is added is checked as a whole first, so that a refusal leaves the draft as it was.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Literal, TypeAlias

from artifactfs import session
from artifactfs.draft import (
    WORKERS,
    AddedFile,
    CopyArea,
    DraftFolder,
    DraftTree,
    FoundFolder,
    Leaf,
    check_regular,
    missing_path,
    scan_folder,
)
from artifactfs.errors import IntegrityError, NotFoundError, UsageError, from_os_error
from artifactfs.manifest import ArtifactManifestEntry, Stored, VersionHolding, digest_of, no_such_entry, version_name
from artifactfs.media.base import Addition, DocumentAddition, EntryAddition, ReferenceAddition
from artifactfs.model import MD5, XXH128, Dir, File, Page, Remote, is_executable
from artifactfs.names import ArtifactName, entry_path, parse
from artifactfs.publish import NewRef
from artifactfs.references import expand
from artifactfs.session import Session
from artifactfs.shared import find_shared, is_shared
from artifactfs.tree import Tree

Policy: TypeAlias = Literal["mutable", "immutable"]


class Contents:
    """What a draft of ``algorithm`` holds so far, over the version ``parent`` if there is one."""

    def __init__(self, algorithm: str, parent: Stored | None = None) -> None:
        self.tree = DraftTree(parent.session.store.tree, parent.version.root) if parent else DraftTree(_NO_TREE)
        self._algorithm = algorithm
        self._parent = parent
        self._area: CopyArea | None = None
        self._added: dict[str, str] = {}
        self._borrowed: list[Stored] = []

    def add_file(
        self, local: str, name: str, is_tmp: bool, skip_cache: bool, policy: Policy, overwrite: bool
    ) -> tuple[str, Leaf]:
        """See ``Artifact.add_file``; returns the path and what stands there now."""
        _check_policy(policy)
        check_regular(local)
        path = entry_path(name or os.path.basename(local))
        if is_tmp:
            path = _content_name(path, local, self._algorithm)
        self._check_path(path, local, overwrite)
        leaf = self._taker(policy, skip_cache)(local)
        self.tree.put(path, leaf)
        self._added[local] = path
        return path, leaf

    def add_dir(self, local: str, name: str, skip_cache: bool, policy: Policy, merge: bool) -> None:
        """See ``Artifact.add_dir``."""
        _check_policy(policy)
        if not os.path.isdir(local):
            raise UsageError(f"Path is not a directory: {local!r}")
        found = _renamed(scan_folder(local), name)
        for path in found.empty:
            self.tree.check_free(path, folder=True)
        for path, file in found.files:
            self._check_path(path, file, merge)
        with ThreadPoolExecutor(WORKERS) as pool:
            leaves = list(pool.map(self._taker(policy, skip_cache), (file for _, file in found.files)))
        for path in found.empty:
            self.tree.make_folder(path)
        for (path, file), leaf in zip(found.files, leaves, strict=True):
            self.tree.put(path, leaf)
            self._added[file] = path

    @contextlib.contextmanager
    def new_file(self, name: str, mode: str, encoding: str | None, policy: Policy) -> Iterator[IO[Any]]:
        """See ``Artifact.new_file``."""
        _check_policy(policy)
        _check_mode(mode)
        path = entry_path(name)
        self._check_new(path, mode)
        target = self._copies().new_path()
        try:
            with open(target, mode, encoding=encoding or (None if "b" in mode else "utf-8")) as file:
                yield file
            self._check_new(path, mode)  # the block may have added things
            self.tree.put(path, AddedFile(target, os.stat(target), self._algorithm, original=path, skip_cache=True))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target)
            raise

    def add_reference(
        self, uri: ArtifactManifestEntry | str, name: str, checksum: bool, max_objects: int
    ) -> list[tuple[str, Leaf]]:
        """See ``Artifact.add_reference``; returns paths and what stands there now."""
        if isinstance(uri, ArtifactManifestEntry):
            added = [(entry_path(name or uri.path.rpartition("/")[2]), self._borrow(uri.leaf(), uri.source()))]
        elif str(uri).startswith("wandb-artifact://"):
            added = [self._borrow_from(uri, name)]
        elif is_shared(str(uri)):
            added = list(self._borrow_all(str(uri), name))
            if len(added) > max_objects:
                raise UsageError(f"{uri} has more than {max_objects} entries; pass a larger max_objects")
        else:
            algorithm = MD5 if self._algorithm == XXH128 else self._algorithm  # as with W&B: references have no XXH128
            items = expand(str(uri), name, checksum=checksum, max_objects=max_objects, algorithm=algorithm)
            added = [(item.path, NewRef(item.ref, item.block_list)) for item in items]
        for path, leaf in added:
            self.tree.check_free(path)
            self._check_same(path, leaf)
        for path, leaf in added:
            self.tree.put(path, leaf)
        return added

    def add_object(self, additions: Sequence[Addition], overwrite: bool) -> Leaf:
        """The entries of a media object; the last, its own, may replace another one with ``overwrite``. Returns that."""
        leaves = [(addition.path, self._leaf_of(addition)) for addition in additions]
        for number, (path, leaf) in enumerate(leaves, 1):
            self.tree.check_free(path)
            if not (overwrite and number == len(leaves)):
                self._check_same(path, leaf)
        for path, leaf in leaves:
            self.tree.put(path, leaf)
        return leaves[-1][1]

    def digest_at(self, path: str) -> str | None:
        """The digest of what stands at a path: "" of a folder, None where there is nothing."""
        found = self.tree.find(path)
        return None if found is None else "" if isinstance(found, DraftFolder) else digest_of(found)

    def _leaf_of(self, addition: Addition) -> Leaf:
        """What stands in a draft for a part of a media object."""
        if isinstance(addition, DocumentAddition):
            target = self._copies().new_path()
            try:
                with open(target, "xb") as file:
                    file.write(addition.data)
                return AddedFile(target, os.stat(target), self._algorithm, addition.path)
            except OSError as error:
                raise from_os_error(error, f"writing {addition.path} to {target}") from None
        if isinstance(addition, ReferenceAddition):
            (item,) = expand(addition.uri, addition.path, checksum=True, max_objects=1, algorithm=self._algorithm)
            return NewRef(item.ref, item.block_list)
        if isinstance(addition, EntryAddition):
            source: Stored | None = addition.entry.source()
            if source is not None and source.session.store.url == self._session().store.url:
                return self._borrow(addition.entry.leaf(), source)
            return self._copies().copy(addition.local(), self._algorithm)
        return self._copies().copy(addition.local, self._algorithm)

    def remove(self, path: str) -> None:
        """See ``Artifact.remove``."""
        if not self.tree.remove(entry_path(path)):
            raise missing_path(path)

    def path_of(self, local: str) -> str | None:
        """The path of the file that was added by this very local path, else None."""
        return self._added.get(local)

    def check_borrowed(self, opened: Session) -> None:
        """NotFoundError unless what was taken from other versions is still there: of a deleted one it may have been collected."""
        for source in self._borrowed:
            version = source.version.origin
            name = ArtifactName(version.entity, version.project, version.collection)
            if opened.store.any_version(name, version.number).state != "COMMITTED":
                raise NotFoundError(f"{version.qualified_name} was deleted after an entry of it was added to this artifact")

    def keep(self) -> str:
        """Keep the copies beyond the end of the process; returns where they are, "" if there are none."""
        if self._area is None:
            return ""
        self._area.keep()
        return self._area.path

    def close(self) -> None:
        """Remove the copies."""
        if self._area is not None:
            self._area.close()

    def _taker(self, policy: Policy, skip_cache: bool) -> Callable[[str], AddedFile]:
        """What makes an addition of a local path; several threads may call it."""
        if policy == "immutable":
            return lambda local: _original(local, self._algorithm, skip_cache)
        area = self._copies()
        return lambda local: area.copy(local, self._algorithm, skip_cache)

    def _check_path(self, path: str, local: str, overwrite: bool) -> None:
        """UsageError if the local file cannot stand at ``path``. It is read only if something of its size stands there."""
        self.tree.check_free(path)
        if not overwrite and self.tree.find(path) is not None:
            self._check_same(path, _original(local, self._algorithm))

    def _check_same(self, path: str, leaf: Leaf) -> None:
        old = self.tree.find(path)
        if old is not None and (isinstance(old, DraftFolder) or not _same(old, leaf)):
            raise UsageError(f"Cannot add the same path twice: {path!r} is in this artifact with other content; remove it first")

    def _check_new(self, path: str, mode: str) -> None:
        self.tree.check_free(path)
        if "x" in mode and self.tree.find(path) is not None:
            raise UsageError(f"File with name {path!r} already exists in this artifact; use mode 'w' to replace it")

    def _copies(self) -> CopyArea:
        if self._area is None:
            self._area = CopyArea(session.current_settings().staging_dir / ".drafts")
        return self._area

    def _borrow_from(self, uri: str, name: str) -> tuple[str, Leaf]:
        """The entry that a ``wandb-artifact:`` URI means."""
        full, path = version_name(uri)
        opened = self._session()
        source = Stored(opened, opened.store.version(parse(full)))
        leaf = VersionHolding(source).find(entry_path(path))
        if leaf is None:
            raise no_such_entry(path, full)
        return entry_path(name or path.rpartition("/")[2]), self._borrow(leaf, source)

    def _borrow_all(self, uri: str, name: str) -> Iterator[tuple[str, Leaf]]:
        """The entry that an ``artifactfs:`` URI names, or all entries below a directory."""
        opened = self._session()
        version, path, entry = find_shared(opened.store, uri)
        source = Stored(opened, version)
        if not isinstance(entry, Dir):
            yield entry_path(name or path.rpartition("/")[2]), self._borrow(entry, source)
            return
        prefix = f"{entry_path(name)}/" if name else ""
        self._borrowed.append(source)
        for below, found in opened.store.tree.walk(entry):
            if not isinstance(found, Dir):
                yield prefix + below, found

    def _borrow(self, leaf: Leaf, source: Stored | None) -> Leaf:
        """An entry of another artifact, to stand in this one too."""
        if isinstance(leaf, AddedFile):  # of another draft, whose copies go when it is logged
            leaf.check()
            return self._copies().copy(leaf.path, self._algorithm, leaf.skip_cache)
        if source is not None:
            if source.session.store.url != self._session().store.url:
                raise UsageError(f"{source.version.qualified_name} is in another store; copy it to this one first")
            self._borrowed.append(source)
        return leaf

    def _session(self) -> Session:
        return self._parent.session if self._parent else session.current()


def _no_pages(page: Page) -> bytes:
    raise IntegrityError(f"page {page.id.hex()} belongs to no store")


_NO_TREE = Tree(_no_pages)
"""Reads the directories of a draft that has no base: there are none."""


def _original(local: str, algorithm: str, skip_cache: bool = False) -> AddedFile:
    """An addition that is read where it is."""
    try:
        status = os.stat(local)
    except OSError as error:
        raise from_os_error(error, f"reading {local}") from None
    return AddedFile(os.path.abspath(local), status, algorithm, local, is_executable(status.st_mode), skip_cache)


def _check_policy(policy: str) -> None:
    if policy not in ("mutable", "immutable"):
        raise UsageError(f"Invalid policy {policy!r}: it is 'mutable' or 'immutable'")


def _check_mode(mode: str) -> None:
    if sum(mode.count(letter) for letter in "wxa") != 1 or set(mode) - set("wxabt+"):
        raise UsageError(f"mode {mode!r} cannot write a new file; use 'x' or 'w', with 'b' for bytes")


def _content_name(path: str, local: str, algorithm: str) -> str:
    """``path`` with what is before the first dot of its last part replaced by 20 hex digits of the file's digest: XXH128 where
    digests are, else MD5."""
    folder, slash, base = path.rpartition("/")
    dot = base.find(".")
    checksum = _original(local, XXH128 if algorithm == XXH128 else MD5).fingerprint().checksum
    digits = base64.standard_b64decode(checksum).hex()[:20]
    return f"{folder}{slash}{digits}{base[dot:] if dot >= 0 else ''}"


def _renamed(found: FoundFolder, name: str) -> FoundFolder:
    """The paths below ``name``; a folder without anything in it is an empty directory of that name."""
    if name in ("", ".", "./"):
        return found
    prefix = entry_path(name)
    files = [(f"{prefix}/{path}", local) for path, local in found.files]
    empty = [f"{prefix}/{path}" for path in found.empty]
    return FoundFolder(files, empty if files or empty else [prefix])


def _same(old: Leaf, new: Leaf) -> bool:
    """Whether two entries have one content, as far as their digests tell."""
    if isinstance(old, (AddedFile, File)) and isinstance(new, (AddedFile, File)):
        if isinstance(old, Remote) or isinstance(new, Remote):  # no content id is known of what a server has
            return old.size == new.size and old.algorithm == new.algorithm and digest_of(old) == digest_of(new)
        return old.size == new.size and _content_id(old) == _content_id(new)
    return digest_of(old) == digest_of(new)


def _content_id(leaf: AddedFile | File) -> bytes:
    return leaf.fingerprint().id if isinstance(leaf, AddedFile) else leaf.id
