"""Two trainings small enough for a CPU, from the data to a picture of the result."""
