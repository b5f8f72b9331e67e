"""Writes ``docs/families.md`` from the table: ``python -m hf_fff.models.page > docs/families.md``."""

from importlib import import_module
from textwrap import fill

from transformers import CONFIG_MAPPING, PreTrainedModel

from .classes import class_names, dense_config_name, heads, known_types
from .families import FAMILIES, FFNInterface

_TESTED = "5.17 and 5.24"

_PAGE = """# Families

<!-- Written by `python -m hf_fff.models.page` from the table in hf_fff/models/families.py: change it there. -->

`convert_ffn_to_fff` and `hf-fff convert` take any model of these families, with any of their heads. Their names are
transformers' with `Fast` before them: `from hf_fff import FastRobertaForTokenClassification`. `config.json` of a converted model
says `fast` and the family's model type (`fastroberta`). A program that opens one needs `import hf_fff` before: then the Auto
classes and `AutoTokenizer` know it.

These are {models} models and {configs} configs, all tested with transformers {tested}: converted, saved, loaded through each Auto
class, and equal bit for bit. Calibration, distillation, evaluation and the commands take every family.

| model type | classes | feedforward network | norm after it | heads beside `Model` |
|---|---|---|---|---|
{rows}

{left_out}

Gated: `down(act(gate(x)) * up(x))`. No tree computes that; it is fitted to what the network gives for what it reads. Its first
values (`init="dense"`) come from the activated half alone: rows of `gate` as directions, rows of `down` times the mean of what
`up` multiplies by. Calibration keeps the directions and fits all else.

Shared: ALBERT's layers are one layer that runs several times, so that they take one config, and one tree serves them all. It is
fitted on what all of them read in the dense model.

Several a layer: MobileBERT has a stack of networks in each layer; all take the layer's config. `fff_usage` and the report of a
calibration give their mean.

Norm in the next layer: with the norms before attention and feedforward network there is none between the network and what
reads it, so that a calibration weighs errors by the next norm on the residual stream, of the next layer or after the last.

Sharding: FSDP2 is tested, with heads that are tied to the embedding and others: `torch.distributed.fsdp.fully_shard` layer by
layer with bert, albert and modernbert, transformers' `DistributedConfig(fsdp_size=2)` with bert. Tensor parallelism, for which
transformers has a plan of eurobert alone, leaves an FFF whole on each device; it has not been tried on several.

## A family that is not here

One row says where it keeps things; its forward stays its own. For a family of transformers, or one whose config and models you
have registered with the Auto classes:

```python
from hf_fff import FFNInterface, convert_ffn_to_fff, register_family

register_family(
    FFNInterface(
        "data2vec-text",  # the model type; all else here are the defaults, which are BERT's
        layers="encoder.layer",  # the list of layers, seen from the base model
        ffn_in="intermediate",  # seen from a layer: what the FFF replaces
        dense_in="intermediate.dense",  # the projections
        dense_out="output.dense",
        input_norm="attention.output.LayerNorm",  # whose output the network reads
        output_norm="output.LayerNorm",  # the next norm on the residual stream
    )
)
fast = convert_ffn_to_fff(model, "8x8", calibration=texts)
```

The other fields of `FFNInterface` are for gated networks, shared or stacked ones, and norms that come before: their comments in
[families.py](../hf_fff/models/families.py) say how. To add a family for all, put the row into the table there, and what a tiny
model of it needs into `FIELDS` in `tests/tiny.py`: `tests/models/test_families.py` then covers it.
"""


def _kind(row: FFNInterface) -> str:
    words = [f"`{row.ffn_in}`, gated" if row.gated else f"`{row.ffn_in}`, `{row.dense_out}`"]
    words += ["shared by layers"] if row.shared else []
    words += ["several a layer"] if len(row.parts) > 1 else []
    words += ["grouped convolutions"] if row.channels_first else []
    return ", ".join(words)


def _row(row: FFNInterface) -> str:
    name = dense_config_name(row.model_type).removesuffix("Config")
    others = [head.removeprefix(name) for head in heads(row.model_type)][1:]
    norm = "in the layer" if row.output_norm else "in the next layer"
    return f"| {row.model_type} | `Fast{name}…` | {_kind(row)} | {norm} | {', '.join(others)} |"


def left_out(model_type: str) -> list[str]:
    """The names of transformers' models of a type that have no Fast class. Imports the family's files."""
    package = import_module(CONFIG_MAPPING[model_type].__module__.rpartition(".")[0])
    known = {name: getattr(package, name, None) for name in dir(package)}
    models = {n: c for n, c in known.items() if isinstance(c, type) and issubclass(c, PreTrainedModel)}
    mine = {n for n, c in models.items() if getattr(c.config_class, "model_type", None) == model_type}
    return sorted(n for n in mine - set(heads(model_type)) if not n.endswith("PreTrainedModel"))


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    """The text of ``docs/families.md``."""
    types = known_types()
    left = [name for t in types for name in left_out(t)]
    decoders = [name for name in left if name.endswith(("ForCausalLM", "LMHeadModel"))]
    others = [name for name in left if name not in decoders]
    sentence = (
        f"Of what transformers has for these model types, decoders are left out ({_listed(decoders)}), and {_listed(others)}, of "
        "which ESM is a part."
    )
    return _PAGE.format(
        rows="\n".join(_row(FAMILIES[t]) for t in types),
        models=sum(len(class_names(t)) - 1 for t in types),
        configs=len(types),
        tested=_TESTED,
        left_out=fill(sentence, 120, break_long_words=False),
    )


if __name__ == "__main__":
    print(page(), end="")
