"""What cannot be in one recipe together. Each check raises a ValueError "KEY: what is wrong; how to mend it"."""
