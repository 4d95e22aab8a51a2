"""Measurements, side by side with others in one run. Not tests: nothing here asserts a time."""
