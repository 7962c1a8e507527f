import pytest
import torch
from torch import nn

from jitexport.flops import StepCost, count_flops, meta_adapter, step_cost
from jitexport.models.flux import FluxAdapter
from jitexport.models.sources import config_adapter, published
from jitexport.schedule import Stage, StageSchedule, stage_cost
from jitexport.solving import solve_stages
from jitexport.specs import EngineSpec, TensorSpec


def test_a_linear_layer_costs_two_per_multiply_add():
    with torch.device("meta"):
        module = nn.Linear(3, 5)
    spec = EngineSpec("x", (TensorSpec("x", (2, 7, 3), "fp32"),), (TensorSpec("y", (2, 7, 5), "fp32"),))
    assert count_flops(module, spec) == 2 * 2 * 7 * 3 * 5


def test_cost_is_a_parabola():
    assert StepCost(1.0, 2.0, 3.0)(10) == 1 + 20 + 300


def formula(adapter, tokens):
    """FLOPs of a step counted by hand: every linear layer by its rows, attention by L^2, 2 per multiply-add."""
    model = adapter.components["transformer"]
    text = adapter.geometry.text_tokens
    embed = model.time_text_embed
    total = sum(2 * m.weight.numel() for m in embed.modules() if isinstance(m, nn.Linear))
    total += 2 * model.context_embedder.weight.numel() * text
    total += 2 * tokens * (model.x_embedder.weight.numel() + model.proj_out.weight.numel())
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                if "norm" in name:
                    rows = 1
                elif block in model.single_transformer_blocks:
                    rows = text + tokens
                else:
                    rows = text if any(part in name for part in ("add_", "to_add", "context")) else tokens
                total += 2 * rows * layer.weight.numel()
        total += 4 * (text + tokens) ** 2 * model.inner_dim
    return total + 2 * model.norm_out.linear.weight.numel()


@pytest.mark.parametrize("which", ["tiny_flux", "tiny_schnell"])
@pytest.mark.parametrize("tokens", [1, 33, 96, 500])
def test_cost_of_a_step_is_that_of_its_layers(which, tokens, request):
    adapter = FluxAdapter.from_folder(request.getfixturevalue(which), torch.float32)
    cost = step_cost(meta_adapter(adapter, "fp32"), "fp32")
    assert cost(tokens) == pytest.approx(formula(adapter, tokens), rel=1e-12)


def test_cost_holds_between_and_beyond_the_counts_that_it_was_measured_at(tiny_flux):
    adapter = meta_adapter(FluxAdapter.from_folder(tiny_flux, torch.float32), "bf16")
    cost = step_cost(adapter, "bf16")
    for tokens in (5, 100, 1000):
        specs = {s.name: s for s in adapter.specs(StageSchedule((Stage(0, tokens, 1),), (1.0, 0.0)), 1, "bf16")}
        counted = sum(count_flops(adapter.module(n), specs[n]) for n in ("condition", "stage0"))
        assert cost(tokens) == counted


def test_flux_dev():
    """FLUX.1-dev at 1024 x 1024 and 512 text tokens, in TFLOPs: a step 74.38, 50 steps 3719, 4x 899, 7x 535."""
    cost = step_cost(config_adapter(published("flux"), torch.bfloat16), "bf16")
    assert cost(4096) / 1e12 == pytest.approx(74.38, abs=0.005)
    totals = {s: stage_cost(solve_stages(s, 4096, cost, 50), cost) / 1e12 for s in (1, 4, 7)}
    assert {s: round(t) for s, t in totals.items()} == {1: 3719, 4: 899, 7: 535}
    assert totals[1] / totals[4] == pytest.approx(4.14, abs=0.005)
    assert totals[1] / totals[7] == pytest.approx(6.96, abs=0.005)
    assert (cost.constant, cost.linear, cost.quadratic) == (6813006692352, 13628080128, 700416)


def test_blocks_of_a_kind_are_counted_as_often_as_they_run(tiny_flux, monkeypatch):
    adapter = meta_adapter(FluxAdapter.from_folder(tiny_flux, torch.float32), "fp32")
    schedule = StageSchedule((Stage(0, 96, 1),), (1.0, 0.0))
    spec = next(s for s in adapter.specs(schedule, 1, "fp32") if s.name == "stage0")
    module = adapter.module("stage0")
    runs = []
    single = module.single_block
    monkeypatch.setattr(type(module), "single_block", staticmethod(lambda *a: runs.append(1) or single(*a)))
    once = count_flops(module, spec)
    assert len(runs) == 1 and len(adapter.components["transformer"].single_transformer_blocks) == 2
    monkeypatch.setattr(type(module), "regions", ())
    assert count_flops(module, spec) == once and len(runs) == 3
