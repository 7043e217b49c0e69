"""Check that a run whose processes are killed repeatedly ends like an unbroken one.

    python benchmarks/torture.py --kills 100

Three campaigns of `maxlm train`, each process of which is a host: on one; on two; on
one and two in turn, with other meshes. At random moments of start-up, restoring, steps,
saves and copies, one host, or all of them, get SIGKILL. A remaining host must exit with
code 76. Then all are started again, and must resume from the newest complete
checkpoint. At the end a run is compared with an unbroken one: arrays, records and
metadata bit by bit, on other meshes within what unbroken runs on those differ by, and a
witness's record of every batch that was ever taken. Exits with 1 if anything differs,
saved progress is lost, a worker process outlives its host, or a host ends in another
way.
"""

import argparse
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from same_run import (
    Compared,
    batches_seen,
    compare,
    copied,
    final_arrays,
    furthest,
    left_behind,
)
from torture_hosts import (
    PATIENCE,
    HostAttempt,
    Layout,
    TortureJob,
    last_step,
    listed,
    started,
)

LOST = 76
PEERS = 20  # seconds that hosts wait for each other, at the start and later
AIMS = ("start-up", "restore", "step", "save", "local save", "copy")
MISSED = 8  # steps after the target at which it is killed in any case
# On changed meshes, more roundings than an unbroken run's own may add up.
SLACK = 4

ONE, TWO = Layout(1, 2, 1, 2), Layout(2, 1, 1, 2)
ALONE, REPLICAS, TWO_REPLICAS = (
    Layout(1, 1, 1, 1),
    Layout(1, 2, 2, 1),
    Layout(2, 1, 2, 1),
)


@dataclass(frozen=True)
class Campaign:
    name: str
    layouts: Sequence[Layout]
    """In turn."""
    like: Layout
    """Of the unbroken run that it is compared with."""


CAMPAIGNS = (
    Campaign("one", (ONE,), ONE),
    Campaign("two", (TWO,), TWO),
    Campaign("changing", (TWO, REPLICAS, TWO_REPLICAS, ALONE, ONE), ONE),
)


