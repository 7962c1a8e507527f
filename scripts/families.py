"""Every method that fits a model, built for every backend: is the bundle's image that of the eager modules?

    python scripts/families.py                                        # the tiny random pipelines of the tests
    python scripts/families.py FOLDER --methods jit ras --backends onnx

For whoever adds a family. Bundles are built here and run in a fresh process, with the family's usual second pass and a
prompt that leaves padding; errors are relative, over all pixels. Prints a table of Markdown, and what a method says
that does not fit. Give it the folder of a small model: one of usual size takes hours.
"""

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import jitexport
from jitexport import registry
from jitexport.errors import InputError, ScheduleError
from jitexport.plan import CustomSchedule

#: Few steps, few engines.
SCHEDULES = {
    "jit": CustomSchedule((1, 2), (0.5, 1.0)),
    "ras": CustomSchedule((6,), (0.25,)),
    "ralu": CustomSchedule((1, 1, 2)),
    "bottleneck": CustomSchedule((1, 1, 2)),
}

#: Sizes for methods that halve the grid, where a tiny pipeline's own is odd.
EVEN = {"Qwen-Image": {"height": 48, "width": 32}}

#: A process's images of bundles: folder by folder, written beside them.
IMAGES = """
import sys, torch, jitexport
for bundle in sys.argv[1:]:
    pipe = jitexport.load(bundle)
    second = {} if (pipe.defaults.guidance.true or 1) <= 1 else {"negative_prompt": "the snow"}
    images = pipe("a red fox", generator=torch.Generator().manual_seed(0), output_type="pt", **second).images
    torch.save(images, bundle + ".pt")
"""


def tiny_pipelines(root: Path) -> Iterator[Path]:
    """Folders of one pipeline of each family, and of a model of four steps."""
    sys.path.append(str(Path(__file__).parents[1]))  # an installed package has no tests
    from tests.tiny_families import SAVE

    for name, save in SAVE.items():
        yield save(root / name)


def errors(model: Path, method: str, backends: Sequence[str], root: Path) -> list[str]:
    """What each backend's image differs by from the eager one, or why the method does not fit the model."""
    bundles = [root / f"{model.name}-{method}-{backend}" for backend in ("eager", *backends)]
    halves = method in ("ralu", "bottleneck")
    for bundle in bundles:
        try:
            jitexport.build(
                str(model), output=bundle, method=method, custom=SCHEDULES[method], backend=bundle.name.split("-")[-1],
                dtype="fp32", device="cpu", jobs=1, settings=EVEN.get(model.name, {}) if halves else {},
            )
        except (InputError, ScheduleError) as error:
            return [str(error).splitlines()[0]] + ["-"] * (len(backends) - 1)
    subprocess.run([sys.executable, "-c", IMAGES, *map(str, bundles)], check=True)
    eager, *others = (torch.load(f"{bundle}.pt") for bundle in bundles)
    return [f"{(image - eager).norm() / eager.norm():.1e}" for image in others]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="of pipelines; tiny ones by default")
    parser.add_argument("--methods", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--backends", nargs="+", choices=registry.BACKENDS, default=["aoti", "onnx"])
    parser.add_argument("--only", nargs="+", default=[], help="folders of these names")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        print("| model | method |", " | ".join(args.backends), "|")
        print("|---" * (2 + len(args.backends)) + "|")
        for folder in args.folders or tiny_pipelines(root):
            for method in args.methods if not args.only or folder.name in args.only else ():
                found = errors(folder, method, args.backends, root)
                print(f"| {folder.name} | {method} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
