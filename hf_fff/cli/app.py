"""The application with all its commands: each file that is imported here adds its own."""

from . import bench, card, choose, convert, distill, env, evaluate, export, importing, push, train
from .common import app

__all__ = [
    "app",
    "bench",
    "card",
    "choose",
    "convert",
    "distill",
    "env",
    "evaluate",
    "export",
    "importing",
    "push",
    "train",
]
