"""Search over sparse codes."""
