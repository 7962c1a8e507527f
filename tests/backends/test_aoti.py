"""What an AOTInductor engine borrows it gives back: torch itself never does."""

import torch

from jitexport.backends import aoti


def test_borrowed_weights_share_memory_and_give_it_back():
    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t()
    borrowed = aoti._borrow(weight)
    assert borrowed is not weight and borrowed.data_ptr() == weight.data_ptr()
    assert borrowed.stride() == weight.stride() and borrowed.dtype == weight.dtype
    weight.mul_(2)
    assert torch.equal(borrowed, weight), "a change in place shows, as LoRA needs"
    aoti._let_go([borrowed])
    assert borrowed.untyped_storage().nbytes() == 0
    assert weight.sum() == 30


def test_spent_tensor_objects_are_used_again():
    first = aoti._borrow(torch.ones(4))
    aoti._let_go([first])
    with torch.inference_mode():
        second = aoti._borrow(torch.zeros(2, 2, dtype=torch.int64))
    assert second is first and second.shape == (2, 2) and second.dtype == torch.int64
    aoti._let_go([second])
