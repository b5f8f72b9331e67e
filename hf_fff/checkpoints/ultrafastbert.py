"""The checkpoints of UltraFastBERT (arXiv 2311.10770) become FastCrammedBert models."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import FFFConfig
from ..files import atomic_folder
from ..models.fastcrammedbert.configuration_fastcrammedbert import FastCrammedBertConfig
from ..remote import save_remote_code
from ..surgery.folder import ModelFolder, check_places
from .tensors import DTYPES, Entry, listed, read_tensors, write_safetensors

# Fields of "arch" and the one value of each that FastCrammedBert computes. The first must be there.
_REQUIRED = {
    "intermed_type": "fff",
    "nonlin": "GELU",
    "use_bias": False,
    "decoder_bias": False,
    "final_norm": True,
    "skip_head_transform": True,
    "attention.qkv_bias": False,
    "embedding.pos_embedding": "scaled-sinusoidal",
    "embedding.normalization": True,
}
_IF_PRESENT = {
    "norm": "LayerNorm",
    "norm_scheme": "pre",
    "ffn_layer_frequency": 1,
    "attention.type": "self-attention",
    "attention.causal_attention": False,
    "attention.rotary_embedding": False,
    "attention.skip_output_projection": False,
    "attention.sequence_op": "torch-softmax",
}
_CLASSIFIER = {"classification_head.include_ff_layer": True, "classification_head.nonlin": "Tanh"}
_POOLERS = ("avg", "zero_index")
_TOKENS = {"pad_token": "<pad>", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>"}
_OPTIONAL_TOKENS = {"unk_token": "<unk>"}


def import_ultrafastbert(
    source: ModelFolder, output: Path, *, remote_code: bool = False, overwrite: bool = False
) -> Any:
    """Converts a checkpoint in the format of UltraFastBERT, of any number of trees, depth and layers, with the head for masked words
    or a classifier. The output appears whole or not at all, with one tensor in memory at a time.

    Args:
        remote_code: also write what opens the output where hf_fff is not installed (``hf_fff.remote``).

    Returns:
        The model without its weights (on the meta device): what its config and parameters are.

    Raises:
        ValueError: fields of the config that are missing or not supported; weights that are missing, superfluous, of other shapes
            or dtypes, not finite; a damaged file, or one that wants to run code; a tokenizer that does not fit.
        FileExistsError: the output exists and is not empty, and ``overwrite`` is not set.
    """
    check_places(source, output)
    path = source.root / "config.json"
    given = _read_json(path)
    fields = _arch(path, given)
    tensors = read_tensors(source.root)
    kind = _kind(source.root, tensors)
    config = _config(path, given, fields, kind)
    plan = _plan(config, kind)
    _check(source.root, config, tensors, plan)
    if kind == "ForMaskedLM":
        words = tensors["encoder.embedding.word_embedding.weight"]
        config.tie_word_embeddings = torch.equal(words, tensors["decoder.weight"])
    tokenizer = _tokenizer(source.root, config)
    config.dtype = dtype = tensors["encoder.final_norm.weight"].dtype
    model = _skeleton(config, kind)
    config.architectures = [type(model).__name__]

    def entries() -> Iterator[Entry]:
        shared = {"decoder.weight"} if config.tie_word_embeddings else set()
        for name, parameter in model.state_dict().items():
            if name not in shared:
                yield Entry(name, parameter.shape, dtype, plan[name].of(tensors))

    with atomic_folder(output, overwrite=overwrite) as folder:
        config.save_pretrained(folder)
        write_safetensors(folder / "model.safetensors", entries())
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if remote_code:
            save_remote_code(model, folder)
    return model


@dataclass(frozen=True)
class _Part:
    """Where a parameter comes from: a tensor of the source, its shape there, and what is done to it."""

    source: str
    shape: tuple[int, ...]
    change: Callable[[Tensor], Tensor] = lambda t: t

    def of(self, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
        return lambda: self.change(tensors[self.source])


def _rows_of_heads(heads: int, which: int) -> Callable[[Tensor], Tensor]:
    """Queries, keys or values (0, 1, 2) out of a matrix that holds, head after head, the rows of all three."""
    return lambda t: t.unflatten(0, (heads, 3, -1))[:, which].flatten(0, 1)


def _plan(config: FastCrammedBertConfig, kind: str) -> dict[str, _Part]:
    """Our parameters' names -> where they come from."""
    size, inside = config.hidden_size, config.classifier_hidden_size
    plan = {
        "embeddings.word_embeddings.weight": _Part("embedding.word_embedding.weight", (config.vocab_size, size)),
        "embeddings.position_scale": _Part("embedding.pos_embedding.scale_factor", (1,)),
    }
    norms = {"embeddings.norm": "embedding.norm", "final_norm": "final_norm"}
    for i, fff in config.fff_layers.items():
        ours, theirs = f"layers.{i}.", f"layers.{i}."
        norms |= {f"{ours}attention_norm": f"{theirs}norm1", f"{ours}ffn_norm": f"{theirs}norm2"}
        for n, name in enumerate(("query", "key", "value")):
            plan[f"{ours}attention.{name}.weight"] = _Part(
                f"{theirs}attn.self_attention.query_key_value.weight",
                (3 * size, size),
                _rows_of_heads(config.num_attention_heads, n),
            )
        plan |= {
            f"{ours}attention.output.weight": _Part(f"{theirs}attn.dense.weight", (size, size)),
            f"{ours}ffn.weight_in": _Part(f"{theirs}ffn.linear_in.weight", (fff.nodes, size)),
            f"{ours}ffn.bias_in": _Part(f"{theirs}ffn.linear_in.bias", (fff.nodes,)),
            f"{ours}ffn.weight_out": _Part(f"{theirs}ffn.linear_out.weight", (size, fff.nodes), lambda t: t.T),
        }
    for name, source in norms.items():
        plan |= {f"{name}.{part}": _Part(f"{source}.{part}", (size,)) for part in ("weight", "bias")}
    labels: Any = config.num_labels
    plan = {f"encoder.{name}": _Part(f"encoder.{p.source}", p.shape, p.change) for name, p in plan.items()}
    if kind == "ForMaskedLM":
        return plan | {"decoder.weight": _Part("decoder.weight", (config.vocab_size, size))}
    return plan | {
        "pooler.dense.weight": _Part("pooler.dense.weight", (inside, size)),
        "pooler.dense.bias": _Part("pooler.dense.bias", (inside,)),
        "classifier.weight": _Part("head.weight", (labels, inside)),
        "classifier.bias": _Part("head.bias", (labels,)),
    }


