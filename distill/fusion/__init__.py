"""Fusion of several teachers: how much each counts, and at which temperature."""
