"""A frozen fast feedforward layer with rows of fewer bytes, for inference on a CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import FFFConfig
from ..ops.packed_backend import read_header
from .fff import FFF


class Packed(nn.Module):
    """What is frozen, and made for a CPU."""

    def check_mode(self) -> None:
        """Raises where it is to be trained."""
        if self.training:
            raise RuntimeError(
                "a packed layer cannot be trained: put the model into evaluation mode, or train the one it was packed from"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Packed":
        after = fn(torch.empty(0, dtype=torch.uint8))
        if after.device.type not in ("cpu", "meta") or after.dtype != torch.uint8:
            what = f"on {after.device}" if after.dtype == torch.uint8 else f"of {after.dtype}"
            raise ValueError(
                f"a packed layer cannot be {what}: packed layers are for the CPU. There, use the model that was packed"
            )
        super()._apply(fn, *args, **kwargs)
        return self


class PackedFFF(Packed):
    """An ``FFF`` whose rows are int8 or bf16. It holds no other copy of the weights, so there is nothing to keep in step.

    Args:
        packed: ``[bytes]``, uint8, from ``torch.ops.hf_fff.pack``.
        config: of the layer that was packed.

    Raises:
        ValueError: ``packed`` is damaged, of another version, or of another shape than ``config``.
    """

    packed: Tensor

    def __init__(self, packed: Tensor, config: FFFConfig) -> None:
        super().__init__()
        layout = read_header(packed, whole=True)
        if (layout.n_trees, layout.depth) != (config.n_trees, config.depth):
            raise ValueError(f"the packed layer is {layout.n_trees}x{layout.depth}, and config {config.shorthand}")
        self.hidden_size, self.rows, self.config = layout.hidden, layout.rows, config
        self.register_buffer("packed", packed)
        self.eval()

    @classmethod
    def of(cls, fff: FFF, rows: str = "int8") -> "PackedFFF":
        """Packs a layer, which stays as it is.

        Raises:
            ValueError: ``rows`` is not known, a weight is not finite, or not on the CPU.
        """
        weights = [w.detach() for w in (fff.weight_in, fff.bias_in, fff.weight_out)]
        if rows not in ops.ROWS:
            raise ValueError(f"rows={rows!r} is not known (allowed: {', '.join(ops.ROWS)})")
        if device := next((w.device for w in weights if w.device.type != "cpu"), None):
            raise ValueError(
                f"packed layers are for the CPU, and the weights are on {device}: move the model there first"
            )
        if not all(bool(w.isfinite().all()) for w in weights):
            raise ValueError("a weight is not finite: it cannot be packed")
        return cls(ops.pack(*weights, fff.n_trees, rows), fff.config)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``, in the dtype of ``x`` (float32, bfloat16 or float16)."""
        self.check_mode()
        return ops.fff_packed(x, self.packed, self.config.activation)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        if (given := state.get(f"{prefix}packed")) is not None:
            try:
                read_header(given, whole=True)
            except ValueError as error:
                errors.append(f"{prefix}packed: {error}")
                return
        super()._load_from_state_dict(state, prefix, *args)

    def extra_repr(self) -> str:
        c = self.config
        return (
            f"{self.hidden_size}, {c.shorthand}, {c.activation}, rows={self.rows!r}, {self.packed.numel() / 1e6:.1f} MB"
        )
