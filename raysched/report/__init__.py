"""What a sweep leaves for people: tables, figures, sample sheets."""

from raysched.report.write import write_report

__all__ = ["write_report"]
