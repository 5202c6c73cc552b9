"""Iterative solvers of (C + damping) x = b, from products with the curvature alone."""
