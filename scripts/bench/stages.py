"""One stage engine of the demo model by each backend, and by OpenVINO, in turns: times and rates as a table.

    python scripts/bench/stages.py  # the stage of all tokens, in the dtype that this machine builds
    python scripts/bench/stages.py --stage stage2 --ways aoti,aoti-int8,openvino --rounds 30

Rates are of the module's operations, also as a share of the machine's own best matrix product of that dtype. Errors are
relative, against the eager module in fp32. OpenVINO is the extra `bench`.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import CPU, Products, facts, medians, parser, show
from torch import Tensor

from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.building.comparing import compare
from jitexport.building.reference import eager_pipeline, probe_inputs
from jitexport.console import err
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import find_source, load_adapter
from jitexport.plan import plan
from jitexport.specs import DTYPES, EngineSpec

WAYS = ("aoti", "aoti-int8", "onnx", "openvino", "eager")
Run = Callable[[], Tensor]


def stage_of(name: str, dtype: str, quantization: str | None) -> tuple[ModelAdapter, EngineSpec, list[Tensor], float]:
    """The demo model, and a stage of its 4x bundle with inputs and the operations of a step."""
    adapter = load_adapter(find_source("demo"), DTYPES[dtype], {"quantization": quantization})
    made = plan(adapter, speedup=4, method="jit", dtype=dtype)
    pipe = eager_pipeline(adapter, made.schedule, made.method, made.options, batch=1, dtype=dtype, device=CPU)
    spec, inputs = next(probe for probe in probe_inputs(pipe) if probe[0].name == name)
    return adapter, spec, inputs, made.cost(next(s.tokens for s in made.schedule.stages if s.name == name))


def by_backend(way: str, stage: str, dtype: str, folder: Path) -> Run:
    backend_name, _, quantization = way.partition("-")
    backend = registry.backend(backend_name)
    adapter, spec, inputs, _ = stage_of(stage, dtype if dtype in backend.dtypes(CPU) else "fp32", quantization or None)
    directory = folder / way
    directory.mkdir()
    with torch.inference_mode(False), torch.no_grad():
        backend.build(spec, adapter.module(stage), inputs, directory)
    raw = backend.load(spec, directory, dict(adapter.tensors()), lambda: adapter.module(stage), CPU)
    engine = Engine(spec, raw, CPU)
    return lambda: engine(*inputs)[0]


def by_openvino(stage: str) -> Run:
    import openvino

    adapter, _, inputs, _ = stage_of(stage, "fp32", None)
    shapes = [tuple(x.shape) for x in inputs]
    model = openvino.convert_model(adapter.module(stage), example_input=tuple(inputs), input=shapes)
    compiled = openvino.Core().compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(compiled(arrays)[0])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--stage", default="stage0")
    arguments.add_argument("--ways", default=",".join(WAYS))
    arguments.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    arguments.add_argument("--rounds", type=int, default=20)
    arguments.add_argument("--json", action="store_true")
    options = arguments.parse_args()

    adapter, _, inputs, flops = stage_of(options.stage, "fp32", None)
    with torch.no_grad():
        exact = adapter.module(options.stage)(*inputs)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        runs: dict[str, Run] = {}
        for way in options.ways.split(","):
            err.print(f"building {way}")
            runs[way] = (
                by_openvino(options.stage) if way == "openvino"
                else by_backend(way, options.stage, options.dtype, Path(folder))
            )  # fmt: skip
        errors = {way: compare([run()], [exact])[0] for way, run in runs.items()}
        with Products(DTYPES[options.dtype]) as products:
            seconds = medians(runs, options.rounds)

    rows = [
        {
            "way": way, "median_ms": 1e3 * median, "least_ms": 1e3 * least, "gflops": flops / median / 1e9,
            "of_products": flops / median / products.best, "error": errors[way],
        }
        for way, (median, least) in seconds.items()
    ]  # fmt: skip
    columns = {
        "way": lambda r: r["way"], "median ms": lambda r: f"{r['median_ms']:.1f}",
        "least ms": lambda r: f"{r['least_ms']:.1f}", "GFLOP/s": lambda r: f"{r['gflops']:.1f}",
        "of products": lambda r: f"{r['of_products']:.0%}", "relative error": lambda r: f"{r['error']:.1e}",
    }  # fmt: skip
    known = facts() | products.facts() | {"stage": options.stage, "gflop": round(flops / 1e9, 1)}
    title = f"{options.stage}, {flops / 1e9:.1f} GFLOP, {options.rounds} rounds"
    show(known, rows, columns, as_json=options.json, title=title)


if __name__ == "__main__":
    main()
