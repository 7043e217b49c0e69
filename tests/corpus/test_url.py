"""Addresses are told apart by registered domain, and blocked by lists."""

import gzip
from collections.abc import Sequence

import pyarrow as pa
import pytest

from maxlm.corpus.stages.url import UrlStage


def look(stage: UrlStage, urls: Sequence[str | None]) -> list[dict]:
    batch = pa.RecordBatch.from_arrays([pa.array(urls, pa.string())], ["url"])
    labels = stage.make_batch_label_fn()(batch)
    assert labels.schema == stage.schema()
    return labels.to_pylist()


HOSTS = {  # url: (host, registered domain)
    "https://user:word@www.Example.co.uk:8080/x": (
        "www.example.co.uk",
        "example.co.uk",
    ),
    "http://a.b.city.kawasaki.jp/": ("a.b.city.kawasaki.jp", "city.kawasaki.jp"),
    "http://example.com.": ("example.com", "example.com"),
    "example.com/path": ("example.com", "example.com"),
    "http://münchen.de/": ("xn--mnchen-3ya.de", "xn--mnchen-3ya.de"),
    "http://127.0.0.1:80/": ("127.0.0.1", None),
    "http://[2001:db8::1]:80/": ("2001:db8::1", None),
    "http://localhost/x": ("localhost", None),
    "http://co.uk/": ("co.uk", None),
    "http://[bad/": (None, None),
    "http://a b.com/": (None, None),
    "javascript:alert(1)": (None, None),
    f"http://{'a.' * 120}example.com/": (f"{'a.' * 120}example.com", "example.com"),
    f"http://{'a.' * 130}example.com/": (None, None),
}


def test_hosts_and_registered_domains():
    rows = look(UrlStage(), list(HOSTS))
    assert {
        u: (row["host"], row["domain"]) for u, row in zip(HOSTS, rows, strict=True)
    } == HOSTS
    assert not any(row["blocked"] for row in rows)


@pytest.fixture
def lists(tmp_path) -> UrlStage:
    def write(name: str, text: str) -> tuple[str, ...]:
        path = tmp_path / name
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return (str(path),)

    return UrlStage(
        domains=write(
            "domains.gz",
            "# sites\nbad.com\n\n0.0.0.0 ads.good.com # hosts\nMÜNCHEN.de\n",
        ),
        words=write("words", "Casino\nказино\n"),
        subwords=write("subwords", "viagra\nc++\n"),
        soft_words=write("soft", "poker\nbonus\nslots\n"),
        nsfw=False,
    )


RULES = {
    "http://bad.com/": "domain",
    "http://www.bad.com/x": "domain",
    "http://ads.good.com/": "subdomain",
    "http://münchen.de": "domain",
    "http://good.com/": None,
    "http://notbad.com/": None,
    "http://bad.com.good.org/": None,
    "http://good.com/best-CASINO_2024": "word",
    "http://good.com/best%2Dcasino": "word",
    "http://good.com/casinos": None,
    "http://xn--80aswg.xn--p1ai/казино": "word",
    "http://xn--80aaiecz4b.com/": None,
    "http://good.com/cheapviagranow": "word",
    "http://good.com/c++": "word",
    "http://good.com/poker": None,
    "http://good.com/poker/poker": None,
    "http://good.com/poker-bonus": "soft_words",
    "http://poker.com/slots": "soft_words",
}


def test_rules(lists):
    rows = look(lists, list(RULES))
    assert {url: row["rule"] for url, row in zip(RULES, rows, strict=True)} == RULES
    assert all(row["blocked"] == (row["rule"] is not None) for row in rows)


NSFW = {
    "http://example.com/free-porn/1": True,
    "http://example.com/hot-sexy-babes": True,
    "http://www.pornhub.example/": True,
    "http://pornic.fr/plage": False,
    "http://essex.ac.uk/middlesex": False,
    "http://example.org/sex-education": False,
    "http://scunthorpe.example/analysis/class": False,
    "http://dickens.example/cocktails/titanic": False,
}


def test_shipped_lists():
    rows = look(UrlStage(), list(NSFW))
    assert {
        url: row["rule"] == "nsfw" for url, row in zip(NSFW, rows, strict=True)
    } == NSFW
    assert not any(row["blocked"] for row in look(UrlStage(nsfw=False), list(NSFW)))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "host", ["." * 200_000, "a." * 200_000, "a" + "\u0301\u0323" * 200_000]
)
def test_a_long_host_takes_time_in_proportion(lists, host):
    assert look(lists, [f"http://x{host}x/"])[0]["host"] is None
