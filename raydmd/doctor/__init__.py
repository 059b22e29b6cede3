"""``raydmd doctor``: what is wrong with a cluster, and what to do about it, before a run finds out."""
