"""Self-contained HTML pages: sections of texts, tables, plots and pictures, rendered to one file."""
