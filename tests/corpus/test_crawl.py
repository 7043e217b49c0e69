"""Documents come out of crawl archives, and out of broken ones what can be saved."""

import gzip
import io
import zlib
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from warcio.archiveiterator import ArchiveIterator
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from maxlm.corpus.crawl import RawDocument, read_warc

HTML = b"<html><p>Boats come back early.</p></html>"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"


def record(
    number: int, block: bytes, kind: str = "response", length: object = None
) -> bytes:
    media = {"response": "application/http; msgtype=response", "resource": "text/html"}
    head = {
        "WARC-Type": kind,
        "WARC-Record-ID": f"<urn:uuid:{number}>",
        "WARC-Target-URI": f"http://example.org/{number}",
        "WARC-Date": "2025-01-02T03:04:05Z",
        "Content-Type": media.get(kind, "text/plain"),
        "Content-Length": len(block) if length is None else length,
    }
    lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
    return b"WARC/1.0\r\n" + lines.encode() + b"\r\n" + block + b"\r\n\r\n"


def page(
    number: int, body: bytes = b"", head: bytes = HEAD, length: object = None
) -> bytes:
    return record(number, head + (body or HTML + b"%d" % number), length=length)


def read(
    path: Path, data: bytes, max_record_bytes: int = 1 << 24
) -> tuple[list[RawDocument], Counter[str]]:
    """The documents of an archive of these bytes, and how many were skipped, by
    reason."""
    path.write_bytes(data)
    counts: Counter[str] = Counter()

    def count_skip(reason: str) -> None:
        counts[reason] += 1

    documents = list(read_warc(path, count_skip, max_record_bytes))
    return documents, counts


def ids(documents: list[RawDocument]) -> list[str]:
    return [document.id for document in documents]


