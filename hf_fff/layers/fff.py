"""The fast feedforward layer as a module."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from .. import ops
from ..config import ConfigLike, FFFConfig, as_config
from ..ops import add_bias
from .rounding import rounded_fff


class Neurons(nn.Module):
    """``config.nodes`` neurons, as plain parameters, so that whatever works on parameters works here."""

    kind: str
    weight_in: nn.Parameter  # [nodes, hidden_size]
    bias_in: nn.Parameter  # [nodes]
    weight_out: nn.Parameter  # [nodes, hidden_size]

    def __init__(
        self,
        hidden_size: int,
        config: ConfigLike,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size={hidden_size!r} must be an integer of at least 1")
        self.hidden_size = hidden_size
        self.config: FFFConfig = as_config(config)
        if self.config.kind != self.kind:
            raise ValueError(
                f"an {type(self).__name__} is of kind={self.kind!r}, not {self.config.kind!r}: "
                "hf_fff.layers.feedforward makes any"
            )
        nodes = self.config.nodes
        self.weight_in = nn.Parameter(torch.empty(nodes, hidden_size, device=device, dtype=dtype))
        self.bias_in = nn.Parameter(torch.empty(nodes, device=device, dtype=dtype))
        self.weight_out = nn.Parameter(torch.empty(nodes, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, init: ModuleType = nn.init) -> None:
        """Uniform within 1/sqrt(fan-in), where the fan-in of the output is the neurons that a token uses.

        Args:
            init: where ``uniform_`` comes from; transformers' own skips parameters that a checkpoint has filled.
        """
        bound_in, bound_out = self.hidden_size**-0.5, self.config.active_nodes**-0.5
        init.uniform_(self.weight_in, -bound_in, bound_in)
        init.uniform_(self.bias_in, -bound_in, bound_in)
        init.uniform_(self.weight_out, -bound_out, bound_out)

    def extra_repr(self) -> str:
        c = self.config
        return f"{self.hidden_size}, {c.shorthand}, {c.activation}, uses {c.active_nodes} of {c.nodes} neurons"


class FFF(Neurons):
    """Fast feedforward network: ``n_trees`` balanced binary trees of neurons, of which a token visits one path each.

    Args:
        hidden_size: H, size of input and output.
        config: an ``FFFConfig``, ``"KxD"``, or a dict of its fields.

    Parameters:
        weight_in: ``[nodes, hidden_size]``, tree-major: tree k holds rows ``k * tree_nodes`` and on, in heap order.
        bias_in: ``[nodes]``.
        weight_out: ``[nodes, hidden_size]``.

    Source: arXiv 2311.10770, section 2. There is no output bias, as in the paper.
    """

    kind = "tree"
    watch: Callable[[Tensor], None] | None = None  # is given the paths of each forward pass, [..., n_trees, depth + 1]
    rows: str | None = None  # "int8" or "bf16": it computes as if it were packed so, see hf_fff.rounded_rows

    @property
    def n_trees(self) -> int:
        assert self.config.n_trees is not None
        return self.config.n_trees

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        c, w_in, b_in, w_out = self.config, self.weight_in, self.bias_in, self.weight_out
        routing = (c.routing_gradient, c.routing_temperature)
        if self.rows is not None:
            y, path = rounded_fff(x, w_in, b_in, w_out, self.n_trees, c.activation, self.rows, *routing)
        elif self.watch is not None:
            y, path, _ = ops.fff_train(x, w_in, b_in, w_out, self.n_trees, c.activation, *routing)
        else:
            return ops.fff(x, w_in, b_in, w_out, self.n_trees, c.activation, *routing)
        if self.watch is not None:
            self.watch(path)
        return y


class OutputBias(nn.Module):
    """Adds a bias: what is left of a dense output projection once an FFF has taken its place."""

    def __init__(
        self, hidden_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self, init: ModuleType = nn.init) -> None:
        init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size] -> [..., hidden_size]``."""
        return add_bias(x, self.bias)
