"""Ways of training that the package does not have, for the experiments."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from hf_fff.layers import MLP
from hf_fff.training.arguments import FastArguments
from hf_fff.training.base import FastTrainer


@contextmanager
def plain_mlps(rate: float | None) -> Iterator[None]:
    """MLPs, beside trees too, train in no units of their own, at ``rate``; None leaves them as they are."""
    measure, rate_of = FastTrainer._measure_units, FastArguments.rate_of

    def measured(self):
        measure(self)
        for p in (p for m in self.model.modules() if isinstance(m, MLP) for p in m.parameters()):
            self._units.pop(p, None)

    def rate_of_kind(self, kind):
        return rate if kind == "mlp" else rate_of(self, kind)

    if rate is None:
        yield
        return
    with (
        mock.patch.object(FastTrainer, "_measure_units", measured),
        mock.patch.object(FastArguments, "rate_of", rate_of_kind),
    ):
        yield
