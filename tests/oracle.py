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
