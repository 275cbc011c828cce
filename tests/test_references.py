"""References: what W&B's rules give for a URI, and that nothing but the pinned bytes is ever read."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from blake3 import blake3
from http_server import FaultServer

from artifactfs import references
from artifactfs.content import fingerprint
from artifactfs.errors import (
    ArtifactFSError,
    InvalidNameError,
    NetworkError,
    NotFoundError,
    SourceChangedError,
    UsageError,
)
from artifactfs.model import BLOCK, MD5, Ref
from artifactfs.references import Expanded, WholeOnly, is_pinned, open_reference, resolve, source_key


def expand(*arguments: Any, **options: Any) -> list[Expanded]:
    return list(references.expand(*arguments, **options))


BIG = random.Random(2).randbytes(2 * BLOCK + 12345)


def b64_md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data).digest()).decode()


def one(entries: list[Expanded]) -> Expanded:
    assert len(entries) == 1
    return entries[0]


def content(ref: Ref, offset: int = 0, size: int = -1) -> bytes:
    source = open_reference(ref, 5)
    return b"".join(source.fetch(offset, source.size - offset if size < 0 else size))


# file://


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(BIG)
    entry = one(expand(path.as_uri()))
    ref = entry.ref
    assert entry.path == ref.name == "data.bin"
    assert (ref.uri, ref.size, ref.extra, ref.executable) == (path.as_uri(), len(BIG), {}, False)
    found = fingerprint(BIG)
    assert (ref.id, ref.digest, ref.algorithm, entry.block_list) == (found.id, found.digest, "BLAKE3", found.blocks)
    assert content(ref) == BIG
    assert content(ref, 5, BLOCK) == BIG[5 : 5 + BLOCK]


@pytest.mark.parametrize("algorithm", ["MD5", "md5", "XXH128", "BLAKE3"])
def test_digest_algorithms(tmp_path: Path, algorithm: str) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    ref = one(expand(f"file://{tmp_path}/f", algorithm=algorithm)).ref
    digests = {
        "MD5": b64_md5(b"abc"),
        "XXH128": base64.b64encode(xxhash.xxh3_128(b"abc").digest()).decode(),
        "BLAKE3": base64.b64encode(blake3(b"abc").digest()).decode(),
    }
    assert (ref.algorithm, ref.digest) == (algorithm.upper(), digests[algorithm.upper()])
    assert ref.id == blake3(b"abc").digest()


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    entry = one(expand(f"file://{tmp_path}/f", algorithm=MD5))
    assert (entry.ref.digest, entry.ref.size, entry.block_list) == ("1B2M2Y8AsgTpgAmY7PhCfg==", 0, b"")
    assert content(entry.ref) == b""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for name in ("a.txt", "sub/b.txt", "sub/deep/c #?%41.txt", "sub-x/d.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/x.txt").write_text("outside")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "link.txt").symlink_to(tmp_path / "outside/x.txt")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    return root


def test_directory(folder: Path) -> None:
    entries = expand(f"file://{folder}")
    paths = ["a.txt", "link.txt", "run.sh", "sub-x/d.txt", "sub/b.txt", "sub/deep/c #?%41.txt"]
    assert [entry.path for entry in entries] == paths
    for entry in entries:
        assert entry.ref.uri == f"file://{folder}/{entry.path}"
        assert entry.ref.name == entry.path.rpartition("/")[2]
        assert content(entry.ref) == (folder / entry.path).read_bytes()
        assert entry.ref.executable == (entry.path == "run.sh")
    named = expand(f"file://{folder}/", "in/here")
    assert [entry.path for entry in named] == [f"in/here/{path}" for path in paths]
    assert [entry.ref for entry in named] == [entry.ref for entry in entries]


def test_percent_encoded_uris(tmp_path: Path) -> None:
    """As ``Path.as_uri()`` writes them; but what is there literally comes first, as in W&B."""
    (tmp_path / "my dir").mkdir()
    (tmp_path / "my dir/100%.txt").write_bytes(b"1")
    (tmp_path / "my dir/%41").write_bytes(b"2")
    entries = expand((tmp_path / "my dir").as_uri())
    assert [entry.path for entry in entries] == ["%41", "100%.txt"]
    assert [content(entry.ref) for entry in entries] == [b"2", b"1"]
    assert entries[0].ref.uri == (tmp_path / "my dir/%41").as_uri()
    assert one(expand((tmp_path / "my dir/100%.txt").as_uri())).path == "100%.txt"
    (tmp_path / "a%20b").write_bytes(b"literal")
    (tmp_path / "a b").write_bytes(b"decoded")
    assert content(one(expand(f"file://{tmp_path}/a%20b")).ref) == b"literal"


def test_without_checksum(folder: Path) -> None:
    (folder / "a.txt").chmod(0)  # nothing is read (root could, so this is for other users)
    entries = expand(f"file://{folder}", checksum=False)
    by_path = {entry.path: entry.ref for entry in entries}
    assert len(by_path) == 6
    assert by_path["a.txt"] == Ref("a.txt", f"file://{folder}/a.txt", b64_md5(f"file://{folder}/a.txt".encode()), 5)
    assert by_path["link.txt"].digest == b64_md5((folder / "link.txt").resolve().as_uri().encode())
    (folder / "a.txt").chmod(0o644)
    assert content(by_path["a.txt"]) == b"a.txt"
    (folder / "a.txt").write_bytes(b"other")  # not pinned but by its size
    assert content(by_path["a.txt"]) == b"other"
    (folder / "a.txt").write_bytes(b"longer")
    with pytest.raises(SourceChangedError, match="6 bytes long and was 5"):
        content(by_path["a.txt"])


def test_max_objects(folder: Path) -> None:
    uri = f"file://{folder}"
    assert len(expand(uri, max_objects=6)) == 6
    assert len(expand(uri, max_objects=0)) == 6
    with pytest.raises(ValueError, match="more than 5 files"):
        expand(uri, max_objects=5)


@pytest.mark.parametrize(
    "uri",
    [
        *("", "data/x", "/data/x", "file:data", "file:x/y", "file://host/path", "file://rel/path", "file://", "file:"),
        *(
            "file:///a\0b",
            "file:///a\nb",
            "http:",
            "http:///x",
            "https://",
            "http://[::1",
            "s3://",
            "s3:///key",
            "://x",
            "1a://x",
        ),
    ],
)
def test_malformed_uris(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand(uri)
    assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    uri = f"file://{tmp_path}/f"
    for name in ("../x", "/x", "a/../b", "."):
        with pytest.raises(InvalidNameError):
            expand(uri, name)
    with pytest.raises(UsageError, match="sha1"):
        expand(uri, algorithm="sha1")
    assert one(expand(uri, "./a//b")).path == "a/b"
    assert one(expand(f"FILE://localhost{tmp_path}/f")).path == "f"


def test_missing_and_unusual_files(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing-there"):
        expand(f"file://{tmp_path}/nothing-there")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "sock"))
        for uri in (f"file://{tmp_path}/fifo", f"file://{tmp_path}/sock", "file:///dev/zero", f"file://{tmp_path}"):
            for checksum in (True, False):
                with pytest.raises(UsageError, match="not a regular file"):
                    expand(uri, checksum=checksum)
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "link").symlink_to("nowhere")
    with pytest.raises(NotFoundError, match="link"):
        expand(f"file://{folder}")
    (folder / "link").unlink()
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff"))).touch()
    with pytest.raises(InvalidNameError, match="UTF-8"):
        expand(f"file://{folder}")


def test_changed_vanished_and_replaced_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 100)
    ref = one(expand(f"file://{path}")).ref
    source = open_reference(ref)
    path.write_bytes(b"x" * 99)
    with pytest.raises(SourceChangedError):
        b"".join(source.fetch(0, 10))
    path.unlink()
    with pytest.raises(SourceChangedError, match="no longer there"):
        b"".join(source.fetch(0, 10))
    os.mkfifo(path)
    with pytest.raises(SourceChangedError):
        b"".join(source.fetch(0, 10))
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(SourceChangedError):
        b"".join(source.fetch(0, 10))
    path.unlink()
    path.mkdir()
    with pytest.raises(SourceChangedError):
        b"".join(source.fetch(0, 10))


def test_hostile_file_references() -> None:
    for uri in ("file://host/etc/passwd", "file:relative"):
        with pytest.raises(UsageError):
            open_reference(Ref("x", uri, "", 10))
    with pytest.raises(UsageError, match="no size"):
        open_reference(Ref("x", "file:///etc/passwd", "", -1))
    with pytest.raises(SourceChangedError):
        content(Ref("x", "file:///proc/self/mem", "", 1 << 40), 0, 10)


# http(s)://


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer({"/d/f.bin": BIG, "/d/f.bin?x=1": b"query", "/": b"root", "/e": b""}) as server:
        yield server


def test_web(server: FaultServer) -> None:
    url = server.url("/d/f.bin")
    etag = server.etag("/d/f.bin") or ""
    entry = one(expand(url))
    assert entry == Expanded("f.bin", Ref("f.bin", url, etag.strip('"'), len(BIG), extra={"etag": etag}))
    assert [method for method, _, _ in server.seen] == ["GET"]
    assert content(entry.ref, 100, 2 * BLOCK) == BIG[100 : 100 + 2 * BLOCK]
    assert one(expand(server.url("/d/f.bin?x=1"))).path == "f.bin?x=1"
    assert one(expand(url, "a/b.bin")).path == "a/b.bin"
    with pytest.raises(UsageError, match="needs a name"):
        expand(server.url("/"))
    assert content(one(expand(server.url("/"), "root")).ref) == b"root"
    assert content(one(expand(server.url("/e"))).ref) == b""


def test_the_body_is_not_downloaded(server: FaultServer) -> None:
    server.contents["/huge"] = bytes(64 << 20)
    expand(server.url("/huge"))
    assert server.body_bytes < 16 << 20  # what the sockets' buffers held when the connection was closed


def test_weak_etag(server: FaultServer) -> None:
    server.faults.etag = 'W/"abc"'
    ref = one(expand(server.url("/d/f.bin"))).ref
    assert (ref.digest, ref.extra) == ('W/"abc"', {"etag": 'W/"abc"'})
    assert content(ref) == BIG


def test_no_etag(server: FaultServer) -> None:
    url = server.url("/d/f.bin")
    server.faults.etag = None
    ref = one(expand(url)).ref
    assert (ref.digest, ref.size) == (url, len(BIG))
    assert ref.extra == {"lastModified": "Tue, 14 Nov 2023 22:13:20 GMT"}
    assert content(ref) == BIG
    server.mtime += 5
    with pytest.raises(SourceChangedError):
        content(ref)


def test_no_validator_at_all_is_read_once(server: FaultServer) -> None:
    url = server.url("/d/f.bin")
    server.faults.etag, server.faults.modified = None, False
    entry = one(expand(url))
    found = fingerprint(BIG)
    assert (entry.ref.digest, entry.ref.extra, entry.ref.id, entry.block_list) == (url, {}, found.id, found.blocks)
    assert is_pinned(entry.ref)


def test_no_content_length_is_counted(server: FaultServer) -> None:
    server.faults.chunked = True
    entry = one(expand(server.url("/d/f.bin")))
    assert (entry.ref.size, entry.ref.id) == (len(BIG), fingerprint(BIG).id)
    assert entry.ref.extra == {"etag": server.etag("/d/f.bin")}
    assert content(entry.ref) == BIG


def test_web_without_checksum(server: FaultServer) -> None:
    url = server.url("/d/f.bin")
    ref = one(expand(url, checksum=False)).ref
    assert ref == Ref("f.bin", url, digest=url, size=-1)
    assert server.requests == 0
    assert not is_pinned(ref)
    pinned = resolve(ref)
    assert (pinned.size, pinned.extra) == (len(BIG), {"etag": server.etag("/d/f.bin")})
    assert content(pinned) == BIG
    assert resolve(pinned) is pinned
    server.faults.etag, server.faults.modified = None, False
    first, second = resolve(ref), resolve(ref)
    assert source_key(first) != source_key(second)  # nothing says that they are the same bytes
    with pytest.raises(SourceChangedError, match="was 10 when"):
        resolve(msgspec.structs.replace(ref, size=10))
    server.faults.chunked = True
    assert resolve(ref).size == len(BIG)


def test_web_errors(server: FaultServer) -> None:
    with pytest.raises(NotFoundError):
        expand(server.url("/nothing"))
    secret = server.url("/d/f.bin").replace("http://", "http://me:s3cret@")
    with pytest.raises(UsageError, match=r"\.netrc") as caught:
        expand(secret)
    assert "s3cret" not in str(caught.value)
    server.stop()
    with pytest.raises(NetworkError):
        expand(server.url("/d/f.bin"))


def test_changed_object(server: FaultServer) -> None:
    ref = one(expand(server.url("/d/f.bin"))).ref
    server.contents["/d/f.bin"] = BIG[::-1]
    for honour in (True, False):
        server.faults.honour_if_match = honour
        with pytest.raises(SourceChangedError):
            content(ref, 10, 10)


def test_no_ranges(server: FaultServer) -> None:
    ref = one(expand(server.url("/d/f.bin"))).ref
    server.faults.ranges = False
    with pytest.raises(WholeOnly) as caught:
        content(ref, 10, 10)
    assert b"".join(caught.value.stream) == BIG


# Others


def test_tracked_references() -> None:
    entry = one(expand("hdfs://cluster/path", "data/x"))
    assert entry == Expanded("data/x", Ref("x", "hdfs://cluster/path", digest="hdfs://cluster/path", size=-1))
    with pytest.raises(UsageError, match="needs a name"):
        expand("hdfs://cluster/path")
    for ref in (entry.ref, msgspec.structs.replace(entry.ref, size=10)):
        with pytest.raises(ValueError, match="not recognized"):
            open_reference(ref)
    with pytest.raises(ArtifactFSError, match="not recognized"):
        resolve(entry.ref)


def test_keys_tell_pins_apart() -> None:
    ref = Ref("n", "http://h/x", "d", 10, extra={"etag": '"d"'})
    others = [
        msgspec.structs.replace(ref, uri="http://h/y"),
        msgspec.structs.replace(ref, extra={"etag": '"e"'}),
        msgspec.structs.replace(ref, digest="e"),
        msgspec.structs.replace(ref, id=b"i" * 32),
    ]
    keys = [source_key(each) for each in [ref, *others]]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)
    assert source_key(msgspec.structs.replace(ref, name="other", executable=True)) == keys[0]


def test_requests_is_imported_by_need() -> None:
    """It costs a fifth of a second, which no mount without such references should pay."""
    code = "import sys, artifactfs.reader; sys.exit('requests' in sys.modules or 'urllib3' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