def common_crawl() -> bytes:
    """An archive in Common Crawl's layout, written by warcio."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)
    info = writer.create_warcinfo_record("a.warc.gz", {"software": "test"})
    writer.write_record(info)
    answers = [
        ("200 OK", "text/html", HTML),
        ("404 Not Found", "text/html", HTML),
        ("200 OK", "image/png", b"\x89PNG"),
        ("200 OK", "application/xhtml+xml; charset=koi8-r", HTML),
        ("301 Moved", "text/html", b""),
        ("200 OK", "text/html", b""),
        ("200 OK", "text/plain", b"robots"),
    ]
    for number, (status, media, body) in enumerate(answers):
        url = f"http://example.org/{number}?a=b"
        line = StatusAndHeaders("GET / HTTP/1.1", [], is_http_request=True)
        answer = StatusAndHeaders(
            status, [("Content-Type", media)], protocol="HTTP/1.1"
        )
        for kind, http in (("request", line), ("response", answer), ("metadata", None)):
            payload = io.BytesIO(body if kind == "response" else b"")
            warc_record = writer.create_warc_record(
                url, kind, payload, http_headers=http
            )
            writer.write_record(warc_record)
    profile = "http://netpreserve.org/warc/1.0/revisit/identical-payload-digest"
    revisit = writer.create_warc_record(
        "http://example.org/0",
        "revisit",
        http_headers=StatusAndHeaders("200 OK", [], protocol="HTTP/1.1"),
        warc_headers_dict={"WARC-Profile": profile},
    )
    writer.write_record(revisit)
    return out.getvalue()


def test_common_crawl_layout_is_read_as_by_warcio(tmp_path):
    documents, counts = read(tmp_path / "a.warc.gz", common_crawl())
    records = list(ArchiveIterator(io.BytesIO(common_crawl())))
    kinds = Counter(record.rec_type for record in records)
    assert counts == {
        "warcinfo": kinds["warcinfo"],
        "request": kinds["request"],
        "metadata": kinds["metadata"],
        "revisit": 1,
        "status": 2,
        "not_html": 2,
        "empty": 1,
    }
    assert len(documents) + counts.total() == len(records)
    first, second = documents
    assert first.url == "http://example.org/0?a=b"
    assert first.html == HTML
    assert first.text is None
    assert [len(part) for part in first.id.split("-")] == [8, 4, 4, 4, 12]
    assert first.meta["content_type"] == "text/html"
    assert first.meta["date"].endswith("Z")
    assert second.meta["charset"] == "koi8-r"


def test_extracted_texts_and_resources(tmp_path):
    wet = record(1, "Wörter\0 und mehr".encode(), "conversion")
    resource = record(2, HTML, "resource")
    documents, counts = read(
        tmp_path / "a.wet", wet + resource + record(3, b" \n", "conversion")
    )
    assert [(d.text, d.html) for d in documents] == [
        ("Wörter und mehr", None),
        (None, HTML),
    ]
    assert counts == {"empty": 1}


def packed(coding: bytes, body: bytes) -> bytes:
    return HEAD[:-2] + b"Content-Encoding: " + coding + b"\r\n\r\n" + body


def chunked(body: bytes) -> bytes:
    parts = (body[:7], body[7:], b"")
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


RAW_DEFLATE = zlib.compress(HTML)[2:-4]
CODED = {
    "gzip": packed(b"gzip", gzip.compress(HTML)),
    "zlib": packed(b"deflate", zlib.compress(HTML)),
    "raw deflate": packed(b"deflate", RAW_DEFLATE),
    "zstd": packed(b"zstd", zstandard.compress(HTML)),
    "twice": packed(b"deflate, gzip", gzip.compress(zlib.compress(HTML))),
    "decoded before": packed(b"gzip", HTML),
    "unknown": packed(b"whatever", HTML),
    "chunked": HEAD[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(HTML),
    "chunked gzip": HEAD[:-2]
    + b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n"
    + chunked(gzip.compress(HTML)),
    "line feeds": HEAD.replace(b"\r\n", b"\n") + HTML,
    "no type": b"HTTP/1.0 200 OK\r\n\r\n" + HTML,
}


@pytest.mark.parametrize("name", CODED)
def test_http_codings_are_undone(tmp_path, name):
    documents, counts = read(tmp_path / "a.warc", record(1, CODED[name]))
    assert [document.html for document in documents] == [HTML]
    assert not counts


def test_undecodable_bodies_are_broken(tmp_path):
    not_gzip = record(1, packed(b"gzip", b"\x00\x01\x02 not gzip"))
    not_http = record(2, b"ICY 200 OK\r\n\r\n")
    documents, counts = read(tmp_path / "a.warc", not_gzip + not_http + page(3))
    assert ids(documents) == ["3"]
    assert counts == {"broken": 2}


def members(*records: bytes) -> list[bytes]:
    return [gzip.compress(record) for record in records]


A, B, C = members(page(1), page(2), page(3))
BROKEN = {  # name: data, the documents that are left
    "cut at the end": (A + B + C[:-30], "12"),
    "cut amid": (A + B[:-30] + C, "13"),
    "garbage between": (A + b"garbage \0" * 30 + C, "13"),
    "length too large": (A + gzip.compress(page(2, length=500)) + C, "13"),
    "length no number": (A + gzip.compress(page(2, length="many")) + C, "13"),
    "plain, length too large": (
        page(1) + page(2, length=500) + page(3) + page(4),
        "134",
    ),
    "plain, length of two": (
        page(1)
        + page(2, length=len(HEAD + HTML) + 1 + len(page(3)))
        + page(3)
        + page(4),
        "134",
    ),
    "zstd, cut amid": (
        zstandard.compress(page(1))
        + zstandard.compress(page(2))[:-30]
        + zstandard.compress(page(3)),
        "13",
    ),
    "nothing": (b"", ""),
    "no archive": (b"hello\n" * 9, ""),
    "magic numbers": (b"\x1f\x8b\x08" * 9999, ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_around_a_broken_place_is_read(tmp_path, name):
    data, left = BROKEN[name]
    documents, counts = read(tmp_path / "a.warc.gz", data)
    assert "".join(ids(documents)) == left
    assert counts == {"broken": 1}


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 5), st.data())
def test_damage_in_one_member_costs_no_other(tmp_path_factory, number, data):
    pages = [page(i, b"<p>%d" % i * 50) for i in range(6)]
    archive = members(*pages)
    member = bytearray(archive[number])
    start = data.draw(st.integers(0, len(member) - 1))
    damage = data.draw(st.binary(min_size=1, max_size=40))
    num_replaced = data.draw(st.integers(0, 60))
    member[start : start + num_replaced] = damage
    archive[number] = bytes(member)
    documents, _ = read(tmp_path_factory.getbasetemp() / "a.warc.gz", b"".join(archive))
    html_by_id = {document.id: document.html for document in documents}
    for i in set(range(6)) - {number}:
        assert html_by_id[str(i)] == b"<p>%d" % i * 50


def bomb(start: bytes, megabytes: int) -> bytes:
    pack = zlib.compressobj(9, wbits=31)
    zeros = bytes(1 << 20)
    return (
        pack.compress(start)
        + b"".join(pack.compress(zeros) for _ in range(megabytes))
        + pack.flush()
    )


def test_bombs_do_not_go_off(tmp_path):
    limit = 1 << 20
    in_http = gzip.compress(record(1, packed(b"gzip", bomb(b"<p>", 64))))
    both_codings = b"Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n"
    chunked_bomb = HEAD[:-2] + both_codings + chunked(bomb(b"<p>", 64))
    in_both = gzip.compress(record(2, chunked_bomb))
    # The record's block goes on: the two line ends that would close it are cut off.
    as_member = bomb(record(3, b"", length=2 << 30)[:-4], 64)
    data = in_http + in_both + as_member + A
    documents, counts = read(tmp_path / "a.warc.gz", data, max_record_bytes=limit)
    assert [(d.id, d.html) for d in documents] == [("1", HTML + b"1")]
    assert counts == {"too_large": 3}
