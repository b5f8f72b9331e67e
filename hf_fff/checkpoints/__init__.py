"""Checkpoints of other make: read safely, and written as ours."""
