"""Sampling, quality metrics with their intervals, and sample grids."""
