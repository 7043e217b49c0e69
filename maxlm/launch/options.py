"""Options of a job: which scheduler takes which, and how each is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from operator import mul
from typing import Any

from maxlm.config import MaxlmError

_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
# Of names that go into a job's header: nothing that could end a line or begin a
# comment.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+#=-]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _only(*schedulers: str, default: Any = None) -> Any:
    """An option that these schedulers alone have a use for."""
    return field(default=default, metadata={"schedulers": schedulers})


@dataclass(frozen=True)
class JobOptions:
    """Settings of a job; None or empty: the scheduler's own default."""

    name: str | None = _only("slurm", "jobset", "skypilot", "tpu-vm")
    nodes: int | None = _only("slurm", "ray")
    image: str | None = _only("slurm", "jobset", "skypilot")
    queue: str | None = _only("slurm", "jobset")
    account: str | None = _only("slurm")
    namespace: str | None = _only("jobset")
    priority: str | None = _only("slurm", "jobset", "skypilot")
    reservation: str | None = _only("slurm", "jobset")
    spot: bool = _only("jobset", "skypilot", default=False)
    time: str | None = _only("slurm")
    retries: int = _only("slurm", "jobset", "ray", "tpu-vm", default=100)
    grace: int = _only("slurm", "jobset", "ray", default=120)
    """Seconds from the notice of a preemption to its end."""
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = _only("slurm", "jobset", "skypilot", default=())
    mount: tuple[str, ...] = _only("slurm", "jobset", "skypilot", default=())
    node_selector: tuple[str, ...] = _only("jobset", default=())
    service_account: str | None = _only("jobset")
    zone: str | None = _only("skypilot", "tpu-vm")
    project: str | None = _only("tpu-vm")
    maxlm: str = "maxlm"


_INSTEAD = {
    "image": "install maxlm on its hosts, and name it by --maxlm if it is not on their "
    "PATH",
    "secret": "set the variable on its hosts",
    "mount": "mount it on its hosts",
    "spot": "ask for such machines where they are made",
    "retries": "leave it out: SkyPilot starts again after 75 and 76 as often as it "
    "takes",
}


def supports_option(scheduler: str, option: str) -> bool:
    """Returns whether a scheduler takes an option."""
    takers = JobOptions.__dataclass_fields__[option].metadata.get("schedulers")
    return takers is None or scheduler in takers


def check_options(options: JobOptions, scheduler: str) -> None:
    """Refuse what the scheduler would have to ignore."""
    for own in fields(options):
        name = f"--{own.name.replace('_', '-')}"
        value = getattr(options, own.name)
        if (
            isinstance(value, str)
            and own.name != "maxlm"
            and not _PLAIN.fullmatch(value)
        ):
            raise MaxlmError(f"{name} '{value}' is not one plain word")
        if value != own.default and not supports_option(scheduler, own.name):
            takers = ", ".join(own.metadata["schedulers"])
            fix = _INSTEAD.get(own.name, f"leave it out ({takers} has it)")
            raise MaxlmError(f"{scheduler} has no use for {name}", fix=fix)
    if scheduler == "slurm" and options.mount and not options.image:
        raise MaxlmError(
            "--mount is into a container", fix="add --image, or leave it out"
        )
    if scheduler == "jobset" and not options.image:
        fix = "add --image; launch/images/ has files to build one from"
        raise MaxlmError("jobset runs a container, and none is named", fix=fix)


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """Parses variables, ``NAME=VALUE`` each; refuses what looks like a secret."""
    found = split_pairs("--env", pairs, "NAME=VALUE", "NCCL_DEBUG=INFO")
    for name in found:
        if any(part.rstrip("S").endswith(_SECRET) for part in name.upper().split("_")):
            what = f"--env {name}=... looks like a secret, and would be written into a file"
            raise MaxlmError(
                what, fix=f"use --secret {name}, which names where it is kept"
            )
    return found


