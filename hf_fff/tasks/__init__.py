"""What a task is: how its rows are read and encoded, which head it wants, and how it is scored."""

from .data import Columns, Encoded, read_rows
from .evaluate import evaluate
from .kinds import TASKS, Task, get_task

__all__ = ["TASKS", "Columns", "Encoded", "Task", "evaluate", "get_task", "read_rows"]
