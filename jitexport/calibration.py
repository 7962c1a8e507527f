"""Calibration of temporal methods that decide while they run: what they decide over prompts, as a list of steps.

A bundle's loop has a fixed shape, so it cannot ask at every step. The decisions depend on the image only weakly; so the
steps that most images compute are taken for all, and what was seen is kept beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jitexport.choice import AUTO, choose
from jitexport.errors import InputError, ScheduleError
from jitexport.files import write_file
from jitexport.methods.temporal.base import parse_cache
from jitexport.methods.temporal.teacache import DecidingTeaCache, TeaCache
from jitexport.models.base import ModelAdapter
from jitexport.models.sources import download, find_source, load_adapter
from jitexport.models.stages import INDICATOR
from jitexport.schedule import CustomSchedule, StageSchedule
from jitexport.specs import DTYPES


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Attributes:
        cache: the temporal method with its options, the computed steps among them: see `parse_cache`.
        family, sigmas: of the model, and of the schedule that was run.
        prompts: number of images.
        shares: of the images that compute each step.
        lists: how many images compute exactly which steps, as "0+1+4": the most frequent first.
    """

    cache: str
    family: str
    sigmas: tuple[float, ...]
    prompts: int
    shares: tuple[float, ...]
    lists: dict[str, int]

    @property
    def evidence(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {"prompts": self.prompts, "shares": list(self.shares), "lists": dict(self.lists)}

    @property
    def computed(self) -> tuple[int, ...]:
        """Numbers of the steps that at least half of the images compute."""
        return tuple(i for i, share in enumerate(self.shares) if share >= 0.5)

    def check(self, adapter: ModelAdapter, schedule: StageSchedule) -> None:
        """Refuse another family or other noise levels than those that were calibrated.

        Raises:
            ScheduleError: naming what differs.
        """
        for what, found, expected in (
            ("model family", adapter.family, self.family),
            ("list of noise levels", [round(s, 4) for s in schedule.sigmas], [round(s, 4) for s in self.sigmas]),
        ):
            if found != expected:
                raise ScheduleError(
                    f"the calibration is of another {what}", found=found, expected=expected,
                    remedy="jitexport calibrate with the build's model, speed-up and method",
                )

    def write(self, path: Path) -> None:
        """As a JSON file, whole or not at all."""
        write_file(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_calibration(path: str | os.PathLike[str], cache: str | None = None) -> Calibration:
    """A calibration from its file.

    Args:
        cache: what the build was asked for, which must not be another method.

    Raises:
        InputError: no such file, or not one of these, or of another method.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        found = Calibration(**values | {"sigmas": tuple(values["sigmas"]), "shares": tuple(values["shares"])})
        name, _ = parse_cache(found.cache)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is no calibration", found=f"{type(error).__name__}: {error}",
            expected="a file that `jitexport calibrate` wrote",
        ) from error
    if cache is not None and cache != name:
        raise InputError(
            "a calibration brings its cache and its options along", found=f"--cache {cache}",
            expected=f"--cache {name}, or none",
        )
    return found


def calibrate(
    adapter: ModelAdapter,
    prompts: Sequence[str],
    cache: str,
    *,
    speedup: float | None = 1.0,
    custom: CustomSchedule | None = None,
    method: str = "dense",
    preset: str | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Run a cache that decides at run time, uncompiled, with one image for each prompt (seed 1000 + its number).

    Args:
        adapter: the model, with the setting `features` that the cache needs ("residual").
        cache: such a method with its options: "teacache:threshold=0.6".
        speedup, custom, method, preset: of the schedule of which the cache leaves out steps; see `jitexport.plan.plan`.
        progress: told the number of finished images.

    Raises:
        InputError: a cache that decides nothing, or no prompts.
    """
    from jitexport.building.reference import eager_pipeline
    from jitexport.plan import make_cache, plan

    static = make_cache(cache)
    if not isinstance(static, TeaCache):
        raise InputError("this cache decides nothing while it runs", found=cache, expected="teacache")
    if not prompts:
        raise InputError("a calibration needs prompts", found=0, expected="at least one")
    made = plan(adapter, speedup=speedup, custom=custom, method=method, preset=preset, dtype=dtype)
    decisions: list[list[int]] = []

    def decided(step: int, computed: bool) -> None:
        if computed:
            decisions[-1].append(step)

    deciding = DecidingTeaCache(static.settings.threshold, static.coefficients_for(adapter.family), decided)
    pipe = eager_pipeline(
        adapter, made.schedule, made.method, made.options, batch=1, dtype=dtype, device=torch.device(device),
        cache=deciding, further=("skip", INDICATOR),
    )
    pipe.set_progress_bar_config(disable=True)
    for number, prompt in enumerate(prompts):
        decisions.append([])
        pipe(prompt, generator=torch.Generator().manual_seed(1000 + number), output_type="latent")
        progress(number + 1)
    steps = range(made.schedule.nfe)
    shares = tuple(sum(i in chosen for chosen in decisions) / len(decisions) for i in steps)
    texts = ["+".join(map(str, chosen)) for chosen in decisions]
    lists = {text: texts.count(text) for text in sorted(set(texts), key=lambda t: (-texts.count(t), t))}
    found = Calibration(cache, adapter.family, made.schedule.sigmas, len(prompts), shares, lists)
    return _with_steps(found, static)


def calibrate_model(
    model: str,
    base: str | None = None,
    cache: str = "teacache",
    *,
    prompts: Path | None = None,
    limit: int = 16,
    dtype: str = AUTO,
    device: str = AUTO,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **schedule: Any,
) -> Calibration:
    """`calibrate` for a model by name, folder or hub id.

    Args:
        prompts, limit: see `jitexport.evaluate.evaluation.chosen_prompts`.
        progress: told the number of finished images, and of all.
        schedule: what `calibrate` takes of a schedule.
    """
    from jitexport.evaluate.evaluation import chosen_prompts

    chosen = choose(device, "eager", dtype)
    source = find_source(model, base)
    folder = source.folder or download(source)
    given = (settings or {}) | {"features": TeaCache.features}
    adapter = load_adapter(replace(source, folder=folder), DTYPES[chosen.dtype], given)
    texts = [prompt.text for prompt in chosen_prompts(prompts, source.name, limit).prompts]
    return calibrate(
        adapter, texts, cache, dtype=chosen.dtype, device=chosen.device,
        progress=lambda done: progress(done, len(texts)), **schedule,
    )


def _with_steps(found: Calibration, static: TeaCache) -> Calibration:
    """The calibration whose cache has the steps that were found among its options."""
    options = {k: v for k, v in static.options.items() if k in ("threshold", "coefficients") and v}
    options["computed"] = list(found.computed)
    said = ",".join(f"{k}={'+'.join(map(repr, v)) if isinstance(v, list) else v}" for k, v in options.items())
    return replace(found, cache=f"{static.name}:{said}")
