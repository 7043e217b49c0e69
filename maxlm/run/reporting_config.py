"""Settings of a run's reports beside its own files."""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from maxlm.config import Config, MaxlmError


class WandbConfig(Config):
    """A run on Weights & Biases; every attempt continues the same one."""

    project: str = "maxlm"
    entity: str | None = None
    """User or team; null: the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline: kept in FOLDER/NAME/wandb for `wandb sync`; disabled: not at all."""


class ReportingConfig(Config):
    """Reports beside metrics.jsonl and events.jsonl, which every run writes."""

    tensorboard: bool = True
    """Write TensorBoard events to FOLDER/NAME/tensorboard; false: do not."""
    wandb: WandbConfig | None = None
    """Report to Weights & Biases too; null: do not."""
    prometheus_port: int | None = Field(default=None, ge=1, le=65535)
    """Answer scrapes of Prometheus at this port of process 0's host; null: do not."""
    prometheus_address: str = Field(default="127.0.0.1", min_length=1)
    """Address or host name to answer at. The default answers the host itself alone;
    0.0.0.0 (or :: for IPv6) anyone who reaches it, such as a cluster's Prometheus."""

    def check_packages(self) -> None:
        """Checks that the packages for it are here; raises MaxlmError if one is
        missing."""
        if self.wandb is not None and self.wandb.mode != "disabled":
            _check_package("wandb", "reporting.wandb")
        if self.prometheus_port is not None:
            _check_package("prometheus_client", "reporting.prometheus_port")


def _check_package(package: str, setting: str) -> None:
    # A folder of that name, such as wandb makes beside a script, has no origin.
    if getattr(find_spec(package), "origin", None) is None:
        message = f"the package {package} is not installed"
        fix = "pip install 'maxlm[reporting]', or leave the setting out"
        raise MaxlmError(message, where=setting, fix=fix)
