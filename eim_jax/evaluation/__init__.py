"""Scores of trained arms: tasks and metrics."""
