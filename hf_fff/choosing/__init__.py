"""The chooser: which kind of network, in the place of the FFNs, is the fastest that keeps the asked share of the quality."""

from .quality import HeldOut, Quality
from .results import Choice, Plan, Result
from .rows import EMBEDDERS, Data, prepare
from .search import choose

__all__ = ["EMBEDDERS", "Choice", "Data", "HeldOut", "Plan", "Quality", "Result", "choose", "prepare"]
