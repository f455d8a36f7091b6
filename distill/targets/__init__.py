"""Sources of the teachers' targets: stores, or the teachers run live."""
