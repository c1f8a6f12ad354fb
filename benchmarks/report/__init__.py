"""The report of `multisa bench`: what a bench.json may hold, its files for people, and two of them compared.

validate_bench, read_bench   is it a report of this schema (it may come from anybody)
write_report, summary_lines  CSV, Markdown and one HTML page; a few lines for the terminal
cut_text, cut_texts          what others' code says is cut before it goes into a report
compare_benches              what became slower, larger or less accurate, beyond noise
"""

from multisa.benchmarks.report.cells import cut_text
from multisa.benchmarks.report.changes import Comparison
from multisa.benchmarks.report.compare import compare_benches
from multisa.benchmarks.report.schema import cut_texts, read_bench, validate_bench
from multisa.benchmarks.report.text import summary_lines
from multisa.benchmarks.report.write import write_report

__all__ = [
    "Comparison",
    "compare_benches",
    "cut_text",
    "cut_texts",
    "read_bench",
    "summary_lines",
    "validate_bench",
    "write_report",
]
