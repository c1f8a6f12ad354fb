"""The report of a run: report.html with the most uncertain images first, and a summary as text."""
