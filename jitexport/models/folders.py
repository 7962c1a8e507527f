"""Reading a model from a folder in diffusers' format, its transformer from one file where there is one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer as FastTokenizer
from torch import nn

from jitexport.errors import MissingDependencyError, ModelNotFoundError, UnsupportedModelError, needed
from jitexport.models.base import ModelAdapter, full_config, read_json, with_settings
from jitexport.models.single_file import read_single_file
from jitexport.prompting import Tokenizer

Adapter = TypeVar("Adapter", bound=ModelAdapter)


def read_model(
    family: type[Adapter],
    folder: Path,
    dtype: torch.dtype,
    settings: Mapping[str, Any] | None = None,
    *,
    transformer: Path | None = None,
) -> Adapter:
    """A family's model.

    Args:
        settings: those that are not as the folder's `jitexport.json` or the family has them; None in their place, too.
        transformer: a file that has the transformer's weights.

    Raises:
        ModelNotFoundError: files that are missing or damaged.
        UnsupportedModelError: a model that is not of the family.
        InputError: settings that it cannot have.
    """
    index = read_json(path) if (path := folder / "model_index.json").is_file() else {}
    present = [name for name in family.classes if name not in family.optional or (folder / name).is_dir()]
    folders = tokenizer_folders(family, folder)
    needed = (*present, "scheduler", *family.plain_configs, *folders)
    if missing := [name for name in needed if not (folder / name).is_dir()]:
        raise ModelNotFoundError(
            "the pipeline folder is incomplete", found=f"{folder} without {', '.join(missing)}",
            expected=f"a folder written by {family.family}.save_pretrained", remedy="download the whole repository",
        )
    plain = {name: value for name, value in index.items() if not isinstance(value, list) and name[0] != "_"}
    configs: dict[str, dict[str, Any]] = {"pipeline": plain} if plain else {}
    components: dict[str, nn.Module] = {}
    for name in present:
        kind = component_class(family, name)
        if name == "transformer" and transformer is not None:
            components[name] = read_transformer(family, kind, transformer, folder / name, dtype)
        else:
            components[name] = read_component(kind, folder / name, dtype)
        configs[name] = full_config(components[name])
    configs["scheduler"] = read_scheduler(folder / "scheduler")
    configs |= {name: read_plain(folder / name / file) for name, file in family.plain_configs.items()}
    merged = merged_settings(family, folder, configs, settings)
    tokenizers = [
        read_tokenizer(folder / name, family.tokenizer(name, configs, merged)) for name in folders
    ]
    return family(components, configs, tokenizers, merged)


def tokenizer_folders(family: type[ModelAdapter], folder: Path) -> list[str]:
    """A family's tokenizers, without that of an optional text encoder which is not there."""
    absent = {name for name in family.optional if not (folder / name).is_dir()}
    return [name for name in family.tokenizer_folders if name.replace("tokenizer", "text_encoder") not in absent]


