"""How a model's modules are called elsewhere: in adapters, and in checkpoints of the model's authors.

A family lists its aliases for the modules that a bundle really has, so a name is looked up and never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The modules that a foreign one is made of.

    Attributes:
        modules: full names "<component>.<name>"; the foreign weight holds their rows one after the other.
        swapped: whether the halves of its rows come in the other order (shift and scale of an output norm).
        partial: whether it holds rows of these modules only, and a checkpoint has it under another name.
    """

    modules: tuple[str, ...]
    swapped: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Prefix:
    """What a file puts in front of a component's names; `flat` where it also writes "_" for their dots."""

    text: str
    component: str
    flat: bool = False


#: What files put in front of the names of a transformer's modules.
TRANSFORMER = (
    Prefix("transformer.", "transformer"),
    Prefix("diffusion_model.", "transformer"),  # ComfyUI, ai-toolkit
    Prefix("model.diffusion_model.", "transformer"),
    Prefix("lora_unet_", "transformer", flat=True),  # kohya, musubi-tuner
    Prefix("lora_transformer_", "transformer", flat=True),  # OneTrainer
    Prefix("lycoris_", "transformer", flat=True),  # LyCORIS' wrapper
    Prefix("", "transformer"),
)

#: Joint attention's projections of the image and of the text, as diffusers names them in a block.
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
#: diffusers' fused projections: parts of blocks that checkpoints do not have so.
FUSED = {"attn.to_qkv": QKV, "attn.to_added_qkv": ADDED}


class Aliases:
    """Collects further names of a transformer's modules, of those that are there.

    Args:
        modules: full names of a model's modules.

    Attributes:
        found: see `Naming.aliases`.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self.known = set(modules)
        self.found: dict[str, Target] = {}

    def add(self, name: str, owned: Iterable[str], *, swapped: bool = False, partial: bool = False) -> None:
        """A foreign name of modules, all without "transformer."; nothing where one of them is not there."""
        targets = tuple(f"transformer.{module}" for module in owned)
        if self.known.issuperset(targets):
            self.found[f"transformer.{name}"] = Target(targets, swapped, partial)

    def add_all(self, theirs: str, ours: str, table: Mapping[str, Sequence[str]], *, partial: bool = False) -> None:
        """The names in a table, {name in `theirs`: names in `ours`}."""
        for name, parts in table.items():
            self.add(f"{theirs}.{name}", [f"{ours}.{part}" for part in parts], partial=partial)

    def add_outside(self, table: Mapping[str, str]) -> None:
        """The names of what is in no block, {theirs: ours}, and of the last modulation, whose halves are swapped."""
        for name, part in table.items():
            self.add(name, [part])
        self.add("final_layer.adaLN_modulation.1", ["norm_out.linear"], swapped=True)

    def blocks(self, group: str) -> list[str]:
        """The blocks of a group, "<group>.<number>", in order."""
        start = f"transformer.{group}."
        numbers = {m.removeprefix(start).partition(".")[0] for m in self.known if m.startswith(start)}
        return [f"{group}.{number}" for number in sorted(numbers, key=int)]

    def add_scales(self) -> None:
        """Names of norms with "scale" behind them: so FLUX's authors call a norm's weight, and formats take it for a
        module."""
        norms = {name: target for name, target in self.found.items() if name.endswith("_norm")}
        self.found |= {f"{name}.scale": Target(target.modules, partial=True) for name, target in norms.items()}


@dataclass(frozen=True)
class Naming:
    """A family's names.

    Attributes:
        prefixes: all that are known; a name that fits several is looked up under each.
        aliases: from the full names of the model's modules to further names of them, "<component>.<foreign name>".
        constant: parts of the names, here and elsewhere, of modules that bundles have not, because what they make is a
            constant of theirs.
    """

    prefixes: Sequence[Prefix]
    aliases: Callable[[Iterable[str]], dict[str, Target]]
    constant: Sequence[str] = ()


class Resolver:
    """Finds the modules behind names in files.

    Args:
        naming: of the model's family.
        weights: full names of the model's tensors.
    """

    #: What PEFT's wrappers put in front of everything.
    WRAPPER = "base_model.model."

    def __init__(self, naming: Naming, weights: Iterable[str]) -> None:
        modules = {name.rpartition(".")[0] for name in weights}
        self._prefixes = naming.prefixes
        self._constant = naming.constant
        self._dotted: Mapping[str, Target] = naming.aliases(modules) | {m: Target((m,)) for m in modules}
        self._flat = _flattened(self._dotted)

    def find(self, name: str) -> Target | None:
        """The target of a module's name in a file; None where there is none."""
        name = name.removeprefix(self.WRAPPER)
        for prefix in self._prefixes:
            if name.startswith(prefix.text):
                table = self._flat if prefix.flat else self._dotted
                target = table.get(f"{prefix.component}.{name.removeprefix(prefix.text)}")
                if target is not None:
                    return target
        return None

    def is_constant(self, name: str) -> bool:
        """Whether a name is of a module whose results a bundle has as constants, without its weights."""
        flat = name.replace(".", "_")
        return any(part.replace(".", "_") in flat for part in self._constant)

    def local_name(self, name: str) -> str:
        """A module's name as its component has it: without wrapper and prefix."""
        name = name.removeprefix(self.WRAPPER)
        texts = [p.text for p in self._prefixes if name.startswith(p.text)]
        return name.removeprefix(max(texts, key=len, default=""))

    def component(self, name: str) -> str | None:
        """The component that a name belongs to."""
        target = self.find(name)
        return None if target is None else target.modules[0].partition(".")[0]


def _flattened(dotted: Mapping[str, Target]) -> dict[str, Target]:
    """The same names with "_" for dots; those that two modules would share are left out."""
    flat: dict[str, Target] = {}
    ambiguous: set[str] = set()
    for name, target in dotted.items():
        component, _, rest = name.partition(".")
        key = f"{component}.{rest.replace('.', '_')}"
        if flat.setdefault(key, target) != target:
            ambiguous.add(key)
    return {key: target for key, target in flat.items() if key not in ambiguous}
