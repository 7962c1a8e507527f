"""What every backend must do alike. A backend that this machine cannot run is skipped, with its reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import jitexport
from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.backends.eager import as_engine
from jitexport.building.comparing import compare
from jitexport.errors import InputError
from tests.backends.conftest import CPU, Case

ENGINES = ["text", "condition", "stage1", "stage0", "decode"]
#: Largest ||engine - eager|| / ||eager||. bf16 keeps 8 bits, and eager rounds where compilers do not.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}

COMPILED = ("aoti", "inductor")  # half a minute a case, so there are fewer of them
NAMES = [name for name in registry.BACKENDS if name != "fastest"]  # whose engines are the others'
CASES = [
    pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.batch > 1 and name in COMPILED else [])
    for name in NAMES
    for case in [
        Case(name),
        *([] if name in COMPILED else [Case(name, batch=3, text=17), Case(name, dtype="bf16")]),
        *([Case(name, dtype="bf16", batch=3, text=17)] if name in COMPILED else []),
    ]
]
SIMPLE = [pytest.param(Case(name), id=name) for name in NAMES]


@pytest.fixture(params=CASES)
def each(request, built):
    return built(request.param)


@pytest.fixture(params=SIMPLE)
def simple(request, built):
    return built(request.param)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ENGINES)
def test_agrees_with_eager_and_repeats_exactly(each, name):
    engine, inputs, spec = each.load(name), each.inputs[name], each.specs[name]
    outputs = engine(*inputs)
    assert [(o.shape, o.dtype) for o in outputs] == [(o.shape, o.dtype) for o in each.reference[name](*inputs)]
    relative, largest = compare(outputs, each.reference[name](*inputs))
    assert relative <= TOLERANCE[each.case.dtype], f"{spec.name}: {relative:.2g}, largest {largest:.2g}"
    first = [o.clone() for o in outputs]
    engine(*[torch.zeros_like(i) for i in inputs])
    assert same(outputs, first), "a later run wrote into the outputs of an earlier one"
    assert same(engine(*inputs), first)


def test_refuses_other_inputs(simple):
    engine, inputs = simple.load("stage1"), simple.inputs["stage1"]
    tokens, *rest = inputs
    for wrong in (
        [tokens.double(), *rest],
        [tokens.to(torch.bfloat16), *rest],
        [tokens[:, :-1], *rest],
        [tokens.repeat(2, 1, 1), *rest],
        [tokens[0], *rest],
        [tokens.to("meta"), *rest],
        rest,
        [*inputs, tokens],
    ):
        with pytest.raises(InputError, match=r"found:.*\n.*expected:"):
            engine(*wrong)
    engine(*inputs)


def test_takes_inputs_of_any_stride(simple):
    engine, inputs = simple.load("stage1"), simple.inputs["stage1"]
    strided = [i.transpose(0, -1).contiguous().transpose(0, -1) for i in inputs]
    strided[0] = inputs[0].repeat_interleave(2, dim=1)[:, ::2]
    assert not any(i.is_contiguous() for i in strided[:3])
    assert same(engine(*strided), engine(*inputs))


@pytest.mark.parametrize("name", ["text", "condition", "stage1", "decode"])
def test_runs_on_the_tensors_it_was_given(simple, name):
    """Two sets of weights at once, each followed where its tensors change: no copies, nothing shared."""
    inputs = simple.inputs[name]
    other = {id(w): w.clone() for w in simple.weights.values()}
    other = {n: other[id(w)] for n, w in simple.weights.items()}
    for w in {id(w): w for w in other.values() if w.is_floating_point()}.values():
        w.mul_(1.5)
    mine, theirs = simple.load(name), simple.load(name, other)
    before, after = mine(*inputs), [o.clone() for o in theirs(*inputs)]
    before = [o.clone() for o in before]
    assert same(mine(*inputs), before)
    assert same(theirs(*inputs), after)
    assert compare(after, before)[0] > 1e-3

    with torch.no_grad():
        saved = {n: w.clone() for n, w in other.items()}
        for n, w in other.items():
            w.copy_(simple.weights[n])
        assert same(theirs(*inputs), before), "the engine holds copies of its weights"
        for n, w in saved.items():
            other[n].copy_(w)
    assert same(theirs(*inputs), after)
    assert same(mine(*inputs), before)


def test_two_bundles_at_once(simple):
    """From two threads, on weights of their own: each makes the images that it makes alone."""
    mine, theirs = (jitexport.load(simple.bundle) for _ in range(2))
    with theirs.weights.changing():
        for name in theirs.weights.tensors:
            if name.endswith("attn.to_q.weight"):
                theirs.weights.set(name, theirs.weights.tensors[name] * 3)

    def images(pipe):
        return [
            pipe("a red fox", generator=torch.Generator().manual_seed(s), output_type="latent").images for s in range(4)
        ]

    alone = images(mine), images(theirs)
    assert not same(*alone)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(images, (mine, theirs)))
    assert same(together[0], alone[0]) and same(together[1], alone[1])


def test_the_checks_are_in_front_of_any_engine(simple):
    spec = simple.specs["decode"]
    calls = []
    engine = Engine(spec, lambda inputs: calls.append(inputs) or as_engine(torch.nn.Identity())(inputs), CPU)
    with pytest.raises(InputError):
        engine(torch.zeros(1))
    assert not calls
