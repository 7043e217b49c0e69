"""Shared by benchmarks: selecting named cases, running each in its own process, and
timing programs beside each other."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax


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


def time_alternately(
    programs: Sequence[Callable[[], Any]], rounds: int
) -> list[list[float]]:
    """Returns the seconds of each program in each round. Rounds run all programs one
    after the other, as other work on the machine slows all alike; one round before
    these, which compiles, is left out."""
    seconds: list[list[float]] = [[] for _ in programs]
    for number in range(rounds + 1):
        for program, run_seconds in zip(programs, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(program())
            if number > 0:
                run_seconds.append(time.perf_counter() - start)
    return seconds
