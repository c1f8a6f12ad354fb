"""What came out of a run: report.html with the uncertain images first, and the run in a few lines of text."""
