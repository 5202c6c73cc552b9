"""Tests, mirroring the four packages; a package itself, because some libraries install a `tests` of their own."""
