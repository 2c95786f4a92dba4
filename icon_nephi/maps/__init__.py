"""Callables with Jacobians: transforms, the networks that return them, framed maps."""
