"""The buffers and the fallbacks of recorded loops, on any machine; real graphs where there is a CUDA device.

Where there is none, a stand-in for the recorder runs the work again at every replay, on the same buffers and into the
same output tensor, as a graph would. That the loop can be recorded at all is checked with meta tensors: they have no
values, so whatever would wait for some (.item(), nonzero, masks) raises, and copies between devices are refused.
"""

import copy
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import jitexport
from jitexport import registry
from jitexport.backends.base import Engine
from jitexport.errors import InputError
from jitexport.graphs import CUDARecorder, LoopGraph, Recording
from jitexport.grid import TokenGrid
from jitexport.methods.base import Draws
from jitexport.methods.jit import JiT
from jitexport.models.stages import GIVES, kind_of
from jitexport.plan import CustomSchedule, make_cache
from jitexport.positions import Rotary
from jitexport.sampler import draw, sample
from jitexport.schedule import Target, uniform_sigmas
from jitexport.specs import EngineSpec, TensorSpec


def listed(output):
    return [output] if isinstance(output, torch.Tensor) else output


def copied(output):
    return output.clone() if isinstance(output, torch.Tensor) else [value.clone() for value in output]


class Rerun:
    """Records by keeping the work, as a graph keeps its kernels."""

    def __init__(self, fail=lambda attempt: False):
        self.recorded = 0
        self.replayed = 0
        self._attempts = 0
        self._fail = fail

    def record(self, work):
        self._attempts += 1
        if self._fail(self._attempts):
            raise torch.OutOfMemoryError("no memory")
        output = copied(work())
        self.recorded += 1

        def replay():
            self.replayed += 1
            with torch.inference_mode():  # where an output of it may be written to, as a graph may write anywhere
                for kept, value in zip(listed(output), listed(work()), strict=True):
                    kept.copy_(value)

        return replay, output

    def before(self):
        pass

    def after(self):
        pass


def inputs(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(4, generator=generator)} | more


def function(named):
    return named["a"] * 2 + named["b"]


def recording(recorder):
    return Recording(function, recorder, threading.RLock())


def test_one_recording_serves_all_values():
    recorder = Rerun()
    recorded = recording(recorder)
    for seed in range(4):
        given = inputs(seed)
        kept = {name: value.clone() for name, value in given.items()}
        assert torch.equal(recorded(given), function(kept))
        assert all(torch.equal(given[name], kept[name]) for name in kept)
    assert (recorder.recorded, recorder.replayed) == (1, 4)


def test_results_are_the_callers_own():
    recorded = recording(Rerun())
    first = recorded(inputs(0))
    kept = first.clone()
    recorded(inputs(1))
    assert torch.equal(first, kept)


def test_the_first_inputs_are_not_the_buffers():
    recorded = recording(Rerun())
    first = inputs(0)
    kept = first["a"].clone()
    recorded(first)
    recorded(inputs(1))
    assert torch.equal(first["a"], kept)


def test_calls_inside_and_outside_of_inference_mode():
    recorded = recording(Rerun())
    with torch.inference_mode():
        inside = recorded(inputs(0))
    outside = recorded(inputs(0))
    with torch.inference_mode():
        again = recorded({name: value.clone() for name, value in inputs(0).items()})
    assert torch.equal(inside, outside) and torch.equal(inside, again)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(3, 4)},
        {"a": torch.zeros(2, 4), "b": torch.zeros(4)},
        {"a": torch.zeros(3, 4).double(), "b": torch.zeros(4)},
        {"a": torch.zeros(3, 4), "b": torch.zeros(4), "c": torch.zeros(1)},
    ],
)
def test_other_shapes_are_refused(other):
    recorded = recording(Rerun())
    recorded(inputs(0))
    with pytest.raises(InputError, match="fixed shapes"):
        recorded(other)


def test_threads_take_turns():
    recorder = Rerun()
    recorded = recording(recorder)
    results = {}

    def work(seed):
        results[seed] = [recorded(inputs(seed)) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recorder.recorded == 1
    assert all(torch.equal(r, function(inputs(seed))) for seed, many in results.items() for r in many)


# --- the loop and its fallbacks ---


ENGINE = Engine(
    EngineSpec(
        "stage", (TensorSpec("x", (5,), "fp32"), TensorSpec("scale", (), "fp32")), (TensorSpec("y", (5,), "fp32"),)
    ),
    lambda inputs: [inputs[0] * inputs[1]],
    torch.device("cpu"),
)
ENGINES = {"coarse": ENGINE, "fine": ENGINE}


def loop(named, engines):
    """Two engines, the first one twice, and arithmetic of the loop's own between them."""
    x = named["x"]
    for name in ("coarse", "coarse", "fine"):
        x = x + engines[name](x, named["scale"])[0]
    return x


def loop_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(5, generator=generator), "scale": torch.randn((), generator=generator)}


