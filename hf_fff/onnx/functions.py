"""An FFF as a function of ONNX: the definition of an operation of the domain ``hf_fff`` by standard operations."""

from ..config import FFFConfig

DOMAIN, VERSION = "hf_fff", 1
OPSET = 20  # the first with Gelu

_ACTIVATIONS = {  # of level i
    "gelu": ("a_{i} = Gelu(z_{i})",),
    "gelu_new": ('a_{i} = Gelu<approximate = "tanh">(z_{i})',),
    "relu": ("a_{i} = Relu(z_{i})",),
    "silu": ("s_{i} = Sigmoid(z_{i})", "a_{i} = Mul(z_{i}, s_{i})"),
    "identity": ("a_{i} = Identity(z_{i})",),
}


def name_of(config: FFFConfig) -> str:
    """Of the operation, such as ``"FFF_8x8_gelu"``: a function has no loops, so trees of another depth are another one."""
    return f"FFF_{config.shorthand}_{config.activation}"


def text_of(config: FFFConfig) -> str:
    """The function in ONNX's text: ``x [..., H]`` and the weights of an ``FFF`` -> ``y [..., H]``.

    One step a level: the rows of the nodes that T tokens are at in K trees, ``[T, K]``, are gathered, give logits and a part of
    the output, and the rows of the next level. The children of node n are 2n + 1 and 2n + 2 within a tree that starts at row r,
    so that row i is followed by ``2 i + (1 - r)``, or by the row after that where the logit is above zero.
    """
    assert config.n_trees is not None and config.depth is not None
    trees, size = config.n_trees, config.nodes // config.n_trees
    starts = [k * size for k in range(trees)]
    lines = [
        "minus_one = Constant<value_ints = [-1]>()",
        "one = Constant<value_ints = [1]>()",
        "two = Constant<value_ints = [2]>()",
        "zero = Constant<value_float = 0.0>()",
        f"trees = Constant<value_ints = [{trees}]>()",
        f"starts = Constant<value_ints = {starts}>()",
        f"offsets = Constant<value_ints = {[1 - start for start in starts]}>()",
        "shape = Shape(x)",
        "hidden = Shape<start = -1>(x)",
        "flat = Concat<axis = 0>(minus_one, hidden)",
        "tokens = Reshape(x, flat)",  # [T, H]
        "columns = Unsqueeze(tokens, two)",  # [T, H, 1]
        "count = Shape<start = 0, end = 1>(tokens)",
        "walks = Concat<axis = 0>(count, trees)",
        "rows_0 = Expand(starts, walks)",  # [T, K]
    ]
    for i in range(config.depth + 1):
        lines += [
            f"rows_in_{i} = Gather(weight_in, rows_{i})",  # [T, K, H]
            f"products_{i} = MatMul(rows_in_{i}, columns)",
            f"sums_{i} = Squeeze(products_{i}, two)",
            f"biases_{i} = Gather(bias_in, rows_{i})",
            f"z_{i} = Add(sums_{i}, biases_{i})",  # [T, K]
            *(line.format(i=i) for line in _ACTIVATIONS[config.activation]),
            f"factors_{i} = Unsqueeze(a_{i}, one)",
            f"rows_out_{i} = Gather(weight_out, rows_{i})",
            f"part_{i} = MatMul(factors_{i}, rows_out_{i})",  # [T, 1, H]
            f"y_{i} = Add(y_{i - 1}, part_{i})" if i else "y_0 = Identity(part_0)",
        ]
        if i < config.depth:
            lines += [
                f"right_{i} = Greater(z_{i}, zero)",
                f"turn_{i} = Cast<to = 7>(right_{i})",  # to int64
                f"twice_{i} = Mul(rows_{i}, two)",
                f"left_{i} = Add(twice_{i}, offsets)",
                f"rows_{i + 1} = Add(left_{i}, turn_{i})",
            ]
    lines.append(f"y = Reshape(y_{config.depth}, shape)")
    body = "\n".join(f"  {line}" for line in lines)
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{name_of(config)} (x, weight_in, bias_in, weight_out) => (y)'
    return f"{head} {{\n{body}\n}}\n"