@dataclass(frozen=True)
class Kill:
    """One kill, as it happened."""

    campaign: str
    layout: Layout
    aim: str
    during: str
    """What was under way."""
    which: str
    seconds: float
    """After the hosts were started."""
    step: int
    """The last one recorded."""
    survived: float | None
    """Seconds until the host that was left had ended; None: there was none."""
    wrong: str
    """How it began or ended, if not as it should, and what outlived it."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kill runs again and again, and compare."
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--text", nargs="+", help="default: part of Python's standard library"
    )
    parser.add_argument(
        "--folder", type=Path, help="keep the runs here; default: nowhere"
    )
    options = parser.parse_args()
    choose = random.Random(options.seed)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        text = options.text or [f"{sysconfig.get_path('stdlib')}/asyncio/*.py"]
        write_config(folder, text, options.steps)
        job = TortureJob(folder, options.steps)
        layouts = (ONE, TWO, ALONE, REPLICAS)
        startup = {layout.hosts: unbroken(job, layout) for layout in layouts}
        limit = SLACK * rounding(job, (ONE, ALONE, REPLICAS))
        kills, compared = [], []
        for number, campaign in enumerate(CAMPAIGNS):
            count = len(range(number, options.kills, len(CAMPAIGNS)))
            kills += broken(job, campaign, count, startup, choose)
            compared.append((campaign, differences(job, campaign, limit)))
        return show(kills, compared, limit)


def write_config(folder: Path, text: Sequence[str], steps: int) -> None:
    """A small run with all that a state can hold, and checkpoints in three places."""
    import yaml

    config = {
        "folder": str(folder / "runs"),
        "compilation_cache": str(folder / "compiled"),
        "model": {
            "vocab_size": 320,
            "num_layers": 2,
            "d_model": 32,
            "max_seq_len": 32,
            "remat": "none",
            "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
            "mlp": {"d_ff": 64},
        },
        "tokenizer": {"vocab_size": 320},
        "data": {
            "sources": [{"name": "text", "documents": list(text)}],
            "heldout_fraction": 0.1,
            "seq_len": 32,
            "batch_size": 8,
            "build_workers": 1,
        },
        "schedule": {"warmup_steps": min(10, steps), "learning_rate": 1e-3},
        "train": {
            "steps": steps,
            "max_device_rows": 4,
            "ema_decay": 0.9,
            "eval_every": 15,
            "eval_batches": 1,
        },
        "checkpoint": {
            "every_steps": 6,
            "local_every_steps": 2,
            "local_folder": str(folder / "local"),
            "remote_folder": str(folder / "remote"),
        },
        "faults": {"join_seconds": PEERS, "peer_seconds": PEERS},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def to_the_end(attempt: HostAttempt) -> None:
    for process in attempt.processes:
        process.wait(PATIENCE)
    if not attempt.done():
        codes = [process.returncode for process in attempt.processes]
        sys.exit(f"{attempt.name} ended with {codes}: see its .log (--folder keeps it)")


def unbroken(job: TortureJob, layout: Layout) -> float:
    """Train without a break; seconds from the start to the first step."""
    name = unbroken_name(layout)
    print(f"unbroken run: {layout} ...", flush=True)
    with started(job, name, layout) as attempt:
        attempt.until(attempt.training)
        seconds = attempt.seconds
        to_the_end(attempt)
    return seconds


def unbroken_name(layout: Layout) -> str:
    return "unbroken-" + str(layout).replace(", ", "-").replace(" ", "")


def broken(
    job: TortureJob,
    campaign: Campaign,
    count: int,
    startup: dict[int, float],
    choose: random.Random,
) -> list[Kill]:
    """Train with ``count`` kills, then to the end."""
    aims = [AIMS[i % len(AIMS)] for i in range(count)]
    choose.shuffle(aims)
    targets = sorted(choose.choices(range(1, max(2, job.steps * 9 // 10)), k=count))
    if count:  # The last save and copy are like no other: nothing comes after them.
        aims[-1] = choose.choice(("save", "copy"))
        targets[-1] = job.steps
    kills = []
    before = None
    for number, (aim, target) in enumerate(zip(aims, targets, strict=True)):
        layout = campaign.layouts[number % len(campaign.layouts)]
        saved = newest(job, campaign.name, layout if layout == before else None)
        before = layout
        with started(job, campaign.name, layout) as attempt:
            wait_for(attempt, aim, target, startup[layout.hosts], choose)
            kills.append(kill(attempt, campaign, layout, aim, saved, choose))
        last = kills[-1]
        words = f"{campaign.name} {number + 1}/{count} ({layout}): {last.which} during"
        print(f"{words} {last.during}, step {last.step} {last.wrong}", flush=True)
    layout = campaign.layouts[count % len(campaign.layouts)]
    saved = newest(job, campaign.name, layout if layout == before else None)
    with started(job, campaign.name, layout) as attempt:
        to_the_end(attempt)
        if why := lost_progress(attempt, saved):
            sys.exit(f"{attempt.name}: {why}")
    return kills


def wait_for(
    attempt: HostAttempt, aim: str, target: int, startup: float, choose: random.Random
) -> None:
    """Return at a random moment of start-up or restoring, or of what is aimed at from
    ``target`` on."""
    if aim == "start-up":
        attempt.until(lambda: False, choose.uniform(0, startup))
        return
    if aim == "restore":
        attempt.until(attempt.restoring)
        attempt.until(attempt.training, choose.uniform(0, startup / 4))
        return
    attempt.until(lambda: attempt.training() and last_step(attempt.run) >= target)
    kinds = {
        "save": attempt.saving,
        "local save": attempt.saving_local,
        "copy": attempt.copying,
    }
    under_way = kinds.get(aim, lambda: True)
    # A moment that is too short to be seen must not let the run go on to its end.
    attempt.until(lambda: under_way() or last_step(attempt.run) >= target + MISSED)
    time.sleep(choose.choice((0, choose.uniform(0, 0.03))))


def kill(
    attempt: HostAttempt,
    campaign: Campaign,
    layout: Layout,
    aim: str,
    saved: int,
    choose: random.Random,
) -> Kill:
    """Kill one process or all, and see how the others end.

    Args:
        saved: the newest checkpoint there was before.
    """
    count = len(attempt.processes)
    chosen = choose.choice([[number] for number in range(count)] + [list(range(count))])
    ended = [process.poll() for process in attempt.processes]
    during = attempt.during()
    for number in chosen:
        attempt.processes[number].kill()
    seconds = attempt.seconds
    killed = time.monotonic()
    survivors = [number for number in range(count) if number not in chosen]
    wrong = [
        f"process {n} had ended with {code}" for n, code in enumerate(ended) if code
    ]
    wrong += [why for why in (lost_progress(attempt, saved),) if why]
    for number in survivors:
        try:
            code = attempt.processes[number].wait(PEERS + 20)
            # When all is done it may not need who is killed any more.
            if code != LOST and not (code == 0 and attempt.said_done()):
                wrong.append(f"process {number} ended with {code}")
        except subprocess.TimeoutExpired:
            wrong.append(f"process {number} did not end")
    survived = time.monotonic() - killed if survivors else None
    for number in chosen:
        attempt.processes[number].wait()
    if not wrong and attempt.orphans():
        wrong.append("worker processes are left")
    which = "all" if len(chosen) == count else f"process {chosen[0]}"
    return Kill(
        campaign.name,
        layout,
        aim,
        "nothing (done)" if ended == [0] * count else during,
        which,
        seconds,
        last_step(attempt.run),
        survived,
        "; ".join(wrong),
    )


def newest(job: TortureJob, name: str, layout: Layout | None) -> int:
    """The newest checkpoint that is complete; hosts' own count for the ``layout`` they
    are of."""
    folder = job.run(name) / "checkpoints"
    copies = job.remote(name)
    steps = {int(path.name) for path in listed(folder) if path.name.isdigit()}
    steps |= {int(path.name) for path in listed(copies) if (path / "COMPLETE").exists()}
    if layout:
        hosts = [
            job.folder.glob(f"local/{name}-*/process-{n}/*")
            for n in range(layout.hosts)
        ]
        steps_by_host = [
            {int(path.stem) for path in host_paths if path.stem.isdigit()}
            for host_paths in hosts
        ]
        steps |= set.intersection(*steps_by_host)
    return max(steps, default=0)


def lost_progress(attempt: HostAttempt, saved: int) -> str:
    """In words, if training went on from before what was saved, or found it damaged."""
    event = attempt.went_on()
    if event is None:
        return ""
    if event["step"] < saved:
        return f"went on from step {event['step']}, and {saved} was saved"
    damaged = [step for step, why in event["skipped"] if "what was saved" in why]
    return f"checkpoints {damaged} were damaged" if damaged else ""


def rounding(job: TortureJob, layouts: Sequence[Layout]) -> float:
    """The most that an array differs by between unbroken runs on different meshes."""
    states = [
        final_arrays(job.run(unbroken_name(layout)), job.steps) for layout in layouts
    ]
    return max(furthest(*pair)[1] for pair in combinations(states, 2))


def differences(job: TortureJob, campaign: Campaign, limit: float) -> list[Compared]:
    whole = unbroken_name(campaign.like)
    same = all(layout == campaign.like for layout in campaign.layouts)
    runs = job.run(whole), job.run(campaign.name)
    return [
        *compare(*runs, job.steps, None if same else limit),
        batches_seen(job.seen(whole), job.seen(campaign.name)),
        copied(runs[1], job.remote(campaign.name), job.steps),
        left_behind(
            runs[1], job.folder / "local", campaign.name, job.remote(campaign.name)
        ),
    ]


def show(
    kills: Sequence[Kill],
    compared: Sequence[tuple[Campaign, list[Compared]]],
    limit: float,
) -> int:
    """Print both tables; the exit code."""
    from rich.console import Console
    from rich.table import Table

    done = Table(
        "campaign", "hosts", "aimed at", "killed", "during", "after", "step", "survivor"
    )
    for record in kills:
        left = "" if record.survived is None else f"{record.survived:.1f} s"
        done.add_row(
            record.campaign,
            str(record.layout),
            record.aim,
            record.which,
            record.during,
            f"{record.seconds:.1f} s",
            str(record.step),
            f"{left} {record.wrong}".strip(),
        )
    same = Table("campaign", "compared with the unbroken run", "found", "wrong")
    for campaign, comparisons in compared:
        for comparison in comparisons:
            same.add_row(
                campaign.name,
                comparison.subject,
                comparison.result,
                "yes" if comparison.wrong else "no",
            )
    console = Console(width=110, highlight=False)
    console.print(done, same)
    survived = {early: [0.0] for early in (True, False)}
    for record in kills:
        survived[record.during == "start-up"].append(record.survived or 0.0)
    longest = f"; survivors ended within {max(survived[False]):.1f} s"
    longest += (
        f", those that waited for a host to come within {max(survived[True]):.1f} s"
    )
    wrong = sum(bool(record.wrong) for record in kills)
    print(f"{len(kills)} kills, {wrong} of which ended wrong{longest}")
    during = Counter(record.during for record in kills).most_common()
    print(f"during: {', '.join(f'{name} {count}' for name, count in during)}")
    print(
        f"changed meshes may differ by {limit:.1e}, {SLACK} times what unbroken runs "
        f"there do"
    )
    differs = any(
        comparison.wrong for _, comparisons in compared for comparison in comparisons
    )
    return int(wrong > 0 or differs)


if __name__ == "__main__":
    sys.exit(main())
