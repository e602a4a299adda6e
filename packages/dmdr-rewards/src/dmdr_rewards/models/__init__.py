"""The rewards that run a network on this machine: one module each."""
