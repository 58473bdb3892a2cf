"""A run as one HTML page, for a person who was not there."""

from bmaml_ppl.report.write import write_report

__all__ = ["write_report"]
