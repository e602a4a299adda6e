"""The commands of `dmdr-train`."""
