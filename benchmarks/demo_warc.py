"""A crawl's WARC files in Common Crawl's layout, some places broken, and the truth
beside them."""

import gzip
import io
import json
import random
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

DATE = "2025-01-02T03:04:05Z"


@dataclass
class Capture:
    """One response to be written, and the truth about it."""

    url: str
    body: bytes
    truth: dict
    status: str = "200 OK"
    headers: list[tuple[str, str]] = field(
        default_factory=lambda: [("Content-Type", "text/html; charset=UTF-8")]
    )
    id: str = ""


def write(
    out: Path, captures: Iterable[Capture], rng: random.Random, files: int
) -> None:
    """The WARC files, each record a gzip member, and the truth beside them."""
    captures = list(captures)
    for capture in captures:
        capture.id = new_id(rng)
    rng.shuffle(captures)
    broken = {(i + 1) * len(captures) // 6 for i in range(5)}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "truth.jsonl", "w") as truth:
        for part in range(files):
            numbers = range(
                part * len(captures) // files, (part + 1) * len(captures) // files
            )
            with open(out / f"crawl-{part:05d}.warc.gz", "wb") as file:
                write_file(file, truth, captures, numbers, broken, rng)


def write_file(
    file, truth, captures, numbers: range, broken: set[int], rng: random.Random
) -> None:
    from warcio.warcwriter import WARCWriter

    writer = WARCWriter(file, gzip=True)
    software = {"software": "demo_crawl", "format": "WARC File Format 1.1"}
    writer.write_record(writer.create_warcinfo_record(Path(file.name).name, software))
    for number in numbers:
        capture = captures[number]
        if number in broken:
            damage = break_something(file, writer, sorted(broken).index(number))
            truth.write(json.dumps({"kind": "broken", "reason": damage}) + "\n")
        write_capture(writer, capture, rng)
        row = {"id": capture.id, "url": capture.url, **capture.truth}
        if isinstance(row.get("of"), Capture):
            row["of"] = row["of"].id
        truth.write(json.dumps(row) + "\n")


def new_id(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def write_capture(writer, capture: Capture, rng: random.Random) -> None:
    """Request, response and metadata, as Common Crawl has them."""
    from warcio.statusandheaders import StatusAndHeaders

    def record(kind: str, id_: str, payload: bytes, http=None, **more) -> None:
        headers = {"WARC-Record-ID": f"<urn:uuid:{id_}>", "WARC-Date": DATE, **more}
        writer.write_record(
            writer.create_warc_record(
                capture.url,
                kind,
                payload=io.BytesIO(payload),
                http_headers=http,
                warc_headers_dict=headers,
            )
        )

    target = re.match(r"https?://([^/]+)(.*)", capture.url)
    assert target is not None
    request = [("Host", target[1]), ("User-Agent", "demo"), ("Accept", "text/html")]
    line = StatusAndHeaders(
        f"GET {target[2] or '/'} HTTP/1.1", request, is_http_request=True
    )
    concurrent = {"WARC-Concurrent-To": f"<urn:uuid:{capture.id}>"}
    record("request", new_id(rng), b"", line, **concurrent)
    http = StatusAndHeaders(capture.status, capture.headers, protocol="HTTP/1.1")
    kind = "revisit" if capture.truth.get("reason") == "revisit" else "response"
    profile = "http://netpreserve.org/warc/1.1/revisit/identical-payload-digest"
    record(
        kind,
        capture.id,
        capture.body,
        http,
        **({"WARC-Profile": profile} if kind == "revisit" else {}),
    )
    record("metadata", new_id(rng), b"fetchTimeMs: 101\r\n", **concurrent)


def break_something(file, writer, number: int) -> str:
    """Write one place that no reader can make a record of."""
    page = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>" + b"lost words " * 200
    )
    head = b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: https://broken.example.com/\r\n"
    match number % 4:
        case 0:
            file.write(
                gzip.compress(head + b"Content-Length: %d\r\n\r\n" % len(page) + page)[
                    :-150
                ]
            )
            return "truncated member"
        case 1:
            file.write(b"\0 no gzip member at all \0" * 20)
            return "garbage"
        case 2:
            file.write(
                gzip.compress(
                    head + b"Content-Length: many\r\n\r\n" + page + b"\r\n\r\n"
                )
            )
            return "bad Content-Length"
        case _:
            file.write(
                gzip.compress(
                    head + b"Content-Length: 99999\r\n\r\n" + page + b"\r\n\r\n"
                )
            )
            return "Content-Length too large"
