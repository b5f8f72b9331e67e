"""Steps of matrices whose directions count all alike: Muon (Jordan et al., 2024; scaled as in arXiv 2502.16982).

``torch.optim.Muon`` takes the same steps, a matrix after the other; a BERT has dozens of one shape, and on a GPU a step is mostly launching
kernels. So they are made together here, and by hooks around an optimizer, which keeps its groups, its rates and its state in one place.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration that takes singular values to about 1
_ITERATIONS = 5


def take_orthogonal_steps(optimizer: torch.optim.Optimizer, matrices: Iterable[nn.Parameter]) -> None:
    """From now on an optimizer takes the steps of these of its parameters by Muon, with the rates and weight decays of their groups. They are
    about as long as Adam's at the same rate. Momenta are in the optimizer's state, as ``"momentum_buffer"``."""
    chosen = set(matrices)
    places = [
        (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"]) if p in chosen
    ]
    taken: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def step(optimizer: torch.optim.Optimizer, *others: Any) -> None:
        taken.clear()
        together: dict[Any, list[tuple[dict[str, Any], nn.Parameter, Tensor]]] = {}
        for g, i in places:
            group = optimizer.param_groups[g]
            p = group["params"][i]
            if p.grad is not None:
                together.setdefault((p.shape, p.device, p.dtype), []).append((group, p, p.grad))
                taken.append((p, p.grad))
                p.grad = None  # so that the optimizer passes over it
        for of_a_shape in together.values():
            gradients = [gradient for _, _, gradient in of_a_shape]
            momenta = [_momentum(optimizer.state[p], gradient) for _, p, gradient in of_a_shape]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            directions = orthogonal(torch.stack(torch._foreach_lerp(gradients, momenta, MOMENTUM)))
            for (group, p, _), direction in zip(of_a_shape, directions.unbind(), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])

    def give_back(*_: Any) -> None:
        for p, gradient in taken:
            p.grad = gradient
        taken.clear()

    if places:
        optimizer.register_step_pre_hook(step)
        optimizer.register_step_post_hook(give_back)


def _momentum(state: dict[str, Any], gradient: Tensor) -> Tensor:
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(gradient)
        state.setdefault("step", torch.tensor(0.0))  # for which Adam looks in each state that it loads
    found: Tensor = state["momentum_buffer"]
    return found


def orthogonal(matrices: Tensor) -> Tensor:
    """``[n, rows, columns]``, each brought near ``U V^T`` of its singular value decomposition ``U S V^T``, by Newton's and Schulz's iteration; on
    a GPU in bfloat16."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()  # many a CPU only pretends to have bfloat16
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)
