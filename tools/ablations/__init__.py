"""The studies of tools/ablate.py, a file each, with their runs, tables and figures."""
