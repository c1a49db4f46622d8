"""A card whose driver spills to the host is noticed by its steps, and told of once."""

import pytest
import torch

from sd3pipe.training.spilling import SpillWatch, device_is_full


@pytest.mark.parametrize(
    "seconds, full, told",
    [
        ([1.0] * 12 + [4.0] * 20, True, 1),
        ([1.0] * 12 + [4.0] * 20, False, 0),  # something else slows it down
        ([1.0] * 12 + [4.0, 4.0, 1.0] * 5, True, 0),  # samples, or another size that is compiled
        ([1.0] * 12 + [2.0] * 20, True, 0),
        ([4.0] * 20, True, 0),
    ],
)
def test_steps_that_become_several_times_slower_on_a_full_card_are_told_of(seconds, full, told, caplog):
    watch = SpillWatch(lambda: full)
    for value in seconds:
        watch.see(value)
    assert len(caplog.records) == told
    assert all("its driver moves memory to the host" in record.message for record in caplog.records)


def test_the_cpu_is_never_full():
    assert not device_is_full(torch.device("cpu"))
