"""Tests of what other tests rest on: the servers answer, and the proxy does to a link what it says."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.exceptions
import pytest
from botocore.config import Config
from proxy import Fault, Proxy
from servers import AzureServer, Bucket, GcsBucket

DATA = os.urandom(3 << 20)
FAILURES = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)


class Link:
    """A bucket with one object behind a proxy, and a client that asks once and waits a second at most."""

    def __init__(self, bucket: Bucket, proxy: Proxy) -> None:
        self.bucket, self.proxy = bucket, proxy
        config = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, read_timeout=1)
        self.client = boto3.client("s3", endpoint_url=proxy.url, config=config)
        self.put("k", DATA)
        proxy.reset()

    def get(self) -> bytes:
        answer = self.client.get_object(Bucket=self.bucket.name, Key="k", Range="bytes=0-")
        data: bytes = answer["Body"].read()
        return data

    def put(self, key: str, data: bytes, **parameters: Any) -> None:
        self.client.put_object(Bucket=self.bucket.name, Key=key, Body=data, **parameters)


@pytest.fixture
def link(bucket: Bucket) -> Iterator[Link]:
    with Proxy(bucket.server.url) as proxy:
        yield Link(bucket, proxy)


def test_requests_and_bytes_go_through_and_are_counted(link: Link) -> None:
    assert link.get() == DATA
    link.put("z", b"12345", ChecksumAlgorithm="SHA256")
    assert link.bucket.get("z") == b"12345"
    assert (link.proxy.count("GET"), link.proxy.count("PUT"), link.proxy.count(path="/k")) == (1, 1, 1)
    assert link.proxy.bytes_down == len(DATA)


def test_one_in_so_many_requests_fails(link: Link) -> None:
    link.proxy.add(Fault("status", every=2))
    assert link.get() == DATA
    with pytest.raises(botocore.exceptions.ClientError, match="503"):
        link.get()
    assert link.get() == DATA


@pytest.mark.parametrize("kind", ["cut", "stall", "swallow"])
def test_an_answer_does_not_arrive(link: Link, kind: Any) -> None:
    fault = link.proxy.add(Fault(kind, at=1 << 20, times=1))
    with pytest.raises(FAILURES):
        link.get()
    assert link.get() == DATA
    assert fault.done == 1


def test_an_answer_is_shorter_than_the_object(link: Link) -> None:
    link.proxy.add(Fault("truncate", at=1000, times=1))
    assert link.get() == DATA[:1000]
    assert link.get() == DATA


def test_a_byte_is_changed(link: Link) -> None:
    link.proxy.add(Fault("corrupt", at=1 << 20, times=1))
    got = link.get()
    assert [index for index in range(len(DATA)) if got[index] != DATA[index]] == [1 << 20]


def test_a_request_takes_effect_and_its_answer_is_lost(link: Link) -> None:
    link.proxy.add(Fault("swallow", method="PUT", header="If-None-Match", times=1))
    link.put("plain", b"1")
    with pytest.raises(FAILURES):
        link.put("z", b"1", IfNoneMatch="*")
    assert link.bucket.get("z") == b"1"


def test_a_request_breaks_on_its_way(link: Link) -> None:
    link.proxy.add(Fault("drop", method="PUT", at=5))
    with pytest.raises(FAILURES):
        link.put("z", b"1" * 100)
    assert link.bucket.keys() == ["k"]


def test_the_link_goes_and_comes_back(link: Link) -> None:
    link.proxy.refuse()
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        link.get()
    link.proxy.accept()
    assert link.get() == DATA


def test_the_link_is_slow(link: Link) -> None:
    link.proxy.latency, link.proxy.bandwidth = 0.1, 10 << 20
    began = time.monotonic()
    assert link.get() == DATA
    assert 0.35 <= time.monotonic() - began < 5


def test_versions_of_an_object(versioned_bucket: Bucket) -> None:
    first = versioned_bucket.put("k", b"1")["VersionId"]
    assert versioned_bucket.put("k", b"2")["VersionId"] != first


def test_gcs_answers(gcs_bucket: GcsBucket) -> None:
    assert int(gcs_bucket.put("x/y z", b"123")["generation"]) > 0


def test_azurite_answers(azurite: AzureServer) -> None:
    assert azurite.url.endswith(azurite.account)
