"""Page about stores: one HTML file with samples, answers of teachers, statistics, checksums and gaps."""
