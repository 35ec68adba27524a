"""What a sweep leaves for people: tables, figures, sample sheets."""

from raysched.report.summary import print_summary
from raysched.report.write import write_report

__all__ = ["print_summary", "write_report"]
