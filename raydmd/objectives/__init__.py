"""Objectives: pure functions, tensors in, tensors out, in the dtype they are given. No networks, no Ray."""
