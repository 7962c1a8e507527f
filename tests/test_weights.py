import threading
import time

import pytest
import torch

from jitexport.errors import InputError
from jitexport.weights import SharedWeights


@pytest.fixture
def weights():
    return SharedWeights({"a.w": torch.arange(6.0).view(2, 3), "b.w": torch.ones(2, dtype=torch.bfloat16)})


def test_changes_are_in_place_and_taken_back_bit_by_bit(weights):
    tensor, before = weights.tensors["b.w"], weights.tensors["b.w"].clone()
    with weights.changing():
        weights.set("b.w", torch.tensor([0.1, 0.3]))
        weights.set("b.w", torch.tensor([0.2, 0.4]))  # the original is that of before the first change
    assert weights.tensors["b.w"] is tensor
    assert not torch.equal(tensor, before)
    assert torch.equal(weights.original("b.w"), before)
    with weights.changing():
        weights.restore()
    assert torch.equal(tensor.view(torch.int16), before.view(torch.int16))


def test_replaced_weights_are_the_new_originals(weights):
    with weights.changing():
        weights.set("a.w", torch.zeros(2, 3))
        weights.replace({"a.w": torch.full((2, 3), 7.0)})
        weights.set("a.w", torch.zeros(2, 3))
        weights.restore()
    assert (weights.tensors["a.w"] == 7).all()


def test_names_and_shapes_are_checked(weights):
    weights.check({"a.w": (2, 3)})
    with pytest.raises(InputError, match=r"c\.w"):
        weights.check({"a.w": (2, 3), "c.w": (1,)})
    with pytest.raises(InputError, match="another shape"):
        weights.check({"a.w": (3, 2)})


def test_a_change_waits_for_calls_and_calls_wait_for_it(weights):
    order = []
    reading, finish = threading.Event(), threading.Event()

    def call():
        with weights.reading():
            reading.set()
            finish.wait(10)
            order.append("first call ended")

    def change():
        with weights.changing():
            order.append("changed")

    def later_call():
        with weights.reading():
            order.append("later call")

    threads = [threading.Thread(target=call)]
    threads[0].start()
    reading.wait(10)
    threads.append(threading.Thread(target=change))
    threads[1].start()
    while not weights._waiting:
        time.sleep(0.001)
    threads.append(threading.Thread(target=later_call))  # must not overtake the change that waits
    threads[2].start()
    time.sleep(0.05)
    assert order == []
    finish.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first call ended", "changed", "later call"]


def test_calls_run_side_by_side(weights):
    barrier = threading.Barrier(2, timeout=10)

    def call():
        with weights.reading():
            barrier.wait()  # passes only if both are inside

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not barrier.broken


def test_a_change_from_inside_a_call_is_refused(weights):
    with weights.reading(), pytest.raises(InputError, match="during a call"), weights.changing():
        pass
    with weights.changing():  # and nothing is left locked
        pass
