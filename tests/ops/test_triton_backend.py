"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (see conftest)."""

import os
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
from test_operator import random_layer, relative

from hf_fff import ops
from hf_fff.ops import torch_backend

pytest.importorskip("triton", reason="triton is not installed")
triton_backend = pytest.importorskip("hf_fff.ops.triton_backend")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 0, 8, 6), (1, 5, 33, 11), (3, 4, 16, 70), (8, 8, 40, 9), (1, 11, 24, 3), (64, 0, 40, 40), (2, 3, 5, 0)]


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(triton_backend, "_PIECE", 1000)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_is_the_definition(shape):
    n_trees = shape[0]
    args = random_layer(*shape)
    y, path, logits = (t.cpu() for t in triton_backend.fff_train(*on_device(args), n_trees, "gelu"))
    expected, _, z = oracle.fff(*args, n_trees, path=path.numpy())
    assert relative(oracle.array(y), expected) <= 1e-5 and relative(oracle.array(logits), z) <= 1e-5
    assert path.dtype == torch.int32 and (path[..., 0] == 0).all()
    right = path.numpy()[..., 1:] == 2 * path.numpy()[..., :-1] + 2
    assert ((right == (z[..., :-1] > 0)) | (np.abs(z[..., :-1]) < 1e-5)).all()
    assert torch.equal(triton_backend.fff(*on_device(args), n_trees, "gelu").cpu(), y)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.usefixtures("small_pieces")
def test_gradients(shape, activation, alpha):
    """As PyTorch's in float64, which test_operator checks against the oracle, on the same paths."""
    n_trees = shape[0]
    args = random_layer(*shape)
    gradient = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
    _, path, logits = triton_backend.fff_train(*on_device(args), n_trees, activation)
    options = (n_trees, activation, alpha, 0.7)
    got = triton_backend.fff_backward(*on_device([gradient, *args]), path, logits, *options)
    exact = [t.double() for t in (gradient, *args)]
    want = torch_backend.fff_backward(*exact, path.cpu(), logits.cpu().double(), *options)
    for name, a, b in zip(("x", "weight_in", "bias_in", "weight_out"), got, want, strict=True):
        assert a.dtype == torch.float32 and relative(oracle.array(a), oracle.array(b)) <= 1e-4, name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, bound):
    args = random_layer(8, 5, 96, 40, dtype=dtype)
    y, path, logits = triton_backend.fff_train(*on_device(args), 8, "gelu")
    assert y.dtype == dtype and logits.dtype == torch.float32
    expected, _, _ = oracle.fff(*args, 8, path=path.cpu().numpy())
    assert relative(oracle.array(y), expected) <= bound


def test_nan_goes_left_and_what_is_not_wanted_is_empty():
    args = random_layer(1, 2, 4, 2)
    args[0][1] = float("nan")
    y, path, logits = triton_backend.fff_train(*on_device(args), 1, "relu")
    assert path[1].flatten().tolist() == [0, 1, 3] and y[1].isnan().all() and not y[0].isnan().any()
    call = (args[0], *args, path.cpu(), logits.cpu())
    shapes = [
        [tuple(g.shape) for g in triton_backend.fff_backward(*on_device(call), 1, "relu", need_x=x, need_weights=not x)]
        for x in (True, False)
    ]
    assert shapes == [[(2, 4), (0,), (0,), (0,)], [(0,), (7, 4), (7,), (7, 4)]]


def test_what_it_leaves_to_pytorch(monkeypatch):
    called = []
    monkeypatch.setattr(torch_backend, "fff_train", lambda *a: called.append("forward"))
    monkeypatch.setattr(torch_backend, "fff_backward", lambda *a: called.append("backward"))
    for args, n_trees in ((random_layer(2, 2, 4, 3, dtype=torch.float64), 2), (random_layer(1, 14, 4, 3), 1)):
        triton_backend.fff_train(*args, n_trees, "gelu")
        triton_backend.fff_backward(args[0], *args, args[0], args[0], n_trees, "gelu")
    assert called == ["forward", "backward"] * 2


@pytest.mark.gpu
def test_the_operators_use_it():
    """The dense backward pass, which the CUDA kernels call too, and where those are not there, all."""
    args = [t.cuda() for t in random_layer(8, 8, 384, 300)]
    want = triton_backend.fff_train(*args, 8, "gelu")
    if ops.backend("cuda") == "triton":
        assert all(map(torch.equal, torch.ops.hf_fff.fff_train(*args, 8, "gelu"), want))
    dense = torch.ops.hf_fff.fff_backward_dense(args[0], *args, *want[1:], 8, "gelu", 3.0)
    again = triton_backend.fff_backward(args[0], *args, *want[1:], 8, "gelu", 3.0)
    for _ in range(3):
        once = triton_backend.fff_backward(args[0], *args, *want[1:], 8, "gelu", 3.0)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert all(map(torch.equal, dense, again))
    graph, static = torch.cuda.CUDAGraph(), torch.empty_like(args[0])
    with torch.cuda.graph(graph):
        static.copy_(triton_backend.fff(*args, 8, "gelu"))
    args[0].copy_(args[0].flip(0))
    graph.replay()
    assert torch.allclose(static, want[0].flip(0), rtol=1e-4, atol=1e-4)


_COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from hf_fff.ops import triton_backend as t

names = ("gelu", "gelu_new", "relu", "silu", "identity")
few = [(2, "gelu_new", "bf16", 90), (2, "relu", "fp32", 90), (2, "silu", "fp16", 75), (1, "identity", "fp32", 80), (3, "gelu", "bf16", 80)]
more = [*((9, name, "bf16", 90) for name in names), (1, "gelu", "fp32", 80), (5, "gelu", "fp16", 75), (12, "gelu", "bf16", 80)]
for levels, activation, dtype, capability in {"few": few, "more": more}[sys.argv[1]]:
    weights, constants = "*" + dtype, {"LEVELS": levels, "ACTIVATION": activation, "TOKENS": 2}
    tensors = {"every": weights, "bias": weights, "path": "*i32"}
    walk = tensors | {"spread": weights, "logits": "*fp32"}
    slopes = tensors | {"gain": weights, "into_logits": weights, "values": weights, "alpha": "fp32", "tau": "fp32"}
    for kernel, arguments, more in (
        (t._walk_kernel, walk, {}), (t._slopes_kernel, slopes, {"ROUTING": True}), (t._slopes_kernel, slopes, {"ROUTING": False}),
    ):
        arguments = arguments | {"tokens": "i32", "trees": "i32"}
        signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
        made = compile(ASTSource(kernel, signature, constants | more), target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"]
"""


@pytest.mark.parametrize("how", ["few", pytest.param("more", marks=pytest.mark.full)])
def test_kernels_compile_without_a_gpu(how, tmp_path):
    """The interpreter takes much that the compiler does not. Time grows with the levels, which are unrolled; what is compiled is the same."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _COMPILE, how], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
