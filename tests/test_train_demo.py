"""The demo model's training: a run goes on where it stopped, and its data is what its captions say."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from jitexport.evaluate.demo import DemoData
from jitexport.evaluate.scenes import caption_words, held_out, parse
from jitexport.models.sources import DEMO_FOLDER
from tests.scripting import script

TINY = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def demo():
    """The modules of scripts/demo_model; they import diffusers, which takes seconds."""
    names = ("networks", "pictures", "shards", "training", "velocity")
    return SimpleNamespace(**{name: script(f"demo_model/{name}") for name in names})


@pytest.fixture(scope="module")
def vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(DEMO_FOLDER / "vae").float().eval()


@pytest.fixture
def start(demo, vae, tmp_path):
    """Starts, or goes on with, a tiny run of three stages in a folder."""

    started = []

    def start(folder: str = "run", **options):
        torch.manual_seed(0)
        models = demo.networks.make_models(caption_words(), vae, **TINY, axes_dims_rope=(4, 6, 6))
        stages = [replace(stage, pictures=4, uses=2) for stage in demo.training.STAGES]
        sizes = demo.training.Sizes(tokens=512, shard=4, encoded=4)
        training = demo.training.Training(
            models, DemoData().sprites, tmp_path / folder, stages=stages, sizes=sizes, **options
        )
        started.append(training)
        return training

    yield start
    for training in started:
        training.make_shard.close()


def run(training, steps: int | None = None) -> list[float]:
    losses = []
    while training.stage < len(training.stages) and (steps is None or len(losses) < steps):
        losses.append(float(training.step()))
    return losses


def test_a_run_that_was_killed_has_the_losses_of_one_that_was_not(start):
    whole = start("whole")
    losses = run(whole)
    assert whole.elapsed == 1 and all(pictures >= 4 for pictures in whole.progress.pictures)
    halves = []
    for steps in (3, len(losses) - 5, None):  # the second time within the last stage, where there is a teacher
        part = start("parts")
        halves += run(part, steps)
        part.save()
        run(part, 1)  # what is done after a checkpoint is lost, and done again
    assert halves == losses
    again = start("parts")
    assert again.stage == len(again.stages) and again.progress.steps == len(losses)
    for a, b in zip(whole.average.trained.parameters(), part.average.trained.parameters(), strict=True):
        assert torch.equal(a, b)


def test_workers_make_the_same_shards(start):
    alone, helped = start("alone"), start("helped", workers=2)
    for key in ((0, 0), (0, 1), (2, 0)):
        expected, made = alone.make_shard(key), helped.make_shard(key)
        assert torch.equal(made.latents, expected.latents)
        assert torch.equal(made.t5_ids, expected.t5_ids) and torch.equal(made.clip_ids, expected.clip_ids)
    assert not torch.equal(alone.make_shard((2, 1)).latents, expected.latents)


def test_a_run_by_time_ends_its_stages_by_time(start):
    training = start(minutes=1, peak=1.0)
    training.prepare()
    training.progress.steps = 1000  # the warm-up is over
    rates = []
    for seconds, stage in ((0, 0), (29.9, 0), (30, 1), (49.7, 1), (49.9, 2), (59.9, 2)):
        training.progress.seconds = seconds
        assert training.stage == stage
        training.step()
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1 - 29.9 / 60, 0.5, 1 - 49.7 / 60, 1 - 49.9 / 60, 0.01])
    assert all(training.progress.pictures)
    training.save()
    again = start(minutes=1)
    assert again.stage == 2 and again.progress.seconds == 59.9 and again.losses.keys() == training.losses.keys()
    again.progress.seconds = 60
    assert again.stage == len(again.stages) and again.elapsed == 1


def test_a_run_by_time_uses_a_shard_again_while_the_next_is_late(start, monkeypatch):
    training = start(minutes=1)
    training.stages = tuple(replace(stage, whole=0, ratios=(0.25,)) for stage in training.stages)
    there = False
    monkeypatch.setattr(training.make_shard, "ready", lambda key: there)
    for _ in range(6):  # of two pictures; a shard of four is used twice
        training.step()
    assert training.late == 2 and training.make_shard.made[0] == (0, 0)
    there = True
    training.step()
    assert training.late == 2 and training.make_shard.made[0] == (0, 1)


def test_averages_take_no_gradients(start):
    training = start()
    training.step()
    assert not any(parameter.requires_grad for parameter in training.average.trained.parameters())


def test_held_out_losses_are_the_same_each_time_and_change_with_the_weights(demo, start, monkeypatch):
    monkeypatch.setattr(demo.training, "EVALUATED_SCENES", 4)
    training = start()
    first = training.evaluate()
    assert len(first) == 10 and all(value > 0 for value in first.values())
    assert training.evaluate() == first
    with torch.no_grad():
        training.average.transformer.proj_out.bias += 1
    assert all(abs(value - first[name]) > 0.1 for name, value in training.evaluate().items())


def test_scenes_of_the_run_are_trained_combinations_with_true_captions(demo):
    for index in range(50):
        scene, captions = demo.shards.scene_and_captions((0, 1, index))
        assert not held_out(scene.names, scene.background.colour)
        assert len(captions) == demo.shards.CAPTIONS_A_SCENE
        assert all(parse(caption).accepts(scene) for caption in captions)
    scene, _ = demo.shards.scene_and_captions((0, 1, 0), 1, from_held_out=True)
    assert held_out(scene.names, scene.background.colour)


def test_new_words_take_their_embeddings_from_old_ones(demo):
    old = demo.networks.load_models(DEMO_FOLDER)
    encoders = {"t5": old.t5, "clip": old.clip}
    before = {name: encoder.get_input_embeddings().weight.detach().clone() for name, encoder in encoders.items()}
    numbers = old.t5_tokenizer.get_vocab()
    new = demo.networks.with_words(old, caption_words())
    vocabulary = new.t5_tokenizer.get_vocab()
    assert vocabulary == new.clip_tokenizer.get_vocab()
    assert {word: vocabulary[word] for word in numbers} == numbers
    assert set(caption_words()) <= set(vocabulary)
    for name, encoder in (("t5", new.t5), ("clip", new.clip)):
        weight = encoder.get_input_embeddings().weight
        assert torch.equal(weight[: len(numbers)], before[name])
        assert torch.equal(weight[vocabulary["owls"]], before[name][numbers["owl"]])
        assert torch.equal(weight[vocabulary["something"]], before[name][numbers["<unk>"]])
    assert new.t5_tokenizer("two owls").input_ids == [vocabulary["two"], vocabulary["owls"], vocabulary["<eos>"]]


def test_windows_are_squares_of_which_most_are_quarters(demo):
    torch.manual_seed(0)
    grid, side = demo.networks.GRID, demo.velocity.WINDOW
    windows = demo.velocity.draw_windows(400, torch.device("cpu"))
    row, column = windows // grid, windows % grid
    for place in (row, column):
        assert place.min() == 0 and place.max() == grid - 1
    row, column = row - row[:, :1], column - column[:, :1]
    assert (row == torch.arange(side).repeat_interleave(side)).all()
    assert (column == torch.arange(side).repeat(side)).all()
    corners = windows[:, 0]
    quarters = [0, side, grid * side, grid * side + side]
    assert 0.63 < torch.isin(corners, torch.tensor(quarters)).float().mean() < 0.8
    assert set(quarters) <= set(corners.tolist()) and len(set(corners.tolist())) > 50


def test_a_window_has_the_tokens_of_its_places(demo, start):
    training = start()
    shard = training.make_shard((0, 0))
    torch.manual_seed(0)
    batch = demo.velocity.draw_batch(shard, demo.velocity.WINDOW**2, 3, training.empty, 0.0, window=True)
    assert all(any(torch.equal(clean, scene[active]) for scene in shard.latents)
               for clean, active in zip(batch.clean, batch.active, strict=True))  # fmt: skip


def test_true_guidance_of_one_is_the_caption_and_of_none_is_the_empty_one(demo, start):
    training = start()
    shard = training.make_shard((0, 0))
    torch.manual_seed(1)
    batch = demo.velocity.draw_batch(shard, 256, 2, training.empty, 0.0)
    with torch.no_grad():
        for parameter in training.models.transformer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # modulation starts at zero, and with it the caption's part
        plain = demo.velocity.velocity(training.models, training.tables, batch, torch.ones(2))
        predict = demo.velocity.guided_velocity
        guided = [
            predict(training.models, training.tables, batch, torch.full((2,), scale), training.empty)
            for scale in (0.0, 1.0, 3.0)
        ]
    assert torch.allclose(guided[1], plain, atol=1e-4) and not torch.allclose(guided[0], plain, atol=1e-3)
    assert torch.allclose(guided[2], guided[0] + 3 * (plain - guided[0]), atol=1e-3)


def test_pictures_are_drawn(demo, start):
    training = start()
    pictures = demo.pictures.draw_pictures(training.average, training.tables, ["fox", "two owls"], steps=2)
    assert [picture.size for picture in pictures] == [(256, 256)] * 2
    assert (np.array(pictures[0]) != np.array(pictures[1])).any()


def test_a_run_starts_from_what_another_one_learnt(demo, start, tmp_path):
    path, training = tmp_path / "weights.safetensors", start("first")
    trained = training.trained
    demo.networks.save_weights(training.models, path)
    half = sum(2 * p.numel() for p in trained.parameters())
    assert path.stat().st_size < 0.7 * half
    expected = {name: value.clone() for name, value in trained.state_dict().items()}
    for parameter in trained.parameters():
        parameter.data.zero_()
    loaded = demo.networks.load_weights(training.models, path)
    assert loaded.t5_tokenizer.get_vocab() == training.models.t5_tokenizer.get_vocab()
    for name, found in loaded.trained.state_dict().items():
        rows = expected[name].flatten(1) if found.dim() > 1 else expected[name][:, None]
        allowed = rows.abs().amax(1, keepdim=True) / 250 + 1e-9  # half a unit of 127, and of half precision less
        assert ((found.view_as(rows) - rows).abs() <= allowed).all(), name


def test_weights_bring_their_words(demo, vae, tmp_path):
    """A run starts from weights that know other words than today's captions have."""
    sizes = TINY | {"axes_dims_rope": (4, 6, 6)}
    older = demo.networks.make_models(["fox", "on", "zebra"], vae, **sizes)
    demo.networks.save_weights(older, tmp_path / "weights.safetensors")
    models = demo.networks.make_models(["fox", "on"], vae, **sizes)
    loaded = demo.networks.load_weights(models, tmp_path / "weights.safetensors")
    assert loaded.t5_tokenizer.get_vocab() == older.t5_tokenizer.get_vocab()
    for name, value in older.trained.state_dict().items():
        torch.testing.assert_close(loaded.trained.state_dict()[name], value, rtol=0.01, atol=0.02)


def test_norms_by_elementwise_steps_are_the_fused_ones(demo):
    x, weight = torch.randn(2, 5, 3, 64), torch.randn(64)
    expected = torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6)
    torch.testing.assert_close(demo.velocity.rms_norm(x, weight, 1e-6), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_steps_of_every_stage_on_a_gpu(demo, vae, tmp_path, number):
    """As large as a run's own, twice, and the device asked at once whether they went well."""
    models = demo.networks.make_models(caption_words(), vae)
    sizes = replace(demo.training.SIZES["cuda"], shard=64)
    before = sum(float(p.detach().double().sum()) for p in models.trained.parameters())
    training = demo.training.Training(models, DemoData().sprites, tmp_path, sizes=sizes, device="cuda", workers=0)
    training.progress.pictures = [stage.pictures for stage in demo.training.STAGES[:number]] + [0] * (3 - number)
    try:
        for _ in range(2):
            loss = training.step()
            torch.cuda.synchronize()
            assert loss.isfinite()
    finally:
        training.make_shard.close()
    after = sum(float(p.detach().double().sum()) for p in training.parameters)
    assert after != before and np.isfinite(after)
