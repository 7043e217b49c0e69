"""The report page holds the whole plan and needs no network."""

import json
import re

from maxlm.config import load_config
from maxlm.plan.html import render_report
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


def test_the_plan_can_be_read_back_and_its_name_cannot_break_out():
    expected = plan(HOSTILE, "h100x64")
    (data,) = data_of(render_report(expected))
    assert json.loads(data) == expected
    assert expected["name"] == HOSTILE
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
