"""Calibration of trained models of several families, against the best linear map that costs a token as much."""

import pytest
import torch
from tiny import tiny_model

from hf_fff import Calibration, FFFConfig, convert_ffn_to_fff
from hf_fff.models import FAMILIES
from hf_fff.modes import evaluating
from hf_fff.surgery.calibration import _dense_layer, _Layers, _pieces
from hf_fff.surgery.text import as_batches

HELD_OUT = 0.3
FIELDS = {"distilbert": {"dim": 64, "n_layers": 2, "hidden_dim": 256}, "albert": {"embedding_size": 64}}
RATES = {"albert": 1e-3}


def walks(rows, seed, tokens=16):
    """A language in which each word has three that may follow."""
    follow = torch.randint(5, 120, (120, 3), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (rows, tokens), generator=generator)
    choice = torch.randint(0, 3, (rows, tokens), generator=generator)
    for t in range(1, tokens):
        ids[:, t] = follow[ids[:, t - 1], choice[:, t]]
    return ids


def trained(family, steps=500):
    """A small model that has learnt some of that language."""
    small = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.05}
    model = tiny_model(family, "ForMaskedLM", **{**small, **FIELDS.get(family, {})}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES.get(family, 2e-3))
    for step in range(steps):
        ids = walks(32, step + 1)
        masked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.25
        loss = model(input_ids=torch.where(masked, 4, ids), labels=torch.where(masked, ids, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 4.2  # ln(115) is 4.7
    return model.eval()


def linear_map(model, row, layer, data, rank):
    """What the best linear map of a rank leaves unexplained of what a layer's FFN gives, measured as calibration does. Its two
    factors cost a token what the input and output rows of as many neurons do."""
    layers = _Layers(model.base_model, row)
    with evaluating(model):
        batches = as_batches(data, lambda: None, max_length=128, batch_tokens=4096)
        pieces, _ = _pieces(model.base_model, batches, Calibration(data, steps=1), float("inf"))
        for before in range(layer):
            for piece in pieces:
                piece.dense = piece.fast = layers.run(piece, before, piece.dense)
        sharing = [i for i, block in enumerate(layers.blocks) if block is layers.blocks[layer]]
        seen = _dense_layer(layers, layers, sharing, 0, pieces)
    weight = seen.weight.unsqueeze(1)
    x, y = torch.cat([seen.x.float(), torch.ones(len(seen.x), 1)], 1) * weight, seen.y.float() * weight
    count = int(len(x) * (1 - HELD_OUT))
    best = x[:count] @ torch.linalg.lstsq(x[:count], y[:count]).solution
    directions = torch.linalg.svd(best, full_matrices=False)[2][:rank].T
    given = x[count:] @ torch.linalg.lstsq(x[:count], y[:count]).solution @ directions @ directions.T
    mean = seen.y[count:].float().mean(0)
    return float((given - y[count:]).square().sum() / ((seen.y[count:].float() - mean) * weight[count:]).square().sum())


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "albert"])
def test_better_than_a_linear_map_of_the_same_cost(family):
    model, data = trained(family), walks(1500, 10**6)
    plan = Calibration(data, steps=600, batch_tokens=512, learning_rate=5e-3, held_out=HELD_OUT, progress=False)
    tree, rank = "4x5", FFFConfig.from_shorthand("4x5").active_nodes
    row = FAMILIES[family]
    for layer in (
        [0] if row.shared else [0, 1]
    ):  # each by itself: after others it would also be measured by what they missed
        fast = convert_ffn_to_fff(model, tree if row.shared else {layer: tree}, calibration=plan)
        line = linear_map(model, row, layer, data, rank)
        assert 0 < fast.calibration_report.unexplained[layer] < 0.8 * line, (layer, fast.calibration_report, line)
