"""Experiments that reproduce the literature: `python -m experiments.<command>`."""
