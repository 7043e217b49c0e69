"""Options of a job: which scheduler takes which, and how each is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches

from maxlm.config import MaxlmError

SCHEDULERS = ("slurm", "jobset", "skypilot", "ray", "tpu-vm")
SCHEMES = ("gs", "s3")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")
# Of names that go into a job's header: nothing that could end a line or begin a comment.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@+#=-]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class JobOptions:
    """Settings of a job; None or empty: the scheduler's own default."""

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
    retries: int | None = None
    grace: int | None = None
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    mount: tuple[str, ...] = ()
    node_selector: tuple[str, ...] = ()
    service_account: str | None = None
    zone: str | None = None
    project: str | None = None
    maxlm: str | None = None


# Who has a use for an option; one that is not named here all have.
_ONLY = {
    "name": ("slurm", "jobset", "skypilot", "tpu-vm"),
    "nodes": ("slurm", "ray"),
    "image": ("slurm", "jobset", "skypilot"),
    "queue": ("slurm", "jobset"),
    "account": ("slurm",),
    "namespace": ("jobset",),
    "priority": ("slurm", "jobset", "skypilot"),
    "reservation": ("slurm", "jobset"),
    "spot": ("jobset", "skypilot"),
    "time": ("slurm",),
    "retries": ("slurm", "jobset", "ray", "tpu-vm"),
    "grace": ("slurm", "jobset", "ray"),
    "secret": ("slurm", "jobset", "skypilot"),
    "mount": ("slurm", "jobset", "skypilot"),
    "node_selector": ("jobset",),
    "service_account": ("jobset",),
    "zone": ("skypilot", "tpu-vm"),
    "project": ("tpu-vm",),
}
_INSTEAD = {
    "image": "install maxlm on its hosts, and name it by --maxlm if it is not on their PATH",
    "secret": "set the variable on its hosts",
    "mount": "mount it on its hosts",
    "spot": "ask for such machines where they are made",
    "retries": "leave it out: SkyPilot starts again after 75 and 76 as often as it takes",
}


