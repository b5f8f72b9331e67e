"""Which neurons are used, against the definition, walked one token at a time."""

import math
from collections import Counter

import oracle
import pytest
import torch
from tiny import HEADS, tiny_bert, tiny_inputs

import hf_fff
from hf_fff import convert_ffn_to_fff, fff_usage

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")


def walked(model, batches):
    """Nodes that the visible tokens pass, for each layer with trees, tree by tree."""
    paths = {}
    for i, block in enumerate(model.base_model.encoder.layer):
        ffn = getattr(block.intermediate, "trees", block.intermediate)
        if not isinstance(ffn, hf_fff.FFF):
            continue
        seen = []
        hook = ffn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
        hook.remove()
        x = torch.cat([h[b["attention_mask"].bool()] for h, b in zip(seen, batches, strict=True)])
        paths[i] = oracle.fff(x, ffn.weight_in, ffn.bias_in, ffn.weight_out, ffn.n_trees)[1]
    return paths


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification"])
def test_usage(head):
    layers = {0: "3x2", 2: "1x4+mlp:4"} if head == "Model" else {0: "2x3", 1: "mlp:8", 2: "2x0"}
    model = convert_ffn_to_fff(tiny_bert(HEADS[head]), layers).eval()
    batches = [tiny_inputs(model, rows=5, tokens=9, seed=seed) for seed in range(3)]
    told = fff_usage(model, [b | {"labels": torch.zeros(5, dtype=torch.long)} for b in batches])
    want = walked(model, batches)
    assert list(told) == list(want) == [0, 2]
    for i, path in want.items():
        tokens, trees, levels = path.shape
        assert tokens == 3 * (5 * 9 - 3)
        visited = sum(len({*path[:, k].flatten()}) for k in range(trees))
        entropies = [
            -sum(n / tokens * math.log2(n / tokens) for n in Counter(path[:, k, -1].tolist()).values())
            for k in range(trees)
        ]
        assert told[i]["depth"] == levels - 1
        assert told[i]["dead"] == pytest.approx(1 - visited / (trees * (2**levels - 1)))
        assert told[i]["entropy"] == pytest.approx(sum(entropies) / trees)
        assert 0 <= told[i]["entropy"] <= told[i]["depth"]


def test_all_tokens_end_in_one_leaf():
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    with torch.no_grad():
        model.encoder.layer[1].intermediate.bias_in.fill_(-1e6)
    told = fff_usage(model, [tiny_inputs(model)])
    assert told[1] == {"dead": pytest.approx(11 / 15), "entropy": 0.0, "depth": 3}


def test_what_runs_in_pieces_counts_the_same():
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    whole = fff_usage(model, [tiny_inputs(model)])
    for block in model.encoder.layer:
        block.chunk_size_feed_forward = 3
    assert fff_usage(model, [tiny_inputs(model)]) == whole


def test_without_a_mask_all_tokens_count():
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    batch = tiny_inputs(model)
    ones = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
    del batch["attention_mask"]
    assert fff_usage(model, [batch]) == fff_usage(model, [ones])


def test_the_model_is_left_as_it_was():
    model = convert_ffn_to_fff(tiny_bert(), "2x3").train()
    model.pooler.eval()
    told = [fff_usage(model, [tiny_inputs(model)]) for _ in range(2)]
    assert told[0] == told[1] and model.training and not model.pooler.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_without_trees():
    dense = tiny_bert()
    assert fff_usage(dense, [tiny_inputs(dense)]) == {}
    assert fff_usage(convert_ffn_to_fff(dense, "mlp:8"), [tiny_inputs(dense)]) == {}


def test_nothing_to_count():
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    batch = tiny_inputs(model)
    for batches in ([], [batch | {"attention_mask": torch.zeros_like(batch["input_ids"])}]):
        with pytest.raises(ValueError, match="no visible token"):
            fff_usage(model, batches)


@pytest.mark.gpu
def test_on_a_gpu():
    model = convert_ffn_to_fff(tiny_bert(), "2x3")
    want = fff_usage(model, [tiny_inputs(model)])
    assert fff_usage(model.cuda(), [tiny_inputs(model)]).keys() == want.keys()
