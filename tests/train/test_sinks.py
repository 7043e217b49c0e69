"""What is read back from TensorBoard's files, a scraped endpoint and W&B's own store."""

import json
import math
import struct
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest

from maxlm.config import MaxlmError
from maxlm.train import reporting as reporting_module
from maxlm.train.metrics import MetricsLog
from maxlm.train.records import read_records
from maxlm.train.reporting import ReportingConfig, WandbConfig
from tests.ports import free_port

# ------------------------------------------------------------------- TensorBoard


def checksum(data):
    """Masked CRC-32C as TFRecord files have it (RFC 3720's polynomial, bit by bit)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tfrecords(data):
    while data:
        header, (length,) = data[:8], struct.unpack("<Q", data[:8])
        body, after = data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<I", data[8:12]) == (checksum(header),)
        assert struct.unpack("<I", after) == (checksum(body),)
        yield body
        data = data[16 + length :]


def varint(data, at):
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 0x80:
            return value, at


def fields(message):
    """(number, value) of a protocol buffer's fields."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            value, at = varint(message, at)
        else:
            if key & 7 == 2:
                size, at = varint(message, at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def board(folder):
    """What TensorBoard shows: {tag: {step: value}}. A session's start withdraws what came before it
    from its step on."""
    shown = {}
    for path in sorted(folder.iterdir()):
        for record in tfrecords(path.read_bytes()):
            event = dict(fields(record))
            step = event.get(2, 0)
            if 7 in event:
                assert dict(fields(event[7])) == {1: 1}
                shown = {t: {s: v for s, v in c.items() if s < step} for t, c in shown.items()}
            for number, value in fields(event.get(5, b"")):
                assert number == 1
                scalar = dict(fields(value))
                (number,) = struct.unpack("<f", scalar[2])
                shown.setdefault(scalar[1].decode(), {})[step] = number
    return shown


def test_tensorboard_shows_what_the_records_hold(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 7):
            log.log(step, {"loss": 100.0 + step, "eval_bits_per_byte/text": 1 / step})
        log.rewind(4)
        log.log(5, {"loss": 5.0})
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.log(4, {"loss": 4.0})
    shown = board(tmp_path / "tensorboard")
    records = list(read_records(tmp_path / "metrics.jsonl"))
    for tag in ("loss", "eval_bits_per_byte/text"):
        assert shown[tag] == pytest.approx({r["step"]: r[tag] for r in records if tag in r})
    assert shown["loss"] == {1: 101.0, 2: 102.0, 3: 103.0, 4: 4.0}


def test_a_disk_that_fills_up_ends_in_an_error_not_in_a_wait(tmp_path):
    """tensorboardX's own writer would wait for its dead thread."""
    from tests.train.test_metrics import files_at_most

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


# -------------------------------------------------------------------- Prometheus


@pytest.fixture
def port():
    return free_port()


def scrape(port, host="127.0.0.1"):
    from prometheus_client.parser import text_string_to_metric_families

    with urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    kinds = {family.name: family.type for family in families}
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }
    return kinds, samples


def test_a_scrape_has_the_newest_numbers(tmp_path, port):
    pytest.importorskip("prometheus_client", reason="pip install 'maxlm[reporting]'")
    config = ReportingConfig(tensorboard=False, prometheus_port=port)
    with MetricsLog(tmp_path, reporting=config) as log:
        log.log(1, {"loss": 9.0})
        log.log(2, {"loss": float("nan"), "tokens_per_second": 1200.5, "mfu": 0.4})
        log.log(2, {"eval_bits_per_byte/text": 1.25})
        log.event("progress", 1, stepping=3.0, loading=0.5, saving=0.0)
        log.event("progress", 2, stepping=7.5, loading=0.5, saving=2.0, evaluating=1.0)
        log.event("rollback", 1, from_step=2, reason="loss", batches=[1, 2])
        log.event("progress", 2, stepping=1.5)
        kinds, samples = scrape(port)
        assert kinds["maxlm_mfu"] == "gauge"
        assert kinds["maxlm_time_seconds"] == "counter"
        assert math.isnan(samples["maxlm_loss",])
        assert samples["maxlm_step",] == 2
        assert samples["maxlm_tokens_per_second",] == 1200.5
        assert samples["maxlm_mfu",] == 0.4
        assert samples["maxlm_eval_bits_per_byte_text",] == 1.25
        assert abs(samples["maxlm_last_step_timestamp",] - time.time()) < 60
        spent = {k[1]: v for k, v in samples.items() if k[0] == "maxlm_time_seconds_total"}
        assert spent == {"stepping": 9.0, "loading": 0.5, "saving": 2.0, "evaluating": 1.0}
        assert samples["maxlm_events_total", "progress"] == 3
        assert samples["maxlm_events_total", "rollback"] == 1
        # A port that is taken ends the second run before it begins; the first goes on.
        with pytest.raises(MaxlmError, match=f"prometheus_port: .* 127.0.0.1 port {port}: Addr"):
            MetricsLog(tmp_path / "other", reporting=config)
        log.log(3, {"loss": 1.0})
        assert scrape(port)[1]["maxlm_step",] == 3
    with pytest.raises(OSError, match="refused"):
        scrape(port)
    with MetricsLog(tmp_path, resume_step=3, reporting=config):  # the port is free again
        assert ("maxlm_step",) not in scrape(port)[1]


