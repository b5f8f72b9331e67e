"""Packed layers against their definition, and against the layers that were packed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_operator import random_layer, relative

from hf_fff import FFF, FFFConfig, ops
from hf_fff.ops import packed_backend

NATIVE = torch.ops.hf_fff
BACKENDS = {"native": NATIVE, "torch": packed_backend}
# K, D, H, T: every number of levels above full groups, trees that share groups in part, sizes that are no multiple of 64
SHAPES = [
    *[(k, d, 33, 5) for k in (1, 2, 3, 7) for d in range(6)],
    *[(k, d, 64, 3) for k in (1, 5) for d in (0, 8)],
    (1, 11, 768, 130),
    (4, 5, 100, 300),
    (8, 8, 384, 120),
    (32, 6, 128, 9),
    (3, 7, 65, 1),
    (2, 3, 1, 4),
    (2, 3, 1000, 0),
]


@pytest.fixture(autouse=True)
def native_is_there():
    assert ops.backend("cpu") == "native", ops.load("cpu").reason


def same_path(x, weights, packed, n_trees, activation="gelu"):
    """Which tokens go down all trees as in float32."""
    _, path = packed_backend.packed_path(x, packed, activation)
    _, want, _ = ops.fff_train(x, *weights, n_trees, activation)
    return path == want


@pytest.mark.parametrize("rows", ops.ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_buffer_is_the_same_from_both_backends(shape, rows):
    _, *weights = random_layer(*shape)
    packed = NATIVE.pack(*weights, shape[0], rows)
    assert torch.equal(packed, packed_backend.pack(*weights, shape[0], rows))
    layout = packed_backend.read_header(packed, whole=True)
    assert (layout.rows, layout.hidden, layout.n_trees, layout.depth) == (rows, shape[2], *shape[:2])


@pytest.mark.parametrize("rows", ops.ROWS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_is_the_definition(backend, shape, rows):
    x, *weights = random_layer(*shape)
    packed = NATIVE.pack(*weights, shape[0], rows)
    y = BACKENDS[backend].fff_packed(x, packed, "gelu")
    some = slice(None, None, 1 + len(x) // 9)
    want, path = oracle.fff_packed(x[some], *weights, shape[0], rows)
    if backend == "torch":
        assert (packed_backend.packed_path(x[some], packed, "gelu")[1].numpy() != path).sum() <= 0.01 * path.size
    errors = [relative(oracle.array(a), b) for a, b in zip(y[some], want, strict=True)]
    # Roundings near a tie: of a factor (one step of 127), and, rarely, of a turn.
    assert sum(e > (2e-2 if rows == "int8" else 4e-3) for e in errors) <= len(errors) // 8


@pytest.mark.parametrize("dtype", packed_backend.PACKED_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(
    "shape", [(3, 6, 65, 40), (1, 9, 128, 200), (8, 4, 100, 150)], ids=lambda s: "x".join(map(str, s))
)
def test_both_backends_give_the_same_bits_over_int8(shape, activation, dtype):
    x, *weights = random_layer(*shape)
    packed = NATIVE.pack(*weights, shape[0], "int8")
    y = NATIVE.fff_packed(x.to(dtype), packed, activation)
    assert y.dtype == dtype
    assert torch.equal(y, packed_backend.fff_packed(x.to(dtype), packed, activation))
    want, _ = oracle.fff_packed(x.to(dtype)[:5], *weights, shape[0], "int8", activation)
    assert relative(oracle.array(y[:5]), want) < 2e-2


@pytest.mark.parametrize(("rows", "share", "bound"), [("int8", 0.96, 0.025), ("bf16", 0.985, 0.006)])
@pytest.mark.parametrize(
    "shape", [(1, 11, 768, 400), (8, 8, 384, 200), (32, 6, 384, 100)], ids=lambda s: "x".join(map(str, s))
)
def test_near_float32(shape, rows, share, bound):
    x, *weights = random_layer(*shape)
    packed = NATIVE.pack(*weights, shape[0], rows)
    same = same_path(x, weights, packed, shape[0])
    turns = same[:, :, -1].double().mean()  # a leaf tells the whole path
    alike = same.flatten(1).all(1)
    want = NATIVE.fff(x, *weights, shape[0], "gelu")
    y = NATIVE.fff_packed(x, packed, "gelu")
    assert turns > share
    assert relative(oracle.array(y[alike]), oracle.array(want[alike])) < bound


@pytest.mark.parametrize(("rows", "share", "bound"), [("int8", 0.93, 0.05), ("bf16", 0.98, 0.01)])
def test_near_float32_after_a_fit(rows, share, bound):
    """Fitted to a dense network on correlated inputs with some large columns, as a calibrated layer is."""
    mix = torch.randn(64, 64) / 8
    mix[:, :2] *= 6
    first, second = torch.randn(128, 64) / 8, torch.randn(64, 128) / 11
    layer = FFF(64, FFFConfig(4, 5, routing_gradient=3.0))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(80):
        x = torch.randn(512, 64) @ mix
        loss = (layer(x) - torch.nn.functional.gelu(x @ first.T) @ second.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, weights = torch.randn(500, 64) @ mix, [p.detach() for p in layer.parameters()]
    packed = NATIVE.pack(*weights, 4, rows)
    same = same_path(x, weights, packed, 4)
    alike = same.flatten(1).all(1)
    y, want = NATIVE.fff_packed(x, packed, "gelu"), NATIVE.fff(x, *weights, 4, "gelu")
    assert same[:, :, -1].double().mean() > share
    assert relative(oracle.array(y[alike]), oracle.array(want[alike])) < bound


@pytest.mark.parametrize("rows", ops.ROWS)
@pytest.mark.parametrize(
    "shape", [(1, 11, 256, 300), (8, 6, 100, 300), (5, 4, 70, 100)], ids=lambda s: "x".join(map(str, s))
)
def test_alone_in_a_batch_and_with_any_threads(shape, rows):
    x, *weights = random_layer(*shape)
    packed = NATIVE.pack(*weights, shape[0], rows)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = NATIVE.fff_packed(x, packed, "gelu")
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(NATIVE.fff_packed(x, packed, "gelu"), want)
    finally:
        torch.set_num_threads(before)
    for size in (1, 7, 64, 97):
        assert torch.equal(torch.cat([NATIVE.fff_packed(part, packed, "gelu") for part in x.split(size)]), want)


_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, "tests"), sys.path.insert(0, "tests/ops")
from test_operator import random_layer
from hf_fff import FFF, FFFConfig, ops
digest = hashlib.sha256()
for shape in ((1, 9, 100, 150), (6, 5, 64, 120), (3, 3, 33, 7)):
    x, *weights = random_layer(*shape)
    packed = ops.pack(*weights, shape[0], "int8")
    digest.update(packed.numpy().tobytes())
    for activation in ops.ACTIVATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            digest.update(ops.fff_packed(x.to(dtype), packed, activation).view(torch.uint8).numpy().tobytes())
print(ops.isa(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits_over_int8():
    digests, root = {}, Path(__file__).parents[2]
    for setting in (
        {"HF_FFF_ISA": "avx512"},
        {"HF_FFF_ISA": "avx2"},
        {"HF_FFF_ISA": "baseline"},
        {"HF_FFF_BACKEND": "torch"},
    ):
        environment = {**os.environ, **setting, "PYTHONPATH": str(root)}
        run = subprocess.run(
            [sys.executable, "-c", _DIGEST], env=environment, cwd=root, capture_output=True, text=True, check=False
        )
        if "is not available on this machine" in run.stderr:
            continue
        assert run.returncode == 0, run.stderr
        name, digest = run.stdout.split()
        digests[name] = digest
    assert len(digests) >= 2 and len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_buffer_is_refused(backend):
    x, *weights = random_layer(2, 3, 40, 3)
    packed = NATIVE.pack(*weights, 2, "int8")
    run = BACKENDS[backend].fff_packed

    def changed(at, value):
        other = packed.clone()
        other[at] = value
        return other

    for buffer, why in (
        (packed[:50], "shorter than a header"),
        (packed[:-64], "not as long as its header says"),
        (changed(0, 7), "does not start as a packed layer does"),
        (changed(8, 99), "by another version"),
        (changed(17, 3), "its header is damaged"),
        (packed.int(), "uint8"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=why):
            run(x, buffer, "gelu")
    with pytest.raises(ValueError, match="it is damaged"):
        packed_backend.read_header(changed(len(packed) - 5, 3), whole=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend):
    x, *weights = random_layer(2, 3, 40, 3)
    module = BACKENDS[backend]
    packed = module.pack(*weights, 2, "int8")
    errors = (ValueError, RuntimeError)
    with pytest.raises(errors, match="rows='int4' is not known"):
        module.pack(*weights, 2, "int4")
    with pytest.raises(errors, match="nodes"):
        module.pack(*weights, 4, "int8")
    with pytest.raises(errors, match="not finite"):
        module.pack(weights[0], weights[1] * torch.nan, weights[2], 2, "int8")
    with pytest.raises(errors, match=r"40\]"):
        module.fff_packed(x[:, :30], packed, "gelu")
    with pytest.raises(errors, match="float32"):
        module.fff_packed(x.double(), packed, "gelu")
    with pytest.raises(errors, match="activation 'tanh' is not known"):
        module.fff_packed(x, packed, "tanh")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", ops.ROWS)
def test_odd_tokens(backend, rows):
    x, *weights = random_layer(2, 4, 40, 6)
    weights[2][3] = 0
    packed = NATIVE.pack(*weights, 2, rows)
    run = BACKENDS[backend].fff_packed
    clean = run(x, packed, "gelu")
    x[1, 3], x[3] = torch.nan, 0
    y = run(x, packed, "gelu")
    assert y[1].isnan().all() and torch.equal(y[[0, 2, 4, 5]], clean[[0, 2, 4, 5]])
    want, _ = oracle.fff_packed(x[3:4], *weights, 2, rows)
    assert relative(oracle.array(y[3:4]), want) < 2e-2
    assert torch.equal(run(x[::2], packed, "gelu"), y[::2].contiguous())  # not contiguous
    assert run(x.view(2, 3, 40), packed, "gelu").shape == (2, 3, 40)


@pytest.mark.parametrize("rows", ops.ROWS)
def test_as_a_torch_operator(rows):
    x, *weights = random_layer(2, 4, 40, 6)
    torch.library.opcheck(NATIVE.pack, (*weights, 2, rows))
    packed = NATIVE.pack(*weights, 2, rows)
    torch.library.opcheck(NATIVE.fff_packed, (x, packed, "gelu"))
    with pytest.raises(RuntimeError, match="has no gradients: it is for inference"):
        NATIVE.fff_packed(x.requires_grad_(), packed, "gelu").sum().backward()


def test_compiles_without_a_graph_break():
    x, *weights = random_layer(2, 4, 40, 6)
    packed = NATIVE.pack(*weights, 2, "int8")
    compiled = torch.compile(
        lambda t: NATIVE.fff_packed(2 * t, packed, "gelu") + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), NATIVE.fff_packed(2 * x, packed, "gelu") + 1)


def test_the_oracle_rounds_to_bf16_as_torch_does():
    values = torch.randn(1000)
    assert np.array_equal(oracle.bf16(values.numpy()), values.bfloat16().double().numpy())
