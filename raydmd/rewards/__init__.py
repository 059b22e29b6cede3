"""Reward models behind one interface: pixels and prompts in, one number per sample out."""
