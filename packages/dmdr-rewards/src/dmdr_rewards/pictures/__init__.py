"""Pictures as rewards take them, and the pixels that networks see."""
