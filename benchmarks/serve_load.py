"""Throughput and waiting times of the server under load.

    python benchmarks/serve_load.py FOLDER [--rounds 3]
    python benchmarks/serve_load.py NAME --peer URL

FOLDER is a run or a Hugging Face checkpoint. The server is started with 8 rows, and
asked for 64 completions of mixed lengths (prompts of 8 to 256 tokens, outputs of 8 to
128, drawn once): one after the other; in batches of 8 that start together, whose rows
end each on its own or (static batching) are all computed to the end of the longest; and
8 at a time. Each round does all; printed are wanted tokens/s and the ratios' medians
and spreads. Then the first token of short requests, alone and while a prompt of 2,000
tokens is computed. Another server that speaks OpenAI's protocol, and calls its model
NAME, gets the same requests, but static batches, for which the protocol has no field.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from tests.ports import free_port

NUM_REQUESTS, CONCURRENCY = 64, 8
WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
)
Request = tuple[str, int]
"""Prompt, output's length."""


def make_requests() -> list[Request]:
    random = np.random.default_rng(0)
    prompts = np.exp(random.uniform(np.log(8), np.log(256), NUM_REQUESTS)).astype(int)
    outputs = np.exp(random.uniform(np.log(8), np.log(128), NUM_REQUESTS)).astype(int)
    return [
        (write_prompt(random, size), int(new))
        for size, new in zip(prompts, outputs, strict=True)
    ]


def write_prompt(random: np.random.Generator, size: int) -> str:
    """Writes words that are a token each in most vocabularies."""
    return " ".join(random.choice(WORDS, size))


class Client:
    def __init__(self, url: str, model: str, **options: Any):
        self.options = {"model": model, "temperature": 0, **options}
        self.http = httpx.AsyncClient(base_url=url, timeout=None)

    async def complete(self, request: Request, **options: Any) -> int:
        """Output tokens of a completion."""
        prompt, new = request
        body = self.options | {"prompt": prompt, "max_tokens": new, **options}
        answer = await self.http.post("/completions", json=body)
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"]

    async def time_first_token(self, request: Request) -> float:
        prompt, new = request
        body = self.options | {"prompt": prompt, "max_tokens": new, "stream": True}
        start = time.perf_counter()
        async with self.http.stream("POST", "/completions", json=body) as answer:
            first = 0.0
            async for line in answer.aiter_lines():
                if line.startswith("data:") and not first:
                    first = time.perf_counter() - start
        return first


async def run_sequential(client: Client, requests: Sequence[Request]) -> int:
    return sum([await client.complete(request) for request in requests])


async def run_batches(client: Client, requests: Sequence[Request]) -> int:
    total = 0
    for start in range(0, len(requests), CONCURRENCY):
        batch = requests[start : start + CONCURRENCY]
        total += sum(await asyncio.gather(*map(client.complete, batch)))
    return total


async def run_static(client: Client, requests: Sequence[Request]) -> int:
    total = 0
    for start in range(0, len(requests), CONCURRENCY):
        batch = requests[start : start + CONCURRENCY]
        longest = max(new for _, new in batch)
        completions = (
            client.complete((prompt, longest), min_tokens=longest)
            for prompt, _ in batch
        )
        await asyncio.gather(*completions)
        total += sum(new for _, new in batch)
    return total


async def run_continuous(client: Client, requests: Sequence[Request]) -> int:
    limit = asyncio.Semaphore(CONCURRENCY)

    async def run(request: Request) -> int:
        async with limit:
            return await client.complete(request)

    return sum(await asyncio.gather(*map(run, requests)))


async def time_rate(work: Awaitable[int]) -> float:
    """Tokens/s."""
    start = time.perf_counter()
    return await work / (time.perf_counter() - start)


async def measure_first_tokens(client: Client, long_prompt: bool) -> list[float]:
    """First tokens of 8 short requests, one after the other, while a long prompt is
    computed."""
    random = np.random.default_rng(int(long_prompt))
    background = None
    if long_prompt:
        prompt = write_prompt(random, 2_000)
        background = asyncio.create_task(client.complete((prompt, 1)))
        await asyncio.sleep(0.05)
    times = []
    while len(times) < 8 and (background is None or not background.done()):
        prompt = write_prompt(random, 32)
        times.append(await client.time_first_token((prompt, 2)))
    if background is not None:
        await background
    return times


async def measure(client: Client, rounds: int, name: str) -> None:
    requests = make_requests()
    runs = {
        "one by one": run_sequential,
        "batches": run_batches,
        "static batches": run_static,
        "continuous": run_continuous,
    }
    if name == "peer":
        del runs["static batches"]
    rates: dict[str, list[float]] = {label: [] for label in runs}
    await run_continuous(client, requests[:CONCURRENCY])  # warms up
    for _ in range(rounds):
        for label, run in runs.items():
            rates[label].append(await time_rate(run(client, requests)))
    for label, label_rates in rates.items():
        ratios = sorted(
            c / r for c, r in zip(rates["continuous"], label_rates, strict=True)
        )
        words = f"{statistics.median(ratios):.2f}× ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        words = f"   continuous is {words}" if label != "continuous" else ""
        print(
            f"{name}: {label:15}{statistics.median(label_rates):8.1f} tokens/s{words}",
            flush=True,
        )
    alone = [
        t for _ in range(rounds) for t in await measure_first_tokens(client, False)
    ]
    beside = [
        t for _ in range(rounds) for t in await measure_first_tokens(client, True)
    ]
    a, b = statistics.median(alone), statistics.median(beside)
    print(
        f"{name}: first token {1e3 * a:.0f} ms; beside a prompt of 2,000: "
        f"{1e3 * b:.0f} ms, "
        f"{b / a:.2f}× ({len(beside)} requests)"
    )


@contextmanager
def serve(folder: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """Serves a folder as "model" while the context lasts; yields the protocol's URL."""
    port = free_port()
    main = "import sys; from maxlm.cli.main import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        main,
        "serve",
        folder,
        "--port",
        str(port),
        "--name",
        "model",
    ]
    command += [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        print(server.stdout.readline(), end="", flush=True)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-tokens", type=int, default=64)
    parser.add_argument("--peer", help="URL up to /v1 of a server that runs already")
    args = parser.parse_args()
    if args.peer:
        return asyncio.run(measure(Client(args.peer, args.folder), args.rounds, "peer"))
    sizes = {"max_sequences": CONCURRENCY, "max_length": 2304, "page_size": 32}
    sizes |= {"prefill_tokens": args.prefill_tokens, "prefix_cache": False}
    with serve(args.folder, sizes) as url:
        asyncio.run(
            measure(Client(url, "model", ignore_eos=True), args.rounds, "maxlm")
        )


if __name__ == "__main__":
    main()
