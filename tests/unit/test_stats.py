"""quant/stats.py and quant/site.py: sums that merge, and scales that follow a fold."""

import pytest
import torch

from lowbit.quant.site import Fold
from lowbit.quant.stats import Stats, stats_of


def test_statistics_by_hand():
    x = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    stats = stats_of(x, with_gram=True)
    assert stats.tokens == stats.gram_tokens == 2
    assert stats.abs_mean.tolist() == [2.0, 1.25]
    assert stats.abs_max.tolist() == [3.0, 2.0]
    assert stats.gram.tolist() == [[10.0, -0.5], [-0.5, 4.25]]
    assert stats.second_moment().tolist() == [[5.0, -0.25], [-0.25, 2.125]]


def test_the_outlier_ratio_is_the_largest_channel_over_the_median():
    stats = stats_of(torch.tensor([[1.0, -2.0, 8.0], [3.0, 0.5, -4.0]]), with_gram=False)
    assert stats.outlier_ratio() == 8 / 3
    smooth = stats.scaled(torch.tensor([1.0, 1.0, 4.0]))
    assert smooth.outlier_ratio() == 3 / 2
    assert stats_of(torch.empty(0, 4), with_gram=False).outlier_ratio() == 0


def test_shards_merge_to_the_whole():
    x = torch.randn(7, 5, 8)
    whole = stats_of(x, with_gram=True)
    merged = stats_of(x[:2], True) + stats_of(x[2:3], True) + stats_of(x[3:], True)
    assert merged.tokens == whole.tokens == 35
    assert merged.gram_tokens == 35
    torch.testing.assert_close(merged.abs_sum, whole.abs_sum)
    torch.testing.assert_close(merged.gram, whole.gram)
    assert torch.equal(merged.abs_max, whole.abs_max)


def test_a_shard_without_a_gram_matrix_leaves_it_as_it_was():
    with_gram, without = stats_of(torch.randn(4, 3), True), stats_of(torch.randn(6, 3), False)
    for merged in (with_gram + without, without + with_gram):
        assert (merged.tokens, merged.gram_tokens) == (10, 4)
        assert torch.equal(merged.gram, with_gram.gram)
    assert (without + without).gram is None


def test_no_tokens():
    stats = stats_of(torch.empty(0, 4), with_gram=True)
    assert stats.tokens == 0
    assert stats.abs_mean.tolist() == [0.0] * 4
    assert stats.second_moment().tolist() == [[0.0] * 4] * 4
    assert (stats + stats_of(torch.ones(1, 4), True)).abs_mean.tolist() == [1.0] * 4


def test_a_long_sum_of_bfloat16_does_not_stall():
    """256 + 1 is 256 in bfloat16: sums are kept wider than what is summed."""
    stats = Stats(0, torch.zeros(1, dtype=torch.float64), torch.zeros(1))
    for _ in range(40):
        stats = stats + stats_of(torch.ones(100, 1, dtype=torch.bfloat16), with_gram=False)
    assert stats.abs_mean.tolist() == [1.0]
    assert stats.tokens == 4000


def test_scaled_is_the_statistics_of_scaled_activations():
    x, scales = torch.randn(9, 6), torch.rand(6) + 0.5
    got, wanted = stats_of(x, True).scaled(scales), stats_of(x / scales, True)
    torch.testing.assert_close(got.abs_mean, wanted.abs_mean)
    torch.testing.assert_close(got.abs_max, wanted.abs_max)
    torch.testing.assert_close(got.gram, wanted.gram)


GROUPED = Fold(
    "v_proj", 0.0, True, 6, {"o_proj": torch.tensor([2, 3, 2, 3, 4, 5, 4, 5])}
)  # two heads of two channels share each key-value head; channels 0 and 1 feed nothing


def test_column_scales_follow_the_channel_that_feeds_them():
    scales = torch.arange(1.0, 7.0)
    assert GROUPED.column_scales(scales, "o_proj").tolist() == [3, 4, 3, 4, 5, 6, 5, 6]


@pytest.mark.parametrize(("reduce", "wanted"), [("mean", [1, 1, 2, 3, 6, 7]), ("amax", [1, 1, 3, 4, 7, 8])])
def test_columns_that_share_a_channel_are_reduced(reduce, wanted):
    values = {"o_proj": torch.arange(1.0, 9.0)}
    assert GROUPED.per_channel(values, reduce).tolist() == wanted


def test_several_consumers_are_reduced_together():
    fold = Fold("norm", 0.0, False, 2, {"q": torch.tensor([0, 1]), "k": torch.tensor([0, 1])})
    assert fold.per_channel({"q": torch.tensor([1.0, 5.0]), "k": torch.tensor([3.0, 7.0])}, "mean").tolist() == [2, 6]
    assert fold.describe() == "norm -> q, k"
