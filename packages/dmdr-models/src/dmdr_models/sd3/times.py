"""Where SD3's sampling ends."""

T_END = 0.001
"""Where sampling ends. A stock pipeline goes on to 0 in its last step; the pictures do not differ to the eye."""
