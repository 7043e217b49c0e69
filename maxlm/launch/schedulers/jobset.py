"""Kubernetes' JobSet: one replicated job a slice, one pod a host."""

from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.launch.job import Job
from maxlm.launch.options import JobOptions, Mount, is_variable_name
from maxlm.launch.schedulers.scheduler import JobScheduler

# What GKE's Spot nodes leave of a job's grace, if their pool does not ask for more.
SPOT_GRACE_SECONDS = 15


class JobSetScheduler(JobScheduler):
    """JobSets on GKE: machines by its labels, buckets by its FUSE driver, queues by
    Kueue."""

    name = "jobset"
    template = "jobset/jobset.yaml.j2"
    platforms = ("tpu", "gpu")
    options = frozenset(
        {
            *("name", "image", "queue", "namespace", "priority", "reservation"),
            *("spot", "retries", "grace", "secret", "mount", "node_selector"),
            "service_account",
        }
    )
    starts_several_slices = True
    always_in_container = True
    mountable = "gs://, a volume claim's name or a folder of its hosts"

    def check_options(self, options: JobOptions) -> None:
        if not options.image:
            fix = "add --image; launch/images/ has files to build one from"
            raise MaxlmError("jobset runs a container, and none is named", fix=fix)

    def list_notes(self, options: JobOptions) -> list[str]:
        if not options.spot or options.grace <= SPOT_GRACE_SECONDS:
            return []
        note = f"GKE's Spot nodes give {SPOT_GRACE_SECONDS} s, not {options.grace}, "
        note += "unless their pool says so"
        return [note]

    def can_mount(self, mount: Mount) -> bool:
        return mount.source.startswith("gs://") or not mount.bucket

    def parse_secret(self, pair: str) -> tuple[str, tuple[str, str]]:
        name, _, source = pair.partition("=")
        secret, _, key = source.partition("/")
        if not (is_variable_name(name) and secret and key):
            message = f"--secret {name} does not name a Kubernetes secret and its key"
            raise MaxlmError(message, fix="write --secret HF_TOKEN=huggingface/token")
        return name, (secret, key)

    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        return [["kubectl", "create", "-f", str(path)]]


JOBSET = JobSetScheduler()
