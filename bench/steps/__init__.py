"""Whole training steps to measure: ours, and what people have today."""
