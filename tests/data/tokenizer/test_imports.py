"""What importing tokenizers does to a process."""

import subprocess
import sys
from pathlib import Path

CODE = """
import os, sys
before = dict(os.environ)
import maxlm.cli.tokenizer
assert not {"jax", "tokenizers", "numpy"} & {*sys.modules}
import maxlm.data.tokenizer
assert not {"jax", "tokenizers", "sentencepiece", "jinja2"} & {*sys.modules}
assert dict(os.environ) == before
"""


def test_importing_changes_no_environment_and_loads_no_heavy_library():
    subprocess.run(
        [sys.executable, "-c", CODE], cwd=Path(__file__).parents[3], check=True
    )
