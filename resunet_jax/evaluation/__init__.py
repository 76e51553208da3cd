"""Predictions and references to numbers and pictures."""
