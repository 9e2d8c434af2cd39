"""All tests; a package, so that one of this name elsewhere does not hide it."""
