"""The operator against the oracle, natively and in PyTorch, and its manners as a torch operator."""

import contextlib
import copy
import os
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch

from hf_fff import FFF, FFFConfig, ops
from hf_fff.ops import torch_backend

# K, D, H, T: the corners, the paper's shapes, and sizes that are no multiple of anything
SHAPES = [
    *[(k, d, 33, 5) for k in (1, 2, 3, 7) for d in (0, 1, 4, 6)],
    *[(k, d, 1, 5) for k in (1, 5) for d in (0, 3)],
    *[(k, d, 384, t) for k, d in ((1, 0), (1, 11), (4, 5), (8, 8), (64, 5)) for t in (1, 5)],
    *[(k, d, 768, t) for k, d in ((1, 11), (8, 4), (16, 7)) for t in (0, 1, 5)],
    (1, 11, 384, 300),
    (3, 6, 96, 300),
    (64, 0, 40, 300),
    (2, 3, 1000, 9),
]
NATIVE = torch.ops.hf_fff
BACKENDS = {"native": NATIVE, "torch": torch_backend}


def random_layer(n_trees, depth, hidden, tokens, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    nodes = n_trees * (2 ** (depth + 1) - 1)
    x = torch.randn(tokens, hidden, generator=g)
    weight_in = torch.randn(nodes, hidden, generator=g) / hidden**0.5
    bias_in = 0.3 * torch.randn(nodes, generator=g)
    weight_out = torch.randn(nodes, hidden, generator=g)
    return [t.to(dtype) for t in (x, weight_in, bias_in, weight_out)]


def relative(a, b):
    norm = np.linalg.norm(b)
    return np.linalg.norm(a - b) / norm if norm else np.linalg.norm(a)


@pytest.fixture(autouse=True)
def native_is_there():
    assert ops.backend("cpu") == "native", ops.load("cpu").reason
    assert ops.has_native("cpu")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_is_the_definition(backend, shape):
    n_trees, depth, hidden, tokens = shape
    args = random_layer(*shape)
    y, path, logits = BACKENDS[backend].fff_train(*args, n_trees, "gelu")
    assert y.shape == (tokens, hidden) and path.shape == logits.shape == (tokens, n_trees, depth + 1)
    assert path.dtype == torch.int32
    expected, _, z = oracle.fff(*args, n_trees, path=path.numpy())
    assert relative(oracle.array(y), expected) <= 1e-5
    assert relative(oracle.array(logits), z) <= 1e-5
    # The path is the definition's, but where float32 cannot tell the logit from zero.
    right = path.numpy()[..., 1:] == 2 * path.numpy()[..., :-1] + 2
    assert ((right == (z[..., :-1] > 0)) | (np.abs(z[..., :-1]) < 1e-5)).all()
    assert torch.equal(BACKENDS[backend].fff(*args, n_trees, "gelu"), y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(backend, activation):
    args = random_layer(3, 4, 64, 20)
    args[0] *= 4  # into the tails
    y, path, _ = BACKENDS[backend].fff_train(*args, 3, activation)
    expected, _, _ = oracle.fff(*args, 3, activation, path=path.numpy())
    assert relative(oracle.array(y), expected) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", [(1, 11, 768, 40), (8, 5, 384, 40), (2, 3, 33, 40)], ids=str)
def test_other_types(backend, dtype, bound, shape):
    args = random_layer(*shape, dtype=dtype)
    y, path, logits = BACKENDS[backend].fff_train(*args, shape[0], "gelu")
    assert y.dtype == dtype and logits.dtype == (dtype if dtype == torch.float64 else torch.float32)
    expected, _, _ = oracle.fff(*args, shape[0], path=path.numpy())
    assert relative(oracle.array(y), expected) <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_storage_formats_round_as_torch_does(dtype):
    special = torch.tensor([0.0, -0.0, 65519.0, 65520.0])
    values = torch.cat([torch.randn(2000) * 10.0**e for e in range(-9, 5)] + [special])
    x = values.to(dtype).unsqueeze(1)
    one = torch.ones(1, 1, dtype=dtype)
    y = NATIVE.fff(x, one, torch.zeros(1, dtype=dtype), one, 1, "identity")
    assert torch.equal(y, x)
    # float32 sums of two such numbers, rounded
    y = NATIVE.fff(x, one, torch.full((1,), 1 / 3, dtype=dtype), one, 1, "identity")
    assert torch.equal(y, (x.float() + torch.tensor(1 / 3, dtype=dtype).float()).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_nan_go_left(backend):
    weight_in = torch.zeros(7, 4)
    weight_out = torch.arange(7.0).unsqueeze(1).expand(7, 4).contiguous()
    x = torch.ones(2, 4)
    x[1] = float("nan")
    train = BACKENDS[backend].fff_train
    y, path, _ = train(x, weight_in, torch.zeros(7), weight_out, 1, "gelu")
    assert path.flatten(1).tolist() == [[0, 1, 3], [0, 1, 3]]
    assert torch.equal(y[0], torch.zeros(4)) and y[1].isnan().all()
    tiny = torch.full((7,), 1e-30)
    assert train(x[:1], weight_in, tiny, weight_out, 1, "gelu")[1].flatten().tolist() == [0, 2, 6]
    minus = torch.full((7,), -0.0)
    assert train(x[:1], weight_in, minus, weight_out, 1, "gelu")[1].flatten().tolist() == [0, 1, 3]
    infinite = torch.full((1, 4), float("inf"))
    assert train(infinite, weight_in + 1, tiny, weight_out, 1, "relu")[1].flatten().tolist() == [0, 2, 6]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(1, 0, 8, 6), (1, 5, 33, 11), (3, 4, 16, 7), (8, 3, 40, 30)], ids=str)
def test_gradients(backend, alpha, shape):
    """All four gradients, from dL/dz of the visited nodes as the oracle has it."""
    n_trees, depth, hidden, tokens = shape
    tau = 0.7
    args = random_layer(*shape, dtype=torch.float64)
    g = torch.randn(tokens, hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, path, logits = BACKENDS[backend].fff_train(*args, n_trees, "gelu")
    got = BACKENDS[backend].fff_backward(g, *args, path, logits, n_trees, "gelu", alpha, tau)

    x, weight_in, _, weight_out = (oracle.array(t) for t in args)
    _, nodes, z = oracle.fff(*args, n_trees)
    act, step = oracle.ACTIVATIONS["gelu"], 1e-6
    slope = np.vectorize(lambda v: (act(v + step) - act(v - step)) / (2 * step))(z)
    extra = oracle.routing_term(args[0], g, *args[1:], n_trees, "gelu", alpha, tau) if alpha else np.zeros_like(z)
    want = [np.zeros_like(x), np.zeros_like(weight_in), np.zeros(len(weight_in)), np.zeros_like(weight_out)]
    for t in range(tokens):
        for k in range(n_trees):
            for level in range(depth + 1):
                row = k * (2 ** (depth + 1) - 1) + nodes[t, k, level]
                dz = float(g[t].numpy() @ weight_out[row]) * slope[t, k, level] + extra[t, k, level]
                want[0][t] += dz * weight_in[row]
                want[1][row] += dz * x[t]
                want[2][row] += dz
                want[3][row] += act(z[t, k, level]) * g[t].numpy()
    for name, a, b in zip(("x", "weight_in", "bias_in", "weight_out"), got, want, strict=True):
        assert relative(oracle.array(a), b) <= 1e-7, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_gradients_in_other_types(dtype):
    args = random_layer(4, 5, 96, 50, dtype=dtype)
    g = torch.randn(50, 96).to(dtype)
    _, path, logits = NATIVE.fff_train(*args, 4, "gelu")
    got = NATIVE.fff_backward(g, *args, path, logits, 4, "gelu")
    exact = torch_backend.fff_backward(g.double(), *[a.double() for a in args], path, logits.double(), 4, "gelu")
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == dtype
        assert relative(oracle.array(a), oracle.array(b)) <= (1e-5 if dtype == torch.float32 else 1e-2)


def test_unvisited_nodes_have_zero_gradients():
    args = random_layer(1, 9, 16, 3)
    _, path, logits = NATIVE.fff_train(*args, 1, "gelu")
    _, grad_in, grad_bias, grad_out = NATIVE.fff_backward(torch.randn(3, 16), *args, path, logits, 1, "gelu")
    unvisited = torch.ones(1023, dtype=torch.bool)
    unvisited[path.flatten().long()] = False
    for grad in (grad_in, grad_bias, grad_out):
        assert not grad[unvisited].any() and grad[~unvisited].any()


def test_gradcheck():
    args = [a.requires_grad_() for a in random_layer(2, 3, 6, 4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: ops.fff(*a, 2, "gelu"), args)
    assert torch.autograd.gradcheck(lambda *a: ops.fff(*a, 2, "silu"), args)


def test_gradients_only_where_wanted():
    x, weight_in, bias_in, weight_out = random_layer(2, 3, 8, 4)
    weight_out.requires_grad_()
    ops.fff(x, weight_in, bias_in, weight_out, 2).sum().backward()
    assert weight_out.grad is not None and weight_in.grad is None
    x.requires_grad_()
    with torch.no_grad():
        assert not ops.fff(x, weight_in, bias_in, weight_out, 2).requires_grad
    ops.fff(x, weight_in, bias_in, weight_out.detach(), 2).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("operator", ["fff", "fff_train", "fff_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(operator, dtype):
    args = random_layer(2, 3, 16, 6, dtype=dtype)
    if operator == "fff_backward":
        _, path, logits = NATIVE.fff_train(*args, 2, "gelu")
        torch.library.opcheck(NATIVE.fff_backward, (torch.randn(6, 16).to(dtype), *args, path, logits, 2, "gelu"))
        for flags in ((True, False), (False, True)):
            torch.library.opcheck(
                NATIVE.fff_backward, (torch.randn(6, 16).to(dtype), *args, path, logits, 2, "gelu", 3.0, 1.0, *flags)
            )
    else:
        torch.library.opcheck(getattr(NATIVE, operator), (*args, 2, "gelu"))
    if operator == "fff_train":
        torch.library.opcheck(NATIVE.fff_train, (*[a.requires_grad_() for a in args], 2, "gelu"))


def test_leading_dimensions_strides_and_no_tokens():
    x, *weights = random_layer(2, 4, 24, 30)
    want = ops.fff(x, *weights, 2)
    assert torch.equal(ops.fff(x.view(5, 6, 24), *weights, 2), want.view(5, 6, 24))
    assert torch.equal(ops.fff(x[0], *weights, 2), want[0])
    assert torch.equal(ops.fff(x.t().contiguous().t(), *weights, 2), want)
    assert torch.equal(ops.fff(x.expand(3, 30, 24)[1:, ::2], *weights, 2), want.expand(3, 30, 24)[1:, ::2])
    strided = [w.repeat_interleave(2, 0)[::2] for w in weights]
    assert not strided[0].is_contiguous() and torch.equal(ops.fff(x, *strided, 2), want)
    empty = ops.fff(x[:0].view(0, 7, 24), *weights, 2)
    assert empty.shape == (0, 7, 24)
    leaves = [w.clone().requires_grad_() for w in weights]
    ops.fff(x[:0], *leaves, 2).sum().backward()
    assert not leaves[0].grad.any()


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# K, D, H, T: token by token, in blocks of tokens, tree by tree (deep ones, from 96 tokens on), and across their block sizes
BATCHES = [
    *[(1, 11, 768, t) for t in (2, 7, 8, 9, 95, 96, 150, 1100)],
    *[(k, d, 50, t) for k, d in ((1, 0), (3, 4), (8, 6)) for t in (7, 8, 63, 64, 65, 700)],
    (8, 8, 384, 150),
    (1, 11, 129, 3000),
    (3, 11, 129, 2100),
    (3, 9, 16, 3000),
    (2, 13, 40, 130),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", BATCHES, ids=lambda s: "x".join(map(str, s)))
def test_alone_or_in_a_batch_bit_for_bit(shape, dtype):
    n_trees, tokens = shape[0], shape[-1]
    x, *weights = random_layer(*shape, dtype=dtype)
    together, path, logits = NATIVE.fff_train(x, *weights, n_trees, "gelu")
    for count in (1, 2, 3):
        with threads(count):
            for a, b in zip(NATIVE.fff_train(x, *weights, n_trees, "gelu"), (together, path, logits), strict=True):
                assert torch.equal(a, b)
            assert torch.equal(ops.fff(x, *weights, n_trees), together)
    some = range(0, tokens, 1 + tokens // 100)
    alone = torch.cat([ops.fff(x[i : i + 1], *weights, n_trees) for i in some])
    assert torch.equal(together[list(some)], alone)
    half = tokens // 2
    parts = [ops.fff(part, *weights, n_trees) for part in (x[:half], x[half:])]
    assert torch.equal(torch.cat(parts), together)


def test_random_shapes_alone_in_a_batch_and_on_the_path():
    g = random.Random(0)
    for _ in range(25):
        n_trees, depth, hidden = g.choice((1, 3, 8)), g.randint(0, 11), g.choice((1, 7, 16, 31, 50, 97, 129))
        tokens = g.randint(0, 3000 if n_trees * (depth + 1) * hidden < 3000 else 400)
        args = random_layer(n_trees, depth, hidden, tokens, seed=tokens)
        y, path, logits = NATIVE.fff_train(*args, n_trees, "gelu")
        with threads(1):
            single = NATIVE.fff_train(*args, n_trees, "gelu")
        assert all(torch.equal(a, b) for a, b in zip(single, (y, path, logits), strict=True))
        some = torch.randperm(tokens)[:40]
        x, *weights = args
        alone = [ops.fff(x[i : i + 1], *weights, n_trees)[0] for i in some.tolist()]
        assert all(torch.equal(a, y[i]) for a, i in zip(alone, some.tolist(), strict=True))
        # and what it is: sums along its path, which turns where the logits say
        rows = path[some].long() + torch.arange(n_trees).unsqueeze(-1) * (2 ** (depth + 1) - 1)
        z = torch.einsum("th,tkdh->tkd", x[some].double(), weights[0][rows].double()) + weights[1][rows].double()
        want = torch.einsum("tkd,tkdh->th", torch.nn.functional.gelu(z), weights[2][rows].double())
        assert relative(oracle.array(y[some]), oracle.array(want)) <= 1e-5
        assert relative(oracle.array(logits[some]), oracle.array(z)) <= 1e-5
        turns = path[some][..., 1:] == 2 * path[some][..., :-1] + 2
        assert torch.equal(turns, logits[some][..., :-1] > 0)


def test_memory_does_not_grow():
    args = random_layer(1, 11, 64, 300)
    small = random_layer(2, 3, 16, 9)
    g = torch.randn(300, 64)
    _, path, logits = NATIVE.fff_train(*args, 1, "gelu")

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def calls(count):
        for _ in range(count):
            for _ in range(100):
                ops.fff(*small, 2)
            ops.fff(*args, 1)
            NATIVE.fff_backward(g, *args, path, logits, 1, "gelu", 3.0, 1.0)

    with threads(1):
        calls(10)
        before = resident()
        calls(40)
    assert resident() - before < 8 << 20


_CALLS = """
import os, sys, torch
sys.path.insert(0, "tests"), sys.path.insert(0, "tests/ops")
from test_operator import random_layer
from hf_fff import ops
torch.set_num_threads(1)
args = random_layer(2, 3, 64, 300)
packed = {rows: ops.pack(*args[1:], 2, rows) for rows in ops.ROWS}
calls = {
    "fff": lambda: torch.ops.hf_fff.fff(*args, 2, "gelu"),
    "fff_train": lambda: ops.fff_train(*args, 2, "gelu"),
    "int8": lambda: ops.fff_packed(args[0], packed["int8"], "gelu"),
    "bf16": lambda: ops.fff_packed(args[0], packed["bf16"], "gelu"),
}
for _ in range(3):
    for _ in range(int(sys.argv[2])):
        calls[sys.argv[1]]()
    print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""


@pytest.mark.parametrize("count", [2000, pytest.param(50_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("operator", ["fff", "fff_train", "int8", "bf16"])
def test_nothing_but_calls_uses_no_memory(operator, count):
    """What a binding leaks need not be large: a few bytes between two results keep the memory of both from being used again."""
    root = pathlib.Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _CALLS, operator, str(count)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    sizes = list(map(int, run.stdout.split()))
    assert sizes[-1] - sizes[0] < 16 << 20, sizes  # a result a call would be 300 MB


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("shape", [(4, 6, 100, 500), (1, 11, 200, 300), (2, 12, 70, 40), (3, 0, 33, 90)], ids=str)
def test_backward_is_deterministic_over_threads(shape, alpha):
    n_trees, _, hidden, tokens = shape
    args = random_layer(*shape)
    g = torch.randn(tokens, hidden)
    _, path, logits = NATIVE.fff_train(*args, n_trees, "gelu")
    grads = []
    for count in (1, 2, 3):
        with threads(count):
            grads.append(NATIVE.fff_backward(g, *args, path, logits, n_trees, "gelu", alpha, 1.0))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    x_alone = NATIVE.fff_backward(g, *args, path, logits, n_trees, "gelu", alpha, 1.0, True, False)[0]
    weights_alone = NATIVE.fff_backward(g, *args, path, logits, n_trees, "gelu", alpha, 1.0, False, True)[1:]
    assert torch.equal(x_alone, grads[0][0])
    assert all(torch.equal(a, b) for a, b in zip(weights_alone, grads[0][1:], strict=True))


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 11, 200, 300), (2, 11, 257, 70), (8, 3, 65, 900), (3, 7, 33, 1)], ids=str)
def test_gradients_of_many_tokens_are_pytorchs(shape, dtype, alpha):
    n_trees, _, hidden, tokens = shape
    args = random_layer(*shape, dtype=dtype)
    g = torch.randn(tokens, hidden).to(dtype)
    _, path, logits = NATIVE.fff_train(*args, n_trees, "gelu")
    got = NATIVE.fff_backward(g, *args, path, logits, n_trees, "gelu", alpha, 1.0)
    exact = [a.double() for a in (g, *args)]
    want = torch_backend.fff_backward(*exact, path, logits.double(), n_trees, "gelu", alpha, 1.0)
    for a, b in zip(got, want, strict=True):
        assert relative(oracle.array(a), oracle.array(b)) <= (1e-4 if dtype == torch.float32 else 1e-2)


def test_autocast():
    x, *weights = random_layer(2, 4, 32, 9)
    leaves = [w.clone().requires_grad_() for w in weights]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inference = ops.fff(x, *weights, 2)
        training = ops.fff(x, *leaves, 2)
    assert inference.dtype == training.dtype == torch.bfloat16
    want = ops.fff(x.bfloat16(), *[w.bfloat16() for w in weights], 2)
    assert torch.equal(inference, want) and torch.equal(training, want)
    training.sum().backward()
    assert leaves[0].grad.dtype == torch.float32


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fff = FFF(32, FFFConfig(n_trees=2, depth=3))

    def forward(self, x):
        return torch.relu(self.fff(x * 2)) + 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(dynamic):
    model = Small()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (7, 9):
        x = torch.randn(tokens, 32)
        assert torch.allclose(compiled(x), model(x))
        with torch.no_grad():
            assert torch.allclose(compiled(x), model(x))
        grads = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (model, compiled)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


@pytest.mark.full
def test_compile_with_inductor():
    model = Small()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(7, 32)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    grads = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (model, compiled)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_export():
    model = Small().eval()
    tokens = torch.export.Dim("tokens", min=1, max=512)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(5, 32),), dynamic_shapes={"x": {0: tokens}})
    assert any("hf_fff.fff" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(11, 32)
    assert torch.allclose(program.module()(x), model(x))


def test_functional_call_deepcopy_pickle_inference_mode():
    model = Small()
    x = torch.randn(4, 32)
    want = model(x)
    doubled = {name: p * 2 for name, p in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (x,))
    for p in model.parameters():
        p.data.mul_(2)
    assert torch.equal(got, model(x)) and not torch.equal(got, want)  # and no stale copy of the weights is in use
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), got)
    with torch.inference_mode():
        assert torch.equal(model(x), got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0][:, :5]), "must agree|hidden"),
        (lambda a: a.__setitem__(2, a[2][:3]), "bias_in"),
        (lambda a: a.__setitem__(3, a[3][:3]), "weight_out"),
        (lambda a: a.__setitem__(3, a[3].double()), "dtype"),
        (lambda a: a.__setitem__(1, a[1].flatten()), "weight_in"),
        (lambda a: [a.__setitem__(i, a[i][:-1]) for i in (1, 2, 3)], "trees|divide"),
        (lambda a: [a.__setitem__(i, a[i].int()) for i in range(4)], "float"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend, change, message):
    args = random_layer(2, 3, 8, 4)
    change(args)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        BACKENDS[backend].fff(*args, 2, "gelu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unknown_activation_and_trees(backend):
    args = random_layer(2, 3, 8, 4)
    with pytest.raises((RuntimeError, ValueError), match="tanhexp"):
        BACKENDS[backend].fff(*args, 2, "tanhexp")
    for n_trees in (0, -1, 7):
        with pytest.raises((RuntimeError, ValueError), match="trees"):
            BACKENDS[backend].fff(*args, n_trees, "gelu")


def test_add_bias():
    x, bias = torch.randn(2, 3, 8), torch.randn(8, requires_grad=True)
    assert torch.equal(ops.add_bias(x, bias), x + bias) and torch.equal(
        torch.ops.hf_fff.add_bias(x, bias.detach()), x + bias
    )
    (grad,) = torch.autograd.grad(ops.add_bias(x, bias).sum(), [bias])
    assert torch.equal(grad, torch.full_like(bias, 6))


def test_a_path_that_is_none_is_refused():
    args = random_layer(2, 3, 8, 4)
    _, path, logits = NATIVE.fff_train(*args, 2, "gelu")
    for wrong in (path + 1, torch.full_like(path, 2**30), path.clone().fill_(-5)):
        with pytest.raises(RuntimeError, match="path"):
            NATIVE.fff_backward(torch.randn(4, 8), *args, wrong, logits, 2, "gelu", 3.0, 1.0)


def test_sizes_that_overflow_are_refused():
    """More tokens than there is memory for, and more visits than an int64 counts: an error, before anything is read."""
    _, *weights = random_layer(2, 3, 1, 1)
    x = torch.zeros(1, 1).expand(2**60, 1)
    for call in (lambda: ops.fff(x, *weights, 2), lambda: NATIVE.fff_train(x, *weights, 2, "gelu")):
        with pytest.raises(RuntimeError, match="more visits than an int64 counts"):
            call()
    for rows in ops.ROWS:
        with pytest.raises(RuntimeError, match="more visits than an int64 counts"):
            ops.fff_packed(x, ops.pack(*weights, 2, rows), "gelu")


def test_more_threads_than_cores():
    args = random_layer(1, 8, 40, 300)
    want = NATIVE.fff_train(*args, 1, "gelu")
    with threads(8 * (os.cpu_count() or 1)):
        got = NATIVE.fff_train(*args, 1, "gelu")
        again = NATIVE.fff_train(args[0][:3], *args[1:], 1, "gelu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b[:3]) for a, b in zip(again, want, strict=True))


_ISA_SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch
from hf_fff import ops
import oracle
from test_operator import random_layer, relative
good = True
for shape in ((3, 5, 45, 20), (1, 11, 150, 120), (5, 6, 72, 300), (2, 3, 16, 3)):
    args = random_layer(*shape)
    y, path, logits = torch.ops.hf_fff.fff_train(*args, shape[0], "gelu")
    good &= relative(oracle.array(y), oracle.fff(*args, shape[0], path=path.numpy())[0]) < 1e-5
    good &= torch.equal(y[:1], torch.ops.hf_fff.fff(args[0][:1], *args[1:], shape[0], "gelu"))
    g = torch.randn_like(y)
    ours = torch.ops.hf_fff.fff_backward(g, *args, path, logits, shape[0], "gelu", 3.0, 1.0)
    theirs = ops.torch_backend.fff_backward(
        g.double(), *[a.double() for a in args], path, logits.double(), shape[0], "gelu", 3.0, 1.0
    )
    good &= all(relative(oracle.array(a), oracle.array(b)) < 1e-5 for a, b in zip(ours, theirs))
print(ops.isa(), good)
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "abacus"])
def test_instruction_sets(isa):
    here = os.path.dirname(os.path.abspath(__file__))
    script = _ISA_SCRIPT.format(path=[here, os.path.dirname(here)])
    env = {**os.environ, "HF_FFF_ISA": isa}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    if "is not available on this machine" in run.stderr and isa != "abacus":
        pytest.skip(f"this machine has no {isa}")
    if isa == "abacus":
        assert run.returncode != 0 and "HF_FFF_ISA='abacus'" in run.stderr and "baseline" in run.stderr
    else:
        assert run.stdout.split() == [isa, "True"], run.stderr
