"""From a recipe to a run that can begin: everything resolved, opened and checked."""
