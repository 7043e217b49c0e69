"""The report page holds the whole plan, needs no network, and is written whole or not at all."""

import json
import re

import pytest

from maxlm.config import MaxlmError, load_config
from maxlm.plan.html import render_report, write_report
from maxlm.plan.predict import Machine, plan_run
from maxlm.run import RunConfig
from maxlm.sharding import MESH_AXES

HOSTILE = "a </script><script>alert(1)</script> <!--<script> & {{plan}} {{title}} ü"


def plan(name="demo", machine=None):
    config = load_config(RunConfig, "llama3_8b", []).value.model_copy(update={"name": name})
    where = Machine.from_name(machine) if machine else None
    sizes = None if where else {axis: 8 if axis == "fsdp" else 1 for axis in MESH_AXES}
    return json.loads(json.dumps(plan_run(config, where, sizes=sizes).to_json()))


def data_of(page):
    return re.findall(r'<script id="plan" type="application/json">(.*?)</script>', page, re.S)


@pytest.mark.parametrize("machine", ["h100x64", None])
def test_the_plan_can_be_read_back(machine):
    expected = plan(machine=machine)
    (data,) = data_of(render_report(expected))
    assert json.loads(data) == expected
    assert (expected["time"] is None) == (machine is None)


def test_a_name_cannot_break_out():
    (data,) = data_of(render_report(plan(HOSTILE)))
    assert json.loads(data)["name"] == HOSTILE
    page, usual = render_report(plan(HOSTILE)), render_report(plan())
    assert page.count("<script") == usual.count("<script")
    assert page.count("</script") == usual.count("</script")
    title = "a &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; &lt;!--&lt;script&gt; &amp;"
    assert f"<title>{title} {{{{plan}}}} {{{{title}}}} ü · plan</title>" in page


def test_nothing_is_fetched():
    page = render_report(plan(machine="h100x64"))
    outside = re.compile(
        r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//|url\(|@import|fetch\(|import\("""
    )
    assert not outside.search(page)
    assert "default-src 'none'" in page


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        render_report({"name": "demo", "fits": float("inf")})


def test_a_write_that_fails_midway_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self, text, encoding):
        self.write_bytes(text.encode(encoding)[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(MaxlmError, match="No space left on device"):
        write_report(plan(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
