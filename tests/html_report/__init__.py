"""A package, so that its conftest.py is another module than that of all tests."""
