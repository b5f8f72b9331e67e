"""``compile``, ``load``, and the model that they give."""

import json
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, modeling_outputs
from transformers.utils.generic import ModelOutput

from ..adapters import check_not_adapted
from ..exporting import complete, inputs_of, only_model_in
from ..files import atomic_folder, check_output
from .embedding import Embedding
from .graph import align_rows, operations, pack_rows, to_graph
from .library import OPERATION, engine, engine_version, extension
from .quantise import calibration_batches, has_vnni, products, quantised

PRECISIONS = ("int8", "bf16", "f32")
ROWS = ("auto", *PRECISIONS)
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)  # 1 knew no packed rows
_GRAPH, _WEIGHTS, _FACTS = "openvino_model.xml", "openvino_model.bin", "fff_openvino.json"


def compile(
    model: Any,
    precision: str = "int8",
    *,
    rows: str = "auto",
    texts: Any = None,
    tokenizer: Any = None,
    embedding: Embedding | None = None,
    samples: int = 300,
    keep: Sequence[str] = (),
    vnni: bool | None = None,
    ov_config: Mapping[str, Any] | None = None,
) -> "OpenVINOModel":
    """A model inside OpenVINO, from one in PyTorch, which stays as it is. What is converted and what is dense both work.

    Args:
        model: a transformers model with any head, or what holds one, as a ``SentenceTransformer`` does.
        precision: "int8" (weights and activations of all matrix products, by NNCF's post-training quantisation; between them
            bfloat16 where the CPU has it), "bf16" or "f32".
        rows: of the trees: "int8" (a quarter of float32's bytes), "bf16" (half) or "f32"; "auto" is as
            ``precision``, but "bf16" beside int8 on a CPU without VNNI: int8 rows are smaller and faster, and a little less exact.
        texts: for "int8": some hundreds of typical inputs, texts, pairs of texts or batches of tensors.
        tokenizer: for texts, for ``encode``, and to be saved; a ``SentenceTransformer`` brings its own.
        embedding: for ``encode``: how vectors are pooled; a ``SentenceTransformer`` brings its own, the mean without one.
        samples: texts that int8 looks at, at most.
        keep: for "int8": names of modules of the model whose matrix products stay in float32, with * for any part, such as
            ``["encoder.layer.0.*"]``; their neighbours are quantised as before.
        vnni: for "int8": whether the CPU that will run the model has VNNI instructions (or AMX, or is no x86); None: as this one. Without
            them products of int8 can overflow, so weights have 7 bits.
        ov_config: properties of the engine, such as ``{"INFERENCE_NUM_THREADS": 4}``.

    Raises:
        ImportError: openvino is not installed, or nncf, which int8 needs.
        ValueError: an unknown precision or kind of rows, no texts for int8, names in ``keep`` that are of no product, ``keep`` or ``vnni`` beside
            another precision, a float64 model, adapters of PEFT that are not merged, a
            model that OpenVINO cannot convert.
        RuntimeError: the library with the operation FFF can neither be found nor compiled.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known (allowed: {', '.join(PRECISIONS)})")
    if rows not in ROWS:
        raise ValueError(f"rows={rows!r} is not known (allowed: {', '.join(ROWS)})")
    if keep and precision != "int8":
        raise ValueError(f"keep={list(keep)!r} is for int8, and precision={precision!r}")
    if vnni is not None and precision != "int8":
        raise ValueError(f"vnni={vnni} is for int8, and precision={precision!r}")
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} must be a list of names")
    vnni = has_vnni() if vnni is None else vnni
    rows = _auto_rows(precision, vnni) if rows == "auto" else rows
    if not isinstance(model, PreTrainedModel):
        inner = only_model_in(model)
        if embedding is None and hasattr(model, "max_seq_length") and hasattr(model, "prompts"):
            embedding = Embedding.of_modules(model)
        tokenizer = tokenizer or getattr(model, "tokenizer", None)
        model = inner
    check_not_adapted(model, "compile")
    batches = None
    if precision == "int8":  # before anything slow
        most = [
            n for n in (embedding and embedding.max_length, getattr(model.config, "max_position_embeddings", 0)) if n
        ]
        batches = calibration_batches(texts, tokenizer, min(512, *most) if most else 512, samples)
    names = inputs_of(model)
    graph, kind = to_graph(model)
    if not operations(graph) and not hasattr(model.config, "fff"):
        warnings.warn(f"this {type(model).__name__} holds no FFF: it becomes a plain model of OpenVINO", stacklevel=2)
    if batches is not None:
        kept = products(graph, keep)
        inputs = [{name: t.numpy() for name, t in complete(batch, names).items()} for batch in batches]
        graph = quantised(graph, inputs, kept, vnni)
    if rows != "f32":
        pack_rows(graph, rows)
    facts: dict[str, Any] = {"precision": precision, "rows": rows, "outputs": kind, "model_class": type(model).__name__}
    if precision == "int8":
        facts |= {"keep": list(keep), "vnni": vnni}
    return OpenVINOModel(graph, facts, model.config, tokenizer, embedding, ov_config)


def _auto_rows(precision: str, vnni: bool) -> str:
    """Rows of trees that go with what is around them. Where int8 products are exact enough, int8 rows add little to what int8 attention costs. Without VNNI
    attention has float32 between its products and costs less, and int8 rows would be what takes a model below 0.99 to itself (docs/openvino.md)."""
    return "bf16" if precision == "int8" and not vnni else precision


def load(folder: str | Path, *, ov_config: Mapping[str, Any] | None = None) -> "OpenVINOModel":
    """Opens what ``OpenVINOModel.save_pretrained`` has written: the same outputs, bit for bit, on the same machine.

    Raises:
        ImportError, RuntimeError: as ``compile``.
        FileNotFoundError: files are missing.
        ValueError: another version of hf_fff has written it, which this one cannot read.
    """
    folder = Path(folder)
    for name in (_FACTS, _GRAPH, _WEIGHTS, "config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: is it from `hf-fff export` or OpenVINOModel.save_pretrained?"
            )
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    if facts.pop("version", None) not in _READ_VERSIONS:
        known = ", ".join(map(str, _READ_VERSIONS))
        raise ValueError(
            f"{folder / _FACTS} has a version that this hf_fff does not read (it reads {known}): export the model again"
        )
    facts.setdefault("rows", "f32" if facts["precision"] == "f32" else "bf16")
    if facts["precision"] == "int8" and facts.get("vnni", True) and not has_vnni():
        warnings.warn(
            f"{folder} was made for a CPU with VNNI, which this one lacks: its int8 products overflow here, and outputs are less exact; "
            "export it on this machine, or with --no-vnni",
            stacklevel=2,
        )
    found = set(re.findall(r'type="(?:Packed)?FFF" version="([^"]*)"', (folder / _GRAPH).read_text(encoding="utf-8")))
    if other := sorted(found - {OPERATION}):
        raise ValueError(
            f"{folder / _GRAPH} has FFFs of version {other[0]!r}, and this hf_fff's are {OPERATION!r}: export the model again"
        )
    core = engine().Core()
    core.add_extension(str(extension()))
    graph = core.read_model(folder / _GRAPH)
    align_rows(graph)
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None
    embedding = Embedding.from_dict(facts.pop("embedding")) if facts.get("embedding") else None
    facts.pop("embedding", None)
    return OpenVINOModel(graph, facts, AutoConfig.from_pretrained(folder), tokenizer, embedding, ov_config)


class OpenVINOModel:
    """Calls as a transformers model does, with tensors of the CPU, and returns outputs of the same names. No gradients.

    Several threads may call it; each has an inference request of its own, and all of them share the engine's threads.

    Attributes:
        config: the torch model's.
        tokenizer: or None.
        precision: "int8", "bf16" or "f32".
        rows: of the trees, the same.
        compiled: the engine's ``CompiledModel``.
    """

    def __init__(
        self,
        graph: Any,
        facts: Mapping[str, Any],
        config: Any,
        tokenizer: Any,
        embedding: Embedding | None,
        ov_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.tokenizer, self.embedding = config, tokenizer, embedding
        self.precision: str = facts["precision"]
        self.rows: str = facts["rows"]
        self._facts, self._graph, self._local = dict(facts), graph, threading.local()
        self._inputs = tuple(next(iter(port.get_names())) for port in graph.inputs)
        self._outputs = tuple(next(iter(port.get_names())) for port in graph.outputs)
        self._class: Any = getattr(modeling_outputs, facts["outputs"], ModelOutput)
        core = engine().Core()
        properties = {"PERFORMANCE_HINT": "LATENCY", **(ov_config or {})}
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.precision == "bf16" and not has_bf16:
            warnings.warn("this CPU has no bfloat16 instructions: the engine computes in float32", stacklevel=3)
        wanted = "f32" if self.precision == "f32" or not has_bf16 else "bf16"
        properties.setdefault("INFERENCE_PRECISION_HINT", wanted)
        self.compiled = core.compile_model(graph, "CPU", properties)

    @property
    def model_class(self) -> str:
        """The torch model's."""
        return str(self._facts["model_class"])

    @property
    def operations(self) -> int:
        """How many FFFs are operations of the graph; 0 of a model without trees."""
        return len(operations(self._graph))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def threads(self) -> int:
        """Threads that the engine uses for a call."""
        return int(self.compiled.get_property("INFERENCE_NUM_THREADS"))

    def __call__(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
        """``[rows, tokens]`` (with choices, ``[rows, choices, tokens]``), tensors or arrays; without a mask all tokens are visible.

        Outputs of tokens that the mask hides mean nothing.

        Raises:
            ValueError: shapes that do not fit each other, ids that the model does not know.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        tensors = {k: torch.as_tensor(v) for k, v in given.items() if v is not None}
        self._check(tensors)
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self.compiled.create_infer_request()
        arrays = {name: t.to(torch.int64).numpy() for name, t in complete(tensors, self._inputs).items()}
        results = request.infer(arrays, share_inputs=True)
        return self._class(**{name: torch.from_numpy(np.asarray(results[i])) for i, name in enumerate(self._outputs)})

    forward = __call__

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        ids = tensors["input_ids"]
        rank = 3 if "MultipleChoice" in self.model_class else 2
        if ids.ndim != rank or not ids.numel() or ids.is_floating_point():
            what = "[rows, choices, tokens]" if rank == 3 else "[rows, tokens]"
            raise ValueError(
                f"input_ids is {list(ids.shape)} of {ids.dtype}; it must be {what} of integers, with something in it"
            )
        for name, tensor in tensors.items():
            if tensor.shape != ids.shape:
                raise ValueError(
                    f"{name} is {list(tensor.shape)}; it must have the shape of input_ids, {list(ids.shape)}"
                )
        limits = {"input_ids": self.config.vocab_size}
        if "token_type_ids" in tensors:
            limits["token_type_ids"] = max(1, getattr(self.config, "type_vocab_size", 0) or 0)
        for name, limit in limits.items():
            low, high = int(tensors[name].min()), int(tensors[name].max())
            if low < 0 or high >= limit:
                raise ValueError(f"{name} has the value {low if low < 0 else high}; the model knows 0 to {limit - 1}")

    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        batch_size: int = 32,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize_embeddings: bool = False,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Vectors of texts, as ``SentenceTransformer.encode`` gives them: ``[texts, size]``, or ``[size]`` of one text.

        Texts of similar length go together. Pooling, normalisation, prompts and the maximal length are those of the
        sentence-transformers model that was exported; without one, the mean of all visible tokens.

        Raises:
            ValueError: there is no tokenizer, the model has a head, a batch_size below 1, a module of modules.json that is not known.
        """
        if self.tokenizer is None:
            raise ValueError("encode needs a tokenizer: compile(..., tokenizer=...)")
        if "last_hidden_state" not in self._outputs:
            raise ValueError(f"encode needs a model without a head, and this one is a {self.model_class}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        how = self.embedding or Embedding()
        given = [sentences] if isinstance(sentences, str) else list(sentences)
        texts = [how.prompted(text, prompt, prompt_name) for text in given]
        most = how.max_length or getattr(self.config, "max_position_embeddings", None) or 512
        encoded = self.tokenizer(texts, truncation=True, max_length=most) if texts else {"input_ids": []}
        order = sorted(range(len(texts)), key=lambda i: len(encoded["input_ids"][i]))
        vectors: list[Tensor | None] = [None] * len(texts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer.pad([{k: encoded[k][i] for k in encoded} for i in rows], return_tensors="pt")
            out = self(**{k: v for k, v in batch.items() if k in self._inputs})
            pooled = how.pooled(out.last_hidden_state, batch["attention_mask"])
            if normalize_embeddings:
                pooled = nn.functional.normalize(pooled, dim=-1)
            for i, vector in zip(rows, pooled, strict=True):
                vectors[i] = vector
        stacked = torch.stack(cast("list[Tensor]", vectors)) if texts else torch.empty(0, self.config.hidden_size)
        result = stacked[0] if isinstance(sentences, str) else stacked
        return result if convert_to_tensor else result.numpy()

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Writes the graph with its weights, config and tokenizer: what ``load`` opens. The folder appears whole or not at all.

        Raises:
            FileExistsError: the folder exists and is not empty, and ``overwrite`` is not set.
        """
        check_output(Path(folder), overwrite=overwrite)
        facts: dict[str, Any] = {"version": FORMAT_VERSION, **self._facts, "openvino": engine_version()}
        facts["embedding"] = self.embedding.to_dict() if self.embedding else None
        with atomic_folder(Path(folder), overwrite=overwrite) as target:
            engine().save_model(self._graph, target / _GRAPH, compress_to_fp16=False)
            self.config.save_pretrained(target)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(target)
            (target / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
