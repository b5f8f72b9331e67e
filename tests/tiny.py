"""Tiny random models, and what to feed them."""

import torch
from transformers import CONFIG_MAPPING, BertConfig, BertModel
from transformers.models.bert import modeling_bert as bert

from hf_fff.models.classes import model_classes

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


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def tiny_config(**fields):
    return BertConfig(**{**SMALL, **fields})


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


# What tiny models of other families need beside BERT's fields
FIELDS = {
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "squeezebert": dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2),
    "convbert": {"num_groups": 2},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32, "embedding_size": 16, "initializer_range": 0.1},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "esm": {"position_embedding_type": "rotary"},
    "eurobert": {"num_key_value_heads": 2},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3},
}


def tiny_model(model_type, head="Model", seed=0, attn_implementation=None, **fields):
    """A tiny random model of any family; ``head`` is the end of the class's name, such as "ForMaskedLM"."""
    token_ids = dict.fromkeys(("bos_token_id", "cls_token_id"), 2) | dict.fromkeys(("eos_token_id", "sep_token_id"), 3)
    small = {**SMALL, **token_ids, "pad_token_id": 1, "embedding_size": 32}
    dropout = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    options = {**small, **dict.fromkeys(dropout, 0.0), **FIELDS.get(model_type, {}), **fields}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**options)
    if attn_implementation:
        config._attn_implementation = attn_implementation
    model = next(c for c in model_classes(model_type) if c.__name__.endswith(head))(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") or "norm" in name.lower():
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
