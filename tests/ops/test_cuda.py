"""The CUDA kernels: the operator against the oracle on a GPU, in every way that the kernels have, and its manners there."""

import contextlib
import os
import random

import oracle
import pytest
import torch
from test_operator import SHAPES, Small, random_layer, relative

from hf_fff import ops
from hf_fff.ops import torch_backend

pytestmark = pytest.mark.gpu
OPS = torch.ops.hf_fff
WAYS = ("plain", "gather", "sorted", "tiles", "columns", "forest", "dense")
DEVICE = "cuda"
# what the ways are for: deep single trees, several trees, every remainder of a tile of 64 tokens, rows of no even length
MORE = [
    (1, 11, 768, 1000),
    (1, 11, 128, 333),
    (1, 8, 64, 65),
    (1, 5, 64, 130),
    (1, 6, 192, 64),
    (4, 9, 256, 70),
    (8, 8, 384, 33),
    (2, 13, 40, 90),
]


@pytest.fixture(autouse=True)
def native_is_there():
    assert ops.backend("cuda") == "native", ops.load("cuda").reason


@pytest.fixture(params=["automatic", *WAYS])
def way(request, monkeypatch):
    monkeypatch.setenv("HF_FFF_CUDA_WAY", request.param)
    return request.param


@contextlib.contextmanager
def by(way):
    before = os.environ.get("HF_FFF_CUDA_WAY")
    os.environ["HF_FFF_CUDA_WAY"] = way
    try:
        yield
    finally:
        os.environ.pop("HF_FFF_CUDA_WAY")
        if before is not None:
            os.environ["HF_FFF_CUDA_WAY"] = before


def there(tensors):
    return [t.to(DEVICE) for t in tensors]


