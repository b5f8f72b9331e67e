"""Model cards, and pushing a model's folder to the Hub."""

from .card import Card, make_card, write_card
from .contents import Contents, look_through, with_remote_code
from .push import Pushed, push_folder
from .results import add_results

__all__ = [
    "Card",
    "Contents",
    "Pushed",
    "add_results",
    "look_through",
    "make_card",
    "push_folder",
    "with_remote_code",
    "write_card",
]
