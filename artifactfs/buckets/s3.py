"""Buckets of S3 and of what speaks its protocol. boto3 resolves configuration and credentials as all AWS tools do, lists,
deletes, copies and sends parts; obstore reads and writes whole objects. Where that cannot go (``rust.py``), boto3 does."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import boto3.session
import botocore.config
import botocore.exceptions
from obstore.store import S3Store

from artifactfs.attempts import CONNECT_TIMEOUT, READ_TIMEOUT, TransientError
from artifactfs.buckets.rust import ONCE, STAMP, Wire, client_options, speakable, usable
from artifactfs.buckets.service import Answer, Data, NotPartialError, Pin, Stat, explained, opaque, quoted
from artifactfs.errors import NetworkError, NotFoundError, NotPermittedError, UsageError, from_os_error
from artifactfs.forking import new_lock

_TOKEN_LIFE = datetime.timedelta(minutes=30)  # boto3 is asked again after this: it knows when credentials must be renewed
_CONNECTIONS = 64  # kept: more streams than a mount ever has in flight
_COPY_AT_ONCE = 5 << 30  # CopyObject's limit
_COPY_PART = 1 << 30
_NO_CREDENTIALS = "no credentials are found; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


class S3Service:
    """As the protocol says. For any thread, and any process forked from this one."""

    def __init__(self, name: str, options: Mapping[str, str], deadline: float) -> None:
        self.url = f"s3://{name}"
        self._name = name
        self._options = options
        self._deadline = deadline
        self._lock = new_lock()
        self._clients: _Clients | None = None
        self._encryption = _encryption(options)

    def head(self, key: str, version: str) -> Stat:
        clients = self._current()
        if clients.wire is not None and usable() and speakable(key):
            return clients.wire.head(key, version)
        with _Mapped(self._where(key)):
            found = clients.control.head_object(**self._object(key), **_version(version))
        return _stat(key, found, found["ContentLength"])

    def get(self, key: str, span: tuple[int, int] | None, pin: Pin) -> Answer:
        clients = self._current()
        if clients.wire is not None and usable() and speakable(key):
            with contextlib.suppress(NotPartialError):  # some services do answer with the range, but with status 200
                return clients.wire.get(key, span, pin)
        return self._get(clients.control, key, span, pin)

    def _get(self, control: Any, key: str, span: tuple[int, int] | None, pin: Pin) -> Answer:
        conditions = _version(pin.version)
        if span is not None:
            conditions["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if pin.etag and not pin.etag.startswith("W/"):
            conditions["IfMatch"] = quoted(pin.etag)
        with _Mapped(self._where(key)):
            found = control.get_object(**self._object(key), **conditions)
        start, end, size = _range(found)
        stamp = found.get("Metadata", {}).get(STAMP, "")
        return Answer(_stat(key, found, size), start, end, stamp, self._pieces(key, found["Body"]))

    def _pieces(self, key: str, body: Any) -> Iterator[bytes]:
        try:
            with _Mapped(self._where(key)):
                yield from body.iter_chunks(256 << 10)
        finally:
            body.close()

    def put(self, key: str, data: Data, match: str | None, stamp: str) -> str:
        clients = self._current()
        if clients.wire is not None and usable() and speakable(key):
            return clients.wire.put(key, data, match, stamp)
        condition = {} if match is None else {"IfMatch": match} if match else {"IfNoneMatch": "*"}
        metadata = {"Metadata": {STAMP: stamp}} if stamp else {}
        with _Mapped(self._where(key)):
            body = data if isinstance(data, bytes) else bytes(data)
            made = clients.control.put_object(**self._object(key), Body=body, **condition, **metadata, **self._encryption)
        return quoted(made.get("ETag"))

    def listing(self, prefix: str, resume: str) -> Iterator[tuple[Sequence[Stat], str]]:
        while True:
            following = {"ContinuationToken": resume} if resume else {}
            with _Mapped(self._where(prefix)):
                page = self._current().control.list_objects_v2(Bucket=self._name, Prefix=prefix, **following)
            resume = page.get("NextContinuationToken", "")
            yield [_stat(item["Key"], item, item["Size"]) for item in page.get("Contents", ())], resume
            if not page.get("IsTruncated") or not resume:
                return

    def folders(self, prefix: str) -> Sequence[str]:
        found: list[str] = []
        following: dict[str, str] = {}
        while True:
            with _Mapped(self._where(prefix)):
                page = self._current().control.list_objects_v2(Bucket=self._name, Prefix=prefix, Delimiter="/", **following)
            found += (item["Prefix"][len(prefix) : -1] for item in page.get("CommonPrefixes", ()))
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return [name for name in found if name]
            following = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        with _Mapped(self._where(key)):
            self._current().control.delete_object(**self._object(key))

    def touch(self, key: str) -> None:
        stat = self.head(key, "")
        if stat.size > _COPY_AT_ONCE:
            self._copy_in_parts(key, stat)
            return
        source = {"Bucket": self._name, "Key": key}
        with _Mapped(self._where(key)):
            # REPLACE: S3 refuses to copy an object onto itself unless something of it changes.
            self._current().control.copy_object(
                **self._object(key), CopySource=source, MetadataDirective="REPLACE", **self._encryption
            )

    def _copy_in_parts(self, key: str, stat: Stat) -> None:
        upload = self.multipart(key)
        try:
            for number, start in enumerate(range(0, stat.size, _COPY_PART)):
                upload.copy(number, start, min(start + _COPY_PART, stat.size), stat.etag)
            upload.complete()
        except BaseException:
            upload.abort()
            raise

    def multipart(self, key: str) -> _Upload:
        with _Mapped(self._where(key)):
            made = self._current().control.create_multipart_upload(**self._object(key), **self._encryption)
        return _Upload(self, key, made["UploadId"])

    def drop_uploads(self, prefix: str, before: float) -> int:
        dropped = 0
        following: dict[str, str] = {}
        while True:
            with _Mapped(self._where(prefix)):
                page = self._current().control.list_multipart_uploads(Bucket=self._name, Prefix=prefix, **following)
            for item in page.get("Uploads", ()):
                if item["Initiated"].timestamp() < before:
                    _Upload(self, item["Key"], item["UploadId"]).abort()
                    dropped += 1
            if not page.get("IsTruncated"):
                return dropped
            following = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def older(self, key: str, etag: str) -> str:
        following: dict[str, str] = {}
        while True:
            with _Mapped(self._where(key)):
                page = self._current().control.list_object_versions(Bucket=self._name, Prefix=key, **following)
            versions = page.get("Versions", ())
            for item in versions:
                if item["Key"] == key and opaque(item["ETag"]) == opaque(etag):
                    return str(item["VersionId"])
            # The key itself comes before those that it is the beginning of.
            if not page.get("IsTruncated") or (versions and versions[-1]["Key"] != key):
                return ""
            following = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page.get("NextVersionIdMarker", "")}

    def token(self, stat: Stat) -> str:
        return stat.etag

    def credentials(self) -> str:
        with _Mapped(self.url):
            return self._current().method()

    def renew(self) -> bool:
        with self._lock:
            before = self._clients.frozen() if self._clients is not None else None
            self._clients = self._connect()
            now = self._clients.frozen()
        if now is None:
            raise NotPermittedError(f"{self.url}: the service refuses access, and {_NO_CREDENTIALS}")
        return now != before

    def _current(self) -> _Clients:
        """This process's connections; a forked child must not use its parent's."""
        clients = self._clients
        if clients is not None and clients.process == os.getpid():
            return clients
        with self._lock:
            if self._clients is None or self._clients.process != os.getpid():
                self._clients = self._connect()
            return self._clients

    def _connect(self) -> _Clients:
        with _Mapped(self.url):
            return _Clients(self._name, self._options, self._deadline)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._name, "Key": key}

    def _where(self, key: str) -> str:
        return f"{self.url}/{key}"


class _Clients:
    """What talks to the service: ``control`` is boto3's client; ``wire`` is None where obstore has nothing to sign with or to."""

    def __init__(self, name: str, options: Mapping[str, str], deadline: float) -> None:
        self.process = os.getpid()
        session = boto3.session.Session(profile_name=options.get("profile"), region_name=options.get("region"))
        credentials = session.get_credentials()
        self._credentials = credentials
        unsigned: dict[str, Any] = {} if credentials else {"signature_version": botocore.UNSIGNED}
        self.control = session.client(
            "s3",
            endpoint_url=options.get("endpoint_url"),
            region_name=session.region_name or "us-east-1",
            config=botocore.config.Config(
                connect_timeout=min(CONNECT_TIMEOUT, deadline),
                read_timeout=min(READ_TIMEOUT, deadline / 2),
                retries={"total_max_attempts": 1},  # only the bucket retries
                max_pool_connections=_CONNECTIONS,
                # The signature covers the body, which every service checks; the newer checksums not all of them know.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                user_agent_extra="artifactfs",
                **unsigned,
                s3={**_path_style(session, options), "payload_signing_enabled": True},
            ),
        )
        self.wire = Wire(self._store(name, options, deadline), f"s3://{name}")

    def frozen(self) -> object:
        """The credentials in force, to compare."""
        return self._credentials and self._credentials.get_frozen_credentials()

    def method(self) -> str:
        """How boto3 found the credentials; "" for none."""
        return f"found by boto3 ({self._credentials.method})" if self.frozen() is not None else ""

    def _store(self, name: str, options: Mapping[str, str], deadline: float) -> S3Store:
        meta = self.control.meta
        virtual = meta.config.s3.get("addressing_style") == "virtual"
        scheme, _, host = meta.endpoint_url.partition("://")
        endpoint = f"{scheme}://{name}.{host}" if virtual else meta.endpoint_url
        config: dict[str, Any] = {
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": meta.region_name,
            "virtual_hosted_style_request": virtual,
            "skip_signature": self._credentials is None,
        }
        if options.get("sse"):
            config["server_side_encryption"] = options["sse"]
        if options.get("sse_kms_key_id"):
            config["sse_kms_key_id"] = options["sse_kms_key_id"]
        return S3Store(
            name,
            config=config,  # type: ignore[arg-type]  # a TypedDict, made in steps
            client_options=client_options(deadline, _certificates()),
            retry_config=ONCE,
            credential_provider=self._credential if self._credentials is not None else None,  # type: ignore[arg-type]
        )

    def _credential(self) -> dict[str, Any]:
        """What obstore signs with. boto3 renews what is about to expire."""
        frozen = self._credentials.get_frozen_credentials()
        refreshable = getattr(self._credentials, "refresh_needed", None) is not None
        expires = datetime.datetime.now(datetime.UTC) + _TOKEN_LIFE if refreshable else None
        known = getattr(self._credentials, "_expiry_time", None)  # where boto3 keeps it; it has no public name
        if expires is not None and isinstance(known, datetime.datetime):
            expires = min(expires, known)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": expires,
        }


