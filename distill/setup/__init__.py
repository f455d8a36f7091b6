"""Setup of a training run: resolves a recipe, opens its stores and sources, and checks that they fit."""
