"""The operator against the oracle, natively and in PyTorch, and its manners as a torch operator."""

import copy
import os
import pickle
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


def test_alone_or_in_a_batch_bit_for_bit():
    for n_trees, depth, hidden in ((1, 11, 768), (8, 8, 384), (3, 4, 50)):
        x, *weights = random_layer(n_trees, depth, hidden, 150)
        together = ops.fff(x, *weights, n_trees)
        alone = torch.cat([ops.fff(x[i : i + 1], *weights, n_trees) for i in range(len(x))])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            single = ops.fff(x, *weights, n_trees)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(together, alone) and torch.equal(together, single)


def test_backward_is_deterministic_over_threads():
    args = random_layer(4, 6, 100, 500)
    g = torch.randn(500, 100)
    _, path, logits = NATIVE.fff_train(*args, 4, "gelu")
    both = [NATIVE.fff_backward(g, *args, path, logits, 4, "gelu", 3.0, 1.0)]
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            both.append(NATIVE.fff_backward(g, *args, path, logits, 4, "gelu", 3.0, 1.0))
        finally:
            torch.set_num_threads(threads)
    for other in both[1:]:
        assert all(torch.equal(a, b) for a, b in zip(both[0], other, strict=True))


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


def test_a_path_that_is_none_is_refused():
    args = random_layer(2, 3, 8, 4)
    _, path, logits = NATIVE.fff_train(*args, 2, "gelu")
    for wrong in (path + 1, torch.full_like(path, 2**30), path.clone().fill_(-5)):
        with pytest.raises(RuntimeError, match="path"):
            NATIVE.fff_backward(torch.randn(4, 8), *args, wrong, logits, 2, "gelu", 3.0, 1.0)


_ISA_SCRIPT = """
import sys
sys.path[:0] = {path!r}
import torch
from hf_fff import ops
import oracle
from test_operator import random_layer, relative
args = random_layer(3, 5, 45, 20)
y, path, logits = torch.ops.hf_fff.fff_train(*args, 3, "gelu")
print(ops.isa(), relative(oracle.array(y), oracle.fff(*args, 3, path=path.numpy())[0]) < 1e-5)
g = torch.randn(20, 45)
ours = torch.ops.hf_fff.fff_backward(g, *args, path, logits, 3, "gelu", 3.0, 1.0)
theirs = ops.torch_backend.fff_backward(g, *args, path, logits, 3, "gelu", 3.0, 1.0)
print(all(relative(oracle.array(a), oracle.array(b)) < 1e-5 for a, b in zip(ours, theirs)))
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
        assert run.stdout.split() == [isa, "True", "True"], run.stderr
