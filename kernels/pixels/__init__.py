"""Conversion of pixels to network input."""
