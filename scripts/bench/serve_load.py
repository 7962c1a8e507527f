"""Load a server of `jitexport serve` until it is full: throughput, waiting times, batch fill, refusals, memory.

    python scripts/bench/serve_load.py engines/demo-4x                # closed loops, then open ones at rising rates
    python scripts/bench/serve_load.py engines/demo-4x --hold 1800 --share 0.9   # then half an hour at 90% of that
    python scripts/bench/serve_load.py engines/demo-4x --json

Starts the server itself, at this machine's own address only. Every image is compared with the one that the same prompt
and seed gave alone; one that differs, or a request that is neither answered nor refused, is an error (exit code 1).
First, in turns with the server at twice as many clients as a batch has images, `Pipeline` in a loop at that batch, in a
process of its own (--turns): what a full server keeps of it is the median over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from harness import facts, parser, said

from jitexport.bundle.reading import read_manifest

PROMPTS = ("red apple on a blue background", "owl on a yellow background", "frog on a pink background", "a cat")
SEEDS = range(4)
ROUTE = "/v1/images/generations"
_LOOP = """
import json, sys, time, torch, jitexport
pipe = jitexport.load(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
from jitexport.png import encode_png
def batch(k):
    seeds = [torch.Generator().manual_seed(k + i) for i in range(pipe.batch_size)]
    for image in pipe([sys.argv[2]] * pipe.batch_size, generator=seeds).images: encode_png(image)
batch(0)
begun, batches = time.perf_counter(), 0
while time.perf_counter() - begun < float(sys.argv[3]):
    batch(batches); batches += 1
print(json.dumps(batches * pipe.batch_size / (time.perf_counter() - begun)))
"""


@dataclass
class Run:
    """What a load came to.

    Attributes:
        load: clients, or images a second.
        seconds: it lasted.
        statuses: answers by status.
        wrong: images that are not those of their prompt and seed; `lost`: requests that got no answer.
        latencies: seconds of the images that were made.
        fill: images of a batch over its room, the mean.
        overheads: seconds that a request spent neither waiting, nor computing, nor being encoded.
        memory: resident bytes at the beginning and the end.
    """

    load: str
    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    lost: int = 0
    latencies: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)
    fill: float = math.nan
    memory: tuple[float, float] = (math.nan, math.nan)

    def quantile(self, q: float, of: list[float] | None = None) -> float:
        """A quantile of the latencies; NaN without any."""
        values = sorted(self.latencies if of is None else of)
        return values[min(len(values) - 1, int(q * len(values)))] if values else math.nan

    @property
    def throughput(self) -> float:
        """Images a second."""
        return self.statuses[200] / self.seconds if self.seconds else math.nan

    def row(self) -> str:
        """As a line of the table."""
        p50, p95, p99 = (self.quantile(q) for q in (0.5, 0.95, 0.99))
        share = 1000 * self.quantile(0.5, self.overheads)
        refused, other = self.statuses[503], sum(self.statuses.values()) - self.statuses[200] - self.statuses[503]
        before, after = (m / 1e6 for m in self.memory)
        return (
            f"| {self.load} | {self.throughput:.2f} | {p50:.2f} | {p95:.2f} | {p99:.2f} | {self.fill:.0%} | "
            f"{refused} | {other + self.lost} | {self.wrong} | {share:.1f} | {before:.0f} -> {after:.0f} |"
        )


HEADER = (
    "| load | images/s | p50 s | p95 s | p99 s | batch fill | refused | failed | wrong | own ms | MB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


class Client:
    """Asks one server, and knows what it should answer."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=600, trust_env=False, limits=limits)
        self.expected: dict[tuple[str, int], str] = {}

    async def learn(self) -> None:
        """The images of all prompts and seeds, one at a time."""
        for prompt in PROMPTS:
            for seed in SEEDS:
                answer = await self.http.post(ROUTE, json={"prompt": prompt, "seed": seed})
                self.expected[prompt, seed] = answer.raise_for_status().json()["data"][0]["b64_json"]

    async def ask(self, run: Run, rng: random.Random) -> None:
        """A request, counted."""
        prompt, seed = rng.choice(PROMPTS), rng.choice(SEEDS)
        begun = time.perf_counter()
        try:
            answer = await self.http.post(ROUTE, json={"prompt": prompt, "seed": seed})
        except httpx.HTTPError as error:
            run.lost += 1
            print(f"no answer after {time.perf_counter() - begun:.1f} s: {error!r}", file=sys.stderr, flush=True)
            return
        taken = time.perf_counter() - begun
        run.statuses[answer.status_code] += 1
        if answer.status_code not in (200, 503):
            print(f"{answer.status_code} after {taken:.1f} s: {answer.text[:300]}", file=sys.stderr, flush=True)
        if answer.status_code == 200:
            made = answer.json()["data"][0]
            run.latencies.append(taken)
            run.overheads.append(taken - sum(made["jitexport"]["seconds"].values()))
            run.wrong += made["b64_json"] != self.expected[prompt, seed]

    async def metrics(self) -> dict[str, float]:
        """Sums over bundles, by name."""
        found: dict[str, float] = {}
        for line in (await self.http.get("/metrics")).text.splitlines():
            if match := re.fullmatch(r"(\w+)(?:\{.*\})? (\S+)", line):
                found[match[1]] = found.get(match[1], 0.0) + float(match[2])
        return found

    async def measured(self, run: Run, work: asyncio.Future[None]) -> Run:
        """Work, with what the server counted meanwhile."""
        before, begun = await self.metrics(), time.perf_counter()
        await work
        run.seconds, after = time.perf_counter() - begun, await self.metrics()
        batches = after["jitexport_batch_fill_count"] - before.get("jitexport_batch_fill_count", 0)
        filled = after["jitexport_batch_fill_sum"] - before.get("jitexport_batch_fill_sum", 0)
        run.fill = filled / batches if batches else math.nan
        run.memory = (before["process_resident_memory_bytes"], after["process_resident_memory_bytes"])
        return run

    async def closed(self, clients: int, seconds: float) -> Run:
        """Clients that each ask again as soon as they are answered."""
        run, until = Run(f"{clients} clients"), time.perf_counter() + seconds

        async def one(k: int) -> None:
            rng = random.Random(k)
            while time.perf_counter() < until:
                await self.ask(run, rng)

        return await self.measured(run, asyncio.gather(*(one(k) for k in range(clients))))

    async def open(self, rate: float, seconds: float) -> Run:
        """Requests at random times, so many a second on average, whatever becomes of them."""
        run, rng = Run(f"{rate:.2f} a second"), random.Random(0)

        async def arrive() -> None:
            tasks, until = [], time.perf_counter() + seconds
            while time.perf_counter() < until:
                tasks.append(asyncio.ensure_future(self.ask(run, rng)))
                await asyncio.sleep(rng.expovariate(rate))
            await asyncio.gather(*tasks)

        return await self.measured(run, asyncio.ensure_future(arrive()))


def loop_throughput(bundle: Path, seconds: float) -> float:
    """Images a second of `Pipeline` in a loop, to PNG."""
    command = [sys.executable, "-c", _LOOP, str(bundle), PROMPTS[0], str(seconds)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@dataclass
class Turns:
    """Rounds of `Pipeline` in a loop, in images a second, and of the full server, each in turn."""

    loop: list[float] = field(default_factory=list)
    server: list[Run] = field(default_factory=list)

    def said(self) -> str:
        """The medians, and the server's share of the loop by round."""
        made = [run.throughput for run in self.server]
        kept = [full / loop for full, loop in zip(made, self.loop, strict=True)]
        return (
            f"`Pipeline` in a loop at the bundle's batch: {statistics.median(self.loop):.2f} images a second; "
            f"the full server: {statistics.median(made):.2f}, {statistics.median(kept):.0%} of it "
            f"({min(kept):.0%} to {max(kept):.0%} in {len(kept)} rounds)"
        )


async def measure(url: str, arguments: argparse.Namespace, show: list[Run], turns: Turns) -> None:
    """All loads, shown as they are done."""
    client = Client(url)
    while (await client.http.get("/ready")).status_code != 200:
        await asyncio.sleep(0.2)
    await client.learn()

    def done(run: Run) -> Run:
        show.append(run)
        if not arguments.json:
            print(run.row(), flush=True)
        return run

    full = 2 * read_manifest(arguments.bundle).batch
    for _ in range(arguments.turns):
        turns.loop.append(await asyncio.to_thread(loop_throughput, arguments.bundle, arguments.seconds))
        turns.server.append(done(await client.closed(full, arguments.seconds)))
    best = max((run.throughput for run in turns.server), default=0.0)
    for clients in arguments.clients:
        best = max(best, done(await client.closed(clients, arguments.seconds)).throughput)
    for share in arguments.rates:
        done(await client.open(share * best, arguments.seconds))
    if arguments.hold:
        done(await client.open(arguments.share * best, arguments.hold))
    await client.http.aclose()


def numbers(kind: type) -> object:
    """An option's list of numbers."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("bundle", type=Path)
    options.add_argument("--seconds", type=float, default=30, help="of each load")
    options.add_argument("--turns", type=int, default=3, help="rounds of `Pipeline` in a loop and the full server")
    options.add_argument("--clients", type=numbers(int), default=[1, 2, 4, 8, 16], help="of closed loops")
    options.add_argument("--rates", type=numbers(float), default=[0.5, 0.8, 0.9, 1.0, 1.5], help="shares of the best")
    options.add_argument("--hold", type=float, default=0, help="seconds at --share of the best, at the end")
    options.add_argument("--share", type=float, default=0.9)
    options.add_argument("--queue", type=int, default=16)
    options.add_argument("--json", action="store_true")
    arguments = options.parse_args()
    command = [sys.executable, "-m", "jitexport", "serve", str(arguments.bundle), "--port", "0", "--json"]
    runs: list[Run] = []
    turns = Turns()
    if not arguments.json:
        print(HEADER, flush=True)
    with subprocess.Popen(
        [*command, "--queue", str(arguments.queue)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ,
    ) as server:  # fmt: skip
        try:
            asyncio.run(measure(json.loads(server.stdout.readline())["url"], arguments, runs, turns))
        finally:
            server.send_signal(signal.SIGTERM)
    wrong = sum(run.wrong + run.lost + sum(n for s, n in run.statuses.items() if s not in (200, 503)) for run in runs)
    if arguments.json:
        rows = [vars(run) | {"throughput": run.throughput} for run in runs]  # `asdict` counts a Counter's items
        print(json.dumps({"conditions": facts(), "loop": turns.loop, "runs": rows}))
    else:
        print("", *([turns.said()] if turns.loop else []), said(facts()), sep="\n")
    return int(wrong > 0 or server.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
