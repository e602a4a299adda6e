"""The built-in text-to-image problem: pictures of two shapes, their captions, a teacher, a reward and a check."""

from .captions import all_captions, held_out_captions, training_captions
from .check import brightness, check
from .drawing import draw

__all__ = ["all_captions", "brightness", "check", "draw", "held_out_captions", "training_captions"]
