"""A scan in, masks on the scan's own grid out."""
