"""The parts of tools/make_scenes.py: each makes files of the text-to-image problem."""
