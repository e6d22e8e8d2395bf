"""What a run leaves behind: results, tables, plots, one HTML file."""