def loop_graph(recorder):
    return LoopGraph(loop, ENGINES, recorder)


@pytest.mark.parametrize(
    ("fails", "level", "recordings", "messages"),
    [
        (lambda attempt: False, "loop", 1, []),
        (lambda attempt: attempt == 1, "stages", 2, ["the loop"]),
        (lambda attempt: attempt in (1, 3), "nothing", 1, ["the loop", "the stages"]),
        (lambda attempt: True, "nothing", 0, ["the loop", "the stages"]),
    ],
)
def test_falls_back_where_memory_is_short(caplog, fails, level, recordings, messages):
    recorder = Rerun(fails)
    graph = loop_graph(recorder)
    assert graph.level is None
    for seed in range(3):
        named = loop_inputs(seed)
        expected = loop(named, ENGINES)
        assert torch.equal(graph(named), expected)
    assert (graph.level, recorder.recorded) == (level, recordings)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == len(messages) and all(m in w for m, w in zip(messages, warned, strict=True))


def test_an_error_of_the_loop_itself_is_raised():
    def broken(named, engines):
        raise RuntimeError("broken engine")

    graph = LoopGraph(broken, {}, Rerun())
    with pytest.raises(RuntimeError, match="broken engine"):
        graph(loop_inputs(0))


# --- nothing in the loop waits for the device ---


class OnOneDevice(TorchDispatchMode):
    """Refuses work on another device than meta, and with it copies from and to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves, _ = tree_flatten((args, kwargs or {}, result))
        devices = {t.device.type for t in leaves if isinstance(t, torch.Tensor)}
        assert devices <= {"meta"}, f"{func} on {devices}"
        return result


def on_meta(method, custom, batch=2, shape=(12, 8), patch=2, cache=None):
    """Run a method's loop on meta tensors, which have no values, around an engine that does no more than arithmetic."""
    grid = TokenGrid(shape)
    made = registry.method(method[0])(grid, registry.method(method[0]).options(method[1]), patch)
    schedule = made.schedule(target(custom))
    temporal = make_cache(cache or "taylor:every=1")
    schedule = temporal.place(schedule)
    latent = (4, shape[0] * patch, shape[1] * patch)
    drawn = draw(made, schedule, latent, patch, [torch.Generator().manual_seed(s) for s in range(batch)])
    rotary = Rotary((4, 6, 6), 10000.0, grid_axes=tuple(range(3 - len(shape), 3)), text_tokens=10)
    fake = {name: None if value is None else value.to("meta") for name, value in vars(drawn).items()}
    with OnOneDevice():
        tables = rotary.tables(made.places("meta"))

        def begin_stage(stage, where):
            cos, sin = rotary.gather(tables, where).values()

            def run(action, tokens, step, *beside):
                velocity = tokens.to(torch.bfloat16) * cos.mean() + sin.mean() + sum(t.mean() for t in beside)
                kept = len(GIVES.get(kind_of(temporal.features), {}).get(action, ()))
                return [velocity, *(torch.zeros(*tokens.shape[:2], 8, device="meta") for _ in range(kept))]

            return run

        y = sample(made, schedule, Draws(**fake), begin_stage, cache=temporal)
    assert y.device.type == "meta" and tuple(y.shape) == (batch, grid.tokens, 16)


def target(custom):
    return Target(
        speedup=4.0, custom=custom, cost=lambda m: m, reference_steps=50, native_sigmas=uniform_sigmas
    )


@pytest.mark.parametrize("method", [("dense", "default"), *(("jit", preset) for preset in JiT.presets)])
def test_the_loop_never_waits_for_the_device(method):
    on_meta(method, CustomSchedule((4,), (1.0,)) if method[0] == "dense" else None)


@pytest.mark.parametrize("cache", registry.CACHES)
@pytest.mark.parametrize(
    ("method", "custom"),
    [
        (("dense", "default"), CustomSchedule((9,), (1.0,))), (("jit", "default"), None),
        (("ralu", "gradient"), CustomSchedule((3, 3, 4))), (("bottleneck", "default"), CustomSchedule((3, 3, 4))),
        (("ras", "default"), CustomSchedule((9,), (0.25,))),
    ],
)
def test_no_combination_waits_for_the_device(method, custom, cache):
    on_meta(method, custom, cache=f"{cache}:every=3,warmup=1")


