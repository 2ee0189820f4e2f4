"""Exact search of an index against scipy's plain products."""
