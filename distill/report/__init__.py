"""Report of runs: one HTML page with tables and plots that needs no network."""
