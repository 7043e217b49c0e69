"""The README's examples run as they stand, with nothing of maxlm imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels

pytestmark = pytest.mark.heavy

SHOW = """
import sys
assert jnp.isfinite(value) and [x.shape for x in gradients] == list(shapes)
assert all(jnp.abs(x.astype("float32")).max() > 0 for x in gradients)
assert o.shape == (31, 8, 64) and jnp.all(o[1:] > 0) and lse.shape == (31, 8)
assert y.shape == (1, 100, 32) and jnp.abs(y).min() > 0
assert inputs.shape == (1, 3, 32) and state.shape == (1, 32, 16)
print(sorted(name for name in sys.modules if name.split(".")[0] == "maxlm"))
"""


@pytest.mark.more
def test_the_examples_run_without_maxlm(tmp_path):
    folder = Path(pallas_kernels.__file__).parent
    text = (folder / "README.md").read_text()
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    done = subprocess.run(
        [sys.executable, "-c", code + SHOW],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
