"""Runs side by side: what differs, who is best, what mattered; in a terminal, as JSON and as a page."""
