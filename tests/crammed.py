"""Checkpoints in the layout of UltraFastBERT's, and the arithmetic of its code restated in float64, FFN by the oracle."""

import json

import numpy as np
import oracle
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def arch(layers=3, size=32, heads=4, trees=1, depth=4, vocab=120, length=16, labels=None, pooler="avg", inside=24):
    return {
        "architectures": ["ScriptableCrammedBERT"],
        "num_transformer_layers": layers,
        "hidden_size": size,
        "intermed_type": "fff",
        "intermed_size": trees,
        "intermed_depth": depth,
        "hidden_dropout_prob": 0.1,
        "norm": "LayerNorm",
        "norm_eps": 1e-12,
        "norm_scheme": "pre",
        "nonlin": "GELU",
        "use_bias": False,
        "decoder_bias": False,
        "final_norm": True,
        "skip_head_transform": True,
        "attention": {
            "type": "self-attention",
            "causal_attention": False,
            "num_attention_heads": heads,
            "dropout_prob": 0.1,
            "qkv_bias": False,
            "skip_output_projection": False,
            "rotary_embedding": False,
            "sequence_op": "torch-softmax",
        },
        "embedding": {
            "vocab_size": vocab,
            "pos_embedding": "scaled-sinusoidal",
            "max_seq_length": length,
            "embedding_dim": size,
            "pad_token_id": 0,
            "normalization": True,
        },
        "classification_head": {
            "pooler": pooler,
            "include_ff_layer": True,
            "head_dim": inside,
            "nonlin": "Tanh",
            "classifier_dropout": 0.1,
        },
        "num_labels": labels,
    }


def state_dict(arch, seed=0, tied=False, dtype=torch.float32):
    """Random weights, large enough that attention and trees decide something."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std=None):
        return (torch.randn(*shape, generator=g) * (std or 1.5 * shape[-1] ** -0.5)).to(dtype)

    def norm(name):
        return {f"{name}.weight": 1 + normal(size, std=0.1), f"{name}.bias": normal(size, std=0.1)}

    size, heads = arch["hidden_size"], arch["attention"]["num_attention_heads"]
    vocab, nodes = arch["embedding"]["vocab_size"], arch["intermed_size"] * (2 ** (arch["intermed_depth"] + 1) - 1)
    state = {
        "encoder.embedding.word_embedding.weight": normal(vocab, size, std=0.5),
        "encoder.embedding.pos_embedding.scale_factor": torch.full((1,), 0.3, dtype=dtype),
        **norm("encoder.embedding.norm"),
    }
    for i in range(arch["num_transformer_layers"]):
        layer = f"encoder.layers.{i}."
        state |= norm(f"{layer}norm1") | norm(f"{layer}norm2")
        state[f"{layer}attn.self_attention.query_key_value.weight"] = normal(3 * size, size)
        state[f"{layer}attn.self_attention.norm_factor"] = torch.tensor((size // heads) ** -0.5)
        state[f"{layer}attn.dense.weight"] = normal(size, size)
        state[f"{layer}ffn.linear_in.weight"] = normal(nodes, size)
        state[f"{layer}ffn.linear_in.bias"] = normal(nodes, std=0.3)
        state[f"{layer}ffn.linear_out.weight"] = normal(size, nodes, std=0.3)
    state |= norm("encoder.final_norm")
    if arch["num_labels"] is None:
        words = state["encoder.embedding.word_embedding.weight"]
        state["decoder.weight"] = words.clone() if tied else normal(vocab, size)
    else:
        inside = arch["classification_head"]["head_dim"]
        state |= {"pooler.dense.weight": normal(inside, size), "pooler.dense.bias": normal(inside, std=0.1)}
        state |= {"head.weight": normal(arch["num_labels"], inside), "head.bias": normal(arch["num_labels"], std=0.1)}
    return state


def write(folder, arch, state, file="pytorch_model.bin", config=None, tokenizer=True):
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "crammedBERT", "arch": arch} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file(state, folder / file, metadata={"format": "pt"})
    else:
        torch.save(state, folder / file)
    if tokenizer:
        small_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def small_tokenizer(pad=0):
    """Words, and special tokens in another order than BERT's."""
    special = ["<unk>", "<sep>", "<mask>", "<cls>"]
    special.insert(pad, "<pad>")
    vocabulary = {word: i for i, word in enumerate([*special, *(f"word{i}" for i in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, vocabulary[token]) for token in ("<cls>", "<sep>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<cls> $A <sep>", special_tokens=ends)
    return tokenizer


# --- the arithmetic -------------------------------------------------------------------------------------------------


def _norm(x, state, name, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def _positions(length, size):
    """Made in float32, as there."""
    rate = torch.exp(torch.arange(0, size, 2, dtype=torch.float32) * (-np.log(10000.0) / size))
    table = torch.zeros(length, size)
    for position in range(length):
        table[position, 0::2] = torch.sin(position * rate)
        table[position, 1::2] = torch.cos(position * rate)
    return table.double().numpy()


def _attention(x, mask, state, name, heads):
    rows, tokens, size = x.shape
    width = size // heads
    qkv = (x @ state[f"{name}.self_attention.query_key_value.weight"].T).reshape(rows, tokens, heads, 3 * width)
    y = np.zeros_like(x)
    for row in range(rows):
        for head in range(heads):
            q, k, v = (qkv[row, :, head, i * width : (i + 1) * width] for i in range(3))
            scores = q @ k.T * state[f"{name}.self_attention.norm_factor"] + (1.0 - mask[row])[None, :] * -10000.0
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y[row, :, head * width : (head + 1) * width] = weights @ v
    return y @ state[f"{name}.dense.weight"].T


def reference(arch, state, ids, mask):
    """Hidden states after the final norm, ``[rows, tokens, size]``, and the logits of whichever head there is."""
    tensors, eps = state, arch["norm_eps"]
    state = {name: tensor.double().numpy() for name, tensor in state.items()}
    ids, mask = ids.numpy(), mask.numpy().astype(np.float64)
    x = state["encoder.embedding.word_embedding.weight"][ids]
    x = x + state["encoder.embedding.pos_embedding.scale_factor"] * _positions(*x.shape[1:])
    x = _norm(x, state, "encoder.embedding.norm", eps)
    for i in range(arch["num_transformer_layers"]):
        layer = f"encoder.layers.{i}"
        h = _norm(x, state, f"{layer}.norm1", eps)
        x = x + _attention(h, mask, state, f"{layer}.attn", arch["attention"]["num_attention_heads"])
        h = torch.from_numpy(_norm(x, state, f"{layer}.norm2", eps)).flatten(0, 1)
        weights = [tensors[f"{layer}.ffn.{n}"] for n in ("linear_in.weight", "linear_in.bias", "linear_out.weight")]
        y, _, _ = oracle.fff(h, weights[0], weights[1], weights[2].T, arch["intermed_size"])
        x = x + y.reshape(x.shape)
    x = _norm(x, state, "encoder.final_norm", eps)
    if "decoder.weight" in state:
        return x, x @ state["decoder.weight"].T
    pooled = x.mean(1) if arch["classification_head"]["pooler"] == "avg" else x[:, 0]
    inside = np.tanh(pooled @ state["pooler.dense.weight"].T + state["pooler.dense.bias"])
    return x, inside @ state["head.weight"].T + state["head.bias"]
