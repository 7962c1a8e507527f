"""How strong an adapter is: alpha / r, from wherever its file says so."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from jitexport.errors import InputError
from jitexport.lora.reading import Stored

_ALPHAS, _RANKS = ("alpha", "lora_alpha"), ("rank", "lora_rank", "r")
_KINDS = {"LORA", "LOHA", "LOKR"}
#: Ways of training that change the base weights too.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Strengths:
    """Factors of an adapter's modules, from alphas among its tensors, its header and PEFT's settings.

    Where several say something, all must say the same; where none does, the factor is 1.

    Raises:
        InputError: settings without a meaning, or for adapters of other kinds.
    """

    def __init__(self, stored: Stored) -> None:
        self._header = {
            "alpha": _first(stored.header, _ALPHAS),
            "rank": _first(stored.header, _RANKS),
        }
        self._configs = stored.configs
        for component, config in stored.configs.items():
            _check_config(config, component)

    def factor(self, name: str, local: str, component: str, alpha: float | None, rank: int | None) -> float:
        """The factor of one module.

        Args:
            name: as the file has it, for messages.
            local: as its component has it, for PEFT's patterns.
            alpha: of the tensor beside the others, None without.
            rank: of its matrices; None where they are whole, and alpha has nothing to be divided by.

        Raises:
            InputError: two sources that disagree.
        """
        found: dict[str, float] = {}
        if alpha is not None:
            found["its alpha tensor"] = alpha / rank if rank else 1.0
        if any(value is not None for value in self._header.values()):
            found["the file's header"] = self._by_header(name, rank)
        for key in (component, ""):
            if key in self._configs:
                where = "adapter_config.json" if not key else "the metadata of the file"
                found[where] = _by_config(self._configs[key], name, local, rank)
        first = next(iter(found.values()), 1.0)
        if any(not math.isclose(value, first, rel_tol=1e-4) for value in found.values()):
            raise InputError(
                f"conflicting strengths of {name}", found=", ".join(f"{v:g} by {k}" for k, v in found.items()),
                remedy="remove the wrong one from the adapter",
            )
        return first

    def decomposed(self, component: str) -> bool:
        """Whether PEFT's settings call for DoRA."""
        return any(bool(self._configs.get(key, {}).get("use_dora")) for key in (component, ""))

    def _by_header(self, name: str, rank: int | None) -> float:
        alpha, stated = self._header["alpha"], self._header["rank"]
        if stated is not None and rank is not None and stated != rank:
            raise _other_rank(name, "the file's header", stated, rank)
        of = stated if stated is not None else rank
        return 1.0 if alpha is None or of is None else alpha / of


def _by_config(config: Mapping[str, Any], name: str, local: str, rank: int | None) -> float:
    """As PEFT computes it."""
    stated = _by_pattern(config, "rank_pattern", local, config.get("r", 8))
    alpha = _by_pattern(config, "alpha_pattern", local, config.get("lora_alpha", config.get("alpha", 8)))
    if rank is not None and stated != rank:
        raise _other_rank(name, "PEFT's settings", stated, rank)
    return alpha / (math.sqrt(stated) if config.get("use_rslora") else stated)


def _by_pattern(config: Mapping[str, Any], table: str, local: str, otherwise: Any) -> float:
    """The value of the first pattern that fits the end of a module's name, as PEFT matches them."""
    patterns = config.get(table) or {}
    if not isinstance(patterns, Mapping):
        raise InputError(f"{table} is no table of patterns", found=type(patterns).__name__)
    for pattern, value in patterns.items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", local)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{table} holds no regular expression", found=f"{pattern[:100]}: {error}") from error
        if fits:
            return _positive(table, value)
    return _positive("alpha or r", otherwise)


def _check_config(config: Mapping[str, Any], component: str) -> None:
    where = "adapter_config.json" if not component else f"the settings of {component}"
    kind = config.get("peft_type") or "LORA"
    if kind not in _KINDS:
        raise InputError(f"{where}: another kind of adapter", found=str(kind)[:100], expected=", ".join(sorted(_KINDS)))
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        raise InputError(
            f"{where}: {start[:50]} changes the base weights, and its adapter fits those only",
            remedy="save it as plain LoRA: path_initial_model_for_weight_conversion of PEFT's save_pretrained",
        )
    for name in ("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config", "use_qalora"):
        if config.get(name):
            raise InputError(f"{where}: {name} is not known here", found=str(config[name])[:100])


def _first(header: Mapping[str, str], names: tuple[str, ...]) -> float | None:
    for name in names:
        if name in header:
            return _positive(f"{name} in the file's header", header[name])
    return None


def _positive(what: str, value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(f"{what} must be a positive number", found=repr(value)[:100])
    return number


def _other_rank(name: str, where: str, stated: float, rank: int) -> InputError:
    return InputError(
        f"{name} has another rank than {where} says", found=rank, expected=f"{stated:g}",
        remedy="the settings belong to another adapter: keep each adapter in a folder of its own",
    )
