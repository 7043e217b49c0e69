"""Prompts of an environment as a file of rows."""

import json
from itertools import count as count_from
from itertools import islice
from pathlib import Path

from maxlm.config import Config
from maxlm.rl.environments import Environment, EnvironmentConfig
from maxlm.runtime.files import replace_file


class EnvironmentSettings(Config):
    """The setting of a run that says where prompts come from."""

    environment: EnvironmentConfig


def write_prompts(
    environment: Environment, path: str | Path, count: int | None, *, seed: int = 0
) -> int:
    """Writes an environment's rows as JSON Lines, the first ``count`` or all there are;
    returns how many. Raises MaxlmError: they cannot be read or written."""
    rows = environment.open_prompts(seed)
    numbers = count_from() if rows.num_rows is None else range(rows.num_rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_written = 0
    with replace_file(path) as temporary, temporary.open("w") as file:
        for number in islice(numbers, count):
            file.write(f"{json.dumps(rows[number], ensure_ascii=False)}\n")
            num_written += 1
    return num_written
