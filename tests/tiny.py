"""Tiny random models, and what to feed them."""

import torch
from transformers import BertConfig, BertModel
from transformers.models.bert import modeling_bert as bert

HEADS = {
    name: getattr(bert, f"Bert{name}")
    for name in (
        "Model",
        "ForPreTraining",
        "ForMaskedLM",
        "ForNextSentencePrediction",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
        "ForMultipleChoice",
    )
}


def tiny_config(**fields):
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 120,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return BertConfig(**{**small, **fields})


def tiny_bert(head=BertModel, seed=0, attn_implementation="sdpa", **fields):
    torch.manual_seed(seed)
    options = {"add_pooling_layer": fields.pop("add_pooling_layer")} if "add_pooling_layer" in fields else {}
    config = tiny_config(**fields)
    config._attn_implementation = attn_implementation
    model = head(config, **options).eval()
    with torch.no_grad():  # as after training: neither zero nor one
        for name, p in model.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def tiny_inputs(model, rows=3, tokens=9, seed=0):
    """Ids with padding and two segments; with as many choices as rows for multiple choice."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (rows, tokens), generator=g)
    mask = torch.ones_like(ids)
    mask[-1, tokens - 3 :] = 0
    segments = torch.zeros_like(ids)
    segments[:, tokens // 2 :] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
    if "MultipleChoice" in type(model).__name__:
        batch = {k: torch.stack([v, v.flip(0)]) for k, v in batch.items()}
    return batch


def outputs(model, batch, **options):
    """All output tensors, by name."""
    with torch.no_grad():
        out = model(**batch, **options)
    flat = {}
    for name, value in out.items():
        flat |= {name: value} if torch.is_tensor(value) else {f"{name}.{i}": v for i, v in enumerate(value)}
    return flat


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
