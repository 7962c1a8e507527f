"""What is chosen on machines that this one is made to look like."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from jitexport import machine
from jitexport.backends import commands
from jitexport.choice import choose
from jitexport.errors import UnknownNameError

AVX2 = ("avx2", "fma3")
BF16 = (*AVX2, "avx512_f", "avx512_bf16", "avx512_vnni")


@pytest.fixture
def looks_like(monkeypatch):
    """A CPU with features, perhaps a GPU of a capability, without some programs and modules."""

    def look(features=AVX2, gpu=None, lacking=()):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(features, True))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
        if gpu is not None:
            monkeypatch.setattr(machine, "gpu_problem", lambda: None)
        found, which = importlib.util.find_spec, shutil.which
        there = {"onnx", "onnxscript", "triton"} - set(lacking)

        def find(name, *rest):
            if name in there:
                return found("json")
            return None if name in lacking else found(name, *rest)

        monkeypatch.setattr(importlib.util, "find_spec", find)

        def program(name, *rest):
            if name not in ("g++", "clang++"):
                return which(name, *rest)
            return None if "compiler" in lacking else f"/usr/bin/{name}"

        monkeypatch.setattr(shutil, "which", program)
        monkeypatch.setattr(commands, "compiler_problem", lambda path: None)

    return look


def of(choice):
    return choice.device, choice.backend, choice.dtype


@pytest.mark.parametrize(
    ("here", "asked", "expected"),
    [
        ({"features": AVX2}, {}, ("cpu", "aoti", "fp32")),
        ({"features": BF16}, {}, ("cpu", "aoti", "bf16")),
        ({"gpu": (8, 9)}, {}, ("cuda", "aoti", "bf16")),
        ({"gpu": (7, 5)}, {}, ("cuda", "aoti", "fp32")),
        ({"gpu": (8, 9), "lacking": ("triton",)}, {}, ("cuda", "eager", "bf16")),
        ({"lacking": ("compiler",)}, {}, ("cpu", "onnx", "fp32")),
        ({"features": BF16, "lacking": ("compiler",)}, {}, ("cpu", "onnx", "fp32")),
        ({"lacking": ("compiler", "onnx")}, {}, ("cpu", "eager", "fp32")),
        ({"features": BF16, "lacking": ("compiler",)}, {"dtype": "bf16"}, ("cpu", "eager", "bf16")),
        ({"features": AVX2}, {"dtype": "bf16"}, ("cpu", "aoti", "bf16")),
        ({"features": BF16}, {"dtype": "fp32"}, ("cpu", "aoti", "fp32")),
        ({"features": BF16}, {"backend": "onnx"}, ("cpu", "onnx", "fp32")),
        ({"features": BF16}, {"backend": "eager"}, ("cpu", "eager", "bf16")),
        ({"gpu": (8, 9)}, {"device": "cpu"}, ("cpu", "aoti", "fp32")),
        ({"gpu": (8, 9)}, {"backend": "onnx"}, ("cpu", "onnx", "fp32")),  # its CUDA provider is not installed
        ({"lacking": ("compiler",)}, {"quantization": "int8"}, ("cpu", "eager", "fp32")),  # onnx has no int8
        ({"features": BF16}, {"quantization": "int8"}, ("cpu", "aoti", "bf16")),
        ({}, {"target": "sm_89"}, ("cuda", "tensorrt", "bf16")),
        ({"gpu": (7, 5)}, {"target": "sm_120"}, ("cuda", "tensorrt", "bf16")),
        ({}, {"target": "sm_75"}, ("cuda", "tensorrt", "fp32")),
    ],
)
def test_what_is_chosen(looks_like, here, asked, expected):
    pytest.importorskip("onnxruntime")
    looks_like(**here)
    choice = choose(**asked)
    assert of(choice) == expected
    assert choice.reasons.keys() == {"device", "backend", "dtype"} - asked.keys()
    assert all(choice.reasons.values())


def test_what_is_said_by_name_is_kept_even_where_it_cannot_be(looks_like):
    """The build refuses it then, with its own words."""
    looks_like()
    choice = choose("abacus", "eager", "fp8")
    assert of(choice) == ("abacus", "eager", "fp8") and choice.reasons == {}
    assert of(choose(device="cuda")) == ("cuda", "aoti", "fp32")
    assert of(choose(backend="tensorrt")) == ("cpu", "tensorrt", "fp32")
    with pytest.raises(UnknownNameError, match="nonesuch"):
        choose(backend="nonesuch")


def test_the_reasons_name_what_stood_in_the_way(looks_like):
    looks_like(lacking=("compiler", "onnx"))
    reasons = choose().reasons
    assert "no CUDA device" in reasons["device"]
    assert "not aoti: AOTInductor needs a C++ compiler" in reasons["backend"]
    assert "not onnx: onnx not installed" in reasons["backend"]
    assert reasons["dtype"].endswith("does not compute in bf16")
    looks_like(features=BF16, gpu=(8, 6))
    assert choose().reasons["device"] == "Test GPU" and choose().reasons["dtype"] == "the GPU (sm_86) computes in it"
    assert choose(backend="onnx").reasons["device"].count("not onnx on cuda: onnxruntime") == 1
    assert choose("cpu", "onnx").reasons["dtype"] == "onnx has no bf16 on cpu"


def test_a_gpu_that_cannot_compute_is_not_chosen(looks_like, monkeypatch):
    looks_like(gpu=(3, 5))
    monkeypatch.setattr(machine, "gpu_problem", lambda: "torch cannot use Old GPU: no kernel image")
    choice = choose()
    assert of(choice) == ("cpu", "aoti", "fp32") and "Old GPU" in choice.reasons["device"]
    assert str(choice).startswith("device cpu: torch cannot use Old GPU: no kernel image; backend aoti: ")
