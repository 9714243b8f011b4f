"""Run folders in words: `report` of one, `compare` of several, as Markdown. Nothing here draws."""

from adaptive_opt.report.compare import compare
from adaptive_opt.report.single import report
from adaptive_opt.report.summary import Summary, Unreadable, summary

__all__ = ["Summary", "Unreadable", "compare", "report", "summary"]
