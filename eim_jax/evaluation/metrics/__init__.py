"""Scores of texts against references, and each test item's share in them."""
