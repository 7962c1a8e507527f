"""What lies in docs/results and docs/images: what each file shows, how it is made, and which code it measures."""

from dataclasses import dataclass

DEMO = "jitexport build --model demo --force"
#: Bundles that commands measure, and how they are built: anew in every run that needs them.
BUNDLES = {
    "engines/demo-4x": f"{DEMO} --speedup 4 --output engines/demo-4x",
    "engines/demo-7x": f"{DEMO} --speedup 7 --output engines/demo-7x",
    "engines/demo-5x": f"{DEMO} --speedup 5 --output engines/demo-5x",
    "engines/demo-10x": f"{DEMO} --speedup 10 --output engines/demo-10x",
    "engines/demo-10x-taylor": f"{DEMO} --speedup 10 --cache taylor --output engines/demo-10x-taylor",
    "engines/demo-4x-int8": f"{DEMO} --speedup 4 --quant int8 --output engines/demo-4x-int8",
    "engines/demo-7x-int8": f"{DEMO} --speedup 7 --quant int8 --output engines/demo-7x-int8",
}
#: Emptied when results are remade: bundles, images and pieces of older code must not go into them.
SCRATCH = "out/remake"
LATENCY = f"python scripts/bench/latency.py --again --out {SCRATCH}/latency --report docs/results"
IMAGES = f"--folder {SCRATCH}/images"

DEMO_MODEL = "jitexport/assets/demo"
_METHODS = (
    "jitexport/methods", "jitexport/models", "jitexport/sampler.py", "jitexport/schedule.py", "jitexport/solving.py",
    "jitexport/lifting.py", "jitexport/matching.py", "jitexport/resample.py", "jitexport/edges.py",
)  # fmt: skip
_ENGINES = ("jitexport/backends", "jitexport/kernels", "jitexport/quant.py", "jitexport/runtime")
_SPEED = (*_METHODS, *_ENGINES, "jitexport/profile")
_QUALITY = (*_METHODS, "jitexport/evaluate", DEMO_MODEL)
_PICTURES = (*_METHODS, DEMO_MODEL)


@dataclass(frozen=True)
class Result:
    """Files that one command writes.

    Attributes:
        name: what `remake.py --run` calls them.
        files: in docs/; the first one says when and where it was measured, if any does.
        shows: what is to be learnt from them.
        commands: run one after the other from the repository's root; none for what is made by hand.
        measures: source paths whose changes make the files old.
        stdout: of the files the one that the last command's output goes into.
        cpu_class: the only class of CPU to remake it on; any by default, since each run says on which.
        by_hand: how it is made where no command can.
    """

    name: str
    files: tuple[str, ...]
    shows: str
    measures: tuple[str, ...]
    commands: tuple[str, ...] = ()
    stdout: str | None = None
    cpu_class: str | None = None
    by_hand: str | None = None

    @property
    def bundles(self) -> list[str]:
        """Of `BUNDLES`, those that the commands name."""
        words = {word for command in self.commands for word in command.split()}
        return [path for path in BUNDLES if path in words]


def _latency(bundle: str) -> Result:
    file = f"results/latency-{bundle}.txt"
    return Result(
        f"latency-{bundle}", (file,), f"where the time of an image of the {bundle} bundle goes, beside diffusers",
        _SPEED, (f"jitexport profile engines/demo-{bundle} --against diffusers,eager --repeats 7",), stdout=file,
    )  # fmt: skip


def _profile(bundle: str) -> Result:
    file, picture = f"results/profile-{bundle}.txt", f"results/timeline-{bundle}.png"
    return Result(
        f"profile-{bundle}", (file, picture), f"the same for {bundle} beside all peers, as a table and a picture",
        _SPEED,
        (
            f"jitexport profile engines/demo-{bundle} --against diffusers,compile,few-step,eager --repeats 9 "
            f"--timeline docs/{picture}",
        ),
        stdout=file,
    )  # fmt: skip


def _quality(
    name: str, shows: str, options: str, code: tuple[str, ...] = (*_QUALITY, *_ENGINES), cpu_class: str | None = None
) -> Result:
    file = f"results/quality-{name}.json"
    commands = (f"python scripts/demo_model/quality.py {options} --json docs/{file}",)
    return Result(f"quality-{name}", (file,), f"counts of right pictures: {shows}", code, commands, cpu_class=cpu_class)


