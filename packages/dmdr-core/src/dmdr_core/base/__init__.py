"""What the other modules stand on: checks of arguments, devices, precision."""
