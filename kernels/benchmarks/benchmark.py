"""For `kernels benchmark`: one layer, against the definition in PyTorch for its outputs."""

import torch
from kernels.benchmark import Benchmark
from torch.nn import functional as F


class FFFBenchmark(Benchmark):
    seed = 0

    def _layer(self, n_trees, depth, hidden, tokens):
        nodes = n_trees * (2 ** (depth + 1) - 1)
        self.n_trees, self.depth = n_trees, depth
        self.x = torch.randn(tokens, hidden, device=self.device)
        self.weight_in = torch.randn(nodes, hidden, device=self.device) / hidden**0.5
        self.bias_in = torch.zeros(nodes, device=self.device)
        self.weight_out = torch.randn(nodes, hidden, device=self.device)
        self.out = torch.empty_like(self.x)

    def _run(self):
        self.out = self.kernel.fff(self.x, self.weight_in, self.bias_in, self.weight_out, self.n_trees)

    def _defined(self):
        tree_nodes = 2 ** (self.depth + 1) - 1
        first = torch.arange(self.n_trees, device=self.device) * tree_nodes
        node = torch.zeros(self.x.shape[0], self.n_trees, dtype=torch.long, device=self.device)
        y = torch.zeros_like(self.x)
        for _ in range(self.depth + 1):
            rows = first + node
            z = torch.einsum("th,tkh->tk", self.x, self.weight_in[rows]) + self.bias_in[rows]
            y += torch.einsum("tk,tkh->th", F.gelu(z), self.weight_out[rows])
            node = 2 * node + 1 + (z > 0).long()
        return y

    def setup_one_token(self):
        self._layer(1, 11, 768, 1)

    def benchmark_one_token(self):
        self._run()

    def verify_one_token(self):
        return self._defined()

    def setup_1x11(self):
        self._layer(1, 11, 768, 1024)

    def benchmark_1x11(self):
        self._run()

    def verify_1x11(self):
        return self._defined()

    def setup_8x8(self):
        self._layer(8, 8, 768, 1024)

    def benchmark_8x8(self):
        self._run()

    def verify_8x8(self):
        return self._defined()
