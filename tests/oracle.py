"""The definition (arXiv 2311.10770, section 2), one token, one tree, one node at a time, in float64. Slow, and shares no code with
the package: what the package is checked against."""

import math

import numpy as np

ACTIVATIONS = {
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_new": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: z if not z <= 0 else 0.0,
    "silu": lambda z: z / (1 + math.exp(-z)),
    "identity": lambda z: z,
}


def array(tensor):
    return tensor.detach().cpu().double().numpy()


def fff(x, weight_in, bias_in, weight_out, n_trees, activation="gelu", path=None):
    """Output ``[T, H]``, path ``[T, K, D+1]`` and logits of the same shape.

    With a ``path`` given, that path is followed instead of the definition's, so that outputs can be compared where rounding turned
    a decision that is close to a tie.
    """
    x, weight_in, bias_in, weight_out = (array(t) for t in (x, weight_in, bias_in, weight_out))
    act = ACTIVATIONS[activation]
    tree_nodes = weight_in.shape[0] // n_trees
    levels = (tree_nodes + 1).bit_length() - 1
    assert tree_nodes == 2**levels - 1
    y = np.zeros_like(x)
    own_path = np.zeros((len(x), n_trees, levels), dtype=np.int64)
    logits = np.zeros((len(x), n_trees, levels))
    for t in range(len(x)):
        for k in range(n_trees):
            n = 0
            for level in range(levels):
                if path is not None:
                    n = int(path[t, k, level])
                row = k * tree_nodes + n
                z = float(np.dot(x[t], weight_in[row]) + bias_in[row])
                y[t] += act(z) * weight_out[row]
                own_path[t, k, level], logits[t, k, level] = n, z
                n = 2 * n + 2 if z > 0 else 2 * n + 1
    return y, own_path, logits


def routing_term(x, grad_y, weight_in, bias_in, weight_out, n_trees, activation, alpha, tau):
    """What the straight-through routing gradient adds to dL/dz of the visited nodes: ``[T, K, D+1]``.

    For a visited node with logit z: alpha * (v_right - v_left) * s(z/tau) * (1 - s(z/tau)) / tau, where v_c is
    ``<dL/dy, output of the path that descends greedily from child c>``.
    """
    _, path, logits = fff(x, weight_in, bias_in, weight_out, n_trees, activation)
    x, grad_y, weight_in, bias_in, weight_out = (array(t) for t in (x, grad_y, weight_in, bias_in, weight_out))
    act = ACTIVATIONS[activation]
    tree_nodes = weight_in.shape[0] // n_trees
    levels = path.shape[-1]

    def worth(t, k, n):
        total = 0.0
        while n < tree_nodes:
            row = k * tree_nodes + n
            z = float(np.dot(x[t], weight_in[row]) + bias_in[row])
            total += float(np.dot(grad_y[t], act(z) * weight_out[row]))
            n = 2 * n + 2 if z > 0 else 2 * n + 1
        return total

    result = np.zeros_like(logits)
    for t in range(len(x)):
        for k in range(n_trees):
            for level in range(levels - 1):
                n, z = path[t, k, level], logits[t, k, level]
                s = 1 / (1 + math.exp(-z / tau))
                result[t, k, level] = alpha * (worth(t, k, 2 * n + 2) - worth(t, k, 2 * n + 1)) * s * (1 - s) / tau
    return result


def integers(row):
    """Along the last axis: the nearest of -127 to 127 to each number's share of the largest, and what one of them is worth."""
    row = row.astype(np.float32)
    most = abs(row).max(-1, keepdims=True)
    up = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    return np.rint(row * up).astype(np.float64), (most / np.float32(127)).astype(np.float64)


def bf16(values):
    """Rounded to 8 bits of mantissa, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def fff_packed(x, weight_in, bias_in, weight_out, n_trees, rows, activation="gelu"):
    """Output ``[T, H]`` and path of a packed layer: products of 8-bit integers, or of bf16 numbers, everything else in float64.

    A token, a row of ``weight_in`` and a row of ``weight_out`` have a scale each; what the output rows are multiplied by, with their
    scales in it, has one a token.
    """
    x, weight_in, bias_in, weight_out = (array(t) for t in (x, weight_in, bias_in, weight_out))
    act, tree_nodes = ACTIVATIONS[activation], weight_in.shape[0] // n_trees
    levels = (tree_nodes + 1).bit_length() - 1
    if rows == "int8":
        (x, x_scale), (weight_in, scale_in), (weight_out, scale_out) = map(integers, (x, weight_in, weight_out))
    else:
        x, weight_in, weight_out = map(bf16, (x, weight_in, weight_out))
        x_scale, scale_in, scale_out = (np.ones((len(t), 1)) for t in (x, weight_in, weight_out))
    y, path = np.zeros_like(x), np.zeros((len(x), n_trees, levels), dtype=np.int64)
    for t in range(len(x)):
        factors, used = [], []
        for k in range(n_trees):
            n = 0
            for level in range(levels):
                row = k * tree_nodes + n
                z = float(np.dot(x[t], weight_in[row]) * (x_scale[t, 0] * scale_in[row, 0]) + bias_in[row])
                path[t, k, level] = n
                factors.append(act(z) * scale_out[row, 0])
                used.append(row)
                n = 2 * n + 2 if z > 0 else 2 * n + 1
        factor, scale = integers(np.array(factors)) if rows == "int8" else (bf16(factors), np.ones(1))
        y[t] = factor @ weight_out[used] * scale
    return y, path