def along(args, n_trees, path, activation="gelu"):
    """Outputs and logits in float64 on the CPU along a path: quick, for many tokens."""
    x, weight_in, bias_in, weight_out = (a.cpu().double() for a in args)
    rows = path.cpu().long() + torch.arange(n_trees).unsqueeze(-1) * (len(weight_in) // n_trees)
    act, _ = torch_backend.activation_functions(activation)
    y, every = torch.empty_like(x), []
    for t in range(len(x)):
        z = weight_in[rows[t].flatten()] @ x[t] + bias_in[rows[t].flatten()]
        y[t] = act(z) @ weight_out[rows[t].flatten()]
        every.append(z)
    z = torch.stack(every) if every else torch.empty(0, dtype=torch.double)
    return y, z.view(path.shape)


def is_a_path(path, z, near):
    """Roots, children of their parents, turned where the logits say, but where they are near a tie."""
    path, z = path.cpu(), z.cpu()
    right = path[..., 1:] == 2 * path[..., :-1] + 2
    left = path[..., 1:] == 2 * path[..., :-1] + 1
    return bool(
        (path[..., 0] == 0).all()
        and (right | left).all()
        and ((right == (z[..., :-1] > 0)) | (z[..., :-1].abs() < near)).all()
    )


@pytest.mark.parametrize("shape", [*SHAPES, *MORE], ids=lambda s: "x".join(map(str, s)))
def test_forward_is_the_definition(way, shape):
    n_trees, depth, hidden, tokens = shape
    args = random_layer(*shape)
    y, path, logits = (t.cpu() for t in OPS.fff_train(*there(args), n_trees, "gelu"))
    assert y.shape == (tokens, hidden) and path.shape == logits.shape == (tokens, n_trees, depth + 1)
    assert path.dtype == torch.int32
    want, z = along(args, n_trees, path)
    assert relative(oracle.array(y), want.numpy()) <= 1e-5 and relative(oracle.array(logits), z.numpy()) <= 1e-5
    assert is_a_path(path, z, 1e-4)
    again = OPS.fff(*there(args), n_trees, "gelu").cpu()
    assert torch.equal(again, y)


def test_against_the_oracle_itself(way):
    args = random_layer(3, 4, 64, 40)
    y, path, logits = (t.cpu() for t in OPS.fff_train(*there(args), 3, "gelu"))
    want, _, z = oracle.fff(*args, 3, path=path.numpy())
    assert relative(oracle.array(y), want) <= 1e-5 and relative(oracle.array(logits), z) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(
    "shape",
    # more tokens than are sorted together; one token; trees that are no multiple of four; tiles that are not full
    [(8, 8, 768, 9000), (4, 9, 128, 17000), (3, 7, 64, 1), (5, 5, 320, 130), (16, 7, 192, 777), (64, 5, 64, 70)],
    ids=lambda s: "x".join(map(str, s)),
)
def test_several_trees_on_tensor_cores(shape, dtype, bound):
    if torch.cuda.get_device_properties().shared_memory_per_block_optin < 227 << 10:
        pytest.skip("this GPU's blocks have too little shared memory")
    n_trees, depth, _, tokens = shape
    args = there(random_layer(*shape, dtype=dtype))
    with by("forest"):
        y, path, logits = OPS.fff_train(*args, n_trees, "gelu")
        assert torch.equal(OPS.fff(*args, n_trees, "gelu"), y)
    with by("plain"):
        assert not torch.equal(OPS.fff(*args, n_trees, "gelu"), y)  # which rounds no coefficients
    some = torch.arange(0, tokens, max(1, tokens // 500), device=DEVICE)
    want, z = along([args[0][some], *args[1:]], n_trees, path[some])
    assert relative(oracle.array(y[some]), want.numpy()) <= bound
    assert relative(oracle.array(logits[some]), z.numpy()) <= 1e-5
    assert is_a_path(path, logits, 0)
    # with all tokens at one leaf
    args[2] += 30
    with by("forest"):
        assert OPS.fff(args[0][:0], *args[1:], n_trees, "gelu").shape == (0, shape[2])
        y, path, _ = OPS.fff_train(*args, n_trees, "gelu")
    assert (path[..., -1] == 2 ** (depth + 1) - 2).all()
    want, _ = along([args[0][some], *args[1:]], n_trees, path[some])
    assert relative(oracle.array(y[some]), want.numpy()) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("tokens", [16, 70])
def test_wide_layers_take_masked_products_from_few_tokens_on(tokens, dtype, bound):
    args = there(random_layer(128, 2, 64, tokens, dtype=dtype))
    results = []
    for way in ("automatic", "dense"):
        with by(way):
            y, path, logits = OPS.fff_train(*args, 128, "gelu")
            grads = OPS.fff_backward(args[0].flip(0), *args, path, logits, 128, "gelu", 3.0, 0.7)
        results.append((y, path, logits, *grads))
    assert all(map(torch.equal, *results))
    want, _ = along(args, 128, path)
    assert relative(oracle.array(y), want.numpy()) <= bound
    assert is_a_path(path, logits, 0)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("shape", [(1, 11, 128, 200), (3, 4, 64, 40), (2, 3, 33, 40)], ids=str)
def test_activations_and_types(way, shape, dtype, bound, activation):
    args = random_layer(*shape, dtype=dtype)
    args[0] *= 3  # into the tails
    y, path, logits = OPS.fff_train(*there(args), shape[0], activation)
    assert y.dtype == dtype and logits.dtype == (dtype if dtype == torch.float64 else torch.float32)
    want, z = along(args, shape[0], path, activation)
    assert relative(oracle.array(y), want.numpy()) <= bound
    if way != "dense":  # which rounds the logits
        assert relative(oracle.array(logits), z.numpy()) <= 1e-5
        assert is_a_path(path, z, 1e-3)


def test_ties_and_nan_go_left(way):
    weight_in, weight_out = torch.zeros(7, 64), torch.arange(7.0).unsqueeze(1).expand(7, 64).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(70, 64)
        x[1] = float("nan")
        args = there(t.to(dtype) for t in (x, weight_in, torch.zeros(7), weight_out))
        y, path, _ = OPS.fff_train(*args, 1, "gelu")
        assert path[:2].flatten(1).tolist() == [[0, 1, 3], [0, 1, 3]]
        assert not y[0].any() and y[1].isnan().all() and not y[2:].any()
        args[2] += 1e-30
        assert OPS.fff_train(*args, 1, "gelu")[1][0].flatten().tolist() == [0, 2, 6]
        args[0].fill_(float("inf")), args[1].add_(1)
        assert OPS.fff_train(*args, 1, "relu")[1][0].flatten().tolist() == [0, 2, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_as_on_the_cpu(dtype):
    x, *weights = random_layer(1, 11, 64, 5000, dtype=dtype)
    x[7], x[8, 3], x[9, 5], x[4999, 0] = float("nan"), float("inf"), float("-inf"), float("nan")
    for tokens in (16, 5000):
        y, path, _ = OPS.fff_train(*there([x[:tokens], *weights]), 1, "relu")
        want, right, _ = OPS.fff_train(x[:tokens], *weights, 1, "relu")
        for token in (7, 8, 9, tokens - 1):
            assert torch.equal(path[token].cpu(), right[token]) or tokens - 1 == token
            assert torch.equal(y[token].isnan().cpu(), want[token].isnan())
        others = [i for i in range(tokens) if i not in (7, 8, 9, 4999)]
        assert y[others].isfinite().all()


GRADIENTS = [
    *[
        (1, 0, 8, 6),
        (1, 5, 33, 11),
        (3, 4, 16, 7),
        (8, 3, 40, 30),
        (1, 11, 768, 700),
        (1, 11, 64, 5000),
        (1, 13, 24, 900),
    ],
    *[(4, 9, 128, 300), (2, 3, 1100, 70), (64, 0, 8, 20), (1, 2, 8, 20000), (1, 4, 768, 9000), (128, 2, 64, 16)],
]


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("way", "shape"),
    [
        *[("automatic", s) for s in GRADIENTS],
        *[(w, s) for w in ("plain", "tiles") for s in GRADIENTS if s[2] % 64 == 0],
        *[
            ("tiles", (1, 5, 64, 130)),
            ("tiles", (64, 5, 128, 333)),
            ("tiles", (8, 8, 192, 65)),
            ("tiles", (2, 6, 64, 1)),
        ],
        *[("dense", (3, 4, 16, 7)), ("dense", (4, 9, 128, 300))],
    ],
    ids=str,
)
def test_gradients(shape, dtype, alpha, way):
    """As PyTorch's in float64, which test_operator checks against the oracle, on the same paths."""
    n_trees, tokens = shape[0], shape[-1]
    args = random_layer(*shape, dtype=dtype)
    g = torch.randn(tokens, shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    with by("plain"):
        _, path, logits = OPS.fff_train(*there(args), n_trees, "gelu")
    with by(way):
        got = OPS.fff_backward(*there([g, *args]), path, logits, n_trees, "gelu", alpha, 0.7)
        again = OPS.fff_backward(*there([g, *args]), path, logits, n_trees, "gelu", alpha, 0.7)
        x_alone = OPS.fff_backward(*there([g, *args]), path, logits, n_trees, "gelu", alpha, 0.7, True, False)
        weights_alone = OPS.fff_backward(*there([g, *args]), path, logits, n_trees, "gelu", alpha, 0.7, False, True)
    exact = [a.double() for a in there([g, *args])]
    want = torch_backend.fff_backward(*exact, path, logits.double(), n_trees, "gelu", alpha, 0.7)
    # The routing gradient compares subtrees that the token did not visit: in 16 bits some of its walks there turn elsewhere.
    routing = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.4, torch.float16: 0.2}[dtype]
    bound = (
        routing
        if alpha
        else {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    )
    for name, a, b in zip(("x", "weight_in", "bias_in", "weight_out"), got, want, strict=True):
        assert a.dtype == dtype
        assert relative(oracle.array(a), oracle.array(b)) <= bound, name
    if way != "dense" and not alpha:
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    for a, b in zip((x_alone[0], *weights_alone[1:]), got, strict=True):
        assert relative(oracle.array(a), oracle.array(b)) <= 1e-2
    assert [len(t) for t in (*x_alone[1:], weights_alone[0])] == [0] * 4


def test_unvisited_nodes_have_zero_gradients():
    args = there(random_layer(1, 9, 16, 3))
    _, path, logits = OPS.fff_train(*args, 1, "gelu")
    _, *grads = OPS.fff_backward(torch.randn(3, 16, device=DEVICE), *args, path, logits, 1, "gelu")
    unvisited = torch.ones(1023, dtype=torch.bool)
    unvisited[path.flatten().cpu().long()] = False
    for grad in grads:
        assert not grad[unvisited].any() and grad[~unvisited].any()


@pytest.mark.parametrize("way", ["plain", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_deterministic(way, dtype, monkeypatch):
    """Bit for bit, also with all tokens at one leaf, and while other work runs beside it."""
    monkeypatch.setenv("HF_FFF_CUDA_WAY", way)
    for pull in (0.0, 30.0):
        args = there(random_layer(1, 11, 256, 30000, dtype=dtype))
        args[2] += pull
        g = torch.randn_like(args[0])
        _, path, logits = OPS.fff_train(*args, 1, "gelu")
        torch.use_deterministic_algorithms(True)
        try:
            runs = [OPS.fff_backward(g, *args, path, logits, 1, "gelu") for _ in range(4)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_uneven_subtrees():
    """Most tokens in one subtree, so that it is cut into chunks, some subtrees with a few, many with none."""
    x, *weights = there(random_layer(1, 11, 128, 20000, dtype=torch.bfloat16))
    weights[1][:63] += 1.5  # logits are about 1: fourteen of fifteen tokens go to the right
    g = torch.randn_like(x)
    _, path, logits = OPS.fff_train(x, *weights, 1, "gelu")
    below = path[..., 6].flatten().unique(return_counts=True)[1]
    assert len(below) < 64 and below.max() > 4 * below.float().mean()
    with by("tiles"):
        got = OPS.fff_backward(g, x, *weights, path, logits, 1, "gelu")
    want = torch_backend.fff_backward(*[t.double() for t in (g, x, *weights)], path, logits.double(), 1, "gelu")
    for a, b in zip(got, want, strict=True):
        assert relative(oracle.array(a), oracle.array(b)) <= 1e-2
    assert torch.equal(got[1].any(1), want[1].any(1))  # nobody there: zeros


def test_gradcheck():
    args = [a.requires_grad_() for a in there(random_layer(2, 3, 6, 4, dtype=torch.float64))]
    for activation in ("gelu", "silu"):
        assert torch.autograd.gradcheck(lambda *a, f=activation: ops.fff(*a, 2, f), args)


@pytest.mark.parametrize("operator", ["fff", "fff_train", "fff_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(operator, dtype):
    args = there(random_layer(2, 3, 16, 6, dtype=dtype))
    if operator == "fff_backward":
        _, path, logits = OPS.fff_train(*args, 2, "gelu")
        for more in ((), (0.0, 1.0, True, False), (0.0, 1.0, False, True)):
            torch.library.opcheck(OPS.fff_backward, (torch.randn_like(args[0]), *args, path, logits, 2, "gelu", *more))
    else:
        torch.library.opcheck(getattr(OPS, operator), (*args, 2, "gelu"))
    if operator == "fff_train":
        torch.library.opcheck(OPS.fff_train, (*[a.requires_grad_() for a in args], 2, "gelu"))


def test_leading_dimensions_strides_and_no_tokens(way):
    x, *weights = there(random_layer(1, 6, 64, 30, dtype=torch.bfloat16))
    want = ops.fff(x, *weights, 1)
    assert torch.equal(ops.fff(x.view(5, 6, 64), *weights, 1), want.view(5, 6, 64))
    assert torch.equal(ops.fff(x.t().contiguous().t(), *weights, 1), want)
    assert torch.equal(ops.fff(x.expand(3, 30, 64)[1:, ::2], *weights, 1), want.expand(3, 30, 64)[1:, ::2])
    strided = [w.repeat_interleave(2, 0)[::2] for w in weights]
    assert not strided[0].is_contiguous() and torch.equal(ops.fff(x, *strided, 1), want)
    assert ops.fff(x[:0].view(0, 7, 64), *weights, 1).shape == (0, 7, 64)
    leaves = [w.clone().requires_grad_() for w in weights]
    ops.fff(x[:0], *leaves, 1).sum().backward()
    assert not leaves[0].grad.any()
    off = torch.empty(30 * 64 + 1, device=DEVICE, dtype=x.dtype)[1:].view(30, 64)  # starts between two words
    off.copy_(x)
    assert torch.allclose(ops.fff(off, *weights, 1).float(), want.float(), rtol=2e-2, atol=2e-2)
    g = torch.randn_like(x)
    _, path, logits = OPS.fff_train(x, *weights, 1, "gelu")
    for a, b in zip(
        OPS.fff_backward(g, off, *weights, path, logits, 1, "gelu"),
        OPS.fff_backward(g, x, *weights, path, logits, 1, "gelu"),
        strict=True,
    ):
        assert relative(oracle.array(a), oracle.array(b)) < 1e-2


def test_random_shapes():
    """Many shapes, each in a way drawn for it, with canaries around the outputs of the framework's allocator."""
    g = random.Random(int(os.environ.get("HF_FFF_TEST_SEED", "0")))
    for _ in range(int(os.environ.get("HF_FFF_TEST_SHAPES", "150"))):
        n_trees, depth, hidden = (
            g.choice((1, 1, 2, 3, 8)),
            g.randint(0, 12),
            g.choice((1, 7, 8, 16, 33, 64, 96, 128, 192, 256, 320)),
        )
        tokens = g.randint(0, 600 if n_trees * (depth + 1) < 40 else 60)
        dtype, bound = g.choice(
            ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float64, 1e-12))
        )
        args = [a.to(dtype) for a in random_layer_there(n_trees, depth, hidden, tokens)]
        with by(g.choice(("automatic", *WAYS[:-1]))):
            y, path, logits = OPS.fff_train(*args, n_trees, "gelu")
            assert torch.equal(OPS.fff(*args, n_trees, "gelu"), y)
        exact = [a.double() for a in args]
        rows = path.long() + torch.arange(n_trees, device=DEVICE).unsqueeze(-1) * (2 ** (depth + 1) - 1)
        z = (exact[1][rows] * exact[0][:, None, None]).sum(-1) + exact[2][rows]
        want = (torch.nn.functional.gelu(z).unsqueeze(-1) * exact[3][rows]).sum((1, 2))
        shape = (n_trees, depth, hidden, tokens, dtype)
        assert far(y, want) <= bound and far(logits, z) <= 1e-5, shape
        assert is_a_path(path, logits, 0), shape
        grad = torch.randn_like(args[0])
        with by(g.choice(("automatic", "plain", "tiles"))):
            got = OPS.fff_backward(grad, *args, path, logits, n_trees, "gelu")
        right = torch_backend.fff_backward(grad.double(), *exact, path, logits.double(), n_trees, "gelu")
        # A sum of few biases' gradients may come out near zero: it is as exact as its terms, which tensor cores round.
        scales = (0, 0, (hidden * tokens) ** 0.5, 0)
        for a, b, scale in zip(got, right, scales, strict=True):
            assert far(a, b, scale) <= 2 * bound, shape


def far(a, b, scale=0.0):
    norm = max(float(b.double().norm()), scale)
    return float((a.double() - b.double()).norm()) / norm if norm else float(a.double().norm())


def random_layer_there(n_trees, depth, hidden, tokens):
    nodes = n_trees * (2 ** (depth + 1) - 1)
    shapes = ((tokens, hidden), (nodes, hidden), (nodes,), (nodes, hidden))
    scales = (1, hidden**-0.5, 0.3, 1)
    return [torch.randn(*s, device=DEVICE) * scale for s, scale in zip(shapes, scales, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(way, dtype):
    args = there(random_layer(1, 8, 128, 300, dtype=dtype))
    g = torch.randn_like(args[0])
    wanted = OPS.fff_train(*args, 1, "gelu")
    grads = OPS.fff_backward(g, *args, *wanted[1:], 1, "gelu")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        OPS.fff_backward(g, *args, *OPS.fff_train(*args, 1, "gelu")[1:], 1, "gelu")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, path, logits = OPS.fff_train(*args, 1, "gelu")
        more = OPS.fff_backward(g, *args, path, logits, 1, "gelu")
    for _ in range(2):
        y.zero_(), more[1].zero_()
        graph.replay()
        assert torch.equal(y, wanted[0]) and torch.equal(path, wanted[1])
        assert all(relative(oracle.array(a), oracle.array(b)) < 1e-3 for a, b in zip(more, grads, strict=True))
    before = args[0].clone()
    args[0].copy_(args[0].flip(0))
    graph.replay()
    assert torch.equal(y, wanted[0].flip(0)) and not torch.equal(args[0], before)


def test_streams(way):
    """Work on a side stream waits for what is before it there, and for nothing else."""
    x, *weights = there(random_layer(1, 8, 128, 3000, dtype=torch.bfloat16))
    want = ops.fff(x, *weights, 1)
    slow, side = torch.randn(4000, 4000, device=DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        for _ in range(20):
            slow = slow @ slow / 100
        late.copy_(x)
        got = ops.fff(late, *weights, 1)
    side.synchronize()
    assert torch.equal(got, want)


def test_no_wait_for_the_device():
    args = there(random_layer(1, 11, 256, 5000, dtype=torch.bfloat16))
    g = torch.randn_like(args[0])
    _, path, logits = OPS.fff_train(*args, 1, "gelu")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in ("automatic", *WAYS[:-1]):
            with by(name):
                _, path, logits = OPS.fff_train(*args, 1, "gelu")
        OPS.fff_backward(g, *args, path, logits, 1, "gelu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compile(backend):
    model = Small().to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for tokens in (7, 9):
        x = torch.randn(tokens, 32, device=DEVICE)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
        grads = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (model, compiled)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads, strict=True))


def test_autocast():
    x, *weights = there(random_layer(2, 4, 32, 9))
    leaves = [w.clone().requires_grad_() for w in weights]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inference, training = ops.fff(x, *weights, 2), ops.fff(x, *leaves, 2)
    assert inference.dtype == training.dtype == torch.bfloat16 and torch.equal(inference, training)
    training.sum().backward()
    assert leaves[0].grad.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 11, 128, 2000), (1, 11, 64, 70), (8, 5, 64, 900), (2, 3, 24, 50), (64, 5, 64, 2048), (1, 2, 8, 0)],
    ids=str,
)
@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_training_under_autocast(shape, given, alpha):
    """The kernels cast and give float32 gradients; the same numbers as when PyTorch casts before the operator and after."""
    n_trees, dtype = shape[0], torch.float16 if given == torch.float16 else torch.bfloat16
    x, *weights = [t.requires_grad_() for t in there(random_layer(*shape))]
    x = x.detach().to(given).requires_grad_()
    leaves = [x, *weights]
    g = torch.randn(x.shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    with torch.autocast("cuda", dtype=dtype):
        y = ops.fff(x, *weights, n_trees, "gelu", alpha, 0.7)
    assert y.dtype == dtype and type(y.grad_fn).__name__ == "_OnGpuBackward"
    got = torch.autograd.grad(y, leaves, g, retain_graph=True)
    cast = [t.detach().to(dtype) for t in leaves]
    want_y, path, logits = OPS.fff_train(*cast, n_trees, "gelu")
    want = OPS.fff_backward(g, *cast, path, logits, n_trees, "gelu", alpha, 0.7)
    assert torch.equal(y, want_y)
    for a, b, leaf in zip(got, want, leaves, strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        assert (
            not a.numel()
            or relative(oracle.array(a), oracle.array(b)) <= {torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        )
    some = [torch.autograd.grad(y, leaves[i], g, retain_graph=True)[0] for i in (0, 1, 3)]
    assert all(torch.equal(a, b) for a, b in zip(some, (got[0], got[1], got[3]), strict=True))


def test_training_under_autocast_elsewhere():
    """Checkpointing, frozen parts, layers whose weights have 16 bits, compiled ones: all as without the short way."""
    x, *weights = there(random_layer(1, 8, 64, 300))
    leaves = [x.requires_grad_(), *[w.requires_grad_() for w in weights]]

    def run(*args):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return ops.fff(*args, 1, "gelu", 3.0, 1.0)

    want = torch.autograd.grad(run(*leaves).float().square().sum(), leaves)
    for reentrant in (False, True):
        y = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant)
        grads = torch.autograd.grad(y.float().square().sum(), leaves) if not reentrant else None
        if reentrant:  # works with backward() alone
            y.float().square().sum().backward()
            grads = [leaf.grad for leaf in leaves]
        assert all(torch.equal(a, b) for a, b in zip(grads, want, strict=True))
    (alone,) = torch.autograd.grad(run(x, *[w.detach() for w in weights]).float().square().sum(), [x])
    assert torch.equal(alone, want[0])
    half = [w.detach().bfloat16().requires_grad_() for w in weights]
    run(x, *half).sum().backward()
    assert half[0].grad.dtype == torch.bfloat16
    y = run(*leaves)
    with pytest.raises(RuntimeError, match="does not require grad|once_differentiable"):
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("way", ["automatic", "dense"])
def test_backward_inside_autocast(way):
    """Where many call it: neither the types nor the numbers may change."""
    args = there(random_layer(3, 4, 64, 300))
    _, path, logits = OPS.fff_train(*args, 3, "gelu")
    with by(way):
        want = OPS.fff_backward(args[0], *args, path, logits, 3, "gelu", 3.0, 1.0)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            got = OPS.fff_backward(args[0], *args, path, logits, 3, "gelu", 3.0, 1.0)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32 and relative(oracle.array(a), oracle.array(b)) <= 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(0, a[0][:, :5]), "must agree|hidden"),
        (lambda a: a.__setitem__(2, a[2][:3]), "bias_in"),
        (lambda a: a.__setitem__(3, a[3][:3]), "weight_out"),
        (lambda a: a.__setitem__(3, a[3].double()), "dtype"),
        (lambda a: a.__setitem__(3, a[3].cpu()), "one device"),
        (lambda a: a.__setitem__(1, a[1].flatten()), "weight_in"),
        (lambda a: [a.__setitem__(i, a[i][:-1]) for i in (1, 2, 3)], "trees|divide"),
        (lambda a: [a.__setitem__(i, a[i].int()) for i in range(4)], "float"),
    ],
)
def test_bad_arguments(change, message):
    args = there(random_layer(2, 3, 8, 4))
    change(args)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError), match=message):
        OPS.fff(*args, 2, "gelu")


def test_a_path_that_is_none_harms_nothing():
    """Looking at it would make the host wait for the device: it is taken for the nearest leaf."""
    args = there(random_layer(2, 3, 8, 4))
    _, path, logits = OPS.fff_train(*args, 2, "gelu")
    for wrong in (path + 1, torch.full_like(path, 2**30), torch.full_like(path, -5), torch.full_like(path, -(2**31))):
        grads = OPS.fff_backward(args[0], *args, wrong, logits, 2, "gelu")
        torch.cuda.synchronize()
        assert all(g.isfinite().all() for g in grads)


def test_out_of_memory_is_an_error_and_harms_nothing():
    """Through the stable ABI torch's error comes as a plain RuntimeError; what it says goes to stderr."""
    x, *weights = there(random_layer(1, 3, 64, 4, dtype=torch.bfloat16))
    huge = x[:1].expand(1 << 29, 64)  # contiguous, it would be 64 GB, and its output too
    if torch.cuda.mem_get_info()[0] > 120 << 30:
        pytest.skip("this GPU has room for it")
    with pytest.raises(RuntimeError):
        ops.fff(huge, *weights, 1)
    assert ops.fff(x, *weights, 1).isfinite().all()


@pytest.mark.parametrize("way", ["plain", "gather", "tiles"])
def test_more_than_2_to_the_31_elements(way):
    hidden, tokens = 768, (1 << 31) // 768 + 1000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("not enough memory")
    few, *weights = there(random_layer(1, 7, hidden, 64, dtype=torch.bfloat16))
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = few
    x[:-64] = few[0]
    with by(way):
        y = ops.fff(x, *weights, 1)
        want = ops.fff(few, *weights, 1)
    assert torch.equal(y[-64:], want) and torch.equal(y[: 1 << 20 : 999], want[:1].expand(len(y[: 1 << 20 : 999]), -1))


def test_backward_of_more_than_2_to_the_31_elements():
    hidden, tokens = 768, (1 << 31) // 768 + 1000
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("not enough memory")
    few, *weights = there(random_layer(1, 7, hidden, 64, dtype=torch.bfloat16))
    x, g = torch.zeros(2, tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    x[-64:] = few
    g[-64:] = few.flip(0)  # all others have no gradient, and their x is zero
    for way in ("plain", "tiles"):
        with by(way):
            got = OPS.fff_backward(g, x, *weights, *OPS.fff_train(x, *weights, 1, "gelu")[1:], 1, "gelu")
            want = OPS.fff_backward(few.flip(0), few, *weights, *OPS.fff_train(few, *weights, 1, "gelu")[1:], 1, "gelu")
        assert relative(oracle.array(got[0][-64:]), oracle.array(want[0])) < 1e-2
        assert not got[0][: 1 << 20 : 999].any()
        for a, b in zip(got[1:], want[1:], strict=True):
            assert relative(oracle.array(a), oracle.array(b)) < 1e-2
        del got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 3, 768), (1000, 24), (7, 33), (0, 8), (64,)], ids=str)
@torch.no_grad()
def test_add_bias(shape, dtype):
    x, bias = torch.randn(shape, device=DEVICE).to(dtype), torch.randn(shape[-1], device=DEVICE).to(dtype)
    for of in (x, x[..., 1:] if shape[-1] % 2 else x, x.T.contiguous().T if x.ndim == 2 else x):
        row = bias[: of.shape[-1]]
        assert torch.equal(ops.add_bias(of, row), of + row) and torch.equal(OPS.add_bias(of, row), of + row)
    with pytest.raises(RuntimeError, match="one number for each column"):
        OPS.add_bias(x, bias[:1].repeat(3))


def test_add_bias_has_gradients():
    x, bias = torch.randn(6, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE, requires_grad=True)
    ops.add_bias(x, bias).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x)) and torch.equal(bias.grad, torch.full_like(bias, 6))


