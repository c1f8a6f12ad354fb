"""The report of `multisa bench`: what a bench.json may hold, its files for people, and two of them compared.

validate_bench, read_bench   is it a report of this schema (it may come from anybody)
write_report, summary_lines  CSV, Markdown and one HTML page; a few lines for the terminal
compare_benches              what became slower, larger or less accurate, beyond noise
"""

from multisa.benchmarks.report.changes import Comparison
from multisa.benchmarks.report.compare import compare_benches
from multisa.benchmarks.report.schema import read_bench, validate_bench
from multisa.benchmarks.report.text import summary_lines
from multisa.benchmarks.report.write import write_report

__all__ = ["Comparison", "compare_benches", "read_bench", "summary_lines", "validate_bench", "write_report"]