def test_an_endpoint_is_heard_at_its_own_address_alone(tmp_path, port):
    pytest.importorskip("prometheus_client", reason="pip install 'maxlm[reporting]'")
    config = ReportingConfig(tensorboard=False, prometheus_port=port)
    with MetricsLog(tmp_path, reporting=config), pytest.raises(OSError, match="refused"):
        scrape(port, "127.0.0.2")
    everywhere = config.model_copy(update={"prometheus_address": "0.0.0.0"})
    with MetricsLog(tmp_path, reporting=everywhere):
        scrape(port, "127.0.0.2")
    for address in ("node.invalid", "a..b", "::zz", "192.0.2.1"):
        nowhere = config.model_copy(update={"prometheus_address": address})
        with pytest.raises(MaxlmError, match=r"^reporting\.prometheus_address: cannot listen on "):
            MetricsLog(tmp_path, reporting=nowhere)


# -------------------------------------------------------------- Weights & Biases

ATTEMPT = """
import sys
from maxlm.train.metrics import MetricsLog
from maxlm.train.reporting import ReportingConfig, WandbConfig

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
wandb = WandbConfig(project="tiny", mode="offline")
reporting = ReportingConfig(tensorboard=False, wandb=wandb)
with MetricsLog(folder, first - 1, reporting=reporting) as log:
    for step in range(first, last + 1):
        log.log(step, {"loss": 1 / step})
"""


def test_wandb_keeps_all_attempts_in_one_run(tmp_path):
    """Read from what `wandb sync` would send."""
    pytest.importorskip("wandb", reason="pip install 'maxlm[reporting]'")
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 17\n")
    for first, last in ((1, 3), (3, 5)):
        subprocess.run([sys.executable, "-c", ATTEMPT, folder, str(first), str(last)], check=True)
    stores = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len({path.name for path in stores}) == 1
    assert len(stores) == 2
    read = [wandb_store(path) for path in stores]
    assert [history for _, history, _ in read] == [
        [(step, pytest.approx(1 / step)) for step in steps] for steps in ((1, 2, 3), (3, 4, 5))
    ]
    assert {run for run, _, _ in read} == {(stores[0].stem.removeprefix("run-"), "tiny")}
    assert all(config["seed"] == 17 for _, _, config in read)


def wandb_store(path):
    """((id, name), [(step, loss)], config)"""
    from wandb.proto import wandb_internal_pb2

    history, config, run = [], {}, None
    for data in leveldb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("run"):
            run = record.run.run_id, record.run.display_name
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            row = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            history.append((row["step"], row["loss"]))
    return run, history, config


def leveldb_records(data):
    """Records of LevelDB's log format, in blocks of 32 KiB; the file's own 7 bytes come first."""
    at, parts = 7, b""
    while at < len(data):
        if (room := -at % 32768) < 7:
            at += room
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_a_refusal_of_wandb_is_an_error(tmp_path):
    pytest.importorskip("wandb", reason="pip install 'maxlm[reporting]'")
    config = ReportingConfig(tensorboard=False, wandb=WandbConfig(project="no/such:name"))
    with pytest.raises(MaxlmError, match=r"Weights & Biases: .*mode=offline"):
        MetricsLog(tmp_path, reporting=config)


# ----------------------------------------------------------------------- packages


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"wandb": {}}, "reporting.wandb: the package wandb"),
        ({"prometheus_port": 9000}, "reporting.prometheus_port: the package prometheus_client"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_opened(
    tmp_path, monkeypatch, settings, where
):
    config = ReportingConfig(**settings)
    monkeypatch.setattr(reporting_module, "find_spec", lambda name: None)
    with pytest.raises(MaxlmError) as error:
        config.check()
    assert str(error.value).startswith(where)
    assert "pip install 'maxlm[reporting]'" in str(error.value)
    ReportingConfig(wandb=WandbConfig(mode="disabled")).check()
    # A folder that wandb has made beside a script is no package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MaxlmError, match="not installed"):
        ReportingConfig(wandb=WandbConfig()).check()
