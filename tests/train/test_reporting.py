"""What is read back from TensorBoard's files and a scraped endpoint, and what W&B is
told."""

import math
import socket
import struct
import sys
import time
from types import SimpleNamespace
from urllib.request import urlopen

import pytest

from maxlm.config import MaxlmError
from maxlm.run import reporting_config
from maxlm.run.reporting_config import ReportingConfig, WandbConfig
from maxlm.train.prometheus import PrometheusSink
from maxlm.train.records import MetricsLog, read_records
from tests.errors import message
from tests.ports import free_port
from tests.train import tiny
from tests.train.test_metrics import files_at_most


def shown_on_board(folder):
    """What TensorBoard shows: {tag: {step: value}}. A session's start withdraws what
    came before it from its step on."""
    from tensorboardX.proto.event_pb2 import Event

    shown = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, an event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == 1:
                shown = {
                    tag: {s: v for s, v in curve.items() if s < event.step}
                    for tag, curve in shown.items()
                }
            for value in event.summary.value:
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


@pytest.mark.heavy
def test_tensorboard_shows_what_the_records_hold(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 7):
            log.log(step, {"loss": 100.0 + step, "eval_bits_per_byte/text": 1 / step})
        log.rewind(4)
        log.log(5, {"loss": 5.0})
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.log(4, {"loss": 4.0})
    shown = shown_on_board(tmp_path / "tensorboard")
    records = list(read_records(tmp_path / "metrics.jsonl"))
    for tag in ("loss", "eval_bits_per_byte/text"):
        assert shown[tag] == pytest.approx(
            {r["step"]: r[tag] for r in records if tag in r}
        )
    assert shown["loss"] == {1: 101.0, 2: 102.0, 3: 103.0, 4: 4.0}


@pytest.mark.heavy
def test_full_disk_is_an_error_of_tensorboard_not_a_wait(tmp_path):
    """tensorboardX's own writer would wait for its dead thread."""
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": 1.0})
        for _ in range(20):
            log.rewind(1)
        (path,) = (tmp_path / "tensorboard").iterdir()
        size = path.stat().st_size
        assert size > 2 * (tmp_path / "metrics.jsonl").stat().st_size
        with (
            files_at_most(size + 10),
            pytest.raises(MaxlmError, match="tensorboard: cannot write"),
        ):
            log.log(2, {"loss": 1.0})