def check_scheduler(name: str) -> None:
    """Checks that a scheduler is known.

    Raises:
        MaxlmError: it is not.
    """
    if name not in SCHEDULERS:
        near = get_close_matches(name, SCHEDULERS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise MaxlmError(f"no scheduler '{name}'", fix=f"{hint}use one of {', '.join(SCHEDULERS)}")


def supports_option(scheduler: str, option: str) -> bool:
    """Returns whether a scheduler takes an option."""
    return scheduler in _ONLY.get(option, SCHEDULERS)


def check_options(options: JobOptions, scheduler: str) -> None:
    """Refuse what the scheduler would have to ignore.

    Raises:
        MaxlmError: naming the option and who has it.
    """
    for field in fields(options):
        takers, value = _ONLY.get(field.name, SCHEDULERS), getattr(options, field.name)
        if isinstance(value, str) and field.name != "maxlm" and not _PLAIN.fullmatch(value):
            raise MaxlmError(f"--{field.name.replace('_', '-')} '{value}' is not one plain word")
        given = value is not None and value is not False and value != ()  # 0 is given
        if given and scheduler not in takers:
            raise MaxlmError(
                f"{scheduler} has no use for --{field.name.replace('_', '-')}",
                fix=_INSTEAD.get(field.name, f"leave it out ({', '.join(takers)} has it)"),
            )
    if scheduler == "slurm" and options.mount and not options.image:
        raise MaxlmError("--mount is into a container", fix="add --image, or leave it out")
    if scheduler == "jobset" and not options.image:
        raise MaxlmError(
            "jobset runs a container, and none is named",
            fix="add --image; launch/images/ has files to build one from",
        )
    if scheduler == "jobset" and options.spot and options.reservation:
        raise MaxlmError("no Spot node is a reserved one", fix="leave out --spot or --reservation")
    if scheduler == "skypilot":
        _check_skypilot(options)


def _check_skypilot(options: JobOptions) -> None:
    priority, image = options.priority, options.image
    if priority and not (re.fullmatch("[0-9]+", priority) and int(priority) <= 1000):
        raise MaxlmError(f"--priority {priority} is none of SkyPilot's", fix="use 0 to 1000")
    if image and image.startswith("docker:"):
        raise MaxlmError(
            f"--image {image}: docker: is put before it",
            fix=f"write --image {image.removeprefix('docker:').lstrip('/')}",
        )


def parse_env(pairs: Sequence[str]) -> dict[str, str]:
    """Parses variables, ``NAME=VALUE`` each.

    Raises:
        MaxlmError: it is not, or it looks like a secret.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not _NAME.fullmatch(name) or not equals:
            raise MaxlmError(f"--env {pair} is not NAME=VALUE", fix="write --env NCCL_DEBUG=INFO")
        if any(part.rstrip("S").endswith(_SECRET) for part in name.upper().split("_")):
            raise MaxlmError(
                f"--env {name}=... looks like a secret, and would be written into a file",
                fix=f"use --secret {name}, which names where it is kept",
            )
        found[name] = value
    return found


def parse_secrets(pairs: Sequence[str], scheduler: str) -> dict[str, tuple[str, str]]:
    """Where each secret variable comes from: a Kubernetes secret and its key; for the other
    schedulers nothing but its name.

    Raises:
        MaxlmError: not written as the scheduler needs it.
    """
    found = {}
    for pair in pairs:
        name, equals, source = pair.partition("=")
        secret, slash, key = source.partition("/")
        if scheduler == "jobset":
            if not (_NAME.fullmatch(name) and secret and slash and key):
                raise MaxlmError(
                    f"--secret {name} does not name a Kubernetes secret and its key",
                    fix="write --secret HF_TOKEN=huggingface/token",
                )
        elif equals or not _NAME.fullmatch(name):
            raise MaxlmError(
                f"--secret {name}: {scheduler} takes the variable's name alone",
                fix=f"set {name} in the environment you submit from, and write --secret {name}",
            )
        found[name] = (secret, key)
    return found


def check_variable_names(env: Mapping[str, str], secret: Mapping[str, tuple[str, str]]) -> None:
    """Refuse a variable that would have two values.

    Raises:
        MaxlmError: naming it.
    """
    for name in env:
        if name in secret:
            raise MaxlmError(f"{name} is named by --env and by --secret", fix="leave one out")


def parse_node_selectors(pairs: Sequence[str]) -> dict[str, str]:
    """Parses node selectors, ``KEY=VALUE`` each.

    Raises:
        MaxlmError: it is not.
    """
    for pair in pairs:
        if not all(pair.partition("=")):
            raise MaxlmError(
                f"--node-selector {pair} is not KEY=VALUE",
                fix="write --node-selector cloud.google.com/gke-accelerator=nvidia-h100-80gb",
            )
    return dict(pair.split("=", 1) for pair in pairs)


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
    """Parses mounts, ``SOURCE:PATH`` each.

    Raises:
        MaxlmError: it is not, or a scheduler cannot mount such a source.
    """
    found = []
    for pair in pairs:
        source, _, path = pair.rpartition(":")
        if not source or not path.startswith("/") or path.startswith("//"):
            raise MaxlmError(
                f"--mount {pair} is not SOURCE:/PATH", fix="write --mount gs://bucket/folder:/data"
            )
        check_url(source, "--mount")
        mount = Mount(source, path.rstrip("/") or "/")
        known = {
            "slurm": source.startswith("/"),
            "jobset": source.startswith("gs://") or not mount.bucket,
            "skypilot": bool(mount.bucket),
        }
        if not known[scheduler]:
            able = {
                "slurm": "a folder of its hosts",
                "jobset": "gs://, a volume claim's name or a folder of its hosts",
                "skypilot": "gs:// and s3://",
            }
            raise MaxlmError(f"{scheduler} cannot mount {source}", fix=f"use {able[scheduler]}")
        # Where pyxis, and gcsfuse's options, end one and begin the next.
        listed = scheduler == "slurm" or (scheduler == "jobset" and mount.bucket)
        if listed and "," in pair:
            raise MaxlmError(
                f"--mount {pair}: a comma would end it there",
                fix="mount the folder above, or rename it",
            )
        found.append(mount)
    return tuple(found)


def check_url(text: str, where: str) -> None:
    """Refuse a bucket whose scheme is misspelt; nobody is asked whether it is there.

    Raises:
        MaxlmError: naming the schemes.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.]*):(/*)([^/]*)", text)
    if found and (found[1] not in SCHEMES or found[2] != "//" or not found[3]):
        raise MaxlmError(f"'{text}' is no bucket's URL", where=where, fix="write gs:// or s3://")


def parse_time_limit_seconds(text: str) -> int:
    """Returns a time limit as SLURM writes it (minutes, H:MM:SS, D-HH:MM:SS) or as 90m, 24h, 7d.

    Raises:
        MaxlmError: anything else, or nothing.
    """
    unit = re.fullmatch(r"(\d+)([mhd])", text)
    clock = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    total = 0
    if unit:
        total = int(unit[1]) * {"m": 60, "h": 3600, "d": 86400}[unit[2]]
    elif clock:
        days, first, second, third = (int(part or 0) for part in clock.groups())
        if clock[1] is not None:
            total = 86400 * days + 3600 * first + 60 * second + third
        elif clock[4] is not None:
            total = 3600 * first + 60 * second + third
        else:  # MM or MM:SS
            total = 60 * first + second
    if total <= 0:
        raise MaxlmError(f"--time {text} is no time limit", fix="write 24:00:00, 1-12:00:00 or 24h")
    return total
