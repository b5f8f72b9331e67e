"""FastBERT's configuration: BERT's, and ``fff``."""

from typing import Any, ClassVar

from transformers import BertConfig

from ..fast import FastConfigMixin


class FastBertConfig(FastConfigMixin, BertConfig):
    """``BertConfig`` and ``fff``: which layers hold which FFF (see ``FastConfigMixin``); "1x11" in all layers by default.

    ```python
    >>> FastBertConfig(fff="8x8").fff_layers[0].active_nodes
    72
    ```
    """

    model_type = "fastbert"
    dense_model_type: ClassVar[str] = "bert"
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "encoder.layer.*": "free_full_weight",
        "pooler": "keep_full_weight",
    }

    fff: Any = "1x11"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.normalise_fff()