def test_wandb_gets_one_run_for_all_attempts_with_steps_as_its_axis(
    tmp_path, monkeypatch
):
    started, calls = [], []

    def init(**settings):
        if settings["project"] != "tiny":
            raise wandb.Error("no such project")
        started.append(settings)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: calls.append((name, step_metric)),
            log=calls.append,
            finish=lambda: calls.append("finished"),
        )

    wandb = SimpleNamespace(
        init=init, Settings=dict, Error=ValueError, __spec__=sys.__spec__
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(ReportingConfig, "check_packages", lambda self: None)
    (tmp_path / "config.yaml").write_text("seed: 17\n")
    config = ReportingConfig(
        tensorboard=False, wandb=WandbConfig(project="tiny", mode="offline")
    )
    for step in (1, 2):
        with MetricsLog(tmp_path, step - 1, reporting=config) as log:
            log.log(step, {"loss": 1 / step})
    assert calls == [
        *[("*", "step"), {"step": 1, "loss": 1.0}, "finished"],
        *[("*", "step"), {"step": 2, "loss": 0.5}, "finished"],
    ]
    assert started[0] == started[1]
    assert started[0]["resume"] == "allow"
    assert started[0]["name"] == tmp_path.name
    assert started[0]["mode"] == "offline"
    assert started[0]["config"] == {"seed": 17}
    refused = ReportingConfig(tensorboard=False, wandb=WandbConfig())
    with pytest.raises(
        MaxlmError, match=r"Weights & Biases: no such project; .*mode=offline"
    ):
        MetricsLog(tmp_path, reporting=refused)


def scrape(port, host="127.0.0.1"):
    """What Prometheus reads: {(name, *labels): value}, and the type of each family."""
    from prometheus_client.parser import text_string_to_metric_families

    with urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    return samples, {family.name: family.type for family in families}


def test_a_scrape_has_the_newest_numbers_and_what_happened(tmp_path):
    port = free_port()
    config = ReportingConfig(tensorboard=False, prometheus_port=port)
    with MetricsLog(tmp_path, reporting=config) as log:
        log.log(1, {"loss": 9.0, "eval_bits_per_byte/text": 1.25})
        log.log(2, {"loss": float("nan")})
        log.event("progress", 1, stepping=3.0, loading=0.5, saving=0.0)
        log.event("progress", 2, stepping=7.5, loading=0.5, saving=2.0, evaluating=1.0)
        log.event("rollback", 1, from_step=2, reason="loss", batches=[1, 2])
        log.event("progress", 2, stepping=1.5)
        samples, types = scrape(port)
        assert (types["maxlm_loss"], types["maxlm_time_seconds"]) == (
            "gauge",
            "counter",
        )
        assert math.isnan(samples["maxlm_loss",])
        assert samples["maxlm_step",] == 2
        assert samples["maxlm_eval_bits_per_byte_text",] == 1.25
        assert abs(samples["maxlm_last_step_timestamp",] - time.time()) < 600
        seconds = {
            key[1]: x
            for key, x in samples.items()
            if key[0] == "maxlm_time_seconds_total"
        }
        assert seconds == {
            "stepping": 9.0,
            "loading": 0.5,
            "saving": 2.0,
            "evaluating": 1.0,
        }
        assert samples["maxlm_events_total", "progress"] == 3
        log.rewind(1)
        assert scrape(port)[0]["maxlm_step",] == 1
        with pytest.raises(OSError, match="refused"):  # another address of this host
            scrape(port, "127.0.0.2")
    everywhere = config.model_copy(update={"prometheus_address": "0.0.0.0"})
    with MetricsLog(tmp_path, reporting=everywhere):  # the port is free again
        assert scrape(port, "127.0.0.2")[1]["maxlm_events"] == "counter"


@pytest.mark.heavy
@pytest.mark.usefixtures("compiled_once")
def test_a_run_answers_with_what_it_logs(tmp_path, monkeypatch):
    """Scraped where it draws its plot: all is logged then, and the port is still
    open."""
    port = free_port()
    scraped = {}
    monkeypatch.setattr(
        "maxlm.train.program.plot_metrics",
        lambda *paths: scraped.update(scrape(port)[0]),
    )
    reporting = {"tensorboard": False, "prometheus_port": port}
    text = tiny.write_text(tmp_path / "text")
    path = tiny.write_config(tmp_path, text, reporting=reporting, train={"steps": 2})
    result, _ = tiny.train(path)
    newest = {}
    for record in tiny.read_metrics(result.folder):
        newest |= record
    assert scraped["maxlm_step",] == 2
    for name in (
        "loss",
        "tokens_per_second",
        "mfu",
        "grad_norm",
        "learning_rate",
        "eval_loss",
    ):
        assert scraped[f"maxlm_{name}",] == newest[name], name
    (*_, progress) = tiny.read_events(result.folder, "progress")
    for activity in ("stepping", "loading", "saving"):
        seconds = scraped["maxlm_time_seconds_total", activity]
        assert seconds == pytest.approx(progress[activity]), activity


def test_a_port_in_use_is_a_line_before_anything_is_written(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        reporting = {"tensorboard": False, "prometheus_port": port}
        path = tiny.write_config(
            tmp_path, tiny.write_text(tmp_path / "text"), reporting=reporting
        )
        assert message(tiny.train, path) == (
            f"reporting.prometheus_port: cannot listen at 127.0.0.1 port {port}: "
            f"Address already "
            "in use; name a free port, and an address of this host or 0.0.0.0 for all "
            "of them"
        )
    assert not (tmp_path / "tiny").exists()
    for address in ("a..b", "192.0.2.1"):  # no name, and another's address
        text = message(PrometheusSink, address, free_port())
        assert text.startswith(
            f"reporting.prometheus_port: cannot listen at {address} port "
        )


def test_missing_package_is_reported_before_anything_is_opened(tmp_path, monkeypatch):
    for settings, where in (
        ({"wandb": {}}, "reporting.wandb: the package wandb is not installed"),
        (
            {"prometheus_port": 9000},
            "reporting.prometheus_port: the package prometheus_client is not installed",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(reporting_config, "find_spec", lambda name: None)
            text = message(ReportingConfig.model_validate(settings).check_packages)
        assert (
            text == f"{where}; pip install 'maxlm[reporting]', or leave the setting out"
        )
    ReportingConfig(wandb=WandbConfig(mode="disabled")).check_packages()
    # A folder that wandb has made beside a script is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MaxlmError, match="not installed"):
        ReportingConfig(wandb=WandbConfig()).check_packages()
