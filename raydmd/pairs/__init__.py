"""Noise-image pairs: made by the teacher, sharded on disk, read by position."""
