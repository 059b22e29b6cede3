"""Metrics, sample grids and reports."""
