"""Frozen models served to many clients: pure parts (batcher, health, router, codec) and Ray parts (replica, pool)."""
