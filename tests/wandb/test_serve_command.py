"""``artifactfs serve`` as a command: what it prints, how it ends, and its keys."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
import requests
from programs import Program
from serving_fixture import PROGRAM, WandbServer, start_server


def test_keys(afs: Program, tmp_path: Path) -> None:
    where = ("--data-dir", tmp_path / "data")
    key = afs("serve", "key", "add", "alice", "--entity", "acme:write", "--entity", "other", *where).out.strip()
    assert len(key) == 40 and set(key) <= set("0123456789abcdef")
    shown = afs("serve", "key", "add", "bob", "--entity", "*", "--write", *where, "--json").document
    assert (shown["name"], shown["grants"]) == ("bob", {"*": "write"})
    listed = afs("serve", "key", "list", *where, "--json").document
    assert [(row["name"], row["grants"]) for row in listed] == [
        ("alice", {"acme": "write", "other": "read"}),
        ("bob", {"*": "write"}),
    ]
    stored = tmp_path / "data/keys.json"
    assert stored.stat().st_mode & 0o777 == 0o600 and key not in stored.read_text()
    afs("serve", "key", "add", "alice", "--entity", "x", *where, code=4)
    afs("serve", "key", "add", "a b", "--entity", "x", *where, code=2)
    afs("serve", "key", "add", "carol", "--entity", "x:own", *where, code=2)
    afs("serve", "key", "remove", "alice", *where)
    afs("serve", "key", "remove", "alice", *where, code=3)
    stored.chmod(0o644)
    afs("serve", "key", "list", *where, code=7)


def test_one_server_has_a_data_directory(wandb_server: WandbServer, tmp_path: Path) -> None:
    port = wandb_server.url.rpartition(":")[2]
    for options, code, text in (
        (["--port", "0", "--data-dir", str(wandb_server.data)], 4, "another server uses"),
        (["--port", port, "--data-dir", str(tmp_path / "elsewhere")], 2, "cannot listen"),
        (["--port", "0", "--data-dir", str(tmp_path / "d"), "--tls-cert", "/nowhere.pem"], 3, "nowhere.pem"),
    ):
        done = subprocess.run(
            [*PROGRAM, "--store", wandb_server.store, "serve", *options], capture_output=True, text=True, timeout=30
        )
        assert (done.returncode, text in done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_what_is_under_way_is_done(tmp_path: Path, how: signal.Signals) -> None:
    with start_server(str(tmp_path / "store"), tmp_path / "data") as server:
        body = json.dumps({"query": "{ viewer { username } }"}).encode()
        host, port = server.host.split(":")
        auth = requests.auth._basic_auth_str("api", server.key)
        head = f"POST /graphql HTTP/1.1\r\nHost: x\r\nAuthorization: {auth}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head + body[:5])
            while not server.lines():  # it has begun: the first line of another request shows that the server is alive
                urllib.request.urlopen(server.url + "/healthz", timeout=10).read()
            server.process.send_signal(how)
            connection.sendall(body[5:])
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
            assert b'"everything"' in answer
        assert server.process.wait(30) == 0
        assert not server.tracebacks()