@pytest.mark.parametrize("broken", ["item", "to", "mask"])
def test_waiting_would_be_noticed(broken, monkeypatch):
    waits = {
        "item": lambda self, state: state.active * state.active.mean().item(),
        "to": lambda self, state: state.active + torch.ones(state.active.shape).to(state.active.device),
        "mask": lambda self, state: state.active[state.active > 0],
    }
    monkeypatch.setattr(JiT, "tokens", waits[broken])
    with pytest.raises(Exception):  # noqa: B017  each in its own way, which torch does not promise
        on_meta(("jit", "default"), None)


# --- a pipeline ---


@pytest.fixture(scope="module")
def pipe(make_bundle):
    return jitexport.load(make_bundle(custom=CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0))))


def latents(pipe, prompt, seed, **options):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **options).images


@pytest.mark.parametrize(
    ("fails", "level", "recordings"),
    [(lambda attempt: False, "loop", 1), (lambda attempt: attempt == 1, "stages", 3)],
)
def test_one_recording_serves_all_prompts_seeds_and_guidance(pipe, fails, level, recordings):
    recorder = Rerun(fails)
    recorded = copy.copy(pipe)
    recorded.graph = pipe.loop_graph(recorder)
    for prompt, seed, guidance in (("a red fox", 0, 3.5), ("the blue house", 1, 3.5), ("a red fox", 0, 9.0)):
        found = latents(recorded, prompt, seed, guidance_scale=guidance)
        assert torch.equal(found, latents(pipe, prompt, seed, guidance_scale=guidance))
    assert (recorded.graph.level, recorder.recorded) == (level, recordings)


def test_a_callback_runs_the_loop_step_by_step(pipe):
    recorder = Rerun()
    recorded = copy.copy(pipe)
    recorded.graph = pipe.loop_graph(recorder)
    steps = []
    found = latents(recorded, "a red fox", 0, callback_on_step_end=lambda p, i, t, tensors: steps.append(i))
    assert torch.equal(found, latents(pipe, "a red fox", 0))
    assert (steps, recorder.recorded) == ([0, 1, 2, 3, 4], 0)


def test_there_is_no_graph_without_cuda(pipe):
    assert pipe.graph is None


# --- on a GPU ---


@pytest.mark.gpu
def test_a_cuda_graph_is_the_loop():
    device = torch.device("cuda")
    engine = Engine(ENGINE.spec, lambda inputs: [inputs[0] * inputs[1]], device)
    engines = {"coarse": engine, "fine": engine}
    graph = LoopGraph(loop, engines, CUDARecorder(device))
    for seed in range(3):
        named = {name: value.to(device) for name, value in loop_inputs(seed).items()}
        torch.testing.assert_close(graph(named), loop(named, engines))
    assert graph.level == "loop"


@pytest.mark.gpu
@pytest.mark.parametrize("short", [False, True])
def test_a_pipeline_on_cuda_is_the_same_with_and_without_a_graph(make_bundle, short, monkeypatch):
    path = make_bundle(custom=CustomSchedule((2, 1, 2), (0.35, 0.62, 1.0)), device="cuda")
    recorded, plain = jitexport.load(path), jitexport.load(path, cuda_graphs=False)
    if short:
        monkeypatch.setattr(recorded.graph, "_ways", {"stages": recorded.graph._by_stage})
    for prompt, seed in (("a red fox", 0), ("the blue house", 1)):
        torch.testing.assert_close(latents(recorded, prompt, seed), latents(plain, prompt, seed))
    assert recorded.graph.level == ("stages" if short else "loop")


@pytest.mark.gpu
def test_work_that_waits_for_the_device_is_not_recorded(caplog):
    device = torch.device("cuda")

    def waits(named, engines):
        return named["x"] * named["scale"].item()

    graph = LoopGraph(waits, {}, CUDARecorder(device))
    named = {name: value.to(device) for name, value in loop_inputs(0).items()}
    torch.testing.assert_close(graph(named), waits(named, {}))
    assert graph.level == "stages"  # of which there are none: the loop runs as it is


@pytest.mark.gpu
def test_a_recording_that_failed_leaves_generator_and_stream_as_they_were():
    device = torch.device("cuda")
    stream = torch.cuda.current_stream()
    torch.manual_seed(0)
    expected = [torch.randn(8, device=device) for _ in range(2)]
    torch.manual_seed(0)
    first = torch.randn(8, device=device)
    with pytest.raises(RuntimeError):
        CUDARecorder(device).record(lambda: torch.ones(1, device=device) * first.sum().item())
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.stack([first, torch.randn(8, device=device)]), torch.stack(expected))
