"""Tiny trained pipelines in diffusers' own formats, and the scripts that make them."""
