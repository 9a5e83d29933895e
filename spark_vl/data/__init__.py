"""Recipes, safe image loading, sampling and quarantine."""
