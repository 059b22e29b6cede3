"""Public benchmarks: samples go out as their own tools expect them, scores come back as figures.

The tools pin their own torch and weights, so they run in environments of their own, between ``write``
and ``read``. No adapter needs more than raydmd itself.
"""
