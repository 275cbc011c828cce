"""Signed URLs: what may be done with one object, until when, in the name of which key.

A URL's last part is ``<claims>.<signature>``: msgpack and HMAC-SHA-256 of it, both base64url. Whoever has the URL needs no key;
so it says method and object, ends soon, and is good for nothing once its key is removed or has lost the right. Nothing of it is
remembered: a URL that is used twice does twice the same thing, which for a read is the point, and for an upload leaves the same
bytes, because their MD5 is part of the claims.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from artifactfs.errors import NotPermittedError, from_os_error

Kind: TypeAlias = Literal["entry", "manifest", "upload", "part", "manifest-upload", "run-file"]

_MAX_TOKEN = 8192


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """``method`` on the object ``kind`` ``names`` until ``expires`` (seconds since the epoch) for the key ``caller``.

    ``md5``: base64 of what a body must have; ``digest``: the XXH128 that it must have. "" where nothing is demanded.
    """

    method: str
    kind: Kind
    names: tuple[str, ...]
    expires: int
    caller: str
    md5: str = ""
    digest: str = ""


class Signer:
    """Signs and checks with ``secret``. Threads may share one."""

    def __init__(self, secret: bytes, lifetime: int) -> None:
        self._secret = secret
        self.lifetime = lifetime
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Claims).decode

    def token(self, method: str, kind: Kind, names: tuple[str, ...], caller: str, md5: str = "", digest: str = "") -> str:
        """What ends a URL. It expires after the lifetime."""
        claims = self._encode(Claims(method, kind, names, int(time.time()) + self.lifetime, caller, md5, digest))
        return f"{_text(claims)}.{_text(self._mac(claims))}"

    def check(self, token: str, method: str) -> Claims:
        """The claims of a token that we signed and that is good for ``method`` now. NotPermittedError."""
        if len(token) > _MAX_TOKEN:
            raise NotPermittedError("the URL's signature is not valid")
        head, _, tail = token.partition(".")
        try:
            claims, mac = _data(head), _data(tail)
        except (binascii.Error, ValueError):
            raise NotPermittedError("the URL's signature is not valid") from None
        if not hmac.compare_digest(mac, self._mac(claims)):
            raise NotPermittedError("the URL's signature is not valid")
        found = self._decode(claims)
        if found.expires < time.time():
            raise NotPermittedError("the URL has expired; ask for a new one")
        if method != found.method and not (method == "HEAD" and found.method == "GET"):
            raise NotPermittedError(f"the URL is signed for {found.method}, not for {method}")
        return found

    def _mac(self, claims: bytes) -> bytes:
        return hmac.digest(self._secret, claims, hashlib.sha256)


def load_secret(path: Path) -> bytes:
    """The secret in the file at ``path``, which is made if it is not there."""
    try:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
            if len(secret) >= 32:
                return secret
            path.unlink()  # made by a process that died before it had written it
            return load_secret(path)
        secret = secrets.token_bytes(32)
        with open(descriptor, "wb") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        return secret
    except OSError as error:
        raise from_os_error(error, f"keeping the signing key in {path}") from None


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _data(text: str) -> bytes:
    """Only the one spelling that :func:`_text` gives: no two URLs are the same token."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _text(data) != text:
        raise ValueError("another spelling")
    return data