def _skeleton(config: FastCrammedBertConfig, kind: str) -> Any:
    from ..models.fastcrammedbert import modeling_fastcrammedbert as modeling

    with torch.device("meta"):
        return getattr(modeling, f"FastCrammedBert{kind}")(config)


# --- checks ---------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds no JSON object")
    return given


def _kind(root: Path, tensors: dict[str, Tensor]) -> str:
    found = [
        kind
        for kind, key in (("ForMaskedLM", "decoder.weight"), ("ForSequenceClassification", "head.weight"))
        if key in tensors
    ]
    if len(found) != 1:
        have = "both decoder.weight and head.weight" if found else "neither decoder.weight nor head.weight"
        raise ValueError(f"{root} has {have}: it must be a model of masked words or a classifier")
    return found[0]


def _arch(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of "arch", those of objects in it as "object.field"."""
    if "fff" in given:
        raise ValueError(f"{path} is of a model that is already converted (model_type={given.get('model_type')!r})")
    if given.get("model_type") != "crammedBERT" or not isinstance(given.get("arch"), dict):
        raise ValueError(
            f'{path} is not of UltraFastBERT: it must have model_type="crammedBERT" (found {given.get("model_type")!r}) '
            'and an object "arch"'
        )
    return _flat(given["arch"])


def _config(path: Path, given: dict[str, Any], fields: dict[str, Any], kind: str) -> FastCrammedBertConfig:
    required = _REQUIRED | (_CLASSIFIER if kind == "ForSequenceClassification" else {})
    for name, wanted in {**required, **_IF_PRESENT}.items():
        if name not in fields and name in _IF_PRESENT:
            continue
        value = _field(path, fields, name)
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise ValueError(f"{path}: arch.{name}={value!r} is not supported (allowed: {wanted!r})")

    def count(name: str, low: int = 1) -> int:
        value = _field(path, fields, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{path}: arch.{name}={value!r} must be an integer of at least {low}")
        return value

    def number(name: str, default: float | None = None) -> float:
        value = fields.get(name, default) if default is not None else _field(path, fields, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise ValueError(f"{path}: arch.{name}={value!r} must be a number from 0 to below 1")
        return float(value)

    size, vocabulary = count("hidden_size"), count("embedding.vocab_size")
    if (width := fields.get("embedding.embedding_dim", size)) != size:
        raise ValueError(
            f"{path}: arch.embedding.embedding_dim={width!r} is not supported (allowed: hidden_size={size})"
        )
    if (pad := count("embedding.pad_token_id", 0)) >= vocabulary:
        raise ValueError(f"{path}: arch.embedding.pad_token_id={pad} must be below embedding.vocab_size={vocabulary}")
    hidden_dropout = number("hidden_dropout_prob", 0.1)
    head: dict[str, Any] = {}
    if kind == "ForSequenceClassification":
        pooler = _field(path, fields, "classification_head.pooler")
        if pooler not in _POOLERS:
            raise ValueError(
                f"{path}: arch.classification_head.pooler={pooler!r} is not supported (allowed: {', '.join(_POOLERS)})"
            )
        head = {
            "classifier_pooling": pooler,
            "classifier_hidden_size": count("classification_head.head_dim"),
            "classifier_dropout": number("classification_head.classifier_dropout", hidden_dropout),
            "num_labels": count("num_labels"),
        }
        head |= {name: given[name] for name in ("id2label", "label2id", "problem_type") if given.get(name)}
    try:
        return FastCrammedBertConfig(
            vocab_size=vocabulary,
            hidden_size=size,
            num_hidden_layers=count("num_transformer_layers"),
            num_attention_heads=count("attention.num_attention_heads"),
            fff=FFFConfig(n_trees=count("intermed_size"), depth=count("intermed_depth", 0)),
            hidden_dropout_prob=hidden_dropout,
            attention_probs_dropout_prob=number("attention.dropout_prob", hidden_dropout),
            layer_norm_eps=number("norm_eps"),
            max_position_embeddings=count("embedding.max_seq_length"),
            pad_token_id=pad,
            **head,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return flat


def _field(path: Path, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise ValueError(f"{path}: arch.{name} is missing")
    return fields[name]


def _check(root: Path, config: FastCrammedBertConfig, tensors: dict[str, Tensor], plan: dict[str, _Part]) -> None:
    """Raises ``ValueError`` where the source's tensors are not those that its config describes."""
    scales = {f"encoder.layers.{i}.attn.self_attention.norm_factor" for i in range(config.num_hidden_layers)}
    shapes = {part.source: part.shape for part in plan.values()} | dict.fromkeys(scales, ())
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "superfluous": [name for name in tensors if name not in shapes],
        "of another shape": [
            f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{len(names)} {what} ({listed(names)})" for what, names in problems.items() if names)
        raise ValueError(f"the weights in {root} are not those that its config describes: {text}")
    dtypes = {tensors[part.source].dtype for part in plan.values()}
    if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
        raise ValueError(
            f"the weights in {root} are of dtype {listed(map(str, dtypes))} (allowed: one of {listed(map(str, DTYPES))})"
        )
    wanted = (config.hidden_size // config.num_attention_heads) ** -0.5
    for name in sorted(scales):
        if not abs(float(tensors[name]) / wanted - 1) < 1e-2:
            raise ValueError(f"{name}={float(tensors[name]):g} in {root} is not supported (allowed: {wanted:g})")
    if bad := {part.source for part in plan.values() if not tensors[part.source].isfinite().all()}:
        raise ValueError(f"the weights in {root} hold numbers that are not finite: {listed(bad)}")


def _tokenizer(root: Path, config: FastCrammedBertConfig) -> Any:
    """The source's tokenizer with its special tokens, whose ids are read from its file; None where there is none."""
    path = root / "tokenizer.json"
    if not path.is_file():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        bare = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    known = bare.get_vocab()
    if absent := [token for token in _TOKENS.values() if token not in known]:
        raise ValueError(f"{path} has no {', '.join(absent)}")
    if known["<pad>"] != config.pad_token_id:
        raise ValueError(f"{path} has <pad>={known['<pad>']}, the config pad_token_id={config.pad_token_id}")
    if (most := max(known.values())) >= config.vocab_size:
        raise ValueError(f"{path} has ids up to {most}, the config vocab_size={config.vocab_size}")
    special = _TOKENS | {name: token for name, token in _OPTIONAL_TOKENS.items() if token in known}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path),
        model_max_length=config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],  # there are no token types
        **special,
    )
