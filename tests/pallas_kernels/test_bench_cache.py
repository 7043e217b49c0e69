"""What was measured is not measured again, unless something that it follows from has changed."""

import json
from pathlib import Path

import pytest

from benchmarks.kernel_cycles import bench
from benchmarks.kernel_cycles.contests import cache
from benchmarks.kernel_cycles.contests.contest import OWN
from benchmarks.kernel_cycles.static import CallCosts, CompileError, KernelCosts, Spec
from benchmarks.kernel_cycles.static.measure import CompilerKilled
from tests.pallas_kernels.costs import costs


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A cache's; what it measures is counted."""
    asked = []

    def measure(spec, chip):
        asked.append(spec)
        answer = spec.kwargs.get("answer")
        if isinstance(answer, list):
            raise {"refused": CompileError, "endless": ValueError, "killed": CompilerKilled}[
                answer[0]
            ](answer[1])
        return costs(100.0, 200.0, 12345, spills=6)

    monkeypatch.setattr(cache, "measure", measure)
    monkeypatch.setattr(cache, "versions", lambda *names: ", ".join(names))
    return tmp_path / "deep" / "folder", asked


def test_what_is_measured_once_is_read_later(folder):
    where, asked = folder
    spec = Spec("json:loads", {"blocks": (1, 2), "mask": "causal"})
    assert not cache.Cache(where).has(spec, "v5p")
    first = cache.Cache(where).measure(spec, "v5p")
    # A list, as JSON makes of a tuple, is the same.
    again = cache.Cache(where).measure(
        Spec("json:loads", {"mask": "causal", "blocks": [1, 2]}), "v5p"
    )
    assert first == again
    assert len(asked) == 1
    whole = costs(100.0, 200.0, 12345, spills=6)
    for found in (first, again):
        assert found.temp_bytes == 12345
        for backward in (None, True, False):
            assert found.microseconds(backward=backward) == whole.microseconds(backward=backward)
            assert found.mxu_flops(backward=backward) == whole.mxu_flops(backward=backward)
        assert [k.spills for k in found.kernels] == [k.spills for k in whole.kernels] == [10, 13]
        assert [k.inner_loops for k in found.kernels] == [k.inner_loops for k in whole.kernels]
        assert found.kernels[0].grid == (4, 2)
    (path,) = where.iterdir()
    assert path.name.startswith("v5p-loads-")
    assert json.loads(path.read_text())["key"]["kwargs"] == {"blocks": [1, 2], "mask": "causal"}


def test_what_costs_follow_from_is_measured_again(folder, monkeypatch):
    where, asked = folder
    own = Spec("benchmarks.kernel_cycles.contests.attention:own_attention", {"seq": 1})
    peer = Spec("benchmarks.kernel_cycles.static.peers:tokamax_splash", {"seq": 1})

    def measured() -> list[str]:
        asked.clear()
        for spec in (own, peer):
            cache.Cache(where).measure(spec, "v5p")
        return [spec.function.rpartition(":")[2] for spec in asked]

    both = ["own_attention", "tokamax_splash"]
    assert (measured(), measured()) == (both, [])
    read = Path.read_bytes

    def edited(name):
        def read_bytes(path):
            return read(path) + b"#" if path.name == name else read(path)

        monkeypatch.setattr(Path, "read_bytes", read_bytes)

    for name, expected in {
        "tpu_backward.py": ["own_attention"],
        "tuned.json": ["own_attention"],
        "control.py": both,
        "bench.py": [],
        "table.py": [],
    }.items():
        edited(name)
        assert (name, measured()) == (name, expected)
        assert measured() == []
    monkeypatch.setattr(cache, "versions", lambda *names: f"{names} 2")
    assert measured() == both
    cache.Cache(where).measure(own, "v6e")
    assert len(asked) == 3


def test_the_command_prints_the_table_of_the_shapes_asked(folder, capsys, monkeypatch):
    where, asked = folder
    monkeypatch.setattr(bench, "has_compiler", lambda: True)
    monkeypatch.setattr(cache, "measure", lambda spec, chip: asked.append(spec) or enough())

    def enough() -> CallCosts:
        one = costs(100.0, 200.0)
        many = [KernelCosts(**vars(k) | {"mxu_cycles": 10**12}) for k in one.kernels]
        return CallCosts(one.chip, tuple(many), (), 0)

    arguments = ["--all", "--cache", str(where), "--head-dim", "64", "--seq", "4096"]
    for _ in range(2):
        assert bench.main([*arguments, "--chip", "v6e"]) == 0
        out, err = capsys.readouterr()
        shown = [line.split(" | ")[0] for line in out.splitlines() if "ours" in line]
        assert shown == [
            "| 64 4,096 causal",
            "| 64 4,096 window:1024",
            "| 64 4,096 segments:8",
        ]
        assert len(err.splitlines()) == 6
    assert len(asked) == 6
    assert bench.main([*arguments, "--peers", "--mask", "causal", "--chip", "v6e"]) == 0
    out, err = capsys.readouterr()
    assert "0 of 2 ratios" in out  # all take as long
    assert f"{OWN} 100.0 µs" in err
