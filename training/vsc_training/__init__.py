"""Fit Variational Sparse Coding models with torch."""
