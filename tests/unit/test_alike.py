"""calibrate/alike.py: items in batches of one kind, as many as memory allows, and their results in order."""

import pytest
import torch

from lowbit.calibrate.alike import in_batches, most_at_once, room_on, stacked


def test_batches_are_of_one_kind_and_results_in_order():
    batches: list[list[int]] = []

    def work(some: list[int]) -> list[str]:
        batches.append(some)
        return [f"<{one}>" for one in some]

    found = in_batches(list(range(9)), lambda one: one % 2, lambda one: 2 + one, work)
    assert found == [f"<{one}>" for one in range(9)]
    assert batches == [[0, 2], [4, 6], [8], [1, 3, 5], [7]]
    assert in_batches([], id, id, work) == []


def test_a_result_missing_is_a_failure():
    with pytest.raises(ValueError, match="zip"):
        in_batches([1, 2], lambda one: 0, lambda one: 2, lambda some: some[:1])


def test_a_large_weight_is_a_batch_of_one():
    assert most_at_once(torch.empty(8, 8)) > 1000
    assert most_at_once(torch.empty(768, 2048)) == 1
    assert most_at_once(torch.empty(256, 256), linears=2) < most_at_once(torch.empty(256, 256))


@pytest.mark.parametrize(("free", "reserved", "allocated", "room"), [(60, 2, 2, 4), (3, 6, 1, 4), (1, 2, 1, 1)])
def test_on_a_gpu_a_batch_takes_half_of_what_is_free_at_most(monkeypatch, free, reserved, allocated, room):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 141 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated << 30)
    assert room_on(torch.device("cuda")) == room << 30


def test_one_tensor_is_stacked_without_a_copy():
    one = torch.randn(3, 4)
    assert stacked([one]).data_ptr() == one.data_ptr()
    assert stacked([one, one]).shape == (2, 3, 4)