def merged_settings(
    family: type[ModelAdapter], folder: Path, configs: Mapping[str, dict[str, Any]], settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All settings: the caller's, else the folder's own, else the family's usual ones.

    Raises:
        InputError: a setting that there is not, or with a value that it cannot have.
    """
    usual = family.usual(configs)
    stored = read_json(folder / "jitexport.json") if (folder / "jitexport.json").is_file() else {}
    return with_settings(usual | {k: v for k, v in stored.items() if k in usual}, settings)


# --- components -------------------------------------------------------------------------------------------------------


def component_class(family: type[ModelAdapter], name: str) -> Any:
    """The class of one of a family's components.

    Raises:
        MissingDependencyError: its library is not installed.
    """
    library, _, attribute = family.classes[name].partition(":")
    with needed("reading a model needs diffusers and transformers", "build"):
        return getattr(import_module(library), attribute)


def empty_component(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """A component without weights, on the meta device."""
    with torch.device("meta"):
        if hasattr(kind, "from_config"):  # diffusers
            return kind.from_config(dict(config))
        return kind(kind.config_class(**config))


def read_scheduler(folder: Path) -> dict[str, Any]:
    """A flow-matching scheduler's configuration.

    Raises:
        ModelNotFoundError: files that are absent or damaged.
        UnsupportedModelError: a scheduler of another kind.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    try:
        config = Scheduler.load_config(folder, local_files_only=True)
        if (name := config.get("_class_name", Scheduler.__name__)) != Scheduler.__name__:
            raise UnsupportedModelError("the model has another sampler", found=name, expected=Scheduler.__name__)
        return dict(Scheduler.from_config(config).config)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error


def read_plain(path: Path) -> dict[str, Any]:
    """A configuration without a component.

    Raises:
        ModelNotFoundError: a file that is absent or damaged.
    """
    try:
        return read_json(path)
    except (OSError, UnsupportedModelError) as error:
        raise ModelNotFoundError(f"cannot read {path}", found=error) from error


def read_component(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model class's weights from a folder, all of them: the libraries would fill in missing ones at random.

    Raises:
        ModelNotFoundError: files that are absent, damaged, or of another shape, or weights that are missing.
    """
    refuse_quantized(folder)
    options = {"dtype": dtype, "local_files_only": True, "output_loading_info": True}
    try:
        module, info = kind.from_pretrained(folder, variant=only_variant(folder), **options)
    except ImportError as error:
        raise MissingDependencyError(f"reading {folder} needs another library", found=error) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelNotFoundError(
            f"weights are missing in {folder}",
            found=f"no {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if missing[3:] else ''}",
            expected="every weight that its config.json calls for",
            remedy="download or save the model again",
        )
    return module


def refuse_quantized(folder: Path) -> None:
    """Refuse weights that another library has quantized: engines have 8-bit layers of their own.

    Raises:
        ModelNotFoundError: a config.json that cannot be read.
        UnsupportedModelError: such weights.
    """
    path = folder / "config.json"
    try:
        settings = read_json(path).get("quantization_config") if path.is_file() else None
    except UnsupportedModelError as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise UnsupportedModelError(
            f"the weights in {folder} are quantized by another library", found=f"quantization_config of {method}",
            expected="weights in bf16, fp16 or fp32",
            remedy="use the model before quantization, and `jitexport build --quant int8` or `fp8`",
        )


def only_variant(folder: Path) -> str | None:
    """The variant ("fp16", ...) of a component whose weights are there in no other form; None for ordinary files.

    Raises:
        ModelNotFoundError: several variants, and no ordinary files.
    """
    variants = set()
    for path in folder.glob("*.safetensors*"):
        match = re.fullmatch(
            r"[a-z_]+(?:-\d+-of-\d+)?(?:\.([\w]+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.([\w]+))?\.json)?",
            path.name,
        )
        variants |= {match[1] or match[2]} if match else set()
    if not variants or None in variants:
        return None
    if len(variants) > 1:
        raise ModelNotFoundError(
            f"several variants of the weights in {folder}", found=", ".join(sorted(variants)), expected="one of them",
            remedy="keep the files of one variant",
        )
    return variants.pop()


def read_transformer(
    family: type[ModelAdapter], kind: Any, path: Path, folder: Path, dtype: torch.dtype
) -> nn.Module:
    """A transformer whose weights are in one file and whose configuration is in a folder.

    Raises:
        ModelNotFoundError: one of them cannot be read.
        InputError: the file is of another model.
    """
    refuse_quantized(folder)
    try:
        module = empty_component(kind, kind.load_config(folder, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    shapes = {f"transformer.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
    values = read_single_file(path, family.naming, shapes, dtype)
    module.load_state_dict({name.removeprefix("transformer."): v for name, v in values.items()}, assign=True)
    return module


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def read_tokenizer(folder: Path, use: Tokenizer) -> Tokenizer:
    """A tokenizer folder as one JSON text with padding and truncation to the length of its use built in.

    Raises:
        ModelNotFoundError: files that are absent or damaged, or no vocabulary among them.
        MissingDependencyError: the vocabulary's form needs a library that is not installed.
        UnsupportedModelError: the tokenizer has no fast implementation.
    """
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    byt5 = "tokenizer_config.json" in files and _names_byt5(folder / "tokenizer_config.json")
    slow = "spiece.model" in files and "tokenizer.json" not in files
    # Without a vocabulary, transformers makes a tokenizer that knows no word.
    if not (slow or byt5) and "tokenizer.json" not in files and not files.issuperset(("vocab.json", "merges.txt")):
        raise ModelNotFoundError(
            f"{folder} has no vocabulary", found=", ".join(sorted(files)) or "nothing",
            expected="tokenizer.json, vocab.json with merges.txt, or spiece.model",
        )
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a missing library leads to is of any type
        if slow and not (_installed("sentencepiece") and _installed("google.protobuf")):
            raise MissingDependencyError(
                f"{folder} has its vocabulary in spiece.model only", found=error,
                remedy="pip install sentencepiece protobuf; or put the model's tokenizer.json beside it",
            ) from error
        raise ModelNotFoundError(f"cannot read {folder}", found=error) from error
    backend = byte_tokenizer(tokenizer) if byt5 else getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            "the tokenizer has no fast implementation",
            found=type(tokenizer).__name__,
            expected=f"a fast one in {folder}",
        )
    backend.enable_truncation(use.length)
    backend.enable_padding(length=use.length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return replace(use, name=folder.name, json=backend.to_str())


def _names_byt5(path: Path) -> bool:
    try:
        return read_json(path).get("tokenizer_class") == "ByT5Tokenizer"
    except UnsupportedModelError:  # whoever reads it for good says so
        return False


def byte_tokenizer(tokenizer: Any) -> FastTokenizer:
    """A ByT5Tokenizer, of which transformers has no fast one, for `tokenizers`: a token for each byte, and the end.

    A byte's id comes after those of padding, end and the unknown; special tokens keep their ids.
    """
    added = tokenizer.added_tokens_decoder
    # Bytes as `tokenizers` writes them: letters and signs as they are, the others from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(sorted(set(range(256)) - letters.keys()))}
    vocabulary = {letter: byte + tokenizer.offset for byte, letter in letters.items()}
    fast = FastTokenizer(tokenizers.models.BPE(vocabulary | {str(t): i for i, t in added.items()}, []))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.add_special_tokens([added[i] for i in sorted(added)])
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    fast.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return fast
