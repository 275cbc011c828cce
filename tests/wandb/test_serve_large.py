"""Versions of very many entries through the server: their manifests up and down, and their pages, in bounded memory.

ARTIFACTFS_LONG_TESTS=1 makes it 1,000,000 entries, which take four minutes.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import requests
from serving_fixture import ClientProcess, WandbServer
from test_serve_operation import Uploader

COUNT = 1_000_000 if "ARTIFACTFS_LONG_TESTS" in os.environ else 20_000
MOST = 300 << 10
"""KiB that the server may have taken at most, for any number of entries."""

PAGES = """query Q($id: ID!, $after: String) { artifact(id: $id) { fileCount files(first: 5000, after: $after) {
  totalCount pageInfo { endCursor hasNextPage } edges { node { name directUrl sizeBytes } } }
  currentManifest { file { directUrl } } } }"""


def peak(server: WandbServer) -> int:
    """KiB of memory that the server has taken at most."""
    lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_very_many_entries(wandb_server: WandbServer, tmp_path: Path) -> None:
    uploader = Uploader({"0.txt": b"first", "z.txt": b"last"}, references=COUNT - 2)
    uploader.put(wandb_server)
    begun = time.monotonic()
    id = uploader.ask(wandb_server, _COMMIT, timeout=600, id=uploader.artifact)["artifact"]["id"]
    assert time.monotonic() - begun < COUNT / 800

    seen, after = [], None
    while True:
        artifact = uploader.ask(wandb_server, PAGES, id=id, after=after)
        files = artifact["files"]
        assert (artifact["fileCount"], files["totalCount"]) == (COUNT, COUNT)
        seen += [edge["node"]["name"] for edge in files["edges"]]
        if not files["pageInfo"]["hasNextPage"]:
            break
        after = files["pageInfo"]["endCursor"]
    assert len(seen) == len(set(seen)) == COUNT and seen == sorted(seen)

    manifest = requests.get(artifact["currentManifest"]["file"]["directUrl"], timeout=120).json()["contents"]
    assert list(manifest) == seen
    assert manifest["r/000007"] == {"digest": "etag-7", "ref": "s3://bucket/7", "size": 7}
    assert peak(wandb_server) < MOST

    client = ClientProcess(wandb_server, tmp_path)
    try:
        shown = client.run(
            tmp_path,
            """
import itertools, wandb
found = wandb.Api(timeout=120).artifact("acme/p/bikes:v0")
files = found.files(per_page=1000)
shown.update(count=len(files), names=[it.name for it in itertools.islice(files, 2500)], entries=len(found.manifest.entries),
             text=open(found.get_entry("z.txt").download()).read())
""",
            {},
            timeout=300,
        )
    finally:
        client.close()
    assert shown == {"count": COUNT, "names": seen[:2500], "entries": COUNT, "text": "last"}
    assert peak(wandb_server) < MOST


_COMMIT = "mutation M($id: ID!) { commitArtifact(input: {artifactID: $id}) { artifact { id digest } } }"
