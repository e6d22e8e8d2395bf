"""Results of runs: JSON, tables, plots, one HTML file, and the pages made of committed runs."""