def split_pairs(
    option: str, pairs: Sequence[str], form: str, example: str
) -> dict[str, str]:
    """Parses pairs of an option, ``NAME=VALUE`` each, written in this ``form``."""
    for pair in pairs:
        name, equals, value = pair.partition("=")
        # Python keeps bytes of the command line that are no UTF-8 as halves of
        # characters.
        if _SURROGATE.search(value):
            what = f"{option} {name}=... holds a byte that is no UTF-8, which a job's file cannot"
            raise MaxlmError(what, fix="write the value in UTF-8")
        if not equals or not (_NAME if option == "--env" else _PLAIN).fullmatch(name):
            raise MaxlmError(
                f"{option} {pair} is not {form}", fix=f"write {option} {example}"
            )
    return dict(pair.split("=", 1) for pair in pairs)


def parse_secrets(pairs: Sequence[str], scheduler: str) -> dict[str, tuple[str, str]]:
    """Parses the source of each secret variable: a Kubernetes secret and its key; for
    the other schedulers nothing but its name."""
    found = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        secret, _, key = source.partition("/")
        if scheduler == "jobset" and not (_NAME.fullmatch(name) and secret and key):
            what = f"--secret {name} does not name a Kubernetes secret and its key"
            raise MaxlmError(what, fix="write --secret HF_TOKEN=huggingface/token")
        if scheduler != "jobset" and (equals or not _NAME.fullmatch(name)):
            what = f"--secret {name}: {scheduler} takes the variable's name alone"
            fix = f"set {name} in the environment you submit from, and write --secret {name}"
            raise MaxlmError(what, fix=fix)
        found[name] = (secret, key)
    return found


@dataclass(frozen=True)
class Mount:
    """A folder of the job's hosts and what it shows."""

    source: str
    """A bucket's URL, a folder of the host's, or a Kubernetes volume claim."""
    path: str

    @property
    def pair(self) -> str:
        return f"{self.source}:{self.path}"

    @property
    def bucket(self) -> str:
        """The bucket's name of a URL; else empty."""
        return self.source.split("/")[2] if "://" in self.source else ""

    @property
    def folder(self) -> str:
        """The path behind the bucket of a URL."""
        return "/".join(self.source.split("/")[3:]).rstrip("/")


def parse_mounts(pairs: Sequence[str], scheduler: str) -> tuple[Mount, ...]:
    """Parses mounts, ``SOURCE:PATH`` each, of sources that the scheduler can mount."""
    found = []
    for pair in pairs:
        source, _, path = pair.rpartition(":")
        if not source or not path.startswith("/") or path.startswith("//"):
            fix = "write --mount gs://bucket/folder:/data"
            raise MaxlmError(f"--mount {pair} is not SOURCE:/PATH", fix=fix)
        check_url(source, "--mount")
        mount = Mount(source, path.rstrip("/") or "/")
        mountable, able = {
            "slurm": (source.startswith("/"), "a folder of its hosts"),
            "jobset": (
                source.startswith("gs://") or not mount.bucket,
                "gs://, a volume claim's name or a folder of its hosts",
            ),
            "skypilot": (bool(mount.bucket), "gs:// and s3://"),
        }[scheduler]
        if not mountable:
            raise MaxlmError(f"{scheduler} cannot mount {source}", fix=f"use {able}")
        found.append(mount)
    return tuple(found)


def check_url(text: str, where: str) -> None:
    """Refuse a bucket whose scheme is misspelt; nobody is asked whether it is there."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.]*):(/*)([^/]*)", text)
    if found and (found[1] not in ("gs", "s3") or found[2] != "//" or not found[3]):
        raise MaxlmError(
            f"'{text}' is no bucket's URL", where=where, fix="write gs:// or s3://"
        )


def parse_time_limit_seconds(text: str) -> int:
    """Returns a time limit as SLURM writes it (minutes, H:MM:SS, D-HH:MM:SS) or as 90m,
    24h, 7d."""
    total = 0
    if unit := re.fullmatch(r"(\d+)([mhd])", text):
        total = int(unit[1]) * {"m": 60, "h": 3600, "d": 86400}[unit[2]]
    elif clock := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text):
        days, *parts = (int(part) if part else 0 for part in clock.groups())
        minutes_first = clock[1] is None and clock[4] is None
        units = (60, 1, 0) if minutes_first else (3600, 60, 1)
        total = 86400 * days + sum(map(mul, parts, units))
    if total <= 0:
        raise MaxlmError(
            f"--time {text} is no time limit", fix="write 24:00:00, 1-12:00:00 or 24h"
        )
    return total
