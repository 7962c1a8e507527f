"""The queue and the computing thread, with one that fails among those that do not."""

import asyncio

import pytest
import torch

import jitexport
from jitexport.errors import NumericalError
from jitexport.plan import CustomSchedule
from jitexport.png import encode_png
from jitexport.runtime import Pipeline
from jitexport.schedule import COMPUTED
from jitexport.serve.catalog import Catalog
from jitexport.serve.engine import Engine
from jitexport.serve.errors import ApiError
from jitexport.serve.jobs import Failed, Finished, Job, Partial, Step
from jitexport.serve.metrics import Metrics
from jitexport.serve.settings import Limits
from jitexport.serve.store import Store


@pytest.fixture
def engine(quad, request):
    """Waits for a batch to be full as long as a test says, else 0.3 s."""
    catalog, metrics = Catalog.of([f"quad={quad}"]), Metrics()
    limits = Limits(queue=6, batch_wait=getattr(request, "param", 0.3))
    made = Engine(catalog, Store(catalog, metrics), limits, metrics)
    made.start()
    yield made
    made.stop()


async def run(engine, jobs):
    found = {}
    async for i, event in engine.events(jobs):
        found.setdefault(i, []).append(event)
    return [found[i] for i in range(len(jobs))]


def jobs(*prompts, **further):
    return [Job("quad", prompt, seed, **further) for seed, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(NumericalError("an image would hold NaN"), 500, "not_finite"), (RuntimeError("secret"), 500, "internal_error")],
)
def test_one_that_fails_fails_alone(engine, alone, monkeypatch, error, status, code):
    call = Pipeline.__call__

    def poisoned(self, prompts, *, callback_on_step_end=None, **options):
        def look(pipe, step, *rest):
            callback_on_step_end(pipe, step, *rest)
            if step == 3 and "poison" in prompts:
                raise error

        watch = None if callback_on_step_end is None else look
        return call(self, prompts, callback_on_step_end=watch, **options)

    monkeypatch.setattr(Pipeline, "__call__", poisoned)
    found = asyncio.run(run(engine, jobs("fox", "poison", "dog", "house", partial_images=2)))
    assert isinstance(found[1][-1], Failed)
    answer = found[1][-1].error
    assert (answer.status, answer.code) == (status, code) and "secret" not in answer.message
    for seed, prompt in [(0, "fox"), (2, "dog"), (3, "house")]:
        finished = found[seed][-1]
        assert isinstance(finished, Finished) and finished.data == alone(prompt, seed)
        # What was sent before the others failed is not sent again.
        assert [e.index for e in found[seed] if isinstance(e, Partial)] == [0, 1]


@pytest.mark.parametrize("engine", [300.0], indirect=True)
def test_jobs_that_come_within_a_moment_share_a_batch_and_a_full_one_does_not_wait(engine):
    async def several():
        first = asyncio.create_task(run(engine, jobs("fox")))
        await asyncio.sleep(0.05)
        return await asyncio.gather(first, run(engine, jobs("dog", "house", "tree")))

    found = [events[-1] for one in asyncio.run(several()) for events in one]
    assert [finished.batch for finished in found] == [4] * 4
    assert all(finished.seconds["queue"] < 300 for finished in found)


def test_a_request_is_taken_whole_or_not_at_all(engine):
    with pytest.raises(ApiError) as refused:
        asyncio.run(run(engine, jobs(*["fox"] * 7)))
    assert refused.value.status == 503 and int(refused.value.headers["Retry-After"]) >= 1
    assert len(asyncio.run(run(engine, jobs(*["fox"] * 6)))) == 6


def test_a_stopped_engine_takes_nothing(engine):
    engine.stop()
    with pytest.raises(ApiError, match="shutting down"):
        asyncio.run(run(engine, jobs("fox")))


def test_steps_say_which_of_them_were_forecast(make_bundle):
    bundle = make_bundle(method="dense", custom=CustomSchedule((8,)), cache="taylorseer:every=2")
    catalog, metrics = Catalog.of([f"cached={bundle}"]), Metrics()
    engine = Engine(catalog, Store(catalog, metrics), Limits(), metrics)
    engine.start()
    found = asyncio.run(run(engine, [Job("cached", "fox", 1, steps=True, partial_images=2)]))[0]
    engine.stop()
    pipe = jitexport.load(bundle)
    actions = [event.action for event in found if isinstance(event, Step)]
    assert actions == [pipe.schedule.action(i) for i in range(8)] and {COMPUTED} < set(actions)
    assert found[-1].data == encode_png(pipe("fox", generator=torch.Generator().manual_seed(1)).images[0])
