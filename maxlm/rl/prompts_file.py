"""Prompts of an environment as a file of rows."""

import json
from itertools import count as count_from
from itertools import islice
from pathlib import Path

from maxlm.config import Config, MaxlmError
from maxlm.data.loader.permutation import derive_key
from maxlm.rl.environments import Environment, EnvironmentConfig
from maxlm.runtime.files import replace_file


class EnvironmentSettings(Config):
    """The setting of a run that says where prompts come from."""

    environment: EnvironmentConfig


def write_prompts(
    environment: Environment,
    path: str | Path,
    count: int | None,
    *,
    seed: int = 0,
    examples: float | None = None,
) -> int:
    """Writes an environment's rows as JSON Lines, the first ``count`` or all there are;
    returns how many.

    Args:
        seed: of rows that are drawn.
        examples: rows get a column ``completion`` to tune a model on: this share of
            them, drawn, the environment's example, others its flawed one. None: no row
            gets it.

    Raises:
        MaxlmError: rows that cannot be read or written, have no example, or have no end
            and are not counted.
    """
    rows = environment.open_prompts(seed)
    if rows.num_rows is None and count is None:
        message = f"kind={environment.kind} draws prompts without end"
        fix = "say how many to write: --count 2000"
        raise MaxlmError(message, where="--count", fix=fix)
    numbers = count_from() if rows.num_rows is None else range(rows.num_rows)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    num_written = 0
    with replace_file(path) as temporary, temporary.open("w") as file:
        for number in islice(numbers, count):
            row = rows[number]
            if examples is not None:
                share = derive_key(seed, "examples", number) / 2**64
                if share < examples:
                    completion = environment.write_example(row)
                else:
                    draw = derive_key(seed, "flawed examples", number)
                    completion = environment.write_flawed_example(row, draw)
                row = {**row, "completion": completion}
            file.write(f"{json.dumps(row, ensure_ascii=False)}\n")
            num_written += 1
    return num_written
