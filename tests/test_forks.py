"""A process that was forked after a pipeline was loaded makes the same images, or says at once why it cannot."""

import os
import pickle
import signal
import threading
import time
import traceback

import pytest
import torch

import jitexport
from jitexport.errors import BackendError, InputError
from jitexport.forks import forked
from jitexport.plan import CustomSchedule

PROMPT = "a red fox"


def in_fork(work, seconds=120.0):
    """What a function returns, or raises, in a forked process; fails where it hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            answer = (True, work())
        except BaseException as error:
            answer = (False, (type(error), str(error), traceback.format_exc()))
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    until = time.monotonic() + seconds
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked process hangs")
        time.sleep(0.02)
    with os.fdopen(reading, "rb") as pipe:
        return pickle.load(pipe)


@pytest.fixture(autouse=True)
def threads():
    """More than one, and all of them used before the fork: what makes a process hang after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.randn(2000, 2000).exp().sum()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["eager", "aoti"])
def pipe(request, make_bundle, aoti_bundle):
    if request.param == "aoti":
        return jitexport.load(aoti_bundle)
    return jitexport.load(make_bundle(custom=CustomSchedule((2, 2), (0.35, 1.0))))


def image(pipe, seed=3):
    return pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="np").images


@pytest.mark.parametrize("used", [False, True])
def test_the_same_image_after_a_fork(pipe, used):
    if used:
        image(pipe)
    worked, found = in_fork(lambda: (image(pipe), image(pipe, 4), forked()))
    assert worked, found
    assert (found[0] == image(pipe)).all() and (found[1] == image(pipe, 4)).all() and found[2]
    assert not forked()


def test_threads_that_end_as_the_process_forks():
    """They hold a lock of MKL's in that moment: without care one in five of these forks hangs."""
    states, weights = torch.randn(64, 300), torch.randn(300, 300)

    def multiply():
        for _ in range(3):
            torch.nn.functional.linear(states, weights)

    def in_a_thread():
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()

    for _ in range(40):
        in_a_thread()
        assert in_fork(in_a_thread, seconds=20) == (True, None)


AMX = torch.cpu.get_capabilities().get("amx_tile", False)


# Seen there on 2026-11-26, before forks waited for threads that end, and not run there since: when it has passed on
# such a CPU, this mark goes.
@pytest.mark.xfail(AMX, strict=False, reason="on a CPU with AMX it hung before forks waited for threads that end")
def test_threads_and_forks_of_a_forked_process(pipe):
    def work():
        images = []
        thread = threading.Thread(target=lambda: images.append(image(pipe)))
        thread.start()
        thread.join()
        images.append(in_fork(lambda: image(pipe))[1])
        return images

    worked, found = in_fork(work)
    assert worked, found
    expected = image(pipe)
    assert all((one == expected).all() for one in found)


def test_loading_and_calls_from_callbacks_after_a_fork(make_bundle):
    bundle = make_bundle(custom=CustomSchedule((2, 2), (0.35, 1.0)))
    expected = image(jitexport.load(bundle))

    def work():
        pipe, inner = jitexport.load(bundle), []
        pipe(PROMPT, callback_on_step_end=lambda p, i, t, values: inner.append(image(p)) if not i else None)
        return inner

    worked, found = in_fork(work)
    assert worked, found
    assert (found[0] == expected).all()


def test_a_fork_while_others_make_images_and_change_weights(make_bundle):
    """Locks that other threads held are not held for ever; a change that was half done is an error."""
    pipe = jitexport.load(make_bundle(custom=CustomSchedule((2, 2), (0.35, 1.0))))
    expected = image(pipe)
    with pipe.weights.reading():
        worked, found = in_fork(lambda: (image(pipe), pipe.unload_lora()))
        assert worked, found
        assert (found[0] == expected).all()
    with pipe.weights.changing():
        worked, found = in_fork(lambda: image(pipe))
    assert not worked and found[0] is InputError and "forked while weights were being changed" in found[1]


def test_errors_come_through(pipe):
    worked, found = in_fork(lambda: pipe([]))
    assert not worked and found[0] is InputError


@pytest.mark.parametrize("call", [image, lambda pipe: pipe.unload_lora()])
def test_engines_with_threads_of_their_own_are_an_error_at_once(pipe, call):
    pipe._forkable = False
    worked, found = in_fork(lambda: call(pipe), seconds=60)
    assert not worked and found[0] is BackendError and "jitexport.load in each worker" in found[1]
    image(pipe)  # and still fine here
