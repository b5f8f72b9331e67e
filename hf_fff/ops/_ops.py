"""The namespace of the operators. In a kernel of the Hub, where each build has a namespace of its own, kernel-builder writes another
file of this name, with the same names in it."""

from typing import Any

import torch

ops: Any = torch.ops.hf_fff


def add_op_namespace_prefix(op_name: str) -> str:
    """``"fff"`` -> ``"hf_fff::fff"``."""
    return f"hf_fff::{op_name}"