RESULTS = (
    Result(
        "in-turns", ("results/in-turns.txt",), "how many times faster than diffusers the four demo bundles are",
        _SPEED,
        (
            "jitexport profile engines/demo-4x engines/demo-7x engines/demo-4x-int8 engines/demo-7x-int8 "
            "--against diffusers,eager --repeats 7",
        ),
        stdout="results/in-turns.txt",
    ),
    Result(
        "speedups", ("results/speedups.txt",), "the same for speed-ups from 4 to 10, and 10 with forecasts", _SPEED,
        (
            "jitexport profile engines/demo-4x engines/demo-5x engines/demo-7x engines/demo-10x "
            "engines/demo-10x-taylor --against diffusers,eager --repeats 5",
        ),
        stdout="results/speedups.txt",
    ),
    Result(
        "in-turns-avx2", ("results/in-turns-avx2.txt",), "the same on a CPU without AVX-512", _SPEED,
        (
            "jitexport profile engines/demo-4x engines/demo-7x engines/demo-4x-int8 engines/demo-7x-int8 "
            "--against diffusers,eager --repeats 5",
        ),
        stdout="results/in-turns-avx2.txt", cpu_class="AVX2",
    ),
    *map(_latency, ("4x", "7x", "4x-int8", "7x-int8")),
    *map(_profile, ("4x", "7x", "4x-int8")),
    Result(
        "latency", ("results/latency.csv", "results/latency.png"),
        "latency against speed-up, batch and backend; rows of several machines, each with its date", _SPEED,
        (LATENCY, f"{LATENCY} --backend aoti --quant int8"),
    ),
    Result(
        "peers", ("results/peers.json", "results/peers.md", "results/peers.png"),
        "the demo model made faster in other ways, with likeness to 50 steps", _SPEED,
        (f"python scripts/bench/peers.py --prompts 6 --out {SCRATCH}/peers --report docs/results",),
    ),
    Result(
        "peers-amx", ("results/peers-amx.json", "results/peers-amx.md", "results/peers-amx.png"),
        "the same on a CPU with AMX, temporal methods among them, with what is closest at equal latency", _SPEED,
        (f"python scripts/bench/peers.py --prompts 6 --out {SCRATCH}/peers --report docs/results --name peers-amx",),
    ),
    Result(
        "peers-avx2", ("results/peers-avx2.json", "results/peers-avx2.md", "results/peers-avx2.png"),
        "the same on a CPU without AVX-512, OpenVINO among them", _SPEED,
        (f"python scripts/bench/peers.py --prompts 6 --out {SCRATCH}/peers --report docs/results --name peers-avx2",),
        cpu_class="AVX2",
    ),
    Result(
        "kernels", ("results/kernels.txt",), "the C++ kernels beside PyTorch's own ways", ("jitexport/kernels",),
        ("python scripts/bench/kernels.py",), stdout="results/kernels.txt",
    ),
    Result(
        "scale", ("results/scale.json", "results/scale.md"), "how cost grows with tokens, batch and stages",
        (*_METHODS, "jitexport/plan.py", "jitexport/kernels", "jitexport/backends"),
        ("python scripts/bench/scale.py --report docs/results",),
    ),
    Result(
        "comparison",
        (
            "results/comparison.json", "results/comparison.md", "results/comparison.png", "results/comparison.html",
            "results/comparison-sheet.webp",
        ),
        "dense sampling and all acceleration methods: quality, latency, FLOPs", _QUALITY,
        (f"python scripts/demo_model/comparison.py --backend eager --prompts 24 {IMAGES} --bundles {SCRATCH}/engines",),
    ),
    Result(
        "ablations", ("results/ablations.json", "results/ablations.md"), "JiT without its parts, and its settings",
        _QUALITY, (f"python scripts/demo_model/ablations.py --prompts 24 {IMAGES}",),
    ),
    Result(
        "temporal-search", ("results/temporal-search.json", "results/temporal-search.md"),
        "which temporal method, and its part of a speed-up", _QUALITY,
        (f"python scripts/demo_model/temporal_search.py --prompts 8 {IMAGES}",),
    ),
    Result(
        "presets", ("results/presets.json",), "JiT's presets, both micro-flows and both Beta values",
        (*_QUALITY, *_ENGINES),
        (
            "python scripts/demo_model/presets.py engines/demo-4x engines/demo-7x --prompts 24 "
            "--json docs/results/presets.json",
        ),
    ),
    _quality("50-steps", "diffusers with 50 steps, of 200", "--diffusers 50 --dtype bfloat16 --batch 4", (DEMO_MODEL,)),
    _quality("jit", "the 4x and the 7x bundle, of 200", "--bundle engines/demo-4x --bundle engines/demo-7x"),
    _quality(
        "10x", "7x and 10x, and 10x with forecasts, of 96",
        "--bundle engines/demo-7x --bundle engines/demo-10x --bundle engines/demo-10x-taylor --prompts 96",
    ),
    _quality(
        "int8-avx2", "fp32 and int8 on a CPU without AVX-512, of 100",
        "--bundle engines/demo-7x --bundle engines/demo-7x-int8 --bundle engines/demo-4x --bundle engines/demo-4x-int8 "
        "--prompts 100", cpu_class="AVX2",
    ),
    _quality("int8", "the same in int8, of 200", "--bundle engines/demo-4x-int8 --bundle engines/demo-7x-int8"),
    Result(
        "gpu", ("results/gpu-h100.json", "results/gpu.md"), "FLUX.1-dev's configuration on an H100, and what failed",
        (*_SPEED, "jitexport/graphs.py"), by_hand="written by hand from `python scripts/gpu_report.py` on a GPU",
    ),
    Result(
        "how-it-works", ("images/how-it-works.png",), "the tokens of each stage, and the image predicted there",
        _PICTURES, ("python scripts/demo_model/figures.py engines/demo-4x --output docs/images/how-it-works.png",),
    ),
    Result(
        "contact-sheet", ("images/contact-sheet.png",), "48 prompts: 50 steps, the 4x and the 7x bundle", _PICTURES,
        (
            "python scripts/demo_model/quality.py --diffusers 50 --dtype bfloat16 --batch 4 --bundle engines/demo-4x "
            f"--bundle engines/demo-7x --sheet {SCRATCH}/sheet.png",
            f"python scripts/demo_model/contact_sheet.py '50 steps={SCRATCH}/sheet-1.png' '4x={SCRATCH}/sheet-2.png' "
            f"'7x={SCRATCH}/sheet-3.png' --output docs/images/contact-sheet.png",
        ),
    ),
    Result(
        "serve-page", ("images/serve-page.png",), "the page of `jitexport serve` with two bundles",
        ("jitexport/serve/page.html",), by_hand="a browser's picture of the page, two demo bundles on one seed",
    ),
)  # fmt: skip
