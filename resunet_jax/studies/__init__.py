"""Ablations and cross-validations: variants × splits × seeds, trained, tested and put into one table."""
