"""The tests, their ranks and their references."""
