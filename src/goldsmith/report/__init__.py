"""The report: files of runs and score files become one HTML page that needs nothing else."""
