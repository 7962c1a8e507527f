"""Programs over regions, with the regions run by PyTorch: what they compute, and what is refused."""

import json

import pytest
import torch
from torch import nn

from jitexport.blocks import tensors_of
from jitexport.building.reference import eager_pipeline, probe_inputs
from jitexport.errors import CompileError
from jitexport.models.flux import FluxAdapter
from jitexport.plan import CustomSchedule, plan
from jitexport.programs import Program, check, open_program
from jitexport.regions import outline

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width=4, factor=1.0):
        super().__init__()
        self.linear, self.factor = nn.Linear(width, width), factor


def block(block, x, shift):
    return x + block.factor * block.linear(x) + shift[:, None]


class Net(nn.Module):
    """x [B, L, 4], shifts [B, 4 n] -> [B, L, 4]; blocks between a first and a last layer."""

    regions = ("block",)
    block = staticmethod(block)

    def __init__(self, *blocks):
        super().__init__()
        self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.full((4,), 1.5))

    def forward(self, x, shifts):
        x = self.first(x)
        for part, shift in zip(self.blocks, shifts.chunk(len(self.blocks), dim=-1), strict=True):
            x = self.block(part, x, shift)
        return (x.float() * self.scale).to(torch.float32)


def opened(made, weights):
    libraries = {name: lambda given, kind=kind: kind(*given) for name, kind in made.kinds.items()}
    return open_program(made.program, libraries, weights, CPU)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(Block(), Block(), Block()).requires_grad_(False)


@pytest.fixture
def inputs():
    return [torch.randn(3, 5, 4), torch.randn(3, 12)]


def test_blocks_of_one_make_are_one_kind_run_on_their_own_weights(net, inputs):
    made = outline(net, inputs)
    assert list(made.kinds) == ["block"] and made.program.calls == 3
    weights = tensors_of(net)
    run = opened(made, weights)
    torch.testing.assert_close(run(inputs)[0], net(*inputs), rtol=0, atol=0)
    net.blocks[2].linear.weight.mul_(3)  # in place, as adapters change weights
    torch.testing.assert_close(run(inputs)[0], net(*inputs), rtol=0, atol=0)
    others = {name: w * 0.5 for name, w in weights.items()}
    expected = torch.func.functional_call(net, others, tuple(inputs))
    torch.testing.assert_close(opened(made, others)(inputs)[0], expected, rtol=0, atol=0)
    assert "block" not in vars(net), "the module is left as it was"


def test_blocks_of_another_make_are_another_kind(inputs):
    net = Net(Block(), Block(factor=2.0), Block()).requires_grad_(False)
    made = outline(net, inputs)
    assert [step.region for step in made.program.steps if step.region] == ["block", "block-2", "block"]
    torch.testing.assert_close(opened(made, tensors_of(net))(inputs)[0], net(*inputs), rtol=0, atol=0)


def test_a_result_that_nobody_reads_is_left_out(net, inputs):
    """As the text of a last block, which is taken out of its results and not used."""

    def both(part, x, shift):
        return block(part, x, shift), shift + 1

    def forward(x, shifts):
        for part in net.blocks:
            x, _ = net.block(part, x, shifts[:, :4])
        return x

    net.block, net.forward = both, forward
    made = outline(net, inputs)
    check(made.program, tensors_of(net))
    torch.testing.assert_close(opened(made, tensors_of(net))(inputs)[0], forward(*inputs), rtol=0, atol=0)


def test_modules_without_regions_have_no_program(inputs):
    assert outline(nn.Linear(4, 4), inputs[:1]) is None


def test_regions_take_a_block_and_tensors(net, inputs):
    net.forward = lambda x, shifts: net.block(net.blocks[0], x, 3)
    with pytest.raises(CompileError, match=r"region block cannot be compiled[\s\S]*int"):
        outline(net, inputs)


def test_a_constant_between_regions_is_refused(net, inputs):
    constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
    net.forward = lambda x, shifts: net.block(net.blocks[0], x, shifts[:, :4]) + constant
    with pytest.raises(CompileError, match=r"constant tensor[\s\S]*buffer"):
        outline(net, inputs)


def change(path, value):
    def apply(program):
        *way, last = path
        for key in way:
            program = program[key]
        program[last] = value

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(["steps"], []), "no step gives the output"),
        (change(["surprise"], 1), "surprise"),
        (change(["inputs"], "x"), "inputs"),
        (change(["outputs"], ["nothing"]), "no step gives the output 'nothing'"),
        (change(["steps", 0, "operator"], "aten.no_such_thing.default"), "not one of PyTorch's operators"),
        (change(["steps", 0, "operator"], "jitexport.region.default"), "not one of PyTorch's operators"),
        (change(["steps", 0, "arguments"], [{"value": "later"}]), "'later', which no earlier step gives"),
        (change(["steps", 0, "arguments"], [{"file": "/etc/passwd"}]), "no argument of an operator"),
        (change(["steps", 2, "operator"], "aten.relu.default"), "a region or an operator"),
        (change(["steps", 2, "region"], "other"), "runs a region that is not there"),
        (change(["steps", 2, "weights", 0], "blocks.9.linear.weight"), "no weight blocks.9.linear.weight"),
        (change(["steps", 2, "weights", 0], "scale"), "weight scale is float32.4., strides .1., the region was comp"),
        (change(["steps", 2, "weights"], []), "0 weights, the region was compiled for 2"),
        (change(["steps", 2, "inputs", 0], "shifts"), "input shifts is float32.3, 12., strides"),
        (change(["weights", "p_first_weight"], "gone"), "no weight gone"),
    ],
)
def test_programs_that_do_not_fit_together_are_refused(net, inputs, damage, message):
    program = json.loads(outline(net, inputs).program.model_dump_json())
    assert program["steps"][2]["region"] == "block"
    check(Program.model_validate_json(json.dumps(program)), tensors_of(net))
    damage(program)
    with pytest.raises(ValueError, match=message):
        check(Program.model_validate_json(json.dumps(program)), tensors_of(net))


@pytest.mark.parametrize(("batch", "quantization"), [(1, None), (3, None), (3, "int8")])
def test_stages_of_flux(tiny_flux, batch, quantization):
    adapter = FluxAdapter.from_folder(tiny_flux, torch.float32, {"quantization": quantization})
    made = plan(adapter, custom=CustomSchedule((1, 1), (0.35, 1.0)), dtype="fp32")
    options = {"batch": batch, "dtype": "fp32", "device": CPU}
    pipeline = eager_pipeline(adapter, made.schedule, made.method, made.options, **options)
    with torch.no_grad():
        inputs = {spec.name: given for spec, given in probe_inputs(pipeline)}["stage0"]
        stage = outline(adapter.module("stage0"), inputs)
        assert list(stage.kinds) == ["double_block", "single_block"] and stage.program.calls == 3
        out = opened(stage, dict(adapter.tensors()))(inputs)
        torch.testing.assert_close(out[0], pipeline.engines["stage0"](*inputs)[0], rtol=1e-5, atol=1e-6)
