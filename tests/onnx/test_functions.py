"""An FFF as a function of ONNX, in ONNX Runtime: against the definition."""

import oracle
import pytest
import torch

pytest.importorskip("onnx.parser", reason="onnx is not installed")  # "onnx" is this folder, too
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx
import onnxruntime as runtime
from onnx import TensorProto, helper, numpy_helper

from hf_fff import FFF
from hf_fff.onnx.functions import DOMAIN, OPSET, VERSION, name_of, text_of
from hf_fff.ops import ACTIVATIONS


def session(layer, axes):
    """One layer, as a model of its own."""
    names = ["weight_in", "bias_in", "weight_out"]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [*axes, layer.hidden_size]) for n in ("x", "y")]
    node = helper.make_node(name_of(layer.config), ["x", *names], ["y"], domain=DOMAIN)
    weights = [numpy_helper.from_array(getattr(layer, n).detach().numpy(), n) for n in names]
    model = helper.make_model(
        helper.make_graph([node], "layer", ports[:1], ports[1:], weights),
        functions=[onnx.parser.parse_function(text_of(layer.config))],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    opened = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(opened.run(None, {"x": x.numpy()})[0])


def assert_is_the_definition(layer, x, y):
    weights = (layer.weight_in, layer.bias_in, layer.weight_out)
    want, _, _ = oracle.fff(x.flatten(0, -2), *weights, layer.n_trees, layer.config.activation)
    torch.testing.assert_close(y.double(), torch.from_numpy(want).view(x.shape), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    layer = FFF(24, {"n_trees": 3, "depth": 4, "activation": activation})
    x = torch.randn(2, 9, 24)
    assert_is_the_definition(layer, x, session(layer, ("b", "t"))(x))


@pytest.mark.parametrize(("shape", "hidden"), [("1x0", 8), ("5x0", 7), ("1x7", 33), ("7x1", 16), ("4x5", 1)])
def test_shapes_of_trees(shape, hidden):
    layer = FFF(hidden, shape)
    x = torch.randn(17, hidden)
    assert_is_the_definition(layer, x, session(layer, ("t",))(x))


def test_any_number_of_tokens():
    layer = FFF(12, "2x3")
    call = session(layer, ("b", "t"))
    for rows, tokens in ((1, 1), (3, 40), (5, 2)):
        x = torch.randn(rows, tokens, 12)
        assert_is_the_definition(layer, x, call(x))


def test_a_logit_of_zero_goes_left():
    layer = FFF(4, "1x1")
    with torch.no_grad():
        layer.bias_in.zero_()
    x = torch.zeros(1, 4)
    with torch.no_grad():
        layer.bias_in[1], layer.bias_in[2] = 1, 2  # left, right
    y = session(layer, ("t",))(x)
    torch.testing.assert_close(y[0], torch.nn.functional.gelu(torch.tensor(1.0)) * layer.weight_out[1].detach())
