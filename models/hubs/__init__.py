"""Networks of others, one module per hub."""
