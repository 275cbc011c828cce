"""What ``docs/serve.md`` shows, run in order: in the shell, and by the real client."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import needs_fuse
from serving_fixture import client_environment
from test_serve_operation import certificate, until

PAGE = Path(__file__).parents[2] / "docs/serve.md"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@needs_fuse
@pytest.mark.fuse
def test_examples(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    program = tmp_path / "bin/artifactfs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m artifactfs.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "photos/more").mkdir(parents=True)
    (tmp_path / "photos/1.jpg").write_bytes(os.urandom(5000))
    (tmp_path / "photos/more/2.jpg").write_bytes(b"photo")
    certificate(tmp_path, "made")
    (tmp_path / "made.pem").rename(tmp_path / "chain.pem")
    (tmp_path / "made.key").rename(tmp_path / "key.pem")
    places = {"/srv/artifacts": str(tmp_path / "store"), "8080": str(free_port()), "8443": str(free_port())}
    environ = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    client: dict[str, str] = {}
    servers: list[subprocess.Popen[bytes]] = []
    said: dict[str, str] = {}
    try:
        for kind, text in re.findall(r"^```(bash|python)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
            for shown, real in places.items():
                text = text.replace(shown, real)
            if kind == "python":
                run = [sys.executable, "-c", text]
                home = client_environment(tmp_path / "home", client["WANDB_BASE_URL"], client["WANDB_API_KEY"])
                done = subprocess.run(run, cwd=tmp_path, env=home, capture_output=True, text=True, timeout=100)
                assert done.returncode == 0, done.stderr
                assert done.stdout.strip().endswith("downloaded")
                continue
            for line in text.splitlines():
                words = shlex.split(line) if "<" not in line else []
                if line.startswith("export "):
                    name, _, value = line.removeprefix("export ").partition("=")
                    client[name] = value.replace("<the key>", said["alice"])
                elif line.startswith("pip "):
                    continue
                elif "--port" in words:
                    log = tmp_path / f"server-{len(servers)}.log"
                    with log.open("wb") as errors:
                        if servers:  # one server has the data directory
                            words += ["--data-dir", str(tmp_path / "another")]
                        servers.append(subprocess.Popen(words, cwd=tmp_path, env=environ, stdout=errors, stderr=errors))
                    until(lambda log=log: b"serving " in log.read_bytes(), 30)  # type: ignore[misc]
                else:
                    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60)
                    assert done.returncode == 0, (line, done.stderr)
                    said[words[words.index("add") + 1] if "add" in words else words[-1]] = done.stdout.strip()
        assert len(servers) == 2
        assert "acme (read), builds (write)" in said["list"]
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            assert server.wait(40) == 0
