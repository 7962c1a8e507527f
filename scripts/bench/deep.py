"""How long a deep model takes to build and to load: random weights, the demo model's text encoders and autoencoder.

    python scripts/bench/deep.py --report docs/results              # FLUX.1-dev's depth: 19 double and 38 single blocks
    python scripts/bench/deep.py --doubles 2 --singles 6 --heads 4  # the demo model's own shape
    python scripts/bench/deep.py --backend inductor

1,024 image tokens, 4x, fp32. Loading is timed three times in this process; the shortest counts.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from harness import facts, parser, write

import jitexport
from jitexport.build import build
from jitexport.console import err
from jitexport.models.sources import find_source

HEAD = 64


def write_model(folder: Path, doubles: int, singles: int, heads: int) -> Path:
    """The demo model with a random transformer of another depth and width in its place."""
    source = find_source("demo").folder
    assert source is not None
    shutil.copytree(source, folder)
    config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder / "transformer")
    sizes = {"num_layers": doubles, "num_single_layers": singles, "num_attention_heads": heads}
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel.from_config(config | sizes | {"attention_head_dim": HEAD})
    transformer.save_pretrained(folder / "transformer")
    return folder


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--doubles", type=int, default=19)
    arguments.add_argument("--singles", type=int, default=38)
    arguments.add_argument("--heads", type=int, default=2, help=f"of {HEAD} channels each")
    arguments.add_argument("--backend", default="aoti")
    arguments.add_argument("--jobs", type=int, help="processes that compile; by default as a build chooses")
    arguments.add_argument("--report", type=Path, default=Path("out"), help="folder of deep.json")
    args = arguments.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / "model", args.doubles, args.singles, args.heads)
        made = build(str(model), output=Path(scratch) / "bundle", backend=args.backend, dtype="fp32", jobs=args.jobs)
        loads = []
        for _ in range(3):
            start = time.perf_counter()
            jitexport.load(made.path)
            loads.append(time.perf_counter() - start)
    report: dict[str, Any] = {
        "conditions": facts(), "cores": os.cpu_count(), "backend": args.backend,
        "doubles": args.doubles, "singles": args.singles, "heads": args.heads,
        "build_seconds": round(made.seconds, 1), "load_seconds": round(min(loads), 3),
        "errors": {e.name: e.relative_error for e in made.manifest.engines},
    }
    write(args.report, "deep", report)
    err.print(f"built in {report['build_seconds']} s, loaded in {report['load_seconds']} s; {args.report}/deep.json")


if __name__ == "__main__":
    main()
