"""A reader of native stores written from ``docs/format.md`` alone: it uses nothing of artifactfs."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from blake3 import blake3

BLOCK = 1 << 20
LIST = "artifactfs 2026-11 block list v1"
DIRECTORY = "artifactfs 2026-11 directory digest v1"

unpack = msgspec.msgpack.Decoder().decode
pack = msgspec.msgpack.Encoder().encode


def quoted(name: str) -> str:
    part = urllib.parse.quote(name, safe="")
    return part if len(part) <= 240 else "=" + base64.urlsafe_b64encode(name.encode()).decode()


def unquoted(part: str) -> str:
    return base64.urlsafe_b64decode(part[1:]).decode() if part.startswith("=") else urllib.parse.unquote(part)


class FormatReader:
    def __init__(self, root: Path) -> None:
        self.root = root
        assert json.loads((root / "store.json").read_bytes()) == {"format": "artifactfs-store", "version": 1}

    # The catalog

    def collections(self) -> Iterator[tuple[str, str, str]]:
        for path in sorted((self.root / "catalog").glob("*/*/*")):
            entity, project, collection = (unquoted(part) for part in path.relative_to(self.root / "catalog").parts)
            assert [quoted(name) for name in (entity, project, collection)] == list(path.parts[-3:])
            yield entity, project, collection

    def versions(self, entity: str, project: str, collection: str) -> list[dict[str, Any]]:
        folder = self.root / "catalog" / quoted(entity) / quoted(project) / quoted(collection) / "versions"
        found = []
        for number, path in enumerate(sorted(folder.iterdir())):
            record = json.loads(path.read_bytes())
            assert path.name == f"{number:08d}.json"
            names = (record["entity"], record["project"], record["collection"], record["number"])
            assert names == (entity, project, collection, number)
            root = record["root"]
            root[2] = base64.b64decode(root[2])
            if root[3]:
                root[3][0] = base64.b64decode(root[3][0])
                root[3][1][0] = base64.b64decode(root[3][1][0])
            assert (record["size"], record["file_count"]) == (root[5], root[6])
            assert record["digest"] == self.version_digest(root, record["algorithm"])
            found.append(record)
        return found

    def version_digest(self, root: list[Any], algorithm: str) -> str:
        if algorithm == "BLAKE3":
            return str(root[2].hex())
        hasher: Any = hashlib.md5() if algorithm == "MD5" else xxhash.xxh3_128()
        hasher.update(b"wandb-artifact-manifest-v1\n")
        lines = {}
        for path, entry in self.walk(root):
            if entry[0] == 0:
                lines[path.encode()] = entry[8] or base64.b64encode(entry[5 - 1]).decode()
            elif entry[0] == 3:
                lines[path.encode()] = entry[3]
        for path_bytes in sorted(lines):
            hasher.update(path_bytes + b":" + lines[path_bytes].encode() + b"\n")
        return str(hasher.hexdigest())

    # Trees

    def extent(self, extent: list[Any]) -> bytes:
        object, offset, length = extent
        kind, name = object[:1], object[1:].hex()
        folder, size = {b"b": ("blobs", 64), b"p": ("packs", 32)}[kind]
        assert len(name) == size
        with (self.root / folder / name[:2] / name).open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        assert len(data) == length
        return data

    def page(self, reference: list[Any]) -> Any:
        data = self.extent(reference[1])
        assert len(data) <= 4 << 20 and blake3(data).digest() == reference[0]
        page = unpack(data)
        assert page[1] == 1 and pack(page) == data, "the shortest encoding"
        return page

    def leaves(self, reference: list[Any], level: int | None = None) -> Iterator[tuple[list[Any], bytes]]:
        """(entries, digest) of each leaf page of a directory, in order; indexes are checked on the way."""
        page = self.page(reference)
        if page[0] == 0:
            assert level in (0, None)
            yield page[2], self.digest([self.identity(entry) for entry in page[2]])
            return
        assert page[0] == 1 and (level is None or page[2] == level)
        for first, digest, below, count, size, files, links in page[3]:
            found = list(self.leaves(below, page[2] - 1))
            assert found[0][0][0][1] == first
            entries = [entry for leaf, _ in found for entry in leaf]
            assert (count, size, files, links) == (len(entries), *self.totals(entries))
            assert digest == (self.page_digest(below) if page[2] > 1 else found[0][1])
            yield from found

    def page_digest(self, reference: list[Any]) -> bytes:
        page = self.page(reference)
        if page[0] == 0:
            return self.digest([self.identity(entry) for entry in page[2]])
        return self.digest([page[2], [child[1] for child in page[3]]])

    @staticmethod
    def digest(value: Any) -> bytes:
        return blake3(pack(value), derive_key_context=DIRECTORY).digest()

    @staticmethod
    def identity(entry: list[Any]) -> list[Any]:
        if entry[0] == 0:
            return [0, entry[1], entry[3], entry[4]]
        if entry[0] in (1, 2):
            return entry[:3]
        return [3, entry[1], entry[5], entry[2], entry[3], sorted([key, value] for key, value in entry[6].items())]

    @staticmethod
    def totals(entries: list[Any]) -> tuple[int, int, int]:
        size = files = links = 0
        for entry in entries:
            if entry[0] == 1:
                size, files, links = size + entry[5], files + entry[6], links + entry[7]
            elif entry[0] == 0:
                size, files = size + entry[2], files + 1
            elif entry[0] == 3:
                size, files, links = size + max(entry[4], 0), files + 1, links + 1
        return size, files, links

    def entries(self, directory: list[Any]) -> list[list[Any]]:
        """The entries of a directory, once everything that it says is found to be so."""
        _, _, digest, reference, count, size, files, links = directory
        leaves = list(self.leaves(reference)) if reference else []
        entries = [entry for leaf, _ in leaves for entry in leaf]
        names = [entry[1].encode() for entry in entries]
        assert names == sorted(set(names))
        assert (count, size, files, links) == (len(entries), *self.totals(entries))
        assert digest == (self.page_digest(reference) if reference else self.digest([]))
        return entries

    def walk(self, directory: list[Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
        for entry in self.entries(directory):
            yield prefix + entry[1], entry
            if entry[0] == 1:
                yield from self.walk(entry, f"{prefix}{entry[1]}/")

    # Contents

    def content(self, file: list[Any]) -> bytes:
        _, _, size, _, id, extents, blocks, algorithm, checksum, table = file
        if table is not None:
            assert extents == []
            extents = unpack(self.extent(table))
        assert all(extent[2] % BLOCK == 0 for extent in extents[:-1])
        data = b"".join(map(self.extent, extents))
        assert len(data) == size
        digests = b"".join(blake3(data[at : at + BLOCK]).digest() for at in range(0, size, BLOCK))
        if size <= BLOCK:
            assert blocks is None and id == blake3(data).digest()
        else:
            assert self.extent(blocks) == digests
            assert id == blake3(struct.pack("<Q", size) + digests, derive_key_context=LIST).digest()
        new: dict[str, Any] = {"MD5": hashlib.md5, "XXH128": xxhash.xxh3_128}
        assert checksum == (base64.b64encode(new[algorithm](data).digest()).decode() if algorithm != "BLAKE3" else "")
        return data

    def contents(self, directory: list[Any]) -> dict[str, Any]:
        """As ``commits.contents`` gives it."""
        found: dict[str, Any] = {}
        for path, entry in self.walk(directory):
            if entry[0] == 0:
                found[path] = (self.content(entry), entry[3])
            elif entry[0] == 2:
                found[path] = entry[2]
            else:
                found[path] = None if entry[0] == 1 else entry
        return found

    # Where pages end

    def check_cuts(self, directory: list[Any], mod: int = 2048, heaviest: int = 960 << 10, most: int = 1920) -> None:
        """Every page of a directory ends where the rule says, and nowhere else."""
        if directory[3] is None:
            return
        level = [(entry, self.weight(entry)) for entry in self.entries(directory)]
        expected: list[list[Any]] = [[]]
        weight = 0
        for entry, own in level:
            expected[-1].append(entry)
            weight += own
            if weight >= heaviest or self.ends(entry[1], 0, mod):
                expected.append([])
                weight = 0
        pages = [page for page in expected if page]
        assert [leaf for leaf, _ in self.leaves(directory[3])] == pages
        firsts = [page[0][1] for page in pages]
        number = 0
        indexes = self.indexes(directory[3])
        while len(firsts) > 1:
            number += 1
            groups: list[list[str]] = [[]]
            for first in firsts:
                groups[-1].append(first)
                if len(groups[-1]) >= most or (len(groups[-1]) > 1 and self.ends(first, number, mod)):
                    groups.append([])
            groups = [group for group in groups if group]
            assert indexes.get(number) == groups
            firsts = [group[0] for group in groups]
        assert set(indexes) == set(range(1, number + 1))

    def indexes(self, reference: list[Any]) -> dict[int, list[list[str]]]:
        page = self.page(reference)
        if page[0] == 0:
            return {}
        found: dict[int, list[list[str]]] = {page[2]: [[child[0] for child in page[3]]]}
        for child in page[3]:
            for level, groups in self.indexes(child[2]).items():
                found.setdefault(level, []).extend(groups)
        return found

    @staticmethod
    def ends(name: str, level: int, mod: int) -> bool:
        return xxhash.xxh3_64(name.encode(), seed=level).intdigest() % mod == 0

    @staticmethod
    def weight(entry: list[Any]) -> int:
        weight = 256 + len(entry[1].encode())
        if entry[0] == 2:
            weight += len(entry[2].encode())
        elif entry[0] == 3:
            weight += sum(len(text.encode()) for text in (entry[2], entry[3]))
            weight += sum(len(str(it).encode()) for pair in entry[6].items() for it in pair)
        return weight
