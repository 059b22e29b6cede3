"""Data beside the prompts: read, checked, encoded once, drawn by position."""
