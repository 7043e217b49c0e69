"""Options of a job, and how each is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from maxlm.config import MaxlmError

# Ends of words in the names of secrets.
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
# Of names that go into a job's header: nothing that could end a line or begin a
# comment.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+#=-]+")
# Python keeps bytes of the command line that are no UTF-8 as halves of characters.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JobOptions:
    """Settings of a job; None or empty: the scheduler's own default. A
    :class:`~maxlm.launch.schedulers.scheduler.JobScheduler` says which it takes."""

    name: str | None = None
    nodes: int | None = None
    image: str | None = None
    queue: str | None = None
    account: str | None = None
    namespace: str | None = None
    priority: str | None = None
    reservation: str | None = None
    spot: bool = False
    time: str | None = None
    retries: int = 100
    grace: int = 120
    """Seconds from the notice of a preemption to its end."""
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    mount: tuple[str, ...] = ()
    node_selector: tuple[str, ...] = ()
    service_account: str | None = None
    zone: str | None = None
    project: str | None = None
    maxlm: str = "maxlm"


def is_plain_word(text: str) -> bool:
    """Returns whether text can stand in a job's header as it is."""
    return _PLAIN.fullmatch(text) is not None


def is_variable_name(text: str) -> bool:
    """Returns whether text can name a variable of the environment."""
    return _NAME.fullmatch(text) is not None


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """Parses variables, ``NAME=VALUE`` each; refuses what looks like a secret."""
    variables = split_pairs(
        "--env", pairs, form="NAME=VALUE", example="NCCL_DEBUG=INFO"
    )
    for name in variables:
        words = [word.rstrip("S") for word in name.upper().split("_")]
        if any(word.endswith(_SECRET) for word in words):
            message = f"--env {name}=... looks like a secret, and would be written "
            message += "into a file"
            fix = f"use --secret {name}, which names where it is kept"
            raise MaxlmError(message, fix=fix)
    return variables


def split_pairs(
    option: str, pairs: Sequence[str], form: str, example: str
) -> dict[str, str]:
    """Parses pairs of an option, ``NAME=VALUE`` each, written in this ``form``."""
    name_pattern = _NAME if option == "--env" else _PLAIN
    values: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if _SURROGATE.search(value):
            message = f"{option} {name}=... holds a byte that is no UTF-8, which a "
            message += "job's file cannot"
            raise MaxlmError(message, fix="write the value in UTF-8")
        if not equals or not name_pattern.fullmatch(name):
            message = f"{option} {pair} is not {form}"
            raise MaxlmError(message, fix=f"write {option} {example}")
        values[name] = value
    return values


@dataclass(frozen=True)
class Mount:
    """A folder in the job's container, and what is mounted there."""

    source: str
    """A bucket's URL, a folder of the host's, or a Kubernetes volume claim."""
    path: str

    @property
    def pair(self) -> str:
        return f"{self.source}:{self.path}"

    @property
    def bucket(self) -> str:
        """The bucket's name of a URL; else empty."""
        # scheme:, nothing, bucket, folders...
        return self.source.split("/")[2] if "://" in self.source else ""

    @property
    def folder(self) -> str:
        """The path behind the bucket of a URL."""
        folders = self.source.split("/")[3:]
        return "/".join(folders).rstrip("/")


def split_mount(pair: str) -> Mount:
    """Parses a mount, ``SOURCE:PATH``."""
    source, _, path = pair.rpartition(":")
    if not source or not path.startswith("/") or path.startswith("//"):
        fix = "write --mount gs://bucket/folder:/data"
        raise MaxlmError(f"--mount {pair} is not SOURCE:/PATH", fix=fix)
    check_url(source, "--mount")
    return Mount(source, path.rstrip("/") or "/")


_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.]*):(?P<slashes>/*)(?P<bucket>[^/]*)"
)


def check_url(text: str, where: str) -> None:
    """Refuses a bucket whose scheme is misspelt, without asking whether it is there."""
    url = _URL.match(text)
    if url is None:
        return
    is_known = url["scheme"] in ("gs", "s3")
    if not is_known or url["slashes"] != "//" or not url["bucket"]:
        message = f"'{text}' is no bucket's URL"
        raise MaxlmError(message, where=where, fix="write gs:// or s3://")


_UNIT_SECONDS = {"m": 60, "h": 3600, "d": 86400}
_WITH_UNIT = re.compile(r"(\d+)([mhd])")
# D-, then one to three numbers.
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def parse_time_limit_seconds(text: str) -> int:
    """Returns a time limit as SLURM writes it (minutes, H:MM:SS, D-HH:MM:SS) or as 90m,
    24h, 7d."""
    total = 0
    with_unit = _WITH_UNIT.fullmatch(text)
    clock = _CLOCK.fullmatch(text)
    if with_unit:
        total = int(with_unit[1]) * _UNIT_SECONDS[with_unit[2]]
    elif clock:
        days, first, second, third = (int(part or 0) for part in clock.groups())
        # Without days and a third number it begins with minutes: M, M:SS.
        if clock[1] is None and clock[4] is None:
            total = 60 * first + second
        else:
            total = 86400 * days + 3600 * first + 60 * second + third
    if total <= 0:
        message = f"--time {text} is no time limit"
        raise MaxlmError(message, fix="write 24:00:00, 1-12:00:00 or 24h")
    return total
