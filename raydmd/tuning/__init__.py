"""Search spaces and sweeps on Ray Tune."""
