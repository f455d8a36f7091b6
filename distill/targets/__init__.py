"""Sources of the teachers' targets: stores, or teachers run live."""
