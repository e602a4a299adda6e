"""Trackers of a run's values and pictures: metrics.jsonl, TensorBoard, W&B, and those of plug-ins."""
