"""How fast `vsc encode` is, beside what others would write and beside what its parts allow."""
