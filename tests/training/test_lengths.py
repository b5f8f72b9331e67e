"""Batches of few lengths."""

import pytest
import torch

from hf_fff.training.lengths import FewLengths, pad_to_multiple


def batch(tokens, rows=2):
    ids = torch.arange(5, 5 + rows * tokens).view(rows, tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(rows, dtype=torch.long)}


@pytest.mark.parametrize(("tokens", "wanted"), [(1, 16), (15, 16), (16, 16), (17, 32), (39, 40), (40, 40)])
def test_padding(tokens, wanted):
    """To a multiple of 16, or to the 40 tokens that the model takes."""
    given = batch(tokens)
    padded = pad_to_multiple(given, 16, {"input_ids": 7}, most=40)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (2, wanted)
    assert torch.equal(padded["input_ids"][:, :tokens], given["input_ids"])
    assert (padded["input_ids"][:, tokens:] == 7).all() and (padded["attention_mask"][:, tokens:] == 0).all()
    assert padded["labels"] is given["labels"]
    alone = {"input_ids": given["input_ids"]}
    assert pad_to_multiple(alone, 16, {})["input_ids"] is alone["input_ids"]  # nothing would tell the padding


def test_few_lengths():
    """At most eight, whatever comes; the longest as it is."""
    pad = FewLengths({"input_ids": 7}, longest=300, most=300)
    lengths = [pad(batch(tokens))["input_ids"].shape[1] for tokens in range(1, 301)]
    assert all(tokens <= length for tokens, length in enumerate(lengths, 1))
    assert sorted(set(lengths)) == [48, 96, 144, 192, 240, 288, 300]
