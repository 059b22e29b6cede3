"""raydmd: distil diffusion and flow models into few-step generators on a Ray cluster."""

__version__ = "0.1.0"
