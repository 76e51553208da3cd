"""Models on disk: saved, loaded, verified, converted."""
