"""Shared by benchmarks with named cases: selecting cases, and running each in its own
process."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any


def add_cases(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`chosen` reads."""
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument(
        "--list", action="store_true", help="print the names of the cases"
    )


def chosen(
    parser: argparse.ArgumentParser, args: argparse.Namespace, cases: Iterable[str]
) -> list[str]:
    """The cases asked for; ends the program after a list, or at a name that is none."""
    cases = list(cases)
    if args.list:
        print("\n".join(cases))
        sys.exit()
    unknown = set(args.cases) - set(cases)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; --list prints them")
    return args.cases or cases


def in_child(script: str, *arguments: str) -> Any:
    """What a script prints with these arguments and ``--child``, as JSON; on CPU
    devices."""
    done = subprocess.run(
        [sys.executable, script, *arguments, "--child"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        sys.exit(
            f"{arguments[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}"
        )
    return json.loads(done.stdout)
