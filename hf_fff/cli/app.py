"""The application with all its commands: each file that is imported here adds its own."""

from . import bench, choose, convert, distill, env, evaluate, export, importing
from .common import app

__all__ = ["app", "bench", "choose", "convert", "distill", "env", "evaluate", "export", "importing"]