class _Upload:
    """A multipart upload. Any part may be sent again, as may the completion."""

    ordered = False

    def __init__(self, service: S3Service, key: str, id: str) -> None:
        self._service = service
        self._key = key
        self._id = id
        self._parts: dict[int, str] = {}

    def part(self, number: int, data: Data) -> None:
        body = data if isinstance(data, (bytes, bytearray)) else bytes(data)
        made = self._call("upload_part", PartNumber=number + 1, Body=body)
        self._parts[number] = made["ETag"]

    def copy(self, number: int, start: int, end: int, etag: str) -> None:
        """A part that is a range of the object that is there now, whose ETag must be ``etag``."""
        source = {"Bucket": self._service._name, "Key": self._key}
        span = f"bytes={start}-{end - 1}"
        made = self._call(
            "upload_part_copy", PartNumber=number + 1, CopySource=source, CopySourceRange=span, CopySourceIfMatch=etag
        )
        self._parts[number] = made["CopyPartResult"]["ETag"]

    def complete(self) -> None:
        parts = [{"PartNumber": number + 1, "ETag": etag} for number, etag in sorted(self._parts.items())]
        try:
            self._call("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except NotFoundError:
            # No such upload any more: an attempt whose answer was lost has completed it, if the object is one of so many parts.
            found = self._service.head(self._key, "")
            if not opaque(found.etag).endswith(f"-{len(parts)}"):
                raise

    def abort(self) -> None:
        with contextlib.suppress(NotFoundError):  # aborted already
            self._call("abort_multipart_upload")

    def _call(self, name: str, **arguments: Any) -> Any:
        action: Callable[..., Any] = getattr(self._service._current().control, name)
        with _Mapped(self._service._where(self._key)):
            return action(**self._service._object(self._key), UploadId=self._id, **arguments)


class _Mapped:
    """boto3's exceptions become those of ``service.py``."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, botocore.exceptions.ClientError):
            code = error.response.get("Error", {}).get("Code", "")
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code == "NoSuchUpload":
                raise NotFoundError(f"{self._where} is not being uploaded any more") from None
            raise explained(status, "" if code.isdigit() else code, self._where) from None
        if isinstance(error, (botocore.exceptions.BotoCoreError, boto3.exceptions.Boto3Error)):
            raise _explained(error, self._where) from None


def _explained(error: Exception, where: str) -> Exception:
    """The error for one of botocore's own, whose text may hold URLs."""
    kinds = botocore.exceptions
    if isinstance(error, kinds.SSLError):
        return NetworkError(f"{where}: the TLS connection failed; check the endpoint, and set AWS_CA_BUNDLE for your own CA")
    if isinstance(error, (kinds.HTTPClientError, kinds.ConnectionError, kinds.IncompleteReadError, kinds.ResponseStreamingError)):
        return TransientError("no answer" if not isinstance(error, kinds.ReadTimeoutError) else "no answer in time")
    if isinstance(error, (kinds.NoCredentialsError, kinds.PartialCredentialsError)):
        return NotPermittedError(f"{where}: {_NO_CREDENTIALS}")
    if isinstance(error, kinds.ProfileNotFound):
        return UsageError(f"{where}: the AWS profile is not known; check AWS_PROFILE and ~/.aws/config")
    if "Token" in type(error).__name__ or "Credential" in type(error).__name__ or "SSO" in type(error).__name__:
        text = f"{where}: the credentials cannot be had ({type(error).__name__}); log in again (aws sso login), then try again"
        return NotPermittedError(text)
    return UsageError(f"{where}: the request cannot be made ({type(error).__name__}); check bucket, region and endpoint")


def _encryption(options: Mapping[str, str]) -> dict[str, str]:
    """What every write carries."""
    sse, key = options.get("sse", ""), options.get("sse_kms_key_id", "")
    if sse not in ("", "AES256", "aws:kms"):
        raise UsageError(f"sse={sse!r} is not known; write AES256 or aws:kms")
    if key and sse != "aws:kms":
        raise UsageError("sse_kms_key_id goes with sse=aws:kms only")
    fields = {"ServerSideEncryption": sse, "SSEKMSKeyId": key}
    return {name: value for name, value in fields.items() if value}


def _path_style(session: boto3.session.Session, options: Mapping[str, str]) -> dict[str, str]:
    """Path style unless the configuration says otherwise: it works with every service, and with dots in a bucket's name."""
    scoped = session._session.get_scoped_config().get("s3")  # boto3 shows it nowhere else
    style = scoped.get("addressing_style", "path") if isinstance(scoped, dict) else "path"
    return {"addressing_style": style}


def _certificates() -> bytes:
    """The CA bundle that the environment names, beside those of the system."""
    path = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if not path:
        return b""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise from_os_error(error, f"reading the CA bundle {path}") from None


def _version(version: str) -> dict[str, str]:
    return {"VersionId": version} if version else {}


def _stat(key: str, found: Mapping[str, Any], size: int) -> Stat:
    version = found.get("VersionId", "")
    return Stat(key, size, quoted(found.get("ETag")), "" if version == "null" else version, found["LastModified"].timestamp())


def _range(found: Mapping[str, Any]) -> tuple[int, int, int]:
    """(start, end, size of the whole object) of an answer."""
    told = found.get("ContentRange")
    if not told:
        return 0, found["ContentLength"], found["ContentLength"]
    span, _, size = told.removeprefix("bytes ").partition("/")
    start, _, last = span.partition("-")
    try:
        return int(start), int(last) + 1, int(size)
    except ValueError:
        raise TransientError("the answer tells no range") from None
