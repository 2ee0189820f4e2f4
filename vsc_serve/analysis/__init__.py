"""Look at codes: what is active, what it draws."""
