"""Options of a job: which scheduler takes which, and how each is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from maxlm.config import MaxlmError

# Ends of words in the names of secrets.
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
# Of names that go into a job's header: nothing that could end a line or begin a
# comment.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+#=-]+")
# Python keeps bytes of the command line that are no UTF-8 as halves of characters.
_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _only(*schedulers: str, default: Any = None) -> Any:
    """Makes an option that these schedulers alone have a use for."""
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
    """Checks that each option is one that the scheduler takes, and in a form that a
    job's file can hold. Raises MaxlmError: one is not."""
    for option in fields(options):
        name = f"--{option.name.replace('_', '-')}"
        value = getattr(options, option.name)
        # `maxlm` is quoted where it is written; the others stand as they are.
        is_written_plainly = isinstance(value, str) and option.name != "maxlm"
        if is_written_plainly and not _PLAIN.fullmatch(value):
            raise MaxlmError(f"{name} '{value}' is not one plain word")
        is_given = value != option.default
        if is_given and not supports_option(scheduler, option.name):
            takers = ", ".join(option.metadata["schedulers"])
            fix = _INSTEAD.get(option.name, f"leave it out ({takers} has it)")
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


def parse_secrets(pairs: Sequence[str], scheduler: str) -> dict[str, tuple[str, str]]:
    """Parses the source of each secret variable: a Kubernetes secret and its key; for
    the other schedulers nothing but its name."""
    sources: dict[str, tuple[str, str]] = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        secret, _, key = source.partition("/")
        is_name = _NAME.fullmatch(name) is not None
        if scheduler == "jobset" and not (is_name and secret and key):
            message = f"--secret {name} does not name a Kubernetes secret and its key"
            raise MaxlmError(message, fix="write --secret HF_TOKEN=huggingface/token")
        if scheduler != "jobset" and (equals or not is_name):
            message = f"--secret {name}: {scheduler} takes the variable's name alone"
            fix = f"set {name} in the environment you submit from, and write "
            fix += f"--secret {name}"
            raise MaxlmError(message, fix=fix)
        sources[name] = (secret, key)
    return sources


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


def parse_mounts(pairs: Sequence[str], scheduler: str) -> tuple[Mount, ...]:
    """Parses mounts, ``SOURCE:PATH`` each, of sources that the scheduler can mount."""
    mounts = []
    for pair in pairs:
        source, _, path = pair.rpartition(":")
        if not source or not path.startswith("/") or path.startswith("//"):
            fix = "write --mount gs://bucket/folder:/data"
            raise MaxlmError(f"--mount {pair} is not SOURCE:/PATH", fix=fix)
        check_url(source, "--mount")
        mount = Mount(source, path.rstrip("/") or "/")
        if scheduler == "slurm":
            is_mountable = source.startswith("/")
            mountable = "a folder of its hosts"
        elif scheduler == "jobset":
            is_mountable = source.startswith("gs://") or not mount.bucket
            mountable = "gs://, a volume claim's name or a folder of its hosts"
        else:  # skypilot: no other scheduler takes --mount
            is_mountable = bool(mount.bucket)
            mountable = "gs:// and s3://"
        if not is_mountable:
            message = f"{scheduler} cannot mount {source}"
            raise MaxlmError(message, fix=f"use {mountable}")
        mounts.append(mount)
    return tuple(mounts)


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