def test_what_is_said_about_the_way():
    assert ops.way(1, 11, 768, 131072, torch.bfloat16) == "tiles"
    assert ops.way(1, 11, 768, 64, torch.bfloat16) == "gather"
    assert ops.way(1, 11, 33, 64, torch.float64) == "plain"
    assert ops.way(8, 8, 768, 131072, torch.bfloat16) == "forest"
    assert ops.way(8, 9, 768, 131072, torch.bfloat16) == "columns"
    assert ops.way(64, 5, 768, 131072, torch.bfloat16) == "dense"
    assert ops.way(32, 6, 768, 131072, torch.float32) == "gather"
    assert ops.way(1, 11, 768, 131072, torch.float32) == "sorted"
    assert ops.way(1, 11, 768, 131072, torch.bfloat16, backward=True) == "tiles"
    assert ops.way(1, 11, 768, 131072, torch.float32, backward=True) == "conditional"
    assert ops.way(32, 6, 768, 131072, torch.bfloat16, backward=True) == "dense"
    for backward, few in ((False, "gather"), (True, "conditional")):
        for tokens in (512, 32, 16):  # a batch of short sentences; and one of them
            assert ops.way(512, 2, 384, tokens, torch.bfloat16, backward=backward) == "dense"
            assert ops.way(512, 2, 384, tokens, torch.float32, backward=backward) == "dense"
        assert ops.way(512, 2, 384, 15, torch.bfloat16, backward=backward) == few
    for dtype in (torch.bfloat16, torch.float32):  # with few visits, rows are quicker forward
        assert ops.way(8, 8, 768, 32, dtype) == "gather" and ops.way(8, 8, 768, 32, dtype, backward=True) == "dense"
        assert ops.way(4, 9, 384, 32, dtype, backward=True) == "conditional"  # nobody measured this
        assert ops.way(512, 2, 33, 32, dtype) == "plain"  # nor this
        assert ops.way(8, 12, 64, 32, dtype, backward=True) == "conditional"  # too deep for Triton
    assert ops.way(32, 6, 768, 32, torch.bfloat16) == "dense" and ops.way(32, 6, 768, 32, torch.float32) == "gather"


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_gpus
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("shape", [(1, 8, 128, 5000), (8, 5, 64, 300)], ids=str)
def test_another_gpu_than_the_current_one(current, shape, way):
    """All of a training step is on the tensors' GPU, on its current stream, whichever is the current one; results are equal."""
    args = random_layer(*shape, dtype=torch.bfloat16)
    g = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for device in (0, 1):
        with torch.cuda.device(current):
            *there_args, there_g = [t.to(f"cuda:{device}") for t in (*args, g)]
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side), torch.cuda.device(current):  # a stream makes its GPU the current one
                y, path, logits = OPS.fff_train(*there_args, shape[0], "gelu")
                grads = OPS.fff_backward(there_g, *there_args, path, logits, shape[0], "gelu", 3.0, 1.0)
                leaves = [t.float().requires_grad_() for t in there_args]
                with torch.autocast("cuda", torch.bfloat16):
                    mixed = ops.fff(*leaves, shape[0])
                mixed.backward(there_g)
            side.synchronize()
            assert torch.cuda.current_device() == current
        found = [y, path, logits, *grads, mixed.detach(), *[leaf.grad for leaf in leaves]]
        assert all(t.device.index == device for t in found)
        results.append([t.cpu() for t in found])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@two_gpus
def test_tensors_of_two_gpus_are_refused():
    args = [t.to("cuda:1") for t in random_layer(1, 8, 128, 50, dtype=torch.bfloat16)]
    with pytest.raises(RuntimeError, match="one device"):
        OPS.fff(args[0].to("cuda:0"), *args[1:], 1, "gelu")
    _, path, logits = OPS.fff_train(*args, 1, "gelu")
    with pytest.raises(RuntimeError, match="x's device"):
        OPS.fff_backward(args[0], *args, path.to("cuda:0"), logits, 1, "gelu")
    with pytest.raises(RuntimeError, match="one device"), torch.autocast("cuda", torch.bfloat16):
        leaves = [t.float().requires_grad_() for t in args]
        ops.fff(leaves[0].to("cuda:0"), *leaves[1:], 1)
